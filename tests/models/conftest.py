"""The process of imported libraries that trains models for tests of model folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import RankServer, make_files


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()
