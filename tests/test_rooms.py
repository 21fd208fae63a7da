"""Who may import whom: each room is imported in a fresh process and what came with it is looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hynb"
# Rooms by level: an import goes to a lower level, or to a neighbour on the same one.
LEVELS = {
    1: {"errors", "config", "config_rules", "config_io", "run_dir", "hostfile", "host_link", "host_facts"},
    2: {"zero", "memory", "run_checks", "data_read", "node_guard"},
    4: {"supervisor", "launch_hosts", "launch", "cluster", "ssh", "ssh_key", "ssh_setup"}
    | {"preflight", "preflight_checks", "collective_check"},
}
TORCH_FREE = [*(room for level in LEVELS.values() for room in sorted(level)), "cli", "widgets"]


def imported_by(module: str) -> set[str]:
    code = f"import sys; import hynb.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_rooms_bring_no_heavy_package(module):
    loaded = imported_by(module)
    heavy = {"torch", "transformers", "deepspeed", "peft", "numpy"}
    if module == "widgets":
        heavy.remove("numpy")
    assert heavy & loaded == set()
    if module != "widgets":
        assert {"ipywidgets", "matplotlib"} & loaded == set()


@pytest.mark.parametrize("level", LEVELS)
def test_imports_go_down_only(level):
    allowed = {name for lower, names in LEVELS.items() if lower <= level for name in names}
    for module in LEVELS[level]:
        ours = {name.split(".")[1] for name in imported_by(module) if name.startswith("hynb.")}
        assert ours <= allowed, module


def test_hunyuan_large_imports_nothing_of_ours():
    ours = {name for name in imported_by("hunyuan_large") if name.startswith("hynb.")}
    assert {name for name in ours if not name.startswith("hynb.hunyuan_large")} == set()


def test_nobody_imports_the_training_entry():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "import train_entry" not in text and "from hynb.train_entry" not in text, path


def test_only_widgets_import_ipywidgets_or_matplotlib():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "widgets":
            assert "import ipywidgets" not in path.read_text(), path
            assert "import matplotlib" not in path.read_text(), path
