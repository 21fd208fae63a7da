"""The wheel, installed where neither the source tree nor Jupyter is: contents, commands, a launched training."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from lock import project
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hynb.config import to_yaml
from hynb.demo.run import demo_config, write_demo
from hynb.extras import NOTEBOOK

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy of the tree: a `build` folder of an earlier build would lend it modules that have moved."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "hynb", source / "hynb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter that has the wheel and its dependencies without any extra."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    installed = folder / "bin" / "python"
    install = ["-m", "pip", "--python", installed, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in dependencies(project()["dependencies"]):
        link(distribution, site)
    return installed


def dependencies(requirements: list[str]) -> list[metadata.Distribution]:
    """The distributions installed here that requirements lead to, those without an extra's."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = ["", *requirement.extras]
        if name not in found:
            found[name] = metadata.distribution(name)
        elif not requirement.extras:
            continue
        for item in map(Requirement, found[name].requires or []):
            if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(item)
    return list(found.values())


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Makes a distribution's modules and metadata importable in another environment."""
    for top in {Path(file.parts[0]) for file in distribution.files or [] if file.parts[0] != ".."}:
        here = Path(str(distribution.locate_file(top)))
        if here.exists() and not (site / top).exists():
            (site / top).symlink_to(here)


def run(python: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of the wheel's environment outside of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{python.parent}{os.pathsep}{environment['PATH']}"}
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        kept = {name for name in archive.namelist() if ".dist-info/" in name}
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hynb").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert names == files
    assert {"hynb/py.typed", "hynb/runs/__init__.pyi", "hynb/demo/base_model/model.safetensors"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in kept)


def test_neither_the_source_tree_nor_jupyter_is_in_its_environment(python, tmp_path):
    ask = (
        "import hynb, importlib.util as util, sys; print(hynb.__file__); "
        f"print([name for name in {[*NOTEBOOK, 'IPython', 'nbformat', 'pytest']!r} if util.find_spec(name)])"
    )
    place, found = run(python, python, "-c", ask, cwd=tmp_path).stdout.splitlines()
    assert Path(place).is_relative_to(python.parents[1])
    assert found == "[]"


def test_commands_and_imports_of_the_demo_run(python, tmp_path):
    listing = run(python, "hynb", "--help", cwd=tmp_path)
    assert listing.returncode == 0 and "launch" in listing.stdout and "preflight" in listing.stdout
    listing = run(python, "hynb", "parameters", cwd=tmp_path)
    assert listing.returncode == 0 and "--model_name_or_path" in listing.stdout
    make = "from hynb.demo.run import write_demo; print(write_demo('demo', train=4, held_out=2).base_model_path)"
    done = run(python, python, "-c", f"import hynb.demo.pretrain; {make}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "base_model" / "model.safetensors").stat().st_size > 1e6


def test_what_needs_jupyter_names_the_extra_in_one_line(python, tmp_path):
    done = run(python, "hynb", "demo", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install 'hynb[notebook]'" in line and "papermill" in line
    asked = "from hynb.errors import HynbError\ntry:\n import hynb.widgets\nexcept HynbError as error:\n print(error)"
    (line,) = run(python, python, "-c", asked, cwd=tmp_path).stdout.splitlines()
    assert "pip install 'hynb[notebook]'" in line and "ipywidgets" in line


def test_a_launched_training_and_its_guard_run_without_jupyter(python, tmp_path):
    files = write_demo(tmp_path / "demo", train=8, held_out=2)
    # A name that a shell would run, in the commands that are printed too.
    folder = tmp_path / "a run $(touch x)"
    config = demo_config(files, folder)
    config = config.replace(max_steps=2, save_steps=2, per_device_train_batch_size=1, num_processes=1)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = run(python, "hynb", "launch", "--config", "run.yaml", "--follow", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for verb in ("attach", "stop"):
        assert f" hynb {verb} {shlex.quote(str(folder))}\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("finished, step 2 of 2")
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").is_file()
    # Only the word of its guard makes a host "done".
    (host,) = json.loads((folder / "hosts.json").read_text())["hosts"]
    assert host["state"] == "done", host
    status = run(python, "hynb", "status", folder, cwd=tmp_path)
    assert status.returncode == 0 and status.stdout.startswith("finished")
    assert not (tmp_path / "x").exists()
