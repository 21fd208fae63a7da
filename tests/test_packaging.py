"""The places that name versions agree, and the documents describe the code as it is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from lock import direct_dependencies, normalised, pinned, project, requirements
from packaging.requirements import Requirement
from readme_tables import HELP_ZH, tables_zh, with_tables

from hynb.cli import parameter_tables
from hynb.config import parameters, read_mapping
from hynb.extras import NOTEBOOK
from hynb.runs import RunDir

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hynb"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
DOCUMENTS = (
    "README.md",
    "README.zh.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/gpu.md",
    "benchmarks/README.md",
)
# Imported by hynb, and required by one of its dependencies, with whose version it has to agree.
BROUGHT_BY = {"pydantic": "deepspeed", "huggingface_hub": "transformers", "IPython": "ipykernel", "PIL": "matplotlib"}
# Distributions whose import name differs.
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "IPython": "ipython"}


def conda_pins() -> dict[str, str]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    return pinned("\n".join(pip))


def distribution(module: str) -> str:
    return normalised(DISTRIBUTIONS.get(module, module))


def names(texts: list[str]) -> set[str]:
    return {normalised(Requirement(text).name) for text in texts}


def imported(path: Path) -> set[str]:
    """Top-level names of the third-party packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - {"hynb", *sys.stdlib_module_names}


# -- versions and dependencies


def test_environment_yml_pins_the_same_versions_as_the_lock():
    lock = pinned((ROOT / "requirements.lock").read_text())
    wanted = {normalised(name) for name in direct_dependencies()}
    assert conda_pins() == {name: lock[name] for name in wanted}


@pytest.mark.parametrize("text", requirements())
def test_every_pin_is_inside_its_range_and_installed(text):
    requirement = Requirement(text)
    pin = pinned((ROOT / "requirements.lock").read_text())[normalised(requirement.name)]
    assert requirement.specifier.contains(pin)
    assert metadata.version(requirement.name).split("+")[0] == pin, "run `make lock` or rebuild .venv"


def test_torch_is_exact_everywhere():
    assert "torch==2.13.0" in project()["dependencies"]
    assert conda_pins()["torch"] == "2.13.0"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert any(str(item).startswith("python=3.11") for item in environment["dependencies"])


def test_every_dependency_has_its_reason_in_a_comment():
    text = (ROOT / "pyproject.toml").read_text()
    lines = [line for line in text.splitlines() if re.match(r'\s+"[a-z0-9_-]+[=<>]', line)]
    assert len(lines) == len(direct_dependencies())
    assert [line for line in lines if not re.search(r"# .{10,}", line)] == []


def test_what_hynb_imports_is_a_dependency():
    """Of the core, or of the extra `notebook` in the widgets and in the demo's run of the notebooks."""
    core, notebook = (
        names(texts) for texts in (project()["dependencies"], project()["optional-dependencies"]["notebook"])
    )
    undeclared = []
    for path in MODULES:
        declared = core | notebook if path.parent.name == "widgets" or path == PACKAGE / "demo" / "run.py" else core
        for module in imported(path):
            bringer = BROUGHT_BY.get(module, module)
            brought = bringer == module or distribution(module) in names(metadata.requires(bringer) or [])
            if not brought or distribution(bringer) not in declared:
                undeclared.append(f"{path.relative_to(ROOT)}: {module}")
    assert undeclared == []


def test_the_extra_notebook_is_what_is_looked_for():
    assert names(project()["optional-dependencies"]["notebook"]) == {distribution(name) for name in NOTEBOOK}


# -- the tree


def test_no_module_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > 560} == {}


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_notebooks_are_committed_without_outputs():
    notebooks = tracked("notebooks/*.ipynb")
    assert len(notebooks) == 3
    nbstripout = Path(sys.executable).with_name("nbstripout")
    subprocess.run([nbstripout, "--verify", *notebooks], check=True)


# -- the documents


def test_the_readmes_tables_are_the_schemas():
    assert HELP_ZH.keys() == {item.name for item in parameters()}
    for name, tables in (("README.md", parameter_tables()), ("README.zh.md", tables_zh())):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert with_tables(text, tables) == text, "run python tools/readme_tables.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_commands_that_a_document_names_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link
    # Paths in backticks, with or without a test's name behind them.
    for path in re.findall(
        r"`(?:python |pytest (?:-s )?)?((?:hynb|tests|tools|notebooks|benchmarks|docs)/[\w./]*)", text
    ):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\.?\w+)", text, re.MULTILINE):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_the_readmes_have_the_same_sections_and_examples():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert re.findall("^#+ ", english, re.MULTILINE) == re.findall("^#+ ", chinese, re.MULTILINE)
    commands = re.findall(r"```sh\n(.*?)```", english, re.DOTALL)
    assert [command_lines(block) for block in commands] == [
        command_lines(block) for block in re.findall(r"```sh\n(.*?)```", chinese, re.DOTALL)
    ]
    blocks = re.findall(r"```(?:yaml|json)\n(.*?)```", english, re.DOTALL)
    assert blocks and blocks == re.findall(r"```(?:yaml|json)\n(.*?)```", chinese, re.DOTALL)
    for block in re.findall(r"```yaml\n(.*?)```", english, re.DOTALL):
        read_mapping(yaml.safe_load(block)).config("README")


def command_lines(block: str) -> list[str]:
    return [line.partition(" #")[0].rstrip() for line in block.splitlines()]


def test_the_picture_of_the_packages_shows_each_of_them_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"```mermaid\n(graph .*?)```", text, re.DOTALL)
    drawn = set(re.findall(r"\b(\w+)\[", picture))
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert drawn == modules | packages


def test_every_file_of_a_run_folder_is_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    run_dir = RunDir("run")
    names = {value.name for value in vars(run_dir).values() if value.parent == run_dir.path}
    assert {"run.yaml", "events.jsonl"} <= names
    assert {name for name in names if f"`{name}`" not in text} == set()


def test_the_changelog_has_the_version_and_a_section_for_what_is_new():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[:2] == ["Unreleased", project()["version"]]
