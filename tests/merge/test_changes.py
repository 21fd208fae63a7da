"""Factors of adapters, which are read once however many tensors they change."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hynb.merge.changes import ExpertChange, Factors, LowRankChange, Replacement


def test_factors_are_read_once_and_the_oldest_are_dropped(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file({name: torch.full((4, 4), float(index)).half() for index, name in enumerate("abc")}, path)
    factors = Factors(most_bytes=2 * 64)
    first = factors.read(path, "a", lambda tensor: tensor + 1)
    assert first.dtype == torch.float32 and first[0, 0] == 1
    factors.read(path, "b")
    assert factors.read(path, "a") is first
    factors.read(path, "c")
    path.unlink()
    assert factors.read(path, "a") is first, "b was used longest ago"
    with pytest.raises(FileNotFoundError):
        factors.read(path, "b")


@pytest.mark.parametrize("rows", [(0, 6), (2, 5), (5, 6)])
@pytest.mark.parametrize("kind", ["low_rank", "expert", "replacement"])
def test_rows_are_those_of_the_whole_tensor(tmp_path, kind, rows):
    path = tmp_path / "adapter.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 8), "B": (6, 2), "experts_A": (3 * 2, 8), "experts_B": (12, 2 * 3), "whole": (6, 8)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, path)
    before = torch.randn(6, 8, generator=generator)
    change = {
        "low_rank": LowRankChange(weights_file=path, down="A", up="B", factor=0.5),
        "expert": ExpertChange(
            weights_file=path, down="experts_A", up="experts_B", factor=0.5, expert=1, experts=3, rows=(6, 12)
        ),
        "replacement": Replacement(weights_file=path, key="whole"),
    }[kind]
    # PEFT's layout: B of an expert is every third column.
    up, down = tensors["experts_B"][6:12, 1::3], tensors["experts_A"][2:4]
    expected = {
        "low_rank": before + 0.5 * tensors["B"] @ tensors["A"],
        "expert": before + 0.5 * up @ down,
        "replacement": tensors["whole"],
    }[kind]
    read = Factors(1 << 20).read
    torch.testing.assert_close(change.apply(before, read), expected)
    values, scratch = before[slice(*rows)].clone(), torch.empty(rows[1] - rows[0], 8)
    change.apply_to_rows(values, read, slice(*rows), scratch)
    torch.testing.assert_close(values, expected[slice(*rows)])
    if change.leaves_difference:
        torch.testing.assert_close(scratch, (expected - before)[slice(*rows)])
