"""Every entry of the table of model families against the models themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import OF_FAMILY, SIZES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.config import Config, random_model_config
from hynb.errors import ModelError
from hynb.families import FAMILIES, family_of


def tiny(model_type: str) -> PreTrainedModel:
    """A random model of the family, in float32."""
    torch.manual_seed(0)
    sizes = SIZES | OF_FAMILY[model_type]
    config = AutoConfig.for_model(model_type, vocab_size=90, pad_token_id=0, initializer_range=0.4, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_every_family_has_sizes_of_a_tiny_model():
    """All tests of families take their models from this table: a new family is one entry here and one there."""
    assert list(OF_FAMILY) == list(FAMILIES)
    assert all(family_of(model_type).model_type == model_type for model_type in OF_FAMILY)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_entry_names_the_classes_of_its_models(model_type):
    family, model = family_of(model_type), tiny(model_type)
    block, router = family.moe_block_class(), family.router_class()
    assert (block is None) == (router is None) == (not getattr(model.config, "num_experts", None))
    if block is None or router is None:
        return
    layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, block)]
    assert layers
    for mlp in layers:
        assert [type(module) for module in mlp.modules()].count(router) == 1
    # No other module counts as a router or a MoE block, of a dense layer for one.
    assert sum(isinstance(module, router) for module in model.modules()) == len(layers)
    assert sum(isinstance(module, block) for module in model.modules()) == len(layers)


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.router])
def test_a_router_returns_logits_weights_and_expert_ids(model_type):
    family, model = family_of(model_type), tiny(model_type)
    router_class, outputs = family.router_class(), []
    assert router_class is not None
    for module in model.modules():
        if isinstance(module, router_class):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(torch.arange(1, 13)[None])
    assert outputs
    for output in outputs:
        logits, weights = (item for item in output if item.is_floating_point())
        (ids,) = (item for item in output if not item.is_floating_point())
        assert output[0] is logits and logits.shape == (12, model.config.num_experts)
        assert ids.shape == weights.shape and len(ids) == 12
        scores = logits.sigmoid() if family.sigmoid_router else logits.softmax(-1)
        # Weights are in proportion to the scores of the chosen experts, by the function that the entry names.
        chosen = scores.gather(1, ids)
        torch.testing.assert_close(weights / weights.sum(1, keepdim=True), chosen / chosen.sum(1, keepdim=True))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlp_sizes_equal_those_of_a_model(model_type):
    family, model = family_of(model_type), tiny(model_type)
    model_config, router_class = model.config.to_dict(), family.router_class()
    for index, layer in enumerate(model.model.layers):
        size = family.mlp_size(model_config, index)
        router = shared = 0
        for name, module in layer.mlp.named_children():
            parameters = sum(weight.numel() for weight in module.parameters())
            router += parameters if router_class and isinstance(module, router_class) else 0
            shared += parameters if name.startswith("shared") else 0
        total = sum(weight.numel() for weight in layer.mlp.parameters())
        assert (size.router, size.shared, size.experts) == (router, shared, total - router - shared)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_active_width_is_what_one_token_passes_through(model_type):
    """The weights of the MLP that get a gradient from a single token: its experts and the shared MLP."""
    family, model = family_of(model_type), tiny(model_type)
    model(torch.tensor([[7]])).logits.square().sum().backward()
    for index, layer in enumerate(model.model.layers):
        router = family.router_class()
        routers = [module for module in layer.mlp.modules() if router and isinstance(module, router)]
        of_router = {id(weight) for module in routers for weight in module.parameters()}
        used = sum(
            int(weight.grad.count_nonzero()) for weight in layer.mlp.parameters() if id(weight) not in of_router
        )
        width = family.mlp_size(model.config.to_dict(), index).active_width
        assert used == 3 * model.config.hidden_size * width


@pytest.mark.parametrize("model_type", FAMILIES)
def test_stored_names_are_those_that_transformers_writes(model_type, tmp_path):
    family, model = family_of(model_type), tiny(model_type)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for name, weight in model.state_dict().items():
        if ".experts." not in name and name not in model.all_tied_weights_keys:
            torch.testing.assert_close(written[family.stored_name(name)], weight, rtol=0, atol=0)
    in_file = {family.stored_name(name) for name in model.state_dict()}
    assert {name for name in written if ".experts." not in name} <= in_file


def test_mtp_layers_come_after_the_others():
    family, model_config = family_of("hy_v3"), {"num_hidden_layers": 80, "num_nextn_predict_layers": 1}
    names = {f"model.layers.{index}.mlp.experts.1.up_proj.weight": index for index in (0, 8, 79, 80, 81, 800)}
    assert [names[name] for name in names if family.is_mtp_tensor(name, model_config)] == [80]
    assert not family.is_mtp_tensor("model.norm.weight", model_config)
    for config in ({"num_hidden_layers": 80}, model_config | {"num_nextn_predict_layers": 0}):
        assert not any(family.is_mtp_tensor(name, config) for name in names)
    assert not any(family_of("hunyuan_v1_moe").is_mtp_tensor(name, model_config) for name in names)


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="model_type = llama: not supported; hynb supports hunyuan, hunyuan_v1_moe"):
        family_of("llama")
    with pytest.raises(ModelError, match="model_type = None"):
        family_of(None)


def test_no_module_but_the_table_compares_with_a_familys_name():
    """What differs between families is a field of their entry."""
    package = Path(__file__).resolve().parents[1] / "hynb"
    found = [
        f"{path.relative_to(package)}:{node.lineno}: {node.value}"
        for path in package.rglob("*.py")
        if path.name != "families.py" and path.parent.name != "hunyuan_large"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in FAMILIES
    ]
    assert found == []


def test_a_random_model_is_of_the_family_whose_own_parameters_are_given():
    families = [family for family in FAMILIES.values() if family.random_model]
    assert [family.random_model.chosen_by for family in families].count(()) == 1
    for family in families:
        for name in family.random_model.chosen_by or [None]:
            sizes = random_model_config(Config(num_layers=4, **({name: 2} if name else {})))
            assert sizes["model_type"] == family.model_type
            config = AutoConfig.for_model(vocab_size=90, **sizes)
            assert all(getattr(config, key) == value for key, value in sizes.items() if key != "rope_scaling")
