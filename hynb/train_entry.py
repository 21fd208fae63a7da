"""What every rank of a training run executes, step by step, from top to bottom.

    hynb launch                                         on every rank, with hynb's supervision
    deepspeed --module hynb.train_entry run.yaml        by hand, with a YAML file
    deepspeed hynb/train_entry.py --output_dir … …      by hand, with the flags and defaults of upstream's train.sh

Heavy imports stay inside the steps, so that a wrong parameter is refused within a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Started by path, this folder would come before every package that has the name of one of our modules.
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from hynb.config import Config, Reading, check_ranks, read_flags, read_yaml, to_yaml, use_upstream_defaults
from hynb.errors import ConfigError, RunFailedError
from hynb.files import read_json, replace_text, write_json
from hynb.plan import zero
from hynb.runs import (
    RunDir,
    RunWriter,
    check_run,
    check_same_shape,
    clear_run_folder,
    find_base,
    stopped_end,
    with_derived_limits,
    workload,
)
from hynb.supervision import RANK_VARIABLES, Joined, Membership, join, leave, mark
from hynb.train import Notes, outlive_full_disk, report_failure, set_up_process, show_output_at_once, start_notes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments

    from hynb.merge import TensorEntry
    from hynb.train import DataPlan, Datasets, NodeLocalFolders, RowParts, RunCallback, RunTrainer, SavedShard

# Named by hand: as a script this module is called __main__.
logger = logging.getLogger("hynb.train_entry")


@dataclass(kw_only=True)
class RankState:
    """What the steps of one rank share; each field is set by the step named above it.

    Args:
        beside_rank_0: this rank is on rank 0's host.
        run_dir: None until the folder is known to belong to this run: a refused run writes nothing into another's.
        writer, notes: write the run folder, and keep what rank 0 logs for the manifest; None on other ranks.
        folders: the run folders of hosts that share none; None where there is one folder.
        skipped: why newer checkpoints than the one to resume from are passed over.
        made_with: what each checkpoint records of this run.
        changed: what the run is to change that the checkpoint would restore.
        shape: what a resumed run must have in common with the run that saved its checkpoint.
        base: folder of the base model; None for a random one.
        stored: the tensors of the base's safetensors files, whose many headers are read once from a slow disk.
    """

    argv: Sequence[str]
    # join_hosts
    membership: Membership | None = None
    rank: int = 0
    beside_rank_0: bool = False
    joined: Joined | None = None
    # read_parameters
    reading: Reading = field(init=False)
    config: Config = field(init=False)
    # prepare_run_folder
    run_dir: RunDir | None = None
    writer: RunWriter | None = None
    notes: Notes | None = None
    # check_data
    plan: DataPlan | None = None
    # compile_ops
    ds_config: dict[str, Any] = field(init=False)
    # choose_checkpoint
    folders: NodeLocalFolders | None = None
    resume: Path | None = None
    skipped: list[str] = field(default_factory=list)
    made_with: dict[str, Any] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    shape: dict[str, Any] = field(init=False)
    # load_data
    base: Path | None = None
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    tokenizer_folder: Path = field(init=False)
    datasets: Datasets = field(init=False)
    # build_model
    arguments: TrainingArguments = field(init=False)
    stored: Sequence[TensorEntry] = ()
    model: PreTrainedModel | PeftModel = field(init=False)
    model_type: str = field(init=False)
    parts: RowParts = field(init=False)
    # record
    shards: Sequence[SavedShard] = ()
    checkpoint_bytes: int = 0
    # build_trainer
    callback: RunCallback = field(init=False)
    trainer: RunTrainer = field(init=False)
    # kept by main
    step: str = ""

    @property
    def phase(self) -> str:
        """What this rank does now, for the report of a failure."""
        if self.step not in ("train", "finish"):
            return self.step.replace("_", " ")
        return f"{self.trainer.phase} at step {self.trainer.state.global_step}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this rank; returns 0, 2 for a user's mistake, which is reported by its message alone, or 1.

    Args:
        argv: a YAML file or flags; None for those of the command line.
    """
    show_output_at_once()
    state = RankState(argv=sys.argv[1:] if argv is None else argv)
    exit_code = 1
    try:
        for step in STEPS:
            state.step = step.__name__
            step(state)
        exit_code = 0
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        error = RunFailedError("interrupted by SIGINT (Ctrl-C)") if isinstance(error, KeyboardInterrupt) else error
        registry = state.membership.registry_of(state.rank) if state.membership and state.joined else None
        where = {"beside_rank_0": state.beside_rank_0, "phase": state.phase, "registry": registry}
        exit_code = report_failure(error, state.rank, state.run_dir, **where)
    finally:
        with contextlib.suppress(OSError):
            if state.writer:
                state.writer.close()
        if state.membership:
            leave(state.membership, state.rank, exit_code)
    return exit_code


