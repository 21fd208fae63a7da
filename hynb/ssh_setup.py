"""Passwordless ssh to the hosts of a cluster, set up and checked with OpenSSH's own programs: `hynb hosts setup`."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hynb import hostfile
from hynb.errors import ClusterError
from hynb.hostfile import ClusterDir, Host
from hynb.run_dir import replace_text
from hynb.ssh import Ssh, is_local, known_name

DEFAULT_FOLDER = "runs/cluster"
_HEADER = "# Written by `hynb hosts setup`, which replaces it; keep your own settings in ~/.ssh/config.\n"
_EXCHANGED = "# Written by `hynb hosts exchange`, which replaces it.\n"
_KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")
_SCAN_SECONDS = 6
_LOGIN_SECONDS = 15.0
# Adds each line of the standard input to authorized_keys, unless it is there.
_AUTHORIZE = """umask 077; mkdir -p ~/.ssh && cd ~/.ssh || exit 3
touch authorized_keys && chmod 600 authorized_keys || exit 3
[ -z "$(tail -c 1 authorized_keys)" ] || echo >> authorized_keys
while IFS= read -r line; do grep -qxF -- "$line" authorized_keys || printf '%s\\n' "$line" >> authorized_keys; done"""
# Prints this host's own public key, made where there is none.
_OWN_KEY = """umask 077; mkdir -p ~/.ssh
for name in id_ed25519 id_ecdsa id_rsa; do [ -f ~/.ssh/$name.pub ] && exec cat ~/.ssh/$name.pub; done
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 </dev/null && cat ~/.ssh/id_ed25519.pub"""


@dataclass(kw_only=True, frozen=True)
class Key:
    """A key pair of this machine's; made says whether it is new."""

    path: Path
    public: str
    made: bool


@dataclass(kw_only=True, frozen=True)
class HostKey:
    """A key that a host's sshd proves itself with, and its fingerprint as a person compares it."""

    kind: str
    content: str
    fingerprint: str


@dataclass(kw_only=True, frozen=True)
class HostState:
    """How far a host's set-up is.

    Args:
        done: what was done now, in words.
        problem: why a login doesn't work yet, with what to do; empty when it does.
    """

    name: str
    local: bool
    done: str
    problem: str


Confirm = Callable[[str, Sequence[HostKey]], bool]


def setup(
    hosts: Sequence[Host],
    folder: str | Path = DEFAULT_FOLDER,
    *,
    port: int = 22,
    user: str | None = None,
    key: str | Path | None = None,
    confirm: Confirm,
    password: str | None = None,
    on_host: Callable[[HostState], None] = lambda _: None,
) -> list[HostState]:
    """Makes a key if there is none, keeps host keys that are confirmed, installs the key, and tries each login.

    A second call changes nothing that is right already. Nothing of the user's is overwritten.

    Args:
        folder: gets hostfile, ssh_config and known_hosts.
        user: who logs in on the hosts; None for this user.
        key: private key to use; None for the user's own, or a new one.
        confirm: is shown a new host's keys and says whether they are kept.
        password: for hosts that don't accept the key yet; used once and stored nowhere. None: they are left as
            they are.
        on_host: is told of each host when it is done.

    Raises:
        ClusterError: a key that can't be used, files of another's in the folder.
    """
    cluster = ClusterDir(folder)
    own = find_or_make_key(key)
    write_settings(cluster, hosts, port=port, user=user, key=own)
    states = []
    for host in hosts:
        state = _set_up_host(cluster, host.name, own, confirm, password)
        on_host(state)
        states.append(state)
    return states


