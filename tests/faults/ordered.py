"""Faults that a test orders in one rank of a launched run, which makes them in its next step."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

# Python runs such a module at each start; the ranks of a run inherit where it is.
_SITE = """
import os, sys
if "RANK" in os.environ and "hynb.train_entry" in sys.orig_argv:
    sys.path.append({tests!r})
    from faults import ordered
    ordered.follow({folder!r})
"""
# Of each step: few of them pass while a fault is found.
_STEP_SECONDS = 0.1


def python_path(folder: Path) -> str:
    """A value of PYTHONPATH by which the ranks of a run do what `order` leaves in a folder."""
    (folder / "sitecustomize.py").write_text(_SITE.format(tests=str(Path(__file__).parents[1]), folder=str(folder)))
    return f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def order(folder: Path, rank: int, fault: str) -> None:
    """Has a rank break in its next step, by the function of this module with that name."""
    unready = folder / "order.tmp"
    unready.write_text(fault)
    unready.rename(folder / f"order{rank}")


def follow(folder: str) -> None:
    """Called in each rank at its start."""
    place = Path(folder)
    if os.environ["RANK"] == "1" and (place / "group").exists():
        # Later, what it holds already would not count.
        Path((place / "group").read_text(), "cgroup.procs").write_text("0")
    if os.environ["RANK"] == "0" and (place / "hold").exists():
        _hold(place / "hold")
    threading.Thread(target=_change_steps, args=(place / f"order{os.environ['RANK']}",), daemon=True).start()


def _change_steps(path: Path) -> None:
    # Without an import of its own, which would come before the rank's settings.
    while (trainer := getattr(sys.modules.get("hynb.train.trainer"), "RunTrainer", None)) is None:
        time.sleep(0.01)
    plain = trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(_STEP_SECONDS)
        if path.exists():
            fault = path.read_text()
            path.unlink()
            globals()[fault]()
        return plain(self, *args, **kwargs)

    trainer.training_step = training_step


def _hold(path: Path) -> None:
    """Rank 0 stays in the phase that a file names, until the file is gone or the run is asked to stop."""
    from hynb.runs import RunWriter

    plain, held = RunWriter.phase, path.read_text()

    def phase(self: RunWriter, name: Any) -> None:
        plain(self, name)
        while name == held and path.exists() and not self.dir.stop_request.exists():
            time.sleep(0.01)

    RunWriter.phase = phase


def stop_twice() -> None:
    """Called in each rank before it begins: the run is asked to stop in the phase STOP_IN and after it."""
    from hynb.runs import RunWriter, request_stop

    plain, wanted, asked = RunWriter.phase, os.environ["STOP_IN"], 0

    def phase(self: RunWriter, name: Any) -> None:
        nonlocal asked
        plain(self, name)
        if name == wanted or asked == 1:
            asked += 1
            request_stop(self.dir, "on request")

    RunWriter.phase = phase


def exception() -> None:
    """An error that hynb knows nothing of."""
    raise ValueError("odd shape")


def gpu_memory() -> None:
    """What torch raises where a GPU's memory is not enough."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def host_memory() -> None:
    """More than the group of processes may take, each page in use."""
    bytearray(b"x") * (1 << 31)
