"""A TCP connection of JSON lines between two hosts, whose ends prove to each other that they know a secret."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
from typing import Any

_HANDSHAKE_SECONDS = 5.0
_LONGEST_LINE_BYTES = 64 << 20
# A send that waits longer has lost its reader: with a cut cable the system's buffer fills up.
_SEND_SECONDS = 3.0


class Link:
    """One end of a connection; any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._sending = threading.Lock()
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def local_address(self) -> str:
        """This end's address."""
        return self._socket.getsockname()[0]

    @property
    def peer_address(self) -> str:
        """The other end's address."""
        return self._socket.getpeername()[0]

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message.

        Raises:
            OSError: the connection is gone, or the other end has read nothing for seconds.
        """
        line = json.dumps(message, ensure_ascii=False).encode() + b"\n"
        with self._sending:
            self._socket.sendall(line)

    def receive(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message; None when there is none within the time.

        Raises:
            OSError: the connection is gone, or what came is no message.
        """
        deadline = time.monotonic() + timeout_seconds
        while (end := self._buffer.find(b"\n")) < 0:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            data = self._read(left)
            if data is None:
                return None
            self._buffer += data
            if len(self._buffer) > _LONGEST_LINE_BYTES:
                raise ConnectionError("a line without an end")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ConnectionError("a line that is no JSON") from error
        if not isinstance(message, dict):
            raise ConnectionError("a line that is no message")
        return message

    def close(self) -> None:
        """Closes both directions; a waiting `receive` ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, seconds: float) -> bytes | None:
        # A time limit of the socket's own would hold for a send of another thread, too.
        readable = _wait_readable(self._socket, seconds)
        if not readable:
            return None
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed by the other end")
        return data


def accept(connection: socket.socket, secret: str) -> Link:
    """The supervisor's half of the handshake on a connection that a guard opened.

    Raises:
        OSError: the other end does not know the secret, or says nothing.
    """
    link = Link(connection)
    challenge = secrets.token_hex(16)
    link.send({"challenge": challenge})
    answer = link.receive(_HANDSHAKE_SECONDS) or {}
    theirs = str(answer.get("challenge", ""))
    if not hmac.compare_digest(str(answer.get("proof", "")), _proof(secret, "guard", challenge, theirs)):
        link.close()
        raise ConnectionError("the other end does not know the secret of this run")
    link.send({"proof": _proof(secret, "supervisor", theirs, challenge)})
    return link


def connect(address: str, port: int, secret: str, *, timeout_seconds: float = 5.0) -> Link:
    """The guard's half: opens the connection and makes sure that the supervisor is the one of this run.

    Raises:
        OSError: nobody answers there, or somebody who does not know the secret.
    """
    link = Link(socket.create_connection((address, port), timeout=timeout_seconds))
    asked = link.receive(_HANDSHAKE_SECONDS) or {}
    theirs, challenge = str(asked.get("challenge", "")), secrets.token_hex(16)
    link.send({"challenge": challenge, "proof": _proof(secret, "guard", theirs, challenge)})
    answer = link.receive(_HANDSHAKE_SECONDS) or {}
    if not hmac.compare_digest(str(answer.get("proof", "")), _proof(secret, "supervisor", challenge, theirs)):
        link.close()
        raise ConnectionError("another program, or another run, answers there")
    return link


def _proof(secret: str, side: str, first: str, second: str) -> str:
    return hmac.new(secret.encode(), f"{side}:{first}:{second}".encode(), hashlib.sha256).hexdigest()


def _wait_readable(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN)
    except ValueError as error:
        raise ConnectionError("closed by this end") from error
    return bool(poll.poll(seconds * 1000))
