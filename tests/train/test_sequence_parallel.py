"""Sequences that ranks share, beside one rank that has them whole: losses, gradient norms, evaluation, resume."""

from __future__ import annotations

import functools

import pytest
from training_runs import config_of

STEPS = 4
TWO, THREE = "ds_zero2_no_offload", "ds_zero3_no_offload"


@pytest.fixture(scope="module")
def run(files, ranks, tmp_path_factory):
    """A function that trains a family for four steps, each run once."""

    @functools.cache
    def train(family, *, ranks_per_row=1, replicas=1, **values):
        folder = tmp_path_factory.mktemp("run") / "run"
        given = {
            "num_processes": ranks_per_row * replicas,
            "sequence_parallel_size": ranks_per_row,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "eval_data_file": str(files["few"]),
            "eval_steps": STEPS // 2,
            "save_strategy": "no",
        }
        return ranks.train(config_of(files, family, folder, **(given | values)))

    return train


def of_kind(run, kind):
    return [event for event in run.events() if event["kind"] == kind]


def assert_equal(found, expected, *, steps=STEPS):
    """Loss, gradient norm, tokens and routing of each step, and the evaluations."""
    logs, expected_logs = of_kind(found, "log")[-steps:], of_kind(expected, "log")[-steps:]
    assert [event["global_step"] for event in logs] == list(range(STEPS - steps + 1, STEPS + 1))
    for event, other in zip(logs, expected_logs, strict=True):
        assert event["loss"] == pytest.approx(other["loss"], abs=1e-5), event["global_step"]
        assert event["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), event["global_step"]
        assert event["epoch"] == other["epoch"]
    if steps == STEPS:
        assert logs[-1]["tokens"] == expected_logs[-1]["tokens"], "padding does not count"
    routing, expected_routing = of_kind(found, "moe")[-steps:], of_kind(expected, "moe")[-steps:]
    assert len(routing) == len(expected_routing)
    for event, other in zip(routing, expected_routing, strict=True):
        for name in ("max_share", "min_share", "dead", "entropy"):
            assert event[name] == pytest.approx(other[name], abs=2e-4), (event["global_step"], name)
    evaluations, expected_evaluations = of_kind(found, "eval"), of_kind(expected, "eval")
    assert evaluations
    for event, other in zip(reversed(evaluations), reversed(expected_evaluations), strict=False):
        assert event["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-5)
        assert event["eval_tokens"] == other["eval_tokens"]


CASES = {
    "2 ranks, ZeRO-2": {"ranks_per_row": 2, "deepspeed": TWO},
    "2 ranks, ZeRO-3": {"ranks_per_row": 2, "deepspeed": THREE},
    "4 ranks, ZeRO-2": {"ranks_per_row": 4, "deepspeed": TWO, "gradient_checkpointing": True},
    "4 ranks, ZeRO-3": {"ranks_per_row": 4, "deepspeed": THREE, "gradient_checkpointing": True},
}


@pytest.mark.parametrize(
    ("family", "packing", "case"),
    [
        ("hunyuan", False, "4 ranks, ZeRO-2"),
        ("hunyuan", True, "2 ranks, ZeRO-2"),
        ("hunyuan", True, "4 ranks, ZeRO-3"),
        ("hunyuan_v1_moe", True, "2 ranks, ZeRO-3"),
        ("hunyuan_v1_moe", True, "4 ranks, ZeRO-2"),
        ("hunyuan_v1_dense", False, "4 ranks, ZeRO-3"),
        ("hunyuan_v1_dense", True, "2 ranks, ZeRO-2"),
        ("hunyuan_v1_dense", True, "4 ranks, ZeRO-2"),
        ("hy_v3", False, "4 ranks, ZeRO-2"),
        ("hy_v3", True, "2 ranks, ZeRO-3"),
        ("hy_v3", True, "4 ranks, ZeRO-3"),
    ],
)
def test_ranks_that_share_sequences_equal_one_rank(run, family, packing, case):
    """With fewer K and V heads than ranks, layers that share K and V, and lengths that no number of ranks divides."""
    assert_equal(run(family, packing=packing, **CASES[case]), run(family, packing=packing))


def test_groups_of_ranks_get_the_samples_of_as_many_ranks(run):
    """And balance the experts over whole sequences."""
    values = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": 0.5, "group_by_length": True}
    expected = run("hunyuan", replicas=2, **values)
    shared = {"ranks_per_row": 2, "deepspeed": THREE, "gradient_checkpointing": True, "dataloader_num_workers": 1}
    found = run("hunyuan", replicas=2, **shared, **values)
    assert_equal(found, expected)
    sizes = [item.reader.manifest()["global_batch_size"] for item in (expected, found)]
    assert sizes == [8, 8]


def test_an_adapter_and_a_resume_in_the_middle_of_an_epoch(run):
    values = {"use_lora": True, "lora_dropout": 0.0, "save_strategy": "steps", "save_steps": STEPS // 2}
    values |= {"ranks_per_row": 4, "deepspeed": THREE, "max_seq_length": 128}
    whole = run("hunyuan", **values)
    assert_equal(whole, run("hunyuan", use_lora=True, lora_dropout=0.0, max_seq_length=128))
    middle = str(whole.checkpoints()[0])
    assert middle.endswith(f"checkpoint-{STEPS // 2}")
    resumed = run("hunyuan", resume_from_checkpoint=middle, **values)
    assert of_kind(resumed, "resume")
    assert_equal(resumed, whole, steps=STEPS // 2)
