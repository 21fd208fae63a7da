"""Commands that are printed to be typed: every path is one word of a shell, whatever characters it holds."""

from __future__ import annotations

import socket
import subprocess

import pytest
from shown_html import make_config

from hynb.runs import RunDir
from hynb.supervision import command_text

# Spaces, and what a shell would run, in folders' names.
NAMES = ["plain", "two words", "$(touch x)", "`touch x`", "it's; touch x", 'a "b" & touch x', "-n * ~"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hostfile", [False, True])
def test_the_command_of_a_run_survives_a_shell(tmp_path, name, hostfile):
    folder = tmp_path / name
    values = {}
    if hostfile:
        (tmp_path / "hosts").write_text(f"{socket.gethostname()} slots=2\n")
        values["hostfile"] = str(tmp_path / "hosts")
    text = command_text(make_config(output_dir=str(folder), num_processes=None if hostfile else 2, **values))
    assert text.startswith("deepspeed ")
    (tmp_path / "here").mkdir()
    script = f'deepspeed() {{ printf "%s\\n" "$@"; }}\n{text}'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path / "here", capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[-1] == str(folder / "run.yaml")
    assert words[words.index("--enable_each_rank_log") + 1] == str(folder / "log")
    if hostfile:
        assert words[words.index("--hostfile") + 1] == str(folder / "deepspeed_hostfile")
    assert list((tmp_path / "here").iterdir()) == []


def test_the_hostfile_of_a_run_folder_is_not_named_like_a_persons(tmp_path):
    assert RunDir(tmp_path).hostfile == tmp_path / "deepspeed_hostfile"
    for name in ("hostfile", "deepspeed_hostfile"):
        (tmp_path / name).write_text("a slots=1\n")
    assert [path.name for path in RunDir(tmp_path).run_files()] == ["deepspeed_hostfile"]
