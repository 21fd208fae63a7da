"""Moments in the work of this rank's device, and the time between two of them."""

from __future__ import annotations

import time
from typing import Any

import torch


def now() -> Any:
    """A moment; on a GPU one of its stream, since this process runs ahead of it."""
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """The seconds from one moment to another; waits until the device has come to the second."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
