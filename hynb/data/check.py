"""Looks at every line of the training data before a GPU is touched: `hynb check-data FILE…`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from hynb.data.dataset import ChatDataset
from hynb.data.files import Conversation, Paths, cache_folder, excerpt, file_hash, parse_line
from hynb.data.report import DataReport, Rejected
from hynb.data.template import DEFAULT, IGNORED, LabelOptions, conversation_pieces, encode_many
from hynb.errors import DataError

_SHOWN_PLACES = 5
_BATCH = 64
# A range of lines for one worker: long enough to be worth sending, short enough for a steady progress bar.
_RANGE_BYTES = 2 << 20
_PARALLEL_BYTES = 16 << 20
_VERIFIED_SAMPLES = 100
_VERSION = 2
_COUNTERS = ("lengths", "kept", "trained", "trained_kept", "spelled")


@dataclass(kw_only=True)
class _Part:
    """What a worker found in a range of lines."""

    counters: dict[str, list[int]]
    hashes: list[int]
    indices: list[int]
    rejected: list[Rejected]
    size_bytes: int


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
    """Every line of the files, parsed, and with a tokenizer encoded; the result is kept by content.

    Args:
        max_seq_length: tokens; needed with a tokenizer.
        on_bad_sample: stop: raise when a line is broken. skip: go on as long as a sample is left. report: never
            raise.
        rejected_path: file for the lines left out, with their place and what is wrong; written when there are any.
        processes: None for as many as CPUs (8 at most), one for a small file.
        progress: called with bytes done and bytes in all.
        cache: use and keep the result of an earlier check of the same bytes.
        parameter: what gave the paths, named in messages.

    Raises:
        DataError: unreadable files, no samples, or broken lines under `stop`.
    """
    if tokenizer is not None and max_seq_length is None:
        raise DataError("max_seq_length: must be given with a tokenizer")
    dataset = ChatDataset(paths, tokenizer, max_seq_length or 0, options=options, parameter=parameter)
    kept_at = _cache_file(dataset, tokenizer, max_seq_length, options) if cache else None
    report = _read_cached(kept_at)
    if report is None:
        report = _check(dataset, tokenizer, max_seq_length, options, processes, progress)
        if kept_at:
            _write_cached(kept_at, report)
    if rejected_path and report.rejected:
        rejected_path.parent.mkdir(parents=True, exist_ok=True)
        with rejected_path.open("w", encoding="utf-8") as file:
            for item in report.rejected:
                line = dataset.line(item.index).decode("utf-8", errors="replace").rstrip("\n")
                record = {"source": item.source, "problem": item.problem, "line": line}
                file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n")
    if on_bad_sample == "stop" and report.rejected:
        raise DataError(report.problems())
    if on_bad_sample != "report" and not report.samples:
        named = f"{parameter} = {', '.join(report.files)}"
        if report.rejected:
            raise DataError([*report.problems(), f"{named}: no line is left to train on"])
        raise DataError(f"{named}: is empty; it needs at least one conversation")
    return report


def _check(
    dataset: ChatDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    max_seq_length: int | None,
    options: LabelOptions,
    processes: int | None,
    progress: Callable[[int, int], None] | None,
) -> DataReport:
    ranges = list(_ranges(dataset))
    total_bytes = sum(size_bytes for _, _, size_bytes in ranges)
    if processes is None:
        processes = min(8, len(os.sched_getaffinity(0))) if total_bytes > _PARALLEL_BYTES else 1
    scan = _Scan(dataset, tokenizer, max_seq_length, options)
    # Typed arrays from the start: a list of Python numbers would be ten times as large.
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*_COUNTERS, "hashes", "lines_of")}
    rejected: list[Rejected] = []
    done = 0
    for part in _parts(scan, ranges, processes):
        for name, values in part.counters.items():
            columns[name].append(np.asarray(values, dtype=np.uint32))
        columns["hashes"].append(np.asarray(part.hashes, dtype=np.uint64))
        columns["lines_of"].append(np.asarray(part.indices, dtype=np.uint32))
        rejected += part.rejected
        done += part.size_bytes
        if progress:
            progress(done, total_bytes)
    # Taken out one by one: a column's parts are let go before the next is joined.
    arrays = {name: np.concatenate(columns.pop(name) or [np.zeros(0, np.uint32)]) for name in list(columns)}
    duplicates, duplicate_count = _duplicates(arrays.pop("hashes"), arrays["lines_of"], dataset)
    spelled = arrays["lines_of"][np.flatnonzero(arrays["spelled"])[:_SHOWN_PLACES]]
    report = DataReport(
        files=[str(path) for path in dataset.files],
        lines=len(dataset),
        max_seq_length=max_seq_length,
        rejected=rejected,
        duplicates=duplicates,
        duplicate_count=duplicate_count,
        spelled_places=[dataset.place(int(index)) for index in spelled],
        **arrays,
    )
    assert report.lines == report.samples + len(report.rejected)
    return report


def _ranges(dataset: ChatDataset) -> Iterator[tuple[int, int, int]]:
    start = size_bytes = 0
    for index in range(len(dataset)):
        size_bytes += dataset.size_bytes(index)
        if size_bytes >= _RANGE_BYTES:
            yield start, index + 1, size_bytes
            start, size_bytes = index + 1, 0
    if start < len(dataset):
        yield start, len(dataset), size_bytes


_scan_of_worker: _Scan


def _start_worker(scan: _Scan) -> None:
    global _scan_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _scan_of_worker = scan


def _scan_in_worker(work: tuple[int, int, int]) -> _Part:
    return _scan_of_worker(work)


def _parts(scan: _Scan, ranges: list[tuple[int, int, int]], processes: int) -> Iterator[_Part]:
    if processes <= 1 or len(ranges) <= 1:
        yield from map(scan, ranges)
        return
    # Forked: the workers share the tokenizer and the index instead of each making their own.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(scan,)
    ) as pool:
        yield from pool.map(_scan_in_worker, ranges)


class _Scan:
    """Looks at a range of lines; a worker holds one."""

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
        special = tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()) if tokenizer else []
        names = sorted({name for name in special if name}, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names))) if names else None

    def __call__(self, work: tuple[int, int, int]) -> _Part:
        start, stop, size_bytes = work
        part = _Part(
            counters={name: [] for name in _COUNTERS}, hashes=[], indices=[], rejected=[], size_bytes=size_bytes
        )
        waiting: list[tuple[int, Conversation, bytes]] = []
        waiting_bytes = 0
        for index, (place, line) in enumerate(self.dataset.lines(start, stop), start):
            try:
                waiting.append((index, parse_line(line, place), line))
            except DataError as error:
                part.rejected.append(_rejected(index, place, error, line))
                continue
            waiting_bytes += len(line)
            # By bytes as well: 64 lines of ten megabytes each are not one batch.
            if len(waiting) == _BATCH or waiting_bytes > _RANGE_BYTES:
                self._take(waiting, part)
                waiting, waiting_bytes = [], 0
        self._take(waiting, part)
        part.rejected.sort(key=lambda item: item.index)
        return part

    def _take(self, waiting: list[tuple[int, Conversation, bytes]], part: _Part) -> None:
        if not waiting:
            return
        encoded: Sequence[dict[str, list[int]] | None] = [None] * len(waiting)
        if self.tokenizer is not None:
            try:
                for index, conversation, line in waiting:
                    self._verify(index, conversation, line)
                encoded = encode_many([item[1] for item in waiting], self.tokenizer, 1 << 40, self.options)
            except DataError as error:
                if len(waiting) > 1:
                    for item in waiting:
                        self._take([item], part)
                    return
                index, conversation, line = waiting[0]
                part.rejected.append(_rejected(index, conversation.source, error, line))
                return
        for (index, conversation, line), sample in zip(waiting, encoded, strict=True):
            counts = dict.fromkeys(_COUNTERS, 0)
            if sample is not None:
                labels = np.asarray(sample["labels"])
                trained = labels != IGNORED
                kept = trained[: self.max_seq_length]
                counts |= {"lengths": len(labels), "kept": len(kept)}
                counts |= {"trained": int(trained.sum()), "trained_kept": int(kept.sum())}
                if not counts["trained_kept"]:
                    error = DataError(
                        f"{conversation.source}: nothing of the answer is left within max_seq_length = "
                        f"{self.max_seq_length} of its {len(labels)} tokens: raise it, or shorten the question"
                    )
                    part.rejected.append(_rejected(index, conversation.source, error, line))
                    continue
                texts = (message["content"] for message in conversation.messages)
                counts["spelled"] = int(self.special is not None and any(map(self.special.search, texts)))
            for name, value in counts.items():
                part.counters[name].append(value)
            part.indices.append(index)
            messages = [(message["role"], message["content"]) for message in conversation.messages]
            digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest()
            part.hashes.append(int.from_bytes(digest))

    def _verify(self, index: int, conversation: Conversation, line: bytes) -> None:
        """Compares with the template's own text: the first samples, and where a template may rewrite answers."""
        if index >= _VERIFIED_SAMPLES and b"think>" not in line:
            return
        assert self.tokenizer is not None
        pieces = conversation_pieces(conversation, self.tokenizer)
        messages = [{"role": item["role"], "content": item["content"]} for item in conversation.messages]
        if "".join(piece.text for piece in pieces) != self.tokenizer.apply_chat_template(messages, tokenize=False):
            raise DataError(
                f"{conversation.source}: the chat template changes the text of this conversation (as some do with "
                "what stands between <think> and </think>): write the messages as the model is to answer"
            )


