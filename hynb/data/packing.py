"""Batches with little padding: packs of whole conversations, samples of similar length, seeded sampling order."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from hynb.data.encoding import IGNORED

# Steps among which samples are sorted by length: the more, the less padding and the less random the sampling order.
_SORTED_STEPS = 50


def best_fit(lengths: Sequence[int], max_seq_length: int, *, seed: int = 0) -> list[list[int]]:
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
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    packs: list[list[int]] = []
    # Packs by their free tokens, and the sorted keys.
    packs_by_free: dict[int, list[int]] = {}
    free_sizes: list[int] = []
    for index in order.tolist():
        length = int(counts[index])
        if length > max_seq_length:
            raise ValueError(f"sample {index} has {length} tokens, more than max_seq_length = {max_seq_length}")
        smallest = bisect.bisect_left(free_sizes, length)
        if smallest == len(free_sizes):
            free, pack = max_seq_length, len(packs)
            packs.append([])
        else:
            free = free_sizes[smallest]
            pack = packs_by_free[free].pop()
            if not packs_by_free[free]:
                del packs_by_free[free], free_sizes[smallest]
        packs[pack].append(index)
        if remaining := free - length:
            if remaining not in packs_by_free:
                packs_by_free[remaining] = []
                bisect.insort(free_sizes, remaining)
            packs_by_free[remaining].append(pack)
    return packs


class Samples(Protocol):
    """A data set of samples with `input_ids` and `labels`, such as `ChatDataset`."""

    def __getitem__(self, index: int, /) -> dict[str, list[int]]: ...


class PackedDataset(torch.utils.data.Dataset):
    """Packs as samples; `position_ids` restart at every conversation.

    Args:
        dataset: the samples that are packed.
        packs: indices of samples, from `best_fit`; with parts, indices of parts.
        parts: (sample, first token, end) of each part of a sample; None for whole samples.
    """

    def __init__(
        self,
        dataset: Samples,
        packs: Sequence[Sequence[int]],
        parts: Sequence[tuple[int, int, int]] | None = None,
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

    def _part(self, number: int) -> dict[str, list[int]]:
        if self.parts is None:
            return self.dataset[number]
        index, start, stop = self.parts[number]
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
