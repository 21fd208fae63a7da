"""Makes the paths of a Config absolute, so that it means the same in any directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hynb.config.schema import Config
from hynb.data import absolute_patterns
from hynb.plan import zero

PATHS = (
    "model_name_or_path",
    "tokenizer_name_or_path",
    "output_dir",
    "hostfile",
    "ssh_config",
    "resume_from_checkpoint",
)


def absolute_paths(config: Config) -> Config:
    """A copy of a Config with absolute paths; a preset's name and the checkpoint 'last' stay as they are."""
    changes: dict[str, str] = {}
    for name in PATHS:
        value = getattr(config, name)
        if value is not None and not (name == "resume_from_checkpoint" and value == "last"):
            changes[name] = _absolute(value)
    for name in ("train_data_file", "eval_data_file"):
        if (value := getattr(config, name)) is not None:
            changes[name] = absolute_patterns(value)
    if config.deepspeed not in zero.PRESETS and Path(config.deepspeed).expanduser().is_file():
        changes["deepspeed"] = _absolute(config.deepspeed)
    return dataclasses.replace(config, **changes)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
