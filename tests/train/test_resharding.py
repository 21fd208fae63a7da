"""Resuming with another number of ranks, ZeRO stage or offload: the losses stay those of the undisturbed run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import tiny_data
from training_runs import config_of, losses

from hynb.config import Config

# The checkpoint is in the middle of the second epoch of three steps.
SAVED, STEPS = 4, 8
# Samples of a global batch: 1, 2, 3 and 4 ranks can make it.
SAMPLES = 12


def config(files, folder: Path, ranks: int, **values) -> Config:
    """A run on a number of ranks, with checkpoints."""
    # Whole steps in every epoch: ranks fill up the last one, each number of ranks with other samples.
    data = {"train_data_file": str(tiny_data(folder.with_suffix(".jsonl"), 3 * SAMPLES))}
    steps = data | {
        "max_steps": STEPS,
        "save_steps": SAVED,
        "save_total_limit": None,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
    }
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": SAMPLES // ranks}
    # Both of AdamW's groups decay differently, as those of a real run do.
    precise = {"bf16": False, "lora_dropout": 0.0, "weight_decay": 0.1}
    return config_of(files, "hunyuan_v1_dense", folder, num_processes=ranks, **(steps | batch | precise | values))


@pytest.mark.parametrize(
    ("lora", "saved", "resumed"),
    [
        (
            False,
            (2, "zero3_no_offload"),
            [(1, "zero3_no_offload"), (3, "zero3_no_offload"), (1, "zero2_offload")],
        ),
        (
            False,
            (2, "zero2_no_offload"),
            [(3, "zero2_no_offload"), (4, "zero3_offload")],
        ),
        (True, (4, "zero3_no_offload"), [(2, "zero3_no_offload"), (1, "zero2_no_offload")]),
    ],
)
def test_losses_are_those_of_the_undisturbed_run(files, ranks, tmp_path, lora, saved, resumed):
    before = config(files, tmp_path / "before", saved[0], use_lora=lora, deepspeed=f"ds_{saved[1]}")
    expected = losses(ranks.train(before))
    for number, preset in resumed:
        folder = tmp_path / f"{number}_{preset}"
        shutil.copytree(tmp_path / "before", folder)
        # As the user has it: the same Config, on other hardware.
        after = before.replace(
            output_dir=str(folder),
            num_processes=number,
            deepspeed=f"ds_{preset}",
            resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"),
        )
        run = ranks.train(after)
        (event,) = [event for event in run.events() if event["kind"] == "resume"]
        assert event["global_step"] == SAVED and event["world_size"] == number
        found = losses(run)
        assert len(found) == STEPS
        # The events of the steps that the first run had trained come before those of the resumed one.
        difference = max(abs(found[step] - expected[step]) for step in range(SAVED + 1, STEPS + 1))
        print(f"{saved} to {number, preset}, {'LoRA' if lora else 'full'}: {difference:.1e}")
        assert difference < 1e-4
