"""Factors of adapters, which are read once however many tensors they change."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

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
    second = factors.read(path, "b")
    assert factors.read(path, "a") is first
    factors.read(path, "c")
    assert factors.read(path, "a") is first
    assert factors.read(path, "b") is not second, "b was used longest ago"


def test_threads_that_need_one_factor_read_it_once(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_file({"a": torch.arange(8.0).view(4, 2)}, path)
    factors, together = Factors(most_bytes=1 << 20), threading.Barrier(8)

    def read(_: int) -> torch.Tensor:
        together.wait()
        return factors.read(path, "a")

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(read, range(8)))
    assert all(result is results[0] for result in results)
    assert factors.read(path, "a", part=(0, 2)).tolist() == [[0, 1], [2, 3]]
    assert factors.read(path, "a", part=(1, 2)).tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize("rows", [(0, 6), (2, 5), (5, 6)])
@pytest.mark.parametrize("factor", [-0.5, 0.7])
@pytest.mark.parametrize("kind", ["low_rank", "expert", "replacement"])
def test_rows_are_those_of_the_whole_tensor(tmp_path, kind, factor, rows):
    path = tmp_path / "adapter.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 8), "B": (6, 2), "experts_A": (3 * 2, 8), "experts_B": (12, 2 * 3), "whole": (6, 8)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, path)
    before = torch.randn(6, 8, generator=generator)
    change = {
        "low_rank": LowRankChange(weights_file=path, down="A", up="B", factor=factor),
        "expert": ExpertChange(
            weights_file=path, down="experts_A", up="experts_B", factor=factor, expert=1, experts=3, rows=(6, 12)
        ),
        "replacement": Replacement(weights_file=path, key="whole"),
    }[kind]
    # PEFT's layout: B of an expert is every third column.
    up, down = tensors["experts_B"][6:12, 1::3], tensors["experts_A"][2:4]
    expected = {
        "low_rank": before + factor * tensors["B"] @ tensors["A"],
        "expert": before + factor * up @ down,
        "replacement": tensors["whole"],
    }[kind]
    read = Factors(1 << 20).read
    torch.testing.assert_close(change.apply(before, read), expected)
    values, scratch = before[slice(*rows), 2:8].clone(), torch.full((rows[1] - rows[0], 6), math.nan)
    scale = change.by_blocks(read)(values, rows[0], 2, scratch)
    torch.testing.assert_close(values, expected[slice(*rows), 2:8])
    if scale is not None:
        torch.testing.assert_close(scratch.abs() * scale, (expected - before)[slice(*rows), 2:8].abs())
    assert (scale is None) == (kind == "replacement")
