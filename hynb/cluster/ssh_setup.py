"""Passwordless ssh to the hosts of a cluster, set up and checked with OpenSSH's own programs: `hynb hosts setup`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hynb.cluster.hostfile import ClusterDir, Host
from hynb.cluster.network import is_local
from hynb.cluster.ssh import Failure, Ssh, known_name
from hynb.cluster.ssh_key import Key, find_or_make_key, install_key
from hynb.cluster.ssh_settings import write_settings
from hynb.errors import ClusterError
from hynb.files import replace_text

DEFAULT_FOLDER = "runs/cluster"
_SCAN_SECONDS = 6
_LOGIN_SECONDS = 15.0


@dataclass(kw_only=True, frozen=True)
class HostKey:
    """A public key with which a host's sshd identifies itself, and its fingerprint (SHA256:…)."""

    kind: str
    content: str
    fingerprint: str

    @property
    def usual_path(self) -> str:
        """The file on the host in which a key of this kind usually is."""
        # `ssh-ed25519`, `ssh-rsa`, `ecdsa-sha2-nistp256`
        return f"/etc/ssh/ssh_host_{self.kind.removeprefix('ssh-').partition('-')[0]}_key.pub"


@dataclass(kw_only=True, frozen=True)
class HostState:
    """How far the set-up of a host has come.

    Args:
        done: what was done now, in words.
        problem: why a login doesn't work yet, with what to do; empty when it works.
        failure: the kind of problem, where ssh reported it.
    """

    name: str
    done: str
    problem: str
    failure: Failure | None = None


# Is given a host's name and its new keys; returns whether they are accepted.
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
    """Creates a key if there is none, stores confirmed host keys, installs the key, and tries each login.

    A second call changes nothing that is right already. The user's own files are not overwritten.

    Args:
        folder: where hostfile, ssh_config and known_hosts are written.
        user: login name on the hosts; None for this user's.
        key: private key to use; None for the user's own, or a new one.
        confirm: decides whether a new host's keys are accepted.
        password: for hosts that don't accept the key yet; used once and not stored. None to leave them as they are.
        on_host: called with each host's state when it is done.

    Raises:
        ClusterError: a key that can't be used, or files in the folder that hynb did not write.
    """
    cluster = ClusterDir(folder)
    try:
        cluster.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"folder = {folder}: can't be created: {error.strerror}") from None
    own = find_or_make_key(key)
    write_settings(cluster, hosts, port=port, user=user, key=own)
    states = []
    for host in hosts:
        state = _set_up_host(cluster, host.name, own, confirm, password, alone=len(hosts) == 1)
        on_host(state)
        states.append(state)
    return states


def host_keys(cluster: ClusterDir, host: str) -> list[HostKey]:
    """The keys with which a host's sshd identifies itself now.

    Raises:
        ClusterError: the host sent none.
    """
    name, port = Ssh(config=cluster.ssh_config).address(host)
    scanned = subprocess.run(
        ["ssh-keyscan", "-T", str(_SCAN_SECONDS), "-p", str(port), "--", name],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split(None, 2)[1:] for line in scanned.stdout.splitlines() if line and not line.startswith("#")]
    if not lines:
        # A login attempt gives a more precise reason.
        answer = Ssh(config=cluster.ssh_config).run(host, ["true"], deadline_seconds=_LOGIN_SECONDS, always=True)
        raise ClusterError(answer.problem or f"{host}: port {port} of {name} sends no host key; is it an sshd?")
    found = []
    for kind, content in lines:
        listed = subprocess.run(
            ["ssh-keygen", "-lf", "-"], input=f"host {kind} {content}\n", capture_output=True, text=True, check=False
        )
        found.append(HostKey(kind=kind, content=content, fingerprint=listed.stdout.split()[1]))
    return sorted(found, key=lambda item: item.kind)


