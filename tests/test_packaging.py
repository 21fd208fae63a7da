"""The three places that name versions agree, and what is committed is what a reader should get."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from lock import direct_dependencies, normalised, pinned  # noqa: E402


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def conda_pins() -> dict[str, str]:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    return pinned("\n".join(pip))


def test_environment_yml_pins_the_same_versions_as_the_lock():
    lock = pinned((ROOT / "requirements.lock").read_text())
    wanted = {normalised(name) for name in direct_dependencies()}
    assert conda_pins() == {name: lock[name] for name in wanted}


def test_every_pin_is_inside_its_range_and_installed():
    lock = pinned((ROOT / "requirements.lock").read_text())
    from importlib.metadata import version

    for text in project()["dependencies"] + project()["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        pin = lock[normalised(requirement.name)]
        assert requirement.specifier.contains(pin), text
        assert version(requirement.name).split("+")[0] == pin, "run `make lock` or rebuild .venv"


def test_torch_is_exact_everywhere():
    assert "torch==2.13.0" in project()["dependencies"]
    assert conda_pins()["torch"] == "2.13.0"
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert any(str(item).startswith("python=3.11") for item in environment["dependencies"])


def test_every_dependency_says_why():
    text = (ROOT / "pyproject.toml").read_text()
    lines = [line for line in text.splitlines() if re.match(r'\s+"[a-z0-9_-]+[=<>]', line)]
    assert len(lines) == len(direct_dependencies())
    assert [line for line in lines if not re.search(r"# .{10,}", line)] == []


def test_no_module_is_crowded():
    crowded = {
        path.name: count
        for path in (ROOT / "hynb").rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 560
    }
    assert crowded == {}


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


def test_the_readmes_tables_are_the_schemas():
    from readme_tables import HELP_ZH, tables_zh, with_tables

    from hynb.cli import parameter_tables
    from hynb.config import parameters

    assert HELP_ZH.keys() == {item.name for item in parameters()}
    for name, tables in (("README.md", parameter_tables()), ("README.zh.md", tables_zh())):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert with_tables(text, tables) == text, "run python tools/readme_tables.py"


def test_the_readmes_files_and_commands_exist():
    for name in ("README.md", "README.zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / link).exists(), link
        for target in re.findall(r"make (\w+)", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) or target == "test", (
                target
            )
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert english.count("\n## ") == chinese.count("\n## ")
    for block in re.findall(r"```yaml\n(.*?)```", english, re.DOTALL):
        assert block in chinese
        settings = yaml.safe_load(block)
        from hynb.config import read_mapping

        read_mapping(settings).config("README")
