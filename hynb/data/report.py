"""What a check of training data found, as numbers and as text, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SHOWN_PROBLEMS = 20
# Packing is estimated from this many samples; more would not change the digits that are shown.
_ENOUGH_SAMPLES = 100_000
# Padding is computed from this many.
_MANY_SAMPLES = 1_000_000
# Arrays with one number for each sample, which DataReport explains, and their types.
COLUMNS = {
    "lengths": np.uint32,
    "kept": np.uint32,
    "trained": np.uint32,
    "trained_kept": np.uint32,
    "spelled": np.uint8,
    "shortened": np.uint16,
    "answers": np.uint16,
    "line_indices": np.uint32,
}


@dataclass(kw_only=True, frozen=True)
class Rejected:
    """A line that is not trained on.

    Args:
        index: among all lines.
        source: its location as file:line, or as file: record number for a JSON array.
        excerpt: its beginning.
        needed_tokens: of a valid sample of whose answers nothing is left after truncation, the max_seq_length from
            which on it is trained on; None for an invalid line.
        samples: number of these samples, of which a line has several under `split_turns`.
        answer: number of the first of them within its conversation, from 1; 0 without `split_turns`.
    """

    index: int
    source: str
    problem: str
    excerpt: str
    needed_tokens: int | None = None
    samples: int = 1
    answer: int = 0


@dataclass(kw_only=True)
class DataReport:
    """What a check found: each line is either a sample or rejected.

    Args:
        files: paths.
        lines: number of lines that are not blank.
        duplicates: locations of the first few samples that repeat an earlier one, and of the latter.
        spelled_locations: the first few samples with text that spells a special token.
        lengths: tokens of each sample; 0 without a tokenizer, like the next three.
        kept: tokens of each sample after truncation to max_seq_length.
        trained: tokens of each sample with a label.
        trained_kept: tokens of each sample with a label after truncation.
        spelled: for each sample, 1 if one of its messages has text that spells a special token, else 0.
        shortened: for each sample, number of answers that the template shortens, as templates do with thoughts.
        answers: for each sample, the number of the answer that ends it under `split_turns`; else 0.
        line_indices: index of each sample among all lines.
        unknown_keys: for each key of records that nothing reads, the number of samples with it.
        ignored_fields: the same for fields that the template does not render, under `allow_ignored_fields`, and for
            arguments that change the prompt alone.
        notes: for each thing that a user may not expect of how the template writes answers, the number of samples.
        from_cache: whether this is the stored result of an earlier check.
        tokens: the file with the token ids and labels of all samples, in order; None if they are not kept.
        tokens_note: why they are not kept.
        written_time: what a chat template that writes the present time writes instead; empty if it writes none.
    """

    files: list[str]
    lines: int
    max_seq_length: int | None
    rejected: list[Rejected]
    duplicates: list[tuple[str, str]]
    spelled_locations: list[str]
    lengths: np.ndarray
    kept: np.ndarray
    trained: np.ndarray
    trained_kept: np.ndarray
    spelled: np.ndarray
    shortened: np.ndarray
    answers: np.ndarray
    line_indices: np.ndarray
    duplicate_count: int
    unknown_keys: dict[str, int]
    ignored_fields: dict[str, int]
    notes: dict[str, int]
    from_cache: bool = False
    tokens: Path | None = None
    tokens_note: str = ""
    written_time: str = ""

    @property
    def samples(self) -> int:
        """Number of samples that are trained on: one per line, or one per answer under `split_turns`."""
        return len(self.lengths)

    @property
    def invalid(self) -> list[Rejected]:
        """Lines that are not valid samples."""
        return [item for item in self.rejected if item.needed_tokens is None]

    @property
    def too_long(self) -> list[Rejected]:
        """Lines with valid samples of whose answers nothing is left after truncation."""
        return [item for item in self.rejected if item.needed_tokens is not None]

    @property
    def too_long_share(self) -> float:
        """Fraction of valid samples that are left out because nothing of their answers is left."""
        count = sum(item.samples for item in self.too_long)
        return count / max(1, self.samples + count)

    @property
    def rejected_locations(self) -> list[str]:
        """Locations (file:line) of lines without a sample, as `ChatDataset` takes them."""
        rejected = np.array([item.index for item in self.rejected], dtype=np.int64)
        places = np.searchsorted(self.line_indices, rejected)
        # Under `split_turns` a line may have samples and rejected answers.
        has_samples = np.zeros(len(rejected), dtype=bool)
        within = places < len(self.line_indices)
        has_samples[within] = self.line_indices[places[within]] == rejected[within]
        sources = (item.source for item, is_kept in zip(self.rejected, has_samples, strict=True) if not is_kept)
        return list(dict.fromkeys(sources))

    @property
    def cut_samples(self) -> int:
        """Number of samples that are longer than max_seq_length."""
        return int((self.kept < self.lengths).sum())

    @property
    def cut_answer_tokens(self) -> int:
        """Number of tokens with a label that truncation removes."""
        return int(self.trained.sum()) - int(self.trained_kept.sum())

    def padding_waste(self, batch_size: int, *, seed: int = 0) -> float:
        """Fraction of padding among the tokens of random batches."""
        if not self.samples:
            return 0.0
        lengths = _some(self.kept, _MANY_SAMPLES, seed)
        return 1 - float(lengths.sum()) / _padded_tokens(lengths, batch_size, seed)

    def packing_gain(self, batch_size: int, *, seed: int = 0) -> float:
        """Tokens and padding of random batches of samples, divided by those of random batches of packs."""
        from hynb.data.packing import best_fit

        assert self.max_seq_length is not None
        lengths = _some(self.kept, _ENOUGH_SAMPLES, seed)
        packs = best_fit(lengths, self.max_seq_length, seed=seed)
        if not packs:
            return 1.0
        packed = np.array([int(lengths[pack].sum()) for pack in packs])
        return _padded_tokens(lengths, batch_size, seed) / _padded_tokens(packed, batch_size, seed)

    def too_long_text(self) -> str:
        """How many samples are left out for their length, the first of them, and the length that leaves none out."""
        count, first = sum(item.samples for item in self.too_long), self.too_long[0].source
        needed = max(item.needed_tokens or 0 for item in self.too_long)
        return (
            f"{count:,} samples ({self.too_long_share:.1%}), since nothing of their answers is left within "
            f"max_seq_length = {self.max_seq_length}, the first at {first}; max_seq_length = {needed} leaves none out"
        )

    def note_texts(self) -> list[str]:
        """What a user may not expect of how the chat template writes answers, a line each."""
        return [f"{count:,} samples have {note}" for note, count in sorted(self.notes.items())]

    def time_text(self) -> str:
        """Which time the chat template writes in training."""
        return (
            f"time: where the chat template writes the present time, samples have {self.written_time}, so that every "
            "check, rank and run finds the same tokens; a record's key current_time sets its own"
        )

    def problems(self) -> list[str]:
        """One message for each of the first rejected lines, and one with their number if there are more."""
        invalid = self.invalid
        shown = [item.problem for item in invalid[:_SHOWN_PROBLEMS]]
        if len(invalid) > len(shown):
            names = ", ".join(self.files)
            shown.append(
                f"{names}: {len(invalid)} of {self.lines} lines are invalid; the first {_SHOWN_PROBLEMS} are "
                "shown. on_bad_sample = skip leaves them out"
            )
        return shown

    def text(self, *, batch_size: int = 1, special_tokens_allowed: bool = False) -> str:
        """The whole report for a terminal.

        Args:
            batch_size: samples per batch, for the fraction of padding.
            special_tokens_allowed: text that spells a special token becomes the token.
        """
        counts = f"{self.lines:,} lines = {self.samples:,} samples + {len(self.rejected):,} rejected"
        if self.answers.any():
            counts = (
                f"{self.lines:,} lines, {len(self.rejected):,} of them rejected or without one of their answers; "
                f"{self.samples:,} samples, one for each answer"
            )
        out = [f"{', '.join(self.files)}: {counts}"]
        out += [f"  {problem}" for problem in self.problems()]
        if self.too_long:
            out.append(f"left out: {self.too_long_text()}")
        for title, counts in (
            ("keys that nothing reads", self.unknown_keys),
            ("fields that the chat template does not render", self.ignored_fields),
        ):
            if counts:
                named = ", ".join(f"{name} ({count:,} samples)" for name, count in sorted(counts.items()))
                out.append(f"{title}: {named}")
        out += self.note_texts()
        if self.written_time:
            out.append(self.time_text())
        if shortened := int(self.shortened.sum()):
            out.append(
                f"shortened answers: {shortened:,} earlier answers are rendered without a part, such as their "
                "thought; split_turns: true trains each answer in full"
            )
        if self.duplicate_count:
            out.append(f"duplicates: {self.duplicate_count:,} samples repeat an earlier one, such as")
            out += [f"  {location} repeats {first}" for location, first in self.duplicates]
        if count := int(self.spelled.sum()):
            become = "becomes the token (allow_special_tokens_in_text)" if special_tokens_allowed else "stays text"
            locations = ", ".join(self.spelled_locations)
            out.append(
                f"added tokens: {count:,} samples have text that spells one, which {become} where the tokenizer "
                f"marks it as special, and is the token otherwise: {locations}"
            )
        if self.max_seq_length is None or not self.samples:
            return "\n".join(out)
        tokens, kept = int(self.lengths.sum()), int(self.kept.sum())
        out.append(
            f"truncated at max_seq_length = {self.max_seq_length}: {self.cut_samples:,} samples "
            f"({self.cut_samples / self.samples:.1%}), by {self.cut_answer_tokens:,} answer tokens"
        )
        out.append(
            f"tokens: {tokens:,}; {kept:,} after truncation, {self.trained_kept.sum() / max(1, kept):.1%} trained on"
        )
        waste = self.padding_waste(batch_size)
        out.append(f"padding at per_device_train_batch_size = {batch_size}: {waste:.1%} of all tokens")
        out.append(f"packing: {self.packing_gain(batch_size):.2f} times fewer tokens, padding included")
        return "\n".join([*out, "length in tokens:", *_histogram(self.lengths)])


def _some(lengths: np.ndarray, count: int, seed: int) -> np.ndarray:
    """All lengths, or a random choice where there are more than `count`."""
    if len(lengths) <= count:
        return lengths
    return lengths[np.sort(np.random.default_rng(seed).integers(len(lengths), size=count))]


def _padded_tokens(lengths: np.ndarray, batch_size: int, seed: int) -> int:
    """Tokens and padding of random batches, each padded to its longest sample."""
    order = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(order), batch_size)
    sizes = np.diff(np.append(starts, len(order)))
    return int((np.maximum.reduceat(order, starts).astype(np.int64) * sizes).sum())


def _histogram(lengths: np.ndarray) -> list[str]:
    """One line per power of two: its range, how many lengths are in it, and a bar."""
    edges = [0, *(2**power for power in range(4, 31))]
    counts, _ = np.histogram(lengths, bins=edges)
    filled = np.flatnonzero(counts)
    rows = []
    for index in range(filled[0], filled[-1] + 1):
        bar = "█" * round(40 * int(counts[index]) / int(counts.max()))
        rows.append(f"  {edges[index]:>8,} – {edges[index + 1] - 1:>8,} {int(counts[index]):>10,} {bar}")
    return rows
