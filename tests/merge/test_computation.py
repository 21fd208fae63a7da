"""Tensors of several blocks and tasks, compared with the same arithmetic on whole tensors."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import save_file

from hynb.errors import MergeError
from hynb.merge import TORCH_DTYPES, read_shard
from hynb.merge.changes import ExpertChange, LowRankChange, Replacement
from hynb.merge.computation import computation
from hynb.merge.tensors import Buffers, same_bytes

EXPERTS, RANK = 3, 4


def whole_numbers(*shape, seed=0):
    """Products of these have the same bits in any order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def computed(entry, changes, dtype):
    """The result of a computation, as a vector, and its statistics."""
    made = bytearray(entry.size_bytes // TORCH_DTYPES[entry.dtype].itemsize * TORCH_DTYPES[dtype].itemsize)

    def take(offset, data):
        made[offset : offset + len(data)] = data

    with computation() as computing:
        change = computing.compute(entry, changes, dtype, take)
    return torch.frombuffer(made, dtype=TORCH_DTYPES[dtype]), change


def written(path, tensors):
    save_file(tensors, path)
    return {entry.name: entry for entry in read_shard(path).tensors}


# The second has several blocks across and down, with last ones of other sizes; the third rows larger than a task.
@pytest.mark.parametrize("shape", [(7, 5), (450, 5001), (3, 1_100_003)])
@pytest.mark.parametrize("factor", [2.0, -0.7])
@pytest.mark.parametrize(("dtype", "result"), [("BF16", "BF16"), ("BF16", "F32"), ("F16", "BF16"), ("F32", "F32")])
def test_blocks_have_the_bits_of_the_whole_tensor(tmp_path, shape, factor, dtype, result):
    rows, columns = shape
    up, down = whole_numbers(rows, RANK), whole_numbers(RANK, columns, seed=1)
    save_file({"A": down, "B": up}, tmp_path / "adapter.safetensors")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(TORCH_DTYPES[dtype])
    entry = written(tmp_path / "base.safetensors", {"weight": weight})["weight"]
    change = LowRankChange(weights_file=tmp_path / "adapter.safetensors", down="A", up="B", factor=factor)
    made, statistics = computed(entry, [change], result)
    delta = (up @ down) * factor
    assert torch.equal(made.view(shape), (weight.float() + delta).to(TORCH_DTYPES[result]))
    assert statistics.largest == delta.abs().max()
    assert statistics.mean == pytest.approx(delta.abs().double().mean().item(), rel=1e-5)
    # The second change's difference alone would be half of it.
    made, statistics = computed(entry, [change, change], result)
    assert torch.equal(made.view(shape), (weight.float() + delta + delta).to(TORCH_DTYPES[result]))
    assert statistics.largest == pytest.approx(2 * delta.abs().max().item(), rel=1e-5)


def test_each_expert_gets_its_own_factors(tmp_path):
    rows, columns = 700, 3000
    up, down = whole_numbers(2 * rows, RANK * EXPERTS), whole_numbers(EXPERTS * RANK, columns, seed=1)
    save_file({"A": down, "B": up}, tmp_path / "adapter.safetensors")
    tensors = {str(index): torch.randn(rows, columns).bfloat16() for index in range(EXPERTS)}
    found = written(tmp_path / "base.safetensors", tensors)
    for index in range(EXPERTS):
        change = ExpertChange(
            weights_file=tmp_path / "adapter.safetensors",
            **{"down": "A", "up": "B", "factor": 0.5},
            **{"expert": index, "experts": EXPERTS, "rows": (rows, 2 * rows)},
        )
        made, _ = computed(found[str(index)], [change], "BF16")
        # PEFT's layout: B of an expert is every third column.
        delta = up[rows:, index::EXPERTS] @ down[index * RANK : (index + 1) * RANK] * 0.5
        assert torch.equal(made.view(rows, columns), (tensors[str(index)].float() + delta).bfloat16())


def test_a_replaced_tensor_has_the_difference_to_the_base(tmp_path):
    before, after = whole_numbers(300, 4000), whole_numbers(300, 4000, seed=1)
    save_file({"whole": after}, tmp_path / "adapter.safetensors")
    entry = written(tmp_path / "base.safetensors", {"weight": before.bfloat16()})["weight"]
    made, change = computed(entry, [Replacement(weights_file=tmp_path / "adapter.safetensors", key="whole")], "BF16")
    assert torch.equal(made.view(300, 4000), after.bfloat16())
    assert (change.largest, change.elements) == (16, 1_200_000)
    assert change.mean == pytest.approx((after - before).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("place", [(0, 0), (449, 2500), (449, 5000)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_element_that_is_not_finite_is_found(tmp_path, place, value):
    whole = torch.zeros(450, 5001)
    whole[place] = value
    save_file({"whole": whole}, tmp_path / "adapter.safetensors")
    entry = written(tmp_path / "base.safetensors", {"weight": torch.zeros(450, 5001).bfloat16()})["weight"]
    with pytest.raises(MergeError, match="weight: the adapter makes elements of it NaN or infinite"):
        computed(entry, [Replacement(weights_file=tmp_path / "adapter.safetensors", key="whole")], "BF16")


@pytest.mark.parametrize("shape", [(1_200_003,), (3, 0), (2, 3, 5)])
@pytest.mark.parametrize("dtype", list(TORCH_DTYPES))
@pytest.mark.parametrize("result", ["F32", "F16", "BF16"])
def test_an_unchanged_tensor_is_rounded_once(tmp_path, shape, dtype, result):
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(shape, generator=generator) * 1e3).to(TORCH_DTYPES[dtype])
    entry = written(tmp_path / "base.safetensors", {"weight": values, "other": torch.ones(1)})["weight"]
    made = torch.empty(0)
    if values.numel():
        made, change = computed(entry, [], result)
        assert (change.largest, change.mean, change.elements) == (0, 0, values.numel())
    assert torch.equal(made.view(shape), values.to(TORCH_DTYPES[result]).view(shape))


def test_files_are_in_use_until_the_last_part_has_ended():
    ended = []

    def work(part):
        if part.start == 0:
            raise OSError
        time.sleep(0.2)
        ended.append(part)

    with computation() as computing, pytest.raises(OSError):
        try:
            computing.run(work, 5, 2)
        finally:
            assert sorted(ended, key=lambda part: part.start) == [range(2, 4), range(4, 5)]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 17])
def test_every_byte_is_compared(length):
    content = bytearray(range(length))
    assert same_bytes(memoryview(content), memoryview(bytearray(content)))
    assert not same_bytes(memoryview(content), memoryview(content + b"\0"))
    for place in range(length):
        changed = bytearray(content)
        changed[place] ^= 1
        assert not same_bytes(memoryview(content), memoryview(changed)), place


def test_buffers_of_one_name_share_their_memory():
    buffers = Buffers()
    first = buffers.get("a", 8, torch.float32)
    assert buffers.get("a", 4, torch.float32).data_ptr() == first.data_ptr()
    assert buffers.get("b", 4, torch.float32).data_ptr() != first.data_ptr()
    assert buffers.get("a", 4, torch.bfloat16).dtype == torch.bfloat16
    larger = buffers.matrix("a", torch.Size((4, 5)))
    assert larger.shape == (4, 5)
    assert buffers.matrix("a", torch.Size((4, 5))) is larger
