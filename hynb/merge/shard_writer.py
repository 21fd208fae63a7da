"""Writes the shards of a merged model, several at a time, into a folder that is renamed when it is complete."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from hynb.errors import MergeError
from hynb.families import chooses_experts
from hynb.files import read_json, write_json
from hynb.merge import shards
from hynb.merge.computation import Computation, TensorChange, computation
from hynb.merge.plan import MergePlan
from hynb.merge.shards import SAVE_DTYPES, Shard, TensorEntry
from hynb.merge.tensors import TORCH_DTYPES

# The output layer that was tied to the embeddings gets a shard of its own. The base's single shard is then renamed,
# because transformers reads model.safetensors as the whole model.
UNTIED_SHARD, _FIRST_OF_TWO = "model-lm_head.safetensors", "model-base.safetensors"
_THREADS = 4
# If less of a shard changes, copying it as one range is faster than copying what lies between the changes.
_COPIED_SHARE = 0.25


@dataclass(kw_only=True, frozen=True)
class MergeProgress:
    """How far a merge has come.

    Args:
        done_bytes, total_bytes: of the output's weights.
        shard: file name of the shard that was worked on last.
        seconds: since the merge began to write.
    """

    done_bytes: int
    total_bytes: int
    shard: str
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """The remaining time, estimated from the bytes so far; None before the first byte."""
        return self.seconds * (self.total_bytes / self.done_bytes - 1) if self.done_bytes else None


class ShardWriter:
    """Writes every shard of one merge; an interrupted merge continues with the shards that are missing.

    Args:
        folder: where the shards are written.
        save_dtype: one of SAVE_DTYPES.
        link: hard-link shards that no adapter touches.
        progress: called from several threads, one at a time.
    """

    def __init__(
        self,
        plan: MergePlan,
        folder: Path,
        *,
        save_dtype: str,
        link: bool,
        progress: Callable[[MergeProgress], None] | None,
    ) -> None:
        self._plan, self._folder, self._link, self._progress = plan, folder, link, progress
        self.dtypes = {entry.name: _output_dtype(entry, save_dtype) for entry in plan.tensors()}
        self.total_bytes = self._output_bytes(plan.tensors())
        self.changes: dict[str, TensorChange] = {}
        self.resumed_shards = self.linked_shards = 0
        self._done_bytes = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._computation: Computation

    def missing_bytes(self) -> int:
        """The bytes that are still to be written."""
        missing = [self._plan.untied] if self._plan.untied else []
        for shard in self._plan.shards:
            if not (self._target(shard).exists() or self._is_linked(shard)):
                missing += shard.tensors
        return self._output_bytes(missing)

    def write(self) -> None:
        """Writes all shards.

        Raises:
            MergeError: a changed tensor has NaN or infinite elements, or a shard cannot be linked.
            OSError: a shard cannot be written.
        """
        threads = min(_THREADS, os.cpu_count() or 1)
        with computation(threads) as self._computation:
            with ThreadPoolExecutor(max_workers=threads) as pool:
                for _ in pool.map(self._write_shard, self._plan.shards):
                    pass
            if self._plan.untied:
                self._write_untied(self._plan.untied)

    def weight_map(self) -> dict[str, str]:
        """The shard of each tensor, as an index file lists them; empty for a model in a single file."""
        if len(self._plan.shards) == 1 and not self._plan.untied:
            return {}
        found = {entry.name: self._target(shard).name for shard in self._plan.shards for entry in shard.tensors}
        if self._plan.untied:
            found[self._plan.untied.name] = UNTIED_SHARD
        return dict(sorted(found.items()))

    def _write_shard(self, shard: Shard) -> None:
        """Writes one shard under a temporary name and renames it when it is complete."""
        target = self._target(shard)
        record, temporary = target.with_suffix(".changes.json"), target.with_suffix(".tmp")
        resumed = target.exists()
        if resumed:
            done = {name: TensorChange(**values) for name, values in (read_json(record) or {}).items()}
            self._advance(shard.path.name, self._output_bytes(shard.tensors))
        else:
            temporary.unlink(missing_ok=True)
            done = self._make_shard(shard, temporary)
            write_json(record, {name: asdict(change) for name, change in done.items()})
            temporary.rename(target)
        with self._lock:
            self.changes |= done
            self.resumed_shards += resumed
            self.linked_shards += not resumed and self._is_linked(shard)

    def _make_shard(self, shard: Shard, path: Path) -> dict[str, TensorChange]:
        if self._is_linked(shard):
            try:
                os.link(shard.path.resolve(), path)
            except OSError as error:
                raise MergeError(
                    f"{shard.path}: cannot be hard-linked ({error.strerror}): leave out --link"
                ) from None
            self._advance(shard.path.name, self._output_bytes(shard.tensors))
            return {}
        if self._is_converted(shard):
            return self._convert(shard, path)
        return self._patch(shard, path)

    def _patch(self, shard: Shard, path: Path) -> dict[str, TensorChange]:
        """Copies a shard and writes its changed tensors in place; small ones are copied first, with the rest."""
        changed = {entry: entry.begin for entry in shard.tensors if entry.name in self._plan.changes}
        copies_all = sum(entry.size_bytes for entry in changed) < _COPIED_SHARE * shard.size_bytes
        with shard.path.open("rb") as source, path.open("wb") as made:
            files = source.fileno(), made.fileno()
            shards.copy_range(*files, 0, shard.header_bytes, at=0, advance=lambda _: None)
            begin = shard.header_bytes
            advance = partial(self._advance, shard.path.name)
            for entry in [] if copies_all else changed:
                shards.copy_range(*files, begin, entry.begin, at=begin, advance=advance)
                begin = entry.end
            shards.copy_range(*files, begin, shard.size_bytes, at=begin, advance=advance)
            return self._compute_all(*files, changed, advance=(lambda _: None) if copies_all else advance)

    def _convert(self, shard: Shard, path: Path) -> dict[str, TensorChange]:
        """Writes a shard in other dtypes."""
        listed = [(entry.name, self.dtypes[entry.name], entry.shape) for entry in shard.tensors]
        header = shards.file_header(listed, shard.metadata)
        advance = partial(self._advance, shard.path.name)
        with shard.path.open("rb") as source, path.open("wb") as made:
            made.write(header)
            made.flush()
            files, position = (source.fileno(), made.fileno()), len(header)
            computed: dict[TensorEntry, int] = {}
            for entry in shard.tensors:
                if entry.name in self._plan.changes or self.dtypes[entry.name] != entry.dtype:
                    computed[entry] = position
                else:
                    shards.copy_range(*files, entry.begin, entry.end, at=position, advance=advance)
                position += self._output_bytes([entry])
            return self._compute_all(*files, computed, advance=advance)

    def _compute_all(
        self, source: int, target: int, positions: Mapping[TensorEntry, int], *, advance: Callable[[int], None]
    ) -> dict[str, TensorChange]:
        """Writes changed and converted tensors of one shard; returns what changed.

        Args:
            source, target: file descriptors.
            positions: offset of each tensor in the target.
        """
        done: dict[str, TensorChange] = {}
        # Tensors that change by the same factors come one after the other, so that few factors are needed at a time.
        groups: dict[tuple[tuple[Path, str], ...], list[TensorEntry]] = {}
        for entry in positions:
            sources = tuple(change.source for change in self._plan.changes.get(entry.name, []))
            groups.setdefault(sources, []).append(entry)
        order = [entry for group in groups.values() for entry in group]
        for entry, following in itertools.zip_longest(order, order[1:]):
            if following:
                shards.read_ahead(source, following)
            change = self._compute(entry, target, positions[entry])
            if entry.name in self._plan.changes:
                done[entry.name] = change
            advance(self._output_bytes([entry]))
        return done

    def _write_untied(self, entry: TensorEntry) -> None:
        """Writes the output layer that was tied to the embeddings into a shard of its own."""
        header = shards.file_header([(entry.name, self.dtypes[entry.name], entry.shape)], {"format": "pt"})
        with (self._folder / UNTIED_SHARD).open("wb") as made:
            made.write(header)
            made.flush()
            change = self._compute(entry, made.fileno(), len(header))
        if entry.name in self._plan.changes:
            self.changes[entry.name] = change
        self._advance(UNTIED_SHARD, self._output_bytes([entry]))

    def _compute(self, entry: TensorEntry, target: int, position: int) -> TensorChange:
        """Writes a changed or converted tensor at a position of an open file."""
        return self._computation.compute(
            entry,
            self._plan.changes.get(entry.name, []),
            self.dtypes[entry.name],
            lambda offset, data: shards.write_at(target, data, position + offset),
        )

    def _advance(self, shard: str, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            if self._progress:
                seconds = time.monotonic() - self._started
                self._progress(
                    MergeProgress(
                        done_bytes=self._done_bytes, total_bytes=self.total_bytes, shard=shard, seconds=seconds
                    )
                )

    def _target(self, shard: Shard) -> Path:
        renamed = self._plan.untied and len(self._plan.shards) == 1
        return self._folder / (_FIRST_OF_TWO if renamed else shard.path.name)

    def _is_linked(self, shard: Shard) -> bool:
        touched = any(entry.name in self._plan.changes for entry in shard.tensors)
        return self._link and not touched and not self._is_converted(shard)

    def _is_converted(self, shard: Shard) -> bool:
        return any(entry.dtype != self.dtypes[entry.name] for entry in shard.tensors)

    def _output_bytes(self, tensors: Iterable[TensorEntry]) -> int:
        return sum(math.prod(entry.shape) * shards.DTYPE_BYTES[self.dtypes[entry.name]] for entry in tensors)


def largest_and_mean(changes: Mapping[str, TensorChange]) -> tuple[float, float]:
    """The largest absolute difference of any element, and the mean over all elements of the changed tensors."""
    elements = sum(change.elements for change in changes.values())
    largest = max((change.largest for change in changes.values()), default=0.0)
    return largest, sum(change.mean * change.elements for change in changes.values()) / max(1, elements)


def _output_dtype(entry: TensorEntry, save_dtype: str) -> str:
    # Experts are chosen in float32; rounded, a router would send tokens to other experts than the base's does.
    stays_float32 = entry.dtype == "F32" and chooses_experts(entry.name)
    wanted = SAVE_DTYPES[save_dtype]
    return entry.dtype if wanted is None or stays_float32 or entry.dtype not in TORCH_DTYPES else wanted
