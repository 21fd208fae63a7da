"""Merging: equal to PEFT's own, copied byte for byte elsewhere, safe when it breaks off, refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import need
from peft import LoraConfig, get_peft_model
from reference_model import logits as reference_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, with_code
from transformers import AutoModelForCausalLM

from hynb.errors import MergeError, ModelError
from hynb.merge import RECEIPT, merge_lora, verify_merge
from hynb.merge.forward_check import first_layers_pass
from hynb.runs import BASE_IDENTITY, base_identity

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VARIANTS = {
    "plain": {"target_modules": ATTENTION},
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.o_proj": 6},
        "alpha_pattern": {"o_proj": 3, "layers.0.self_attn.q_proj": 5},
    },
    "fused experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "alpha_pattern": {"mlp.experts.down_proj": 3},
    },
    "one fused parameter": {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "shared MLP and a saved module": {"target_modules": ["up_proj"], "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A bf16 model in several shards, with what an original folder carries beside."""
    folder = tmp_path_factory.mktemp("merge") / "base"
    tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return with_code(folder)


def adapter_of(base: Path, folder: Path, *, seed: int = 0, **settings) -> Path:
    """An adapter with weights as after training: none of them zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.requires_grad:
                weight.add_(
                    0.05 * torch.randn_like(weight) if "magnitude" in name else 0.1 * torch.randn_like(weight)
                )
    made.save_pretrained(folder)
    return folder


def peft_merged(base: Path, adapters: list[Path], folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge in float32, under the names on the disk."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}


def units_apart(left: torch.Tensor, right: torch.Tensor) -> int:
    """Largest distance in units in the last place of bf16."""
    as_order = [tensor.contiguous().view(torch.int16).int() for tensor in (left, right)]
    ordered = [torch.where(order < 0, -(order & 0x7FFF), order) for order in as_order]
    return (ordered[0] - ordered[1]).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_pefts_merge_rounded_once(base, tmp_path, variant):
    adapter = adapter_of(base, tmp_path / "adapter", **VARIANTS[variant])
    result = merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "merged")
    expected, before, merged = (
        peft_merged(base, [adapter], tmp_path / "peft"),
        tensors(base),
        tensors(tmp_path / "merged"),
    )
    assert merged.keys() == before.keys()
    changed = set()
    for name, weight in merged.items():
        assert weight.dtype == before[name].dtype, name
        if not torch.equal(weight, before[name]):
            changed.add(name)
        if weight.dtype == torch.bfloat16:
            assert units_apart(weight, expected[name].bfloat16()) <= 1, name
        else:
            torch.testing.assert_close(weight, expected[name])
    assert changed == set(result.changes) and changed
    assert verify_merge(tmp_path / "merged") == len(before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("shards", "targets"),
    [(1, ["lm_head"]), (3, ["q_proj", "lm_head"]), (1, ["embed_tokens"]), (3, ["lm_head", "embed_tokens"])],
)
def test_an_adapted_output_layer_or_embedding(tmp_path, tied, shards, targets):
    """What was tied gets tensors of their own: PEFT's merge would change both and answer otherwise."""
    from peft import PeftModel

    model = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    if shards > 1:
        whole = AutoModelForCausalLM.from_pretrained(model)
        (model / "model.safetensors").unlink()
        whole.save_pretrained(model, max_shard_size="120KB")
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=targets)
    merge_lora(base_model_path=model, adapter_model_path=adapter, output_path=tmp_path / "m")
    verify_merge(tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    before, after = tensors(model), tensors(tmp_path / "m")
    same = torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert same is ("embed_tokens" not in targets)
    if not tied:
        for name, weight in peft_merged(model, [adapter], tmp_path / "peft").items():
            torch.testing.assert_close(after[name], weight, msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_another_dtype(base, tmp_path, name, dtype):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=ATTENTION)
    merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "m", save_dtype=name)
    expected, merged = peft_merged(base, [adapter], tmp_path / "peft"), tensors(tmp_path / "m")
    for key, weight in merged.items():
        router = ".gate.wg." in key
        assert weight.dtype == (torch.float32 if router else dtype), key
        torch.testing.assert_close(weight.float(), expected[key].to(weight.dtype).float(), rtol=1e-2, atol=1e-5)
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == str(dtype).removeprefix("torch.")
    verify_merge(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.lm_head.weight.dtype == dtype


def test_several_adapters_in_a_row_with_weights(base, tmp_path):
    first = adapter_of(base, tmp_path / "a", target_modules=["q_proj"])
    second = adapter_of(base, tmp_path / "b", seed=1, target_modules=["q_proj", "v_proj"])
    merge_lora(
        base_model_path=base, adapter_model_path=[first, second], output_path=tmp_path / "m", save_dtype="fp32"
    )
    expected, merged = peft_merged(base, [first, second], tmp_path / "peft"), tensors(tmp_path / "m")
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name])
    values = {"base_model_path": base, "adapter_model_path": first, "save_dtype": "fp32"}
    merge_lora(**values, output_path=tmp_path / "half", adapter_weights=[0.5])
    merge_lora(**values, output_path=tmp_path / "whole")
    name = "model.layers.0.self_attn.q_proj.weight"
    base_weight = tensors(base)[name].float()
    half, whole = (tensors(tmp_path / key)[name] - base_weight for key in ("half", "whole"))
    torch.testing.assert_close(half * 2, whole)


