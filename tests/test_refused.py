"""Mistakes that once ended in a traceback or were accepted: each is refused by name and changes nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import need
from tiny import model_and_data, tiny_model

from hynb import cli
from hynb.cli import main
from hynb.config import read_mapping, read_yaml
from hynb.errors import ConfigError, HynbError, MergeError
from hynb.files import write_json
from hynb.merge.adapter import open_adapter
from hynb.merge.shards import file_header
from hynb.runs import ProcessId, RunWriter

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = [
    (BOMB, ":1: has an anchor (&a): write the value without it"),
    ("max_steps: *x\n", ":1: has an alias (*x)"),
    (
        "\nseed: !!python/object/apply:os.system [x]\n",
        ":2: seed has an invalid YAML value: could not determine a constructor for the tag",
    ),
    ("? [a, b]\n: 1\n", "a key must be the name of a parameter"),
    ("max_steps: " + "9" * 5000, "max_steps"),
    ("learning_rate: " + "9" * 400, "learning_rate is a number with too many digits; it takes a number"),
    ("max_steps: " + "[" * 5000, "nested in more than 20 levels"),
    ("x" * 1_000_001, "a file of parameters 1,000,000 at most"),
]
VALUES = [
    ({"num_train_epochs": float("inf")}, "num_train_epochs = inf: must be a finite number below 1e18"),
    ({"lora_alpha": "inf"}, "lora_alpha = inf: must be a finite number below 1e18"),
    ({"seed": 1e308}, "seed is 1e+308; it takes a whole number"),
    ({"seed": 2**40}, "seed = 1099511627776: must be ≥ 0 and ≤ 4294967295"),
    ({"adam_beta2": "nan"}, "adam_beta2 is 'nan'; it takes a finite number"),
    ({"output_dir": ""}, "output_dir: is empty; it takes text"),
    ({"output_dir": "~nosuchuser/x"}, "output_dir = '~nosuchuser/x': ~nosuchuser: there is no such user here"),
    ({"model_name_or_path": "~nosuchuser"}, "model_name_or_path = '~nosuchuser': ~nosuchuser: there is no such user"),
    ({"output_dir": "x" * 300}, "is too long: a name may have 255 bytes"),
    ({"train_data_file": "a.jsonl," + "字" * 100}, "train_data_file = ", "is too long"),
    ({"deepspeed": "a\0b"}, "holds a null byte"),
]


@pytest.mark.parametrize(("text", "message"), YAML, ids=[item[1][:40] for item in YAML])
def test_yaml_that_no_parameter_needs_is_refused_at_once(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_yaml(path).config(str(path))
    assert any(problem.startswith(f"{path}:") and message in problem for problem in raised.value.problems)


@pytest.mark.parametrize("item", VALUES, ids=lambda item: item[1][:40])
def test_values_that_make_no_sense_are_refused(item):
    values, *messages = item
    with pytest.raises(ConfigError) as raised:
        read_mapping(values).config("parameters")
    assert any(all(text in problem for text in messages) for problem in raised.value.problems), raised.value


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    return model_and_data(folder)


def settings(files: Path, folder: Path, **values: object) -> list[str]:
    given = {
        "model_name_or_path": files / "model",
        "train_data_file": files / "train.jsonl",
        "output_dir": folder,
        "num_processes": 2,
        "max_steps": 1,
    }
    return [word for name, value in (given | values).items() for word in ("--set", f"{name}={value}")]


def content(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusals(files: Path, folder: Path) -> list[tuple[dict[str, object], str]]:
    """Parameters that cannot be launched, and a part of the message."""
    batch, empty, listed = files / "batch.json", files / "section.json", files / "listed"
    batch.write_text('{"train_batch_size": 3}')
    empty.write_text('{"zero_optimization": []}')
    listed.mkdir(exist_ok=True)
    (listed / "config.json").write_text("[1]")
    (listed / "model.safetensors.index.json").write_text("[1]")
    (listed / "model.safetensors").write_bytes(file_header([("a", "F32", (2,))], {}) + bytes(7))
    deep = files / "deep"
    deep.mkdir(exist_ok=True)
    (deep / "config.json").write_text("[" * 100_000)
    cut = files / "cut"
    tiny_model(cut, "hunyuan_v1_dense")
    shard = next(cut.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    return [
        ({"deepspeed": batch}, f"train_batch_size = 3 in {batch}: this run has 2 samples per step"),
        ({"deepspeed": empty}, "zero_optimization = []: must be an object"),
        ({"fp16": True, "bf16": False}, "fp16 needs a GPU, and this machine shows none"),
        ({"model_name_or_path": listed}, f"{listed / 'config.json'}: must be a JSON object, not list"),
        ({"model_name_or_path": deep}, f"{deep / 'config.json'}: is nested too deeply"),
        ({"model_name_or_path": cut}, f"{shard}: has "),
        ({"output_dir": "/proc/run"}, "output_dir = /proc/run: cannot be created or written: /proc"),
        ({"sequence_parallel_size": 4}, "sequence_parallel_size = 4: does not divide"),
    ]


def test_check_refuses_what_launch_refuses_and_a_refused_launch_changes_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "run"
    writer = RunWriter(folder)
    writer.status("finished", exit_code=0, global_step=1)
    writer.dir.config.write_text("max_steps: 1\n")
    before = content(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            *refusals(model, folder),
            ({"master_port": port}, f"master_port = {port}: is taken by process {os.getpid()}"),
        ]
        for values, message in cases:
            words = settings(model, folder, overwrite_output_dir=True, **values)
            (model / "run.yaml").write_text("")
            for command in (["check", "--config", str(model / "run.yaml")], ["launch"]):
                assert main([*command, *words]) == 2, values
                assert message in capsys.readouterr().err, (command, values)
            assert content(folder) == before, values
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("no assignment\n")
    assert main(["launch", *settings(model, folder, overwrite_output_dir=True)]) == 2
    assert "is not NAME=VALUE" in capsys.readouterr().err and content(folder) == before
    assert main(["launch", *settings(model, tmp_path / "new")]) == 2 and not (tmp_path / "new").exists()


def test_a_full_or_read_only_disk_is_named_before_a_launch(model, tmp_path, capsys):
    need(os.geteuid() == 0, "mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        (disk / "fill").write_bytes(bytes(60_000))
        assert main(["launch", *settings(model, disk / "run")]) == 2
        assert f"{disk}: No space left on device; name a folder elsewhere" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert main(["launch", *settings(model, disk / "run")]) == 2
        assert f"{disk} is not writable for this user" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("folder", ["~nosuchuser/run", "x" * 300, "a\0b"])
def test_a_run_folder_that_cannot_be_one_is_refused_by_every_command(folder, capsys):
    for command in (["status"], ["attach"], ["stop"], ["stop", "--kill"], ["checkpoints"]):
        assert main([*command, folder]) == 2
        assert capsys.readouterr().err.startswith("hynb: run folder '")


def test_a_stop_that_waits_names_the_frozen_rank_and_the_way_to_end_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0.1)
    launch_id = "4" * 32
    environment = {"HYNB_LAUNCH_ID": launch_id, "RANK": "1", "PATH": os.environ["PATH"]}
    script = "kill -STOP $$; while [ ! -e stop_request ]; do sleep 0.1; done; sleep 1"
    rank = subprocess.Popen(["sh", "-c", script], env=environment, cwd=tmp_path)
    try:
        process = ProcessId.of(rank.pid).record()
        write_json(tmp_path / "launch.json", {"id": launch_id, "process": process})
        write_json(tmp_path / "status.json", {"state": "running", "process": process, "global_step": 3})
        waiting = subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {rank.pid}; sleep 2; kill -9 {rank.pid}"])
        end = time.monotonic() + 120
        assert main(["stop", str(tmp_path)]) == 0 and time.monotonic() < end
        waiting.wait()
    finally:
        rank.kill()
        rank.wait()
    text = capsys.readouterr().out
    assert f"still stopping, step 3; stopped by a signal: process {rank.pid} (rank 1)" in text
    assert f"`hynb stop --kill {tmp_path}` ends it at once" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora = true, but adapter_model.safetensors holds no magnitudes"),
        ({"use_qalora": True}, "use_qalora = True: QA-LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = pissa_niter_16: that start changes the base"),
        ({"lora_alpha": "16"}, "lora_alpha = '16': must be a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern = [1]: must be an object"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is not a regular expression"),
        ({"init_lora_weights": True}, None),
    ],
)
def test_adapters_that_a_merge_would_get_wrong_are_refused_by_name(tmp_path, changed, message):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | changed)
    header = file_header([("base_model.model.q.lora_A.weight", "F32", (2, 2))], {})
    (tmp_path / "adapter_model.safetensors").write_bytes(header + bytes(16))
    problems: list[str] = []
    try:
        problems = open_adapter(tmp_path, 1.0).problems()
    except HynbError as error:
        assert isinstance(error, MergeError)
        problems = error.problems
    assert [str(tmp_path / "adapter_config.json") in problem for problem in problems] == [True] * (
        message is not None
    )
    assert not message or message in problems[0]
