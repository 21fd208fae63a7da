"""Loading under ZeRO-3: each rank reads the part of every parameter that it holds, straight from the weight files.

transformers lets rank 0 read whole tensors and sends them to all other ranks, one module after the other
(transformers 5.23, integrations/deepspeed.py `_load_state_dict_into_zero3_model`). DeepSpeed sends every parameter
once more, before it has a value (DeepSpeed 0.19.8, runtime/zero/partition_parameters.py `_zero_init_param`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers.modeling_utils
from deepspeed.runtime.zero.partition_parameters import Init
from transformers import PreTrainedModel

from hynb.errors import ModelError
from hynb.merge import DTYPE_BYTES, TORCH_DTYPES, TensorEntry
from hynb.train.byte_progress import ByteProgress
from hynb.train.library_loading import replaced
from hynb.train.staging import PIECE_BYTES, Staging
from hynb.train.stored_tensors import Part, range_of, stored_parts

logger = logging.getLogger(__name__)

# transformers 5.23: fills the model, after another function has mapped all tensors of the files into rank 0's memory.
_LOADER, _READER = "_load_state_dict_into_zero3_model", "load_state_dict"
# A disk of today needs several requests at a time for its full rate.
_READERS = 4


@dataclass(kw_only=True, frozen=True)
class _Read:
    """A range of a file, and where its values go.

    Args:
        begin, end: byte range in the file.
        target: flat, with as many elements as the range.
    """

    entry: TensorEntry
    begin: int
    end: int
    target: torch.Tensor


@contextmanager
def partitions_from_files(stored: Sequence[TensorEntry], progress: ByteProgress) -> Iterator[None]:
    """While it is active, `from_pretrained` under ZeRO-3 loads each rank's partitions from safetensors files.

    Where the weights are in other files, or DeepSpeed keeps partitions elsewhere (NVMe, quantised, hpZ), transformers
    loads them in its own way.

    Args:
        stored: the tensors of the base; empty where they are in other files.
        progress: called with the bytes that this rank has read, and those that it reads in all.
    """
    if not stored:
        yield
        return
    plain = getattr(transformers.modeling_utils, _LOADER)
    plain_read = getattr(transformers.modeling_utils, _READER)
    put_off: list[Callable[[], dict[str, Any]]] = []

    def read_later(*args: Any, **kwargs: Any) -> dict[str, Any]:
        put_off.append(partial(plain_read, *args, **kwargs))
        return {}

    def load(model: Any, state_dict: dict[str, Any], load_config: Any = None) -> Any:
        conversions = getattr(load_config, "weight_mapping", None) or []
        entries = {entry.name: entry for entry in stored}
        parts = stored_parts(model, {name: entry.shape for name, entry in entries.items()}, conversions)
        if parts is None or not all(_is_plain_partition(weight) for weight in model.parameters()):
            logger.info("the weights are read by rank 0 and sent to the other ranks, because of the ZeRO settings")
            for weight in model.parameters():
                _share_rank_0_values(weight)
            for read in put_off:
                state_dict |= read()
            return plain(model, state_dict, load_config)
        model._weight_conversions = conversions
        return [], load_partitions(model, entries, parts, progress)

    with (
        replaced(transformers.modeling_utils, _LOADER, load),
        replaced(transformers.modeling_utils, _READER, read_later),
        replaced(Init, "_zero_init_param", _partition),
    ):
        yield


def load_partitions(
    model: PreTrainedModel,
    entries: Mapping[str, TensorEntry],
    parts: Mapping[str, Sequence[Part]],
    progress: ByteProgress,
) -> set[str]:
    """Reads this rank's part of every parameter, and the buffers; returns the names that the files do not have.

    Args:
        entries: the tensors of the weight files, by name.
        parts: what each parameter and buffer consists of, as from `stored_parts`.
        progress: called with the bytes read so far and in all.

    Raises:
        ModelError: a tensor has another shape than the model, or a file ends too early.
        OSError: a file cannot be read.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    reads: list[_Read] = []
    problems: list[str] = []
    for name, pieces in parts.items():
        if unknown := [entries[part.stored] for part in pieces if entries[part.stored].dtype not in TORCH_DTYPES]:
            found = unknown[0]
            problems.append(f"{found.shard}: {found.name} has the dtype {found.dtype}, in which nothing is trained")
            continue
        value = parameters[name] if name in parameters else buffers[name]
        shape = tuple(getattr(value, "ds_shape", value.shape))
        if not _fits(pieces, entries, shape):
            found = entries[pieces[0].stored]
            problems.append(
                f"{found.shard}: {found.name} has the shape {list(found.shape)}, "
                f"of which {name} with the shape {list(shape)} cannot be made"
            )
            continue
        reads += _reads_of(value, pieces, entries)
        value._is_hf_initialized = True  # type: ignore[attr-defined]  transformers' mark of loaded weights
    if problems:
        raise ModelError(problems[:5])
    _execute(sorted(reads, key=lambda read: (read.entry.shard, read.begin)), progress)
    return set(model.state_dict()) - parts.keys()


