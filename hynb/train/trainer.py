"""transformers' Trainer with hynb's additions: whole checkpoints, events, stop requests, a check of the adapter."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from hynb.config import Config
from hynb.data import IGNORED, SeededSampler
from hynb.errors import ConfigError, RankError, RunError
from hynb.runs import Phase, RunDir, RunWriter, surplus_checkpoints
from hynb.train.background import (
    BackgroundFiles,
    UnfinishedCheckpoint,
    can_defer,
    memory_for_copies,
    written_in_background,
)
from hynb.train.byte_progress import ByteProgress
from hynb.train.checkpoint import copy_model_files, write_base_identity
from hynb.train.disk_space import LastingTensorBoard, Shortage, shortage_anywhere, weight_bytes
from hynb.train.gathering import Readiness
from hynb.train.node_local import NodeLocalFolders
from hynb.train.pace import Pace
from hynb.train.process import ranks_of_host
from hynb.train.router_precision import TrainedRouters
from hynb.train.router_statistics import RouterWatch
from hynb.train.saving import SavedShard, agreed, trained_float32_routers, write_model
from hynb.train.sealing import Sealing, finish
from hynb.train.sequence_parallel import TOKEN_MASK, RowParts
from hynb.train.step_watch import SPIKE_WINDOW, StepWatch
from hynb.train.termination import with_lasting_workers
from hynb.train.timeouts import collective_limit, limited, save_limit

logger = logging.getLogger(__name__)

_SPACE_SECONDS = 10.0
# Settings of a group of the optimizer that a checkpoint restores.
_SETTINGS = ("weight_decay", "betas", "eps")
# Parameters behind them and behind the schedule.
_OF_OPTIMIZER = (
    *("learning_rate", "min_lr", "lr_scheduler_type", "warmup_ratio", "max_steps", "num_train_epochs"),
    "weight_decay",
)


class RunTrainer(Trainer):
    """A Trainer that writes the run folder.

    Args:
        config: of the run.
        base: folder of the base model; None for a random one.
        shards: the weight files of each full checkpoint; empty for an adapter.
        tokenizer_folder: its files are copied into full checkpoints.
        record: what a resumed run must have in common with this one; written into each checkpoint.
        checkpoint_bytes: about the size of one.
        writer: of the run folder; None on other ranks than 0.
        sampler: the sampling order of the training set.
        routers: the statistics of the model's routers, and their balancing loss.
        pace: measures the steps.
        watch: finds steps whose loss or gradient is not finite or too large.
        folders: the run folders of hosts that share none; None where there is one folder.
        parts: which part of which rows this rank computes; None for rows of its own.

    Attributes:
        phase: what this rank does now.
    """

    def __init__(
        self,
        *,
        config: Config,
        base: Path | None,
        shards: Sequence[SavedShard],
        tokenizer_folder: Path,
        record: dict[str, Any],
        checkpoint_bytes: int,
        writer: RunWriter | None,
        sampler: SeededSampler,
        routers: RouterWatch,
        pace: Pace,
        watch: StepWatch,
        folders: NodeLocalFolders | None,
        parts: RowParts | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        assert self.args.output_dir is not None
        self.run_dir = RunDir(self.args.output_dir)
        self.run_writer = writer
        self.is_lora = hasattr(self.model, "peft_config")
        self._base = base
        self._shards = shards
        self._tokenizer_folder = tokenizer_folder
        self._record = record
        self._checkpoint_bytes = checkpoint_bytes
        self._keep_checkpoints = config.save_total_limit
        self._skips_on_full_disk = config.on_full_disk == "keep_training"
        if self._skips_on_full_disk:
            self.remove_callback(TensorBoardCallback)
            self.add_callback(LastingTensorBoard())
        self._save_minutes = config.save_timeout_minutes
        self.phase: Phase = "training"
        self._sampler = sampler
        self._routers = routers
        self._folders = folders
        self._parts = parts or RowParts(rank=self.args.process_index, world_size=self.args.world_size)
        self._saving = False
        self._pace = pace
        self._watch = watch
        self._is_attached = False
        self._save_seconds: dict[str, float] = {}
        self._saves_in_background = config.async_save
        self._unfinished: UnfinishedCheckpoint | None = None
        self._written: Readiness | None = None
        self._begins_step = True
        self._loss_before_step = torch.zeros(())
        self._settings: list[dict[str, Any]] = []
        model: Any = self.model
        if starts := trained_float32_routers(shards):
            self.add_callback(TrainedRouters(model, starts))
        if not self.is_lora:
            allow_missing_frozen(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; what all ranks end for together does not cost a checkpoint that is written in the background."""
        try:
            return super().train(*args, **kwargs)
        except RankError:
            self._finish_saving()
            raise

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro batch; counts its tokens without padding.

        Raises:
            RankError: the step is not finite, and the run cannot go on.
        """
        # DeepSpeed's engine, which steps inside of the backward pass.
        engine: Any = self.deepspeed
        if not self._is_attached:
            self._is_attached = True
            self._watch.attach(engine, self.optimizer)
            self._watch.resumed(self.state.global_step)
            engine.step = self._pace.timed(engine.step)
            self._pace.attach(model, self.state.global_step)
        mask = inputs.pop(TOKEN_MASK, inputs.get("attention_mask"))
        self._pace.add_tokens(mask.sum() if mask is not None else inputs["input_ids"].numel())
        self._routers.mask = mask
        if is_first := self._begins_step:
            self._loss_before_step = self._tr_loss.clone()
            self._pace.begin_step()
        self._watch.begin(inputs, first=is_first)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._begins_step = self.accelerator.sync_gradients
        again = functools.partial(self._loss_again, count=num_items_in_batch)
        if self._begins_step and self._watch.end(engine, self.state.global_step, again, self.model):
            # The losses of a step that was left out, some of which are NaN, are not part of the mean.
            self._tr_loss.copy_(self._loss_before_step)
            return torch.zeros_like(loss)
        return loss

    def _loss_again(self, model: Any, inputs: dict[str, Any], *, count: torch.Tensor | int | None) -> Any:
        """The loss of a micro batch in another forward pass."""
        inputs = self._prepare_inputs(inputs)
        self._routers.mask = inputs.get("attention_mask")
        with self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=count)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """The batches of this rank; ranks that share rows get the same samples."""
        loader = with_lasting_workers(super().get_train_dataloader())
        if self._parts.size > 1:
            # accelerate's BatchSamplerShard, which deals batches out to as many processes as there are ranks.
            shard: Any = loader.batch_sampler
            shard.num_processes, shard.process_index = self._parts.replicas, self._parts.replica
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The learning rate schedule; what the optimizer begins with is kept for `obey`."""
        # accelerate's wrapper of DeepSpeed's optimizer.
        prepared: Any = self.optimizer
        self._settings = [{key: group.get(key) for key in _SETTINGS} for group in prepared.param_groups]
        for settings, group in zip(self._settings, prepared.param_groups, strict=True):
            settings["initial_lr"] = group.get("initial_lr", group["lr"])
        return super().create_scheduler(num_training_steps, optimizer)

    def obey(self, changed: Sequence[str]) -> None:
        """Gives the optimizer and the schedule this run's values instead of those that a checkpoint has restored.

        Args:
            changed: names of the parameters that differ; without any, what was restored stays to the last digit.

        Raises:
            ConfigError: the schedule keeps its state in a way that is not known.
        """
        engine: Any = self.deepspeed
        if "max_grad_norm" in changed and hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = engine.gradient_clipping()
        names = [name for name in changed if name in _OF_OPTIMIZER]
        if not names:
            return
        # DeepSpeed's or accelerate's wrapper holds torch's own.
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise ConfigError(
                f"allow_changed = {', '.join(names)}: the state of lr_scheduler_type {self.args.lr_scheduler_type} "
                "cannot be changed; set the values back"
            )
        prepared: Any = self.optimizer
        schedule.base_lrs = [settings["initial_lr"] for settings in self._settings]
        rates = [
            rate * shape(schedule.last_epoch)
            for rate, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        for group, settings, rate in zip(prepared.param_groups, self._settings, rates, strict=True):
            group.update({key: value for key, value in settings.items() if value is not None} | {"lr": rate})

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples of a global step."""
        return super().get_total_train_batch_size(args) // self._parts.size

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The next batches, for which the rank may wait."""
        # Not the whole call: in it ranks wait for each other too, to count the tokens of the step.
        return super().get_batch_samples(self._pace.reading(epoch_iterator), num_batches, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss, plus the routers' balancing loss where its coefficient is not 0."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        balancing = self._routers.take_loss()
        if balancing is not None:
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # The model's loss is already divided by the tokens of all accumulated micro batches.
                balancing = balancing / self.current_gradient_accumulation_steps
            loss = loss + balancing
        loss = self._watch.marked(loss)
        return (loss, result[1]) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per token over the evaluation set, with each sample counted once on any number of ranks."""
        with self._phase("evaluating") as started:
            total, tokens = self._evaluation_sums(self.eval_dataset if eval_dataset is None else eval_dataset)
            mean = total / max(1, tokens)
            metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": tokens}
            metrics["seconds"] = round(time.monotonic() - started, 2)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Writes a log step to events.jsonl too, with tokens, speed and memory over all ranks."""
        step, max_steps = self.state.global_step, self.state.max_steps
        if "loss" in logs:
            logs["loss"] = self._watch.corrected(logs["loss"], step)
            pace, counts = self._pace.report(step, self.args.device, self._routers.counts())
            logs |= {name: value for name, value in pace.items() if isinstance(value, (int, float))}
            statistics = self._routers.summary(counts) if counts is not None else None
            if self.run_writer:
                self.run_writer.event("log", step, epoch=self.state.epoch, **(logs | pace))
                self.run_writer.status("running", global_step=step, max_steps=max_steps)
                if statistics:
                    self.run_writer.event("moe", step, **statistics)
                for straggler in self._pace.new_stragglers:
                    print(f"hynb: {straggler}", flush=True)
                    self.run_writer.event("straggler", step, **asdict(straggler), text=str(straggler))
            # Entries of evaluations are among them.
            recent = self.state.log_history[-2 * SPIKE_WINDOW :]
            before = [entry["loss"] for entry in recent if "loss" in entry]
            self._watch.look_for_spike(logs["loss"], before, step)
        elif self.run_writer and any(name.startswith("eval_") for name in logs):
            self.run_writer.event("eval", step, epoch=self.state.epoch, **logs)
        super().log(logs, start_time)

    def save_last_checkpoint(self) -> Path:
        """The checkpoint of the last step, which is saved here under save_strategy `no` or between two save_steps.

        Where checkpoints are left out for want of space, this one waits until there is some.
        """
        self._finish_saving()
        target = self.run_dir.checkpoint(self.state.global_step)
        if not target.exists():
            assert self.model is not None
            if self.args.save_strategy == "no":
                self.args.save_only_model = True
                self._checkpoint_bytes = weight_bytes(self.model, self._shards)
            self._wait_for_space()
            self._write_checkpoint(self.model, None)
            self._finish_saving()
        return target

    def _wait_for_space(self) -> None:
        with self._phase("saving"):
            known = False
            while self._skips_on_full_disk and (short := self._shortage()):
                if not known:
                    self._tell_shortage(f"{short}: the last checkpoint waits until there is space. Free some")
                known = True
                time.sleep(_SPACE_SECONDS)
            if known and self.run_writer:
                self.run_writer.settle()

    @property
    def _is_first_of_folder(self) -> bool:
        """Whether this rank is the first of those that write into its run folder."""
        return self._folders.is_local_rank_zero if self._folders else self.args.should_save

    def _shortage(self) -> Shortage | None:
        return shortage_anywhere(self.run_dir.path, self._checkpoint_bytes, looks=self._is_first_of_folder)

    def _tell_shortage(self, text: str) -> None:
        if self.run_writer:
            text = f"step {self.state.global_step}: {text} (on_full_disk = keep_training)"
            print(f"hynb: {text}", flush=True)
            self.run_writer.event("not_saved", self.state.global_step, reason=text)

    def _evaluation_sums(self, dataset: Any) -> tuple[float, int]:
        """Sum of the losses of all supervised tokens of a data set, and their number."""
        size, parts = self.args.per_device_eval_batch_size, self._parts
        model, collate = self.model_wrapped, self.data_collator
        assert model is not None and collate is not None
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(dataset), size * parts.replicas):
            first = start + parts.replica * size
            samples = [dataset[index] for index in range(first, min(first + size, len(dataset)))]
            if not samples:
                # ZeRO-3 gathers weights on all ranks at once, so a rank without samples runs one uncounted.
                samples = [{**dataset[0], "labels": [IGNORED] * len(dataset[0]["labels"])}]
            inputs: Any = self._prepare_inputs(collate(samples))
            inputs.pop(TOKEN_MASK, None)
            predicted = inputs.get("shift_labels", inputs["labels"][:, 1:])
            count = int((predicted != IGNORED).sum())
            with self.compute_loss_context_manager():
                loss = model(**inputs).loss
            if count:
                sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        model.train()
        total, tokens = self._sum_over_ranks(sums.to(self.args.device)).tolist()
        return total, int(tokens)

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        total = self.accelerator.reduce(tensor)
        assert isinstance(total, torch.Tensor)
        return total

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[float]:
        """Shows a phase in the run's status and leaves its time out of the training speed; yields its start."""
        started = time.monotonic()
        self._set_phase(phase)
        yield started
        self._pace.pause(time.monotonic() - started)
        self._set_phase("training")

    def _set_phase(self, phase: Phase) -> None:
        self.phase = phase
        if self.run_writer:
            self.run_writer.phase(phase)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return self._sampler

    def _get_output_dir(self, trial: Any) -> str:
        # A checkpoint is written under another name and renamed when it is complete.
        return str(self.run_dir.saving) if self._saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._finish_saving()
        if self._skips_on_full_disk and (short := self._shortage()):
            self._tell_shortage(f"no checkpoint is saved: {short}. The next save tries again")
        else:
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        target = self.run_dir.checkpoint(self.state.global_step)
        with self._phase("saving") as started, limited(self._save_limit()):
            files = self._background_files()
            with written_in_background(self.deepspeed, files):
                self._write_unfinished(model, trial, target)
            self.accelerator.wait_for_everyone()
            unfinished = self.run_dir.saving / target.name
            if self._folders:
                self._folders.copy_to_hosts(unfinished)
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            facts = {"global_step": self.state.global_step, "loss": losses[-1] if losses else None}
            ranks = self._folders.local_ranks if self._folders else range(self.args.world_size)
            own = files.paths if files else []
            sealing = Sealing(unfinished, ranks, flushes=self.args.local_process_index == 0, own=own)
            self._unfinished = UnfinishedCheckpoint(target, facts, sealing, files)
            self._unfinished.seconds_by_part |= self._save_seconds
            if files is None:
                self._complete_checkpoint(self._unfinished, started)
            else:
                self._unfinished.start()
                self._unfinished.began, self._unfinished.saving_seconds = started, time.monotonic() - started

    def _background_files(self) -> BackgroundFiles | None:
        """Where the states of a checkpoint go that is written in the background; None where it is not."""
        if not self._saves_in_background:
            return None
        if not can_defer(self.deepspeed):
            self._saves_in_background = False
            logger.info(
                "async_save is left out: the DeepSpeed settings choose an engine of their own for checkpoints"
            )
            return None
        self._written = self._written or Readiness()
        return BackgroundFiles(memory_for_copies(ranks_of_host()))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After each step; a checkpoint that all ranks have written meanwhile gets its name."""
        if self._unfinished and self._written and self._written.of_all(self._unfinished.is_written):
            self._finish_saving()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finish_saving(self) -> None:
        """Waits for a checkpoint that is written in the background."""
        if self._unfinished is None:
            return
        if self._written:
            self._written.settle()
        with self._phase("saving") as started, limited(self._save_limit()):
            self._complete_checkpoint(self._unfinished, started)

    def _complete_checkpoint(self, unfinished: UnfinishedCheckpoint, started: float) -> None:
        """Waits until all ranks have written their parts, and gives the checkpoint its name."""
        with agreed(unfinished.target):
            unfinished.wait()
        digests = unfinished.sealing.digests()
        if self._is_first_of_folder:
            self._finish_checkpoint(unfinished, digests)
        if self.run_writer:
            seconds = round(unfinished.saving_seconds + time.monotonic() - started, 2)
            facts: dict[str, Any] = {"path": unfinished.target.name, "seconds": seconds}
            facts |= {"seconds_by_part": unfinished.seconds_by_part, "bytes_by_part": _sizes(unfinished.target)}
            if unfinished.saving_seconds:
                facts["whole_seconds"] = round(time.monotonic() - unfinished.began, 2)
            self.run_writer.event("save", unfinished.facts["global_step"], **facts)
        self._unfinished = None
        self.accelerator.wait_for_everyone()

    def _save_limit(self) -> timedelta:
        return save_limit(self._checkpoint_bytes, self._save_minutes, collective_limit())

    def _write_unfinished(self, model: torch.nn.Module, trial: Any, target: Path) -> None:
        self._saving = True
        # The Trainer's own rotation would look into the folder of unfinished checkpoints.
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise RunError(f"{target}: the checkpoint cannot be written: {error}") from error
        finally:
            self._saving = False

    def _finish_checkpoint(self, unfinished: UnfinishedCheckpoint, digests: dict[str, dict[str, Any]]) -> None:
        """Gives a whole checkpoint its name, and removes the oldest ones beyond the limit."""
        record = self._record | unfinished.facts | {"saved_at": time.time(), "files": digests}
        shutil.rmtree(unfinished.target, ignore_errors=True)
        try:
            finish(unfinished.sealing.folder, unfinished.target, record)
        except OSError as error:
            raise RunError(f"{unfinished.target}: the checkpoint cannot be written: {error}") from error
        self.run_dir.saving.rmdir()
        if self._keep_checkpoints:
            for old in surplus_checkpoints(self.run_dir, self._keep_checkpoints):
                # Later full checkpoints copy files from the one that this run was resumed from.
                if self._base is None or old.resolve() != self._base.resolve():
                    shutil.rmtree(old)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes an adapter from rank 0, or a full model from all ranks."""
        folder = Path(output_dir) if output_dir else self.run_dir.path
        started = time.monotonic()
        if not self.is_lora:
            self._save_whole(folder)
        elif self.is_deepspeed_enabled and self.accelerator.deepspeed_config["zero_optimization"]["stage"] == 3:
            super().save_model(output_dir, _internal_call)
        else:
            assert self.model is not None
            # The Trainer's own way copies the whole base in each rank's memory.
            trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            self._save(output_dir, state_dict={name: weight.detach().cpu() for name, weight in trained.items()})
        if self.is_lora and self.args.should_save:
            # A pickle of this process's arguments; run.yaml and the manifest hold the same as text.
            (folder / "training_args.bin").unlink(missing_ok=True)
            write_base_identity(self._base, folder)
        self._save_seconds = {"weights": round(time.monotonic() - started, 2)}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        started = time.monotonic()
        engine: Any = self.deepspeed
        # The weight files have what is not trained; the Trainer leaves it out of adapters' checkpoints alone.
        if engine is not None and not isinstance(engine.save_checkpoint, functools.partial):
            engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)
        self._save_seconds["optimizer"] = round(time.monotonic() - started, 2)

    def _save_whole(self, folder: Path) -> None:
        model: Any = self.model
        show = self.run_writer.progress if self.run_writer else None
        progress = ByteProgress("saving", factor=self.args.world_size if self._folders is None else 1, show=show)
        write_model(model, self._shards, folder, shared=self._folders is None, progress=progress)
        if self.args.should_save:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            copy_model_files(self._base, self._tokenizer_folder, folder)


def allow_missing_frozen(model: torch.nn.Module) -> None:
    """Lets DeepSpeed load module states without weights that are not trained, which the model has from its base."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}

    def forget(_: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

    if frozen:
        model.register_load_state_dict_post_hook(forget)


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of a checkpoint's weights, of DeepSpeed's two parts, which only a resume needs, and of all else."""
    sizes = {"weights": 0, "module states": 0, "optimizer": 0, "other": 0}
    # The names are DeepSpeed's (0.19.8, runtime/engine.py `_get_ckpt_name` and `_get_zero_ckpt_name`).
    parts = {".safetensors": "weights", "_model_states.pt": "module states", "_optim_states.pt": "optimizer"}
    for path in checkpoint.rglob("*"):
        if path.is_file():
            part = next((part for end, part in parts.items() if path.name.endswith(end)), "other")
            sizes[part] += path.stat().st_size
    return sizes