def test_the_folder_carries_what_the_base_had(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=ATTENTION)
    reports = []
    values = {"base_model_path": base, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    merge_lora(**values, progress=reports.append)
    for path in base.iterdir():
        copied = tmp_path / "m" / path.name
        assert copied.exists(), path.name
        if path.suffix != ".safetensors" and not path.name.endswith("index.json"):
            assert copied.read_bytes() == path.read_bytes()
    receipt = json.loads((tmp_path / "m" / RECEIPT).read_text())
    assert receipt["base"]["hash"] == base_identity(base)["hash"] and receipt["adapters"][0]["sha256"]
    assert receipt["tensors_changed"] == 12, "4 layers × q and o, 2 layers × k and v"
    assert receipt["tensors_changed"] + receipt["tensors_copied"] == len(tensors(base))
    assert receipt["largest_change"] > receipt["mean_change"] > 0
    assert reports[-1].done_bytes == reports[-1].total_bytes > 0
    assert [report.done_bytes for report in reports] == sorted(report.done_bytes for report in reports)
    assert not list(tmp_path.glob(".m*"))
    with safe_open(next((tmp_path / "m").glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def refusals(base: Path, folder: Path):
    """What must be refused, with a part of its message."""
    plain = adapter_of(base, folder / "plain", target_modules=ATTENTION)

    def changed(name: str, change) -> Path:
        copy = folder / name
        copy.mkdir()
        weights = load_file(plain / "adapter_model.safetensors")
        settings = json.loads((plain / "adapter_config.json").read_text())
        change(weights, settings)
        save_file(weights, copy / "adapter_model.safetensors")
        (copy / "adapter_config.json").write_text(json.dumps(settings))
        return copy

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    odd = key.replace("layers.0", "layers.1").replace("q_proj", "k_proj")
    yield (
        changed("odd layer", lambda w, _: w.update({odd: w[key].clone(), odd.replace("_A", "_B"): w[key].clone()})),
        ("finds no tensor model.layers.1.self_attn.k_proj.weight"),
    )
    yield changed("no pair", lambda w, _: w.pop(key.replace("lora_A", "lora_B"))), "has no lora_B beside it"
    yield changed("shape", lambda w, _: w.update({key: torch.zeros(4, 7)})), "is for a weight of shape"
    yield changed("prefix", lambda w, _: w.update({"stray.weight": torch.zeros(1)})), "can't be placed"
    yield changed("other", lambda _, s: s.update({"peft_type": "IA3"})), "adapter of type IA3"
    yield changed("bias", lambda _, s: s.update({"lora_bias": True})), "lora_bias"
    stray = "base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector.weight"
    gone = key.replace("q_proj", "o_proj")
    yield (
        changed(
            "dora", lambda w, _: (w.update({stray: torch.ones(32)}), w.pop(gone), w.pop(gone.replace("_A", "_B")))
        ),
        "belongs to no lora_A",
    )


def test_what_cannot_be_merged_is_refused_by_name_before_a_byte_is_written(base, tmp_path):
    for adapter, says in refusals(base, tmp_path):
        with pytest.raises(MergeError, match=r".") as caught:
            merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "m")
        assert says in str(caught.value), adapter.name
        assert not list(tmp_path.glob("*m")) and not list(tmp_path.glob(".m*"))


def test_wrong_folders_are_refused(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    values = {"base_model_path": base, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    (tmp_path / "m").mkdir()
    cases = [
        ({}, "exists already"),
        ({"output_path": base}, "exists already"),
        ({"output_path": base, "overwrite": True}, "would replace the base"),
        ({"base_model_path": tmp_path / "no", "output_path": tmp_path / "n"}, "there is no such folder"),
        ({"adapter_model_path": base, "output_path": tmp_path / "n"}, "is no adapter folder"),
        ({"save_dtype": "int8", "output_path": tmp_path / "n"}, "must be one of keep"),
        ({"adapter_weights": [1.0, 2.0], "output_path": tmp_path / "n"}, "2 factors for 1 adapters"),
    ]
    for changes, says in cases:
        with pytest.raises(MergeError, match=says):
            merge_lora(**(values | changes))
    merge_lora(**values, overwrite=True)
    other = tiny_model(tmp_path / "other", seed=1)
    identity = json.dumps(base_identity(other))
    (adapter / BASE_IDENTITY).write_text(identity)
    with pytest.raises(MergeError, match="belongs to another base"):
        merge_lora(**(values | {"output_path": tmp_path / "n"}))


def test_a_cut_off_shard_is_named(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    broken = shutil.copytree(base, tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    values = {"base_model_path": broken, "adapter_model_path": adapter, "output_path": tmp_path / "m"}
    for content in (whole[:-10], whole[:40], b"", b"\xff" * 200):
        shard.write_bytes(content)
        with pytest.raises(ModelError, match=shard.name):
            merge_lora(**values)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        merge_lora(**values)


def test_a_pickled_base_is_converted(base, tmp_path):
    """`.bin` files are read as plain tensors; the result is that of the same base in safetensors."""
    pickled = shutil.copytree(base, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    index = {}
    for number, path in enumerate(sorted(base.glob("*.safetensors")), 1):
        torch.save(load_file(path), pickled / f"pytorch_model-{number:05d}-of-00009.bin")
        index |= dict.fromkeys(load_file(path), f"pytorch_model-{number:05d}-of-00009.bin")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=ATTENTION)
    values = {"adapter_model_path": adapter}
    merge_lora(base_model_path=base, output_path=tmp_path / "a", **values)
    (adapter / BASE_IDENTITY).write_text(json.dumps(base_identity(pickled)))
    merge_lora(base_model_path=pickled, output_path=tmp_path / "b", **values)
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert verify_merge(tmp_path / "b") == len(left)
    assert not list((tmp_path / "b").glob("*.bin")) and not list(tmp_path.glob(".b*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")

    class Code:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/run",))

    torch.save({"model.norm.weight": Code()}, sorted(pickled.glob("*.bin"))[0])
    with pytest.raises(MergeError, match=r"00001-of-00009\.bin: cannot be read as plain tensors"):
        merge_lora(base_model_path=pickled, output_path=tmp_path / "c", **values)
    assert not (tmp_path / "run").exists() and not (tmp_path / "c").exists()


def test_a_quantised_base_and_a_full_disk_are_refused(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(MergeError, match="is quantised"):
        merge_lora(base_model_path=quantised, adapter_model_path=adapter, output_path=tmp_path / "m")
    need(os.geteuid() == 0, "only root can mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine doesn't let its root mount a file system")
    try:
        with pytest.raises(MergeError, match="the disk has"):
            merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=small / "m")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_trained_biases_and_the_plain_reference(tmp_path):
    model = tiny_model(tmp_path / "base", attention_bias=True)
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], bias="lora_only")
    assert any(name.endswith("bias") for name in load_file(adapter / "adapter_model.safetensors"))
    merge_lora(base_model_path=model, adapter_model_path=adapter, output_path=tmp_path / "m")
    expected, merged = peft_merged(model, [adapter], tmp_path / "peft"), tensors(tmp_path / "m")
    assert expected.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    verify_merge(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    ids = torch.arange(1, 25)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = loaded(ids[None]).logits[0] - reference_logits(merged, config, ids)
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense", "hy_v3"])
def test_every_family_merges_as_peft_does(family, tmp_path):
    model = tiny_model(tmp_path / "base", family)
    adapter = adapter_of(model, tmp_path / "adapter", target_modules=ATTENTION)
    merge_lora(base_model_path=model, adapter_model_path=adapter, output_path=tmp_path / "m")
    expected, merged = peft_merged(model, [adapter], tmp_path / "peft"), tensors(tmp_path / "m")
    assert expected.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert first_layers_pass(tmp_path / "m").startswith("forward pass: the first 2 layers")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.embed_tokens.weight"][3] = float("nan")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="is no number"):
        first_layers_pass(tmp_path / "m")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="q_proj"):
        first_layers_pass(tmp_path / "m")


def test_linked_shards_take_no_space(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[0])
    result = merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "m", link=True)
    linked = [path for path in (tmp_path / "m").glob("*.safetensors") if path.stat().st_nlink > 1]
    assert len(linked) == result.linked_shards > 0
    untouched = {path.name for path in linked}
    assert all((tmp_path / "m" / name).samefile(base / name) for name in untouched)
    verify_merge(tmp_path / "m")


def test_verify_finds_a_changed_byte(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "m")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(MergeError, match="is not what base and adapter make"):
        verify_merge(tmp_path / "m")


# Imports once and forks for each merge, so that twenty kills don't cost twenty starts.
FORKS = """
import os, sys, time
import hynb.merge as m
def slow(report):
    time.sleep(0.004)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        paths = dict(zip(("base_model_path", "adapter_model_path", "output_path"), sys.argv[1:]))
        m.merge_lora(**paths, progress=slow)
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def test_twenty_kills_leave_the_base_and_nothing_that_looks_finished(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=ATTENTION)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    output, rng = tmp_path / "m", random.Random(4)
    server = subprocess.Popen(
        [sys.executable, "-c", FORKS, base, adapter, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    kills = finished = resumed = 0
    while kills < 20:
        server.stdin.write("go\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        time.sleep(rng.uniform(0, 0.12))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed = int(server.stdout.readline()) == signal.SIGKILL
        kills += killed
        assert {path.name: path.read_bytes() for path in base.iterdir()} == before
        resumed += any(tmp_path.glob(".m.partial/*.safetensors"))
        if output.exists():
            verify_merge(output)
            shutil.rmtree(output)
            finished += 1
        assert finished < 200, "merges end before they can be killed"
    server.stdin.close()
    assert server.wait(timeout=30) == 0
    server.stdout.close()
    assert resumed, "some kills left finished shards"
    result = merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=output)
    assert verify_merge(output) == result.tensors_changed + result.tensors_copied
    assert not list(tmp_path.glob(".m*"))


def test_the_command(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=ATTENTION)
    command = [sys.executable, "-m", "hynb.cli", "merge", "--base_model_path", base, "--output_path", tmp_path / "m"]
    done = subprocess.run(
        [*command, "--adapter_model_path", adapter, "--verify"], capture_output=True, text=True, check=True
    )
    assert "12 tensors changed" in done.stdout and "verified: all" in done.stdout
    assert "forward pass: the first 2 layers load and give finite logits" in done.stdout
    again = subprocess.run([*command, "--adapter_model_path", adapter], capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
