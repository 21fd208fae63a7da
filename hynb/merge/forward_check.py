"""A forward pass through the first layers of a merged model, where memory holds them."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hynb.hunyuan_large  # noqa: F401  registers the model with the Auto classes
from hynb.errors import HynbError, MergeError
from hynb.files import read_json
from hynb.plan import memory

_LAYERS = 2
_TOKENS = 16


def first_layers_pass(folder: Path) -> str:
    """Loads the embeddings and the first layers as transformers does, and looks at what comes out.

    Returns:
        a line that says what was done, or why not.

    Raises:
        MergeError: the folder doesn't load, or its output is no number.
    """
    try:
        model_config = read_json(folder / "config.json") or {}
        few = model_config | {"num_hidden_layers": min(_LAYERS, model_config.get("num_hidden_layers", 0))}
        needed = memory.count_parameters(few).total * 4
    except HynbError as error:
        return f"no forward pass: {error}"
    available = psutil.virtual_memory().available
    if needed > available // 2:
        return f"no forward pass: {_LAYERS} layers take {needed / 1e9:.3g} GB and {available / 1e9:.3g} GB are free"
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = few["num_hidden_layers"]
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = config.mlp_layer_types[: config.num_hidden_layers]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise MergeError(f"{folder}: transformers cannot load it: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise MergeError(f"{folder}: transformers misses {', '.join(names[:5])}")
    with torch.no_grad():
        logits = model.eval()(torch.arange(_TOKENS)[None] % config.vocab_size).logits
    if not torch.isfinite(logits).all():
        raise MergeError(f"{folder}: the first {config.num_hidden_layers} layers give an output that is no number")
    return f"forward pass: the first {config.num_hidden_layers} layers load and give finite logits"
