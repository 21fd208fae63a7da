"""Eight ranks on one host: ZeRO-2 and -3, LoRA and full; saved, resumed and stopped on request, to the last digit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import load_tensors
from training_runs import STEPS, config_of, losses

RANKS, SAVED, STOPPED = 8, 2, 4
CASES = {
    "ZeRO-3, full, experts": ("hunyuan", {"deepspeed": "ds_zero3_offload", "make_moe_param_leaf_module": True}),
    "ZeRO-2, LoRA": ("hunyuan_v1_dense", {"deepspeed": "ds_zero2_no_offload", "use_lora": True, "bf16": True}),
}


def optimizer_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors that the ranks have saved of their optimizers."""

    def tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from tensors(f"{name}/{key}", item)

    paths = sorted(checkpoint.glob("global_step*/*optim_states.pt"))
    assert len(paths) == RANKS, "one of each rank"
    return dict(pair for path in paths for pair in tensors(path.name, torch.load(path, weights_only=False)))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_and_stopped_run_of_eight_ranks_is_where_an_undisturbed_one_was(name, files, ranks, tmp_path):
    """It is asked to stop while it trains; what it saves then, another run goes on from as from any checkpoint."""
    family, values = CASES[name]
    values = values | {"num_processes": RANKS, "save_steps": SAVED}
    whole = ranks.train(config_of(files, family, tmp_path / "whole", **values))
    expected = losses(whole)
    assert list(expected) == list(range(1, STEPS + 1))
    assert all(len(event["memory_bytes_per_rank"]) == RANKS for event in whole.events() if event["kind"] == "log")
    first, middle, _ = whole.checkpoints()
    values |= {"resume_from_checkpoint": str(first), "save_steps": STEPS}
    config = config_of(files, family, tmp_path / "resumed", **values)
    stopped = ranks.train(config, before="training_runs:stop_after_step_3")
    assert stopped.status().state == "stopped"
    assert losses(stopped) == {step: loss for step, loss in expected.items() if SAVED < step <= STOPPED}
    (saved,) = stopped.checkpoints()
    assert saved.name == middle.name == f"checkpoint-{STOPPED}"
    assert_same(load_tensors(saved), load_tensors(middle))
    assert_same(optimizer_tensors(saved), optimizer_tensors(middle))
    before, after = load_tensors(first), load_tensors(saved)
    assert not all(torch.equal(before[key], after[key]) for key in before)
