"""bf16 beside float32: adapters, routers, and the same losses under ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from adapters import load_tensors
from safetensors.torch import save_file
from training_runs import config_of, losses
from transformers import AutoModelForCausalLM

from hynb.train.checkpoint import base_tensors
from hynb.train.router_precision import compute_routers_in_float32, keep_frozen_routers
from hynb.train.router_statistics import routers

MOE = ("hunyuan", "hunyuan_v1_moe", "hy_v3")
# The distance of two neighbouring numbers in bf16, relative to them.
BF16_STEP = 2**-8


@pytest.fixture
def released(files, tmp_path):
    """Folders as models are released: bf16, with float32 routers."""

    def make(family):
        folder = shutil.copytree(files[family], tmp_path / family)
        weights = {
            name: weight if re.search(r"gate\.(wg\.)?weight|expert_bias", name) else weight.bfloat16()
            for name, weight in load_tensors(folder).items()
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("family", MOE)
def test_routers_compute_from_float32_weights(family, released):
    base = released(family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    names = [name for name, _ in routers(model, family)]
    compute_routers_in_float32(model)
    model.requires_grad_(False)
    # A router whose weight is float32 by its class is as DeepSpeed would make it.
    for name, _ in routers(model, family):
        model.get_submodule(name).bfloat16()
    kept = keep_frozen_routers(model, base_tensors(base))
    assert [re.sub(r"(\.wg)?\.weight$", "", name) for name in kept] == names
    seen = []
    for _, router in routers(model, family):
        router.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output[0])))
    with torch.no_grad():
        model(torch.arange(10, 30)[None])
    stored = load_tensors(base)
    weights = [weight for name, weight in sorted(stored.items()) if re.search(r"gate\.(wg\.)?weight", name)]
    assert len(seen) == len(weights) > 1
    for (hidden, logits), weight in zip(seen, weights, strict=True):
        assert logits.dtype == torch.float32
        expected = hidden.float().reshape(-1, hidden.shape[-1]) @ weight.T
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        rounded = hidden.float().reshape(-1, hidden.shape[-1]) @ weight.bfloat16().float().T
        assert not torch.allclose(logits, rounded, rtol=1e-6, atol=1e-6)


def test_a_router_with_an_adapter_stays_a_parameter(released):
    base = released("hunyuan")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).bfloat16().requires_grad_(False)
    assert not keep_frozen_routers(model, base_tensors(base), adapted=["wg"])


@pytest.mark.parametrize("family", MOE)
def test_losses_of_zero2_and_zero3_agree_in_bf16(family, released, files, ranks, tmp_path):
    base = released(family)
    found = {}
    for preset in ("ds_zero2_no_offload", "ds_zero3_no_offload"):
        values = {"deepspeed": preset, "bf16": True, "use_lora": True, "lora_dropout": 0.0, "max_steps": 20}
        # At a higher rate one token that goes to another expert, after a rounding, leads the runs apart.
        values |= {"save_steps": 20, "model_name_or_path": str(base), "learning_rate": 2e-3, "min_lr": 2e-4}
        run = ranks.train(config_of(files, family, tmp_path / preset, **values))
        found[preset] = list(losses(run).values())
        adapter = load_tensors(run.checkpoints()[-1])
        assert {weight.dtype for weight in adapter.values()} == {torch.bfloat16}, "the dtype of the weights beside it"
        notes = run.reader.manifest()["notes"]
        assert any("routers, which are not trained, keep the base's float32 weights" in note for note in notes)
    two, three = found.values()
    assert two == pytest.approx(three, rel=2 * BF16_STEP)
    assert sum(two[-5:]) < sum(two[:5]) - 0.1


@pytest.mark.parametrize("preset", ["ds_zero2_no_offload", "ds_zero3_no_offload"])
@pytest.mark.parametrize("family", MOE)
def test_trained_routers_are_float32(family, preset, released, files, ranks, tmp_path):
    base = released(family)
    values = {
        "deepspeed": preset,
        "bf16": True,
        "learning_rate": 1e-5,
        "min_lr": 1e-6,
        "max_steps": 4,
        "save_steps": 2,
    }
    values |= {"model_name_or_path": str(base)}
    run = ranks.train(
        config_of(files, family, tmp_path / "run", **values), before="training_runs:record_routers_in_float32"
    )
    before = {name: weight for name, weight in load_tensors(base).items() if re.search(r"gate\.(wg\.)?weight", name)}
    masters = torch.load(tmp_path / "run" / "routers.pt")
    assert len(before) > 1 and len(masters["optimizer"]) == len(masters["logits"]) == len(before)
    saved = load_tensors(run.checkpoints()[-1])
    for (name, start), weight in zip(sorted(before.items()), masters["optimizer"], strict=True):
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], weight), name
        assert not torch.equal(weight, weight.bfloat16().float())
        # Four steps of Adam at this rate: nearer to the base's float32 weight than to its rounding in bf16.
        assert 0 < (weight - start).abs().max() <= 4.1e-5
        assert (start.bfloat16().float() - start).abs().max() > 1e-4
    # What the routers computed in the last step is from the weights before it, of which there is no other copy.
    for hidden, logits, weight in masters["logits"]:
        torch.testing.assert_close(logits, hidden.float() @ weight.T, rtol=1e-6, atol=1e-6)

    whole = losses(run)
    middle = run.dir.checkpoint(2)
    values |= {"resume_from_checkpoint": str(middle), "model_name_or_path": None}
    resumed = ranks.train(config_of(files, family, tmp_path / "resumed", **values))
    assert losses(resumed) == {step: loss for step, loss in whole.items() if step > 2}
    again = load_tensors(resumed.checkpoints()[-1])
    assert all(torch.equal(again[name], saved[name]) for name in before)
