"""Which hosts measure their connection at the same time, and with messages of what size."""

from __future__ import annotations

# Of a preflight's time for all ranks, the part in which all pairs are measured; the rest is for start and all-reduce.
_PAIRS_SHARE = 1 / 3
# A pair takes no longer than this, however few there are.
_LONGEST_PAIR_SECONDS = 2.0


def rounds(hosts: int) -> list[list[tuple[int, int]]]:
    """All pairs of hosts, in rounds in which no host is in two pairs: a tournament by the circle method.

    Args:
        hosts: their number; they are meant by their indices.

    Returns:
        `hosts` - 1 rounds, or `hosts` for an odd number, where one host has no pair in each round.
    """
    players: list[int | None] = list(range(hosts))
    if hosts % 2:
        players.append(None)
    count = len(players)
    found = []
    for _ in range(count - 1):
        pairs = [(players[place], players[count - 1 - place]) for place in range(count // 2)]
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        # The first one stays, all others move on by one place.
        players = [players[0], players[-1], *players[1:-1]]
    return found


def pair_seconds(hosts: int, deadline_seconds: float) -> float:
    """The time that a pair of hosts may take, so that all rounds end in time."""
    return min(_LONGEST_PAIR_SECONDS, deadline_seconds * _PAIRS_SHARE / max(1, len(rounds(hosts))))


def message_bytes(probe_bytes: int, probe_seconds: float, budget_seconds: float, largest_bytes: int) -> int:
    """The size of a message that takes at most a given time, from the time that a small one took.

    Returns:
        `probe_bytes` times a power of two, at most `largest_bytes`.
    """
    size = probe_bytes
    while 2 * size <= largest_bytes and probe_seconds * 2 * size / probe_bytes <= budget_seconds:
        size *= 2
    return size
