"""Parses and encodes every line of a data set, in several processes if there are many."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hynb.data.cache import release_inherited_locks
from hynb.data.dataset import ChatDataset
from hynb.data.encoding import answer_count, encode_together, prepare, up_to_answer
from hynb.data.end_tokens import NoEndTokenError
from hynb.data.files import Conversation
from hynb.data.pieces import Prepared
from hynb.data.records import excerpt, parse_line
from hynb.data.report import COLUMNS as REPORTED
from hynb.data.report import Rejected
from hynb.data.template import ChatTemplate
from hynb.data.tokens import TokenWriter, marked
from hynb.errors import DataError

# What is found of each sample: what DataReport explains, a hash, and where its tokens are in the file of all.
COLUMNS = REPORTED | {"hashes": np.uint64, "starts": np.uint64, "checks": np.uint32}
_BATCH_SAMPLES = 256
# Lines for one task of a worker: enough to outweigh sending them, few enough for a steady progress bar.
_RANGE_BYTES = 2 << 20
_PENDING_PER_PROCESS = 4
_PARENT_SECONDS = 1.0


@dataclass(kw_only=True, frozen=True)
class Range:
    """Lines from start to stop, without stop."""

    start: int
    stop: int
    size_bytes: int


def line_ranges(dataset: ChatDataset) -> Iterator[Range]:
    """All lines of a data set in ranges of about 2 MB."""
    for start, stop, size_bytes in dataset.ranges(_RANGE_BYTES):
        yield Range(start=start, stop=stop, size_bytes=size_bytes)


_scan_of_worker: _Scan


def _start_worker(scan: _Scan, parent: int) -> None:
    global _scan_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    release_inherited_locks()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _scan_of_worker = scan


def _end_with(parent: int) -> None:
    """Ends this worker when its parent has died: it would wait for the next task for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _scan_in_worker(lines: Range) -> Found:
    return _scan_of_worker(lines)


def scan_all(
    dataset: ChatDataset, ranges: Iterable[Range], processes: int, tokens: TokenWriter | None = None
) -> Iterator[Found]:
    """What is found in each range, in order.

    Without a tokenizer lines are only parsed, and their counters are 0.

    Args:
        tokens: gets the token ids.
    """
    scan = _Scan(dataset, tokens)
    if processes <= 1:
        yield from map(scan, ranges)
        return
    # Forked workers share the tokenizer and the index instead of building their own.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(scan, os.getpid())
    ) as pool:
        # Some at a time: the results of all ranges would be in memory where one takes long.
        pending: deque[concurrent.futures.Future[Found]] = deque()
        for item in ranges:
            pending.append(pool.submit(_scan_in_worker, item))
            if len(pending) >= processes * _PENDING_PER_PROCESS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@dataclass(kw_only=True)
class Found:
    """What was found in a range of lines.

    Args:
        columns: an array for each of `COLUMNS` with one number per sample.
        unknown_keys, ignored_fields: number of samples with each of the records' keys that nothing reads, and with
            each field that the template does not render.
        notes: number of samples with what a user may not expect of how the template writes them.
        written_time: what the template wrote instead of the present time; empty if it wrote none.
    """

    columns: dict[str, np.ndarray]
    unknown_keys: Counter[str]
    ignored_fields: Counter[str]
    notes: Counter[str]
    rejected: list[Rejected]
    size_bytes: int
    written_time: str = ""


@dataclass(kw_only=True, frozen=True, slots=True)
class _Parsed:
    """A sample of a valid line: its conversation, or one up to an answer.

    Args:
        prepared: what is tokenised; None without a tokenizer.
        answer: number of the answer that ends it, from 1; 0 for the whole conversation.
    """

    index: int
    line: bytes
    conversation: Conversation
    prepared: Prepared | None
    answer: int


