"""The `hynb hosts` command."""

from __future__ import annotations

import argparse
import getpass
import shlex
import sys
import warnings
from collections.abc import Sequence

from hynb.cluster import hostfile
from hynb.cluster.hostfile import ClusterDir
from hynb.cluster.network import is_local
from hynb.cluster.ssh import Ssh
from hynb.cluster.ssh_exchange import exchange_keys
from hynb.cluster.ssh_key import find_or_make_key, install_key, lines_for
from hynb.cluster.ssh_settings import include
from hynb.cluster.ssh_setup import DEFAULT_FOLDER, Confirm, HostKey, setup, trust
from hynb.errors import ClusterError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hynb hosts`."""
    parser.description = "Passwordless ssh to the hosts of a cluster, on any port."
    verbs = parser.add_subparsers(title="commands", dest="verb", required=True, metavar="COMMAND")
    for name, help_text in (
        ("setup", "create a key, accept host keys, try logins; writes hostfile and ssh_config"),
        ("trust", "look at a host's key and accept it"),
        ("install-key", "install the key on a host with a password that is entered once"),
        ("show", "print the commands to run on each host by hand"),
        ("exchange", "let every host log in on every other one (openmpi, mpich)"),
        ("include", "include the settings in ~/.ssh/config, so that plain ssh uses them too"),
    ):
        verb = verbs.add_parser(name, help=help_text)
        verb.add_argument("--folder", default=DEFAULT_FOLDER, help=f"folder of the cluster [{DEFAULT_FOLDER}]")
        verb.add_argument("--key", help="private key [~/.ssh/id_ed25519, created if there is none]")
        if name == "setup":
            verb.add_argument("hosts", help="ip:8,ip:8 or a hostfile")
            verb.add_argument("--port", type=int, default=22, help="port of sshd on every host [22]")
            verb.add_argument("--user", help="login name there [your own]")
            verb.add_argument("--password", action="store_true", help="ask once for the password, to install the key")
        if name in ("trust", "install-key"):
            verb.add_argument("host")
        if name in ("setup", "trust"):
            verb.add_argument(
                "--accept",
                action="append",
                default=[],
                metavar="FINGERPRINT",
                help="accept the host key with this fingerprint (SHA256:…)",
            )
        if name == "include":
            verb.add_argument("--remove", action="store_true", help="remove the line again")


def run(args: argparse.Namespace) -> int:
    """Runs one verb of `hynb hosts`.

    Raises:
        ClusterError: what is wrong and what to do.
    """
    cluster = ClusterDir(args.folder)
    if args.verb == "setup":
        return _run_setup(args, cluster)
    if not cluster.ssh_config.is_file():
        raise ClusterError(f"folder = {args.folder}: has no ssh_config; `hynb hosts setup` writes it")
    if args.verb == "trust":
        print(f"{args.host}: {trust(cluster, args.host, _confirm_by(args.accept))}")
    elif args.verb == "install-key":
        key = find_or_make_key(args.key)
        password = "" if is_local(args.host) else _ask_password(f"password of {args.host}: ")
        install_key(cluster, args.host, key, password)
        print(f"{args.host}: key installed")
    elif args.verb == "show":
        key, ssh = find_or_make_key(args.key), Ssh(config=cluster.ssh_config)
        for host in hostfile.read(cluster.hostfile):
            if not is_local(host.name):
                print("\n".join([f"# on {host.name}", *lines_for(key, ssh.address(host.name)[1]), ""]))
    elif args.verb == "exchange":
        exchange_keys(cluster, hostfile.read(cluster.hostfile))
        print("every host can log in on every other one")
    elif args.verb == "include":
        changed = include(cluster, remove=args.remove)
        print(f"~/.ssh/config: {'changed' if changed else 'nothing to change'}")
    return 0


def _run_setup(args: argparse.Namespace, cluster: ClusterDir) -> int:
    hosts = hostfile.named(args.hosts)
    password = _ask_password("password on the hosts: ") if args.password else None
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
    check = shlex.join(["hynb", "preflight", "--hostfile", str(cluster.hostfile)])
    print(f"written: {cluster.hostfile}, {cluster.ssh_config}\nnext:    {check}")
    return 0


def _ask_password(question: str) -> str:
    try:
        with warnings.catch_warnings():
            # Without a terminal getpass warns, and shows what is typed.
            warnings.simplefilter("error", getpass.GetPassWarning)
            return getpass.getpass(question)
    except (getpass.GetPassWarning, EOFError):
        raise ClusterError(
            "password: there is no terminal in which it could be typed without being shown. Run this command in "
            "one, or run the commands that `hynb hosts show` prints on each host"
        ) from None


def _confirm_by(accepted: Sequence[str]) -> Confirm:
    """Accepts keys with a given fingerprint, and asks about others if there is a terminal."""

    def confirm(host: str, keys: Sequence[HostKey]) -> bool:
        if any(item.fingerprint in accepted for item in keys):
            return True
        if not sys.stdin.isatty():
            return False
        print(f"{host} has these host keys, which are new here:")
        for item in keys:
            print(f"  {item.fingerprint} ({item.kind})")
        try:
            return input(f"Do they belong to {host}? Accept them [y/N]: ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    return confirm
