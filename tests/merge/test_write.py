"""The folder that a merge writes: complete, safe when the merge is interrupted, refused before a byte is written."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from adapters import ATTENTION, load_tensors, make_adapter, merge_with_peft
from conftest import need
from safetensors import safe_open
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hynb.errors import MergeError, ModelError
from hynb.merge import SAVE_DTYPES, merge_lora, verify_merge
from hynb.merge.receipt import RECEIPT
from hynb.runs import BASE_IDENTITY, base_identity

TORCH_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=ATTENTION)


@pytest.mark.parametrize("save_dtype", [name for name in SAVE_DTYPES if name != "keep"])
def test_another_dtype(base, adapter, tmp_path, save_dtype):
    dtype = TORCH_NAMES[save_dtype]
    inputs = {"base_model_path": base, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    reports = []
    merge_lora(**inputs, save_dtype=save_dtype, progress=reports.append)
    assert reports[-1].done_bytes == reports[-1].total_bytes
    expected, merged = merge_with_peft(base, [adapter], tmp_path / "peft"), load_tensors(tmp_path / "m")
    assert sum(weight.nbytes for weight in merged.values()) == reports[-1].total_bytes
    for key, weight in merged.items():
        is_router = ".gate.wg." in key
        assert weight.dtype == (torch.float32 if is_router else dtype), key
        torch.testing.assert_close(weight.float(), expected[key].to(weight.dtype).float(), rtol=1e-2, atol=1e-5)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == str(dtype).removeprefix("torch.")
    verify_merge(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.lm_head.weight.dtype == dtype


def test_the_folder_has_what_the_base_has_and_a_receipt(base, adapter, tmp_path):
    reports = []
    inputs = {"base_model_path": base, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    merge_lora(**inputs, progress=reports.append)
    for path in base.iterdir():
        copied = tmp_path / "m" / path.name
        assert copied.exists(), path.name
        if path.suffix != ".safetensors" and not path.name.endswith("index.json"):
            assert copied.read_bytes() == path.read_bytes()
    receipt = json.loads((tmp_path / "m" / RECEIPT).read_text())
    assert receipt["base"]["hash"] == base_identity(base)["hash"] and receipt["adapters"][0]["sha256"]
    assert receipt["tensors_changed"] == 12, "4 layers × q and o, 2 layers × k and v"
    assert receipt["tensors_changed"] + receipt["tensors_copied"] == len(load_tensors(base))
    assert receipt["largest_change"] > receipt["mean_change"] > 0
    assert reports[-1].done_bytes == reports[-1].total_bytes > 0
    assert [report.done_bytes for report in reports] == sorted(report.done_bytes for report in reports)
    assert reports[-1].seconds_left == 0
    assert not list(tmp_path.glob(".m*")) and not list((tmp_path / "m").glob("*.changes.json"))
    with safe_open(next((tmp_path / "m").glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


REFUSED = {
    "an output folder that exists": ({"output_path": "there"}, "already exists; choose another path"),
    "the base as the output folder": ({"output_path": "base", "overwrite": True}, "would replace the base"),
    "the adapter as the output folder": ({"output_path": "adapter", "overwrite": True}, "would replace the base or"),
    "no base": ({"base_model_path": "nothing"}, "there is no such folder"),
    "a base without a config": ({"base_model_path": "there"}, r"has no config\.json, so it is not a model folder"),
    "a model as the adapter": ({"adapter_model_path": "base"}, r"not an adapter folder \(no adapter_config\.json\)$"),
    "a run folder as the adapter": ({"adapter_model_path": "run"}, r"such as .*run/checkpoint-5$"),
    "another dtype": ({"save_dtype": "int8"}, "must be one of keep, bf16, fp16, fp32"),
    "too many weights": ({"adapter_weights": [1.0, 2.0]}, "2 factors for 1 adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_folders_and_values_are_refused(base, adapter, tmp_path, case):
    changes, message = REFUSED[case]
    places = {name: tmp_path / name for name in ("there", "nothing", "output")} | {"base": base, "adapter": adapter}
    places["run"] = tmp_path / "run"
    places["there"].mkdir()
    (places["run"] / "checkpoint-5").mkdir(parents=True)
    inputs = {"base_model_path": "base", "adapter_model_path": "adapter", "output_path": "output"} | changes
    inputs = {name: places[value] if name.endswith("_path") else value for name, value in inputs.items()}
    before = sorted(base.iterdir())
    with pytest.raises(MergeError, match=message):
        merge_lora(**inputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
    assert sorted(base.iterdir()) == before


def test_overwriting_replaces_the_output_folder(base, adapter, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "old").write_text("")
    inputs = {"base_model_path": base, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    merge_lora(**inputs, overwrite=True)
    verify_merge(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and not (tmp_path / "m" / "old").exists()


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    other = tiny_model(tmp_path / "other", seed=1)
    (adapter / BASE_IDENTITY).write_text(json.dumps(base_identity(other)))
    with pytest.raises(MergeError, match=rf"belongs to another base: it was trained on {other}, and {base} has"):
        merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "n")


def test_a_truncated_shard_is_named(base, adapter, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    inputs = {"base_model_path": broken, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    for content in (whole[:-10], whole[:40], b"", b"\xff" * 200):
        shard.write_bytes(content)
        with pytest.raises(ModelError, match=shard.name):
            merge_lora(**inputs)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        merge_lora(**inputs)


def test_a_quantised_base_is_refused(base, adapter, tmp_path):
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(MergeError, match="the model is quantised"):
        merge_lora(base_model_path=quantised, adapter_model_path=adapter, output_path=tmp_path / "m")


def test_a_disk_with_too_little_space_is_refused(base, adapter, tmp_path):
    need(os.geteuid() == 0, "only root can mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine does not let its root mount a file system")
    try:
        with pytest.raises(MergeError, match="the disk has"):
            merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=small / "m")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_linked_shards_need_no_space(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[0])
    inputs = {"base_model_path": base, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    result = merge_lora(**inputs, link=True)
    linked = [path for path in (tmp_path / "m").glob("*.safetensors") if path.stat().st_nlink > 1]
    assert len(linked) == result.linked_shards > 0
    assert all(path.samefile(base / path.name) for path in linked)
    verify_merge(tmp_path / "m")


# Imports once and forks for each merge. A line of input is the number of the report at which the merge is killed and
# how many seconds after it, 0 for at once, where the merge waits; a line of output is the number of reports and how
# the process ended.
FORKS = """
import os, signal, sys, time
import hynb.merge as m
m.merge_lora  # a name loads its module on first use
for line in sys.stdin:
    kill_at, delay = int(line.split()[0]), float(line.split()[1])
    reports, of_child = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def show(report):
            global count
            count += 1
            os.write(of_child, b".")
            if count == kill_at and not delay:
                signal.pause()
        paths = dict(zip(("base_model_path", "adapter_model_path", "output_path"), sys.argv[1:]))
        m.merge_lora(**paths, progress=show)
        os._exit(0)
    os.close(of_child)
    count = 0
    while os.read(reports, 1):
        count += 1
        if count == kill_at:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
    os.close(reports)
    print(count, os.waitpid(child, 0)[1], flush=True)
