"""Parses and encodes every line of a data set, in several processes if there are many."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hynb.data.dataset import ChatDataset
from hynb.data.encoding import IGNORED, Prepared, answer_count, encode_prepared, prepare, up_to_answer
from hynb.data.files import Conversation
from hynb.data.records import excerpt, parse_line
from hynb.data.report import Rejected
from hynb.errors import DataError

# Numbers that are found of each sample; DataReport explains them.
COUNTERS = ("lengths", "kept", "trained", "trained_kept", "spelled", "shortened", "answers")
_BATCH_SAMPLES = 64
# Lines for one task of a worker: enough to outweigh sending them, few enough for a steady progress bar.
_RANGE_BYTES = 2 << 20


@dataclass(kw_only=True, frozen=True)
class Range:
    """Lines from start to stop, without stop."""

    start: int
    stop: int
    size_bytes: int


def line_ranges(dataset: ChatDataset) -> Iterator[Range]:
    """All lines of a data set in ranges of about 2 MB."""
    start = size_bytes = 0
    for index in range(len(dataset)):
        size_bytes += dataset.size_bytes(index)
        if size_bytes >= _RANGE_BYTES:
            yield Range(start=start, stop=index + 1, size_bytes=size_bytes)
            start, size_bytes = index + 1, 0
    if start < len(dataset):
        yield Range(start=start, stop=len(dataset), size_bytes=size_bytes)


_scan_of_worker: _Scan


def _start_worker(scan: _Scan) -> None:
    global _scan_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _scan_of_worker = scan


def _scan_in_worker(lines: Range) -> Found:
    return _scan_of_worker(lines)


def scan_all(dataset: ChatDataset, ranges: list[Range], processes: int) -> Iterator[Found]:
    """What is found in each range, in order.

    Without a tokenizer lines are only parsed, and their counters are 0.
    """
    scan = _Scan(dataset)
    if processes <= 1 or len(ranges) <= 1:
        yield from map(scan, ranges)
        return
    # Forked workers share the tokenizer and the index instead of building their own.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(scan,)
    ) as pool:
        yield from pool.map(_scan_in_worker, ranges)


@dataclass(kw_only=True)
class Found:
    """What was found in a range of lines.

    Args:
        counters: a list for each of `COUNTERS` with one number per sample.
        hashes: of what each sample is rendered as, 64 bits.
        line_indices: of each sample among all lines.
        keys: number of samples with each of the records' keys that nothing reads, and of each ignored field.
    """

    counters: dict[str, list[int]]
    hashes: list[int]
    line_indices: list[int]
    unknown_keys: Counter[str]
    ignored_fields: Counter[str]
    rejected: list[Rejected]
    size_bytes: int


@dataclass(kw_only=True, frozen=True)
class _Parsed:
    """A sample of a valid line: its conversation, or one up to an answer.

    Args:
        answer: number of the answer that ends it, from 1; 0 for the whole conversation.
    """

    index: int
    line: bytes
    conversation: Conversation
    answer: int = 0


class _Scan:
    """Parses and encodes the lines of a range; each worker process has one."""

    def __init__(self, dataset: ChatDataset) -> None:
        self.dataset = dataset

    def __call__(self, lines: Range) -> Found:
        """What is found in a range of lines."""
        found = Found(
            counters={name: [] for name in COUNTERS},
            hashes=[],
            line_indices=[],
            unknown_keys=Counter(),
            ignored_fields=Counter(),
            rejected=[],
            size_bytes=lines.size_bytes,
        )
        batch: list[_Parsed] = []
        batch_bytes = 0
        for index, (location, line) in enumerate(self.dataset.lines(lines.start, lines.stop), lines.start):
            try:
                batch += self._samples(index, line, parse_line(line, location))
            except DataError as error:
                found.rejected.append(_rejected(index, location, error, line))
                continue
            batch_bytes += len(line)
            # By size as well: 64 lines may be of ten megabytes each.
            if len(batch) == _BATCH_SAMPLES or batch_bytes > _RANGE_BYTES:
                self._add_batch(batch, found)
                batch, batch_bytes = [], 0
        self._add_batch(batch, found)
        found.rejected.sort(key=lambda item: item.index)
        return found

    def _samples(self, index: int, line: bytes, conversation: Conversation) -> Iterator[_Parsed]:
        """The samples of a line: the conversation, or one for each answer."""
        if not self.dataset.options.split_turns:
            yield _Parsed(index=index, line=line, conversation=conversation)
            return
        for number in range(1, answer_count(conversation) + 1):
            if (part := up_to_answer(conversation, number)) is not None:
                yield _Parsed(index=index, line=line, conversation=part, answer=number)

    def _add_batch(self, batch: list[_Parsed], found: Found) -> None:
        try:
            samples = self._encoded(batch)
        except DataError as error:
            if len(batch) > 1:
                # The error is that of one sample; encode each by itself.
                for item in batch:
                    self._add_batch([item], found)
            else:
                self._reject(batch[0], error, found)
            return
        for item, (prepared, sample) in zip(batch, samples, strict=True):
            self._add(item, prepared, sample, found)

    def _encoded(self, batch: list[_Parsed]) -> list[tuple[Prepared, dict[str, list[int]]] | tuple[None, None]]:
        """Whole samples and what they were made of; None without a tokenizer.

        Raises:
            DataError: for one of the conversations.
        """
        if self.dataset.tokenizer is None:
            return [(None, None)] * len(batch)
        tokenizer, options = self.dataset.tokenizer, self.dataset.options
        prepared = [prepare(item.conversation, tokenizer, options) for item in batch]
        return list(zip(prepared, encode_prepared(prepared, tokenizer, 1 << 40), strict=True))

    def _add(
        self, item: _Parsed, prepared: Prepared | None, sample: dict[str, list[int]] | None, found: Found
    ) -> None:
        counts = dict.fromkeys(COUNTERS, 0) | {"answers": item.answer}
        if prepared is not None and sample is not None:
            trained = np.asarray(sample["labels"]) != IGNORED
            kept = trained[: self.dataset.max_seq_length]
            counts |= {"lengths": len(trained), "kept": len(kept)}
            counts |= {"trained": int(trained.sum()), "trained_kept": int(kept.sum())}
            if not counts["trained"]:
                reason = 'nothing of it is trained on: its last answer has "train": false (train_on_turns)'
                self._reject(item, DataError(f"{item.conversation.source}: {reason}"), found)
                return
            if not counts["trained_kept"]:
                self._reject_cut(item, trained, found)
                return
            counts |= {"spelled": int(prepared.spelled), "shortened": prepared.shortened}
            found.unknown_keys.update(prepared.unknown)
            found.ignored_fields.update(prepared.ignored)
        for name, value in counts.items():
            found.counters[name].append(value)
        found.line_indices.append(item.index)
        found.hashes.append(_hash(item.conversation, sample))

    def _reject(self, item: _Parsed, error: DataError, found: Found) -> None:
        found.rejected.append(_rejected(item.index, item.conversation.source, error, item.line))

    def _reject_cut(self, item: _Parsed, trained: np.ndarray, found: Found) -> None:
        """Leaves out a sample of whose answers nothing is left after truncation."""
        needed = int(trained.argmax()) + 1
        problem = (
            f"{item.conversation.source}: nothing of the answer is left within max_seq_length = "
            f"{self.dataset.max_seq_length} of its {len(trained)} tokens: from {needed} tokens on it is trained on"
        )
        rejected = _rejected(item.index, item.conversation.source, DataError(problem), item.line)
        found.rejected.append(dataclasses.replace(rejected, needed_tokens=needed))


def _rejected(index: int, location: str, error: DataError, line: bytes) -> Rejected:
    return Rejected(index=index, source=location, problem=str(error), excerpt=excerpt(line))


def _hash(conversation: Conversation, sample: dict[str, list[int]] | None) -> int:
    """64 bits of a hash over all that is trained on, by which duplicates are found."""
    if sample is None:
        content = json.dumps([conversation.messages, conversation.arguments], sort_keys=True).encode()
    else:
        content = np.asarray([*sample["input_ids"], -1, *sample["labels"]], dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
