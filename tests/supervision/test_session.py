"""The guard's conversation with its supervisor over connections that break anywhere, also within a line."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hynb.supervision import Membership
from hynb.supervision.connections import Connections, Node, connect
from hynb.supervision.link import accept
from hynb.supervision.session import Session

SECONDS = 60.0


class Supervisor:
    """The supervisor's side of one host's conversation, behind a network that the test can break."""

    def __init__(self, folder: Path) -> None:
        self.inbox: queue.Queue = queue.Queue()
        self.node = Node(name="beta", ranks=range(1))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.network = socket.create_server(("127.0.0.1", 0))
        self.membership = Membership(
            launch_id="1" * 32,
            run_folder=folder,
            supervisor_host="alpha",
            address="127.0.0.1",
            port=self.network.getsockname()[1],
            hosts=(("beta", 1),),
            secret="secret",
            start_seconds=SECONDS,
            silence_seconds=SECONDS,
        )
        # How many bytes pass in each direction before the connection breaks, for one connection after the other.
        self.limits: Iterator[tuple[int, int]] = iter(())
        self.recorded: list[bytes] = []
        Connections(self.membership, [self.node], self.inbox).listen(self.listener)
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        while True:
            try:
                near, _ = self.network.accept()
            except OSError:
                return
            far = socket.create_connection(self.listener.getsockname())
            limits = next(self.limits, (1 << 60, 1 << 60))
            for source, target, limit in ((near, far, limits[0]), (far, near, limits[1])):
                threading.Thread(target=self._forward, args=(source, target, limit), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, limit: int) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (data := source.recv(min(limit, 1 << 16))):
                target.sendall(data)
                limit -= len(data)
                self.recorded.append(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        self.network.close()

    def arrived(self, count: int) -> list[int]:
        """The numbers in the first messages that arrived, in their order."""
        numbers: list[int] = []
        deadline = time.monotonic() + SECONDS
        while len(numbers) < count:
            _, message = self.inbox.get(timeout=max(0.1, deadline - time.monotonic()))
            if message is not None and message["kind"] == "item":
                numbers.append(message["value"])
        return numbers


class GuardSide:
    """A guard's side of the conversation, which connects again whenever its connection is gone."""

    def __init__(self, membership: Membership) -> None:
        self.membership, self.session = membership, Session()
        self.hello = {"node": 0, "guard": "a", "hostname": "beta", "shared": True}
        self.received: list[int] = []
        self.connections = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while not self.ended.is_set():
            link, _ = connect(["127.0.0.1"], self.membership, self.session, self.hello, timeout_seconds=5)
            if link is None:
                continue
            self.connections += 1
            with contextlib.suppress(OSError):
                while not self.ended.is_set():
                    message = self.session.receive(link, 0.1)
                    if message is not None and message["kind"] == "item":
                        self.received.append(message["value"])

    def close(self) -> None:
        self.ended.set()
        self.session.detach()
        self.thread.join(SECONDS)


@pytest.fixture
def supervisor(tmp_path) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path)
    yield made
    made.close()


def test_messages_arrive_once_and_in_order_however_often_the_connection_breaks(supervisor):
    """Connections that end after 300 to 8000 bytes: within the handshake, within a line, between two lines."""
    chance = random.Random(0)
    supervisor.limits = iter([(chance.randint(300, 8000), chance.randint(300, 8000)) for _ in range(60)])
    guard = GuardSide(supervisor.membership)
    count = 500
    try:
        for value in range(count):
            guard.session.send({"kind": "item", "value": value, "text": "x" * chance.randint(0, 500)})
            supervisor.node.session.send({"kind": "item", "value": value, "text": "x" * chance.randint(0, 500)})
            guard.session.send({"kind": "ping"}, keep=False)
        assert supervisor.arrived(count) == list(range(count))
        deadline = time.monotonic() + SECONDS
        while len(guard.received) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert guard.received == list(range(count))
        assert guard.connections > 20, "the connection did break"
        # Nothing arrives after that, and both ends forget what has been acknowledged.
        guard.session.send({"kind": "item", "value": count})
        assert supervisor.arrived(1) == [count]
    finally:
        guard.close()


def test_what_was_recorded_of_an_earlier_connection_is_refused(supervisor):
    guard = GuardSide(supervisor.membership)
    try:
        for value in range(3):
            guard.session.send({"kind": "item", "value": value})
        assert supervisor.arrived(3) == [0, 1, 2]
    finally:
        guard.close()
    with socket.create_connection(supervisor.listener.getsockname()) as replayed:
        replayed.settimeout(SECONDS)
        for data in supervisor.recorded:
            with contextlib.suppress(OSError):
                replayed.sendall(data)
        answers = b""
        with contextlib.suppress(ConnectionError):
            while data := replayed.recv(1 << 16):
                answers += data
        assert b"proof" not in answers and b"welcome" not in answers
    assert supervisor.inbox.qsize() <= 1, "at most the note that the guard's own connection is gone"


def test_a_second_guard_of_a_host_is_refused(supervisor):
    guard = GuardSide(supervisor.membership)
    try:
        guard.session.send({"kind": "item", "value": 0})
        assert supervisor.arrived(1) == [0]
        other = Session()
        hello = guard.hello | {"guard": "b"}
        link, problem = connect(["127.0.0.1"], supervisor.membership, other, hello, timeout_seconds=5)
        assert link is None and problem == "the supervisor has another guard of this host"
        guard.session.send({"kind": "item", "value": 1})
        assert supervisor.arrived(1) == [1], "the first one is not disturbed"
    finally:
        guard.close()


def test_nothing_follows_half_of_a_line(supervisor):
    """A send that waits for a reader in vain closes the connection; the message arrives over the next one, whole."""
    session, frozen = Session(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                link = accept(connection, "secret")
                link.receive(SECONDS)
                link.send({"kind": "welcome", "received": 0})
                # From now on it reads nothing.
                frozen.wait(SECONDS)

        thread = threading.Thread(target=serve)
        thread.start()
        members = supervisor.membership
        host = {"node": 0, "guard": "a", "hostname": "beta", "shared": True}
        elsewhere = Membership(**vars(members) | {"port": server.getsockname()[1]})
        link, _ = connect(["127.0.0.1"], elsewhere, session, host, timeout_seconds=5)
        assert link is not None
        session.send({"kind": "item", "value": 0, "text": "x" * (32 << 20)})
        assert session.link is None and session.is_ahead, "the connection on which half of it left is closed"
        session.send({"kind": "item", "value": 1})
        frozen.set()
        thread.join(SECONDS)
    link, _ = connect(["127.0.0.1"], members, session, host, timeout_seconds=SECONDS)
    assert link is not None and supervisor.arrived(2) == [0, 1]
    session.detach()
