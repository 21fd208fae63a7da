"""Passwordless ssh to the hosts of a cluster, set up and checked with OpenSSH's own programs: `hynb hosts setup`."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster import hostfile
from hynb.cluster.hostfile import ClusterDir, Host
from hynb.cluster.ssh import Ssh, is_local, known_name
from hynb.cluster.ssh_key import AUTHORIZE, Key, find_or_make_key, install_key
from hynb.errors import ClusterError
from hynb.files import replace_text

DEFAULT_FOLDER = "runs/cluster"
_HEADER = "# Written by `hynb hosts setup`, which replaces it; ~/.ssh/config isn't read beside it.\n"
_EXCHANGED = "# Written by `hynb hosts exchange`, which replaces it.\n"
_SCAN_SECONDS = 6
_LOGIN_SECONDS = 15.0
# Prints this host's own public key, made where there is none.
_OWN_KEY = """umask 077; mkdir -p ~/.ssh
for name in id_ed25519 id_ecdsa id_rsa; do [ -f ~/.ssh/$name.pub ] && exec cat ~/.ssh/$name.pub; done
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 </dev/null && cat ~/.ssh/id_ed25519.pub"""


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
    try:
        cluster.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"folder = {folder}: can't be made: {error.strerror}") from None
    own = find_or_make_key(key)
    write_settings(cluster, hosts, port=port, user=user, key=own)
    states = []
    for host in hosts:
        state = _set_up_host(cluster, host.name, own, confirm, password, alone=len(hosts) == 1)
        on_host(state)
        states.append(state)
    return states


def write_settings(cluster: ClusterDir, hosts: Sequence[Host], *, port: int, user: str | None, key: Key) -> None:
    """Writes hostfile and ssh_config of a cluster.

    Raises:
        ClusterError: an ssh_config that somebody else wrote.
    """
    if not 1 <= port <= 65535:
        raise ClusterError(f"port = {port}: must lie between 1 and 65535")
    blocks = [_HEADER]
    for host in hosts:
        if is_local(host.name) and len(hosts) == 1:
            continue
        lines = [f"Host {host.name}", f"HostName {host.name}", f"Port {port}", *([f"User {user}"] if user else [])]
        lines += [f'IdentityFile "{key.path.absolute()}"', f'UserKnownHostsFile "{cluster.known_hosts}"']
        lines += ["StrictHostKeyChecking yes", "ConnectTimeout 8", "ServerAliveInterval 15", "ServerAliveCountMax 4"]
        # An agent that holds many keys would use up the host's patience before this one is tried.
        lines += ["IdentitiesOnly yes"]
        blocks.append("\n    ".join(lines) + "\n")
    text = "\n".join(blocks)
    if cluster.ssh_config.is_file() and not cluster.ssh_config.read_text().startswith(_HEADER):
        raise ClusterError(f"{cluster.ssh_config}: wasn't written by hynb; choose another folder, or move it away")
    if not _says(cluster.hostfile, hosts):
        hostfile.write(cluster.hostfile, hosts)
    replace_text(cluster.ssh_config, text)


def _says(path: Path, hosts: Sequence[Host]) -> bool:
    """Whether a hostfile names these hosts already, and stays as it is.

    Raises:
        ClusterError: it names others, and not in the way in which one is written here: it is somebody's own.
    """
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        listed = hostfile.parse(text, source=str(path))
    except ClusterError:
        listed = []
    if listed == list(hosts):
        return True
    if text != hostfile.to_text(listed):
        raise ClusterError(
            f"{path}: was written by hand and names other hosts than what is asked for now; "
            "change it there, choose another folder, or move it away"
        )
    return False


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
        answer = Ssh(config=cluster.ssh_config).run(host, ["true"], deadline_seconds=_LOGIN_SECONDS, always=True)
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
    if known and not any(item.kind in known for item in keys):
        # It proves itself with keys of other kinds alone.
        changed = keys
    if changed:
        forget = shlex.join(["ssh-keygen", "-R", place, "-f", str(cluster.known_hosts)])
        raise ClusterError(
            f"{host}: its host key has changed to {changed[0].fingerprint} ({changed[0].kind}): the host was set up "
            "anew, or something else answers in its place. Ask its administrator; when the change is right: "
            f"`{forget}` and `hynb hosts trust {host} --folder {shlex.quote(str(cluster.path))}`"
        )
    if any(item.kind in known for item in keys):
        return "host key known"
    if not confirm(host, keys):
        again = f"hynb hosts trust {host} --folder {shlex.quote(str(cluster.path))}"
        shown = ", ".join(f"{item.fingerprint} ({item.kind})" for item in keys)
        raise ClusterError(
            f"{host}: its host key isn't confirmed: {shown}. Compare with what `ssh-keygen -lf "
            f"/etc/ssh/ssh_host_ed25519_key.pub` says on it, then: `{again} "
            f"--accept {keys[0].fingerprint}`"
        )
    _keep_host_keys(cluster, [f"{place} {item.kind} {item.content}" for item in keys])
    return "host key kept"


def exchange_keys(cluster: ClusterDir, hosts: Sequence[Host]) -> None:
    """Lets every host log in on every other, as MPI's launchers need it: own keys, known hosts, same settings.

    Raises:
        ClusterError: what failed, by host.
    """
    ssh = Ssh(config=cluster.ssh_config)
    names = [host.name for host in hosts]
    others = [name for name in names if not is_local(name)]
    if not others:
        return
    if "localhost" in names:
        raise ClusterError(
            f"{cluster.hostfile}: localhost is another machine on every host; list this one by the name or address "
            "by which the others reach it"
        )
    public = _on_all(ssh, names, _OWN_KEY, None)
    # What a login script prints comes first.
    keys = [text.strip().splitlines()[-1] for text in public.values() if text.strip()]
    _on_all(ssh, names, AUTHORIZE, "".join(f"{key}\n" for key in keys))
    blocks = [_EXCHANGED]
    for name in names:
        port = ssh.address(name)[1]
        lines = [f"Host {name}", f"HostName {name}", f"Port {port}", f'UserKnownHostsFile "{cluster.known_hosts}"']
        user = ssh.settings(name).get("user", [""])[0]
        lines += [f"User {user}"] if user else []
        blocks.append("\n    ".join([*lines, "StrictHostKeyChecking yes", "ConnectTimeout 8"]) + "\n")
    folder, config, known = (
        shlex.quote(str(path)) for path in (cluster.path, cluster.ssh_config, cluster.known_hosts)
    )
    # On a shared disk the launching host's own settings, which name its key, are there already and stay; and so
    # does what a host keeps of its own.
    ours = f"head -n 1 {config} 2>/dev/null | grep -qxF {shlex.quote(_EXCHANGED.strip())}"
    add = f'while IFS= read -r line; do grep -qxF -- "$line" {known} || printf "%s\\n" "$line" >> {known}; done'
    write = f"mkdir -p {folder} && if {ours}; then cat > {known}; else touch {known} && {add}; fi"
    _on_all(ssh, others, write, cluster.known_hosts.read_text())
    mine = f"[ ! -e {config} ] || {ours}"
    _on_all(ssh, others, f"if {mine}; then cat > {config}; else cat > /dev/null; fi", "\n".join(blocks))
    tries = "; ".join(
        f'[ "$1" = {shlex.quote(name)} ] || ssh -F {config} -o BatchMode=yes -- {shlex.quote(name)} true || '
        f"{{ echo can\\'t log in on {shlex.quote(name)} >&2; exit 1; }}"
        for name in names
    )
    _on_all(ssh, others, tries, None)


def include(cluster: ClusterDir, *, remove: bool = False) -> bool:
    """Adds to ~/.ssh/config a line that includes the cluster's ssh_config, or takes it back; whether it changed.

    The rest of the file stays to the letter. Call it with the user's consent.
    """
    # Where it is a link into somebody's collection of settings, the file behind it is changed.
    path = (Path.home() / ".ssh" / "config").resolve()
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


def _set_up_host(
    cluster: ClusterDir, host: str, key: Key, confirm: Confirm, password: str | None, *, alone: bool
) -> HostState:
    local = is_local(host)
    if local and alone:
        return HostState(name=host, local=True, done="this machine, needs no ssh", problem="")
    done = ["this machine"] if local else []
    ssh = Ssh(config=cluster.ssh_config)
    try:
        # pdsh logs in on the launching host as on any other. Its own keys can be looked up, its own file be written.
        done.append(trust(cluster, host, _is_own_key if local else confirm))
        answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS, always=True)
        if "accepts none of our keys" in answer.problem and (local or password is not None):
            install_key(cluster, host, key, password or "")
            done.append("key installed")
            answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS, always=True)
        elif not answer.problem:
            done.append("key accepted")
        problem = answer.problem
        if answer.code:
            said = (answer.err.strip().splitlines() or ["without a word"])[-1]
            problem = (
                f"{host}: accepts the key and runs nothing: `true` ends with exit code {answer.code} ({said}). Its "
                f"login shell, or an `exit` in its ~/.bashrc, ends every command. Try `{ssh.shown(host)}`"
            )
    except ClusterError as error:
        problem = str(error)
    return HostState(name=host, local=local, done=", ".join(done), problem=problem)


def _is_own_key(_: str, keys: Sequence[HostKey]) -> bool:
    """Whether this machine's sshd proves itself by a key of its own files."""
    own = {tuple(path.read_text().split()[:2]) for path in Path("/etc/ssh").glob("ssh_host_*_key.pub")}
    return any((key.kind, key.content) in own for key in keys)


