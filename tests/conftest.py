"""Shared by all tests: skipping with a reason on a user's machine, failing instead in CI."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# With two threads, each small matrix product waits for the other thread, above all next to a browser or other ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take longest: begun first, none of them is left alone at the end.
LONG = (
    "test_hosts_that_fail.py",
    "test_several_hosts.py",
    "test_troubled_hosts.py",
    "test_one_host.py",
    "test_compilation.py",
    "test_restarts.py",
    "test_notebooks.py",
    "test_checkpoint.py",
    "test_examine.py",
    "test_notebooks_in_browser.py",
    "test_timeouts.py",
)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def need(present: bool, reason: str) -> None:
    """Skips a test whose programs or rights are missing on a user's machine; fails it in CI, where all are there."""
    if present:
        return
    if os.environ.get("HYNB_REQUIRE_ALL"):
        pytest.fail(f"missing in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """A tiny model per family, and data."""
    # Imports torch, which not every test needs.
    from training_runs import make_files

    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A process that forks ranks, which have the libraries imported already."""
    from training_runs import RankServer

    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of upstream's files and golden values; it exists only beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name} with upstream's values beside the checkout")
    return SHARED
