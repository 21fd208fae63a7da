"""What an adapter is put on, and what the log says where PEFT chooses other modules than the ones that were named."""

from __future__ import annotations

import logging

import pytest
from training_runs import config_of
from transformers import AutoModelForCausalLM

from hynb.errors import ModelError
from hynb.train.adapter import add_adapter


@pytest.fixture
def config(files, tmp_path):
    return config_of(files, "hunyuan_v1_moe", tmp_path / "run", use_lora=True, lora_dropout=0.0)


def adapted(config, targets: list[str]) -> set[str]:
    """The parts of the names that tell which modules of the first layer have an adapter."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    named = add_adapter(model, config.replace(lora_target_modules=targets), None).named_parameters()
    trained = [name for name, weight in named if weight.requires_grad and ".layers.0." in name]
    return {name.partition(".layers.0.")[2].partition(".lora_")[0] for name in trained}


def test_adapters_for_mlps_that_peft_puts_on_the_experts_are_named(config, caplog):
    caplog.set_level(logging.INFO, "hynb")
    assert adapted(config, ["q_proj"]) == {"self_attn.q_proj"} and not caplog.messages
    found = adapted(config, ["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert found == {"self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer"}
    (message,) = caplog.messages
    assert "on all routed experts (down_proj, gate_up_proj) and none on the shared MLP" in message


def test_half_of_a_fused_pair_is_refused(config):
    with pytest.raises(ModelError, match="lora_target_modules = gate_proj: Cannot convert PEFT target"):
        adapted(config, ["gate_proj"])
