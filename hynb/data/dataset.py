"""Data sets and batches: JSONL conversations to token ids and labels, of which only answers are trained on."""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hynb.data.encoding import as_sample, encode, up_to_answer
from hynb.data.files import Conversation, Paths, find_files, location, seekable_file, split_location, without_bom
from hynb.data.line_index import LineIndex
from hynb.data.pieces import DEFAULT, IGNORED, LabelOptions
from hynb.data.records import parse_line
from hynb.data.tokens import TokenStore
from hynb.errors import DataError

# Of a data set of many files, those that one process keeps open; hosts allow 1024 descriptors by default.
_OPEN_FILES = 64


class ChatDataset(torch.utils.data.Dataset):
    """Samples that are read by offset and tokenised on access; the files are never in memory as a whole.

    Args:
        paths: JSONL files as `find_files` takes them; `.gz` and `.zst` are decompressed into the cache once.
        tokenizer: None if only lines and conversations are read.
        max_seq_length: tokens; longer samples are truncated. None without a tokenizer.
        options: what is trained on.
        rejected: locations (file:line) of lines that a check rejected and that are left out.
        parameter: the parameter that messages name.
        checked: a check has found that the chat template renders every field of every record.

    Raises:
        DataError: files that do not exist or cannot be read.
    """

    def __init__(
        self,
        paths: Paths,
        tokenizer: PreTrainedTokenizerBase | None,
        max_seq_length: int | None,
        *,
        options: LabelOptions = DEFAULT,
        rejected: Sequence[str] = (),
        parameter: str = "train_data_file",
        checked: bool = False,
    ) -> None:
        self.files = find_files(paths, parameter)
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.options = options
        self.checked = checked
        self._seekable = [seekable_file(path) for path in self.files]
        self._open = _OpenFiles()
        self._indexes = [self._index(number) for number in range(len(self.files))]
        # The first line of each file among the lines of all.
        self._firsts = np.concatenate([[0], np.cumsum([len(index) for index in self._indexes])])
        # For each sample, its line, the answer that ends it, and its place among the stored tokens; None: all lines.
        self._lines: np.ndarray | None = self._without(rejected) if rejected else None
        self._answers: np.ndarray | None = None
        self._stored: np.ndarray | None = None
        self._tokens: TokenStore | None = None

    def _index(self, number: int) -> LineIndex:
        try:
            return LineIndex.of(self._seekable[number], self.files[number])
        except OSError as error:
            raise DataError(f"{self.files[number]}: cannot be read: {error.strerror}") from None

    def _without(self, rejected: Sequence[str]) -> np.ndarray:
        """The lines that are not at one of these locations."""
        numbers = {str(path): number for number, path in enumerate(self.files)}
        is_left = np.ones(int(self._firsts[-1]), dtype=bool)
        for source in rejected:
            name, line_number = split_location(source)
            if name in numbers:
                file_number = numbers[name]
                index = self._indexes[file_number].index(line_number)
                if index < len(self._indexes[file_number]):
                    is_left[int(self._firsts[file_number]) + index] = False
        return np.flatnonzero(is_left).astype(np.uint32)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ChatDataset:
        """A data set of the samples with these indices; the files are not read again."""
        chosen = np.asarray(indices, dtype=np.int64)
        part = copy.copy(self)
        part._lines = chosen.astype(np.uint32) if self._lines is None else self._lines[chosen]
        part._answers = None if self._answers is None else self._answers[chosen]
        if self._tokens is not None:
            part._stored = chosen.astype(np.uint32) if self._stored is None else self._stored[chosen]
        return part

    def with_answers(self, lines: Sequence[int] | np.ndarray, answers: Sequence[int] | np.ndarray) -> ChatDataset:
        """A data set of parts of the lines, for `split_turns`.

        Args:
            lines: for each sample, the index of its line.
            answers: for each sample, the number of the answer that ends it, from 1; 0 for the whole line.
        """
        part = self.subset(lines)
        part._answers = np.asarray(answers, dtype=np.uint16)
        return part

    def with_tokens(self, tokens: TokenStore) -> ChatDataset:
        """The same data set, whose samples are read from the tokens that a check has kept, one entry for each."""
        assert len(tokens) == len(self), f"{len(tokens)} samples are stored, {len(self)} are in the data set"
        part = copy.copy(self)
        part._tokens, part._stored = tokens, None
        return part

    @property
    def has_tokens(self) -> bool:
        """Whether samples are read from tokens that a check has kept."""
        return self._tokens is not None

    def __len__(self) -> int:
        return int(self._firsts[-1]) if self._lines is None else len(self._lines)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        assert self.max_seq_length is not None
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self._tokens is not None:
            stored = self._tokens.sample(index if self._stored is None else int(self._stored[index]))
            if stored is not None:
                return as_sample(stored[0][: self.max_seq_length], stored[1][: self.max_seq_length])
        assert self.tokenizer is not None
        return encode(
            self.conversation(index), self.tokenizer, self.max_seq_length, self.options, checked=self.checked
        )

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a sample's file, and the index of its line in it."""
        line = index if self._lines is None else int(self._lines[index])
        if not 0 <= line < int(self._firsts[-1]):
            raise IndexError(f"sample {index} of {len(self)}")
        file_number = int(np.searchsorted(self._firsts, line, side="right")) - 1
        return file_number, line - int(self._firsts[file_number])

    def line(self, index: int) -> bytes:
        """The bytes of a sample's line.

        Raises:
            DataError: the file cannot be read, or has become shorter.
        """
        file_number, line = self._place(index)
        offsets = self._indexes[file_number].offsets
        start, stop = int(offsets[line]), int(offsets[line + 1])
        content = self._open.read(self._seekable[file_number], start, stop - start)
        if len(content) < stop - start:
            raise DataError(
                f"{self.location(index)}: the file has become shorter since it was checked: restore it, and go on "
                "from the last checkpoint"
            )
        # Blank lines may follow.
        end = content.find(b"\n") + 1
        return without_bom(content[:end] if end else content, 1 if start == 0 else 2)

    @property
    def size_bytes(self) -> int:
        """Size of all lines."""
        return sum(int(index.offsets[-1]) - int(index.offsets[0]) for index in self._indexes if len(index))

    def ranges(self, size_bytes: int) -> Iterator[tuple[int, int, int]]:
        """All lines in parts of at most about this size: first line, the one after the last, and bytes."""
        for first, index in zip(self._firsts.tolist(), self._indexes, strict=False):
            start = 0
            while start < len(index):
                begin = int(index.offsets[start])
                stop = int(np.searchsorted(index.offsets, begin + size_bytes, side="right")) - 1
                stop = min(max(stop, start + 1), len(index))
                yield first + start, first + stop, int(index.offsets[stop]) - begin
                start = stop

    def lines(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Location and bytes of the samples from start to stop, read sequentially."""
        if self._lines is not None or start >= stop:
            for index in range(start, stop):
                yield self.location(index), self.line(index)
            return
        file_number, line = self._place(start)
        while start < stop:
            index = self._indexes[file_number]
            count = min(stop - start, len(index) - line)
            if count:
                yield from self._lines_of(file_number, line, line + count)
            start, file_number, line = start + count, file_number + 1, 0

    def _lines_of(self, file_number: int, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        index, path = self._indexes[file_number], self.files[file_number]
        with self._seekable[file_number].open("rb", buffering=1 << 20) as file:
            position = int(index.offsets[start])
            file.seek(position)
            for number in range(start, stop):
                if len(index.blank) and position != (begin := int(index.offsets[number])):
                    position = begin
                    file.seek(position)
                line = file.readline()
                yield (
                    location(path, self._seekable[file_number], index.number(number)),
                    without_bom(line, 1 if position == 0 else 2),
                )
                position += len(line)

    def location(self, index: int) -> str:
        """A sample's location, as `hynb.data.files.location` makes it."""
        file_number, line = self._place(index)
        number = self._indexes[file_number].number(line)
        return location(self.files[file_number], self._seekable[file_number], number)

    def locations(self, index: int) -> list[str]:
        """The location of the one conversation in a sample; a pack has several."""
        return [self.location(index)]

    def conversation(self, index: int) -> Conversation:
        """The messages of a sample.

        Raises:
            DataError: the line is invalid.
        """
        whole = parse_line(self.line(index), self.location(index))
        answer = 0 if self._answers is None else int(self._answers[index])
        part = up_to_answer(whole, answer) if answer else whole
        assert part is not None, "an answer that is not trained on makes no sample"
        return part


class _OpenFiles:
    """Files that stay open between reads, in each process its own; a read names its offset, so forks share them."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Bytes of a file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            with self._lock:
                if path in self._descriptors:
                    self._descriptors.move_to_end(path)
                else:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    if len(self._descriptors) > _OPEN_FILES:
                        os.close(self._descriptors.popitem(last=False)[1])
                # One read returns at most 2 GB.
                descriptor = self._descriptors[path]
                content = os.pread(descriptor, size, offset)
                while len(content) < size and (
                    part := os.pread(descriptor, size - len(content), offset + len(content))
                ):
                    content += part
                return content
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> _OpenFiles:
        return _OpenFiles()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


@dataclass(kw_only=True)
class Collator:
    """Pads the samples of a batch on the right to the longest one.

    Args:
        flatten: packed samples of a batch are concatenated to one row, and the batch says where each conversation
            begins, as transformers' FlashAttentionKwargs do.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """A batch of samples; each tensor is int64 of shape (samples, longest).

        Returns:
            `input_ids`, `labels` and `attention_mask`; for packed samples `position_ids` instead of the mask: without
            one, transformers separates conversations where positions restart. With `flatten` also `cu_seq_lens_q` and
            `cu_seq_lens_k` (int32, conversations + 1), and `max_length_q` and `max_length_k` (int), without which
            each layer would compute them on the GPU and wait for it.
        """
        packed = "position_ids" in samples[0]
        if packed and self.flatten:
            samples = [{name: list(chain.from_iterable(item[name] for item in samples)) for name in samples[0]}]
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (longest - len(values))

        batch = {
            "input_ids": torch.tensor([padded(item["input_ids"], self.pad_token_id) for item in samples]),
            "labels": torch.tensor([padded(item["labels"], IGNORED) for item in samples]),
        }
        if packed:
            # Positions restart in the padding too, so that it counts as one more conversation.
            rows = [item["position_ids"] + list(range(longest - len(item["position_ids"]))) for item in samples]
            return batch | {"position_ids": torch.tensor(rows)} | (_boundaries(rows[0]) if self.flatten else {})
        mask = torch.tensor([padded([1] * len(item["input_ids"]), 0) for item in samples])
        return batch | {"attention_mask": mask}


def _boundaries(positions: list[int]) -> dict[str, Any]:
    """Where the conversations of a row begin, by the names of transformers' FlashAttentionKwargs."""
    starts = [index for index, position in enumerate(positions) if position == 0] + [len(positions)]
    cumulative = torch.tensor(starts, dtype=torch.int32)
    longest = max(end - start for start, end in pairwise(starts))
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative} | lengths
