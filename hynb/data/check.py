"""Checks every line of the training data before a GPU is used: `hynb check-data FILE…`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hynb.data.arrays import Column, map_arrays, write_arrays
from hynb.data.cache import cache_folder, content_hash, locked, temporary
from hynb.data.dataset import ChatDataset
from hynb.data.files import Paths
from hynb.data.pieces import DEFAULT, LabelOptions
from hynb.data.report import COLUMNS as REPORTED
from hynb.data.report import DataReport, Rejected
from hynb.data.scan import COLUMNS, line_ranges, scan_all
from hynb.data.tokens import TokenWriter, open_tokens, remove_unused
from hynb.errors import DataError

# Locations that a report shows of duplicates, and of texts that spell a special token.
_SHOWN_LOCATIONS = 5
# Below this size one process is faster than starting several.
_PARALLEL_BYTES = 16 << 20
# The main process gathers their results, which takes it about 1/200 of the time that a worker needs for them.
_MAX_PROCESSES = 64
# Part of the cache's key; to be raised when the layout of its files changes.
_CACHE_VERSION = 5
# Samples whose hashes are compared at once.
_HASHES = 1 << 17


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
        on_bad_sample: stop: raise if a line is invalid. skip: raise only if no sample is left. report: for no line.
        max_cut_share: largest fraction of samples that may be left out because nothing of their answers is left
            within max_seq_length.
        rejected_path: file for the rejected lines with their locations and problems; written if there are any.
        processes: worker processes; None for one per CPU, at most 64, or a single one for small files.
        progress: called with the bytes done and the total.
        cache: return the result of an earlier check of the same content, and store this one, with the token ids.
        parameter: the parameter that messages name.

    Raises:
        DataError: unreadable files, no samples, invalid lines under `stop`, too many samples that are too long, or a
            chat template that ends no answer, whatever `on_bad_sample` says.
    """
    if tokenizer is not None and max_seq_length is None:
        raise DataError("max_seq_length: must be given with a tokenizer")
    dataset = ChatDataset(paths, tokenizer, max_seq_length, options=options, parameter=parameter)
    report = _checked_once(dataset, processes, progress) if cache else _check(dataset, processes, progress)
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


@dataclasses.dataclass(kw_only=True, frozen=True)
class _CachePaths:
    """Files that a check leaves, named by everything on which they depend.

    Args:
        report: its result, which names files and lines.
        tokens: the token ids, which depend on content alone; None without a tokenizer.
    """

    report: Path
    tokens: Path | None


def _checked_once(
    dataset: ChatDataset, processes: int | None, progress: Callable[[int, int], None] | None
) -> DataReport:
    """The result of an earlier check, or of one made now, while others that need the same wait."""
    paths = _cache_paths(dataset)
    if paths is None:
        return _check(dataset, processes, progress)
    with locked(paths.report) as alone:
        report = _read_cached(paths)
        if report is None or _tokens_are_missing(report, paths, dataset):
            report = _check_and_keep(dataset, processes, progress, paths)
            _write_cached(paths.report, report, alone)
    return report


def _tokens_are_missing(report: DataReport, paths: _CachePaths, dataset: ChatDataset) -> bool:
    """Whether the token ids of an earlier check are not there, but could be."""
    if report.tokens or paths.tokens is None:
        return False
    with temporary(paths.tokens, alone=False) as path:
        writer = TokenWriter(path, dataset.size_bytes)
        writer.close()
    report.tokens_note = writer.problem
    return not writer.problem


def _check_and_keep(
    dataset: ChatDataset,
    processes: int | None,
    progress: Callable[[int, int], None] | None,
    paths: _CachePaths,
) -> DataReport:
    """The result of a check, and its token ids in a file."""
    if paths.tokens is None:
        return _check(dataset, processes, progress)
    with locked(paths.tokens) as alone, temporary(paths.tokens, alone=alone) as path:
        if (store := open_tokens(paths.tokens, verify=True)) is not None:
            # The same content was checked under another name.
            report = _check(dataset, processes, progress)
            if np.array_equal(store.lengths, report.kept):
                report.tokens = paths.tokens
                return report
        writer = TokenWriter(path, dataset.size_bytes)
        try:
            report = _check(dataset, processes, progress, writer)
        finally:
            writer.close()
        if not writer.problem:
            path.replace(paths.tokens)
            report.tokens = paths.tokens
        report.tokens_note = writer.problem
    remove_unused(paths.tokens.parent)
    return report


def _check(
    dataset: ChatDataset,
    processes: int | None,
    progress: Callable[[int, int], None] | None,
    tokens: TokenWriter | None = None,
) -> DataReport:
    """Scans all lines and sums up what was found.

    Args:
        tokens: gets the token ids.
    """
    total_bytes = dataset.size_bytes
    if processes is None:
        processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0))) if total_bytes > _PARALLEL_BYTES else 1
    folder = cache_folder() if os.access(cache_folder(), os.W_OK) else None
    columns = {name: Column(dtype, folder) for name, dtype in COLUMNS.items()}
    rejected: list[Rejected] = []
    unknown_keys: Counter[str] = Counter()
    ignored_fields: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    done_bytes, written_time = 0, ""
    for found in scan_all(dataset, line_ranges(dataset), processes, tokens):
        for name, values in found.columns.items():
            columns[name].append(values)
        rejected += found.rejected
        unknown_keys.update(found.unknown_keys)
        ignored_fields.update(found.ignored_fields)
        notes.update(found.notes)
        done_bytes += found.size_bytes
        written_time = written_time or found.written_time
        if progress:
            progress(done_bytes, total_bytes)
    arrays = {name: column.array() for name, column in columns.items()}
    if tokens is not None:
        tokens.finish(arrays["starts"], arrays["kept"], arrays["checks"])
    duplicates, duplicate_count = _duplicates(arrays["hashes"], arrays["line_indices"], dataset)
    named: dict[str, Any] = {name: arrays[name] for name in REPORTED}
    report = DataReport(
        files=[str(path) for path in dataset.files],
        lines=len(dataset),
        max_seq_length=dataset.max_seq_length,
        rejected=rejected,
        duplicates=duplicates,
        duplicate_count=duplicate_count,
        unknown_keys=dict(unknown_keys),
        ignored_fields=dict(ignored_fields),
        notes=dict(notes),
        written_time=written_time,
        spelled_locations=[dataset.location(index) for index in _first_spelled(arrays)],
        **named,
    )
    assert report.lines == _distinct(report.line_indices) + len(report.rejected_locations)
    return report


