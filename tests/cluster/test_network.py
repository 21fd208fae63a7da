"""Ports and addresses of this machine, and of host names."""

from __future__ import annotations

import socket

import psutil
import pytest

from hynb.cluster import free_port, is_local, own_address, own_address_or_loopback, resolve
from hynb.errors import ClusterError

# Reserved for documentation (RFC 5737, RFC 6761): never an address or a name of a machine.
OTHER_ADDRESS, OTHER_NAME = "192.0.2.1", "no-such-host.invalid"


def interface() -> tuple[str, str] | None:
    """Name and IPv4 address of a network interface that other hosts may reach; None on a machine without."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return name, entry.address
    return None


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", OTHER_ADDRESS])
def test_a_free_port_can_be_listened_on(address):
    """Where the address belongs to another machine, the port is free on loopback."""
    port = free_port(address)
    with socket.create_server(("127.0.0.1" if address == OTHER_ADDRESS else address, port)):
        pass


def test_free_ports_differ_while_they_are_used():
    with socket.create_server(("127.0.0.1", free_port())) as used:
        assert free_port() != used.getsockname()[1]


def test_the_own_address_is_the_one_on_the_route_to_another_host():
    assert own_address("127.0.0.2") == own_address_or_loopback("127.0.0.2") == "127.0.0.1"
    assert own_address_or_loopback(None) == "127.0.0.1"


def test_the_own_address_on_a_chosen_interface():
    found = interface()
    if found is None:
        pytest.skip("this machine has only a loopback interface")
    name, address = found
    assert own_address("127.0.0.2", interface=name) == address
    assert own_address_or_loopback(None, interface=name) == address


@pytest.mark.parametrize(("name", "message"), [("eth-none", "no such interface; it has .*lo"), ("lo", "loopback")])
def test_an_unusable_interface_is_an_error_or_ignored(name, message):
    with pytest.raises(ClusterError, match=f"network_interface = {name}: .*{message}"):
        own_address("127.0.0.2", interface=name)
    assert own_address_or_loopback("127.0.0.2", interface=name) == "127.0.0.1"


def test_an_address_without_a_route_is_an_error_or_loopback():
    # Broadcast addresses are refused for a socket that did not ask for them.
    with pytest.raises(ClusterError, match=r"255\.255\.255\.255: this machine has no route to it"):
        own_address("255.255.255.255")
    assert own_address_or_loopback("255.255.255.255") == "127.0.0.1"


def test_names_are_resolved():
    assert resolve("10.77.0.9") == "10.77.0.9" and resolve("::1") == "::1"
    assert resolve("localhost") in ("127.0.0.1", "::1")
    for name in (OTHER_NAME, "x" * 64, "a..b"):
        with pytest.raises(ClusterError, match=r"can't be resolved here: .*/etc/hosts"):
            resolve(name)


def test_this_machine_by_every_name():
    assert all(is_local(name) for name in ("localhost", "127.0.0.1", "127.9.9.9", "::1", socket.gethostname()))
    assert not any(is_local(name) for name in (OTHER_ADDRESS, OTHER_NAME, "x" * 64))
    if found := interface():
        assert is_local(found[1])
