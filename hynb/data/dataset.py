"""Training data: JSONL conversations to token ids, labels and batches, answers alone trained on."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hynb.data.files import (
    Conversation,
    Paths,
    find_files,
    parse_line,
    plain_file,
    without_mark,
)
from hynb.data.template import DEFAULT, IGNORED, LabelOptions, encode
from hynb.errors import DataError


class ChatDataset(torch.utils.data.Dataset):
    """Samples read by their offset and tokenised when they are asked for; never the whole file in memory.

    Args:
        paths: JSONL files as `find_files` takes them; `.gz` and `.zst` are unpacked into the cache once.
        max_seq_length: tokens; a longer sample is cut.
        options: what is trained on.
        rejected: places (file:line) that a check refused and that are left out.
        parameter: what gave the paths, named in messages.
    """

    def __init__(
        self,
        paths: Paths,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        *,
        options: LabelOptions = DEFAULT,
        rejected: Sequence[str] = (),
        parameter: str = "train_data_file",
    ) -> None:
        self.files = find_files(paths, parameter)
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.options = options
        self._plain = [plain_file(path) for path in self.files]
        # Twenty-two bytes a sample: a million lines are 22 MB.
        self._files, self._numbers = array("H"), array("Q")
        self._offsets, self._sizes = array("Q"), array("I")
        left_out = set(rejected)
        for file_number, path in enumerate(self._plain):
            self._index(file_number, path, left_out)

    def _index(self, file_number: int, path: Path, left_out: set[str]) -> None:
        try:
            with path.open("rb", buffering=1 << 20) as file:
                offset = 0
                for number, line in enumerate(file, 1):
                    size_bytes = len(line)
                    blank = line.isspace() or (number == 1 and not without_mark(line, 1).strip())
                    if not blank and not (left_out and f"{self.files[file_number]}:{number}" in left_out):
                        self._files.append(file_number)
                        self._numbers.append(number)
                        self._offsets.append(offset)
                        self._sizes.append(size_bytes)
                    offset += size_bytes
        except OSError as error:
            raise DataError(f"{self.files[file_number]}: cannot be read: {error.strerror}") from None

    def subset(self, indices: Sequence[int]) -> ChatDataset:
        """A data set of some of the samples; the files are not read again."""
        part = copy.copy(self)
        for name in ("_files", "_numbers", "_offsets", "_sizes"):
            values = getattr(self, name)
            setattr(part, name, array(values.typecode, (values[index] for index in indices)))
        return part

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return encode(self.conversation(index), self.tokenizer, self.max_seq_length, self.options)

    def line(self, index: int) -> bytes:
        """The bytes of one sample's line."""
        with self._plain[self._files[index]].open("rb") as file:
            file.seek(self._offsets[index])
            return without_mark(file.read(self._sizes[index]), self._numbers[index])

    def lines(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Place and bytes of the samples from start to stop, read in one go."""
        open_number, file = -1, None
        try:
            for index in range(start, stop):
                if self._files[index] != open_number:
                    if file:
                        file.close()
                    open_number = self._files[index]
                    file = self._plain[open_number].open("rb", buffering=1 << 20)
                if file.tell() != self._offsets[index]:
                    file.seek(self._offsets[index])
                yield self.place(index), without_mark(file.read(self._sizes[index]), self._numbers[index])
        finally:
            if file:
                file.close()

    def place(self, index: int) -> str:
        """Where a sample stands, as file:line."""
        return f"{self.files[self._files[index]]}:{self._numbers[index]}"

    def size_bytes(self, index: int) -> int:
        """The length of a sample's line."""
        return self._sizes[index]

    def conversation(self, index: int) -> Conversation:
        """The messages of one sample."""
        return parse_line(self.line(index), self.place(index))


@dataclass(kw_only=True)
class Collator:
    """Pads the samples of a batch on the right to its longest; packed samples keep their positions.

    flatten: packed samples of a batch are laid side by side in one row, which is how flash attention sees
        where each conversation begins.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, each batch × longest; `attention_mask` for plain samples, `position_ids` for
        packed ones: transformers finds the conversations from positions that restart, where no mask is given."""
        packed = "position_ids" in samples[0]
        if packed and self.flatten:
            samples = [{name: list(chain.from_iterable(s[name] for s in samples)) for name in samples[0]}]
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (longest - len(values))

        batch = {
            "input_ids": torch.tensor([padded(s["input_ids"], self.pad_token_id) for s in samples]),
            "labels": torch.tensor([padded(s["labels"], IGNORED) for s in samples]),
        }
        if packed:
            # The padding is one more conversation, which nobody attends to.
            rows = [s["position_ids"] + list(range(longest - len(s["position_ids"]))) for s in samples]
            return batch | {"position_ids": torch.tensor(rows)}
        return batch | {"attention_mask": torch.tensor([padded([1] * len(s["input_ids"]), 0) for s in samples])}
