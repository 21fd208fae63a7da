"""Data sets and batches: JSONL conversations to token ids and labels, of which only answers are trained on."""

from __future__ import annotations

import contextlib
import copy
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hynb.data.encoding import DEFAULT, IGNORED, LabelOptions, encode, up_to_answer
from hynb.data.files import Conversation, Paths, find_files, seekable_file, without_bom
from hynb.data.records import parse_line
from hynb.errors import DataError


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
        # 24 bytes per sample: file, line number, offset and size in bytes, and the answer that ends it (0: all).
        self._files, self._numbers = array("H"), array("Q")
        self._offsets, self._sizes = array("Q"), array("I")
        self._answers = array("H")
        left_out = set(rejected)
        for file_number, path in enumerate(self._seekable):
            self._index(file_number, path, left_out)

    def _index(self, file_number: int, path: Path, left_out: set[str]) -> None:
        try:
            with path.open("rb", buffering=1 << 20) as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    size_bytes = len(line)
                    blank = line.isspace() or (number == 1 and not without_bom(line, 1).strip())
                    if not blank and not (left_out and f"{self.files[file_number]}:{number}" in left_out):
                        self._files.append(file_number)
                        self._numbers.append(number)
                        self._offsets.append(offset)
                        self._sizes.append(size_bytes)
                        self._answers.append(0)
                    offset += size_bytes
        except OSError as error:
            raise DataError(f"{self.files[file_number]}: cannot be read: {error.strerror}") from None

    def subset(self, indices: Sequence[int]) -> ChatDataset:
        """A data set of the samples with these indices; the files are not read again."""
        part = copy.copy(self)
        for name in ("_files", "_numbers", "_offsets", "_sizes", "_answers"):
            values = getattr(self, name)
            setattr(part, name, array(values.typecode, (values[index] for index in indices)))
        return part

    def with_answers(self, lines: Sequence[int], answers: Sequence[int]) -> ChatDataset:
        """A data set of parts of the lines, for `split_turns`.

        Args:
            lines: for each sample, the index of its line.
            answers: for each sample, the number of the answer that ends it, from 1; 0 for the whole line.
        """
        part = self.subset(lines)
        part._answers = array("H", answers)
        return part

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        assert self.tokenizer is not None and self.max_seq_length is not None
        return encode(
            self.conversation(index), self.tokenizer, self.max_seq_length, self.options, checked=self.checked
        )

    def line(self, index: int) -> bytes:
        """The bytes of a sample's line."""
        with self._seekable[self._files[index]].open("rb") as file:
            file.seek(self._offsets[index])
            return without_bom(file.read(self._sizes[index]), self._numbers[index])

    def lines(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Location and bytes of the samples from start to stop, read sequentially."""
        with contextlib.ExitStack() as stack:
            file_number, file = -1, None
            for index in range(start, stop):
                if file is None or self._files[index] != file_number:
                    stack.close()
                    file_number = self._files[index]
                    file = stack.enter_context(self._seekable[file_number].open("rb", buffering=1 << 20))
                if file.tell() != self._offsets[index]:
                    file.seek(self._offsets[index])
                yield self.location(index), without_bom(file.read(self._sizes[index]), self._numbers[index])

    def location(self, index: int) -> str:
        """A sample's location as file:line."""
        return f"{self.files[self._files[index]]}:{self._numbers[index]}"

    def size_bytes(self, index: int) -> int:
        """The size of a sample's line."""
        return self._sizes[index]

    def conversation(self, index: int) -> Conversation:
        """The messages of a sample.

        Raises:
            DataError: the line is invalid.
        """
        whole = parse_line(self.line(index), self.location(index))
        part = up_to_answer(whole, self._answers[index]) if self._answers[index] else whole
        assert part is not None, "an answer that is not trained on makes no sample"
        return part


@dataclass(kw_only=True)
class Collator:
    """Pads the samples of a batch on the right to the longest one.

    Args:
        flatten: packed samples of a batch are concatenated to one row, which is how transformers tells flash
            attention where each conversation begins.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """A batch of samples; each tensor is int64 of shape (samples, longest).

        Returns:
            `input_ids`, `labels` and `attention_mask`; for packed samples `position_ids` instead of the mask: without
            one, transformers separates conversations where positions restart.
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
            return batch | {"position_ids": torch.tensor(rows)}
        mask = torch.tensor([padded([1] * len(item["input_ids"]), 0) for item in samples])
        return batch | {"attention_mask": mask}
