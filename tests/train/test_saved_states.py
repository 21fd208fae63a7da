"""DeepSpeed's states are unpickled with the classes that they hold, and with no others unless they are trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from hynb.errors import RunError
from hynb.train.saved_states import load_states, restricted_unpickling


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("mmap", [False, True])
def test_states_are_read(tmp_path, mmap):
    dynamic = {
        "init_scale": 8,
        "scale_window": 4,
        "min_scale": 1,
        "delayed_shift": 2,
        "consecutive_hysteresis": False,
    }
    scalers = [CreateLossScaler(torch.float16, 1.0, is_dynamic, dynamic) for is_dynamic in (False, True)]
    states = {"scalers": scalers, "stage": ZeroStageEnum.gradients, "at": fragment_address(3, 4), "x": torch.ones(3)}
    torch.save(states, tmp_path / "states.pt")
    found = load_states(tmp_path / "states.pt", mmap=mmap)
    assert found["stage"] == 2 and found["at"].start == 4 and torch.equal(found["x"], torch.ones(3))
    assert [vars(one) for one in found["scalers"]] == [vars(one) for one in scalers]


def test_what_runs_code_is_refused_by_name_unless_it_is_trusted(tmp_path):
    path, made = tmp_path / "optim_states.pt", tmp_path / "made"
    torch.save({"optimizer_state_dict": Evil(made)}, path)
    with restricted_unpickling(trusted=False):
        engine = TorchCheckpointEngine()
        with pytest.raises(RunError, match=f"{path}: holds objects .*mkdir.* trust_checkpoint: true"):
            engine.load(str(path), map_location="cpu")
    assert not made.exists()
    with restricted_unpickling(trusted=True):
        engine.load(str(path), map_location="cpu")
    assert made.is_dir()


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "states.pt").write_bytes(b"not a pickle")
    with pytest.raises(RunError, match=str(tmp_path / "states.pt")):
        load_states(tmp_path / "states.pt")
