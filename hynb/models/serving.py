"""Which inference servers load a model, and the commands that start them.

Seen in vLLM 0.33.0 (model_executor/models/registry.py, hy_v3.py) and in SGLang's repository (srt/models/hunyuan.py,
hunyuan_v3.py): the architectures that they register. In vLLM 0.33.0 the dense and the MoE models of hunyuan_v1 run on
transformers' implementation, which has no cross-layer attention; SGLang's code for it is switched off.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hynb.errors import ModelError
from hynb.files import read_json

VLLM = frozenset({"HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "HYV3ForCausalLM"})
SGLANG = frozenset({"HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "HYV3ForCausalLM"})


def serving_text(folder: str | Path) -> str:
    """One line per server: the command that serves a model folder, or why it does not load the model.

    Raises:
        ModelError: the folder has no config.json.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None:
        raise ModelError(f"{folder}: has no config.json, so it is not a model folder")
    path = shlex.quote(str(folder))
    # A config.json that names code of its own is read with that code.
    trust = " --trust-remote-code" if "AutoConfig" in (config.get("auto_map") or {}) else ""
    commands = {
        "vLLM": (VLLM, f"vllm serve {path}{trust}"),
        "SGLang": (SGLANG, f"python -m sglang.launch_server --model-path {path}{trust}"),
    }
    lines = []
    for name, (architectures, command) in commands.items():
        reason = _not_served(config, architectures)
        lines.append(f"{name}: {f'does not serve this model: {reason}' if reason else command}")
    return "\n".join(lines)


def _not_served(config: Mapping[str, Any], architectures: frozenset[str]) -> str:
    """Why a server does not load a model; empty if it does."""
    own = config.get("architectures") or []
    if not architectures & set(own):
        return f"its architecture, {', '.join(own) or 'none in config.json'}, is not registered there"
    if config.get("use_cla") and (config.get("cla_share_factor") or 1) > 1:
        return "its layers share K and V (use_cla), which is not implemented there"
    return ""
