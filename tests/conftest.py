"""What several test rooms share: skipping with a reason, and failing in CI instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two threads wait for each other at every small matrix, the more so beside a browser or other ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def need(present: bool, reason: str) -> None:
    """Skips a test whose means are missing on a user's machine; in CI, where all are installed, fails it."""
    if present:
        return
    if os.environ.get("HYNB_REQUIRE_ALL"):
        pytest.fail(f"missing in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the original's files and golden values, which lies beside a developer's checkout only."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name} with the original's values beside the checkout")
    return SHARED
