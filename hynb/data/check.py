"""Checks every line of the training data before a GPU is used: `hynb check-data FILE…`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hynb.data.dataset import ChatDataset
from hynb.data.encoding import DEFAULT, LabelOptions
from hynb.data.files import Paths, cache_folder
from hynb.data.report import DataReport, Rejected
from hynb.data.scan import COUNTERS, line_ranges, scan_all
from hynb.errors import DataError
from hynb.files import file_hash

# Locations that a report shows of duplicates, and of texts that spell a special token.
_SHOWN_LOCATIONS = 5
# Below this size one process is faster than starting several.
_PARALLEL_BYTES = 16 << 20
# More workers gain little: the main process gathers their results.
_MAX_PROCESSES = 8
# Part of the cache's key; to be raised when results or messages change.
_CACHE_VERSION = 4


def check_data(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_seq_length: int | None = None,
    *,
    options: LabelOptions = DEFAULT,
    on_bad_sample: Literal["stop", "skip", "report"] = "stop",
    max_cut_share: float = 0.05,
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
        max_cut_share: largest fraction of samples that may be left out because nothing of their answers is left
            within max_seq_length.
        rejected_path: file for the rejected lines with their locations and problems; written if there are any.
        processes: worker processes; None for one per CPU, at most 8, or a single one for small files.
        progress: called with the bytes done and the total.
        cache: return the result of an earlier check of the same content, and store this one.
        parameter: the parameter that messages name.

    Raises:
        DataError: unreadable files, no samples, invalid lines under `stop`, or too many samples that are too long.
    """
    if tokenizer is not None and max_seq_length is None:
        raise DataError("max_seq_length: must be given with a tokenizer")
    dataset = ChatDataset(paths, tokenizer, max_seq_length, options=options, parameter=parameter)
    cache_path = _cache_path(dataset) if cache else None
    report = _read_cached(cache_path)
    if report is None:
        report = _check(dataset, processes, progress)
        if cache_path:
            _write_cached(cache_path, report)
    if rejected_path and report.rejected:
        _write_rejected(rejected_path, report.rejected, dataset)
    if on_bad_sample == "stop" and report.invalid:
        raise DataError(report.problems())
    if on_bad_sample != "report" and report.too_long_share > max_cut_share:
        raise DataError(
            f"{parameter} = {', '.join(report.files)}: {report.too_long_text()}. Raise max_seq_length, or allow more "
            f"with max_cut_share (now {max_cut_share:g})"
        )
    if on_bad_sample != "report" and not report.samples:
        named = f"{parameter} = {', '.join(report.files)}"
        if report.rejected:
            left_out = [f"{named}: {report.too_long_text()}"] if report.too_long else []
            raise DataError([*report.problems(), *left_out, f"{named}: no line is left to train on"])
        raise DataError(f"{named}: is empty; it needs at least one conversation")
    return report


def _write_rejected(path: Path, rejected: Sequence[Rejected], dataset: ChatDataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="replace") as file:
        for item in rejected:
            line = dataset.line(item.index).decode("utf-8", errors="replace").rstrip("\n")
            record = {"source": item.source, "problem": item.problem, "line": line}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _check(dataset: ChatDataset, processes: int | None, progress: Callable[[int, int], None] | None) -> DataReport:
    """Scans all lines and sums up what was found."""
    ranges = list(line_ranges(dataset))
    total_bytes = sum(item.size_bytes for item in ranges)
    if processes is None:
        processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0))) if total_bytes > _PARALLEL_BYTES else 1
    # Typed arrays from the start: lists of Python integers would be ten times as large.
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*COUNTERS, "hashes", "line_indices")}
    rejected: list[Rejected] = []
    unknown_keys: Counter[str] = Counter()
    ignored_fields: Counter[str] = Counter()
    done_bytes = 0
    for found in scan_all(dataset, ranges, processes):
        for name, values in found.counters.items():
            columns[name].append(np.asarray(values, dtype=np.uint32))
        columns["hashes"].append(np.asarray(found.hashes, dtype=np.uint64))
        columns["line_indices"].append(np.asarray(found.line_indices, dtype=np.uint32))
        rejected += found.rejected
        unknown_keys.update(found.unknown_keys)
        ignored_fields.update(found.ignored_fields)
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
        "max_seq_length": dataset.max_seq_length,
        "rejected": rejected,
        "duplicates": duplicates,
        "duplicate_count": duplicate_count,
        "unknown_keys": dict(unknown_keys),
        "ignored_fields": dict(ignored_fields),
        "spelled_locations": [dataset.location(int(index)) for index in spelled],
    }
    report = DataReport(**record, **_report_arrays(arrays))
    assert report.lines == len(np.unique(report.line_indices)) + len(report.rejected_locations)
    return report


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


def _cache_path(dataset: ChatDataset) -> Path | None:
    """The file of the result, named by everything on which it depends; None for a tokenizer that cannot be hashed."""
    backend = template = ""
    tokenizer = dataset.tokenizer
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return None
        backend, template = tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template)
    files = [[str(path), file_hash(path)] for path in dataset.files]
    key = [_CACHE_VERSION, files, backend, template, dataset.max_seq_length, dataclasses.asdict(dataset.options)]
    return cache_folder() / f"check-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"


def _read_cached(path: Path | None) -> DataReport | None:
    if path is None or not path.exists():
        return None
    try:
        with np.load(path) as stored:
            record = json.loads(bytes(stored["record"]).decode())
            arrays = _report_arrays(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # A damaged file counts as absent: the check is repeated.
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
    return {name: columns[name] for name in (*COUNTERS, "line_indices")}
