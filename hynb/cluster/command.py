"""The `hynb hosts` command."""

from __future__ import annotations

import argparse
import getpass
import sys
import warnings
from collections.abc import Sequence

from hynb.cluster import hostfile
from hynb.cluster.hostfile import ClusterDir
from hynb.cluster.ssh import Ssh, is_local
from hynb.cluster.ssh_key import find_or_make_key, install_key, lines_for
from hynb.cluster.ssh_setup import DEFAULT_FOLDER, Confirm, HostKey, exchange_keys, include, setup, trust
from hynb.errors import ClusterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hynb hosts`."""
    parser.description = "Passwordless ssh to the hosts of a cluster, on any port."
    verbs = parser.add_subparsers(title="verbs", dest="act", required=True, metavar="VERB")
    for name, help_text in (
        ("setup", "key, host keys, logins; writes hostfile and ssh_config"),
        ("trust", "look at a host's key and keep it"),
        ("install-key", "install the key on a host with its password, asked for once"),
        ("show", "the lines to run on each host by hand"),
        ("exchange", "let every host log in on every other (openmpi, mpich)"),
        ("include", "include the settings from ~/.ssh/config, so that plain ssh has them too"),
    ):
        verb = verbs.add_parser(name, help=help_text)
        verb.add_argument("--folder", default=DEFAULT_FOLDER, help=f"of the cluster [{DEFAULT_FOLDER}]")
        verb.add_argument("--key", help="private key [~/.ssh/id_ed25519, made where there is none]")
        if name == "setup":
            verb.add_argument("hosts", help="ip:8,ip:8 or a hostfile")
            verb.add_argument("--port", type=int, default=22, help="of sshd on every host [22]")
            verb.add_argument("--user", help="who logs in there [you]")
            verb.add_argument("--password", action="store_true", help="ask once for the password, to install the key")
        if name in ("trust", "install-key"):
            verb.add_argument("host")
        if name in ("setup", "trust"):
            verb.add_argument(
                "--accept",
                action="append",
                default=[],
                metavar="FINGERPRINT",
                help="SHA256:… of a host key, confirmed",
            )
        if name == "include":
            verb.add_argument("--remove", action="store_true", help="take it back")


def run(args: argparse.Namespace) -> int:
    """Runs one verb of `hynb hosts`; 2 when a host can't be logged in on yet.

    Raises:
        ClusterError: what is wrong and what to do.
    """
    cluster = ClusterDir(args.folder)
    if args.act == "setup":
        return _run_setup(args, cluster)
    if not cluster.ssh_config.is_file():
        raise ClusterError(f"folder = {args.folder}: has no ssh_config; `hynb hosts setup` writes it")
    if args.act == "trust":
        print(f"{args.host}: {trust(cluster, args.host, _confirm_by(args.accept))}")
    elif args.act == "install-key":
        install_key(
            cluster,
            args.host,
            find_or_make_key(args.key),
            ("" if is_local(args.host) else _password(f"password of {args.host}: ")),
        )
        print(f"{args.host}: key installed")
    elif args.act == "show":
        key, ssh = find_or_make_key(args.key), Ssh(config=cluster.ssh_config)
        for host in hostfile.read(cluster.hostfile):
            if not is_local(host.name):
                print("\n".join([f"# on {host.name}", *lines_for(host.name, key, ssh.address(host.name)[1]), ""]))
    elif args.act == "exchange":
        exchange_keys(cluster, hostfile.read(cluster.hostfile))
        print("every host can log in on every other")
    elif args.act == "include":
        changed = include(cluster, remove=args.remove)
        print(f"~/.ssh/config: {'changed' if changed else 'nothing to change'}")
    return 0


def _run_setup(args: argparse.Namespace, cluster: ClusterDir) -> int:
    hosts = hostfile.named(args.hosts)
    password = _password("password on the hosts: ") if args.password else None
    states = setup(
        hosts,
        cluster.path,
        port=args.port,
        user=args.user,
        key=args.key,
        confirm=_confirm_by(args.accept),
        password=password,
        on_host=lambda state: print(f"{state.name}: {state.done or 'not yet'}", flush=True),
    )
    problems = [state.problem for state in states if state.problem]
    if problems:
        raise ClusterError(problems)
    print(f"written: {cluster.hostfile}, {cluster.ssh_config}\nnext:    hynb preflight --hostfile {cluster.hostfile}")
    return 0


def _password(question: str) -> str:
    try:
        with warnings.catch_warnings():
            # Better no password than one that everybody can read on the screen.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass(question)
    except (getpass.GetPassWarning, EOFError):
        raise ClusterError(
            "password: there is no terminal at which it could be typed unseen. Run this in one, or run what "
            "`hynb hosts show` prints on each host"
        ) from None


def _confirm_by(accepted: Sequence[str]) -> Confirm:
    """Keys whose fingerprint was given are confirmed; of others the person at the terminal is asked."""

    def confirm(host: str, keys: Sequence[HostKey]) -> bool:
        if any(item.fingerprint in accepted for item in keys):
            return True
        if not sys.stdin.isatty():
            return False
        print(f"{host} shows these keys for the first time:")
        for item in keys:
            print(f"  {item.fingerprint} ({item.kind})")
        return input("Are they its own? Keep them [y/N]: ").strip().lower() in ("y", "yes")

    return confirm
