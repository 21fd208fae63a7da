"""Checkpoint folders without a training run, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from hynb.files import write_json
from hynb.runs import CHECKPOINT_RECORD, checkpoint_files, file_digests


def make_checkpoint(folder: Path, step: int = 3) -> Path:
    """A checkpoint with one weight file, an index, an optimizer state and a record."""
    (folder / f"global_step{step}").mkdir(parents=True)
    save_file({"w": torch.arange(1000.0)}, folder / "model-1.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": "model-1.safetensors"}})
    write_json(folder / "trainer_state.json", {"global_step": step})
    (folder / f"global_step{step}" / "optim_states.pt").write_bytes(bytes(range(256)) * 40)
    write_json(folder / CHECKPOINT_RECORD, {"files": file_digests(folder, checkpoint_files(folder))})
    return folder
