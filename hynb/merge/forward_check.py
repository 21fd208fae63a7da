"""A forward pass through the first layers of a merged model, if the memory of this machine suffices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.errors import HynbError, MergeError
from hynb.files import read_json, size_text
from hynb.plan import memory

_LAYERS = 2
_TOKENS = 16
_FLOAT32_BYTES = 4


def first_layers_pass(folder: Path) -> str:
    """Loads the embeddings and the first layers of a model with transformers and checks that the logits are finite.

    Returns:
        one line that says what was checked, or why nothing was.

    Raises:
        MergeError: transformers cannot load the folder, or the logits contain NaN or infinity.
    """
    try:
        model_config = read_json(folder / "config.json") or {}
        layers = min(_LAYERS, model_config.get("num_hidden_layers", 0))
        parameters = memory.count_parameters(model_config | {"num_hidden_layers": layers}).total
    except HynbError as error:
        return f"no forward pass: {error}"
    needed_bytes, available_bytes = parameters * _FLOAT32_BYTES, psutil.virtual_memory().available
    if needed_bytes > available_bytes // 2:
        return (
            f"no forward pass: {layers} layers need {size_text(needed_bytes)} of memory, more than half of the "
            f"{size_text(available_bytes)} that are free"
        )
    model = _load(folder, layers)
    with torch.no_grad():
        logits = model.eval()(torch.arange(_TOKENS)[None] % model.config.vocab_size).logits
    if not torch.isfinite(logits).all():
        raise MergeError(f"{folder}: the first {layers} layers give logits that are NaN or infinite")
    return f"forward pass: the first {layers} layers load and give finite logits"


def _load(folder: Path, layers: int) -> PreTrainedModel:
    """The model of a folder with its first layers alone, in float32."""
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = config.mlp_layer_types[:layers]
    try:
        # transformers' annotation leaves out the pair that output_loading_info returns.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise MergeError(f"{folder}: transformers cannot load the model: {error}") from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise MergeError(f"{folder}: tensors are missing or have the wrong shape: {', '.join(names[:5])}")
    return model