class _Scan:
    """Parses and encodes the lines of a range; each worker process has one."""

    def __init__(self, dataset: ChatDataset, tokens: TokenWriter | None) -> None:
        self.dataset = dataset
        self.tokens = tokens

    def __call__(self, lines: Range) -> Found:
        """What is found in a range of lines.

        Raises:
            DataError: the chat template ends no answer, so that no line could be used.
        """
        found = Found(
            columns={},
            unknown_keys=Counter(),
            ignored_fields=Counter(),
            notes=Counter(),
            rejected=[],
            size_bytes=lines.size_bytes,
        )
        parts: list[dict[str, np.ndarray]] = []
        batch: list[_Parsed] = []
        batch_bytes = 0
        for index, (location, line) in enumerate(self.dataset.lines(lines.start, lines.stop), lines.start):
            try:
                conversation = parse_line(line, location)
            except DataError as error:
                found.rejected.append(_rejected(index, location, error, line))
                continue
            self._add_samples(index, line, conversation, batch, found)
            batch_bytes += len(line)
            # By size as well: the lines may be of ten megabytes each.
            if len(batch) >= _BATCH_SAMPLES or batch_bytes > _RANGE_BYTES:
                parts.append(self._columns(batch, found))
                batch, batch_bytes = [], 0
        parts.append(self._columns(batch, found))
        found.columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
        found.rejected = _one_per_line(found.rejected)
        found.written_time = self._written_time()
        return found

    def _written_time(self) -> str:
        tokenizer = self.dataset.tokenizer
        if tokenizer is None:
            return ""
        # Some tokenizers have another template for conversations with tools.
        return ChatTemplate.of(tokenizer).written_time or ChatTemplate.of(tokenizer, [{}]).written_time

    def _add_samples(
        self, index: int, line: bytes, conversation: Conversation, batch: list[_Parsed], found: Found
    ) -> None:
        """Adds the samples of a line to a batch: the conversation, or one for each answer."""
        tokenizer, options = self.dataset.tokenizer, self.dataset.options
        numbers = range(1, answer_count(conversation) + 1) if options.split_turns else (0,)
        for number in numbers:
            part = up_to_answer(conversation, number) if number else conversation
            if part is None:
                continue
            try:
                prepared = prepare(part, tokenizer, options) if tokenizer is not None else None
            except DataError as error:
                if isinstance(error, NoEndTokenError):
                    self._check_template(conversation)
                found.rejected.append(_rejected(index, conversation.source, error, line))
                continue
            batch.append(_Parsed(index=index, line=line, conversation=part, prepared=prepared, answer=number))

    def _check_template(self, conversation: Conversation) -> None:
        """Refuses a template that ends no answer, instead of every line.

        Raises:
            DataError: it is such a template.
        """
        tokenizer = self.dataset.tokenizer
        assert tokenizer is not None
        template = ChatTemplate.of(tokenizer, conversation.arguments.get("tools"))
        # An argument of the record may decide it.
        if conversation.arguments.keys() & (template.record_arguments - {"tools"}) or not template.never_ends:
            return
        raise DataError(
            f"{tokenizer.name_or_path}: its chat template writes no end token after an answer, so the model would "
            f"not learn to stop (found at {conversation.source}; the lines behind it are not checked). Use the "
            "tokenizer of an instruct model, or a template that takes is_training"
        )

    def _columns(self, batch: list[_Parsed], found: Found) -> dict[str, np.ndarray]:
        columns = {name: np.zeros(len(batch), dtype) for name, dtype in COLUMNS.items()}
        columns["line_indices"][:] = [item.index for item in batch]
        columns["answers"][:] = [item.answer for item in batch]
        if self.dataset.tokenizer is None or self.dataset.max_seq_length is None:
            columns["hashes"][:] = [_hash_of_text(item.conversation) for item in batch]
            return columns
        prepared = [item.prepared for item in batch if item.prepared is not None]
        encoded = encode_together(prepared, self.dataset.tokenizer)
        starts, stops = encoded.starts[:-1], encoded.starts[1:]
        labels_before = np.zeros(len(encoded.ids) + 1, np.int64)
        np.cumsum(encoded.trained, out=labels_before[1:])
        columns["lengths"][:] = stops - starts
        kept_stops = starts + np.minimum(stops - starts, self.dataset.max_seq_length)
        columns["kept"][:] = kept_stops - starts
        columns["trained"][:] = labels_before[stops] - labels_before[starts]
        columns["trained_kept"][:] = labels_before[kept_stops] - labels_before[starts]
        columns["spelled"][:] = [item.spelled for item in prepared]
        columns["shortened"][:] = [item.shortened for item in prepared]
        is_sample = columns["trained_kept"] > 0
        for number in np.flatnonzero(~is_sample).tolist():
            self._reject(batch[number], encoded.trained[starts[number] : stops[number]], found)
        for number in np.flatnonzero(is_sample).tolist():
            item = prepared[number]
            if item.unknown or item.ignored or item.notes:
                found.unknown_keys.update(item.unknown)
                found.ignored_fields.update(item.ignored)
                found.notes.update(item.notes)
        columns = {name: values[is_sample] for name, values in columns.items()}
        self._add_tokens(columns, marked(encoded.ids, encoded.trained), starts[is_sample])
        return columns

    def _add_tokens(self, columns: dict[str, np.ndarray], tokens: np.ndarray, starts: np.ndarray) -> None:
        """Hashes the samples and hands their tokens to the writer."""
        whole = memoryview(tokens.tobytes())
        bounds = list(zip(starts.tolist(), columns["lengths"].tolist(), columns["kept"].tolist(), strict=True))
        columns["hashes"][:] = [_hash(whole[start * 4 : (start + length) * 4]) for start, length, _ in bounds]
        if self.tokens is None:
            return
        kept = [whole[start * 4 : (start + length) * 4] for start, _, length in bounds]
        columns["checks"][:] = [zlib.crc32(content) for content in kept]
        position = self.tokens.write(np.frombuffer(b"".join(kept), dtype=np.uint32))
        sizes = columns["kept"].astype(np.int64)
        columns["starts"][:] = max(position, 0) + np.cumsum(sizes) - sizes

    def _reject(self, item: _Parsed, trained: np.ndarray, found: Found) -> None:
        """Leaves out a sample of which nothing is trained on, at all or after truncation.

        Args:
            trained: whether each token has a label.
        """
        source = item.conversation.source
        if not trained.any():
            problem = f'{source}: nothing of it is trained on: its last answer has "train": false (train_on_turns)'
            found.rejected.append(_rejected(item.index, source, DataError(problem), item.line))
            return
        needed = int(trained.argmax()) + 1
        answer = f"answer {item.answer}" if item.answer else "the answer"
        problem = (
            f"{source}: nothing of {answer} is left within max_seq_length = "
            f"{self.dataset.max_seq_length} of its {len(trained)} tokens: from {needed} tokens on it is trained on"
        )
        rejected = _rejected(item.index, source, DataError(problem), item.line)
        found.rejected.append(dataclasses.replace(rejected, needed_tokens=needed, answer=item.answer))


