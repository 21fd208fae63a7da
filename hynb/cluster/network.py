"""Addresses and ports: a free port, this machine's address towards another, the address of a host's name."""

from __future__ import annotations

import contextlib
import shlex
import socket

import psutil

from hynb.cluster.host_facts import source_address
from hynb.errors import ClusterError

_LOOPBACK = "127.0.0.1"


def free_port(address: str = _LOOPBACK) -> int:
    """A TCP port that is free now on an address of this machine.

    On loopback, if this machine cannot listen on the address.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.create_server((address, 0), family=family) as probe:
            return probe.getsockname()[1]
    except OSError:
        if address == _LOOPBACK:
            raise
        return free_port()


def listener_of(port: int) -> str:
    """The process that listens on a TCP port of this machine, with its command; empty when it is not known."""
    for item in psutil.net_connections("tcp"):
        if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port and item.pid:
            try:
                return f"process {item.pid}, {shlex.join(psutil.Process(item.pid).cmdline())[:60]}"
            except psutil.Error:
                return f"process {item.pid}"
    return ""


def own_address(other: str, *, interface: str | None = None) -> str:
    """The address by which another host reaches this machine.

    Args:
        other: IP address of the other host.
        interface: network interface whose address to use; None for the one that routes to `other`.

    Raises:
        ClusterError: the interface is missing, is the loopback interface or has no usable address, or there is no
            route to `other`.
    """
    if interface is not None:
        return _interface_address(interface)
    source = source_address(other)
    if source is None:
        raise ClusterError(f"{other}: this machine has no route to it; `ip route` shows the existing ones")
    return source


def own_address_or_loopback(other: str | None, *, interface: str | None = None) -> str:
    """Like `own_address`, but an unusable interface is ignored, and without a route the result is loopback.

    Args:
        other: IP address of the other host; None when there is none.
    """
    if interface is not None:
        with contextlib.suppress(ClusterError):
            return _interface_address(interface)
    return (source_address(other) if other else None) or _LOOPBACK


def _interface_address(interface: str) -> str:
    """An interface's IPv4 address, or else its IPv6 address.

    Raises:
        ClusterError: the interface is missing, is the loopback interface or has no usable address.
    """
    interfaces = psutil.net_if_addrs()
    if interface not in interfaces:
        names = ", ".join(sorted(interfaces))
        raise ClusterError(f"network_interface = {interface}: this machine has no such interface; it has {names}")
    entries = interfaces[interface]
    if any(entry.address.startswith("127.") for entry in entries):
        raise ClusterError(f"network_interface = {interface}: other hosts cannot reach the loopback interface")
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in entries:
            # A link-local address is valid only together with the name of the interface.
            if entry.family == family and not entry.address.startswith("fe80"):
                return entry.address
    raise ClusterError(f"network_interface = {interface}: has no address on this machine")


def resolve(name: str) -> str:
    """The IP address of a host name; an IP address is returned as it is.

    Raises:
        ClusterError: the name cannot be resolved.
    """
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid host name"
        raise ClusterError(f"{name}: this name can't be resolved here: {reason}; add it to /etc/hosts") from None


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's own, so that commands there need no ssh."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        found = {str(item[4][0]).partition("%")[0] for item in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        # A name that only the ssh_config defines belongs to another machine.
        return False
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return bool(found & own) or all(address.startswith("127.") or address == "::1" for address in found)
