"""What breaks a rank from within: each function is called in every rank before it begins, by its name."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

# The letters of a line of the data whose values are made NaN.
MARK = "quixotic"


class _BadGradient(torch.autograd.Function):
    """Passes values on, and NaN as their gradient."""

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.nan)


def _break_layer(change: Any) -> None:
    """Changes the output of the second layer's MLP where the tokens of MARK are."""
    import hynb.train

    plain = hynb.train.load_model

    def load_model(config: Any, base: Any, tokenizer: Any, **kwargs: Any) -> Any:
        model = plain(config, base, tokenizer, **kwargs)
        letters = torch.tensor(tokenizer(MARK, add_special_tokens=False)["input_ids"])
        where: list[torch.Tensor] = []

        def look(_: Any, inputs: Any, __: Any) -> None:
            windows = inputs[0].unfold(1, len(letters), 1)
            found = (windows == letters).all(-1)
            where[:] = [torch.nn.functional.pad(found, (0, len(letters) - 1))]

        def spoil(_: Any, __: Any, output: Any) -> Any:
            values = output[0] if isinstance(output, tuple) else output
            if not where[0].any():
                return output
            values = change(values, where[0][..., None])
            return (values, *output[1:]) if isinstance(output, tuple) else values

        model.get_input_embeddings().register_forward_hook(look)
        model.model.layers[1].mlp.register_forward_hook(spoil)
        return model

    hynb.train.load_model = load_model


def nan_in_a_layer() -> None:
    """The second layer's MLP has NaN where the tokens of MARK are."""
    _break_layer(lambda values, where: values.masked_fill(where, torch.nan))


def nan_in_a_gradient() -> None:
    """The gradient of the second layer's MLP is NaN in the batch with MARK; the loss is not."""
    _break_layer(lambda values, _: _BadGradient.apply(values))


def slow_ranks() -> None:
    """Rank 1 takes long to compute a linear layer; rank 2 reads a batch for as long as the rest of a step takes."""
    from hynb.train import RunTrainer

    plain = RunTrainer.__init__

    def init(self: RunTrainer, **kwargs: Any) -> None:
        plain(self, **kwargs)
        if os.environ["RANK"] == "2":
            data: Any = type(kwargs["train_dataset"])
            read, ended = data.__getitem__, time.monotonic()

            def slow_read(self: Any, index: int) -> Any:
                nonlocal ended
                time.sleep(time.monotonic() - ended)
                ended = time.monotonic()
                return read(self, index)

            data.__getitem__ = slow_read

    RunTrainer.__init__ = init
    if os.environ["RANK"] == "1":
        forward = torch.nn.Linear.forward
        torch.nn.Linear.forward = lambda self, values: (time.sleep(0.005), forward(self, values))[1]


def fill(path: Path) -> None:
    """Fills a small disk to the last byte with a file; never the machine's own."""
    size = shutil.disk_usage(path.parent).total
    assert size < 1e8, f"{path.parent} is not a small disk"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.tell() <= size:
            file.write(b"x" * 4096)


def full_disk_from_step_2() -> None:
    """The disk of the run folder is full to the last byte from step 2 on, and until the last checkpoint waits."""
    from hynb.train import RunTrainer, trainer

    trainer._SPACE_SECONDS = 0.1
    step, tell = RunTrainer.training_step, RunTrainer._tell_shortage

    def training_step(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        filler = self.run_dir.path.parent / "filler"
        if self.run_writer and self.state.global_step == 1 and not filler.exists():
            fill(filler)
        return step(self, *args, **kwargs)

    def tell_shortage(self: RunTrainer, text: str) -> None:
        tell(self, text)
        if self.run_writer and "waits" in text:
            (self.run_dir.path.parent / "filler").unlink()

    RunTrainer.training_step, RunTrainer._tell_shortage = training_step, tell_shortage


def data_is_cut_at_step_3() -> None:
    """The second half of the data is gone from step 3 on, and no host has kept token ids of it."""
    from hynb.train import RunTrainer, datasets

    datasets.kept_tokens = lambda name: None
    step = RunTrainer.training_step

    def training_step(self: RunTrainer, *args: Any, **kwargs: Any) -> Any:
        data = Path(os.environ["DATA"])
        if self.run_writer and self.state.global_step == 2 and data.stat().st_size > int(os.environ["KEPT_BYTES"]):
            os.truncate(data, int(os.environ["KEPT_BYTES"]))
        return step(self, *args, **kwargs)

    RunTrainer.training_step = training_step
