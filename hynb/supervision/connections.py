"""The supervisor's side of the guards' connections: who may connect, and what arrives from which host."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hynb.supervision import link as links
from hynb.supervision.link import Link
from hynb.supervision.membership import Membership
from hynb.supervision.session import Session

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Node:
    """One host as the supervisor knows it.

    Args:
        state: waiting, joined, done (its ranks have ended) or gone.
        guard: the id that its guard chose; "" while it has none.
        address: from which its guard connected.
        ended: exit code by rank of those that have ended; None for a rank that recorded none.
    """

    name: str
    ranks: range
    session: Session = field(default_factory=Session)
    state: str = "waiting"
    guard: str = ""
    address: str = ""
    hostname: str = ""
    shared: bool = False
    ended: dict[int, int | None] = field(default_factory=dict)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to its guard now."""
        return self.session.link is not None

    @property
    def is_here(self) -> bool:
        """Whether its guard runs on the supervisor's machine, where a closed connection means that it has ended."""
        return self.address.startswith("127.") or self.address == "::1"


class Connections:
    """Accepts guards and hands on what they send; answers their pings.

    Args:
        inbox: receives host and message; None for a message when the connection has broken.
    """

    def __init__(
        self,
        membership: Membership,
        nodes: Sequence[Node],
        inbox: queue.Queue[tuple[Node, dict[str, Any] | None]],
    ) -> None:
        self._membership = membership
        self._nodes = nodes
        self._inbox = inbox
        self._claiming = threading.Lock()

    def listen(self, listener: socket.socket) -> None:
        """Accepts connections on a listening socket, in a thread."""
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        limit = self._membership.silence_seconds
        try:
            link = links.accept(connection, self._membership.secret)
            node = self._welcome(link, link.receive(limit) or {})
        except OSError:
            connection.close()
            return
        try:
            while True:
                message = node.session.receive(link, limit)
                if message is not None and message.get("kind") == "ping":
                    node.session.send({"kind": "pong"}, keep=False)
                elif message is not None:
                    self._inbox.put((node, message))
        except OSError:
            was_present = node.session.link in (link, None)
            node.session.detach(link)
            link.close()
            if was_present:
                self._inbox.put((node, None))

    def _welcome(self, link: Link, hello: dict[str, Any]) -> Node:
        """The host whose guard has connected, for the first time or again.

        Raises:
            OSError: it is not a guard of this run, or the host has another one.
        """
        index = hello.get("node")
        if hello.get("kind") != "hello" or not isinstance(index, int) or index not in range(len(self._nodes)):
            raise ConnectionError("not a guard of this run")
        node = self._nodes[index]
        with self._claiming:
            first = not node.guard
            if not first and node.guard != hello["guard"]:
                link.send({"kind": "refused"})
                raise ConnectionError(f"{node.name} has another guard")
            node.guard, node.address = hello["guard"], link.peer_address
            received = node.session.detach()
            link.send({"kind": "welcome", "received": received})
            node.session.attach(link, acknowledged=hello["received"])
        if first:
            self._inbox.put((node, hello))
        else:
            logger.info("%s: its guard has connected again", node.name)
        return node


def connect(
    addresses: Sequence[str],
    membership: Membership,
    session: Session,
    hello: dict[str, Any],
    *,
    timeout_seconds: float,
) -> tuple[Link | None, str]:
    """The guard's side: connects to the supervisor, for the first time or again.

    Args:
        addresses: of the supervisor, to be tried in this order.
        hello: who connects: node and guard, with what the supervisor wants to know of the host.

    Returns:
        the connection or, without one, the reason.
    """
    received, problem = session.detach(), ""
    for address in addresses:
        try:
            link = links.connect(address, membership.port, membership.secret, timeout_seconds=timeout_seconds)
        except OSError as error:
            problem = error.strerror or str(error)
            continue
        try:
            link.send(hello | {"kind": "hello", "received": received})
            answer = link.receive(timeout_seconds) or {}
            if answer.get("kind") == "welcome":
                session.attach(link, acknowledged=answer["received"])
                return link, ""
            problem = "the supervisor has another guard of this host"
        except OSError as error:
            problem = error.strerror or str(error)
        link.close()
    return None, problem