def join_hosts(state: RankState) -> None:
    """Waits until all hosts have joined; without supervision there is nothing to wait for."""
    state.rank = int(os.environ.get("RANK", "0"))
    membership = Membership.from_environment()
    if membership is None:
        state.beside_rank_0 = True
        return
    for name, variables in RANK_VARIABLES.items():
        if values := [os.environ[variable] for variable in variables if variable in os.environ]:
            os.environ.setdefault(name, values[0])
    state.membership, state.rank = membership, int(os.environ["RANK"])
    node = membership.node_of(state.rank)
    state.beside_rank_0 = node == 0
    run_dir = RunDir(membership.run_folder)
    if state.rank == 0 and (read_json(run_dir.launch) or {}).get("id") == membership.launch_id:
        _start_writing(state, run_dir)
    state.joined = join(membership, state.rank)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if state.joined.interface else ():
        # Otherwise a rank may offer the others an address that means another machine there.
        os.environ.setdefault(name, state.joined.interface)
    os.environ.setdefault("MASTER_ADDR", state.joined.master_address)
    os.environ.setdefault("LOCAL_RANK", str(state.rank - membership.ranks_of(node)[0]))
    os.environ.setdefault("LOCAL_SIZE", str(len(membership.ranks_of(node))))


def read_parameters(state: RankState) -> None:
    """Reads a YAML file, flags as upstream's script has them, or the configuration in the run folder.

    Raises:
        ConfigError: every mistake, at once.
    """
    words = [word for word in state.argv if not word.startswith("--local_rank")]
    if len(words) == 1 and not words[0].startswith("--"):
        state.reading = read_yaml(words[0])
    elif words:
        state.reading = read_flags(words)
        use_upstream_defaults(state.reading)
    elif state.membership:
        state.reading = read_yaml(str(RunDir(state.membership.run_folder).config))
    else:
        raise ConfigError(
            "no parameters were given: name a YAML file (hynb.train_entry run.yaml) or flags "
            "(--model_name_or_path … --train_data_file … --output_dir …); `hynb parameters` lists them all"
        )
    state.config = state.reading.config("parameters")


def prepare_run_folder(state: RankState) -> None:
    """Checks everything on the disk, clears an earlier run's files, and starts the heartbeat and the notes.

    Raises:
        ConfigError: every mistake found, at once.
    """
    run_dir = RunDir(state.config.output_dir)
    if state.membership:
        state.run_dir = run_dir
    if problems := check_ranks(state.config, int(os.environ.get("WORLD_SIZE", "1"))):
        raise ConfigError(problems)
    if state.rank != 0:
        if state.joined and state.joined.first:
            # A model or data file may be missing on this host only.
            check_run(state.config, launched=True)
        return
    check_run(state.config, launched=state.membership is not None)
    if not state.membership:
        clear_run_folder(state.config)
    run_dir.create(group_readable=state.config.group_readable)
    run_dir.log.mkdir(exist_ok=True)
    replace_text(run_dir.config, to_yaml(state.config))
    state.run_dir = run_dir
    if state.writer is None:
        _start_writing(state, run_dir)
    state.notes = start_notes()
    for note in state.reading.notes:
        logger.info(note)
    _log_hosts(state)


def set_up(state: RankState) -> None:
    """Sets up the process and its environment."""
    if state.config.on_full_disk == "keep_training":
        outlive_full_disk(state.writer)
    set_up_process()


def check_data(state: RankState) -> None:
    """Checks all data on rank 0, before the ranks meet: a mistake shows in seconds, and no GPU is held meanwhile."""
    if state.writer is None:
        return
    from hynb.train import check_datasets, load_tokenizer

    state.writer.phase("checking data")
    tokenizer, _ = load_tokenizer(state.config, find_base(state.config))
    state.plan = check_datasets(state.config, tokenizer, state.writer.progress)


