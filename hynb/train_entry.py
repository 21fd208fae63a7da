"""What every rank runs: `deepspeed --module hynb.train_entry run.yaml`, or with the guide's flags."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Started by path, this folder would come before every package whose name is like one of our modules.
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from hynb.cluster import free_port
from hynb.config import SCHEDULERS_WITH_MIN_LR, Config, Reading, read_flags, read_yaml, to_yaml
from hynb.errors import ConfigError, HynbError
from hynb.files import read_json, replace_text, write_json
from hynb.plan import zero
from hynb.runs import (
    RunDir,
    RunReader,
    RunWriter,
    base_identity,
    check_run,
    check_same_shape,
    clear_run_folder,
    resume_checkpoint,
)
from hynb.supervision import LAUNCH_VARIABLE, Joined, Membership, join, leave, mark

# Time that the other ranks leave rank 0 to say what is wrong before the launcher ends it.
_GRACE_SECONDS = 5.0
# What MPI's and Slurm's launchers say of a rank, under the names that torch reads.
_RANK_VARIABLES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the flags or the YAML file say; returns the exit code.

    A mistake of the user's ends in its message and code 2, anything else in a traceback and code 1.
    """
    membership = Membership.from_environment()
    if membership is not None:
        return _main_of_many(membership, argv)
    return _main(argv, None)


def _main_of_many(membership: Membership, argv: Sequence[str] | None) -> int:
    """A rank of a run over several hosts: its host's guard knows when it comes, and how it ends."""
    for name, given in _RANK_VARIABLES.items():
        found = [os.environ[variable] for variable in given if variable in os.environ]
        if found:
            os.environ.setdefault(name, found[0])
    rank = int(os.environ["RANK"])
    code = 1
    try:
        joined = join(membership, rank)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            # Else a rank may offer the others an address that means another machine there.
            if joined.interface:
                os.environ.setdefault(name, joined.interface)
        os.environ.setdefault("MASTER_ADDR", joined.master_address)
        os.environ.setdefault("LOCAL_RANK", str(rank - membership.ranks_of(membership.node_of(rank))[0]))
        code = _main(argv, joined)
    except HynbError as error:
        print(f"hynb: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    finally:
        leave(membership, rank, code)
    return code


def _main(argv: Sequence[str] | None, joined: Joined | None) -> int:
    rank = int(os.environ.get("RANK", "0"))
    # A line is there for a watcher as soon as it is printed, and a character that a log can't hold is shown.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    # The run folder, once it is this run's own: a refused run writes nothing into another's.
    owned: list[RunDir] = []
    try:
        reading = _read(sys.argv[1:] if argv is None else list(argv))
        config = reading.config("parameters")
        if joined or _launched(config):
            owned.append(RunDir(config.output_dir))
        if rank == 0:
            _prepare_run_folder(config, launched=joined is not None or _launched(config))
            owned.append(RunDir(config.output_dir))
        elif joined and joined.first:
            # A model or a file that is missing on this host alone.
            check_run(config, launched=True)
        return _run(config, rank, reading.notes, owned, joined)
    except HynbError as error:
        lines = [f"hynb: {problem}" for problem in error.problems]
        return _report(rank, owned, str(error), lines, error.exit_code, alone=joined is not None)
    except Exception as error:
        hint = _hint(error)
        lines = [*traceback.format_exc().splitlines(), *([f"hynb: {hint}"] if hint else [])]
        return _report(
            rank, owned, hint or f"{type(error).__name__}: {error}", lines, 1, lost=_lost_connection(error)
        )


def _read(argv: list[str]) -> Reading:
    words = [word for word in argv if not word.startswith("--local_rank")]
    if len(words) == 1 and not words[0].startswith("--"):
        return read_yaml(words[0])
    if not words and (membership := Membership.from_environment()):
        return read_yaml(str(RunDir(membership.run_folder).config))
    if not words:
        raise ConfigError(
            "no parameters were given: name a YAML file (hynb.train_entry run.yaml) or flags "
            "(--model_name_or_path … --train_data_file … --output_dir …); `hynb parameters` lists them all"
        )
    return read_flags(words)


def _prepare_run_folder(config: Config, *, launched: bool) -> None:
    """Checks everything on the disk and clears an earlier run's files, if that was asked for."""
    check_run(config, launched=launched)
    if not launched:
        clear_run_folder(config)
    run_dir = RunDir(config.output_dir)
    run_dir.log.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir.config, to_yaml(config))


