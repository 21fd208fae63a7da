"""What the Trainer's callback checks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hynb.data import SeededSampler
from hynb.errors import ModelError
from hynb.runs import RunDir
from hynb.train import RunCallback


def test_an_adapter_weight_without_a_gradient_stops_the_run(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = torch.nn.Linear(2, 2)
            self.lora_B = torch.nn.Linear(2, 2)
            self.unused_lora_B = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.lora_B(self.lora_A(x)).sum()

    model, args = Model(), SimpleNamespace(process_index=0, world_size=1)
    state, control = SimpleNamespace(global_step=0, max_steps=9), SimpleNamespace()
    given = {"writer": None, "sampler": SeededSampler(1, 0)}
    callback = RunCallback(run_dir=RunDir(tmp_path), model=model, **given)
    callback.on_train_begin(args, state, control)
    model(torch.ones(1, 2)).backward()
    with pytest.raises(ModelError, match=r"2 adapter weights got no gradient in the first step.*unused_lora_B"):
        callback.on_step_end(args, state, control)
    del model.unused_lora_B
    callback = RunCallback(run_dir=RunDir(tmp_path), model=model, **given)
    callback.on_train_begin(args, state, control)
    model(torch.ones(1, 2)).backward()
    callback.on_step_end(args, state, control)