def _rejected(index: int, place: str, error: DataError, line: bytes) -> Rejected:
    return Rejected(index=index, source=place, problem=str(error), excerpt=excerpt(line))


def _duplicates(hashes: np.ndarray, lines_of: np.ndarray, dataset: ChatDataset) -> tuple[list[tuple[str, str]], int]:
    """The first few places that repeat an earlier sample, and how many do."""
    order = np.argsort(hashes, kind="stable").astype(np.uint32)
    in_order = hashes[order]
    same = in_order[1:] == in_order[:-1]
    repeated = np.flatnonzero(same) + 1
    pairs = []
    for position in repeated[:_SHOWN_PLACES].tolist():
        first = position
        while first and same[first - 1]:
            first -= 1
        pairs.append(tuple(dataset.place(int(lines_of[order[at]])) for at in (position, first)))
    return pairs, len(repeated)


def _cache_file(
    dataset: ChatDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    max_seq_length: int | None,
    options: LabelOptions,
) -> Path | None:
    if tokenizer is not None and not tokenizer.is_fast:
        return None
    seen = hashlib.sha256()
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer is not None else ""
    template = str(tokenizer.chat_template) if tokenizer is not None else ""
    files = [[str(path), file_hash(path)] for path in dataset.files]
    key = [_VERSION, files, backend, template, max_seq_length, dataclasses.asdict(options)]
    seen.update(json.dumps(key).encode())
    return cache_folder() / f"check-{seen.hexdigest()[:32]}.npz"


def _read_cached(path: Path | None) -> DataReport | None:
    if path is None or not path.exists():
        return None
    try:
        with np.load(path) as stored:
            record = json.loads(bytes(stored["record"]).decode())
            arrays = {name: stored[name] for name in (*_COUNTERS, "lines_of")}
    except (OSError, ValueError, KeyError, EOFError):
        # A torn file is no result; the check is simply made again.
        return None
    record["rejected"] = [Rejected(**item) for item in record["rejected"]]
    record["duplicates"] = [tuple(pair) for pair in record["duplicates"]]
    return DataReport(**record, **arrays, from_cache=True)


def _write_cached(path: Path, report: DataReport) -> None:
    arrays = {name: getattr(report, name) for name in (*_COUNTERS, "lines_of")}
    record = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name not in arrays and field.name not in ("rejected", "from_cache")
    }
    record["rejected"] = [dataclasses.asdict(item) for item in report.rejected]
    stored = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.savez(file, record=stored, **arrays)
        Path(file.name).replace(path)
    except OSError:
        # A cache that cannot be written costs time, never the result.
        return
