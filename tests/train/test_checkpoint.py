"""Checkpoints of every family, ZeRO stage and mode: resumed, read by other software, merged, and used to generate."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import load_tensors
from peft import PeftModel
from reference_model import logits as reference_logits
from safetensors.torch import load_file
from training_runs import SAVED, STEPS, config_of, losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.config import to_yaml
from hynb.data import ChatDataset
from hynb.merge import merge_lora, verify_merge

ON_EXPERTS = {"use_lora": True, "lora_on_experts": True, "lora_dropout": 0.0}
CASES = {
    "hunyuan, ZeRO-3, full": (
        "hunyuan",
        {"deepspeed": "ds_zero3_no_offload", "gradient_checkpointing": True, "router_aux_loss_coef": 0.01},
    ),
    # Five packs, two steps per epoch: the resumed run starts in the middle of the second epoch.
    "hunyuan, ZeRO-3 offload, LoRA on experts, packing": (
        "hunyuan",
        {"deepspeed": "ds_zero3_offload", "packing": True, "data": "few", "eval_split": 0.2, "eval_steps": 2}
        | ON_EXPERTS,
    ),
    "v1_moe, ZeRO-2, full, grouped": (
        "hunyuan_v1_moe",
        {"gradient_accumulation_steps": 2, "data": "few", "group_by_length": True},
    ),
    "v1_moe, ZeRO-3, LoRA on experts": (
        "hunyuan_v1_moe",
        {"deepspeed": "ds_zero3_no_offload", "gradient_checkpointing": True, "packing": True} | ON_EXPERTS,
    ),
    "v1_dense, ZeRO-3, full": ("hunyuan_v1_dense", {"deepspeed": "ds_zero3_no_offload", "bf16": True}),
    "v1_dense, ZeRO-2, LoRA, a broken line": (
        "hunyuan_v1_dense",
        {"use_lora": True, "eval_data_file": "data", "data": "broken", "on_bad_sample": "skip"},
    ),
    "hy_v3, ZeRO-3, full": ("hy_v3", {"deepspeed": "ds_zero3_no_offload", "make_moe_param_leaf_module": True}),
    "hy_v3, ZeRO-2, LoRA on experts": ("hy_v3", {"gradient_checkpointing": True} | ON_EXPERTS),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, files, ranks, tmp_path_factory):
    """An uninterrupted run, and one in another folder that resumes from the first one's middle."""
    family, values = CASES[request.param]
    folder = tmp_path_factory.mktemp("runs")
    values = dict(values)
    values["train_data_file"] = str(files[values.pop("data", "data")])
    if "eval_data_file" in values:
        values["eval_data_file"] = str(files[values["eval_data_file"]])
    whole = ranks.train(config_of(files, family, folder / "whole", **values))
    # The base model need not be named again: the checkpoint knows it.
    values = {**values, "model_name_or_path": None}
    middle = str(whole.dir.checkpoint(SAVED))
    resumed = ranks.train(config_of(files, family, folder / "resumed", resume_from_checkpoint=middle, **values))
    return family, values, whole, resumed


def test_losses_after_a_resume_equal_the_uninterrupted_ones(case):
    _, _, whole, resumed = case
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > SAVED}
    assert len(set(losses(whole).values())) == STEPS


def test_the_run_folder_holds_everything_that_a_reader_needs(case):
    _, _, whole, _ = case
    status = whole.status()
    assert (status.state, status.global_step, status.max_steps, status.exit_code) == ("finished", STEPS, STEPS, 0)
    manifest = whole.reader.manifest()
    assert manifest["world_size"] == 2 and manifest["base"]["weight_bytes"] > 0
    assert manifest["versions"]["deepspeed"] and manifest["data_hash"]
    logs = [event for event in whole.events() if event["kind"] == "log"]
    assert all(event["tokens_per_second"] > 0 and event["grad_norm"] > 0 for event in logs)
    assert logs[-1]["tokens"] > logs[0]["tokens"] > 0
    assert logs[0]["learning_rate"] == pytest.approx(1e-2)
    assert 1e-3 < logs[-1]["learning_rate"] < 3e-3, "min_lr is an absolute rate"
    assert list(whole.dir.tensorboard.rglob("events.out.tfevents.*"))
    assert len(whole.dir.rank_logs()) == 2
    assert [path.name for path in whole.checkpoints()] == [f"checkpoint-{SAVED}", f"checkpoint-{STEPS}"]
    assert not whole.dir.saving.exists()


def test_rejected_lines_are_counted_and_kept(case):
    _, values, whole, _ = case
    counts = whole.reader.manifest()
    assert counts["data_lines"] == counts["data_samples"] + counts["data_rejected"]
    broken = values.get("on_bad_sample") == "skip"
    assert counts["data_rejected"] == whole.dir.rejected.exists() == broken
    if broken:
        (line,) = map(json.loads, whole.dir.rejected.read_text().splitlines())
        assert line["source"].endswith("broken.jsonl:2") and line["line"] == '{"messages": '


