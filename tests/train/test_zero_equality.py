"""ZeRO over two ranks against plain PyTorch in one process: the same losses and gradient norms, step by step."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import forced_routing
import pytest
import torch
from tiny import tiny_data, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.cluster import free_port
from hynb.config import Config, to_yaml
from hynb.data import ChatDataset, Collator, SeededSampler
from hynb.hunyuan_large.modeling import HunYuanLargeGate
from hynb.launch import attach

STEPS = 10
RATE = 2e-3
# Checkpointing goes with half of them: its gradients through CLA must be those of the plain loop.
CASES = {
    "ZeRO-2, checkpointing": {"gradient_checkpointing": True},
    "ZeRO-3": {"deepspeed": "ds_zero3_no_offload"},
    "ZeRO-3, reentrant checkpointing": {
        "deepspeed": "ds_zero3_no_offload",
        "gradient_checkpointing": True,
        "training_args": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    },
    "ZeRO-3, forced apart": {"deepspeed": "ds_zero3_no_offload", "gradient_checkpointing": True},
    "ZeRO-3, leaf, forced apart": {"deepspeed": "ds_zero3_no_offload", "make_moe_param_leaf_module": True},
    "ZeRO-3, parameter offload, forced apart": {"deepspeed": "ds_zero3_offload"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    return tiny_model(folder / "model"), tiny_data(folder / "train.jsonl")


@pytest.fixture(scope="module")
def reference(files):
    """By whether the routing is forced: what the plain loop finds, computed once."""
    return functools.cache(lambda forced: plain_loop(*files, forced))


def plain_loop(folder: Path, data: Path, forced: bool) -> list[tuple[float, float]]:
    """Losses and gradient norms of ten steps of AdamW on batches of two samples, no DeepSpeed, no Trainer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset, collate = ChatDataset(data, tokenizer, 256), Collator(pad_token_id=tokenizer.pad_token_id)
    order = list(SeededSampler(len(dataset), 42))
    plain = HunYuanLargeGate.forward
    if forced:
        # The batch's first row is rank 0's sample, its second rank 1's.
        forced_routing.force(lambda count: (torch.arange(count) >= count // 2).long())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    found = []
    try:
        for step in range(STEPS):
            batch = collate([dataset[index] for index in order[2 * step : 2 * step + 2]])
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.item(), norm.item()))
    finally:
        HunYuanLargeGate.forward = plain
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_a_single_process(case, reference, files, tmp_path):
    forced = "forced" in case
    expected = reference(forced)
    config = Config(
        model_name_or_path=str(files[0]),
        train_data_file=str(files[1]),
        output_dir=str(tmp_path / "run"),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        save_strategy="no",
        max_seq_length=256,
        num_processes=2,
        **CASES[case],
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    entry = [Path(forced_routing.__file__)] if forced else ["--module", "hynb.train_entry"]
    done = subprocess.run([*runner, *entry, tmp_path / "run.yaml"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    logs = [event for event in attach(tmp_path / "run").events() if event["kind"] == "log"]
    assert len(logs) == STEPS
    for event, (loss, norm) in zip(logs, expected, strict=True):
        assert abs(event["loss"] - loss) < 1e-5, (event["global_step"], event["loss"], loss)
        assert event["grad_norm"] == pytest.approx(norm, rel=1e-4), event["global_step"]
    shares = [event["max_share"] for event in attach(tmp_path / "run").events() if event["kind"] == "moe"]
    if forced:
        assert all(max(of_layer) < 0.9 for of_layer in shares), "two experts share the tokens"
        assert all(event["dead"] == [2] * 4 for event in attach(tmp_path / "run").events() if event["kind"] == "moe")
