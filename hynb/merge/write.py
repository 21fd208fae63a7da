"""Merges LoRA adapters into a base model shard by shard: `hynb merge --base_model_path … --output_path …`."""

from __future__ import annotations

import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hynb.errors import HynbError, MergeError
from hynb.files import read_json, write_json
from hynb.merge import shards
from hynb.merge.pickled_base import as_safetensors
from hynb.merge.plan import Change, MergePlan, changed_tensor, plan_merge
from hynb.merge.shards import Shard, TensorEntry

RECEIPT = "merge_receipt.json"
_STATE = "merge_state.json"
_UNTIED_SHARD, _FIRST_OF_TWO = "model-lm_head.safetensors", "model-base.safetensors"
_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_ELEMENTS = 4 << 20


@dataclass(kw_only=True, frozen=True)
class MergeProgress:
    """How far a merge has come; bytes of the output's weights."""

    done_bytes: int
    total_bytes: int
    shard: str
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the bytes so far; None at the beginning."""
        return self.seconds * (self.total_bytes / self.done_bytes - 1) if self.done_bytes else None


@dataclass(kw_only=True)
class MergeResult:
    """What a merge made, as its receipt says it."""

    output_path: str
    tensors_changed: int
    tensors_copied: int
    weight_bytes: int
    largest_change: float
    mean_change: float
    seconds: float
    resumed_shards: int = 0
    linked_shards: int = 0
    changes: dict[str, dict[str, float]] = field(default_factory=dict)


def merge_lora(
    *,
    base_model_path: str | Path,
    adapter_model_path: str | Path | Sequence[str | Path],
    output_path: str | Path,
    save_dtype: str = "keep",
    adapter_weights: Sequence[float] | None = None,
    overwrite: bool = False,
    link: bool = False,
    progress: Callable[[MergeProgress], None] | None = None,
) -> MergeResult:
    """Writes a model folder equal to the base with its adapters merged in.

    The bytes of unchanged tensors are copied by the kernel; changed tensors are computed in float32, one at
    a time, and rounded once (LoRA: arXiv 2106.09685, DoRA: 2402.09353, rsLoRA: 2312.03732).

    Args:
        adapter_model_path: one adapter folder, or several that are merged one after the other.
        output_path: a new folder; it appears when it is whole. A broken-off merge is taken up again.
        save_dtype: keep (each tensor's own), bf16, fp16 or fp32; the router's float32 weights stay so.
        adapter_weights: a factor for each adapter; 1 by default.
        overwrite: replace an existing output folder.
        link: hard-link shards that no adapter touches instead of copying them.
        progress: called from several threads, one at a time.

    Raises:
        MergeError: what doesn't fit together, by name, before a byte is written.
        ModelError: a base folder that is incomplete or corrupt.
    """
    started = time.monotonic()
    single = isinstance(adapter_model_path, (str, Path))
    adapters = [Path(item) for item in ([adapter_model_path] if single else adapter_model_path)]
    base, output = Path(base_model_path).expanduser().absolute(), Path(output_path).expanduser().absolute()
    if save_dtype != "keep" and save_dtype not in _DTYPES:
        raise MergeError(f"save_dtype = {save_dtype}: must be one of keep, {', '.join(_DTYPES)}")
    if output.exists() and not overwrite:
        raise MergeError(f"output_path = {output}: exists already; choose another, or replace it with --overwrite")
    if output in (base, *(item.absolute() for item in adapters)) or output in base.parents:
        raise MergeError(f"output_path = {output}: would replace the base or the adapter; choose another")
    with as_safetensors(base, output) as source:
        plan = plan_merge(source, adapters, adapter_weights, original=base)
        result = _write(plan, output, save_dtype, link, progress, started)
    return result


def _write(
    plan: MergePlan,
    output: Path,
    save_dtype: str,
    link: bool,
    progress: Callable[[MergeProgress], None] | None,
    started: float,
) -> MergeResult:
    """Makes the output folder beside its place and renames it when it is whole."""
    written = [*shards.entries(plan.shards), *([plan.untied] if plan.untied else [])]
    wanted = {entry.name: _output_dtype(entry, save_dtype) for entry in written}
    total_bytes = sum(_output_bytes(entry, wanted) for entry in written)
    partial = output.with_name(f".{output.name}.partial")
    fingerprint = {"plan": plan.fingerprint, "save_dtype": save_dtype, "link": link}
    _prepare_partial(partial, fingerprint)
    work = _Work(plan=plan, wanted=wanted, partial=partial, link=link, total_bytes=total_bytes, report=progress)
    _check_space(output, partial, work.missing_bytes())
    try:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            for _ in pool.map(work.shard, plan.shards):
                pass
        if plan.untied:
            work.untied(plan.untied)
    except OSError as error:
        raise MergeError(f"{output}: cannot be written: {error}. The base is untouched; a rerun goes on") from error
    _write_rest(plan, partial, wanted, total_bytes, save_dtype)
    result = work.result(output, time.monotonic() - started)
    receipt = {
        "v": 1,
        "base": plan.base_identity,
        "adapters": plan.adapter_identities,
        "save_dtype": save_dtype,
    }
    receipt |= vars(result) | {
        "versions": {name: metadata.version(name) for name in ("hynb", "torch")},
        "made_at": time.time(),
    }
    write_json(partial / RECEIPT, receipt)
    (partial / _STATE).unlink()
    if output.exists():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
    return result


class _Work:
    """The shards of one merge, worked on by several threads."""

    def __init__(
        self,
        *,
        plan: MergePlan,
        wanted: dict[str, str],
        partial: Path,
        link: bool,
        total_bytes: int,
        report: Callable[[MergeProgress], None] | None,
    ) -> None:
        self._plan, self._wanted, self._partial, self._link = plan, wanted, partial, link
        self._total_bytes, self._report = total_bytes, report
        self._started = time.monotonic()
        self._lock = threading.Lock()
        # Changed tensors are computed one at a time: their memory is what a merge needs.
        self._compute = threading.Lock()
        self._done_bytes = self._resumed = self._linked = 0
        self._changes: dict[str, dict[str, float]] = {}

    def missing_bytes(self) -> int:
        """Bytes that this merge will still write."""
        missing = [self._plan.untied] if self._plan.untied else []
        for shard in self._plan.shards:
            if not self._target(shard).exists() and not (self._link and not self._touched(shard)):
                missing += shard.tensors
        return sum(_output_bytes(entry, self._wanted) for entry in missing)

    def shard(self, shard: Shard) -> None:
        """Makes one output shard; its file appears when it is whole."""
        target, notes = self._target(shard), self._target(shard).with_suffix(".changes.json")
        if target.exists():
            self._changes |= read_json(notes) or {}
            self._resumed += 1
            self._advance(shard, shard.size_bytes)
            return
        beside = target.with_suffix(".tmp")
        beside.unlink(missing_ok=True)
        changed: dict[str, dict[str, float]] = {}
        if self._link and not self._touched(shard) and not self._converts(shard):
            try:
                os.link(shard.path.resolve(), beside)
            except OSError as error:
                raise MergeError(f"{target.name}: cannot be linked ({error.strerror}): leave out --link") from None
            self._linked += 1
            self._advance(shard, shard.size_bytes)
        elif self._converts(shard):
            changed = self._convert(shard, beside)
        else:
            changed = self._patch(shard, beside)
        write_json(notes, changed)
        beside.rename(target)
        self._changes |= changed

    def untied(self, entry: TensorEntry) -> None:
        """Writes the output layer that is tied to the embeddings no more, in a shard of its own."""
        changes = self._plan.changes.get(entry.name, [])
        data, sizes = self._changed(entry, changes)
        if changes:
            self._changes[entry.name] = sizes
        header = shards.header_of([(entry.name, self._wanted[entry.name], entry.shape)], {"format": "pt"})
        (self._partial / _UNTIED_SHARD).write_bytes(header + data)
        self._advance(self._plan.shards[-1], len(data))

    def result(self, output: Path, seconds: float) -> MergeResult:
        """What all shards together came to."""
        for notes in self._partial.glob("*.changes.json"):
            notes.unlink()
        changes = self._changes.values()
        elements = sum(item["elements"] for item in changes)
        return MergeResult(
            output_path=str(output),
            tensors_changed=len(self._changes),
            tensors_copied=len(self._wanted) - len(self._changes),
            weight_bytes=self._total_bytes,
            largest_change=max((item["largest"] for item in changes), default=0.0),
            mean_change=sum(item["mean"] * item["elements"] for item in changes) / max(1, elements),
            seconds=round(seconds, 3),
            resumed_shards=self._resumed,
            linked_shards=self._linked,
            changes=dict(sorted(self._changes.items())),
        )

    def _target(self, shard: Shard) -> Path:
        return self._partial / _output_name(self._plan, shard.path)

    def _touched(self, shard: Shard) -> bool:
        return any(entry.name in self._plan.changes for entry in shard.tensors)

    def _converts(self, shard: Shard) -> bool:
        return any(entry.dtype != self._wanted[entry.name] for entry in shard.tensors)

    def _patch(self, shard: Shard, target: Path) -> dict[str, dict[str, float]]:
        """Copies a shard whole and overwrites its changed tensors in place."""
        changed = {}
        with shard.path.open("rb") as source, target.open("wb") as made:
            numbers = source.fileno(), made.fileno()
            shards.copy_range(*numbers, 0, shard.size_bytes, at=0, advance=lambda count: self._advance(shard, count))
            for entry in shard.tensors:
                if entry.name in self._plan.changes:
                    data, changed[entry.name] = self._changed(entry, self._plan.changes[entry.name])
                    shards.write_at(made.fileno(), data, entry.begin)
        return changed

    def _convert(self, shard: Shard, target: Path) -> dict[str, dict[str, float]]:
        """Writes a shard anew with other dtypes, a piece of a tensor at a time."""
        changed = {}
        listed = [(entry.name, self._wanted[entry.name], entry.shape) for entry in shard.tensors]
        header = shards.header_of(listed, shard.metadata)
        with shard.path.open("rb") as source, target.open("wb") as made:
            made.write(header)
            made.flush()
            position = len(header)
            for entry in shard.tensors:
                wanted = self._wanted[entry.name]
                if entry.name in self._plan.changes:
                    data, changed[entry.name] = self._changed(entry, self._plan.changes[entry.name])
                    shards.write_at(made.fileno(), data, position)
                    position += len(data)
                    self._advance(shard, len(data))
                elif wanted == entry.dtype:
                    numbers = source.fileno(), made.fileno()
                    advance = lambda count: self._advance(shard, count)  # noqa: E731
                    shards.copy_range(*numbers, entry.begin, entry.end, at=position, advance=advance)
                    position += entry.size_bytes
                else:
                    position = self._recode(source.fileno(), made.fileno(), entry, wanted, position, shard)
        return changed

    def _recode(self, source: int, made: int, entry: TensorEntry, wanted: str, position: int, shard: Shard) -> int:
        step = _CHUNK_ELEMENTS * shards.DTYPE_BYTES[entry.dtype]
        for begin in range(entry.begin, entry.end, step):
            raw = bytearray(os.pread(source, min(step, entry.end - begin), begin))
            data = _bytes_of(torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).to(TORCH_DTYPES[wanted]))
            shards.write_at(made, data, position)
            position += len(data)
            self._advance(shard, len(data))
        return position

    def _changed(self, entry: TensorEntry, changes: list[Change]) -> tuple[memoryview, dict[str, float]]:
        with self._compute:
            raw = shards.read_bytes(entry)
            before = torch.frombuffer(raw, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape).float()
            after = changed_tensor(before, changes)
            moved = (after - before).abs_()
            if not math.isfinite(moved.sum(dtype=torch.float64).item()):
                raise MergeError(f"{entry.name}: the adapter makes it infinite or no number; nothing was written")
            sizes = {"largest": moved.max().item(), "mean": moved.mean().item(), "elements": moved.numel()}
            return _bytes_of(after.to(TORCH_DTYPES[self._wanted[entry.name]])), sizes

    def _advance(self, shard: Shard, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            if self._report:
                seconds = time.monotonic() - self._started
                done = min(self._done_bytes, self._total_bytes)
                self._report(
                    MergeProgress(
                        done_bytes=done, total_bytes=self._total_bytes, shard=shard.path.name, seconds=seconds
                    )
                )


def _output_name(plan: MergePlan, shard: Path) -> str:
    """A shard keeps its name; a single file beside a new shard must not be taken for the whole model."""
    return _FIRST_OF_TWO if plan.untied and len(plan.shards) == 1 else shard.name


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _output_bytes(entry: TensorEntry, wanted: dict[str, str]) -> int:
    return entry.size_bytes // shards.DTYPE_BYTES[entry.dtype] * shards.DTYPE_BYTES[wanted[entry.name]]


def _output_dtype(entry: TensorEntry, save_dtype: str) -> str:
    # The router chooses experts in float32: rounded, it would send tokens elsewhere than the base does.
    router = re.search(r"\.gate\.(wg\.)?weight$", entry.name) and entry.dtype == "F32"
    if save_dtype == "keep" or entry.dtype not in TORCH_DTYPES or router:
        return entry.dtype
    return _DTYPES[save_dtype]


def _prepare_partial(partial: Path, fingerprint: dict[str, Any]) -> None:
    """Takes up a broken-off merge of the same inputs, or begins anew."""
    try:
        same = read_json(partial / _STATE) == fingerprint
    except HynbError:
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise MergeError(f"{partial.parent}: cannot be written: {error.strerror}") from None
        write_json(partial / _STATE, fingerprint)


def _check_space(output: Path, partial: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if needed_bytes > free:
        if not any(partial.glob("*.safetensors")):
            shutil.rmtree(partial)
        raise MergeError(
            f"output_path = {output}: the merged model takes {needed_bytes / 1e9:.3g} GB and the disk has "
            f"{free / 1e9:.3g} GB free. Free some, or choose another disk"
        )


def _write_rest(plan: MergePlan, partial: Path, wanted: dict[str, str], total_bytes: int, save_dtype: str) -> None:
    """Copies what the base folder holds beside weights, and rewrites what speaks of dtypes."""
    for item in plan.base.iterdir():
        if item.is_dir() and not item.name.startswith("."):
            shutil.copytree(item, partial / item.name, dirs_exist_ok=True)
        elif item.is_file() and not shards.is_weight_file(item.name):
            shutil.copyfile(item, partial / item.name)
    if len(plan.shards) > 1 or plan.untied:
        weight_map = {entry.name: _output_name(plan, entry.shard) for entry in shards.entries(plan.shards)}
        if plan.untied:
            weight_map[plan.untied.name] = _UNTIED_SHARD
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(partial / shards.INDEX_NAME, index)
    model_config = read_json(partial / "config.json")
    if plan.untied:
        model_config["tie_word_embeddings"] = False
        write_json(partial / "config.json", model_config)
    if save_dtype != "keep":
        name = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[save_dtype]
        # transformers 5 calls it dtype, older software torch_dtype: some configs hold both.
        keys = [key for key in ("dtype", "torch_dtype") if key in model_config] or ["torch_dtype"]
        write_json(partial / "config.json", model_config | dict.fromkeys(keys, name))
