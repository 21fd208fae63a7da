"""The notebooks, and the parameters of a training small enough to run in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def small_training(model: Path, data: Path, **values: Any) -> dict[str, Any]:
    """Parameters of a LoRA training of four steps, as papermill takes them.

    Args:
        values: other parameters, or other values.
    """
    return {
        "model_name_or_path": str(model),
        "train_data_file": str(data),
        "output_dir": "runs/first",
        "use_lora": True,
        "lora_rank": 4,
        "learning_rate": 0.01,
        "max_steps": 4,
        "save_steps": 2,
        "max_seq_length": 256,
        "num_processes": 1,
    } | values