def _launched(config: Config) -> bool:
    launch = read_json(RunDir(config.output_dir).launch)
    return launch is not None and launch["id"] == os.environ.get(LAUNCH_VARIABLE)


def _run(config: Config, rank: int, early_notes: list[str], owned: list[RunDir], joined: Joined | None) -> int:
    notes: list[str] = []
    writer = RunWriter(config.output_dir) if rank == 0 else None
    if writer:
        writer.start()

    def say(line: str) -> None:
        if rank == 0:
            print(f"hynb: {line}", flush=True)
            notes.append(line)

    for line in early_notes:
        say(line)
    membership = Membership.from_environment()
    if joined:
        names = ", ".join(f"{name} ({ranks} ranks)" for name, ranks in membership.hosts)
        folder = "one folder, shared by all hosts" if joined.shared else "a folder of its own on each host"
        say(f"hosts: {names}; output_dir is {folder}")
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or joined.interface
        say(f"network interface: {interface}, by which {joined.host} reaches the others")
    _set_up_process()
    plan = None
    if rank == 0:
        # Before the ranks meet: a mistake in the data shows in seconds, and no GPU is held meanwhile.
        plan = _check_data(config, say)
    import torch
    from transformers import set_seed

    if joined:
        mark(membership, rank, "meeting")
    _init_distributed(torch.cuda.is_available())
    if joined:
        mark(membership, rank, "met")
    owned.append(RunDir(config.output_dir))
    world_size = int(os.environ["WORLD_SIZE"])
    from hynb.data import Collator
    from hynb.runs import find_base
    from hynb.train import (
        OwnFolders,
        RouterWatch,
        RunCallback,
        RunTrainer,
        add_adapter,
        build,
        check_disk,
        describe,
        freeze_all_but_attention,
        load_model,
        load_tokenizer,
        mark_moe_leaves,
        memory_bytes,
        sampler,
        save_loss_memory,
        share,
        training_dtype,
        write_random_base,
    )

    folders = None
    if joined and not joined.shared:
        folders = OwnFolders(membership, rank)
        config = config.replace(resume_from_checkpoint=folders.agree_on(resume_checkpoint(config)))
    ds_config = zero.for_machine(zero.load(config.deepspeed), on_cpu=not torch.cuda.is_available())
    if folders:
        # Each host's first rank makes the folders that its ranks write their parts into.
        ds_config["checkpoint"] = ds_config.get("checkpoint", {}) | {"use_node_local_storage": True}
    if rank == 0:
        write_json(RunDir(config.output_dir).ds_config, ds_config)
    resume = resume_checkpoint(config)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    shape = {"world_size": world_size, "zero_stage": stage, "use_lora": config.use_lora}
    if resume:
        problems = check_same_shape(resume, **shape)
        if problems:
            raise ConfigError(problems)
    base = find_base(config)
    tokenizer, tokenizer_folder = load_tokenizer(config, base)
    plan = share(plan)
    dataset, evaluation, lengths = build(config, tokenizer, plan)
    held_out = f", {len(evaluation)} for evaluation" if evaluation is not None else ""
    say(f"{len(dataset)} {'packs' if config.packing else 'samples'} for training{held_out}")
    set_seed(config.seed)
    if base is None and config.use_lora:
        # An adapter is worth nothing without its base, and a random one exists nowhere else. Made before the
        # TrainingArguments, under which ZeRO-3 would shard it.
        base = RunDir(config.output_dir).random_base
        if rank == 0:
            write_random_base(config, tokenizer, tokenizer_folder, base, say)
        torch.distributed.barrier()
        if folders:
            folders.hand_out(base)
    args = _training_arguments(config, ds_config, say, evaluates=evaluation is not None)
    set_seed(config.seed)
    model = load_model(config, base, tokenizer, say)
    model.config.use_cache = False
    model_type = model.config.model_type
    save_loss_memory(model)
    if config.make_moe_param_leaf_module:
        mark_moe_leaves(model)
    if config.use_lora:
        # A frozen embedding's output needs a gradient, or checkpointed layers would have none to pass back.
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
        model = add_adapter(model, config, base)
    elif config.train_attention_params_only:
        freeze_all_but_attention(model)
    micro_batches = config.gradient_accumulation_steps * world_size
    shape["global_batch_size"] = config.per_device_train_batch_size * micro_batches
    weight_bytes = training_dtype(config).itemsize
    counts = describe(model)
    say(f"{counts['trainable_parameters']:,} of {counts['parameters']:,} parameters are trained")
    if rank == 0 or (folders and folders.first_here):
        check_disk(Path(config.output_dir), model, is_lora=config.use_lora, weight_bytes=weight_bytes)
    if rank == 0:
        hosts = [name for name, _ in membership.hosts] if joined else [socket.gethostname()]
        more = shape | ({"output_dir_shared": joined.shared} if joined else {})
        writer.manifest(_manifest(config, ds_config, base, counts | plan.summary, more, notes, hosts))
    flash = model.config._attn_implementation == "flash_attention_2"
    sampler = sampler(config, len(dataset), lengths, world_size)
    callback = RunCallback(run_dir=RunDir(config.output_dir), writer=writer, model=model, sampler=sampler)
    try:
        trainer = RunTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=evaluation,
            data_collator=Collator(pad_token_id=_pad_token_id(tokenizer), flatten=flash),
            sampler=sampler,
            routers=RouterWatch(model, model_type, config.router_aux_loss_coef),
            callbacks=[callback],
            base=base,
            tokenizer_folder=tokenizer_folder,
            record=shape,
            keep_checkpoints=config.save_total_limit,
            writer=writer,
            folders=folders,
        )
    except ValueError as error:
        # What the Trainer itself refuses: TrainingArguments that contradict each other or need more than is given.
        raise ConfigError(f"transformers' Trainer: {error}") from error
    if writer:
        first = _resumed_step(resume)
        writer.event("resume" if resume else "start", first, world_size=world_size)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    _finish(trainer, callback.stopped, writer)
    say(f"peak memory of rank 0: {memory_bytes() / 1e9:.2f} GB")
    return 0


