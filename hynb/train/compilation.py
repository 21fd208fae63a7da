"""Compiles DeepSpeed's ops before anything is loaded, once per host.

torch guards a build by a file named `lock`, which a killed process leaves behind; whoever comes next then waits for
ever (torch 2.13, torch/utils/file_baton.py). Here a lock of the kernel guards it, which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hynb.data import cache_folder, create_cache_folder
from hynb.errors import ConfigError
from hynb.plan import ops

logger = logging.getLogger(__name__)

_BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "cpu_adagrad": "CPUAdagradBuilder",
    "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder",
    "fused_lamb": "FusedLambBuilder",
    "fused_lion": "FusedLionBuilder",
    "pin_memory": "PinMemoryBuilder",
    "async_io": "AsyncIOBuilder",
}
_FOLDER_VARIABLE = "TORCH_EXTENSIONS_DIR"
# More than any build takes.
_BUILD_SECONDS = 900.0
# How many lines of a compiler's errors are shown.
_ERROR_LINES = 5


def compile_ops(ds_config: Mapping[str, Any], *, on_cpu: bool, started: Callable[[], None] = lambda: None) -> None:
    """Compiles and loads what DeepSpeed needs under a config; later ranks of the host load what the first compiled.

    Args:
        ds_config: as the run uses it.
        on_cpu: as for `ops.compiled_ops`.
        started: called before the first op, if there is one.

    Raises:
        ConfigError: an op cannot be compiled, with the compiler's errors.
    """
    names = ops.compiled_ops(ds_config, on_cpu=on_cpu)
    if not names:
        return
    # For ninja; and because code for one CPU may not run on another, each host has a folder of its own.
    os.environ["PATH"] = ops.with_own_programs(os.environ.get("PATH", ""))
    os.environ.setdefault(_FOLDER_VARIABLE, str(cache_folder() / "torch_extensions" / socket.gethostname()))
    folder = Path(os.environ[_FOLDER_VARIABLE])
    if folder.is_relative_to(cache_folder()):
        create_cache_folder(cache_folder())
    started()
    with _locked(folder):
        for name, reason in names.items():
            _remove_stale_lock(folder / name)
            logger.info(f"DeepSpeed's {name} ({reason}) is compiled, or loaded if it is there, in {folder}")
            began = time.monotonic()
            _load(name)
            logger.info(f"DeepSpeed's {name} is loaded after {time.monotonic() - began:.0f} s")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Excludes other processes of this host while they compile in the same folder.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".hynb_lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"{folder}: DeepSpeed's ops cannot be compiled there: {error.strerror}. Set {_FOLDER_VARIABLE} to a "
            "folder that can be written"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale_lock(folder: Path) -> None:
    """Removes torch's lock from an op's folder when nobody builds there any more.

    Compilers outlive a process that was killed while they ran, and would write into the files of the next build.
    """
    lock, deadline = folder / "lock", time.monotonic() + _BUILD_SECONDS
    while lock.exists() and _is_in_use(folder.resolve()) and time.monotonic() < deadline:
        time.sleep(0.2)
    lock.unlink(missing_ok=True)


def _is_in_use(folder: Path) -> bool:
    """Whether a process of this host works in an op's folder, as compilers do, or has torch's lock open."""
    for link in itertools.chain(Path("/proc").glob("[0-9]*/cwd"), Path("/proc").glob("[0-9]*/fd/*")):
        with contextlib.suppress(OSError):
            if link.readlink() in (folder, folder / "lock"):
                return True
    return False


def _load(name: str) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    builder = accelerator.create_op_builder(_BUILDERS[name])
    try:
        builder.load(verbose=False)
    except Exception as error:
        # What DeepSpeed and torch raise is of many kinds; the errors of the compiler are in the text.
        lines = [line.strip() for line in str(error).splitlines()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        text = "; ".join(errors[-_ERROR_LINES:])
        raise ConfigError(
            f"DeepSpeed's op {name} cannot be compiled on {socket.gethostname()}: {text}. Presets that need no op: "
            f"{', '.join(ops.without_ops({}))}"
        ) from error
