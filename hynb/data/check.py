"""Checks every line of the training data before a GPU is used: `hynb check-data FILE…`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hynb.data.dataset import ChatDataset
from hynb.data.files import Conversation, Paths, cache_folder, excerpt, parse_line
from hynb.data.report import DataReport, Rejected
from hynb.data.template import DEFAULT, IGNORED, LabelOptions, conversation_pieces, encode_many, render
from hynb.errors import DataError
from hynb.files import file_hash

# Locations that a report shows of duplicates, and of texts that spell a special token.
_SHOWN_LOCATIONS = 5
_BATCH_SAMPLES = 64
# Lines for one task of a worker: enough to outweigh sending them, few enough for a steady progress bar.
_RANGE_BYTES = 2 << 20
# Below this size one process is faster than starting several.
_PARALLEL_BYTES = 16 << 20
# More workers gain little: the main process gathers their results.
_MAX_PROCESSES = 8
# The first samples are compared with the template's own rendering.
_VERIFIED_SAMPLES = 100
# Part of the cache's key; to be raised when results or messages change.
_CACHE_VERSION = 3
_COUNTERS = ("lengths", "kept", "trained", "trained_kept", "spelled")


def check_data(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_seq_length: int | None = None,
    *,
    options: LabelOptions = DEFAULT,
    on_bad_sample: Literal["stop", "skip", "report"] = "stop",
    rejected_path: Path | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: bool = True,
    parameter: str = "train_data_file",
) -> DataReport:
    """Parses every line of the files and, with a tokenizer, encodes it.

    Args:
        max_seq_length: tokens; required with a tokenizer.
        on_bad_sample: stop: raise if a line is invalid. skip: raise only if no sample is left. report: never raise.
        rejected_path: file for the rejected lines with their locations and problems; written if there are any.
        processes: worker processes; None for one per CPU, at most 8, or a single one for small files.
        progress: called with the bytes done and the total.
        cache: return the result of an earlier check of the same content, and store this one.
        parameter: the parameter that messages name.

    Raises:
        DataError: unreadable files, no samples, or invalid lines under `stop`.
    """
    if tokenizer is not None and max_seq_length is None:
        raise DataError("max_seq_length: must be given with a tokenizer")
    dataset = ChatDataset(paths, tokenizer, max_seq_length or 0, options=options, parameter=parameter)
    cache_path = _cache_path(dataset, tokenizer, max_seq_length, options) if cache else None
    report = _read_cached(cache_path)
    if report is None:
        report = _check(_Scan(dataset, tokenizer, max_seq_length, options), processes, progress)
        if cache_path:
            _write_cached(cache_path, report)
    if rejected_path and report.rejected:
        _write_rejected(rejected_path, report.rejected, dataset)
    if on_bad_sample == "stop" and report.rejected:
        raise DataError(report.problems())
    if on_bad_sample != "report" and not report.samples:
        named = f"{parameter} = {', '.join(report.files)}"
        if report.rejected:
            raise DataError([*report.problems(), f"{named}: no line is left to train on"])
        raise DataError(f"{named}: is empty; it needs at least one conversation")
    return report


def _write_rejected(path: Path, rejected: Sequence[Rejected], dataset: ChatDataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for item in rejected:
            line = dataset.line(item.index).decode("utf-8", errors="replace").rstrip("\n")
            record = {"source": item.source, "problem": item.problem, "line": line}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _check(scan: _Scan, processes: int | None, progress: Callable[[int, int], None] | None) -> DataReport:
    """Scans all lines, in several processes if there are many, and sums up what was found."""
    dataset = scan.dataset
    ranges = list(_ranges(dataset))
    total_bytes = sum(item.size_bytes for item in ranges)
    if processes is None:
        processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0))) if total_bytes > _PARALLEL_BYTES else 1
    # Typed arrays from the start: lists of Python integers would be ten times as large.
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_COUNTERS, "hashes", "line_indices")}
    rejected: list[Rejected] = []
    done_bytes = 0
    for found in _scanned(scan, ranges, processes):
        for name, values in found.counters.items():
            columns[name].append(np.asarray(values, dtype=np.uint32))
        columns["hashes"].append(np.asarray(found.hashes, dtype=np.uint64))
        columns["line_indices"].append(np.asarray(found.line_indices, dtype=np.uint32))
        rejected += found.rejected
        done_bytes += found.size_bytes
        if progress:
            progress(done_bytes, total_bytes)
    # `pop` frees the parts of one column before the next one is joined.
    arrays = {name: np.concatenate(columns.pop(name) or [np.zeros(0, np.uint32)]) for name in list(columns)}
    duplicates, duplicate_count = _duplicates(arrays.pop("hashes"), arrays["line_indices"], dataset)
    spelled = arrays["line_indices"][np.flatnonzero(arrays["spelled"])[:_SHOWN_LOCATIONS]]
    record = {
        "files": [str(path) for path in dataset.files],
        "lines": len(dataset),
        "max_seq_length": scan.max_seq_length,
        "rejected": rejected,
        "duplicates": duplicates,
        "duplicate_count": duplicate_count,
        "spelled_locations": [dataset.location(int(index)) for index in spelled],
    }
    report = DataReport(**record, **_report_arrays(arrays))
    assert report.lines == report.samples + len(report.rejected)
    return report


@dataclass(kw_only=True, frozen=True)
class _Range:
    """Lines from start to stop, without stop."""

    start: int
    stop: int
    size_bytes: int


def _ranges(dataset: ChatDataset) -> Iterator[_Range]:
    start = size_bytes = 0
    for index in range(len(dataset)):
        size_bytes += dataset.size_bytes(index)
        if size_bytes >= _RANGE_BYTES:
            yield _Range(start=start, stop=index + 1, size_bytes=size_bytes)
            start, size_bytes = index + 1, 0
    if start < len(dataset):
        yield _Range(start=start, stop=len(dataset), size_bytes=size_bytes)


_scan_of_worker: _Scan


def _start_worker(scan: _Scan) -> None:
    global _scan_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _scan_of_worker = scan


def _scan_in_worker(lines: _Range) -> _Found:
    return _scan_of_worker(lines)


def _scanned(scan: _Scan, ranges: list[_Range], processes: int) -> Iterator[_Found]:
    """What was found in each range, in order."""
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
class _Found:
    """What was found in a range of lines.

    Args:
        counters: a list for each of `_COUNTERS` with one number per sample.
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

    def __init__(
        self,
        dataset: ChatDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        max_seq_length: int | None,
        options: LabelOptions,
    ) -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.options = options
        self.special = _special_tokens(tokenizer) if tokenizer else None

    def __call__(self, lines: _Range) -> _Found:
        found = _Found(
            counters={name: [] for name in _COUNTERS},
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

    def _add_batch(self, batch: list[_Parsed], found: _Found) -> None:
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
        if self.tokenizer is None:
            return [None] * len(batch)
        for item in batch:
            self._verify(item)
        return encode_many([item.conversation for item in batch], self.tokenizer, 1 << 40, self.options)

    def _add(self, item: _Parsed, sample: dict[str, list[int]] | None, found: _Found) -> None:
        counts = dict.fromkeys(_COUNTERS, 0)
        if sample is not None:
            trained = np.asarray(sample["labels"]) != IGNORED
            kept = trained[: self.max_seq_length]
            counts |= {"lengths": len(trained), "kept": len(kept)}
            counts |= {"trained": int(trained.sum()), "trained_kept": int(kept.sum())}
            if not counts["trained_kept"]:
                problem = (
                    f"{item.conversation.source}: nothing of the answer is left within max_seq_length = "
                    f"{self.max_seq_length} of its {len(trained)} tokens: raise it, or shorten the question"
                )
                self._reject(item, DataError(problem), found)
                return
            texts = (message["content"] for message in item.conversation.messages)
            counts["spelled"] = int(self.special is not None and any(map(self.special.search, texts)))
        for name, value in counts.items():
            found.counters[name].append(value)
        found.line_indices.append(item.index)
        found.hashes.append(_messages_hash(item.conversation))

    def _reject(self, item: _Parsed, error: DataError, found: _Found) -> None:
        found.rejected.append(_rejected(item.index, item.conversation.source, error, item.line))

    def _verify(self, item: _Parsed) -> None:
        """Compares the pieces of a conversation with the template's rendering.

        Only for the first samples, and where templates are known to change answers.

        Raises:
            DataError: they differ.
        """
        if item.index >= _VERIFIED_SAMPLES and b"think>" not in item.line:
            return
        assert self.tokenizer is not None
        conversation = item.conversation
        pieces = conversation_pieces(conversation, self.tokenizer)
        if "".join(piece.text for piece in pieces) != render(
            self.tokenizer, conversation.messages, conversation.source
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


def _duplicates(
    hashes: np.ndarray, line_indices: np.ndarray, dataset: ChatDataset
) -> tuple[list[tuple[str, str]], int]:
    """The first few samples that repeat an earlier one, as pairs of locations, and how many there are."""
    order = np.argsort(hashes, kind="stable").astype(np.uint32)
    sorted_hashes = hashes[order]
    same = sorted_hashes[1:] == sorted_hashes[:-1]
    repeated = np.flatnonzero(same) + 1

    def location(position: int) -> str:
        return dataset.location(int(line_indices[order[position]]))

    pairs = []
    for position in repeated[:_SHOWN_LOCATIONS].tolist():
        first = position
        while first and same[first - 1]:
            first -= 1
        pairs.append((location(position), location(first)))
    return pairs, len(repeated)


def _cache_path(
    dataset: ChatDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    max_seq_length: int | None,
    options: LabelOptions,
) -> Path | None:
    """The file of the result, named by everything on which it depends; None for a tokenizer without such a hash."""
    backend = template = ""
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return None
        backend, template = tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template)
    files = [[str(path), file_hash(path)] for path in dataset.files]
    key = [_CACHE_VERSION, files, backend, template, max_seq_length, dataclasses.asdict(options)]
    return cache_folder() / f"check-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"


def _read_cached(path: Path | None) -> DataReport | None:
    if path is None or not path.exists():
        return None
    try:
        with np.load(path) as stored:
            record = json.loads(bytes(stored["record"]).decode())
            arrays = _report_arrays(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # A damaged file is no result; the check is repeated.
        return None
    record["rejected"] = [Rejected(**item) for item in record["rejected"]]
    record["duplicates"] = [tuple(pair) for pair in record["duplicates"]]
    return DataReport(**record, **arrays, from_cache=True)


def _write_cached(path: Path, report: DataReport) -> None:
    arrays = _report_arrays(vars(report))
    record = {name: value for name, value in vars(report).items() if name not in (*arrays, "from_cache")}
    record["rejected"] = [dataclasses.asdict(item) for item in report.rejected]
    stored = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.savez(file, record=stored, **arrays)
        Path(file.name).replace(path)
    except OSError:
        # A check without a cache takes longer, but its result is the same.
        return


def _report_arrays(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a DataReport with one number per sample."""
    return {name: columns[name] for name in (*_COUNTERS, "line_indices")}
