"""Waiting for a condition in tests, with a limit that a busy machine does not reach."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], what: str = "the condition", *, seconds: float = 300) -> None:
    """Returns as soon as the condition holds.

    Raises:
        AssertionError: it does not hold within the given time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
