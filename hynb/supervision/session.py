"""A conversation between a guard and its supervisor that survives broken connections.

Messages are numbered and kept until the other end has acknowledged them; over the next connection those that it lacks
are sent again. So each message is handled once and in order, however often the connection breaks. A connection has
keys of its own (see `link`): what somebody recorded of an earlier one is refused on the next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from hynb.supervision.link import Link

# A sender that is this far ahead of the other end's acknowledgements waits with what can wait.
_AHEAD_BYTES = 32 << 20


class Session:
    """One end of a conversation; any thread may send, one thread receives over each connection."""

    def __init__(self) -> None:
        self.heard_at = 0.0
        self._lock = threading.RLock()
        self._link: Link | None = None
        self._kept: deque[tuple[int, dict[str, Any]]] = deque()
        self._ahead_bytes = 0
        self._sent = self._received = 0

    @property
    def link(self) -> Link | None:
        """The present connection; None while there is none."""
        return self._link

    @property
    def is_ahead(self) -> bool:
        """Whether the other end has much to acknowledge, or cannot be reached now."""
        return self._link is None or self._ahead_bytes > _AHEAD_BYTES

    def send(self, message: dict[str, Any], *, keep: bool = True) -> None:
        """Sends a message now or, while there is no connection, over the next one.

        Args:
            keep: False for a message that is worth nothing later, such as a ping: it is not sent again.
        """
        with self._lock:
            number = 0
            if keep:
                self._sent += 1
                number = self._sent
                self._kept.append((number, message))
                self._ahead_bytes += _size(message)
            self._transmit(number, message)

    def receive(self, link: Link, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message; None when there is none within the time, or for one that had arrived before.

        Raises:
            OSError: the connection is gone, or another one has replaced it.
        """
        message = link.receive(timeout_seconds)
        with self._lock:
            if link is not self._link:
                raise ConnectionError("replaced by a newer connection")
            if message is None:
                return None
            self.heard_at = time.monotonic()
            self._forget(message.pop("acknowledged"))
            number = message.pop("number")
            if number:
                if number <= self._received:
                    return None
                if number != self._received + 1:
                    raise ConnectionError(f"message {self._received + 1} of the other end is missing")
                self._received = number
            return message

    def excuse_silence(self) -> None:
        """Counts the other end's silence from now on: this end could not listen."""
        with self._lock:
            self.heard_at = max(self.heard_at, time.monotonic())

    def detach(self, link: Link | None = None) -> int:
        """Closes the present connection; returns the number of the last message that arrived.

        Args:
            link: close it only if it is this one; None for any.
        """
        with self._lock:
            if self._link is not None and link in (None, self._link):
                self._link.close()
                self._link = None
            return self._received

    def attach(self, link: Link, *, acknowledged: int) -> None:
        """Goes on over a new connection, from the first message that the other end lacks."""
        with self._lock:
            self.detach()
            self._link = link
            self.heard_at = time.monotonic()
            self._forget(acknowledged)
            for number, message in list(self._kept):
                self._transmit(number, message)

    def _transmit(self, number: int, message: dict[str, Any]) -> None:
        if self._link is None:
            return
        try:
            self._link.send(message | {"number": number, "acknowledged": self._received})
        except OSError:
            # Half of a line may have left: nothing can follow it on this connection.
            self.detach()

    def _forget(self, acknowledged: int) -> None:
        while self._kept and self._kept[0][0] <= acknowledged:
            self._ahead_bytes -= _size(self._kept.popleft()[1])


def _size(message: dict[str, Any]) -> int:
    return sum(len(value) for value in message.values() if isinstance(value, str))
