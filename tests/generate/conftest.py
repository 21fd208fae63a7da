"""The process of imported libraries that trains models for tests of generation."""

from __future__ import annotations

import pytest
from training_runs import RankServer


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()
