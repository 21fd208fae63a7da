"""LoRA adapters with random weights, PEFT's own merge as the reference, and the tensors of a folder, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_adapter(base: Path, folder: Path, *, seed: int = 0, **settings) -> Path:
    """Saves an adapter whose weights are all different from zero, as after training.

    Args:
        settings: of PEFT's LoraConfig.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                scale = 0.05 if "magnitude" in name else 0.1
                weight.add_(scale * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapters: Sequence[Path], folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's own merge in float32, by their names on the disk."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder, of all its shards."""
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}