def compile_ops(state: RankState) -> None:
    """Fixes DeepSpeed's settings, and compiles the ops that these need, once per host.

    Raises:
        ConfigError: an op cannot be compiled.
    """
    import torch

    from hynb.train import compile_ops, import_libraries

    import_libraries()
    on_cpu = not torch.cuda.is_available()
    ds_config, notes = zero.correct(zero.load(state.config.deepspeed), state.config.deepspeed_values())
    ds_config, note = zero.saving_whole_weights(ds_config)
    for text in [*notes, *([note] if note else [])]:
        logger.info(f"deepspeed = {state.config.deepspeed}: {text}")
    state.ds_config = zero.for_machine(ds_config, on_cpu=on_cpu)
    writer = state.writer
    compile_ops(state.ds_config, on_cpu=on_cpu, started=lambda: writer.phase("compiling") if writer else None)


def meet(state: RankState) -> None:
    """Creates the process group, in which each rank waits for all others."""
    from hynb.train import init_process_group

    if state.writer:
        state.writer.phase("meeting")
    if state.membership:
        mark(state.membership, state.rank, "meeting")
    init_process_group(timedelta(minutes=state.config.collective_timeout_minutes))
    if state.membership:
        mark(state.membership, state.rank, "met")
    state.run_dir = RunDir(state.config.output_dir)
    if state.writer:
        state.writer.phase("loading")


def derive_limits(state: RankState) -> None:
    """Derives how far ZeRO-3 gathers ahead from the model and the smallest GPU; all ranks have to agree on it."""
    import torch

    from hynb.train import decided_by_rank_0

    world_size = torch.distributed.get_world_size()
    counts = [count for _, count in state.membership.hosts] if state.membership else [world_size]

    def derive(gpu_bytes: int | None) -> tuple[dict[str, Any], str]:
        return with_derived_limits(state.config, state.ds_config, workload(state.config, counts), gpu_bytes)

    state.ds_config, note = decided_by_rank_0(derive)
    if note:
        logger.info(note)


def choose_checkpoint(state: RankState) -> None:
    """Fixes the checkpoint that all ranks resume from.

    Raises:
        ConfigError: the checkpoint was saved by a run of another shape, or with values that this run changes.
        RunError: the checkpoint is damaged or missing, with the file, and with the host where hosts share no folder.
    """
    import torch

    from hynb.train import NodeLocalFolders, choose_checkpoint, compare_with_checkpoint, going_on_from, run_shape

    if state.membership and state.joined and not state.joined.shared:
        state.folders = NodeLocalFolders(state.membership, state.rank)
        # The first rank of each host creates the folders that the host's ranks write their shards into.
        state.ds_config["checkpoint"] = state.ds_config.get("checkpoint", {}) | {"use_node_local_storage": True}
    if state.rank == 0:
        write_json(RunDir(state.config.output_dir).ds_config, state.ds_config)
    world_size = torch.distributed.get_world_size()
    if state.config.resume_from_checkpoint is not None:
        local_ranks = state.folders.local_ranks if state.folders else range(world_size)
        state.resume, state.skipped = choose_checkpoint(state.config, local_ranks)
        state.config = going_on_from(state.config, state.resume, world_size)
    state.shape = run_shape(state.config, state.ds_config, world_size)
    if state.resume and (problems := check_same_shape(state.resume, state.shape)):
        raise ConfigError(problems)
    state.made_with, state.changed = compare_with_checkpoint(state.config, state.resume, state.shape)


def load_data(state: RankState) -> None:
    """Loads the tokenizer and the data sets, which rank 0 has checked."""
    from hynb.train import broadcast_plan, build_datasets, load_tokenizer

    state.base = find_base(state.config)
    state.tokenizer, state.tokenizer_folder = load_tokenizer(state.config, state.base)
    state.plan = broadcast_plan(state.plan)
    state.datasets = build_datasets(state.config, state.tokenizer, state.plan)
    evaluation = state.datasets.evaluation
    held_out = f", {len(evaluation)} for evaluation" if evaluation is not None else ""
    kind = "packs" if state.config.packing else "samples"
    logger.info(f"{len(state.datasets.train)} {kind} for training{held_out}")


