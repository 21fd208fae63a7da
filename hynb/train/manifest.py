"""manifest.json: what a run was made of."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hynb.config import Config
from hynb.data import data_hash
from hynb.files import read_json
from hynb.runs import RunDir, base_identity

_PACKAGES = ("hynb", "torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors")


def manifest(
    config: Config,
    ds_config: dict[str, Any],
    *,
    base: Path | None,
    hosts: Sequence[str],
    notes: Sequence[str],
    **facts: Any,
) -> dict[str, Any]:
    """The content of a run's manifest.

    Args:
        ds_config: DeepSpeed's settings as they were used.
        base: folder of the base model; None for a random one.
        hosts: names of the hosts, in the order of their ranks.
        notes: what was logged while the run started.
        facts: counts of parameters and data, world size, ZeRO stage and the like.
    """
    assert config.train_data_file is not None
    return {
        "v": 1,
        "config": config.values() | {"training_args": config.training_args},
        "ds_config": ds_config,
        "argv": sys.argv,
        "hosts": list(hosts),
        "started_at": time.time(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "base": base_identity(base) if base else None,
        "data_hash": data_hash(config.train_data_file),
        "notes": list(notes),
        "restarts": (read_json(RunDir(config.output_dir).launch) or {}).get("restarts", []),
        **facts,
    }