def _partition(init: Any, param: torch.nn.Parameter) -> None:
    """Init._zero_init_param without the broadcast of values that are about to be replaced."""
    init._convert_to_deepspeed_param(param)
    param.partition()  # type: ignore[attr-defined]  a method that DeepSpeed adds


def _is_plain_partition(weight: Any) -> bool:
    """Whether a rank's partition of a parameter is a flat tensor in memory, of the parameter's dtype."""
    partition = getattr(weight, "ds_tensor", None)
    return (
        partition is not None
        and partition.final_location is None
        and partition.dtype == weight.dtype
        and getattr(weight, "ds_secondary_tensor", None) is None
    )


def _share_rank_0_values(weight: Any) -> None:
    """What `_zero_init_param` would have done: the same values on all ranks."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        pass


def _fits(pieces: Sequence[Part], entries: Mapping[str, TensorEntry], shape: tuple[int, ...]) -> bool:
    """Whether stored tensors have the shapes that a parameter is made of."""
    if sum(part.end - part.begin for part in pieces) != math.prod(shape):
        return False
    shapes = {entries[part.stored].shape for part in pieces}
    # Experts are stored one by one: each lacks the first dimension, and has all or some of the rows.
    return shapes == {shape} or all(stored[:-2] == shape[1:-2] and stored[-1:] == shape[-1:] for stored in shapes)


def _reads_of(value: Any, pieces: Sequence[Part], entries: Mapping[str, TensorEntry]) -> Iterator[_Read]:
    """The reads that fill this rank's part of a parameter, or a whole buffer."""
    partition = getattr(value, "ds_tensor", None)
    if partition is None:
        begin, end, flat = 0, value.numel(), value.data.view(-1)
    else:
        flat = partition.data
        begin = torch.distributed.get_rank(value.ds_process_group) * flat.numel()
        end = min(begin + flat.numel(), value.ds_numel)
        if end < begin + flat.numel():
            # Padding of the last ranks.
            flat[max(0, end - begin) :].zero_()
    for part in range_of(pieces, begin, end):
        entry = entries[part.stored]
        item_bytes = DTYPE_BYTES[entry.dtype]
        step = PIECE_BYTES // item_bytes
        for first in range(part.begin, part.end, step):
            last = min(first + step, part.end)
            at = part.at - begin + first - part.begin
            yield _Read(
                entry=entry,
                begin=entry.begin + first * item_bytes,
                end=entry.begin + last * item_bytes,
                target=flat[at : at + last - first],
            )


def _execute(reads: Sequence[_Read], progress: ByteProgress) -> None:
    total = sum(read.end - read.begin for read in reads)
    done = 0
    lock = threading.Lock()
    staging = Staging()
    with ExitStack() as stack:
        paths = {read.entry.shard for read in reads}
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in paths}

        def execute(read: _Read) -> None:
            nonlocal done
            with torch.no_grad():
                _read(files[read.entry.shard], read, staging)
            with lock:
                done += read.end - read.begin
                progress(done, total)

        pool = stack.enter_context(ThreadPoolExecutor(_READERS))
        for _ in pool.map(execute, reads):
            pass
    progress.end(total)


def _read(file_number: int, read: _Read, staging: Staging) -> None:
    dtype = TORCH_DTYPES[read.entry.dtype]
    if read.target.device.type == "cpu" and read.target.dtype == dtype:
        _fill(file_number, read, read.target.view(torch.uint8))
        return
    data = staging.bytes(read.end - read.begin, pinned=read.target.device.type == "cuda")
    _fill(file_number, read, data)
    read.target.copy_(data.view(dtype))


def _fill(file_number: int, read: _Read, data: torch.Tensor) -> None:
    view = memoryview(data.numpy().data)
    position = read.begin
    while view:
        count = os.preadv(file_number, [view], position)
        if not count:
            raise ModelError(f"{read.entry.shard}: the file ends inside tensor {read.entry.name}")
        view, position = view[count:], position + count
