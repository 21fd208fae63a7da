"""Seconds and memory to look at a run with a million events and a thousand checkpoints.

    python benchmarks/long_runs.py [--events 1000000] [--checkpoints 1000]

Prints what each command takes beyond its start (the same command on a run with one event), and its peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hynb.runs import RunWriter

STEP = {"loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 9000.0, "step_seconds": 1.0, "grad_norm": 0.5}
# Events that are written at once.
BLOCK = 10_000


def write_run(folder: Path, events: int, checkpoints: int) -> RunWriter:
    writer = RunWriter(folder)
    writer.event("log", 1, **STEP)
    line = writer.dir.events.read_bytes()
    with writer.dir.events.open("ab") as file:
        for start in range(1, events, BLOCK):
            file.write(line * min(BLOCK, events - start))
    for number in range(checkpoints):
        writer.dir.checkpoint(number).mkdir()
    writer.status("finished", global_step=events, max_steps=events)
    return writer


def measured(command: str, folder: Path, rounds: int) -> tuple[float, int]:
    """Median seconds and peak memory in bytes of a `hynb` command."""
    words = [sys.executable, "-m", "hynb.cli", command, str(folder)]
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    seconds, peak = [], 0
    for _ in range(rounds):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
        peak = max(peak, int(done.stdout) * 1024)
    return statistics.median(seconds), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        short = write_run(Path(folder) / "short", 1, 1)
        long = write_run(Path(folder) / "long", args.events, args.checkpoints)
        print(f"{args.events:,} events, {long.dir.events.stat().st_size / 1e6:.0f} MB")
        for command in ("status", "attach"):
            start, start_peak = measured(command, short.dir.path, args.rounds)
            seconds, peak = measured(command, long.dir.path, args.rounds)
            print(
                f"{command:8} {seconds - start:6.2f} s beyond a start of {start:.2f} s; "
                f"{(peak - start_peak) / 1e6:6.1f} MB beyond {start_peak / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
