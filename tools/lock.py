"""Writes the installed versions to requirements.lock and environment.yml: `python tools/lock.py`."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK_HEADER = "# Exact versions of everything; written by `make lock`. PyTorch's CUDA packages follow from torch.\n"
ENVIRONMENT_HEADER = """# The same versions as requirements.lock, for conda: conda env create -f environment.yml
# Then, with the environment active: pip install --no-deps -e .
name: hynb
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def direct_dependencies() -> list[str]:
    """Names in pyproject.toml, those of the extras included, in their order there."""
    return [re.match(r"[A-Za-z0-9_.-]+", item)[0] for item in requirements()]


def requirements() -> list[str]:
    """Requirements in pyproject.toml with their ranges, those of the extras included."""
    extras = project()["optional-dependencies"].values()
    return [*project()["dependencies"], *(item for extra in extras for item in extra)]


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(lock: str) -> dict[str, str]:
    """Versions in a lock file's text, keyed by normalised name."""
    lines = [line for line in lock.splitlines() if "==" in line and not line.startswith("#")]
    return {normalised(name): version for name, version in (line.split("==") for line in lines)}


def normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Writes both files from the versions installed in the environment that runs this."""
    # --all: setuptools too, which builds the wheel in the tests.
    command = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude", "pip", "--exclude-editable"]
    frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [re.sub(r" @ .*|\+cpu$|\+cu\d+$", "", line) for line in frozen.splitlines()]
    # A GPU build's own packages are chosen by torch; pinned here they would be installed on a CPU machine.
    lock = "\n".join(line for line in lines if not re.match(r"nvidia-(?!ml-py)|cuda-|triton", line)) + "\n"
    (ROOT / "requirements.lock").write_text(LOCK_HEADER + lock)
    versions = pinned(lock)
    pins = [f"      - {name}=={versions[normalised(name)]}\n" for name in direct_dependencies()]
    (ROOT / "environment.yml").write_text(ENVIRONMENT_HEADER + "".join(pins))


if __name__ == "__main__":
    main()
