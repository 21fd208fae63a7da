"""Training with real DeepSpeed ranks: every family, stage and mode, resumed, stopped, killed, and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import need
from peft import PeftModel
from reference_model import logits as reference_logits
from safetensors.torch import load_file, save_file
from tiny import tiny_data, tiny_model, with_code
from transformers import AutoModelForCausalLM, AutoTokenizer

from hynb.config import Config, to_yaml
from hynb.data import ChatDataset, SeededSampler
from hynb.errors import ConfigError, ModelError, RunError, RunFailedError
from hynb.launch import attach, launch
from hynb.merge import merge_lora, verify_merge
from hynb.runs import RunDir
from hynb.supervision import LAUNCH_VARIABLE
from hynb.train import RunCallback

STEPS, SAVED = 6, 3


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        name: tiny_model(folder / name, name) for name in ("hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense", "hy_v3")
    }
    with_code(made["hunyuan"])
    few = tiny_data(folder / "few.jsonl", 10)
    (folder / "broken.jsonl").write_text(few.read_text().replace("\n", '\n{"messages": \n', 1))
    return made | {"data": tiny_data(folder / "train.jsonl"), "few": few, "broken": folder / "broken.jsonl"}


def config_of(files, family: str, output_dir: Path, **values) -> Config:
    given = {
        "model_name_or_path": str(files[family]),
        "train_data_file": str(files["data"]),
        "output_dir": str(output_dir),
        "num_processes": 2,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "learning_rate": 1e-2,
        "min_lr": 1e-3,
        "warmup_ratio": 0.0,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "max_seq_length": 256,
    }
    return Config(**(given | values))


def losses(run) -> dict[int, float]:
    return {event["global_step"]: event["loss"] for event in run.events() if event["kind"] == "log"}


def run_entry(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DS_", "RANK"))}
    command = [sys.executable, "-m", "hynb.train_entry", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


ON_EXPERTS = {"use_lora": True, "lora_on_experts": True, "lora_dropout": 0.0}
CASES = {
    "hunyuan, ZeRO-3, full": (
        "hunyuan",
        {"deepspeed": "ds_zero3_no_offload", "gradient_checkpointing": True, "router_aux_loss_coef": 0.01},
    ),
    # Five packs, two steps an epoch: the resumed run begins in the middle of the second.
    "hunyuan, ZeRO-3 offload, LoRA on experts, packing": (
        "hunyuan",
        {"deepspeed": "ds_zero3_offload", "packing": True, "data": "few", "eval_split": 0.2, "eval_steps": 2}
        | ON_EXPERTS,
    ),
    "v1_moe, ZeRO-2, full, grouped": (
        "hunyuan_v1_moe",
        {"gradient_accumulation_steps": 2, "data": "few", "group_by_length": True},
    ),
    "v1_moe, ZeRO-3, LoRA": (
        "hunyuan_v1_moe",
        {"deepspeed": "ds_zero3_no_offload", "use_lora": True, "gradient_checkpointing": True, "packing": True},
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
def case(request, files, tmp_path_factory):
    """One uninterrupted run, and one that goes on from its middle in another folder."""
    family, values = CASES[request.param]
    folder = tmp_path_factory.mktemp("runs")
    values = dict(values)
    values["train_data_file"] = str(files[values.pop("data", "data")])
    if "eval_data_file" in values:
        values["eval_data_file"] = str(files[values["eval_data_file"]])
    whole = launch(config_of(files, family, folder / "whole", **values))
    whole.wait(timeout_seconds=240, check=True)
    # Neither model nor adapter settings are needed: the checkpoint knows its base.
    values = {**values, "model_name_or_path": None}
    middle = str(whole.dir.checkpoint(SAVED))
    resumed = launch(config_of(files, family, folder / "resumed", resume_from_checkpoint=middle, **values))
    resumed.wait(timeout_seconds=240, check=True)
    return family, values, whole, resumed


def test_losses_after_a_resume_equal_the_uninterrupted_ones(case):
    _, _, whole, resumed = case
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > SAVED}
    assert len(set(losses(whole).values())) == STEPS


def test_the_run_folder_holds_what_a_watcher_needs(case):
    _, _values, whole, _ = case
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


def test_lines_left_out_are_counted_and_kept(case):
    _, values, whole, _ = case
    counts = whole.reader.manifest()
    assert counts["data_lines"] == counts["data_samples"] + counts["data_rejected"]
    broken = values.get("on_bad_sample") == "skip"
    assert counts["data_rejected"] == whole.dir.rejected.exists() == broken
    if broken:
        (line,) = map(json.loads, whole.dir.rejected.read_text().splitlines())
        assert line["source"].endswith("broken.jsonl:2") and line["line"] == '{"messages": '


def test_the_evaluation_is_the_mean_loss_of_a_token(case, files):
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
        assert all(torch.any(weight != 0) for name, weight in weights.items() if "lora_B" in name), "each was trained"
        assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(files[family])
        return
    trained = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(files[family], dtype=torch.float32).state_dict()
    assert trained.keys() == before.keys()
    assert not all(torch.equal(trained[name], before[name]) for name in before)
    assert load_file(last / "model.safetensors").keys() == load_file(files[family] / "model.safetensors").keys()
    for path in files[family].iterdir():
        assert (last / path.name).is_file(), f"{path.name} travels along"
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
            # What the trainer saved, read by the plain model under the original's key names.
            config = json.loads((last / "config.json").read_text())
            expected = reference_logits(load_file(last / "model.safetensors"), config, ids[0])
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits[0], expected, rtol=1e-3, atol=1e-3)
    limits = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answer = model.generate(ids, **limits)
    assert answer.shape == (1, 18)
    assert torch.equal(answer, model.generate(ids, use_cache=False, **limits))


@pytest.fixture(scope="module")
def long_run(files, tmp_path_factory):
    """A run that would go on for hours."""
    config = config_of(files, "hunyuan", tmp_path_factory.mktemp("long") / "run", max_steps=100_000)
    run = launch(config.replace(save_steps=100_000, train_attention_params_only=True))
    deadline = time.monotonic() + 120
    while run.status().global_step < 2 and time.monotonic() < deadline and run.status().live:
        time.sleep(0.2)
    yield config, run
    if run.status().live:
        run.kill()


def test_stop_saves_a_checkpoint_and_a_second_launch_is_refused(long_run):
    config, run = long_run
    assert run.status().state == "running", run.reader.log_tail()
    with pytest.raises(ConfigError, match="hynb stop"):
        launch(config)
    # From a process that never saw the launch, as after a kernel's restart.
    cli = [sys.executable, "-m", "hynb.cli"]
    seen = subprocess.run([*cli, "status", run.output_dir], capture_output=True, text=True, check=True)
    assert seen.stdout.startswith("running, step")
    stopped = subprocess.run([*cli, "stop", run.output_dir], capture_output=True, text=True, check=True, timeout=60)
    assert "stopped on request after a checkpoint" in stopped.stdout
    status = attach(run.output_dir).status()
    assert status.state == "stopped" and status.global_step >= 2
    assert run.checkpoints()[-1].name == f"checkpoint-{status.global_step}"
    assert orphans_of(run) == []
    with pytest.raises(ConfigError, match="overwrite_output_dir"):
        launch(config)


def test_only_attention_was_trained(long_run, files):
    _, run = long_run
    assert run.status().state == "stopped"
    before = load_file(files["hunyuan"] / "model.safetensors")
    after = load_file(run.checkpoints()[-1] / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert changed == {name for name in before if ".self_attn." in name}


def orphans_of(run) -> list[psutil.Process]:
    launch_id = json.loads(run.dir.launch.read_text())["id"]
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(LAUNCH_VARIABLE) == launch_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_guides_command_line_with_a_random_model(files, tmp_path):
    """`deepspeed SCRIPT --flags`, as the guide's train.sh has it, with MoE leaves under ZeRO-3."""
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
        [deepspeed, "--num_gpus", "2", "--master_port", "29631", entry, *flags.split()],
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
    (tmp_path / "run.yaml").write_text(to_yaml(config.replace(hidden_size=64)))
    done = run_entry(tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert "ignored, because the model folder decides them" in done.stdout and "hidden_size" in done.stdout
    assert attach(tmp_path / "run").status().state == "finished"


def test_untrained_weights_stay_bit_for_bit_in_bf16(files, tmp_path):
    """Of a base as released: bf16, with the routers in float32."""
    base = shutil.copytree(files["hunyuan"], tmp_path / "base")
    before = {
        name: weight if ".gate.wg." in name else weight.bfloat16()
        for name, weight in load_file(base / "model.safetensors").items()
    }
    save_file(before, base / "model.safetensors", metadata={"format": "pt"})
    values = {"max_steps": 1, "num_processes": None, "bf16": True, "train_attention_params_only": True}
    config = config_of(files, "hunyuan", tmp_path / "run", model_name_or_path=str(base), **values)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = run_entry(tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype, name
        assert torch.equal(after[name], weight) or ".self_attn." in name, name
    config = json.loads((tmp_path / "run" / "checkpoint-1" / "config.json").read_text())
    assert config["use_cache"] is True and config["torch_dtype"] == "bfloat16"


BAD = {
    "model_name_or_path=/no/such/model": "there is no such folder",
    "train_data_file=/no/such.jsonl": "/no/such.jsonl: there is no such file",
    "deepspeed=ds_zero2": "did you mean ds_zero2_no_offload?",
    "make_moe_param_leaf_module=true": "needs ZeRO-3",
    "resume_from_checkpoint=last": "there is no checkpoint in output_dir",
    "tokenizer_name_or_path=/tmp": "has no tokenizer",
    "per_device_train_batch_size=0": "must be ≥ 1",
}


def test_all_mistakes_of_a_config_are_said_at_once(files, tmp_path):
    config = config_of(files, "hunyuan", tmp_path / "run")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    for mistake, says in BAD.items():
        done = cli_check(tmp_path / "run.yaml", mistake)
        assert done.returncode == 2 and says in done.stderr, done.stderr
    # Without a preset that exists nobody knows the stage, so that mistake is tried alone above.
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


def test_broken_data_and_foreign_code_are_refused_before_training(files, tmp_path):
    data = tmp_path / "bad.jsonl"
    good = files["data"].read_text().splitlines()[0]
    wrong_order = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    data.write_text("\n".join([good, '{"messages": [', json.dumps(wrong_order), good]) + "\n")
    config = config_of(files, "hunyuan", tmp_path / "run", train_data_file=str(data))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = run_entry(tmp_path / "run.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{data}:2" in done.stderr and f"{data}:3: message 1: the first message is the assistant's" in done.stderr
    status = attach(tmp_path / "run").status()
    assert status.state == "failed" and f"{data}:2" in status.reason
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"")
    auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    (foreign / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto_map}))
    done = run_entry(
        "--model_name_or_path", foreign, "--train_data_file", files["data"], "--output_dir", tmp_path / "o"
    )
    assert done.returncode == 2 and "modeling_x.py" in done.stderr and "trust_remote_code" in done.stderr


