"""transformers' Trainer with what hynb adds: whole checkpoints, events, a stop file, a check of adapters."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hynb.data import IGNORED, SeededSampler
from hynb.errors import ModelError, RunError
from hynb.files import write_json
from hynb.runs import CHECKPOINT_RECORD, RunDir, RunWriter
from hynb.train.checkpoint import carry_over, keep_untrained_routers, write_base_identity
from hynb.train.host_folders import OwnFolders
from hynb.train.model import describe
from hynb.train.router_statistics import RouterWatch


class RunTrainer(Trainer):
    """A Trainer that writes the run folder.

    Args:
        base: folder of the base model; None for a random one.
        tokenizer_folder: whose files travel into full checkpoints.
        record: what a resume must find unchanged, written beside each checkpoint.
        keep_checkpoints: how many of the newest stay; None for all.
        sampler: the order of the training set.
        routers: counts where tokens go, and makes the balancing loss.
        folders: the run folders of several hosts that share none; None where there is one.
    """

    def __init__(
        self,
        *,
        base: Path | None,
        tokenizer_folder: Path,
        record: dict[str, Any],
        keep_checkpoints: int | None,
        writer: RunWriter | None,
        sampler: SeededSampler,
        routers: RouterWatch,
        folders: OwnFolders | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.run_dir = RunDir(self.args.output_dir)
        self.run_writer = writer
        self.is_lora = hasattr(self.model, "peft_config")
        self._base = base
        self._tokenizer_folder = tokenizer_folder
        self._record = record
        self._keep_checkpoints = keep_checkpoints
        self._sampler = sampler
        self._routers = routers
        self._folders = folders
        self._saving = False
        self._tokens = 0
        self._tokens_total = 0
        self._last_log_time = time.monotonic()
        self._last_log_step = 0

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        """One micro batch; counts the tokens that are no padding."""
        mask = inputs.get("attention_mask")
        self._tokens += mask.sum() if mask is not None else inputs["input_ids"].numel()
        self._routers.mask = mask
        return super().training_step(model, inputs, *args)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss, and the routers' balancing loss where one is asked for."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        balancing = self._routers.take_loss()
        if balancing is None:
            return result
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # The model's loss is a share of the whole accumulated batch's, so this one must be too.
            balancing = balancing / self.current_gradient_accumulation_steps
        return (result[0] + balancing, result[1]) if return_outputs else result + balancing

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean loss of a token over the evaluation set, each sample counted once on whatever number of ranks."""
        started = time.monotonic()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size, ranks, rank = self.args.per_device_eval_batch_size, self.args.world_size, self.args.process_index
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(dataset), size * ranks):
            first = start + rank * size
            samples = [dataset[index] for index in range(first, min(first + size, len(dataset)))]
            if not samples:
                # ZeRO-3 gathers weights on all ranks at once: one without samples goes along, uncounted.
                samples = [{**dataset[0], "labels": [IGNORED] * len(dataset[0]["labels"])}]
            inputs = self._prepare_inputs(self.data_collator(samples))
            count = int((inputs["labels"][:, 1:] != IGNORED).sum())
            with self.compute_loss_context_manager():
                loss = model(**inputs).loss
            if count:
                sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        total, tokens = self.accelerator.reduce(sums.to(self.args.device)).tolist()
        model.train()
        mean = total / max(1, tokens)
        metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": int(tokens)}
        metrics["seconds"] = round(time.monotonic() - started, 2)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # The time of an evaluation is no training time.
        self._last_log_time += time.monotonic() - started
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return self._sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes a log step to events.jsonl too, with tokens, speed and memory over all ranks."""
        if "loss" in logs:
            tokens = self.accelerator.reduce(torch.as_tensor(self._tokens, device=self.args.device).long())
            self._tokens = 0
            self._tokens_total += int(tokens)
            now = time.monotonic()
            steps = max(1, self.state.global_step - self._last_log_step)
            seconds = now - self._last_log_time
            self._last_log_time, self._last_log_step = now, self.state.global_step
            logs["tokens"] = self._tokens_total
            logs["tokens_per_second"] = round(int(tokens) / seconds, 2)
            logs["step_seconds"] = round(seconds / steps, 4)
            logs["memory_bytes"] = memory_bytes()
            health = self._routers.summary(self.accelerator.reduce)
            if self.run_writer:
                self.run_writer.event("log", self.state.global_step, epoch=self.state.epoch, **logs)
                self.run_writer.status("running", global_step=self.state.global_step, max_steps=self.state.max_steps)
                if health:
                    self.run_writer.event("moe", self.state.global_step, **health)
        elif self.run_writer and any(name.startswith("eval_") for name in logs):
            self.run_writer.event("eval", self.state.global_step, epoch=self.state.epoch, **logs)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        # A checkpoint is written under another name and renamed when whole.
        return str(self.run_dir.saving) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        started = time.monotonic()
        target = self.run_dir.checkpoint(self.state.global_step)
        self._saving = True
        # The Trainer's own rotation would look into the folder of unfinished checkpoints.
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise RunError(f"{target}: the checkpoint cannot be written: {error}") from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        finished = self.run_dir.saving / target.name
        if self._folders:
            self._folders.hand_out(finished)
        if self._folders.first_here if self._folders else self.args.should_save:
            write_json(finished / CHECKPOINT_RECORD, self._record)
            shutil.rmtree(target, ignore_errors=True)
            finished.replace(target)
            self.run_dir.saving.rmdir()
            if self._keep_checkpoints:
                for old in self.run_dir.checkpoints()[: -self._keep_checkpoints]:
                    shutil.rmtree(old)
        if self.run_writer:
            seconds = round(time.monotonic() - started, 2)
            self.run_writer.event("save", self.state.global_step, path=target.name, seconds=seconds)
        self.accelerator.wait_for_everyone()
        # The time of a save is no training time.
        self._last_log_time += time.monotonic() - started

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # DeepSpeed hands tied weights over as copies, which would be written as a second tensor.
        for name in getattr(self.model, "all_tied_weights_keys", {}) if state_dict and not self.is_lora else ():
            state_dict.pop(name, None)
        if state_dict and not self.is_lora and self._base is not None:
            keep_untrained_routers(self.model, self._base, state_dict)
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle of this process's arguments: run.yaml and the manifest say the same in the open.
            (folder / "training_args.bin").unlink(missing_ok=True)
            if self.is_lora:
                write_base_identity(self._base, folder)
            else:
                carry_over(self._base, self._tokenizer_folder, folder)


class RunCallback(TrainerCallback):
    """Follows a run: epoch of the order, heartbeat, stop file, and whether each adapter weight got a gradient."""

    def __init__(
        self, *, run_dir: RunDir, writer: RunWriter | None, model: torch.nn.Module, sampler: SeededSampler
    ) -> None:
        self.stopped = False
        self._sampler = sampler
        self._run_dir = run_dir
        self._writer = writer
        self._model = model
        self._awaited: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the watch over the adapter's gradients."""
        if self._writer:
            self._writer.status("running", global_step=state.global_step, max_steps=state.max_steps)
            self._writer.phase("training")
        for name, weight in self._model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                self._awaited.add(name)
                self._hooks.append(weight.register_hook(lambda _, name=name: self._awaited.discard(name)))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Sets the order's epoch: accelerate doesn't reach a sampler behind the batches that a resume skips."""
        self._sampler.set_epoch(math.floor(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Looks for a stop request on rank 0 and lets all ranks follow it at the same step."""
        self._check_adapter_gradients()
        if self._writer:
            self._writer.step(state.global_step)
        asked = torch.tensor(float(args.process_index == 0 and self._run_dir.stop_request.exists()))
        if args.world_size > 1:
            asked = asked.to(args.device)
            torch.distributed.all_reduce(asked)
        if asked.item() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True
            if self._writer:
                self._writer.event("stop", state.global_step)
                self._writer.status("stopping", global_step=state.global_step)

    def _check_adapter_gradients(self) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._awaited:
            names = sorted(self._awaited)
            raise ModelError(
                f"{len(names)} adapter weights got no gradient in the first step, so they would never be "
                f"trained: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}. "
                "Leave their modules out of lora_target_modules"
            )


def memory_bytes() -> int:
    """Most memory that this rank's GPU held so far, or what the process holds now on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


def check_disk(output_dir: Path, model: torch.nn.Module, *, is_lora: bool, weight_bytes: int) -> None:
    """Looks whether one checkpoint fits on the disk.

    Args:
        weight_bytes: bytes of one saved weight.

    Raises:
        RunError: with the bytes needed and free.
    """
    counts = describe(model)
    saved = counts["trainable_parameters"] if is_lora else counts["parameters"]
    # The optimizer keeps a float32 weight and two moments of each trained parameter (arXiv 1910.02054).
    needed = saved * weight_bytes + counts["trainable_parameters"] * 12
    # DeepSpeed's own checkpoint holds the module's weights a second time.
    needed += saved * weight_bytes
    free = shutil.disk_usage(output_dir).free
    if needed > free:
        raise RunError(
            f"output_dir = {output_dir}: a checkpoint takes about {needed / 1e9:.3g} GB and the disk has "
            f"{free / 1e9:.3g} GB free. Free some, or choose another output_dir"
        )
