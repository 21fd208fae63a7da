"""Steps that are not finite in real runs: stopped with samples and module, or left out; and losses that spike."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from faults.breaking import MARK
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from training_runs import config_of, losses

from hynb.config import to_yaml
from hynb.data import ChatDataset, SeededSampler
from hynb.errors import RankError
from hynb.launch import attach
from hynb.runs import RunReader, RunWriter, notice_line
from hynb.train.step_samples import StepSamples
from hynb.train.step_watch import SPIKE_LEAST, StepWatch, spike

FAMILY = "hunyuan_v1_dense"
MARKED_LINE = 6
# With the seed of these runs the marked line is in this step, on two ranks with two samples each.
BAD = 2


@pytest.fixture(scope="module")
def marked(files, tmp_path_factory) -> dict:
    """The files of a run; one line of the data makes a layer's output NaN."""
    lines = files["data"].read_text().splitlines()
    sample = json.loads(lines[MARKED_LINE - 1])
    sample["messages"][-1]["content"] += f" {MARK}."
    lines[MARKED_LINE - 1] = json.dumps(sample)
    path = tmp_path_factory.mktemp("marked") / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return files | {"data": path}


def failed(ranks, config, before: str = "nan_in_a_layer"):
    """The status and the first failure record of a run that ends with a failure."""
    path = Path(f"{config.output_dir}.yaml")
    path.write_text(to_yaml(config))
    done = ranks.run(path, ranks=config.num_processes, before=f"faults.breaking:{before}")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    run = attach(config.output_dir)
    return run.status(), run.dir.failures()[0]


def weights(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.dir.checkpoint(step) / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_nan_stops_with_sample_and_module_and_the_run_goes_on_without_the_step(marked, ranks, tmp_path):
    # The checkpoint of the step before is still being written when all ranks end.
    values = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1, "async_save": True}
    config = config_of(marked, FAMILY, tmp_path / "run", **values)
    status, record = failed(ranks, config)
    assert (status.state, status.global_step, record["rank"]) == ("failed", BAD - 1, 1)
    assert record["host"] == socket.gethostname()
    place = f"{marked['data']}:{MARKED_LINE}"
    assert f"step {BAD}: the loss of rank 1 on {record['host']} is nan" in status.reason
    assert f"Samples: {place}. The output of model.layers.1.mlp is the first that is not finite" in status.reason
    assert [path.name for path in attach(config.output_dir).checkpoints()] == [f"checkpoint-{BAD - 1}"]

    before = "faults.breaking:nan_in_a_layer"
    resumed = ranks.train(config.replace(on_nan="skip", resume_from_checkpoint="last"), before=before)
    (event,) = [event for event in resumed.events() if event["kind"] == "skipped"]
    assert (event["global_step"], event["ranks"], event["count"]) == (BAD, [1], 1) and place in event["samples"]
    assert resumed.status().skipped_steps == 1 and "1 step left out" in str(resumed.status())
    assert same(weights(resumed, BAD - 1), weights(resumed, BAD)), "nothing has changed in the step"
    assert not same(weights(resumed, BAD), weights(resumed, BAD + 1))
    found = losses(resumed)
    assert [step for step, loss in found.items() if not math.isfinite(loss)] == [BAD]

    whole = ranks.train(config.replace(on_nan="skip", output_dir=str(tmp_path / "whole")), before=before)
    assert {step: loss for step, loss in losses(whole).items() if step != BAD} == {
        step: loss for step, loss in found.items() if step != BAD
    }
    assert same(weights(whole, 4), weights(resumed, 4))


def test_a_step_is_left_out_without_zero_too(marked, ranks, tmp_path):
    """DeepSpeed's stage 0 in float32 applies whatever gradient there is, and shows no norm."""
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 0}} | auto))
    values = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1, "logging_steps": 2}
    config = config_of(marked, FAMILY, tmp_path / "run", deepspeed=str(tmp_path / "ds.json"), on_nan="skip", **values)
    run = ranks.train(config, before="faults.breaking:nan_in_a_layer")
    assert same(weights(run, BAD - 1), weights(run, BAD)) and not same(weights(run, BAD), weights(run, BAD + 1))
    assert all(math.isfinite(loss) for loss in losses(run).values()), "the mean of the steps that count"
    rates = {event["global_step"]: event["learning_rate"] for event in run.events() if event["kind"] == "log"}
    # Half of the cosine from 1e-2 to 1e-3 over 4 steps, after 2 steps that count.
    assert rates[4] == pytest.approx(5.5e-3), "the schedule has waited too"


def test_under_zero_3_a_conversation_of_a_pack_is_named(marked, ranks, tmp_path):
    values = {"deepspeed": "ds_zero3_no_offload", "packing": True, "gradient_accumulation_steps": 2}
    status, _ = failed(ranks, config_of(marked, FAMILY, tmp_path / "run", **values))
    assert f"Samples: {marked['data']}:{MARKED_LINE}. The output of model.layers.1.mlp is" in status.reason