def build_model(state: RankState) -> None:
    """Loads the model and chooses which of its parameters are trained.

    Raises:
        ModelError: the model cannot be loaded, or has no module that a parameter names.
    """
    from transformers import set_seed

    from hynb.train import (
        base_tensors,
        choose_trained_parameters,
        data_workers,
        load_model,
        mark_moe_leaves,
        save_loss_memory,
        share_rows,
        training_arguments,
        uneven_work,
    )

    # Before the TrainingArguments exist, under which ZeRO-3 would shard it.
    _write_random_base(state)
    evaluates = state.datasets.evaluation is not None
    workers, reason = data_workers(state.config, state.datasets)
    logger.info(f"dataloader_num_workers = {workers}: {reason}")
    state.arguments = training_arguments(state.config, state.ds_config, evaluates=evaluates, workers=workers)
    set_seed(state.config.seed)
    show_progress = state.writer.progress if state.writer else None
    with uneven_work():
        state.stored = base_tensors(state.base) if state.base else []
        model = load_model(
            state.config, state.base, state.tokenizer, stored=state.stored, show_progress=show_progress
        )
    model.config.use_cache = False
    state.model_type = model.config.model_type
    save_loss_memory(model)
    state.parts = share_rows(model, state.config.sequence_parallel_size)
    if state.config.make_moe_param_leaf_module:
        mark_moe_leaves(model)
    state.model = choose_trained_parameters(state.config, model, state.base, state.stored)


def record(state: RankState) -> None:
    """Checks that a checkpoint fits on the disk, and writes the manifest.

    Raises:
        ModelError: full checkpoints of this model cannot be written.
        RunError: too little free space.
    """
    from hynb.train import check_disk, checkpoint_bytes, count_parameters, tensors_to_copy, uneven_work

    counts = count_parameters(state.model)
    logger.info(f"{counts['trainable_parameters']:,} of {counts['parameters']:,} parameters are trained")
    copied = [] if state.base is None or state.config.use_lora else tensors_to_copy(state.base, state.stored)
    if not state.config.use_lora:
        _plan_checkpoints(state, copied)
    state.checkpoint_bytes = checkpoint_bytes(state.model, state.shards)
    if state.rank == 0 or (state.folders and state.folders.is_local_rank_zero):
        check_disk(Path(state.config.output_dir), state.checkpoint_bytes)
    with uneven_work():
        if state.writer:
            _write_manifest(state, state.writer, counts, copied)


def build_trainer(state: RankState) -> None:
    """Builds the Trainer.

    Raises:
        ConfigError: transformers' Trainer refuses the TrainingArguments.
    """
    from hynb.train import RouterWatch, RunCallback, RunTrainer, pace_of, pad_token_id, training_sampler, watch_of

    sampler = training_sampler(state.config, state.datasets, state.shape["world_size"])
    follows: dict[str, Any] = {"run_dir": RunDir(state.config.output_dir), "supervised": bool(state.membership)}
    follows |= {"writer": state.writer, "model": state.model, "sampler": sampler}
    state.callback = RunCallback(**follows, begin=lambda trained: _begin_training(state, trained))
    try:
        state.trainer = RunTrainer(
            model=state.model,
            args=state.arguments,
            train_dataset=state.datasets.train,
            eval_dataset=state.datasets.evaluation,
            data_collator=state.parts.collator(pad_token_id(state.tokenizer)),
            sampler=sampler,
            routers=RouterWatch(state.model, state.model_type, state.config.router_aux_loss_coef, state.parts.group),
            callbacks=[state.callback],
            config=state.config,
            base=state.base,
            shards=state.shards,
            tokenizer_folder=state.tokenizer_folder,
            record=state.shape | {"made_with": state.made_with},
            checkpoint_bytes=state.checkpoint_bytes,
            writer=state.writer,
            pace=pace_of(state.model.config.to_dict(), use_lora=state.config.use_lora),
            watch=watch_of(state.config, state.datasets, sampler, state.parts, state.writer),
            folders=state.folders,
            parts=state.parts,
        )
    except ValueError as error:
        # TrainingArguments that contradict each other or need more than is given.
        raise ConfigError(f"transformers' Trainer: {error}") from error


def train(state: RankState) -> None:
    """Trains until the last step or a stop request."""
    from hynb.train import checkpoint_loading

    with checkpoint_loading(state.resume, state.shape, state.writer, trusted=state.config.trust_checkpoint):
        state.trainer.train(resume_from_checkpoint=str(state.resume) if state.resume else None)


