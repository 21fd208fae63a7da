"""Absolute paths of a Config, so that it means the same in any directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hynb.config.schema import Config
from hynb.data import absolute_patterns
from hynb.plan import zero

_PATHS = (
    *("model_name_or_path", "tokenizer_name_or_path", "output_dir", "hostfile", "ssh_config"),
    "resume_from_checkpoint",
)


def absolute_paths(config: Config) -> Config:
    """The same Config with every path absolute, so that it means the same in any directory."""
    changes = {}
    for name in _PATHS:
        value = getattr(config, name)
        if value is not None and not (name == "resume_from_checkpoint" and value == "last"):
            changes[name] = str(Path(value).expanduser().absolute())
    for name in ("train_data_file", "eval_data_file"):
        if (value := getattr(config, name)) is not None:
            changes[name] = absolute_patterns(value)
    if config.deepspeed not in zero.PRESETS and Path(config.deepspeed).expanduser().is_file():
        changes["deepspeed"] = str(Path(config.deepspeed).expanduser().absolute())
    return dataclasses.replace(config, **changes)