def trust(cluster: ClusterDir, host: str, confirm: Confirm) -> str:
    """Stores a host's keys in known_hosts after confirmation; returns what was done, in words.

    Raises:
        ClusterError: its key differs from the known one, or its keys were not confirmed.
    """
    ssh = Ssh(config=cluster.ssh_config)
    place = known_name(*ssh.address(host))
    keys = host_keys(cluster, host)
    known = dict(_known_keys(cluster, place))
    changed = [item for item in keys if item.kind in known and known[item.kind] != item.content]
    if known and not any(item.kind in known for item in keys):
        # The host offers only kinds of keys that are not stored.
        changed = keys
    if changed:
        raise ClusterError(
            f"{host}: its host key has changed to {changed[0].fingerprint} ({changed[0].kind}): the host was "
            "reinstalled, or another machine answers at its address. Ask its administrator; if the change is right: "
            f"`{ssh.forget_command(host)}` and `{ssh.trust_command(host)}`"
        )
    if any(item.kind in known for item in keys):
        return "host key known"
    if not confirm(host, keys):
        shown = ", ".join(f"{item.fingerprint} ({item.kind})" for item in keys)
        compared = next((item for item in keys if item.kind == "ssh-ed25519"), keys[0])
        raise ClusterError(
            f"{host}: its host key isn't confirmed: {shown}. Compare with the output of `ssh-keygen -lf "
            f"{compared.usual_path}` there, then: `{ssh.trust_command(host)} --accept {compared.fingerprint}`"
        )
    _add_known_hosts(cluster, [f"{place} {item.kind} {item.content}" for item in keys])
    return "host key accepted"


def _set_up_host(
    cluster: ClusterDir, host: str, key: Key, confirm: Confirm, password: str | None, *, alone: bool
) -> HostState:
    local = is_local(host)
    if local and alone:
        return HostState(name=host, done="this machine, needs no ssh", problem="")
    done = ["this machine"] if local else []
    ssh = Ssh(config=cluster.ssh_config)
    try:
        # pdsh logs in on the launching host as on any other; this machine's own host keys need no confirmation.
        done.append(trust(cluster, host, _are_own_keys if local else confirm))
        answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS, always=True)
        if answer.failure is Failure.KEY_REFUSED and (local or password is not None):
            install_key(cluster, host, key, password or "")
            done.append("key installed")
            answer = ssh.run(host, ["true"], deadline_seconds=_LOGIN_SECONDS, always=True)
        elif not answer.problem:
            done.append("key accepted")
    except ClusterError as error:
        return HostState(name=host, done=", ".join(done), problem=str(error))
    problem = answer.problem
    if answer.code:
        problem = (
            f"{host}: accepts the key but runs no commands: `true` ends with exit code {answer.code} "
            f"({answer.last_error_line('no error message')}). Its login shell, or an `exit` in its ~/.bashrc, ends "
            f"every command. Try `{ssh.shown(host)}`"
        )
    return HostState(name=host, done=", ".join(done), problem=problem, failure=answer.failure)


def _are_own_keys(_: str, keys: Sequence[HostKey]) -> bool:
    """Whether one of the keys is in this machine's /etc/ssh."""
    own = {tuple(path.read_text().split()[:2]) for path in Path("/etc/ssh").glob("ssh_host_*_key.pub")}
    return any((key.kind, key.content) in own for key in keys)


def _known_keys(cluster: ClusterDir, place: str) -> Iterator[tuple[str, str]]:
    """Kind and content of a host's keys in known_hosts.

    Args:
        place: the host as `known_name` returns it.
    """
    if not cluster.known_hosts.is_file():
        return
    for line in cluster.known_hosts.read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and place in words[0].split(","):
            yield words[1], words[2]


def _add_known_hosts(cluster: ClusterDir, lines: Sequence[str]) -> None:
    before = cluster.known_hosts.read_text() if cluster.known_hosts.is_file() else ""
    replace_text(cluster.known_hosts, "\n".join([*before.splitlines(), *lines]) + "\n")
