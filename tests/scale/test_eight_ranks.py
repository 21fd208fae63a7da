"""Eight ranks on one host: ZeRO-2 and -3, LoRA and full, saved, stopped, resumed to the last digit."""

from __future__ import annotations

import pytest
import torch
from adapters import load_tensors
from training_runs import SAVED, STEPS, config_of, losses

CASES = {
    "ZeRO-3, full, experts": ("hunyuan", {"deepspeed": "ds_zero3_offload", "make_moe_param_leaf_module": True}),
    "ZeRO-2, LoRA": ("hunyuan_v1_dense", {"deepspeed": "ds_zero2_no_offload", "use_lora": True, "bf16": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_of_eight_ranks_goes_on_as_if_it_had_not_ended(name, files, ranks, tmp_path):
    family, values = CASES[name]
    values = values | {"num_processes": 8}
    whole = ranks.train(config_of(files, family, tmp_path / "whole", **values))
    expected = losses(whole)
    assert list(expected) == list(range(1, STEPS + 1))
    assert all(len(event["memory_bytes_per_rank"]) == 8 for event in whole.events() if event["kind"] == "log")
    middle, last = whole.checkpoints()
    values |= {"resume_from_checkpoint": str(middle)}
    resumed = ranks.train(config_of(files, family, tmp_path / "resumed", **values))
    assert losses(resumed) == {step: loss for step, loss in expected.items() if step > SAVED}
    one, other = load_tensors(last), load_tensors(resumed.checkpoints()[-1])
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    before = load_tensors(middle)
    assert not all(torch.equal(one[key], before[key]) for key in one)
