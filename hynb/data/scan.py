"""Parses and encodes every line of a data set, in several processes if there are many."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from hynb.data.dataset import ChatDataset
from hynb.data.files import Conversation, excerpt, parse_line
from hynb.data.report import Rejected
from hynb.data.template import IGNORED, conversation_pieces, encode_many, render
from hynb.errors import DataError

# Numbers that are found of each sample; DataReport explains them.
COUNTERS = ("lengths", "kept", "trained", "trained_kept", "spelled")
_BATCH_SAMPLES = 64
# Lines for one task of a worker: enough to outweigh sending them, few enough for a steady progress bar.
_RANGE_BYTES = 2 << 20
# The first samples are compared with the template's own rendering.
_VERIFIED_SAMPLES = 100


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
        hashes: of the messages of each sample, 64 bits.
        line_indices: of each sample among all lines.
    """

    counters: dict[str, list[int]]
    hashes: list[int]
    line_indices: list[int]
    rejected: list[Rejected]
    size_bytes: int


@dataclass(kw_only=True, frozen=True)
class _Parsed:
    """A valid line and the conversation in it."""

    index: int
    line: bytes
    conversation: Conversation


class _Scan:
    """Parses and encodes the lines of a range; each worker process has one."""

    def __init__(self, dataset: ChatDataset) -> None:
        self.dataset = dataset
        tokenizer = dataset.tokenizer
        self.special = _special_tokens(tokenizer) if tokenizer else None

    def __call__(self, lines: Range) -> Found:
        """What is found in a range of lines."""
        found = Found(
            counters={name: [] for name in COUNTERS},
            hashes=[],
            line_indices=[],
            rejected=[],
            size_bytes=lines.size_bytes,
        )
        batch: list[_Parsed] = []
        batch_bytes = 0
        for index, (location, line) in enumerate(self.dataset.lines(lines.start, lines.stop), lines.start):
            try:
                batch.append(_Parsed(index=index, line=line, conversation=parse_line(line, location)))
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
        for item, sample in zip(batch, samples, strict=True):
            self._add(item, sample, found)

    def _encoded(self, batch: list[_Parsed]) -> Sequence[dict[str, list[int]] | None]:
        """Whole samples; None without a tokenizer.

        Raises:
            DataError: for one of the conversations.
        """
        if self.dataset.tokenizer is None:
            return [None] * len(batch)
        for item in batch:
            self._verify(item)
        return encode_many(
            [item.conversation for item in batch], self.dataset.tokenizer, 1 << 40, self.dataset.options
        )

    def _add(self, item: _Parsed, sample: dict[str, list[int]] | None, found: Found) -> None:
        counts = dict.fromkeys(COUNTERS, 0)
        if sample is not None:
            trained = np.asarray(sample["labels"]) != IGNORED
            kept = trained[: self.dataset.max_seq_length]
            counts |= {"lengths": len(trained), "kept": len(kept)}
            counts |= {"trained": int(trained.sum()), "trained_kept": int(kept.sum())}
            if not counts["trained_kept"]:
                problem = (
                    f"{item.conversation.source}: nothing of the answer is left within max_seq_length = "
                    f"{self.dataset.max_seq_length} of its {len(trained)} tokens: raise it, or shorten the question"
                )
                self._reject(item, DataError(problem), found)
                return
            texts = (message["content"] for message in item.conversation.messages)
            counts["spelled"] = int(self.special is not None and any(map(self.special.search, texts)))
        for name, value in counts.items():
            found.counters[name].append(value)
        found.line_indices.append(item.index)
        found.hashes.append(_messages_hash(item.conversation))

    def _reject(self, item: _Parsed, error: DataError, found: Found) -> None:
        found.rejected.append(_rejected(item.index, item.conversation.source, error, item.line))

    def _verify(self, item: _Parsed) -> None:
        """Compares the pieces of a conversation with the template's rendering.

        Only for the first samples, and where templates are known to change answers.

        Raises:
            DataError: they differ.
        """
        if item.index >= _VERIFIED_SAMPLES and b"think>" not in item.line:
            return
        assert self.dataset.tokenizer is not None
        conversation = item.conversation
        pieces = conversation_pieces(conversation, self.dataset.tokenizer)
        if "".join(piece.text for piece in pieces) != render(
            self.dataset.tokenizer, conversation.messages, conversation.source
        ):
            raise DataError(
                f"{conversation.source}: the chat template changes the text of this conversation (some remove the "
                "part between <think> and </think>): write the messages as the model is to answer"
            )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern of the text of all special and added tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    names = sorted({name for name in tokenizer.all_special_tokens + added if name}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _rejected(index: int, location: str, error: DataError, line: bytes) -> Rejected:
    return Rejected(index=index, source=location, problem=str(error), excerpt=excerpt(line))


def _messages_hash(conversation: Conversation) -> int:
    """64 bits of a hash over roles and contents, by which duplicates are found."""
    messages = [(message["role"], message["content"]) for message in conversation.messages]
    return int.from_bytes(hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest())