def _first_spelled(arrays: dict[str, np.ndarray]) -> list[int]:
    """Lines of the first samples with text that spells a special token."""
    return arrays["line_indices"][np.flatnonzero(arrays["spelled"])[:_SHOWN_LOCATIONS]].tolist()


def _distinct(values: np.ndarray) -> int:
    """The number of distinct values in a sorted array."""
    changes = 0
    for start in range(0, len(values) - 1, _HASHES):
        part = values[start : start + _HASHES + 1]
        changes += int(np.count_nonzero(part[1:] != part[:-1]))
    return changes + bool(len(values))


def _duplicates(
    hashes: np.ndarray, line_indices: np.ndarray, dataset: ChatDataset
) -> tuple[list[tuple[str, str]], int]:
    """The first few samples that repeat an earlier one, as pairs of locations, and how many there are.

    They are found among the hashes of one range of values after another, so that no copy of all is in memory.
    """
    bits = max(0, int(np.ceil(np.log2(max(1, len(hashes)) / _HASHES))))
    pairs: list[tuple[str, str]] = []
    count = 0
    for number in range(1 << bits):
        chosen = hashes if not bits else _with_first_bits(hashes, bits, number)
        ordered = np.sort(chosen)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        count += len(repeated)
        for value in np.unique(repeated[:_SHOWN_LOCATIONS]):
            if len(pairs) < _SHOWN_LOCATIONS:
                same = [dataset.location(int(line_indices[index])) for index in _positions(hashes, value)]
                pairs += [(location, same[0]) for location in same[1:]]
    return pairs[:_SHOWN_LOCATIONS], count


def _with_first_bits(hashes: np.ndarray, bits: int, number: int) -> np.ndarray:
    shift = np.uint64(64 - bits)
    parts = (hashes[start : start + _HASHES] for start in range(0, len(hashes), _HASHES))
    return np.concatenate([part[part >> shift == number] for part in parts])


def _positions(hashes: np.ndarray, value: np.uint64) -> list[int]:
    """The first few places of a hash."""
    found: list[int] = []
    for start in range(0, len(hashes), _HASHES):
        found += (np.flatnonzero(hashes[start : start + _HASHES] == value) + start).tolist()
        if len(found) > _SHOWN_LOCATIONS:
            break
    return found[: _SHOWN_LOCATIONS + 1]


def _cache_paths(dataset: ChatDataset) -> _CachePaths | None:
    """The files of a check; None for a tokenizer that cannot be hashed, or a file that cannot be read."""
    tokenizer = dataset.tokenizer
    facts: list[object] = [_CACHE_VERSION, _code_identity(), dataset.max_seq_length]
    facts.append(dataclasses.asdict(dataset.options))
    if tokenizer is not None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return None
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
        facts += [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), special]
    contents = [content_hash(path) for path in dataset.files]
    tokens = _key([*facts, contents])
    report = _key([*facts, contents, [str(path) for path in dataset.files]])
    folder = cache_folder()
    return _CachePaths(
        report=folder / f"check-{report}.npz",
        tokens=folder / f"tokens-{tokens}" if tokenizer is not None else None,
    )


def _key(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@functools.cache
def _code_identity() -> list[str]:
    """What decides ids and labels beside the tokenizer: the code of this package, and of its libraries."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return [
        code.hexdigest(),
        *(importlib.metadata.version(name) for name in ("jinja2", "tokenizers", "transformers")),
    ]


def _read_cached(paths: _CachePaths) -> DataReport | None:
    try:
        arrays, record = map_arrays(paths.report, verify=True)
        arrays = {name: arrays[name] for name in REPORTED}
    except (OSError, ValueError, KeyError):
        # A damaged file counts as absent: the check is repeated.
        return None
    record["rejected"] = [Rejected(**item) for item in record["rejected"]]
    record["duplicates"] = [tuple(pair) for pair in record["duplicates"]]
    named: dict[str, Any] = {**record, **arrays}
    report = DataReport(**named, from_cache=True)
    store = open_tokens(paths.tokens, verify=True) if paths.tokens else None
    if store is not None and np.array_equal(store.lengths, report.kept):
        report.tokens, report.tokens_note = paths.tokens, ""
    return report


def _write_cached(path: Path, report: DataReport, alone: bool) -> None:
    arrays = {name: getattr(report, name) for name in REPORTED}
    left_out = (*arrays, "from_cache", "tokens")
    record = {name: value for name, value in vars(report).items() if name not in left_out}
    record["rejected"] = [dataclasses.asdict(item) for item in report.rejected]
    try:
        with temporary(path, alone=alone) as file:
            write_arrays(file, arrays, record)
            file.replace(path)
    except OSError:
        # A check without a cache takes longer, but its result is the same.
        return
