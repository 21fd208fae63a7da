"""A process that writes a run folder, for the widgets that watch one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_until

from hynb.launch import Run

# Writes a run folder as rank 0 does; the arguments are the folder, the steps, seconds per step, the step at which it
# fails (0 for none), and the reason of the failure.
WRITER = """
import sys, time
from hynb.runs import RunWriter
folder, steps, seconds, fails, reason = sys.argv[1:]
steps, seconds, fails = int(steps), float(seconds), int(fails)
writer = RunWriter(folder)
writer.dir.log.mkdir(exist_ok=True)
(writer.dir.log / "x_rank0.log").write_text("a line of the log\\nthe last line <of it>\\n")
writer.start()
writer.phase("loading")
writer.event("start", 0)
for step in range(1, steps + 1):
    time.sleep(seconds)
    if step == fails:
        writer.status("failed", global_step=step, exit_code=2, reason=reason)
        writer.close()
        sys.exit(2)
    numbers = {"loss": 4 / step, "learning_rate": 1e-4, "tokens": 100 * step, "tokens_per_second": 50.0}
    writer.event("log", step, **numbers, step_seconds=seconds, memory_bytes=2_000_000_000, grad_norm=1.0)
    writer.status("running", global_step=step, max_steps=steps)
    writer.phase("training")
    stop = writer.dir.stop_request.exists()
    if stop or step == steps:
        writer.phase("saving")
        writer.dir.checkpoint(step).mkdir()
        writer.event("save", step, path=f"checkpoint-{step}", seconds=0.25)
        state = "stopped" if stop else "finished"
        writer.event("end", step, state=state)
        writer.status(state, global_step=step, max_steps=steps, exit_code=0, reason="stop requested" if stop else "")
        break
writer.close()
"""
FAILURE = "the GPU's memory is <not> enough"


@pytest.fixture
def start_writer() -> Iterator[Callable[..., Run]]:
    """Starts a writer and returns its run: ended if a step takes no time, else as soon as it has a status."""
    started = []

    def start(folder: Path, *, steps: int, seconds: float = 0.0, fails: int = 0, reason: str = FAILURE) -> Run:
        command = [sys.executable, "-c", WRITER, str(folder), str(steps), str(seconds), str(fails), reason]
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        started.append(process)
        if seconds == 0:
            process.wait()
        else:
            wait_until((folder / "status.json").exists, "the writer's status")
        return Run(folder)

    yield start
    for process in started:
        process.kill()
        process.wait()
