"""The hosts that a preflight examines, and what it knows of them before it compares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hynb.cluster import Host, HostFacts, Ssh, is_local, own_address_or_loopback, resolve
from hynb.config import Config
from hynb.errors import ClusterError


@dataclass(kw_only=True, frozen=True)
class Target:
    """One host and how it is reached.

    Args:
        address: the IP address by which the others reach it; empty when its name can't be resolved.
        port: of its sshd.
        by_ssh: whether the launcher logs in there; pdsh does even on this machine.
    """

    host: Host
    local: bool
    address: str
    port: int
    by_ssh: bool = False

    @property
    def name(self) -> str:
        """The host's name in the hostfile."""
        return self.host.name


@dataclass(kw_only=True, frozen=True)
class Reply:
    """The facts of a host, and the times here when they were requested and when they arrived (seconds)."""

    target: Target
    facts: HostFacts
    requested_at: float
    answered_at: float


@dataclass(kw_only=True, frozen=True)
class Known:
    """What every host is compared with.

    Args:
        replies: of the hosts that answered.
        reference: facts of this machine.
        port: the master port.
        port_taken_by: what already listens on it; empty when it is free.
        data: absolute paths of files that every rank reads.
    """

    config: Config
    targets: Sequence[Target]
    replies: Sequence[Reply]
    reference: HostFacts
    ssh: Ssh
    port: int
    port_taken_by: str
    data: Sequence[str]

    def others(self, target: Target) -> list[Target]:
        """The hosts besides one whose names can be resolved."""
        return [other for other in self.targets if other is not target and other.address]


def make_targets(config: Config, hosts: Sequence[Host], ssh: Ssh) -> list[Target]:
    """How each host is reached."""
    targets = [_target(host, ssh) for host in hosts]
    remote = next((target.address for target in targets if not target.local and target.address), None)
    here = next((number for number, target in enumerate(targets) if target.local), None)
    if here is not None:
        targets[here] = dataclasses.replace(
            targets[here],
            address=own_address_or_loopback(remote, interface=config.network_interface),
            by_ssh=len(targets) > 1 and config.launcher == "pdsh",
            port=ssh.address(targets[here].name)[1],
        )
    return targets


def _target(host: Host, ssh: Ssh) -> Target:
    if is_local(host.name):
        return Target(host=host, local=True, address="127.0.0.1", port=0)
    name, port = ssh.address(host.name)
    try:
        address = resolve(name)
    except ClusterError:
        address = ""
    return Target(host=host, local=False, address=address, port=port)


def interfaces_to_others(reply: Reply, known: Known) -> list[str]:
    """The network interfaces through which a host reaches the others."""
    routes = reply.facts["routes"]
    sources = {routes.get(other.address) for other in known.others(reply.target)} - {None}
    interfaces = reply.facts["interfaces"]
    return [name for name, addresses in interfaces.items() if name != "lo" and sources & set(addresses)]
