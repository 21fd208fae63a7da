"""Batches with little padding: packs of whole conversations, samples of similar length, seeded sampling order."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

import numpy as np
import torch

from hynb.data.pieces import IGNORED

# Steps among which samples are sorted by length: the more, the less padding and the less random the sampling order.
_SORTED_STEPS = 50


class Packs(Sequence[list[int]]):
    """Packs of sample indices, held as arrays: as lists, those of 100 million samples would take gigabytes.

    Args:
        indices: the samples of all packs, one pack behind the other.
        starts: where each pack begins, and the end of the last one.
    """

    def __init__(self, indices: np.ndarray, starts: np.ndarray) -> None:
        self._indices = indices
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int, /) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice, /) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice, /) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self._indices[self._starts[index] : self._starts[index + 1]].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def best_fit(lengths: Sequence[int] | np.ndarray, max_seq_length: int, *, seed: int = 0) -> Packs:
    """Packs samples by best-fit decreasing: the longest first, each into the fullest pack that it fits into.

    Args:
        lengths: tokens of every sample, at most max_seq_length each.
        seed: decides which of equally long samples are packed together.

    Returns:
        Packs of sample indices; every sample is in exactly one.

    Raises:
        ValueError: a sample is longer than max_seq_length.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    if len(counts) and int(counts.max()) > max_seq_length:
        longest = int(counts.argmax())
        raise ValueError(
            f"sample {longest} has {counts[longest]} tokens, more than max_seq_length = {max_seq_length}"
        )
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    sizes, firsts = np.unique(-counts[order], return_index=True)
    bounds = [*firsts.tolist(), len(order)]
    packer = _Packer(max_seq_length)
    packs = [
        packer.place(-size, stop - start)
        for size, start, stop in zip(sizes.tolist(), bounds, bounds[1:], strict=False)
    ]
    pack_of = np.concatenate([*packs, np.zeros(0, np.int64)])
    starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packer.count))]).astype(np.int64)
    return Packs(order[np.argsort(pack_of, kind="stable")].astype(np.uint32), starts)


class _Packer:
    """Packs by their free tokens; equally long samples are placed together, which takes one step per length."""

    def __init__(self, max_seq_length: int) -> None:
        self.count = 0
        self._max_seq_length = max_seq_length
        # For each number of free tokens, the packs with it; the last one is filled first. And the sorted numbers.
        self._packs: dict[int, list[np.ndarray]] = {}
        self._free: list[int] = []

    def place(self, length: int, samples: int) -> np.ndarray:
        """The pack of each of several samples of one length, as if they were placed one by one."""
        if length == 0:
            # It fits everywhere and fills nothing.
            return np.full(samples, self._pack_of_empty(), np.int64)
        placed: list[np.ndarray] = []
        while samples:
            smallest = bisect.bisect_left(self._free, length)
            if smallest == len(self._free):
                free, number = self._max_seq_length, -(-samples // (self._max_seq_length // length))
                packs = np.arange(self.count, self.count + number)
                self.count += number
            else:
                free = self._free[smallest]
                packs = self._taken(free, -(-samples // (free // length)))
            # The fullest pack that a sample fits into stays so until it is too full for another one.
            each = free // length
            whole = min(len(packs), samples // each)
            placed.append(np.repeat(packs[:whole], each))
            self._put(packs[:whole], free - each * length)
            samples -= whole * each
            if whole < len(packs):
                placed.append(np.full(samples, packs[whole]))
                self._put(packs[whole:], free - samples * length)
                samples = 0
        return np.concatenate(placed)

    def _pack_of_empty(self) -> int:
        self.count = max(self.count, 1)
        return 0

    def _taken(self, free: int, number: int) -> np.ndarray:
        """At most so many packs with this number of free tokens, the last one first."""
        taken: list[np.ndarray] = []
        stack = self._packs[free]
        while stack and number:
            last = stack.pop()
            if len(last) > number:
                stack.append(last[: len(last) - number])
                last = last[len(last) - number :]
            taken.append(last[::-1])
            number -= len(last)
        if not stack:
            del self._packs[free], self._free[bisect.bisect_left(self._free, free)]
        return np.concatenate(taken)

    def _put(self, packs: np.ndarray, free: int) -> None:
        if not len(packs) or not free:
            return
        if free not in self._packs:
            self._packs[free] = []
            bisect.insort(self._free, free)
        self._packs[free].append(packs)


class Samples(Protocol):
    """A data set of samples with `input_ids` and `labels`, such as `ChatDataset`."""

    def __getitem__(self, index: int, /) -> dict[str, list[int]]: ...

    def location(self, index: int, /) -> str:
        """A sample's location (file:line)."""
        ...


class PackedDataset(torch.utils.data.Dataset):
    """Packs as samples; `position_ids` restart at every conversation.

    Args:
        dataset: the samples that are packed.
        packs: indices of samples, from `best_fit`; with parts, indices of parts.
        parts: sample, first token and end of each part of a sample, of shape (parts, 3); None for whole samples.
    """

    def __init__(
        self,
        dataset: Samples,
        packs: Sequence[Sequence[int]],
        parts: np.ndarray | None = None,
    ) -> None:
        self.dataset = dataset
        self.packs = packs
        self.parts = parts

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pack: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for number in self.packs[index]:
            sample = self._part(number)
            pack["input_ids"] += sample["input_ids"]
            # The first token is not predicted: the token before it belongs to another conversation.
            pack["labels"] += [IGNORED, *sample["labels"][1:]]
            pack["position_ids"] += range(len(sample["input_ids"]))
        return pack

    def locations(self, index: int) -> list[str]:
        """The location (file:line) of each conversation in a pack, in their order."""
        numbers = self.packs[index]
        return [
            self.dataset.location(number if self.parts is None else int(self.parts[number, 0])) for number in numbers
        ]

    def _part(self, number: int) -> dict[str, list[int]]:
        if self.parts is None:
            return self.dataset[number]
        index, start, stop = self.parts[number].tolist()
        return {name: values[start:stop] for name, values in self.dataset[index].items()}


class SeededSampler(torch.utils.data.Sampler):
    """A sampling order that depends only on seed and epoch: the same on every rank and after a resume.

    Args:
        count: number of samples.
        seed: of the run.
        lengths: tokens of every sample, to make steps of samples of similar length (`group_by_length`).
        group: samples of a global step; within 50 steps samples are sorted by length, then the steps are shuffled.
    """

    def __init__(self, count: int, seed: int, *, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.count = count
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, each of which has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.count)
        return iter((order if self.lengths is None else self._grouped(order, self.lengths, rng)).tolist())

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The order with steps of samples of similar length."""
        steps: list[np.ndarray] = []
        for start in range(0, self.count, self.group * _SORTED_STEPS):
            part = order[start : start + self.group * _SORTED_STEPS]
            part = part[np.argsort(-lengths[part], kind="stable")]
            steps += [part[first : first + self.group] for first in range(0, len(part), self.group)]
        # A short last step stays last: elsewhere it would shift the boundaries of all later steps.
        tail = [steps.pop()] if steps and len(steps[-1]) < self.group else []
        mixed = [steps[index] for index in rng.permutation(len(steps))]
        if mixed:
            # The step with the longest sample comes first, so that too little memory shows at once.
            longest = max(range(len(mixed)), key=lambda index: int(lengths[mixed[index]].max()))
            mixed[0], mixed[longest] = mixed[longest], mixed[0]
        return np.concatenate([order[:0], *mixed, *tail])
