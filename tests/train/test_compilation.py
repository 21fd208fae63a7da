"""Compiling DeepSpeed's ops: after a build that was killed, and by several ranks at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import need

from hynb.cluster import host_facts
from hynb.errors import ConfigError
from hynb.train import compile_ops

# As two ranks of a host would, with the smallest of DeepSpeed's ops.
COMPILE = """
from hynb.train import compile_ops, set_up_process
set_up_process()
compile_ops({}, on_cpu=True, started=lambda: print("started", flush=True))
"""
SECONDS = 500.0
# The op's place is taken by an empty module: torch's headers alone would take a minute of compilation.
MODULE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "pin_memory", 0, -1, 0};
__attribute__((weak)) PyMODINIT_FUNC PyInit_pin_memory(void) { return PyModule_Create(&module); }
"""
# Compiles only once the test says so, unless the build was killed meanwhile.
COMPILER = """#!{python}
import os, subprocess, sys, sysconfig, time
words = sys.argv[1:]
if "-c" in words:
    parent = os.getppid()
    while not os.path.exists("{folder}/go"):
        time.sleep(0.05)
        if os.getppid() != parent:
            sys.exit(1)
    files = [word for at in (words.index("-MF"), words.index("-o")) for word in words[at : at + 2]]
    words = ["-x", "c", "-MMD", *files, "-fPIC", "-I" + sysconfig.get_path("include"), "-c", "{folder}/module.c"]
sys.exit(subprocess.run(["c++", *words]).returncode)
"""


def start_rank(folder: Path) -> subprocess.Popen:
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(folder),
        "DS_PIN_MEMORY_BACKEND": "native",
        "CXX": str(folder / "compiler"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_a_killed_build_is_continued_by_one_rank_while_the_others_wait(tmp_path):
    present = host_facts.build_tools()
    need(present["compiler"] and present["ninja"] and present["python"], "needs a C++ compiler, ninja and Python.h")
    (tmp_path / "module.c").write_text(MODULE)
    (tmp_path / "compiler").write_text(COMPILER.format(python=sys.executable, folder=tmp_path))
    (tmp_path / "compiler").chmod(0o700)
    lock, op = tmp_path / "pin_memory" / "lock", tmp_path / "pin_memory" / "pin_memory.so"
    killed = start_rank(tmp_path)
    deadline = time.monotonic() + SECONDS
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert lock.exists() and not op.exists(), "torch's lock is left behind"
    (tmp_path / "go").touch()
    ranks = [start_rank(tmp_path), start_rank(tmp_path)]
    assert [rank.wait(SECONDS) for rank in ranks] == [0, 0]
    assert [rank.communicate()[0].split() for rank in ranks] == [["started"], ["started"]]
    assert not lock.exists() and op.exists()
    linked = [
        line for line in (tmp_path / "pin_memory" / ".ninja_log").read_text().splitlines() if "pin_memory.so" in line
    ]
    assert len(linked) == 1, "built once"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "ext"))
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    with pytest.raises(ConfigError, match=r"file/ext: DeepSpeed's ops cannot be compiled there: Not a directory"):
        compile_ops({}, on_cpu=True)


def test_without_ops_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    compile_ops({}, on_cpu=True, started=lambda: pytest.fail("nothing is to be compiled"))
    assert not (tmp_path / "ext").exists()
