"""What a check of training data found, as numbers and as text; no tokenizer, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SHOWN_PROBLEMS = 20
_ENOUGH_SAMPLES = 100_000


@dataclass(kw_only=True, frozen=True)
class Rejected:
    """A line that is not trained on: which of all lines, where it stands, why, and how it begins."""

    index: int
    source: str
    problem: str
    excerpt: str


@dataclass(kw_only=True)
class DataReport:
    """What a check found; every line is either one of the samples or one of the rejected.

    The arrays have a number a sample, in order: `lengths` (tokens of the whole sample), `kept` (after the cut at
    max_seq_length), `trained` and `trained_kept` (tokens with a label, before and after the cut), `spelled` (1
    where a message spells a special token), `lines_of` (its place among all lines). Without a tokenizer the
    first four are zero.
    """

    files: list[str]
    lines: int
    max_seq_length: int | None
    rejected: list[Rejected]
    duplicates: list[tuple[str, str]]
    spelled_places: list[str]
    lengths: np.ndarray
    kept: np.ndarray
    trained: np.ndarray
    trained_kept: np.ndarray
    spelled: np.ndarray
    lines_of: np.ndarray
    duplicate_count: int
    from_cache: bool = False

    @property
    def samples(self) -> int:
        """How many lines are trained on."""
        return len(self.lengths)

    @property
    def rejected_places(self) -> list[str]:
        """file:line of the lines that are left out; `ChatDataset` takes them."""
        return [item.source for item in self.rejected]

    @property
    def cut_samples(self) -> int:
        """How many samples are longer than max_seq_length."""
        return int((self.kept < self.lengths).sum())

    @property
    def cut_answer_tokens(self) -> int:
        """How many tokens with a label lie behind max_seq_length."""
        return int((self.trained - self.trained_kept).sum())

    def padding_waste(self, batch_size: int, *, seed: int = 0) -> float:
        """The share of places that are padding when batches are made at random."""
        return 1 - float(self.kept.sum()) / _places(self.kept, batch_size, seed) if self.samples else 0.0

    def packing_gain(self, batch_size: int, *, seed: int = 0) -> float:
        """How many times fewer places packed batches have than padded ones for the same tokens.

        Told from 100,000 samples where there are more: the next ones would change it in no digit that is shown.
        """
        from hynb.data.packing import best_fit

        assert self.max_seq_length is not None
        lengths = self.kept
        if len(lengths) > _ENOUGH_SAMPLES:
            lengths = np.random.default_rng(seed).choice(lengths, _ENOUGH_SAMPLES, replace=False)
        packs = best_fit(lengths, self.max_seq_length, seed=seed)
        if not packs:
            return 1.0
        packed = np.array([int(lengths[pack].sum()) for pack in packs])
        return _places(lengths, batch_size, seed) / _places(packed, batch_size, seed)

    def problems(self) -> list[str]:
        """The rejected lines as messages, the first of many in full."""
        shown = [item.problem for item in self.rejected[:_SHOWN_PROBLEMS]]
        if len(self.rejected) > len(shown):
            names = ", ".join(self.files)
            shown.append(
                f"{names}: {len(self.rejected)} broken lines in all of {self.lines}; the first "
                f"{_SHOWN_PROBLEMS} are shown. on_bad_sample = skip goes on without them"
            )
        return shown

    def text(self, *, batch_size: int = 1, special_tokens_allowed: bool = False) -> str:
        """The whole report for a terminal.

        Args:
            special_tokens_allowed: letters of a special token in a message become the token.
        """
        counts = f"{self.lines:,} lines = {self.samples:,} samples + {len(self.rejected):,} rejected"
        out = [f"{', '.join(self.files)}: {counts}"]
        out += [f"  {problem}" for problem in self.problems()]
        if self.duplicate_count:
            out.append(f"duplicates: {self.duplicate_count:,} samples are the same as an earlier one, such as")
            out += [f"  {place} as {first}" for place, first in self.duplicates]
        if count := int(self.spelled.sum()):
            become = "become the token (allow_special_tokens_in_text)" if special_tokens_allowed else "stay letters"
            places = ", ".join(self.spelled_places)
            out.append(f"special tokens: {count:,} samples spell one in a message; the letters {become}: {places}")
        if self.max_seq_length is None or not self.samples:
            return "\n".join(out)
        tokens, kept = int(self.lengths.sum()), int(self.kept.sum())
        out.append(
            f"cut at max_seq_length = {self.max_seq_length}: {self.cut_samples:,} samples "
            f"({self.cut_samples / self.samples:.1%}), which costs {self.cut_answer_tokens:,} answer tokens"
        )
        out.append(
            f"tokens: {tokens:,}; {kept:,} after the cut, {self.trained_kept.sum() / max(1, kept):.1%} trained on"
        )
        waste = self.padding_waste(batch_size)
        out.append(f"padding at per_device_train_batch_size = {batch_size}: {waste:.1%} of all places")
        out.append(f"packing: {self.packing_gain(batch_size):.2f} times fewer places for the same tokens")
        return "\n".join([*out, "length in tokens:", *_histogram(self.lengths)])


def _places(lengths: np.ndarray, batch_size: int, seed: int) -> int:
    """Tokens and padding in batches made at random, each padded to its longest."""
    order = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(order), batch_size)
    sizes = np.diff(np.append(starts, len(order)))
    return int((np.maximum.reduceat(order, starts).astype(np.int64) * sizes).sum())


def _histogram(lengths: np.ndarray) -> list[str]:
    edges = [0, *(2**power for power in range(4, 31))]
    counts, _ = np.histogram(lengths, bins=edges)
    filled = np.flatnonzero(counts)
    rows = []
    for index in range(filled[0], filled[-1] + 1):
        bar = "█" * round(40 * int(counts[index]) / int(counts.max()))
        rows.append(f"  {edges[index]:>8,} – {edges[index + 1] - 1:>8,} {int(counts[index]):>10,} {bar}")
    return rows
