"""Which lines of which files the samples of a step come from, without reading them."""

from __future__ import annotations

from itertools import islice

from hynb.data import ChatDataset, PackedDataset, SeededSampler

_SHOWN = 8


class StepSamples:
    """Finds the samples of any rank's batches, which follow from the sampling order alone.

    Args:
        dataset: the training set.
        sampler: its sampling order.
        micro_batch_size: samples that a rank, or the ranks that share rows, process at once.
        accumulation: micro batches of each step; the last step of an epoch may have fewer.
        replicas: ranks that get samples of their own.
    """

    def __init__(
        self,
        dataset: ChatDataset | PackedDataset,
        sampler: SeededSampler,
        *,
        micro_batch_size: int,
        accumulation: int,
        replicas: int,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation
        self._replicas = replicas

    def micro_batch(self, global_step: int, micro_batch: int, replica: int) -> list[list[str]]:
        """Locations (file:line) of the conversations in each sample of a micro batch.

        Args:
            global_step: steps before this one.
            micro_batch: its number within the step, from 0.
            replica: the rank, or the group of ranks that share rows.
        """
        batch = (self._micro_batches_before(global_step) + micro_batch) * self._replicas + replica
        return self._locations(batch * self._micro_batch_size, self._micro_batch_size)

    def step(self, global_step: int) -> list[str]:
        """Locations of the conversations in all samples of a step, on all ranks."""
        before = self._micro_batches_before(global_step)
        number = min(self._accumulation, self._micro_batches_per_epoch - before)
        size = self._replicas * self._micro_batch_size
        return [place for sample in self._locations(before * size, number * size) for place in sample]

    @property
    def _micro_batches_per_epoch(self) -> int:
        """As transformers' Trainer counts them (5.23.0, `_inner_training_loop`)."""
        batches = -(-len(self._sampler) // self._micro_batch_size)
        return -(-batches // self._replicas)

    def _micro_batches_before(self, global_step: int) -> int:
        """The micro batches of this epoch before a step, on each rank."""
        steps_per_epoch = max(1, -(-self._micro_batches_per_epoch // self._accumulation))
        return global_step % steps_per_epoch * self._accumulation

    def _locations(self, start: int, count: int) -> list[list[str]]:
        # accelerate fills the last batches of an epoch with its first samples.
        size = len(self._sampler)
        wrapped = [(start + number) % size for number in range(count)]
        order = list(islice(iter(self._sampler), max(wrapped, default=-1) + 1))
        return [self._dataset.locations(order[place]) for place in wrapped]


def shown_samples(places: list[str]) -> str:
    """Locations as text, of many the first ones."""
    # A long sample may be in several parts of a pack.
    places = list(dict.fromkeys(places))
    more = f", … ({len(places)} in all)" if len(places) > _SHOWN else ""
    return ", ".join(places[:_SHOWN]) + more
