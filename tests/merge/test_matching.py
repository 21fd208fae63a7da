"""Every kind of adapter is merged as PEFT merges it; an adapter that cannot be matched is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import ATTENTION, load_tensors, make_adapter, merge_with_peft
from peft import PeftModel
from reference_model import logits as reference_logits
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hynb.errors import MergeError
from hynb.merge import merge_lora, verify_merge

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


def units_apart(left: torch.Tensor, right: torch.Tensor) -> int:
    """The largest distance of two bf16 tensors in units in the last place."""
    as_integers = [tensor.contiguous().view(torch.int16).int() for tensor in (left, right)]
    ordered = [torch.where(value < 0, -(value & 0x7FFF), value) for value in as_integers]
    return (ordered[0] - ordered[1]).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merge_equals_pefts_rounded_once(base, tmp_path, variant):
    adapter = make_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    result = merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "merged")
    expected = merge_with_peft(base, [adapter], tmp_path / "peft")
    before, merged = load_tensors(base), load_tensors(tmp_path / "merged")
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


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense", "hy_v3"])
def test_a_merge_equals_pefts_for_every_family(family, tmp_path):
    model = tiny_model(tmp_path / "base", family)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=ATTENTION)
    merge_lora(base_model_path=model, adapter_model_path=adapter, output_path=tmp_path / "m")
    expected, merged = merge_with_peft(model, [adapter], tmp_path / "peft"), load_tensors(tmp_path / "m")
    assert expected.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("shards", "targets"),
    [(1, ["lm_head"]), (3, ["q_proj", "lm_head"]), (1, ["embed_tokens"]), (3, ["lm_head", "embed_tokens"])],
)
def test_an_adapted_output_layer_or_embedding(tmp_path, tied, shards, targets):
    """Tied layers get a tensor each: PEFT's merge would change both, and the merged model answer differently."""
    model = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    if shards > 1:
        whole = AutoModelForCausalLM.from_pretrained(model)
        (model / "model.safetensors").unlink()
        whole.save_pretrained(model, max_shard_size="120KB")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=targets)
    merge_lora(base_model_path=model, adapter_model_path=adapter, output_path=tmp_path / "m")
    verify_merge(tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    before, after = load_tensors(model), load_tensors(tmp_path / "m")
    same = torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert same is ("embed_tokens" not in targets)
    if not tied:
        for name, weight in merge_with_peft(model, [adapter], tmp_path / "peft").items():
            torch.testing.assert_close(after[name], weight, msg=name)


def test_several_adapters_are_merged_one_after_the_other(base, tmp_path):
    first = make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    second = make_adapter(base, tmp_path / "b", seed=1, target_modules=["q_proj", "v_proj"])
    merge_lora(
        base_model_path=base, adapter_model_path=[first, second], output_path=tmp_path / "m", save_dtype="fp32"
    )
    expected, merged = merge_with_peft(base, [first, second], tmp_path / "peft"), load_tensors(tmp_path / "m")
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name])


def test_an_adapters_weight_scales_its_change(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    inputs = {"base_model_path": base, "adapter_model_path": adapter, "save_dtype": "fp32"}
    merge_lora(**inputs, output_path=tmp_path / "half", adapter_weights=[0.5])
    merge_lora(**inputs, output_path=tmp_path / "whole")
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_tensors(base)[name].float()
    half, whole = (load_tensors(tmp_path / folder)[name] - before for folder in ("half", "whole"))
    torch.testing.assert_close(half * 2, whole)


def test_trained_biases_and_the_plain_reference_model(tmp_path):
    model = tiny_model(tmp_path / "base", attention_bias=True)
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], bias="lora_only")
    assert any(name.endswith("bias") for name in load_file(adapter / "adapter_model.safetensors"))
    merge_lora(base_model_path=model, adapter_model_path=adapter, output_path=tmp_path / "m")
    expected, merged = merge_with_peft(model, [adapter], tmp_path / "peft"), load_tensors(tmp_path / "m")
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


