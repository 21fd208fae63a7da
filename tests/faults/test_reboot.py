"""A host that was started again: its pids belong to others now, which no command touches."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from hynb.cli import main
from hynb.files import write_json
from hynb.launch import Run
from hynb.runs import ProcessId, check_output_dir


@pytest.mark.parametrize("changed", [{"boot_id": "before"}, {"start_ticks": 1}], ids=["after a reboot", "later"])
def test_a_process_that_has_got_the_pid_of_a_run_lives_on(tmp_path, capsys, changed):
    with subprocess.Popen(["sleep", "600"]) as innocent:
        try:
            process = ProcessId.of(innocent.pid).record() | changed
            write_json(tmp_path / "launch.json", {"id": "5" * 32, "process": process})
            write_json(tmp_path / "status.json", {"state": "running", "process": process, "global_step": 3})
            write_json(tmp_path / "heartbeat", {"phase": "training", "global_step": 3})
            for name in ("launch.json", "heartbeat"):
                os.utime(tmp_path / name, (time.time() - 3600,) * 2)
            status = Run(tmp_path).status()
            assert status.state == "failed" and "the host was restarted" in status.reason
            for words in (["stop"], ["stop", "--kill"]):
                assert main([*words, str(tmp_path)]) == 0
                assert "failed, step 3" in capsys.readouterr().out
            assert innocent.poll() is None
            assert check_output_dir(tmp_path, overwrite=False, resuming=True) == [], "the run can go on"
        finally:
            innocent.kill()
