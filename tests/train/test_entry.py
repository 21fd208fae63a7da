"""The training entry: upstream's command line, no launcher, its phases, and mistakes refused before training."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need
from safetensors.torch import load_file, save_file
from training_runs import config_of, losses
from transformers import AutoModelForCausalLM

from hynb.cluster import free_port
from hynb.config import to_yaml
from hynb.launch import attach


def test_the_command_line_of_upstreams_script_with_a_random_model(files, tmp_path):
    """`deepspeed SCRIPT --flags` as in upstream's train.sh, with MoE leaves under ZeRO-3."""
    entry = Path(__file__).resolve().parents[2] / "hynb" / "train_entry.py"
    flags = f"""--do_train --tokenizer_name_or_path {files["hunyuan"]} --train_data_file {files["data"]}
    --deepspeed ds_zero3_offload_no_auto --output_dir {tmp_path / "out"} --overwrite_output_dir
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --gradient_checkpointing
    --lr_scheduler_type cosine_with_min_lr --logging_steps 1 --max_steps 2 --save_steps 100
    --learning_rate 1e-3 --min_lr 1e-4 --warmup_ratio 0.01 --save_strategy steps --save_safetensors False
    --hidden_size 32 --intermediate_size 48 --num_layers 4 --num_attention_heads 4 --num_key_value_heads 2
    --num_experts 4 --moe_topk 1 --use_cla --cla_share_factor 2 --use_mixed_mlp_moe --num_shared_expert 1
    --use_qk_norm --tie_word_embeddings --make_moe_param_leaf_module --use_flash_attn --bf16
    --model_max_length 256 --max_seq_length 256 --evaluation_strategy no --logging_dir elsewhere"""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    done = subprocess.run(
        [deepspeed, "--num_gpus", "2", "--master_port", str(free_port()), entry, *flags.split()],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for line in ("RANDOM WEIGHTS", "sdpa is used instead", "eval_strategy", "tensorboard"):
        assert line in done.stdout, line
    run = attach(tmp_path / "out")
    assert run.status().state == "finished" and len(losses(run)) == 2
    last = AutoModelForCausalLM.from_pretrained(run.checkpoints()[-1])
    assert last.config.num_experts == 4 and last.dtype == torch.bfloat16


def test_one_process_without_a_launcher(files, tmp_path):
    config = config_of(files, "hunyuan", tmp_path / "run", max_steps=1, use_lora=True, num_processes=None)
    (tmp_path / "run.yaml").write_text(to_yaml(config.replace(hidden_size=64)) + "logging_dir: elsewhere\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "RANK"))}
    command = [sys.executable, "-m", "hynb.train_entry", tmp_path / "run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    run = attach(tmp_path / "run")
    assert run.status().state == "finished"
    notes = run.reader.manifest()["notes"]
    lines = [line.removeprefix("hynb: ") for line in done.stdout.splitlines() if line.startswith("hynb: ")]
    assert notes == lines[: len(notes)], "the manifest has what was printed until then"
    ignored = "ignored, because the model folder decides them: hidden_size"
    for text in ("logging_dir is ignored", "40 samples, 0 rejected", ignored, "parameters are trained"):
        assert sum(text in note for note in notes) == 1, text


@pytest.mark.parametrize(
    ("family", "preset", "use_lora"),
    [("hunyuan", "ds_zero2_no_offload", True), ("hunyuan_v1_dense", "ds_zero3_no_offload", False)],
)
def test_the_phases_of_a_run(family, preset, use_lora, files, ranks, tmp_path):
    """And the bytes that were loaded: the whole model."""
    values = {"max_steps": 2, "save_steps": 2, "eval_split": 0.2, "deepspeed": preset, "use_lora": use_lora}
    config = config_of(files, family, tmp_path / "run", **values)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml", ranks=2, before="training_runs:print_phases")
    assert done.returncode == 0, done.stderr
    before = ["starting", "checking data", "meeting", "loading", "training"]
    during = ["evaluating", "training", "saving", "training"]
    assert re.findall(r"^phase: (.+)$", done.stdout, re.MULTILINE) == before + during, "of rank 0 alone"
    (loading,) = re.findall(r"^phase: loading\n(.*?)^phase: training$", done.stdout, re.MULTILINE | re.DOTALL)
    loaded = re.findall(r"^progress: (\S+) of (\S+) GB, \S+ GB/s$", loading, re.MULTILINE)[-1]
    weights = load_file(files[family] / "model.safetensors").values()
    size = sum(weight.nbytes for weight in weights) / 1e9
    assert [float(value) for value in loaded] == [pytest.approx(size, rel=0.01)] * 2
    status = attach(tmp_path / "run").status()
    assert (status.state, status.phase) == ("finished", None)
    heartbeat = json.loads((tmp_path / "run" / "heartbeat").read_text())
    assert (heartbeat["phase"], heartbeat["global_step"]) == ("training", 2)


def test_data_workers_change_no_loss(files, ranks, tmp_path):
    found = []
    for workers in (0, 2):
        values = {"max_steps": 3, "eval_split": 0.2, "eval_steps": 2, "dataloader_num_workers": workers}
        config = config_of(files, "hunyuan_v1_dense", tmp_path / f"run{workers}", **values)
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        done = ranks.run(tmp_path / "run.yaml", ranks=2)
        assert done.returncode == 0, done.stderr
        assert f"dataloader_num_workers = {workers}: as given" in done.stdout
        found.append(losses(attach(config.output_dir)))
    assert len(found[0]) == 3 and found[0] == found[1]


def test_untrained_weights_stay_bit_for_bit_in_bf16(files, ranks, tmp_path):
    """The base is like the released ones: bf16, with float32 routers."""
    base = shutil.copytree(files["hunyuan"], tmp_path / "base")
    before = {
        name: weight if ".gate.wg." in name else weight.bfloat16()
        for name, weight in load_file(base / "model.safetensors").items()
    }
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    values = {"max_steps": 1, "num_processes": None, "bf16": True, "train_attention_params_only": True}
    config = config_of(files, "hunyuan", tmp_path / "run", model_name_or_path=str(base), **values)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype, name
        assert torch.equal(after[name], weight) or ".self_attn." in name, name
    config = json.loads((tmp_path / "run" / "checkpoint-1" / "config.json").read_text())
    assert config["use_cache"] is True and config["torch_dtype"] == "bfloat16"


def test_a_deepspeed_file_of_upstream_trains_and_the_correction_is_noted(files, ranks, shared, tmp_path):
    """Its `min_loss_scale` is invalid for DeepSpeed and has no effect in bf16; it has no section bf16."""
    path = shared / "models" / "hunyuan-a13b" / "ds_zero2_no_offload.json"
    flags = f"""--model_name_or_path {files["hunyuan_v1_moe"]} --train_data_file {files["few"]} --deepspeed {path}
    --output_dir {tmp_path / "run"} --per_device_train_batch_size 1 --max_steps 2 --max_seq_length 256 --bf16
    --learning_rate 1e-3 --logging_steps 1"""
    done = ranks.run(*flags.split(), ranks=2)
    assert done.returncode == 0, done.stderr
    note = f"deepspeed = {path}: fp16.min_loss_scale = 1e-10 is left out, because fp16 is off"
    assert done.stdout.count(f"hynb: {note}") == 1, done.stdout
    run = attach(tmp_path / "run")
    manifest = run.reader.manifest()
    assert sum(line.startswith(note) for line in manifest["notes"]) == 1
    assert "min_loss_scale" not in manifest["ds_config"]["fp16"]
    assert run.status().state == "finished" and len(losses(run)) == 2
    last = load_file(run.checkpoints()[-1] / "model.safetensors")
    assert {weight.dtype for name, weight in last.items() if ".gate.wg." not in name} == {torch.bfloat16}


BAD = {
    "model_name_or_path=/no/such/model": "there is no such folder",
    "train_data_file=/no/such.jsonl": "/no/such.jsonl: there is no such file",
    "deepspeed=ds_zero2": "did you mean ds_zero2_no_offload?",
    "make_moe_param_leaf_module=true": "needs ZeRO-3",
    "resume_from_checkpoint=last": "there is no checkpoint in output_dir",
    "tokenizer_name_or_path=/tmp": "has no tokenizer",
    "per_device_train_batch_size=0": "must be ≥ 1",
}


def test_all_mistakes_of_a_config_are_reported_at_once(files, tmp_path):
    config = config_of(files, "hunyuan", tmp_path / "run")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    for mistake, message in BAD.items():
        done = cli_check(tmp_path / "run.yaml", mistake)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    # With an unknown preset the ZeRO stage is unknown too, so make_moe_param_leaf_module is only tried alone.
    on_disk = [item for item in BAD if not item.startswith(("per_device", "make_moe"))]
    done = cli_check(tmp_path / "run.yaml", *on_disk)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for mistake in on_disk:
        assert BAD[mistake] in done.stderr, mistake
    assert not (tmp_path / "run").exists()


def cli_check(path: Path, *settings: str) -> subprocess.CompletedProcess:
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "hynb.cli", "check", "--config", str(path), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_broken_data_and_foreign_code_are_refused_before_training(files, ranks, tmp_path):
    data = tmp_path / "bad.jsonl"
    good = files["data"].read_text().splitlines()[0]
    wrong_order = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    data.write_text("\n".join([good, '{"messages": [', json.dumps(wrong_order), good]) + "\n")
    config = config_of(files, "hunyuan", tmp_path / "run", train_data_file=str(data))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = ranks.run(tmp_path / "run.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{data}:2" in done.stderr and f"{data}:3: the last message is the user's" in done.stderr
    status = attach(tmp_path / "run").status()
    assert status.state == "failed" and f"{data}:2" in status.reason
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"")
    auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    (foreign / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto_map}))
    done = ranks.run(
        "--model_name_or_path", foreign, "--train_data_file", files["data"], "--output_dir", tmp_path / "o"
    )
    assert done.returncode == 2 and "modeling_x.py" in done.stderr and "trust_remote_code" in done.stderr


def test_what_the_trainer_refuses_is_a_message_without_a_traceback(files, ranks, tmp_path):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", num_processes=None)
    (tmp_path / "run.yaml").write_text(to_yaml(config) + "eval_strategy: steps\n")
    done = ranks.run(tmp_path / "run.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hynb: transformers' Trainer: You have set `args.eval_strategy`" in done.stderr


def test_too_little_disk_is_reported_before_training(files, ranks, tmp_path):
    need(os.geteuid() == 0, "only root can mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("root may not mount a file system on this machine")
    try:
        config = config_of(files, "hunyuan_v1_dense", small / "run", num_processes=None)
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        done = ranks.run(tmp_path / "run.yaml")
    finally:
        subprocess.run(["umount", small], check=True)
    assert done.returncode == 2 and "and the disk on" in done.stderr and "Traceback" not in done.stderr
