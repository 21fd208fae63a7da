"""What follows a run step by step: status, stop requests, the sampling order, gradients of the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hynb.data import SeededSampler
from hynb.errors import ModelError
from hynb.runs import RunDir, RunWriter
from hynb.train.process import rotate_output
from hynb.train.stop_flag import StopFlag
from hynb.train.termination import Termination


class RunCallback(TrainerCallback):
    """Follows a run step by step: epoch of the sampling order, status, stop requests, gradients of the adapter.

    Args:
        supervised: a SIGTERM to this rank stops all of them after a checkpoint.
        begin: called on every rank when everything is loaded, before the first step.

    Attributes:
        stopped_by: what ended training before its last step, as a text that follows "stopped"; empty otherwise.
    """

    def __init__(
        self,
        *,
        run_dir: RunDir,
        writer: RunWriter | None,
        model: torch.nn.Module,
        sampler: SeededSampler,
        supervised: bool = False,
        begin: Callable[[TrainerState], None] | None = None,
    ) -> None:
        self._begin = begin
        self._supervised = supervised
        self.stopped_by = ""
        self._sampler = sampler
        self._run_dir = run_dir
        self._writer = writer
        self._model = model
        self._without_gradient: set[str] = set()
        self._hooks: list[Any] = []
        self._stop_flag: StopFlag | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Shows that training begins, and watches which adapter weights get a gradient in the first step."""
        if self._begin:
            self._begin(state)
        self._stop_flag = StopFlag(self._run_dir, Termination(supervised=self._supervised))
        if self._writer:
            self._writer.step(state.global_step)
            self._writer.phase("training")
            self._writer.status("running", global_step=state.global_step, max_steps=state.max_steps)
        for name, weight in self._model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                self._without_gradient.add(name)
                self._hooks.append(weight.register_hook(lambda _, name=name: self._without_gradient.discard(name)))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leaves no message between the ranks under way."""
        if self._stop_flag:
            self._stop_flag.finish()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Sets the sampler's epoch: accelerate does not reach a sampler behind the batches that a resume skips."""
        self._sampler.set_epoch(math.floor(state.epoch or 0))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A run that has stopped has been saved: nothing is left to be done at the end of its epoch."""
        if self.stopped_by:
            control.should_evaluate = control.should_save = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Looks for a stop request, which all ranks follow at the same step."""
        self._check_adapter_gradients()
        if self._writer:
            self._writer.step(state.global_step)
        assert self._stop_flag is not None
        if self._stop_flag.is_set() and state.global_step < state.max_steps:
            self.stopped_by = self._stop_flag.cause()
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
            # What asks for the end may not wait for an evaluation.
            control.should_evaluate = False
            if self._writer:
                self._writer.event("stop", state.global_step)
                self._writer.status("stopping", global_step=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keeps this rank's log from growing for ever."""
        rotate_output(self._run_dir.log)

    def _check_adapter_gradients(self) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._without_gradient:
            names = sorted(self._without_gradient)
            raise ModelError(
                f"{len(names)} adapter weights got no gradient in the first step, so they would never be "
                f"trained: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}. "
                "Leave their modules out of lora_target_modules"
            )