def test_a_gradient_that_is_not_finite_is_followed_back(marked, ranks, tmp_path):
    config = config_of(marked, FAMILY, tmp_path / "run", num_processes=1, use_lora=True, max_steps=20)
    status, _ = failed(ranks, config, "nan_in_a_gradient")
    assert "the loss is finite, and the gradient is not" in status.reason
    assert f"Samples: {marked['data']}:{MARKED_LINE}." in status.reason
    assert "model.layers.1.mlp" in status.reason and "is the first that is not finite" in status.reason


@pytest.mark.parametrize("size", [2, 3])
def test_the_samples_of_a_step_are_those_that_accelerate_deals_out(files, size):
    """The last step of an epoch too, which begins the order anew."""
    dataset = ChatDataset([files["data"]], None, None)
    sampler = SeededSampler(len(dataset), 5)
    sampler.set_epoch(1)
    of_rank = [list(BatchSamplerShard(BatchSampler(sampler, size, drop_last=False), 4, rank)) for rank in range(4)]
    samples = StepSamples(dataset, sampler, micro_batch_size=size, accumulation=2, replicas=4)
    steps = -(-len(of_rank[0]) // 2)
    for rank in range(4):
        for number, batch in enumerate(of_rank[rank]):
            found = samples.micro_batch(steps + number // 2, number % 2, rank)
            assert found == [[dataset.location(index)] for index in batch]
    assert sorted(samples.step(0)) == sorted(
        dataset.location(index) for batches in of_rank for batch in batches[:2] for index in batch
    )


def test_a_spike_is_far_above_what_is_usual():
    before = [2.0 + 0.1 * (number % 3) for number in range(SPIKE_LEAST)]
    found = spike(5.0, before)
    assert found and (found.usual, round(found.limit, 6)) == (2.1, 2.9)
    assert spike(2.85, before) is None, "within 8 deviations"
    assert spike(5.0, before[1:]) is None, "too few to know"
    assert spike(2.15, [2.0] * SPIKE_LEAST) is None, "within a tenth, where losses are all alike"
    assert spike(2.3, [math.nan] * 9 + [2.0] * SPIKE_LEAST) is not None
    assert spike(math.nan, before) is None and spike(1.0, before) is None


@pytest.mark.parametrize(
    ("resumed_after", "losses_after", "jumps"),
    [
        (6, [2.0, 2.1, 2.0], False),
        (6, [2.9, 2.0, 2.1], False),
        (6, [2.9, 2.8, 3.0, 2.9], True),
        (0, [9.0] * 3, False),
    ],
    ids=["as before", "one spike", "all above", "a new run"],
)
def test_losses_that_jump_at_a_resume_are_reported_once(tmp_path, resumed_after, losses_after, jumps):
    writer, logged = RunWriter(tmp_path), [2.0, 2.1, 2.2, 2.0, 2.1, 2.0][:resumed_after]
    samples = StepSamples(None, None, micro_batch_size=1, accumulation=1, replicas=1)  # pyright: ignore
    watch = StepWatch(on_nan="stop", on_spike="mark", samples=samples, writer=writer)
    watch.resumed(resumed_after)
    for loss in losses_after:
        watch.look_for_spike(loss, logged, len(logged) + 1)
        logged.append(loss)
    events = [event for event in RunReader(tmp_path).events() if event["kind"] == "loss_jump"]
    assert len(events) == jumps
    if jumps:
        assert (events[0]["global_step"], events[0]["losses"]) == (9, [2.9, 2.8, 3.0])
        assert notice_line(events[0]).startswith(
            "step 9: the first losses after the resume, [2.9, 2.8, 3.0], are far"
        )


def test_overflow_of_float16_that_does_not_recover_ends_the_run():
    """With DeepSpeed's own loss scaler at its minimum; float16 does not run on every CPU."""
    scaler = DynamicLossScaler(1.0, 1000, 1.0, 1, False)
    optimizer = SimpleNamespace(loss_scaler=scaler, overflow=True)
    engine = SimpleNamespace(optimizer=optimizer, get_global_grad_norm=lambda: math.inf, fp16_enabled=lambda: True)
    samples = StepSamples(None, None, micro_batch_size=1, accumulation=1, replicas=1)  # pyright: ignore
    watch = StepWatch(on_nan="stop", on_spike="mark", samples=samples, writer=None)
    watch.attach(engine, None)
    with pytest.raises(RankError, match=r"step 5: the gradient has overflowed float16 in 5 steps in a row.*bf16"):
        for step in range(20):
            watch.begin({}, first=True)
            watch.marked(torch.tensor(1.0))
            assert not watch.end(engine, step, None, None)  # pyright: ignore
