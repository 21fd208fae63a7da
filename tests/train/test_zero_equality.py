"""ZeRO over two ranks against plain PyTorch in one process: the same losses and gradient norms, step by step."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import forced_routing
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.config import Config
from hynb.data import ChatDataset, Collator, PackedDataset, SeededSampler, best_fit
from hynb.hunyuan_large.modeling import HunYuanLargeGate
from hynb.plan import zero

STEPS = 8
RATE = 2e-3
# Half of them use checkpointing, whose gradients through cross-layer attention must be those of the plain loop.
CASES = {
    "ZeRO-2, checkpointing": {"gradient_checkpointing": True},
    "ZeRO-2, optimizer offload": {"deepspeed": "ds_zero2_offload"},
    "ZeRO-3": {"deepspeed": "ds_zero3_no_offload"},
    "ZeRO-3, optimizer offload": {"deepspeed": "ds_zero3_optimizer_offload"},
    "ZeRO-3, parameter offload only": {"deepspeed": "ds_zero3_param_offload"},
    "ZeRO-3, reentrant checkpointing": {
        "deepspeed": "ds_zero3_no_offload",
        "gradient_checkpointing": True,
        "training_args": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    },
    "ZeRO-3, forced apart": {"deepspeed": "ds_zero3_no_offload", "gradient_checkpointing": True},
    "ZeRO-3, leaf, forced apart": {"deepspeed": "ds_zero3_no_offload", "make_moe_param_leaf_module": True},
    "ZeRO-3, parameter offload, forced apart": {"deepspeed": "ds_zero3_offload"},
    # transformers loads the weights: rank 0 reads them and sends them to the others.
    "ZeRO-3, a second partition (hpZ)": {"deepspeed": "hpz.json"},
    "ZeRO-2, packed": {"packing": True},
    "ZeRO-3, packed, checkpointing": {
        "packing": True,
        "deepspeed": "ds_zero3_no_offload",
        "gradient_checkpointing": True,
    },
}


@pytest.fixture(scope="module")
def reference(files):
    """A function of whether routing is forced and data packed: the plain loop's results, computed once."""
    return functools.cache(lambda forced, packed: plain_loop(files["hunyuan"], files["data"], forced, packed))


def plain_loop(folder: Path, data: Path, forced: bool, packed: bool) -> list[tuple[float, float]]:
    """Losses and gradient norms of eight steps of AdamW on batches of two samples, no DeepSpeed, no Trainer.

    Packs are two rows with transformers' dense mask.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset, collate = ChatDataset(data, tokenizer, 256), Collator(pad_token_id=tokenizer.pad_token_id)
    if packed:
        packs = best_fit([len(sample["input_ids"]) for sample in dataset], 256, seed=42)
        assert len(packs) < len(dataset)
        dataset = PackedDataset(dataset, packs)
    order = list(SeededSampler(len(dataset), 42))
    assert len(order) >= 2 * STEPS
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
def test_losses_equal_a_single_process(case, reference, files, ranks, tmp_path):
    forced = "forced" in case
    preset = zero.load("ds_zero3_no_offload")
    preset["zero_optimization"]["zero_hpz_partition_size"] = 2
    hpz = tmp_path / "hpz.json"
    hpz.write_text(json.dumps(preset))
    values = CASES[case] | ({"deepspeed": str(hpz)} if "hpZ" in case else {})
    config = Config(
        model_name_or_path=str(files["hunyuan"]),
        train_data_file=str(files["data"]),
        output_dir=str(tmp_path / "run"),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        save_strategy="no",
        max_seq_length=256,
        num_processes=2,
        **values,
    )
    events = ranks.train(config, before="forced_routing:force_expert_of_rank" if forced else "").events()
    logs = [event for event in events if event["kind"] == "log"]
    assert len(logs) == STEPS
    for event, (loss, norm) in zip(logs, reference(forced, "packed" in case), strict=True):
        assert abs(event["loss"] - loss) < 1e-5, (event["global_step"], event["loss"], loss)
        assert event["grad_norm"] == pytest.approx(norm, rel=1e-4), event["global_step"]
    if forced:
        routing = [event for event in events if event["kind"] == "moe"]
        assert len(routing) == STEPS
        assert all(max(event["max_share"]) < 0.9 for event in routing), "two experts share the tokens"
        assert all(event["dead"] == [2] * 4 for event in routing)