def _rejected(index: int, location: str, error: DataError, line: bytes) -> Rejected:
    return Rejected(index=index, source=location, problem=str(error), excerpt=excerpt(line))


def _one_per_line(rejected: list[Rejected]) -> list[Rejected]:
    """One for each line, by their order: under `split_turns` several samples of a line may be left out.

    That the line is invalid counts more than that a sample is too long.
    """
    of_lines: dict[int, list[Rejected]] = {}
    for item in sorted(rejected, key=lambda item: (item.index, item.needed_tokens is not None)):
        of_lines.setdefault(item.index, []).append(item)
    return [_together(items) if items[0].needed_tokens else items[0] for items in of_lines.values()]


def _together(too_long: list[Rejected]) -> Rejected:
    """Samples of one line that are too long."""
    first, *others = too_long
    if not others:
        return first
    needed = max(item.needed_tokens or 0 for item in too_long)
    named = ", ".join(str(item.answer) for item in others)
    problem = f"{first.problem}; the same with answer {named}, up to {needed} tokens"
    return dataclasses.replace(first, problem=problem, needed_tokens=needed, samples=len(too_long))


def _hash(content: memoryview) -> int:
    """64 bits of a hash over all that is trained on, by which duplicates are found."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _hash_of_text(conversation: Conversation) -> int:
    content = json.dumps([conversation.messages, conversation.arguments], sort_keys=True).encode()
    return _hash(memoryview(content))
