"""Two hosts with the files of a small run, once for all tests of a module."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import need
from hosts import two_hosts
from jobs import made_ready
from tiny import model_and_data


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return model_and_data(folder)


@pytest.fixture(scope="module")
def apart(files, tmp_path_factory):
    """Two hosts, each with a disk of its own."""
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    with two_hosts(tmp_path_factory.mktemp("apart"), shared=False) as hosts:
        yield made_ready(hosts, files)


@pytest.fixture(scope="module")
def together(files, tmp_path_factory):
    """Two hosts with one disk."""
    need(shutil.which("pdsh") is not None, "pdsh is not installed")
    with two_hosts(tmp_path_factory.mktemp("together"), shared=True) as hosts:
        yield made_ready(hosts, files)
