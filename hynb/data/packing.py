"""Batches without wasted tokens: whole conversations side by side, samples of like length, an order by seed."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hynb.data.template import IGNORED


def best_fit(lengths: Sequence[int], max_seq_length: int, *, seed: int = 0) -> list[list[int]]:
    """Samples put together so that few places stay empty: the longest first, each into the fullest pack it fits.

    Args:
        lengths: tokens of every sample, none above max_seq_length.
        seed: which of equally long samples come together.

    Returns:
        Packs of sample indices; every sample is in exactly one.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    order = shuffled[np.argsort(-counts[shuffled], kind="stable")]
    packs: list[list[int]] = []
    rooms: list[int] = []  # places left in any pack, sorted, each once
    with_room: dict[int, list[int]] = {}
    for index in order.tolist():
        length = int(counts[index])
        if length > max_seq_length:
            raise ValueError(f"sample {index} has {length} tokens, more than max_seq_length = {max_seq_length}")
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, number = max_seq_length, len(packs)
            packs.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[number].append(index)
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(number)
    return packs


class PackedDataset(torch.utils.data.Dataset):
    """Packs of whole conversations as samples, each with positions that restart at every conversation.

    Args:
        dataset: gives `input_ids` and `labels` of a conversation.
        packs: of its indices, from `best_fit`; or of the parts' indices, where there are parts.
        parts: sample, first token and end of what stands in a pack; whole samples when None.
    """

    def __init__(
        self,
        dataset: Any,
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
            # Nothing stands before a conversation's first token: its neighbour must not learn to foretell it.
            pack["labels"] += [IGNORED, *sample["labels"][1:]]
            pack["position_ids"] += range(len(sample["input_ids"]))
        return pack

    def _part(self, number: int) -> dict[str, list[int]]:
        if self.parts is None:
            return self.dataset[number]
        index, start, stop = self.parts[number]
        return {name: values[start:stop] for name, values in self.dataset[index].items()}


class SeededSampler(torch.utils.data.Sampler):
    """An order that only the seed and the epoch decide: the same on every rank and after a resume.

    Args:
        count: samples.
        seed: of the run.
        lengths: tokens of every sample; when given, neighbours are of like length (`group_by_length`).
        group: samples of a global step; groups of 50 such steps are sorted, then their steps mixed again.
    """

    def __init__(self, count: int, seed: int, *, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.count = count
        self.seed = seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.count)
        if self.lengths is None:
            return iter(order.tolist())
        steps: list[np.ndarray] = []
        for start in range(0, self.count, self.group * 50):
            part = order[start : start + self.group * 50]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            steps += [part[place : place + self.group] for place in range(0, len(part), self.group)]
        # A short last step stays last, or all after it would be shifted; the longest comes first: what memory
        # is short of shows at once.
        tail = [steps.pop()] if steps and len(steps[-1]) < self.group else []
        mixed = [steps[index] for index in rng.permutation(len(steps))]
        if mixed:
            longest = max(range(len(mixed)), key=lambda index: int(self.lengths[mixed[index]].max()))
            mixed[0], mixed[longest] = mixed[longest], mixed[0]
        return iter(np.concatenate([*mixed, *tail]).tolist() if mixed or tail else [])
