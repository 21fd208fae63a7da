"""A TCP connection of JSON lines between two hosts whose ends share a secret; every message is authenticated.

The handshake proves to each end that the other knows the secret (challenge and response, HMAC-SHA256, RFC 2104).
After it every line begins with a MAC over a counter and the message, under a key of its own for each direction and
connection, so that a message can be neither forged nor changed, repeated, left out or sent back.
"""

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
# Before the other end has proven that it knows the secret.
_LONGEST_UNPROVEN_BYTES = 1 << 12
# A send that waits longer has lost its reader: when a cable is cut, the system's buffer fills up.
_SEND_SECONDS = 3.0
_GUARD, _SUPERVISOR = "guard", "supervisor"


class Link:
    """One end of a connection; any thread may send, one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._sending = threading.Lock()
        self._send_key = self._receive_key = b""
        self._sent = self._received = 0
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
        text = json.dumps(message, ensure_ascii=False).encode()
        with self._sending:
            if self._send_key:
                text = _mac(self._send_key, self._sent, text) + b" " + text
                self._sent += 1
            # sendall's timeout is for all of it: a long message over a slow network would never arrive.
            left = memoryview(text + b"\n")
            while left:
                left = left[self._socket.send(left) :]

    def receive(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message; None when there is none within the time.

        Raises:
            OSError: the connection is gone, or a line is not a message of the other end.
        """
        line = self._read_line(timeout_seconds)
        if line is None:
            return None
        if self._receive_key:
            mac, _, line = line.partition(b" ")
            if not hmac.compare_digest(mac, _mac(self._receive_key, self._received, line)):
                raise ConnectionError("received a message that the other end of this run did not send")
            self._received += 1
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConnectionError("received a line that is not JSON") from error
        if not isinstance(message, dict):
            raise ConnectionError("received a line that is not a message")
        return message

    def authenticate(self, secret: str, side: str, guard_challenge: str, supervisor_challenge: str) -> None:
        """From now on every message in both directions carries a MAC under keys of this connection alone."""
        other = _SUPERVISOR if side == _GUARD else _GUARD
        challenges = f"{guard_challenge}:{supervisor_challenge}"
        self._send_key = _digest(secret, f"key:{side}:{challenges}")
        self._receive_key = _digest(secret, f"key:{other}:{challenges}")

    def close(self) -> None:
        """Closes both directions; a waiting `receive` ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read_line(self, timeout_seconds: float) -> bytes | None:
        deadline = time.monotonic() + timeout_seconds
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:
                return None
            data = self._read(left_seconds)
            if data is None:
                return None
            self._buffer += data
            if len(self._buffer) > (_LONGEST_LINE_BYTES if self._receive_key else _LONGEST_UNPROVEN_BYTES):
                raise ConnectionError("received a line without an end")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _read(self, seconds: float) -> bytes | None:
        # A timeout of the socket itself would also apply to a send in another thread.
        if not _wait_readable(self._socket, seconds):
            return None
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed by the other end")
        return data


def accept(connection: socket.socket, secret: str) -> Link:
    """The supervisor's half of the handshake, on a connection that a guard opened.

    Raises:
        OSError: the other end does not know the secret, or does not answer.
    """
    link = Link(connection)
    challenge = secrets.token_hex(16)
    link.send({"challenge": challenge})
    answer = link.receive(_HANDSHAKE_SECONDS) or {}
    theirs = str(answer.get("challenge", ""))
    if not _is_proof(answer.get("proof"), _proof(secret, _GUARD, challenge, theirs)):
        link.close()
        raise ConnectionError("the other end does not know the secret of this run")
    link.send({"proof": _proof(secret, _SUPERVISOR, theirs, challenge)})
    link.authenticate(secret, _SUPERVISOR, theirs, challenge)
    return link


def connect(address: str, port: int, secret: str, *, timeout_seconds: float = _HANDSHAKE_SECONDS) -> Link:
    """The guard's half: opens the connection and makes sure that the other end is the supervisor of this run.

    Args:
        timeout_seconds: for the connection and for each answer.

    Raises:
        OSError: nothing answers there, or something that does not know the secret.
    """
    link = Link(socket.create_connection((address, port), timeout=timeout_seconds))
    greeting = link.receive(timeout_seconds) or {}
    theirs, challenge = str(greeting.get("challenge", "")), secrets.token_hex(16)
    link.send({"challenge": challenge, "proof": _proof(secret, _GUARD, theirs, challenge)})
    answer = link.receive(timeout_seconds) or {}
    if not _is_proof(answer.get("proof"), _proof(secret, _SUPERVISOR, challenge, theirs)):
        link.close()
        raise ConnectionError("another program, or another run, answers there")
    link.authenticate(secret, _GUARD, challenge, theirs)
    return link


def _proof(secret: str, side: str, first: str, second: str) -> str:
    return _digest(secret, f"{side}:{first}:{second}").hex()


def _is_proof(given: object, expected: str) -> bool:
    return hmac.compare_digest(str(given).encode(errors="replace"), expected.encode())


def _digest(secret: str, text: str) -> bytes:
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest()


def _mac(key: bytes, counter: int, text: bytes) -> bytes:
    return hmac.new(key, counter.to_bytes(8, "big") + text, hashlib.sha256).hexdigest().encode()


def _wait_readable(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    try:
        poll.register(connection, select.POLLIN)
    except ValueError as error:
        raise ConnectionError("closed by this end") from error
    return bool(poll.poll(seconds * 1000))
