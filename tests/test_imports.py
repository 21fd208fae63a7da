"""What importing each package or module loads; `make lint` checks which package may import which."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hynb"
# Packages with a public interface of lazily loaded names.
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.pyi"))
# Modules that a notebook's kernel, a command or a host's guard imports.
LIGHT = [
    *("errors", "files", "families", "launch", "cli", "data.files", "demo.run"),
    *(
        f"{package}.{path.stem}"
        for package in ("config", "plan", "cluster", "models", "runs", "supervision", "preflight", "widgets")
        for path in sorted((PACKAGE / package).glob("*.py"))
        if path.stem != "__init__"
    ),
]
HEAVY = {"torch", "transformers", "deepspeed", "peft"}
# Third-party and slow standard modules that are loaded before forking, to save starting an interpreter per module.
WARM = ["asyncio", "subprocess", "yaml", "psutil", "lazy_loader"]
WARM_WIDGETS = [*WARM, "ipywidgets", "IPython.display"]
# Imports each module in a child forked from an interpreter that has loaded nothing of hynb; prints what it loaded.
_IMPORT_EACH = """
import importlib, json, os, sys, traceback
warm, modules = json.loads(sys.argv[1])
for name in warm:
    importlib.import_module(name)
assert not any(name.partition(".")[0] == "hynb" for name in sys.modules)
for module in modules:
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            importlib.import_module(module)
            answer = {"loaded": sorted(sys.modules)}
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        with open(writing, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        print(json.dumps([module, json.load(file)]))
    os.wait()
"""


def import_each(modules: list[str], warm: list[str]) -> dict[str, set[str]]:
    """Names of all modules that are loaded after importing each of the given ones alone."""
    command = [sys.executable, "-c", _IMPORT_EACH, json.dumps([warm, modules])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(answers) == modules
    assert [answer["failed"] for answer in answers.values() if "failed" in answer] == []
    return {module: set(answer["loaded"]) for module, answer in answers.items()}


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    widgets = [f"hynb.{name}" for name in LIGHT if name.startswith("widgets.")]
    others = [f"hynb.{name}" for name in LIGHT if not name.startswith("widgets.")]
    return import_each(others, WARM) | import_each(widgets, WARM_WIDGETS)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_no_heavy_package(module, loaded):
    names = loaded[f"hynb.{module}"]
    assert f"hynb.{module}" in names
    # matplotlib needs numpy.
    assert (HEAVY if module.startswith("widgets") else HEAVY | {"numpy"}) & names == set()
    if not module.startswith("widgets"):
        assert {"ipywidgets", "matplotlib", "IPython", "papermill"} & names == set()


def test_a_heavy_import_would_be_noticed():
    assert import_each(["hynb.data.packing"], WARM)["hynb.data.packing"] >= {"torch", "numpy"}


@functools.cache
def imports() -> list[tuple[Path, int, str]]:
    """File, line and module of every `from … import` in hynb."""
    return [
        (path, node.lineno, node.module or "")
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_other_packages_import_only_a_packages_interface(package):
    """Outside of a package it is `from hynb.runs import RunDir`, never `from hynb.runs.folder import RunDir`."""
    past = [
        f"{path.relative_to(PACKAGE)}:{line}: {module}"
        for path, line, module in imports()
        if path.parent.name != package and module.startswith(f"hynb.{package}.")
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
        assert any(name in text for text in texts), (
            f"hynb.{package}.{name} is exported but not used outside of the package"
        )