def test_an_adapter_weight_without_a_gradient_stops_the_run(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = torch.nn.Linear(2, 2)
            self.lora_B = torch.nn.Linear(2, 2)
            self.unused_lora_B = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.lora_B(self.lora_A(x)).sum()

    model, args = Model(), SimpleNamespace(process_index=0, world_size=1)
    state, control = SimpleNamespace(global_step=0, max_steps=9), SimpleNamespace()
    callback = RunCallback(run_dir=RunDir(tmp_path), writer=None, model=model, sampler=SeededSampler(1, 0))
    callback.on_train_begin(args, state, control)
    model(torch.ones(1, 2)).backward()
    with pytest.raises(ModelError, match=r"2 adapter weights got no gradient in the first step.*unused_lora_B"):
        callback.on_step_end(args, state, control)
    del model.unused_lora_B
    callback = RunCallback(run_dir=RunDir(tmp_path), writer=None, model=model, sampler=SeededSampler(1, 0))
    callback.on_train_begin(args, state, control)
    model(torch.ones(1, 2)).backward()
    callback.on_step_end(args, state, control)


def test_what_the_trainer_itself_refuses_is_a_message(files, tmp_path):
    config = config_of(files, "hunyuan_v1_dense", tmp_path / "run", num_processes=None)
    (tmp_path / "run.yaml").write_text(to_yaml(config) + "eval_strategy: steps\n")
    done = run_entry(tmp_path / "run.yaml")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hynb: transformers' Trainer: You have set `args.eval_strategy`" in done.stderr


@pytest.mark.parametrize("case", ["v1_moe, ZeRO-2, full, grouped"], indirect=True, scope="module")
def test_another_world_size_is_refused_on_resume(case, tmp_path, files):
    family, values, whole, _ = case
    config = config_of(files, family, tmp_path / "run", **values)
    config = config.replace(resume_from_checkpoint=str(whole.dir.checkpoint(SAVED)), num_processes=1)
    run = launch(config)
    with pytest.raises(RunFailedError, match="world_size = 2, this run has 1"):
        run.wait(timeout_seconds=120, check=True)


def test_too_little_disk_is_said_before_training(files, tmp_path):
    need(os.geteuid() == 0, "only root can mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine doesn't let its root mount a file system")
    try:
        config = config_of(files, "hunyuan_v1_dense", small / "run", num_processes=None)
        (tmp_path / "run.yaml").write_text(to_yaml(config))
        done = run_entry(tmp_path / "run.yaml")
    finally:
        subprocess.run(["umount", small], check=True)
    assert done.returncode == 2 and "the disk has" in done.stderr and "Traceback" not in done.stderr


def test_launch_refuses_two_at_the_same_moment(files, tmp_path):
    from hynb.launch import _launch_lock

    config = config_of(files, "hunyuan", tmp_path / "run")
    (tmp_path / "run").mkdir()
    with _launch_lock(RunDir(tmp_path / "run")), pytest.raises(RunError, match="another launch"):
        launch(config)
