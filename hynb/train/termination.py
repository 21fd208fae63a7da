"""SIGTERM, which a scheduler sends before it takes a host away: a rank notes it and completes its step."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from types import FrameType

from torch.utils.data import DataLoader


class Termination:
    """Notes that this process got SIGTERM, from now on; needs the main thread.

    Args:
        supervised: the run has a supervisor. Without one the signal ends the process as ever: DeepSpeed's launcher
            ends the ranks by it when one has failed, and waits up to 30 seconds for each (0.19.8, launch.py).

    Attributes:
        noted: it did.
    """

    def __init__(self, *, supervised: bool) -> None:
        self.noted = False
        self._process = os.getpid()
        if supervised:
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # Forked by a library, which relies on ending its processes by this signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.noted = True


def with_lasting_workers(loader: DataLoader) -> DataLoader:
    """Keeps SIGTERM from the processes that read a loader's batches ahead, which a rank needs for its last steps.

    They end with the loader or with the rank (torch 2.13, utils/data/_utils/worker.py, `_worker_loop`).
    """
    # accelerate hands out a wrapper (1.15, data_loader.py, DataLoaderAdapter).
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
    return loader


def _begin_worker(begin: Callable[[int], None] | None, worker_id: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if begin:
        begin(worker_id)