"""


def test_twenty_kills_leave_the_base_and_nothing_that_looks_complete(base, adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    output, partial, rng = tmp_path / "m", tmp_path / ".m.partial", random.Random(4)
    command = [sys.executable, "-c", FORKS, base, adapter, output]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def merge(*, kill_at: int, delay: float = 0) -> tuple[int, int]:
        """Kills a merge some seconds after one of its reports, at once for 0; reports and exit status."""
        server.stdin.write(f"{kill_at} {delay}\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], 240)[0]:
            left = [Path(f"/proc/{process.pid}") for process in (server, *psutil.Process(server.pid).children())]
            states = [(process / name).read_text() for process in left for name in ("status", "wchan")]
            server.kill()
            pytest.fail("the merge neither ended nor was it killed:\n" + "\n".join(states))
        reports, status = server.stdout.readline().split()
        return int(reports), int(status)

    all_reports, status = merge(kill_at=0)
    assert status == 0 and all_reports >= 3
    shutil.rmtree(output)
    kills = finished = resumed = 0
    while kills < 20:
        # The first one at the last report, where all other shards are written.
        kill_at = rng.randint(1, all_reports) if kills else all_reports
        _, status = merge(kill_at=kill_at, delay=rng.uniform(0.001, 0.01) if kills % 2 else 0)
        assert status in (0, signal.SIGKILL)
        kills += status == signal.SIGKILL
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
        resumed += any(partial.glob("*.safetensors"))
        if output.exists():
            verify_merge(output)
            shutil.rmtree(output)
            finished += 1
        assert finished < 200, "merges end before they can be killed"
    server.stdin.close()
    assert server.wait(timeout=300) == 0
    server.stdout.close()
    assert resumed, "no kill left a complete shard"
    result = merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=output)
    assert verify_merge(output) == result.tensors_changed + result.tensors_copied
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_merge_that_was_interrupted_continues_and_records_every_change(base, adapter, tmp_path):
    """Also into another dtype, whose bytes are not those of the base."""
    inputs = {"base_model_path": base, "adapter_model_path": adapter, "save_dtype": "fp32"}
    whole = merge_lora(**inputs, output_path=tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def interrupt(report):
        if report.done_bytes > report.total_bytes / 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        merge_lora(**inputs, output_path=tmp_path / "m", progress=interrupt)
    assert not (tmp_path / "m").exists()
    reports = []
    result = merge_lora(**inputs, output_path=tmp_path / "m", progress=reports.append)
    assert result.resumed_shards > 0 and result.changes == whole.changes
    assert reports[-1].done_bytes == reports[-1].total_bytes
    verify_merge(tmp_path / "m")


def test_the_command(base, adapter, tmp_path):
    command = [sys.executable, "-m", "hynb.cli", "merge", "--base_model_path", base, "--output_path", tmp_path / "m"]
    command += ["--adapter_model_path", adapter]
    done = subprocess.run([*command, "--verify"], capture_output=True, text=True, check=True)
    assert "12 tensors changed" in done.stdout and "verified: all" in done.stdout
    assert "forward pass: the first 2 layers load and give finite logits" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "already exists" in again.stderr and "Traceback" not in again.stderr


def test_the_commands_help_does_not_import_torch():
    code = (
        "import sys; from hynb import cli\ntry: cli.main(['merge', '--help'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n") and "--adapter_weights" in done.stdout