def _known(cluster: ClusterDir, place: str) -> Iterator[tuple[str, str]]:
    """Kind and content of the keys that are known of a place."""
    if not cluster.known_hosts.is_file():
        return
    for line in cluster.known_hosts.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and place in words[0].split(","):
            yield words[1], words[2]


def _keep_host_keys(cluster: ClusterDir, lines: Sequence[str]) -> None:
    before = cluster.known_hosts.read_text() if cluster.known_hosts.is_file() else ""
    replace_text(cluster.known_hosts, "\n".join([*before.splitlines(), *lines]) + "\n")


def _on_all(ssh: Ssh, names: Sequence[str], script: str, text: str | None) -> dict[str, str]:
    """Runs a shell script, told the host's name, on hosts at the same time; returns what each printed."""
    deadline_seconds = _LOGIN_SECONDS + len(names)

    def one(name: str) -> str:
        answer = ssh.run(name, ["sh", "-c", script, "sh", name], deadline_seconds=deadline_seconds, input=text)
        if answer.problem or answer.code:
            raise ClusterError(answer.problem or f"{name}: {answer.err.strip() or f'exit code {answer.code}'}")
        return answer.out

    with ThreadPoolExecutor(max(1, len(names))) as pool:
        waiting = {name: pool.submit(one, name) for name in names}
    problems = [str(item.exception()) for item in waiting.values() if item.exception()]
    if problems:
        raise ClusterError(problems)
    return {name: item.result() for name, item in waiting.items()}
