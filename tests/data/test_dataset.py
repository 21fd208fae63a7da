"""Samples read by offset, and batches of them."""

from __future__ import annotations

import torch
from tiny import tiny_data

from hynb.data import ChatDataset, Collator, encode, read_conversations


def test_the_data_set_reads_each_line_by_its_offset(tokenizer, tmp_path):
    path = tiny_data(tmp_path / "train.jsonl", 12)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n"), encoding="utf-8")
    dataset = ChatDataset(path, tokenizer, 512)
    read = list(read_conversations(path))
    assert len(dataset) == len(read) == 12
    for index in (11, 0, 5):
        assert dataset.conversation(index) == read[index]
        assert dataset[index] == encode(read[index], tokenizer, 512)


def test_a_batch_is_padded_to_its_longest_sample():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Collator(pad_token_id=9)(samples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
