"""The connection between supervisor and guards, against ends that do not know the secret and changed messages."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from hynb.supervision.link import Link, accept, connect


@contextlib.contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """The address of a server that handles one connection in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            connection, _ = server.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield server.getsockname()
        thread.join(20)
        assert not thread.is_alive()


def test_messages_of_any_length_pass_in_both_directions():
    received = []

    def serve(connection: socket.socket) -> None:
        link = accept(connection, "secret")
        received.extend([link.receive(5), link.receive(5)])
        link.send({"kind": "bye"})

    with serving(serve) as address:
        link = connect(*address, "secret")
        link.send({"kind": "hello", "text": "ä" * 100_000})
        link.send({"kind": "hello", "text": "line\nbreak"})
        assert link.receive(5) == {"kind": "bye"}
    assert [message["text"] for message in received] == ["ä" * 100_000, "line\nbreak"]


@pytest.mark.parametrize("wrong", ["guard", "supervisor"])
def test_an_end_that_does_not_know_the_secret_is_refused(wrong):
    problems = []

    def serve(connection: socket.socket) -> None:
        try:
            accept(connection, "right" if wrong == "guard" else "wrong")
        except OSError as error:
            problems.append(str(error))

    with serving(serve) as address, pytest.raises(OSError):
        connect(*address, "wrong" if wrong == "guard" else "right")
    assert problems


class Wire:
    """A machine between the two ends that can change, repeat, drop and return what it forwards."""

    def __init__(self, change: Callable[[int, bytes], list[bytes]]) -> None:
        self.change = change

    def forward(self, source: socket.socket, target: socket.socket, *, changed: bool) -> None:
        with contextlib.suppress(OSError):
            for number, line in enumerate(source.makefile("rb")):
                for item in self.change(number, line) if changed else [line]:
                    target.sendall(item)
            target.shutdown(socket.SHUT_WR)


# Of the guard's lines, number 0 is its half of the handshake; 1, 2 and 3 are messages.
CHANGES: dict[str, Callable[[int, bytes], list[bytes]]] = {
    "changed": lambda number, line: [line.replace(b"second", b"forged")],
    "repeated": lambda number, line: [line, line] if number == 1 else [line],
    "left out": lambda number, line: [] if number == 2 else [line],
    "swapped": lambda number, line: {2: [], 3: [line, line]}.get(number, [line]),
    "added": lambda number, line: [line, b'{"kind": "kill"}\n'] if number == 1 else [line],
    "added with a code": lambda number, line: [line, b"0" * 64 + b' {"kind": "kill"}\n'] if number == 1 else [line],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_message_that_was_changed_on_the_way_ends_the_connection(change):
    received, problems = [], []

    def supervisor(connection: socket.socket) -> None:
        try:
            link = accept(connection, "secret")
            while (message := link.receive(60)) is not None:
                received.append(message["text"])
        except OSError as error:
            problems.append(str(error))

    with serving(supervisor) as address:

        def between(connection: socket.socket) -> None:
            wire = Wire(CHANGES[change])
            with socket.create_connection(address) as onward:
                back = threading.Thread(target=wire.forward, args=(onward, connection), kwargs={"changed": False})
                back.start()
                wire.forward(connection, onward, changed=True)
                back.join(10)

        with serving(between) as front:
            link = connect(*front, "secret")
            for text in ("first", "second", "third"):
                link.send({"text": text})
            link.close()
    assert problems == ["received a message that the other end of this run did not send"]
    assert received == ["first", "second", "third"][: len(received)] and len(received) < 3


@pytest.mark.parametrize(
    "line", [b'{"challenge": "x", "proof": "\xc3\xa9"}', b"[" * 4000, b'"' * 5000, b"3", b"\xff"], ids=range(5)
)
def test_what_another_program_sends_is_refused(line):
    problems = []

    def supervisor(connection: socket.socket) -> None:
        with pytest.raises(OSError, match=r"secret of this run|not JSON|not a message|without an end") as info:
            accept(connection, "secret")
        problems.append(str(info.value))

    with serving(supervisor) as address, socket.create_connection(address) as connection:
        connection.sendall(line + b"\n")
    assert problems


def test_a_message_sent_back_to_its_sender_is_refused():
    ends: list[Link] = []

    def serve(connection: socket.socket) -> None:
        link = accept(connection, "secret")
        ends.append(link)
        # The guard's own line, as it came.
        connection.sendall(link._read_line(5) + b"\n")

    with serving(serve) as address:
        link = connect(*address, "secret")
        link.send({"kind": "ping"})
        with pytest.raises(ConnectionError, match="did not send"):
            link.receive(5)