# -- refused

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")
# Layer 1 shares the keys of layer 0, so that it has no k_proj (CLA).
NO_K_PROJ = LORA_A.replace("layers.0", "layers.1").replace("q_proj", "k_proj")
O_PROJ = LORA_A.replace("q_proj", "o_proj")
MAGNITUDE = O_PROJ.replace("lora_A.weight", "lora_magnitude_vector.weight")


def add_absent_tensor(weights: dict, settings: dict) -> None:
    weights |= {NO_K_PROJ: weights[LORA_A].clone(), NO_K_PROJ.replace("_A", "_B"): weights[LORA_A].clone()}


def leave_magnitude_alone(weights: dict, settings: dict) -> None:
    weights[MAGNITUDE] = torch.ones(32)
    del weights[O_PROJ], weights[O_PROJ.replace("_A", "_B")]


REFUSED: dict[str, tuple[Callable[[dict, dict], object], list[str]]] = {
    "a tensor that the base lacks": (
        add_absent_tensor,
        [f"{NO_K_PROJ} needs the tensor model.layers.1.self_attn.k_proj.weight, which the base does not have"],
    ),
    "no lora_B": (lambda weights, _: weights.pop(LORA_B), [f"{LORA_A} has no matching lora_B"]),
    "no lora_A": (
        lambda weights, _: weights.pop(LORA_A),
        [f"{LORA_B} has no matching lora_A, so it would not be merged"],
    ),
    "another shape": (
        lambda weights, _: weights.update({LORA_A: torch.zeros(4, 7)}),
        [f"{LORA_A} changes a weight of shape (32, 7), but model.layers.0.self_attn.q_proj.weight of the base has"],
    ),
    "a vector": (
        lambda weights, _: weights.update({LORA_B: torch.zeros(32)}),
        [f"{LORA_B} must be a matrix, and has shape (32,)"],
    ),
    "another prefix": (
        lambda weights, _: weights.update({"stray.weight": torch.zeros(1)}),
        ["stray.weight does not start with base_model.model., so it cannot be matched"],
    ),
    "another method": (
        lambda _, settings: settings.update({"peft_type": "IA3"}),
        ["the adapter is of type IA3; hynb merges LORA"],
    ),
    "a setting that is not supported": (
        lambda _, settings: settings.update({"lora_bias": True}),
        ["adapter_config.json: has lora_bias = True: a bias on lora_B cannot be merged"],
    ),
    "a magnitude without its matrices": (
        leave_magnitude_alone,
        [f"{MAGNITUDE} has no matching lora_A, so it would not be merged"],
    ),
    "several at once": (
        lambda weights, settings: (weights.pop(LORA_B), settings.update({"lora_bias": True})),
        [f"{LORA_A} has no matching lora_B", "lora_bias = True"],
    ),
}


@pytest.fixture(scope="module")
def plain_adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=ATTENTION)


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused_before_a_byte_is_written(base, plain_adapter, tmp_path, case):
    change, messages = REFUSED[case]
    weights = load_file(plain_adapter / "adapter_model.safetensors")
    settings = json.loads((plain_adapter / "adapter_config.json").read_text())
    change(weights, settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(MergeError) as caught:
        merge_lora(base_model_path=base, adapter_model_path=adapter, output_path=tmp_path / "m")
    assert len(caught.value.problems) == len(messages)
    for message in messages:
        assert message in str(caught.value) and str(adapter) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_tensor_in_a_dtype_without_arithmetic_is_refused(base, plain_adapter, tmp_path):
    coarse = tmp_path / "float8"
    coarse.mkdir()
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = load_tensors(base)
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, coarse / "model.safetensors", metadata={"format": "pt"})
    (coarse / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(MergeError, match=rf"{name} has dtype F8_E4M3.*merge into the bf16 or fp16 model"):
        merge_lora(base_model_path=coarse, adapter_model_path=plain_adapter, output_path=tmp_path / "m")
