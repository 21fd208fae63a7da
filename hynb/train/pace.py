"""Tokens, time by part, and memory of the steps since the last log event, over all ranks."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hynb.cluster import peak_flops
from hynb.families import FAMILIES
from hynb.plan import memory
from hynb.train.gathering import of_all_ranks
from hynb.train.moments import now, seconds_between
from hynb.train.stragglers import OwnTime, Straggler, Stragglers

_Batch = TypeVar("_Batch")


class Pace:
    """Measures one rank's steps, without making it wait for its GPU; `report` compares all ranks.

    Args:
        flops_per_token: of a forward and a backward pass; None where nothing is known.
        peak_flops: operations per second of each rank's device; None where nothing is known.

    Attributes:
        new_stragglers: the ranks that the last report found to make the others wait, and the one before did not.
    """

    def __init__(self, *, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._tokens_total = 0
        self._started = time.monotonic()
        self._step = 0
        self._own_time = OwnTime()
        self._stragglers: Stragglers | None = None
        self.new_stragglers: Sequence[Straggler] = ()
        self._reset()

    def attach(self, model: torch.nn.Module, global_step: int) -> None:
        """Measures from now on, and compares the ranks; every rank calls it.

        Args:
            model: with DeepSpeed's engine around it.
            global_step: the last step that was done before.
        """
        self._own_time.attach(model)
        self._stragglers = Stragglers(of_all_ranks(socket.gethostname()))
        # What came before was no step: loading, the start of the readers of data.
        self._reset()
        self._started, self._step = time.monotonic(), global_step

    def begin_step(self) -> None:
        """The micro batches from now on belong to another step."""
        self._own_time.begin_step()

    def add_tokens(self, count: torch.Tensor | int) -> None:
        """Takes note of the tokens of a micro batch, padding left out; a tensor stays on its device."""
        self._tokens = self._tokens + count

    def pause(self, seconds: float) -> None:
        """Leaves time out that was no training, such as that of a checkpoint."""
        self._started += seconds

    def reading(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The same batches; the time that this rank waits for each of them is counted."""
        while True:
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._data_seconds += time.monotonic() - started
            yield batch

    def timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The optimizer's step, whose time is counted from now on."""

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            result = step(*args, **kwargs)
            self._optimizer_spans.append((begin, now()))
            return result

        return timed_step

    def report(
        self, global_step: int, device: torch.device, counts: torch.Tensor | None
    ) -> tuple[dict[str, Any], torch.Tensor | None]:
        """What is logged of the steps since the last report; every rank calls it, and one message is exchanged.

        Args:
            counts: further numbers of this rank, as many on each rank.

        Returns:
            the entries of the log event, and the sums of `counts` over all ranks. `seconds_by_part` are per step and
            of the slowest rank; `memory_bytes` those of the rank with the most, which is `memory_rank`.
        """
        optimizer = sum(seconds_between(begin, end) for begin, end in self._optimizer_spans)
        own = [self._data_seconds, optimizer, memory_bytes(), _utilisation(), *self._own_time.take()]
        local = torch.tensor(own, dtype=torch.float64)
        tokens = torch.as_tensor(self._tokens).to(device, torch.float64).reshape(1)
        parts = [tokens, local.to(device), *([counts.to(device, torch.float64)] if counts is not None else [])]
        rows = _gathered(torch.cat(parts)).cpu()
        # Numbers of Python from here on: they are few, and each operation on a tensor takes longer.
        all_tokens, all_data, all_optimizer, memory, utilisation, *computing = rows[:, :7].t().tolist()
        self._tokens_total += int(sum(all_tokens))
        moment = time.monotonic()
        seconds, steps = max(moment - self._started, 1e-9), max(1, global_step - self._step)
        rate = sum(all_tokens) / seconds
        step_seconds = seconds / steps
        data, optimizer = max(all_data) / steps, max(all_optimizer) / steps
        found: dict[str, Any] = {
            "tokens": self._tokens_total,
            "tokens_per_second": round(rate, 2),
            "tokens_per_second_per_rank": round(rate / len(rows), 2),
            "step_seconds": round(step_seconds, 4),
            "seconds_by_part": {
                "data": round(data, 4),
                "forward and backward": round(max(0.0, step_seconds - data - optimizer), 4),
                "optimizer": round(optimizer, 4),
            },
            "memory_bytes": int(max(memory)),
            "memory_rank": memory.index(max(memory)),
            "memory_bytes_per_rank": [int(value) for value in memory],
            "data_seconds_per_rank": [round(value / steps, 4) for value in all_data],
        }
        own_times = list(zip(*computing, strict=True))
        if all(count for _, count in own_times):
            found["nanoseconds_per_token_per_rank"] = [round(1e9 * own / count) for own, count in own_times]
        if self._stragglers:
            self.new_stragglers = self._stragglers.add(
                global_step, steps=steps, step_seconds=step_seconds, data=all_data, computing=own_times
            )
        if self._flops_per_token and self._peak_flops:
            found["mfu"] = round(rate / len(rows) * self._flops_per_token / self._peak_flops, 4)
        if not any(map(math.isnan, utilisation)):
            found["gpu_utilisation_per_rank"] = [int(value) for value in utilisation]
        self._started, self._step = moment, global_step
        self._reset()
        return found, rows[:, 7:].sum(0) if counts is not None else None

    def _reset(self) -> None:
        self._tokens: torch.Tensor | int = 0
        self._data_seconds = 0.0
        self._optimizer_spans: list[tuple[Any, Any]] = []


def pace_of(model_config: Mapping[str, Any], *, use_lora: bool) -> Pace:
    """Measures the steps of a model, with the share of the GPU's peak where model and GPU are known.

    Args:
        model_config: the content of config.json.
        use_lora: the model's own weights are not trained.
    """
    if model_config.get("model_type") not in FAMILIES or not torch.cuda.is_available():
        return Pace()
    # Of each weight: 2 operations in the forward pass, 2 for the gradient of its input, and 2 for its own if it is
    # trained (arXiv 2001.08361, section 2.1); attention scores are left out.
    flops = (4 if use_lora else 6) * memory.count_parameters(model_config).multiplied
    return Pace(flops_per_token=flops, peak_flops=peak_flops(torch.cuda.get_device_name()))


def memory_bytes() -> int:
    """The peak of this rank's GPU memory so far, or without a GPU the current memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # proc(5): the second entry is the resident size in pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _gathered(row: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks (ranks × entries)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return row[None]
    rows = torch.empty(dist.get_world_size() * len(row), dtype=row.dtype, device=row.device)
    dist.all_gather_into_tensor(rows, row)
    return rows.view(-1, len(row))


def _utilisation() -> float:
    """Percent of the last moments in which this rank's GPU computed; nan where it is unknown."""
    if not torch.cuda.is_available():
        return math.nan
    try:
        return float(torch.cuda.utilization())
    except (ImportError, RuntimeError, OSError):
        return math.nan