def finish(state: RankState) -> None:
    """Saves what is not saved yet, and records success as the last act of training."""
    from hynb.train import memory_bytes

    checkpoint = state.trainer.save_last_checkpoint()
    if state.writer:
        trained, by = state.trainer.state, state.callback.stopped_by
        stopped = stopped_end(by, f"after a checkpoint: {checkpoint.name}")
        end = stopped if by else {"state": "finished", "exit_code": 0}
        state.writer.step(trained.global_step)
        state.writer.event("end", trained.global_step, state=end["state"])
        state.writer.status(**end, global_step=trained.global_step, max_steps=trained.max_steps)
        state.writer.settle()
    logger.info(f"peak memory of rank 0: {memory_bytes() / 1e9:.2f} GB")


STEPS = (
    *(join_hosts, read_parameters, prepare_run_folder, set_up, check_data, compile_ops, meet),
    *(derive_limits, choose_checkpoint, load_data, build_model, record, build_trainer, train, finish),
)


def _begin_training(state: RankState, trained: TrainerState) -> None:
    """Writes the first event; a run that is resumed leaves a branch behind first."""
    from hynb.train import begin_resumed

    facts: dict[str, Any] = {"world_size": state.shape["world_size"]}
    if state.resume:
        first = state.folders.is_local_rank_zero if state.folders else state.rank == 0
        facts |= {"checkpoint": str(state.resume), "skipped": state.skipped, "changed": state.changed}
        facts["abandoned"] = begin_resumed(state.config, state.resume, state.trainer, trained, moves=first)
        state.trainer.obey(state.changed)
    if state.writer:
        state.writer.event("resume" if state.resume else "start", trained.global_step, **facts)


def _start_writing(state: RankState, run_dir: RunDir) -> None:
    state.writer = RunWriter(run_dir.path)
    state.writer.start()


def _log_hosts(state: RankState) -> None:
    if state.membership and state.joined and len(state.membership.hosts) > 1:
        names = ", ".join(f"{name} ({ranks} ranks)" for name, ranks in state.membership.hosts)
        folder = "one folder, shared by all hosts" if state.joined.shared else "a folder of its own on each host"
        logger.info(f"hosts: {names}; output_dir is {folder}")
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or state.joined.interface
        logger.info(f"network interface: {interface}, by which {state.joined.host} reaches the others")


def _write_random_base(state: RankState) -> None:
    """Saves the random base of an adapter, which is worth nothing without it."""
    import torch

    from hynb.train import write_random_base

    if state.base is not None or not state.config.use_lora:
        return
    state.base = RunDir(state.config.output_dir).random_base
    if state.rank == 0:
        write_random_base(state.config, state.tokenizer, state.tokenizer_folder, state.base)
    torch.distributed.barrier()
    if state.folders:
        state.folders.copy_to_hosts(state.base)


def _plan_checkpoints(state: RankState, copied: Sequence[TensorEntry]) -> None:
    """Decides on the weight files of full checkpoints."""
    from transformers import PreTrainedModel

    from hynb.files import INDEX_NAME
    from hynb.train import plan_shards, training_dtype

    assert isinstance(state.model, PreTrainedModel)
    has_index = state.base is not None and (state.base / INDEX_NAME).is_file()
    dtype = training_dtype(state.config)
    state.shards = plan_shards(state.model, state.stored, copied, dtype=dtype, has_index=has_index)


def _write_manifest(
    state: RankState, writer: RunWriter, counts: dict[str, int], copied: Sequence[TensorEntry]
) -> None:
    from hynb.train import manifest

    assert state.plan and state.notes
    hosts = [name for name, _ in state.membership.hosts] if state.membership else [socket.gethostname()]
    facts: dict[str, Any] = counts | state.plan.summary | state.shape
    if copied:
        size_bytes = sum(entry.size_bytes for entry in copied)
        facts |= {"copied_from_base": {"tensors": [entry.name for entry in copied], "bytes": size_bytes}}
    facts |= {"output_dir_shared": state.joined.shared} if state.joined else {}
    writer.manifest(
        manifest(state.config, state.ds_config, base=state.base, hosts=hosts, notes=state.notes.lines, **facts)
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries were seen to abort the interpreter after training had ended well.
    os._exit(code)
