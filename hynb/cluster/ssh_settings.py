"""The files of OpenSSH settings for a cluster: its ssh_config, and the line in ~/.ssh/config that includes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hynb.cluster import hostfile
from hynb.cluster.hostfile import ClusterDir, Host
from hynb.cluster.network import is_local
from hynb.cluster.ssh_key import Key
from hynb.errors import ClusterError
from hynb.files import replace_text

_HEADER = "# Written by `hynb hosts setup`, which replaces it; ~/.ssh/config isn't read beside it.\n"
_USER = re.compile(r"[\w.@\\+][\w.@\\+$-]*")
# OpenSSH expands % and ${ in some file names, and its versions differ in how they read quotes and backslashes.
_SPECIAL = re.compile(r'["\\%\x00-\x1f\x7f]|\$\{')
# `Include` takes patterns.
_GLOB = re.compile(r"[*?\[\]]")


def write_settings(cluster: ClusterDir, hosts: Sequence[Host], *, port: int, user: str | None, key: Key) -> None:
    """Writes hostfile and ssh_config of a cluster.

    Raises:
        ClusterError: an invalid port, user or path, or an ssh_config or hostfile that hynb did not write.
    """
    if not 1 <= port <= 65535:
        raise ClusterError(f"port = {port}: must lie between 1 and 65535")
    if user is not None and not _USER.fullmatch(user):
        raise ClusterError(f"user = {user}: is not a login name; give the name alone, such as `ubuntu`")
    lines = [f"Port {port}", *([f"User {user}"] if user else []), f"IdentityFile {_quoted(key.path.absolute())}"]
    # An ssh agent's many keys would exhaust the host's MaxAuthTries before this one is tried.
    lines += ["IdentitiesOnly yes", "ServerAliveInterval 15", "ServerAliveCountMax 4"]
    named = [host.name for host in hosts if not (is_local(host.name) and len(hosts) == 1)]
    text = "\n".join([_HEADER, *(host_block(cluster, name, lines) for name in named)])
    if cluster.ssh_config.is_file() and not cluster.ssh_config.read_text().startswith(_HEADER):
        raise ClusterError(f"{cluster.ssh_config}: was not written by hynb; choose another folder, or move it away")
    if not _lists(cluster.hostfile, hosts):
        hostfile.write(cluster.hostfile, hosts)
    replace_text(cluster.ssh_config, text)


def _lists(path: Path, hosts: Sequence[Host]) -> bool:
    """Whether a hostfile already lists these hosts, and can stay as it is.

    Raises:
        ClusterError: it lists other hosts, and hynb did not write it.
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
            f"{path}: was written by hand and lists other hosts than the given ones; "
            "change it there, choose another folder, or move it away"
        )
    return False


def include(cluster: ClusterDir, *, remove: bool = False) -> bool:
    """Adds a line to ~/.ssh/config that includes the cluster's ssh_config, or removes it; returns whether it changed.

    The rest of the file stays as it is. Call it with the user's consent.

    Raises:
        ClusterError: the folder's path can't be used in an ssh_config.
    """
    # A symbolic link into a collection of settings stays one; its target is changed.
    path = (Path.home() / ".ssh" / "config").resolve()
    line = f"Include {_quoted(cluster.ssh_config, _GLOB)}\n"
    text = path.read_text() if path.is_file() else ""
    if (line in text) is not remove:
        return False
    path.parent.mkdir(mode=0o700, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.is_file() else 0o600
    # Before any Host block: inside one it would apply to that host alone.
    replace_text(path, text.replace(line, "") if remove else line + text)
    path.chmod(mode)
    return True


def host_block(cluster: ClusterDir, name: str, lines: Sequence[str]) -> str:
    """The block of an ssh_config for one host, with further lines."""
    common = [f"UserKnownHostsFile {_quoted(cluster.known_hosts)}", "StrictHostKeyChecking yes", "ConnectTimeout 8"]
    # OpenSSH expands % there, which separates a link-local address from its interface.
    host_name = name.replace("%", "%%")
    return "\n    ".join([f"Host {name}", f"HostName {host_name}", *lines, *common]) + "\n"


def _quoted(path: Path, also_special: re.Pattern[str] | None = None) -> str:
    """A path in quotes for an OpenSSH configuration.

    Raises:
        ClusterError: it contains characters that OpenSSH interprets inside quotes, too.
    """
    text = str(path)
    for pattern in (_SPECIAL, also_special):
        if pattern is not None and (match := pattern.search(text)):
            raise ClusterError(
                f"{text!r}: a path with {match[0]!r} can't be used in an ssh_config; choose another one"
            )
    return f'"{text}"'