def find_or_make_key(path: str | Path | None = None) -> Key:
    """The key that hosts are to accept: the one named, the user's own, or a new Ed25519 key without passphrase.

    Raises:
        ClusterError: the key has a passphrase or can be read by others, or none can be made.
    """
    home = Path.home() / ".ssh"
    candidates = [Path(path).expanduser()] if path else [home / name for name in _KEY_NAMES]
    found = next((item for item in candidates if item.is_file()), None)
    made = found is None
    if found is None:
        found = candidates[0]
        found.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(found)], f"{found}: no key can be made")
    if found.stat().st_mode & 0o077:
        raise ClusterError(f"{found}: others can read this private key, so that ssh refuses it: `chmod 600 {found}`")
    asked = subprocess.run(
        ["ssh-keygen", "-y", "-P", "", "-f", str(found)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if asked.returncode:
        raise ClusterError(
            f"{found}: this key has a passphrase, which nobody can type for a job, or is no private key "
            f"({asked.stderr.strip().splitlines()[-1]}). Name another with --key; a path that doesn't exist makes one"
        )
    return Key(path=found, public=asked.stdout.strip(), made=made)


def write_settings(cluster: ClusterDir, hosts: Sequence[Host], *, port: int, user: str | None, key: Key) -> None:
    """Writes hostfile and ssh_config of a cluster.

    Raises:
        ClusterError: an ssh_config that somebody else wrote.
    """
    if not 1 <= port <= 65535:
        raise ClusterError(f"port = {port}: must lie between 1 and 65535")
    blocks = [_HEADER]
    for host in hosts:
        if is_local(host.name):
            continue
        lines = [f"Host {host.name}", f"HostName {host.name}", f"Port {port}", *([f"User {user}"] if user else [])]
        lines += [f'IdentityFile "{key.path.absolute()}"', f'UserKnownHostsFile "{cluster.known_hosts}"']
        lines += ["StrictHostKeyChecking yes", "ConnectTimeout 8", "ServerAliveInterval 15", "ServerAliveCountMax 4"]
        blocks.append("\n    ".join(lines) + "\n")
    text = "\n".join(blocks)
    if cluster.ssh_config.is_file() and not cluster.ssh_config.read_text().startswith(_HEADER):
        raise ClusterError(f"{cluster.ssh_config}: wasn't written by hynb; choose another folder, or move it away")
    hostfile.write(cluster.hostfile, hosts)
    replace_text(cluster.ssh_config, text)


def host_keys(cluster: ClusterDir, host: str) -> list[HostKey]:
    """The keys that a host's sshd shows now.

    Raises:
        ClusterError: none came.
    """
    name, port = Ssh(config=cluster.ssh_config).address(host)
    scanned = subprocess.run(
        ["ssh-keyscan", "-T", str(_SCAN_SECONDS), "-p", str(port), name], capture_output=True, text=True, check=False
    )
    lines = [line.split(None, 2)[1:] for line in scanned.stdout.splitlines() if line and not line.startswith("#")]
    if not lines:
        # A real login says best why.
        answer = Ssh(config=cluster.ssh_config).run(host, ["true"], deadline_seconds=_LOGIN_SECONDS)
        raise ClusterError(answer.problem or f"{host}: port {port} of {name} shows no host key; is it an sshd?")
    found = []
    for kind, content in lines:
        asked = subprocess.run(
            ["ssh-keygen", "-lf", "-"], input=f"host {kind} {content}\n", capture_output=True, text=True, check=False
        )
        found.append(HostKey(kind=kind, content=content, fingerprint=asked.stdout.split()[1]))
    return sorted(found, key=lambda item: item.kind)


def trust(cluster: ClusterDir, host: str, confirm: Confirm) -> str:
    """Keeps a host's keys in known_hosts, once they are confirmed; returns what was done, in words.

    Raises:
        ClusterError: its key is another one than the one that is known, or the keys were not confirmed.
    """
    name, port = Ssh(config=cluster.ssh_config).address(host)
    place = known_name(name, port)
    keys = host_keys(cluster, host)
    known = dict(_known(cluster, place))
    changed = [item for item in keys if item.kind in known and known[item.kind] != item.content]
    if changed:
        forget = shlex.join(["ssh-keygen", "-R", place, "-f", str(cluster.known_hosts)])
        raise ClusterError(
            f"{host}: its host key has changed to {changed[0].fingerprint} ({changed[0].kind}): the host was set up "
            "anew, or something else answers in its place. Ask its administrator; when the change is right: "
            f"`{forget}` and `hynb hosts trust {host} --folder {cluster.path}`"
        )
    if any(item.kind in known for item in keys):
        return "host key known"
    if not confirm(host, keys):
        shown = ", ".join(f"{item.fingerprint} ({item.kind})" for item in keys)
        raise ClusterError(
            f"{host}: its host key isn't confirmed: {shown}. Compare with what `ssh-keygen -lf "
            f"/etc/ssh/ssh_host_ed25519_key.pub` says on it, then: `hynb hosts trust {host} --folder {cluster.path} "
            f"--accept {keys[0].fingerprint}`"
        )
    before = cluster.known_hosts.read_text() if cluster.known_hosts.is_file() else ""
    lines = "".join(f"{place} {item.kind} {item.content}\n" for item in keys)
    replace_text(cluster.known_hosts, before + lines)
    return "host key kept"


def install_key(cluster: ClusterDir, host: str, key: Key, password: str) -> None:
    """Logs in with a password once and adds the public key to the host's authorized_keys.

    The password goes to ssh through a pipe that only this user can open: it is on no command line, in no
    environment and no file.

    Raises:
        ClusterError: the password was refused, or the host can't be reached.
    """
    ssh = Ssh(config=cluster.ssh_config)
    with _askpass(password) as environment:
        options = ["-F", str(cluster.ssh_config), "-o", "BatchMode=no", "-o", "PubkeyAuthentication=no"]
        options += ["-o", "PreferredAuthentications=password,keyboard-interactive", "-o", "NumberOfPasswordPrompts=1"]
        done = subprocess.run(
            ["ssh", *options, "--", host, f"sh -c {shlex.quote(_AUTHORIZE)}"],
            input=key.public + "\n",
            capture_output=True,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
            check=False,
        )
    if done.returncode == 0:
        return
    said = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    if "Permission denied" in said:
        lines = "\n  ".join(lines_for(host, key, ssh.address(host)[1]))
        raise ClusterError(f"{host}: the password was refused ({said}). Try again, or run there:\n  {lines}")
    raise ClusterError(f"{host}: the key can't be installed: {said}")


def exchange_keys(cluster: ClusterDir, hosts: Sequence[Host]) -> None:
    """Lets every host log in on every other, as MPI's launchers need it: own keys, known hosts, same settings.

    Raises:
        ClusterError: what failed, by host.
    """
    ssh = Ssh(config=cluster.ssh_config)
    names = [host.name for host in hosts]
    others = [name for name in names if not is_local(name)]
    port = ssh.address(others[0])[1] if others else 22
    public = _on_all(ssh, names, _OWN_KEY, None)
    _on_all(ssh, names, _AUTHORIZE, "".join(public.values()))
    # The host from which it was set up knows no key of its own yet, and the others are to know it.
    for name in set(names) - set(others):
        _keep_own_host_key(cluster, name, port)
    blocks = [_EXCHANGED]
    for name in names:
        lines = [f"Host {name}", f"HostName {name}", f"Port {port}", f'UserKnownHostsFile "{cluster.known_hosts}"']
        blocks.append("\n    ".join([*lines, "StrictHostKeyChecking yes", "ConnectTimeout 8"]) + "\n")
    folder, config, known = (
        shlex.quote(str(path)) for path in (cluster.path, cluster.ssh_config, cluster.known_hosts)
    )
    write = f"mkdir -p {folder} && cat > {known}.new && mv {known}.new {known}"
    _on_all(ssh, others, write, cluster.known_hosts.read_text())
    # On a shared disk the launching host's own settings, which name its key, are there already and stay.
    mine = f"[ ! -e {config} ] || head -n 1 {config} | grep -qxF {shlex.quote(_EXCHANGED.strip())}"
    _on_all(ssh, others, f"if {mine}; then cat > {config}; else cat > /dev/null; fi", "\n".join(blocks))


def lines_for(host: str, key: Key, port: int) -> list[str]:
    """What a person types on a host so that it accepts the key; several times does no harm."""
    public = shlex.quote(key.public)
    return [
        "mkdir -p ~/.ssh && chmod 700 ~/.ssh",
        f"grep -qxF {public} ~/.ssh/authorized_keys 2>/dev/null || echo {public} >> ~/.ssh/authorized_keys",
        "chmod 600 ~/.ssh/authorized_keys",
        *(["ssh-keygen -A && mkdir -p /run/sshd && /usr/sbin/sshd -p " + str(port)] if port != 22 else []),
    ]


def include(cluster: ClusterDir, *, remove: bool = False) -> bool:
    """Adds to ~/.ssh/config a line that includes the cluster's ssh_config, or takes it back; whether it changed.

    The rest of the file stays to the letter. Call it with the user's consent.
    """
    path = Path.home() / ".ssh" / "config"
    line = f'Include "{cluster.ssh_config}"\n'
    text = path.read_text() if path.is_file() else ""
    if (line in text) is not remove:
        return False
    path.parent.mkdir(mode=0o700, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.is_file() else 0o600
    # Before any Host block: inside of one it would hold for that host alone.
    replace_text(path, text.replace(line, "") if remove else line + text)
    path.chmod(mode)
    return True


def _set_up_host(cluster: ClusterDir, host: str, key: Key, confirm: Confirm, password: str | None) -> HostState:
    if is_local(host):
        return HostState(name=host, local=True, done="this machine, needs no ssh", problem="")
    done = []
    try:
        done.append(trust(cluster, host, confirm))
        ssh = Ssh(config=cluster.ssh_config)
        answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS)
        if "accepts none of our keys" in answer.problem and password is not None:
            install_key(cluster, host, key, password)
            done.append("key installed")
            answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS)
        elif not answer.problem:
            done.append("key accepted")
        problem = answer.problem
    except ClusterError as error:
        problem = str(error)
    return HostState(name=host, local=False, done=", ".join(done), problem=problem)


def _known(cluster: ClusterDir, place: str) -> Iterator[tuple[str, str]]:
    """Kind and content of the keys that are known of a place."""
    if not cluster.known_hosts.is_file():
        return
    for line in cluster.known_hosts.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and place in words[0].split(","):
            yield words[1], words[2]


def _keep_own_host_key(cluster: ClusterDir, name: str, port: int) -> None:
    place = known_name(name, port)
    if any(_known(cluster, place)):
        return
    scanned = subprocess.run(["ssh-keyscan", "-p", str(port), name], capture_output=True, text=True, check=False)
    lines = [line for line in scanned.stdout.splitlines() if not line.startswith("#")]
    if not lines:
        raise ClusterError(f"{name}: no sshd answers on port {port} of this machine: `/usr/sbin/sshd -p {port}`")
    replace_text(cluster.known_hosts, cluster.known_hosts.read_text() + "\n".join(lines) + "\n")


def _on_all(ssh: Ssh, names: Sequence[str], script: str, text: str | None) -> dict[str, str]:
    """Runs a shell script on hosts at the same time; returns what each printed."""

    def one(name: str) -> str:
        answer = ssh.run(name, ["sh", "-c", script], deadline_seconds=_LOGIN_SECONDS, input=text)
        if answer.problem or answer.code:
            raise ClusterError(answer.problem or f"{name}: {answer.err.strip() or f'exit code {answer.code}'}")
        return answer.out

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        waiting = {name: pool.submit(one, name) for name in names}
    problems = [str(item.exception()) for item in waiting.values() if item.exception()]
    if problems:
        raise ClusterError(problems)
    return {name: item.result() for name, item in waiting.items()}


@contextlib.contextmanager
def _askpass(password: str) -> Iterator[dict[str, str]]:
    """Environment in which ssh takes the password from a pipe: ssh closes every file that it inherits."""
    with tempfile.TemporaryDirectory(prefix="hynb-") as name:
        pipe, helper = Path(name) / "pipe", Path(name) / "askpass"
        os.mkfifo(pipe, mode=0o600)
        helper.write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(pipe))}\n")
        helper.chmod(0o700)
        ended = threading.Event()

        def serve() -> None:
            # Opens when the helper does; the end below opens it too, so that this thread ends.
            with pipe.open("w") as file, contextlib.suppress(BrokenPipeError):
                if not ended.is_set():
                    file.write(password + "\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield {
                "SSH_ASKPASS": str(helper),
                "SSH_ASKPASS_REQUIRE": "force",
                "DISPLAY": os.environ.get("DISPLAY", ":0"),
            }
        finally:
            ended.set()
            os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
            thread.join(timeout=2)


def _checked(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ClusterError(f"{what}: {done.stderr.strip() or done.stdout.strip()}")


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
        install_key(cluster, args.host, find_or_make_key(args.key), getpass.getpass(f"password of {args.host}: "))
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
    hosts = hostfile.read(args.hosts) if Path(args.hosts).is_file() else hostfile.parse(args.hosts, source="hosts")
    password = getpass.getpass("password on the hosts: ") if args.password else None
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