def test_the_evaluation_is_the_mean_loss_per_token(case, files):
    family, values, whole, _ = case
    evaluations = {event["global_step"]: event for event in whole.events() if event["kind"] == "eval"}
    if "eval_data_file" not in values:
        assert list(evaluations) == ([2, 4, 6] if "eval_split" in values else [])
        return
    assert list(evaluations) == [SAVED, STEPS]
    model = AutoModelForCausalLM.from_pretrained(files[family], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, whole.checkpoints()[-1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(files[family])
    total = tokens = 0
    for sample in ChatDataset(values["eval_data_file"], tokenizer, 256):
        ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    assert evaluations[STEPS]["eval_tokens"] == tokens
    assert evaluations[STEPS]["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_what_a_checkpoint_holds(case, files):
    family, values, whole, _ = case
    last = whole.checkpoints()[-1]
    if values.get("use_lora"):
        weights = load_file(last / "adapter_model.safetensors")
        assert not list(last.glob("model*.safetensors"))
        assert all("lora_" in name for name in weights)
        assert all(torch.any(weight != 0) for name, weight in weights.items() if "lora_B" in name), (
            "every adapter weight was trained"
        )
        assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(files[family])
        return
    trained = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(files[family], dtype=torch.float32).state_dict()
    assert trained.keys() == before.keys()
    assert not all(torch.equal(trained[name], before[name]) for name in before)
    assert load_file(last / "model.safetensors").keys() == load_file(files[family] / "model.safetensors").keys()
    for path in files[family].iterdir():
        assert (last / path.name).is_file(), f"{path.name} is copied too"
    if family == "hunyuan":
        written = json.loads((last / "config.json").read_text())
        assert written["auto_map"] and written["rope_scaling"]["alpha"] == 1000.0
        assert (last / "modeling_hunyuan.py").read_text() == (files[family] / "modeling_hunyuan.py").read_text()


def test_what_was_trained_merges_and_generates(case, files, tmp_path):
    family, values, whole, _ = case
    last = whole.checkpoints()[-1]
    ids = torch.arange(10, 22)[None]
    mask = torch.ones_like(ids)
    if values.get("use_lora"):
        adapted = AutoModelForCausalLM.from_pretrained(files[family], dtype=torch.float32)
        adapted = PeftModel.from_pretrained(adapted, last).eval()
        merge_lora(base_model_path=files[family], adapter_model_path=last, output_path=tmp_path / "merged")
        verify_merge(tmp_path / "merged")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    else:
        model = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
        if family == "hunyuan":
            # What the Trainer saved, read by the plain model under upstream's key names.
            config = json.loads((last / "config.json").read_text())
            expected = reference_logits(load_file(last / "model.safetensors"), config, ids[0])
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-3, atol=1e-3)
    limits = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answer = model.generate(ids, **limits)
    assert answer.shape == (1, 18)
    assert torch.equal(answer, model.generate(ids, use_cache=False, **limits))


@pytest.mark.parametrize("case", ["v1_moe, ZeRO-2, full, grouped"], indirect=True, scope="module")
def test_ranks_that_cannot_keep_the_global_batch_are_refused(case, tmp_path, files, ranks):
    family, values, whole, _ = case
    config = config_of(files, family, tmp_path / "run", **values)
    config = config.replace(resume_from_checkpoint=str(whole.dir.checkpoint(SAVED)), num_processes=3)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml", ranks=3)
    assert done.returncode == 2 and "3 ranks cannot make the global batch of " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("preset", ["ds_zero2_no_offload", "ds_zero3_no_offload"])
def test_module_states_have_no_weights_that_are_not_trained(preset, files, ranks, tmp_path):
    values = {"deepspeed": preset, "train_attention_params_only": True, "bf16": True}
    whole = ranks.train(config_of(files, "hy_v3", tmp_path / "whole", **values))
    middle = whole.dir.checkpoint(SAVED)
    states = [torch.load(path, weights_only=False) for path in sorted(middle.rglob("*_model_states.pt"))]
    assert states
    for state in states:
        assert any(".self_attn." in name for name in state["module"])
        # DeepSpeed leaves out one name of the tied embedding.
        others = {*state["buffer_names"], "lm_head.weight"}
        assert not [name for name in state["module"] if ".self_attn." not in name and name not in others]
        assert not state.get("frozen_param_fragments")
    values |= {"model_name_or_path": None, "resume_from_checkpoint": str(middle)}
    resumed = ranks.train(config_of(files, "hy_v3", tmp_path / "resumed", **values))
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > SAVED}
    ours, theirs = (load_tensors(run.checkpoints()[-1]) for run in (whole, resumed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
