"""What every rank of a training run executes, step by step, from top to bottom.

    hynb launch                                         on every rank, with hynb's supervision
    deepspeed --module hynb.train_entry run.yaml        by hand, with a YAML file
    deepspeed hynb/train_entry.py --output_dir … …      by hand, with the flags of upstream's train.sh

Heavy imports stay inside the steps, so that a wrong parameter is refused within a second.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Started by path, this folder would come before every package that has the name of one of our modules.
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from hynb.config import Config, Reading, read_flags, read_yaml, to_yaml
from hynb.errors import ConfigError
from hynb.files import read_json, replace_text, write_json
from hynb.plan import zero
from hynb.runs import (
    RunDir,
    RunWriter,
    check_run,
    check_same_shape,
    clear_run_folder,
    find_base,
    resume_checkpoint,
)
from hynb.supervision import RANK_VARIABLES, Joined, Membership, join, leave, mark
from hynb.train import Notes, report_failure, set_up_process, show_output_at_once, start_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hynb.train import DataPlan, Datasets, NodeLocalFolders, RunCallback, RunTrainer

# Named by hand: as a script this module is called __main__.
logger = logging.getLogger("hynb.train_entry")


@dataclass(kw_only=True)
class Run:
    """What the steps of one rank share; each field is set by the step named above it.

    Args:
        beside_rank_0: this rank is on rank 0's host.
        run_dir: None until the folder is known to belong to this run: a refused run writes nothing into another's.
        writer: writes the run folder; None on other ranks than 0.
        notes: what rank 0 logs, for the manifest.
        folders: the run folders of hosts that share none; None where there is one folder.
        shape: what a resumed run must have in common with the run that saved its checkpoint.
        base: folder of the base model; None for a random one.
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
    # choose_checkpoint
    folders: NodeLocalFolders | None = None
    ds_config: dict[str, Any] = field(init=False)
    resume: Path | None = None
    shape: dict[str, Any] = field(init=False)
    # load_data
    base: Path | None = None
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    tokenizer_folder: Path = field(init=False)
    datasets: Datasets = field(init=False)
    # build_model
    arguments: Any = field(init=False)
    model: Any = field(init=False)
    model_type: str = field(init=False)
    # build_trainer
    callback: RunCallback = field(init=False)
    trainer: RunTrainer = field(init=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs this rank; returns 0, 2 for a user's mistake, which is reported by its message alone, or 1.

    Args:
        argv: a YAML file or flags; None for those of the command line.
    """
    show_output_at_once()
    run = Run(argv=sys.argv[1:] if argv is None else argv)
    exit_code = 1
    try:
        for step in STEPS:
            step(run)
        exit_code = 0
    except Exception as error:
        exit_code = report_failure(error, run.rank, run.run_dir, beside_rank_0=run.beside_rank_0)
    finally:
        if run.writer:
            run.writer.close()
        if run.membership:
            leave(run.membership, run.rank, exit_code)
    return exit_code


def join_hosts(run: Run) -> None:
    """Waits until all hosts have joined; without supervision there is nothing to wait for."""
    run.rank = int(os.environ.get("RANK", "0"))
    membership = Membership.from_environment()
    if membership is None:
        run.beside_rank_0 = True
        return
    for name, variables in RANK_VARIABLES.items():
        if values := [os.environ[variable] for variable in variables if variable in os.environ]:
            os.environ.setdefault(name, values[0])
    run.membership, run.rank = membership, int(os.environ["RANK"])
    node = membership.node_of(run.rank)
    run.beside_rank_0 = node == 0
    run_dir = RunDir(membership.run_folder)
    if run.rank == 0 and (read_json(run_dir.launch) or {}).get("id") == membership.launch_id:
        _start_writing(run, run_dir)
    run.joined = join(membership, run.rank)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # Otherwise a rank may offer the others an address that means another machine there.
        if run.joined.interface:
            os.environ.setdefault(name, run.joined.interface)
    os.environ.setdefault("MASTER_ADDR", run.joined.master_address)
    os.environ.setdefault("LOCAL_RANK", str(run.rank - membership.ranks_of(node)[0]))


def read_parameters(run: Run) -> None:
    """Reads a YAML file, flags, or the configuration in the run folder.

    Raises:
        ConfigError: every mistake, at once.
    """
    words = [word for word in run.argv if not word.startswith("--local_rank")]
    if len(words) == 1 and not words[0].startswith("--"):
        run.reading = read_yaml(words[0])
    elif words:
        run.reading = read_flags(words)
    elif run.membership:
        run.reading = read_yaml(str(RunDir(run.membership.run_folder).config))
    else:
        raise ConfigError(
            "no parameters were given: name a YAML file (hynb.train_entry run.yaml) or flags "
            "(--model_name_or_path … --train_data_file … --output_dir …); `hynb parameters` lists them all"
        )
    run.config = run.reading.config("parameters")


def prepare_run_folder(run: Run) -> None:
    """Checks everything on the disk, clears an earlier run's files, and starts the heartbeat and the notes.

    Raises:
        ConfigError: every mistake found, at once.
    """
    run_dir = RunDir(run.config.output_dir)
    if run.membership:
        run.run_dir = run_dir
    if run.rank != 0:
        if run.joined and run.joined.first:
            # A model or data file may be missing on this host only.
            check_run(run.config, launched=True)
        return
    check_run(run.config, launched=run.membership is not None)
    if not run.membership:
        clear_run_folder(run.config)
    run_dir.log.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir.config, to_yaml(run.config))
    run.run_dir = run_dir
    if run.writer is None:
        _start_writing(run, run_dir)
    run.notes = start_notes()
    for note in run.reading.notes:
        logger.info(note)
    _log_hosts(run)


def set_up(run: Run) -> None:
    """Sets up the process, and imports what takes seconds before the ranks wait for each other."""
    set_up_process()
    import transformers  # noqa: F401


def check_data(run: Run) -> None:
    """Checks all data on rank 0, before the ranks meet: a mistake shows in seconds, and no GPU is held meanwhile."""
    if run.writer is None:
        return
    from hynb.train import check_datasets, load_tokenizer

    run.writer.phase("checking data")
    tokenizer, _ = load_tokenizer(run.config, find_base(run.config))
    run.plan = check_datasets(run.config, tokenizer)


def meet(run: Run) -> None:
    """Creates the process group, in which each rank waits for all others."""
    from hynb.train import init_process_group

    if run.writer:
        run.writer.phase("meeting")
    if run.membership:
        mark(run.membership, run.rank, "meeting")
    init_process_group()
    if run.membership:
        mark(run.membership, run.rank, "met")
    run.run_dir = RunDir(run.config.output_dir)
    if run.writer:
        run.writer.phase("loading")


def choose_checkpoint(run: Run) -> None:
    """Fixes DeepSpeed's settings and the checkpoint that all ranks resume from.

    Raises:
        ConfigError: the checkpoint was saved by a run of another shape.
        RunError: a host without the shared folder does not have the checkpoint.
    """
    import torch

    run.ds_config = zero.for_machine(zero.load(run.config.deepspeed), on_cpu=not torch.cuda.is_available())
    if run.membership and run.joined and not run.joined.shared:
        from hynb.train import NodeLocalFolders

        run.folders = NodeLocalFolders(run.membership, run.rank)
        resume = run.folders.agree_on_checkpoint(resume_checkpoint(run.config))
        run.config = run.config.replace(resume_from_checkpoint=resume)
        # The first rank of each host creates the folders that the host's ranks write their shards into.
        run.ds_config["checkpoint"] = run.ds_config.get("checkpoint", {}) | {"use_node_local_storage": True}
    if run.rank == 0:
        write_json(RunDir(run.config.output_dir).ds_config, run.ds_config)
    run.resume = resume_checkpoint(run.config)
    stage = run.ds_config.get("zero_optimization", {}).get("stage", 0)
    world_size = torch.distributed.get_world_size()
    run.shape = {"world_size": world_size, "zero_stage": stage, "use_lora": run.config.use_lora}
    if run.resume and (problems := check_same_shape(run.resume, **run.shape)):
        raise ConfigError(problems)
    micro_batches = run.config.gradient_accumulation_steps * world_size
    run.shape["global_batch_size"] = run.config.per_device_train_batch_size * micro_batches


def load_data(run: Run) -> None:
    """Loads the tokenizer and the data sets, which rank 0 has checked."""
    from hynb.train import broadcast_plan, build_datasets, load_tokenizer

    run.base = find_base(run.config)
    run.tokenizer, run.tokenizer_folder = load_tokenizer(run.config, run.base)
    run.plan = broadcast_plan(run.plan)
    run.datasets = build_datasets(run.config, run.tokenizer, run.plan)
    evaluation = run.datasets.evaluation
    held_out = f", {len(evaluation)} for evaluation" if evaluation is not None else ""
    kind = "packs" if run.config.packing else "samples"
    logger.info(f"{len(run.datasets.train)} {kind} for training{held_out}")


def build_model(run: Run) -> None:
    """Loads the model and chooses which of its parameters are trained.

    Raises:
        ModelError: the model cannot be loaded, or has no module that a parameter names.
    """
    from transformers import set_seed

    from hynb.train import load_model, mark_moe_leaves, save_loss_memory, training_arguments

    set_seed(run.config.seed)
    if run.base is None and run.config.use_lora:
        # Before the TrainingArguments exist, under which ZeRO-3 would shard it.
        _write_random_base(run)
    evaluates = run.datasets.evaluation is not None
    run.arguments = training_arguments(run.config, run.ds_config, evaluates=evaluates)
    set_seed(run.config.seed)
    model = load_model(run.config, run.base, run.tokenizer)
    model.config.use_cache = False
    run.model_type = model.config.model_type
    save_loss_memory(model)
    if run.config.make_moe_param_leaf_module:
        mark_moe_leaves(model)
    run.model = model
    _choose_trained_parameters(run)


def record(run: Run) -> None:
    """Checks that a checkpoint fits on the disk, and writes the manifest.

    Raises:
        RunError: too little free space.
    """
    from hynb.train import check_disk, count_parameters, manifest, training_dtype

    counts = count_parameters(run.model)
    logger.info(f"{counts['trainable_parameters']:,} of {counts['parameters']:,} parameters are trained")
    if run.rank == 0 or (run.folders and run.folders.is_local_rank_zero):
        weight_bytes = training_dtype(run.config).itemsize
        check_disk(Path(run.config.output_dir), run.model, is_lora=run.config.use_lora, weight_bytes=weight_bytes)
    if run.writer is None:
        return
    assert run.plan and run.notes
    hosts = [name for name, _ in run.membership.hosts] if run.membership else [socket.gethostname()]
    facts = counts | run.plan.summary | run.shape
    facts |= {"output_dir_shared": run.joined.shared} if run.joined else {}
    run.writer.manifest(
        manifest(run.config, run.ds_config, base=run.base, hosts=hosts, notes=run.notes.lines, **facts)
    )


def build_trainer(run: Run) -> None:
    """Builds the Trainer.

    Raises:
        ConfigError: transformers' Trainer refuses the TrainingArguments.
    """
    from hynb.data import Collator
    from hynb.train import RouterWatch, RunCallback, RunTrainer, training_sampler

    sampler = training_sampler(run.config, run.datasets, run.shape["world_size"])
    run_dir = RunDir(run.config.output_dir)
    run.callback = RunCallback(run_dir=run_dir, writer=run.writer, model=run.model, sampler=sampler)
    flash = run.model.config._attn_implementation == "flash_attention_2"
    try:
        run.trainer = RunTrainer(
            model=run.model,
            args=run.arguments,
            train_dataset=run.datasets.train,
            eval_dataset=run.datasets.evaluation,
            data_collator=Collator(pad_token_id=_pad_token_id(run.tokenizer), flatten=flash),
            sampler=sampler,
            routers=RouterWatch(run.model, run.model_type, run.config.router_aux_loss_coef),
            callbacks=[run.callback],
            base=run.base,
            tokenizer_folder=run.tokenizer_folder,
            record=run.shape,
            keep_checkpoints=run.config.save_total_limit,
            writer=run.writer,
            folders=run.folders,
        )
    except ValueError as error:
        # TrainingArguments that contradict each other or need more than is given.
        raise ConfigError(f"transformers' Trainer: {error}") from error


def train(run: Run) -> None:
    """Trains until the last step or a stop request."""
    if run.writer:
        state = (read_json(run.resume / "trainer_state.json") if run.resume else None) or {}
        kind = "resume" if run.resume else "start"
        run.writer.event(kind, int(state.get("global_step", 0)), world_size=run.shape["world_size"])
    run.trainer.train(resume_from_checkpoint=str(run.resume) if run.resume else None)


def finish(run: Run) -> None:
    """Saves what is not saved yet, and records success as the last act of training."""
    from hynb.train import memory_bytes

    checkpoint = run.trainer.save_last_checkpoint()
    if run.writer:
        step, max_steps = run.trainer.state.global_step, run.trainer.state.max_steps
        reason = f"stopped on request after a checkpoint: {checkpoint.name}" if run.callback.stopped else ""
        end = "stopped" if run.callback.stopped else "finished"
        run.writer.step(step)
        run.writer.event("end", step, state=end)
        run.writer.status(end, global_step=step, max_steps=max_steps, exit_code=0, reason=reason)
    logger.info(f"peak memory of rank 0: {memory_bytes() / 1e9:.2f} GB")


STEPS = (
    *(join_hosts, read_parameters, prepare_run_folder, set_up, check_data, meet),
    *(choose_checkpoint, load_data, build_model, record, build_trainer, train, finish),
)


def _start_writing(run: Run, run_dir: RunDir) -> None:
    run.writer = RunWriter(run_dir.path)
    run.writer.start()


def _log_hosts(run: Run) -> None:
    if run.membership and run.joined and len(run.membership.hosts) > 1:
        names = ", ".join(f"{name} ({ranks} ranks)" for name, ranks in run.membership.hosts)
        folder = "one folder, shared by all hosts" if run.joined.shared else "a folder of its own on each host"
        logger.info(f"hosts: {names}; output_dir is {folder}")
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or run.joined.interface
        logger.info(f"network interface: {interface}, by which {run.joined.host} reaches the others")


def _write_random_base(run: Run) -> None:
    """Saves the random base of an adapter, which is worth nothing without it."""
    import torch

    from hynb.train import write_random_base

    run.base = RunDir(run.config.output_dir).random_base
    if run.rank == 0:
        write_random_base(run.config, run.tokenizer, run.tokenizer_folder, run.base)
    torch.distributed.barrier()
    if run.folders:
        run.folders.copy_to_hosts(run.base)


def _choose_trained_parameters(run: Run) -> None:
    from hynb.train import add_adapter, freeze_all_but_attention

    if run.config.use_lora:
        # A frozen embedding's output needs a gradient, or checkpointed layers would have none to pass back.
        if run.config.gradient_checkpointing:
            run.model.enable_input_require_grads()
        run.model = add_adapter(run.model, run.config, run.base)
    elif run.config.train_attention_params_only:
        freeze_all_but_attention(run.model)


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # Padding is masked and has no labels, so any token serves where a tokenizer names none.
    token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return token_id if isinstance(token_id, int) else 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries were seen to abort the interpreter after training had ended well.
    os._exit(code)
