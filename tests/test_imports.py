"""What importing each package or module loads; `make lint` checks which package may import which."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hynb"
# Packages with a public interface of lazily loaded names.
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.pyi"))
# Modules that a notebook's kernel, a command or a host's guard imports.
LIGHT = [
    *("errors", "extras", "files", "families", "launch", "cli", "data.files", "demo.run"),
    # Their work imports torch, their help does not.
    *("generate.command", "merge.command"),
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


# In a stub, behind a name that nothing in this repository needs: users may import it.
FOR_USERS = "# for users"


def code_of(path: Path) -> str:
    """The Python of a module, or of a notebook's cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


@functools.cache
def trees() -> list[tuple[Path, ast.AST]]:
    """The syntax tree of every module, notebook, benchmark and tool; tests are not users of an interface."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return [
        (path, compile(code_of(path), path, "exec", flags))
        for folder in ("hynb", "benchmarks", "notebooks", "tools")
        for path in sorted((PACKAGE.parent / folder).rglob("*"))
        if path.suffix in (".py", ".ipynb")
    ]


def names_used(tree: ast.AST, package: str) -> set[str]:
    """The names that a module takes from a package: imported from it, or attributes of the package."""
    used: set[str] = set()
    aliases: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == f"hynb.{package}":
            used |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "hynb":
            aliases |= {item.asname or item.name for item in node.names if item.name == package}
        elif isinstance(node, ast.Import):
            aliases |= {item.asname or item.name for item in node.names if item.name == f"hynb.{package}"}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return used | {node.attr for node in attributes if ast.unparse(node.value) in aliases}


def test_only_names_that_are_taken_from_the_package_count_as_used():
    tree = ast.parse(
        "import hynb.runs\nimport hynb.plan as p\nfrom hynb import cluster\nfrom hynb.data import check_data as c\n"
        "hynb.runs.RunDir\np.zero.load\ncluster.Ssh()\nother.memory\n'parse_gpus'  # Answer\n"
    )
    found = {package: names_used(tree, package) for package in ("runs", "plan", "cluster", "data", "merge")}
    assert found == {
        "runs": {"RunDir"},
        "plan": {"zero"},
        "cluster": {"Ssh"},
        "data": {"check_data"},
        "merge": set(),
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_of_an_interface_exists_and_is_used_by_another_package_or_meant_for_users(package):
    module = __import__(f"hynb.{package}", fromlist=["__all__"])
    lines = (PACKAGE / package / "__init__.pyi").read_text(encoding="utf-8").splitlines()
    for_users = {line.split(" as ")[1].split()[0] for line in lines if line.endswith(FOR_USERS)}
    used: set[str] = set()
    for path, tree in trees():
        if path.parent != PACKAGE / package:
            used |= names_used(tree, package)
    assert [name for name in module.__all__ if getattr(module, name) is None] == []
    assert set(module.__all__) - used - for_users == set(), "exported, but not used outside of the package"
    assert for_users & used == set(), f"used here, so that the mark {FOR_USERS!r} says nothing"


def layers() -> list[set[str]]:
    """The packages of each layer of import-linter's contract, the topmost first."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (item for item in settings["tool"]["importlinter"]["contracts"] if item["type"] == "layers")
    return [set(layer.split(" | ")) for layer in contract["layers"]]


def command_modules() -> list[str]:
    """The modules that `hynb` imports by their name, when their command is called."""
    tree = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if re.fullmatch(r"hynb(\.\w+)+", text)]


def test_the_picture_of_the_packages_shows_the_layers_that_imports_are_checked_against():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text[text.index("graph TD") : text.index("```", text.index("graph TD"))]
    boxes = re.findall(r"subgraph (layer\d+) \[.*?\]\n(.*?)\n    end", picture, re.DOTALL)
    assert [name for name, _ in boxes] == [f"layer{number}" for number in range(1, len(boxes) + 1)]
    shown = [set(re.findall(r"^ {8}(\w+)\[", content, re.MULTILINE)) for _, content in boxes]
    assert shown == layers()
    arrows = re.findall(r"^ {4}(\w+) --> (\w+)$", picture, re.MULTILINE)
    assert arrows == [(f"layer{number}", f"layer{number + 1}") for number in range(1, len(boxes))]
    dotted = re.findall(r"^ {4}cli -\.-> (\w+)$", picture, re.MULTILINE)
    assert dotted == [name.split(".")[1] for name in command_modules()]


def test_the_commands_that_cli_imports_by_name_exist_and_are_below_it():
    names = command_modules()
    assert len(names) > 5
    order = {package: number for number, layer in enumerate(layers()) for package in layer}
    for name in names:
        assert order[name.split(".")[1]] > order["cli"]
        tree = ast.parse((PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"add_arguments", "run"} <= defined, name
