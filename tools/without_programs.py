"""Runs a command as on a machine without some programs: python tools/without_programs.py sshd chromium -- make test.

PATH becomes a folder of links to every program of PATH but the named ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def link_programs(folder: Path, without: set[str]) -> None:
    """Fills a folder with links to the programs of PATH, the first of each name."""
    for place in os.get_exec_path():
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / program.name
            if program.name not in without and not link.is_symlink():
                link.symlink_to(program.absolute())


def main() -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="+", help="programs that are left out")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    command = sys.argv[split + 1 :]
    if not command:
        parser.error("no command: write it after --")
    with tempfile.TemporaryDirectory() as folder:
        link_programs(Path(folder), set(args.programs))
        return subprocess.run(command, env=os.environ | {"PATH": folder}).returncode


if __name__ == "__main__":
    sys.exit(main())
