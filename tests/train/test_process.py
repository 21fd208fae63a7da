"""What a rank does about its own process and its output."""

from __future__ import annotations

import subprocess
import sys

WRITES = """
import sys
from pathlib import Path
from hynb.train.process import rotate_output
for number in range(10):
    print(f"line {number} " + "x" * 100, flush=True)
    print(f"error {number}", file=sys.stderr, flush=True)
    rotate_output(Path(sys.argv[1]), limit_bytes=300)
"""


def test_a_log_begins_anew_once_it_is_large(tmp_path):
    log = tmp_path / "20260101000000_rank0.log"
    with log.open("wb") as file:
        subprocess.run([sys.executable, "-c", WRITES, tmp_path], stdout=file, stderr=file, check=True)
    before, now = log.with_name(f"{log.name}.1").read_text(), log.read_text()
    # Three pairs of lines have 300 bytes or more; the tenth is the first of the fourth file.
    assert [line.split("x")[0].strip() for line in before.splitlines()] == [
        text for number in (6, 7, 8) for text in (f"line {number}", f"error {number}")
    ]
    assert [line.split("x")[0].strip() for line in now.splitlines()] == ["line 9", "error 9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [log.name, f"{log.name}.1"]


WITH_A_WORKER = """
import subprocess, sys
from pathlib import Path
from hynb.train.process import rotate_output
code = "import sys\\nfor line in sys.stdin:\\n  print('worker', line, end='', flush=True); sys.stderr.write('.')"
worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
for number in range(5):
    print(f"rank {number} " + "x" * 100, flush=True)
    worker.stdin.write(f"{number}\\n")
    worker.stdin.flush()
    worker.stderr.read(1)
    rotate_output(Path(sys.argv[1]), limit_bytes=200)
worker.stdin.close()
worker.wait()
"""


def test_a_worker_that_has_the_log_open_writes_into_the_new_one(tmp_path):
    log = tmp_path / "20260101000000_rank0.log"
    with log.open("wb") as file:
        subprocess.run([sys.executable, "-c", WITH_A_WORKER, tmp_path], stdout=file, stderr=file, check=True)
        # The launcher has it open too.
        file.write(b"launcher\n")
    before, now = log.with_name(f"{log.name}.1").read_text(), log.read_text()
    assert [line.split(" x")[0] for line in before.splitlines()] == ["rank 2", "worker 2", "rank 3", "worker 3"]
    assert [line.split(" x")[0] for line in now.splitlines()] == ["rank 4", "worker 4", "launcher"]


def test_output_to_another_place_is_left_as_it_is(tmp_path):
    mine = tmp_path / "mine.log"
    with mine.open("wb") as file:
        subprocess.run([sys.executable, "-c", WRITES, tmp_path / "log"], stdout=file, stderr=file, check=True)
    assert len(mine.read_text().splitlines()) == 20
    done = subprocess.run([sys.executable, "-c", WRITES, tmp_path], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 10, "a pipe is no file"
