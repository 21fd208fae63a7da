"""What importing a package brings with it, each tried in a fresh process; `make lint` holds who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hynb"
# Those with an interface of lazily loaded names.
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.pyi"))
# Modules that a notebook's kernel, a command or a host's guard imports.
LIGHT = [
    *("errors", "files", "families", "launch", "cli", "data.files"),
    *(
        f"{package}.{path.stem}"
        for package in ("config", "plan", "cluster", "runs", "supervision", "preflight", "widgets")
        for path in sorted((PACKAGE / package).glob("*.py"))
        if path.stem != "__init__"
    ),
]
HEAVY = {"torch", "transformers", "deepspeed", "peft"}


def imported_by(module: str) -> set[str]:
    code = f"import sys; import hynb.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_bring_no_heavy_package(module):
    loaded = imported_by(module)
    # matplotlib needs numpy.
    assert (HEAVY if module.startswith("widgets") else HEAVY | {"numpy"}) & loaded == set()
    if not module.startswith("widgets"):
        assert {"ipywidgets", "matplotlib"} & loaded == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_imports_past_a_packages_interface(package):
    """`from hynb.runs import RunDir`, never `from hynb.runs.folder import RunDir`, outside of the package."""
    past = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.module}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != package
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"hynb.{package}.")
    ]
    assert past == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_of_an_interface_is_used_elsewhere_and_exists(package):
    module = __import__(f"hynb.{package}", fromlist=["__all__"])
    texts = [
        path.read_text(encoding="utf-8")
        for root in (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "benchmarks", PACKAGE.parent / "notebooks")
        for path in root.rglob("*")
        if path.suffix in (".py", ".ipynb") and path.parent != PACKAGE / package
    ]
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert any(name in text for text in texts), f"hynb.{package}.{name} is exported and nobody uses it"