def _check_data(config: Config, say: Any) -> Any:
    from hynb.runs import find_base
    from hynb.train import check, load_tokenizer

    tokenizer, _ = load_tokenizer(config, find_base(config))
    return check(config, tokenizer, say)


def _finish(trainer: Any, stopped: bool, writer: RunWriter | None) -> None:
    """Saves what is not saved yet and writes the mark of success as the last act of training."""
    step = trainer.state.global_step
    target = trainer.run_dir.checkpoint(step)
    if not target.exists():
        # With save_strategy `no`, and at the end of a run whose steps don't meet save_steps.
        trainer.args.save_only_model = trainer.args.save_strategy == "no"
        trainer._save_checkpoint(trainer.model, None)
    if writer:
        state = "stopped" if stopped else "finished"
        reason = f"stopped on request after a checkpoint: {target.name}" if stopped else ""
        writer.event("end", step, state=state)
        writer.status(state, global_step=step, max_steps=trainer.state.max_steps, exit_code=0, reason=reason)


def _set_up_process() -> None:
    """Environment that must stand before torch and deepspeed are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Nothing is fetched from a hub: every model here is a local folder.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        ranks_here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))


def _init_distributed(on_gpu: bool) -> None:
    import deepspeed
    import torch

    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed()
        return
    # Compiling this op takes half a minute, and a run killed meanwhile leaves a lock; training needs it not.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")


def _training_arguments(config: Config, ds_config: dict[str, Any], say: Any, *, evaluates: bool) -> Any:
    """transformers' TrainingArguments of a Config.

    Args:
        evaluates: there is something to evaluate on.

    Raises:
        ConfigError: a further TrainingArguments value that its own class refuses.
    """
    import torch
    from transformers import TrainingArguments

    ours = {
        "output_dir": config.output_dir,
        "deepspeed": ds_config,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "activation_checkpointing": config.gradient_checkpointing,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_options(config, say),
        # Below 1 transformers takes it for a share of the steps.
        "warmup_steps": config.warmup_ratio,
        "max_steps": config.max_steps or -1,
        "num_train_epochs": config.num_train_epochs,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "logging_steps": config.logging_steps,
        "save_strategy": config.save_strategy,
        "save_steps": config.save_steps,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": ["tensorboard"],
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if evaluates:
        ours |= {"eval_strategy": "steps", "eval_steps": config.eval_steps or config.save_steps}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(RunDir(config.output_dir).tensorboard)
    try:
        return TrainingArguments(**(ours | config.training_args))
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in config.training_args.items())
        raise ConfigError(f"TrainingArguments: {error} (given beside hynb's own: {given or 'none'})") from error


def scheduler_options(config: Config, say: Any) -> dict[str, float]:
    """What the chosen scheduler takes: the absolute min_lr becomes a share of the highest rate."""
    if config.lr_scheduler_type not in SCHEDULERS_WITH_MIN_LR:
        if config.min_lr is not None:
            say(f"min_lr is not used: lr_scheduler_type {config.lr_scheduler_type} has no lowest rate")
        return {}
    if config.min_lr is None:
        say(f"min_lr: {config.learning_rate / 10:g}, a tenth of learning_rate, because none was given")
        return {"min_lr_rate": 0.1}
    return {"min_lr_rate": config.min_lr / config.learning_rate}


def _pad_token_id(tokenizer: Any) -> int:
    # Padding is masked and unlabelled, so that any token serves where a tokenizer names none.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def _resumed_step(resume: Path | None) -> int:
    return int((read_json(resume / "trainer_state.json") or {}).get("global_step", 0)) if resume else 0


def _manifest(
    config: Config,
    ds_config: dict[str, Any],
    base: Path | None,
    counts: dict[str, int],
    shape: dict[str, Any],
    notes: list[str],
    hosts: list[str],
) -> dict[str, Any]:

    from hynb.data import data_hash

    packages = ("hynb", "torch", "transformers", "deepspeed", "peft", "accelerate", "safetensors")
    return {
        "v": 1,
        "config": config.values() | {"training_args": config.training_args},
        "ds_config": ds_config,
        "argv": sys.argv,
        "hosts": hosts,
        "started_at": time.time(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "base": base_identity(base) if base else None,
        "data_hash": data_hash(config.train_data_file),
        "notes": notes,
        **counts,
        **shape,
    }


def _report(
    rank: int,
    owned: list[RunDir],
    reason: str,
    lines: list[str],
    code: int,
    *,
    lost: bool = False,
    alone: bool = False,
) -> int:
    """Says what is wrong, once for all ranks where all found the same, and records it in the run folder.

    Args:
        alone: this rank may be the only one that found it: its host is another than rank 0's.
    """
    if rank != 0 and code == 2 and not alone:
        time.sleep(_GRACE_SECONDS)
        return code
    print("\n".join(lines), file=sys.stderr, flush=True)
    if owned:
        record = {"rank": rank, "host": socket.gethostname(), "time": time.time()}
        owned[-1].log.mkdir(parents=True, exist_ok=True)
        record |= {"reason": reason, "exit_code": code, "lost_connection": lost}
        write_json(owned[-1].failure(rank), record)
        if rank == 0:
            before = RunReader(owned[-1].path).status()
            known = {"global_step": before.global_step, "max_steps": before.max_steps}
            RunWriter(owned[-1].path).status("failed", exit_code=code, reason=reason, **known)
    return code


def _lost_connection(error: Exception) -> bool:
    """Whether a rank failed only because another one was gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "remote process exited")
    return any(word in str(error) for word in (*words, "ncclRemoteError"))


def _hint(error: Exception) -> str:
    name = type(error).__name__
    if "OutOfMemory" in name or "out of memory" in str(error).lower():
        order = ", ".join(zero.PRESETS)
        return (
            "the GPU's memory is not enough. In this order: per_device_train_batch_size: 1, "
            f"gradient_checkpointing: true, the next preset of {order}, a smaller max_seq_length, more GPUs"
        )
    if isinstance(error, OSError) and error.errno == 28:
        return f"{error.filename or 'output_dir'}: the disk is full. Free some space, then resume"
    return ""


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' threads were seen to abort the interpreter after training had ended well.
    os._exit(code)
