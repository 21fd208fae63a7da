"""What a rank's process needs before and while it meets the others: environment, output, process group, log lines."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import io
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from hynb.cluster import free_port
from hynb.runs import LOG_BYTES, RunWriter

T = TypeVar("T")

_COPIED_BYTES = 1 << 20
# What every rank imports, with all that these bring; DeepSpeed imports the last one with each engine.
_LIBRARIES = (
    *("deepspeed", "peft", "transformers.trainer", "transformers.integrations", "torch.utils.tensorboard"),
    "deepspeed.runtime.zero.muon.muon_optimizer",
)


class Notes(logging.Handler):
    """Prints each log record of hynb as a `hynb: …` line of this rank's output and keeps its text.

    Attributes:
        lines: the texts so far; the manifest stores them.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Prints and keeps one record."""
        line = record.getMessage()
        self.lines.append(line)
        print(f"hynb: {line}", flush=True)


def start_notes() -> Notes:
    """Notes of all of hynb's loggers from now on; called on rank 0 alone, so that each line appears once."""
    notes = Notes()
    logger = logging.getLogger("hynb")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    # A library that configures the root logger would print each line a second time.
    logger.propagate = False
    return notes


def show_output_at_once() -> None:
    """Makes every printed line visible in the log at once, and escapes characters that the log cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def rotate_output(log_folder: Path, *, limit_bytes: int = LOG_BYTES) -> None:
    """Begins this rank's log anew once it is large; what it held until then is kept beside it as `.1`.

    The file stays the same one: data loader workers and the launcher have it open too.

    Args:
        log_folder: output to another place is left as it is.
        limit_bytes: what a file may hold.
    """
    # On a full disk the log goes on.
    with contextlib.suppress(OSError):
        status = os.fstat(1)
        if not stat.S_ISREG(status.st_mode) or status.st_size < limit_bytes:
            return
        path = Path("/proc/self/fd/1").readlink()
        if path.parent != log_folder.resolve() or path.suffix != ".log" or not path.is_file():
            return
        if shutil.disk_usage(path.parent).free < status.st_size:
            return
        sys.stdout.flush()
        for descriptor in (1, 2) if os.path.sameopenfile(1, 2) else (1,):
            # Of all processes that have inherited it, whose next line would else leave a hole before it.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
        _move_content(path, path.with_name(f"{path.name}.1"))


def _move_content(path: Path, target: Path) -> None:
    """Copies what is in this process's output file and empties it."""
    copy = target.with_name(f"{path.name}.new")
    try:
        with path.open("rb") as source, copy.open("wb", buffering=0) as file:
            shutil.copyfileobj(source, file, _COPIED_BYTES)
            copy.replace(target)
            # What others have written meanwhile, until nothing is left.
            shutil.copyfileobj(source, file, _COPIED_BYTES)
            if file.tell() == os.fstat(1).st_size:
                os.ftruncate(1, 0)
    finally:
        copy.unlink(missing_ok=True)


class _LastingOutput:
    """An output stream that drops what does not fit on the disk of its file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or a part of it."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is held back, or a part of it."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_full_disk(writer: RunWriter | None) -> None:
    """Lets this rank go on where its output or its records do not fit on the disk.

    Args:
        writer: of the run folder; None on other ranks than 0.
    """
    sys.stdout, sys.stderr = _LastingOutput(sys.stdout), _LastingOutput(sys.stderr)
    if writer:
        writer.outlives_full_disk = True


def set_up_process() -> None:
    """Sets the environment variables that torch and deepspeed read at their import, and the number of CPU threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Every model is a local folder; nothing is fetched from a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with _no_collections():
        import torch
        import transformers  # noqa: F401

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_of_host()))


def ranks_of_host() -> int:
    """How many ranks run on this host, as the launcher or torchrun says."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def import_libraries() -> None:
    """Imports all that training needs, which takes seconds, before the ranks wait for each other.

    Needs `set_up_process` before.
    """
    with _no_collections():
        for name in _LIBRARIES:
            importlib.import_module(name)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Within it Python's garbage collector rests, and later it passes over what was created.

    Imports create a million objects and hardly any garbage; looking at them repeatedly takes a fifth of the time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def init_process_group(limit: timedelta) -> None:
    """Meets the other ranks: nccl with one GPU per rank, gloo without GPUs. Needs `set_up_process` before.

    Args:
        limit: how long a rank waits for the others in a collective operation.
    """
    import deepspeed
    import torch

    from hynb.train.timeouts import create_process_group

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    else:
        # Compiling this op takes half a minute, and a run killed meanwhile leaves a lock; training does not need it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "gloo"
    create_process_group(backend, limit)
    # DeepSpeed takes the group that is there.
    deepspeed.init_distributed(dist_backend=backend)


def decided_by_rank_0(decide: Callable[[int | None], T]) -> T:
    """What rank 0 decides, on every rank: hosts may have other files and other GPUs.

    Args:
        decide: gets the memory in bytes of the smallest GPU of all ranks; None on CPUs.
    """
    import torch
    import torch.distributed as dist

    size_bytes = (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if (torch.cuda.is_available())
        else None
    )
    sizes: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, size_bytes)
    known = [size for size in sizes if size is not None]
    decided: list[T | None] = [decide(min(known, default=None)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return decided[0]  # pyright: ignore[reportReturnType]  # rank 0 has sent it
