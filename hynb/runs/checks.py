"""Checks of a Config against this machine's disk before anything starts: paths, settings, run folder."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hynb.cluster import gpu_count, host_facts
from hynb.config import Config
from hynb.data import find_files
from hynb.errors import ConfigError, HynbError, nearest
from hynb.families import FAMILIES
from hynb.files import pattern_problem, read_json, read_weight_map
from hynb.plan import ops, zero
from hynb.runs.checkpoint import check_checkpoint, ended_well, last_checkpoint, resume_checkpoint, saved_step
from hynb.runs.contract import BATCH, DATA, allowable_names, compare, made_with
from hynb.runs.deepspeed import model_config
from hynb.runs.events import RunReader
from hynb.runs.folder import RunDir
from hynb.runs.integrity import CHECKPOINT_RECORD, header_problem
from hynb.runs.records import read_record

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
# More than a disk block, which a full disk may have left in the file system's own structures.
_PROBE_BYTES = 1 << 16
_TOKENIZER_FILES = ("tokenizer.json", "hy.tiktoken", "tokenizer.model", "vocab.json")


def check_output_dir(output_dir: str | Path, *, overwrite: bool, resuming: bool) -> list[str]:
    """Why a new run must not start in this folder, one message per reason; empty when it may.

    Every host of a run checks the folder that it has of its own by the same rules.

    Raises:
        RunError: a record in the folder is damaged.
    """
    if problem := _location_problem(str(output_dir)):
        return [f"output_dir = {output_dir}: {problem}"]
    run_dir = RunDir(output_dir)
    status = RunReader(run_dir.path).status()
    if status.live:
        quoted = shlex.quote(str(output_dir))
        return [
            f"output_dir = {output_dir}: has a live run ({status}). Watch it with `hynb attach {quoted}`, "
            f"end it with `hynb stop {quoted}`, or choose another output_dir"
        ]
    earlier = f"an earlier run ({status.state})"
    if status.state == "absent":
        foreign = _foreign_files(run_dir)
        if foreign and not run_dir.led_from.exists():
            return [
                f"output_dir = {output_dir}: holds no run, but {', '.join(foreign)}, which a run would replace: "
                "choose another folder"
            ]
        # What a failed start leaves (parameters, logs) may be overwritten.
        earlier = "this host's part of an earlier run" if foreign else ""
    if earlier and not overwrite and not resuming:
        return [
            f"output_dir = {output_dir}: holds {earlier}. Resume it with resume_from_checkpoint: last, remove it "
            "with overwrite_output_dir, or choose another output_dir"
        ]
    return []


def _location_problem(output_dir: str) -> str:
    """Why a folder cannot be a run folder wherever it is; empty when it can."""
    if not output_dir.strip():
        return "is empty; name a folder"
    path = RunDir(output_dir).path
    if problem := pattern_problem(path):
        return problem
    if path.resolve() in (Path("/"), Path.home()):
        return "is not a folder for a run; name a new folder in it"
    existing = path
    # os.path answers where a folder above may not be entered; Path.exists would raise.
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file; name a folder" if existing != path else "is a file; name a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot be created or written: {existing} is not writable for this user"
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
    except OSError as error:
        # As in /proc, and on a disk that is full or was mounted to be read only.
        return f"cannot be created or written: {existing}: {error.strerror}; name a folder elsewhere"
    return ""


def _foreign_files(run_dir: RunDir) -> list[str]:
    """Files in a folder without a run that have the names of a run's files; a log folder may be of a preflight."""
    return [item.name for item in run_dir.run_files() if item not in (run_dir.config, run_dir.log, run_dir.led_from)]


def check_run(config: Config, *, launched: bool = False) -> None:
    """Checks everything that a run needs from the disk.

    Args:
        config: its own values have been checked already.
        launched: `launch` has checked and prepared the run folder already.

    Raises:
        ConfigError: every problem found, at once.
    """
    problems = _check_allowed(config)
    resume = None
    if config.resume_from_checkpoint is not None:
        resume = resume_checkpoint(config)
        problems += _check_resume(config, resume)
    if config.model_name_or_path is not None:
        problems += _check_model_folder(config.model_name_or_path, config.trust_remote_code)
    if config.tokenizer_name_or_path is not None:
        problems += _check_tokenizer_folder(config.tokenizer_name_or_path, "tokenizer_name_or_path")
    elif config.model_name_or_path is not None and Path(config.model_name_or_path).is_dir():
        problems += _check_tokenizer_folder(config.model_name_or_path, "model_name_or_path")
    for parameter in ("train_data_file", "eval_data_file"):
        if (paths := getattr(config, parameter)) is not None:
            problems += _missing_files(paths, parameter)
    # The hosts of a launched run need no hostfile of their own.
    if not launched and config.hostfile is not None and not Path(config.hostfile).is_file():
        problems.append(f"hostfile = {config.hostfile}: there is no such file")
    problems += _check_deepspeed(config)
    problems += _check_sequence_parallel(config)
    # On the hosts of a hostfile preflight checks it, and so do their ranks.
    if launched or config.hostfile is None:
        problems += _check_compiler(config) + _check_precision(config)
    if not launched:
        problems += check_output_dir(
            config.output_dir, overwrite=config.overwrite_output_dir, resuming=resume is not None
        )
        if config.overwrite_output_dir and resume and resume.parent == RunDir(config.output_dir).path:
            problems.append(
                "overwrite_output_dir and resume_from_checkpoint are both given, and the checkpoint is in "
                "output_dir: it would be removed. Leave out overwrite_output_dir"
            )
    if problems:
        raise ConfigError(problems)


def clear_run_folder(config: Config, *, live: bool = False) -> None:
    """Removes an earlier run's files: all on `overwrite_output_dir`, otherwise those that record its state.

    Args:
        live: the run starts again by itself; what shows that it is live, its logs and requests to end it stay.
    """
    run_dir = RunDir(config.output_dir)
    kept = [run_dir.status, run_dir.launch, run_dir.log, run_dir.stop_request, run_dir.kill_request] if live else []
    if config.overwrite_output_dir:
        for item in run_dir.run_files():
            if item not in kept:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    records = [run_dir.stop_request, run_dir.exit, run_dir.status, run_dir.heartbeat, run_dir.launch]
    records += [run_dir.kill_request, run_dir.hosts, run_dir.paste, run_dir.stacks]
    for item in [*records, *run_dir.log.glob("failure_rank*.json")]:
        if item not in kept:
            item.unlink(missing_ok=True)
    shutil.rmtree(run_dir.saving, ignore_errors=True)


def _check_model_folder(path: str, trust_remote_code: bool) -> list[str]:
    """Why a folder cannot be loaded as a model; empty when it can."""
    folder = Path(path)
    name = f"model_name_or_path = {path}"
    if not folder.is_dir():
        return [f"{name}: there is no such folder. Download the model first; hynb trains from a local folder"]
    try:
        model_config = read_json(folder / "config.json")
    except HynbError as error:
        return [f"{problem}, or download it again" for problem in error.problems]
    if model_config is None:
        return [f"{name}: has no config.json, so it is not a model folder{_adapter_hint(folder)}"]
    problems = []
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        problems.append(f"{name}: has a config.json but no weights (*.safetensors)")
    problems += _missing_shards(folder) or _damaged_shards(folder)
    model_type = model_config.get("model_type")
    if not isinstance(model_type, str):
        problems.append(f"{folder / 'config.json'}: model_type = {model_type!r}: must be a string; download it again")
    elif model_config.get("auto_map") and model_type not in FAMILIES and not trust_remote_code:
        files = _code_files(model_config)
        problems.append(
            f"{name}: model_type {model_type} needs code from the folder itself ({', '.join(files)}). "
            "Read those files, then allow them with trust_remote_code: true"
        )
    if "quantization_config" in model_config:
        problems.append(f"{name}: is quantised; fine-tuning needs the bf16 or fp16 model")
    return problems


def _check_tokenizer_folder(path: str, parameter: str) -> list[str]:
    """Why a folder cannot be loaded as a tokenizer; empty when it can."""
    folder = Path(path)
    if not folder.is_dir():
        return [f"{parameter} = {path}: there is no such folder"]
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return [
            f"{parameter} = {path}: has no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
            "name its folder with tokenizer_name_or_path"
        ]
    return []


def _check_deepspeed(config: Config) -> list[str]:
    """Why DeepSpeed would refuse the chosen preset or file, and settings that contradict it."""
    try:
        ds_config = zero.load(config.deepspeed)
    except HynbError as error:
        return error.problems
    problems = []
    if config.deepspeed not in zero.PRESETS:
        problems += zero.check(ds_config, config.deepspeed_values(), source=config.deepspeed)
    stage = zero.stage_of(ds_config)
    if config.make_moe_param_leaf_module and stage != 3:
        problems.append(
            f"make_moe_param_leaf_module needs ZeRO-3, and deepspeed = {config.deepspeed} is stage {stage}: "
            "choose a ds_zero3 preset, or leave out make_moe_param_leaf_module"
        )
    return problems


def _check_sequence_parallel(config: Config) -> list[str]:
    """Why the GPUs cannot share the sequences of the model that is trained; empty when they can."""
    size, name = config.sequence_parallel_size, f"sequence_parallel_size = {config.sequence_parallel_size}"
    if size == 1:
        return []
    try:
        model, ds_config = model_config(config), zero.load(config.deepspeed)
    except (HynbError, ValueError, OSError):
        # Another check names the folder or the file.
        return []
    problems = []
    if (batch := ds_config.get("train_batch_size", "auto")) != "auto":
        problems.append(
            f"{name} and train_batch_size = {batch} in {config.deepspeed}: DeepSpeed would count each sequence "
            f'{size} times; set train_batch_size to "auto"'
        )
    if str(model.get("model_type")) not in FAMILIES:
        return [*problems, f"{name}: not known to be right for model_type {model.get('model_type')}; set it to 1"]
    heads = model.get("num_attention_heads")
    key_value_heads = model.get("num_key_value_heads") or heads
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    limit = model.get("max_position_embeddings") or 0
    if not isinstance(heads, int) or not isinstance(key_value_heads, int):
        # Loading the model reports it.
        return problems
    if problem := _head_problem(size, heads, key_value_heads):
        sizes = range(1, min(heads, 1024) + 1)
        possible = [number for number in sizes if not _head_problem(number, heads, key_value_heads)]
        problems.append(f"{name}: {problem}; possible for this model: {', '.join(map(str, possible))}")
    if not isinstance(rope, dict) or not isinstance(limit, int):
        return problems
    kind = rope.get("rope_type") or rope.get("type")
    is_dynamic = kind == "dynamic" and not rope.get("alpha") and config.max_seq_length > limit
    if is_dynamic or kind == "longrope":
        problems.append(
            f"{name}: the model's {kind} RoPE depends on the length of a sequence, which no GPU sees as a whole; set "
            f"it to 1{f', or max_seq_length to {limit}' if is_dynamic else ''}"
        )
    return problems


def check_batch(config: Config, ranks: int) -> list[str]:
    """Why DeepSpeed would refuse the batch size in its file; empty when it would not.

    Args:
        config: as for `check_run`, which has accepted it.
        ranks: of all hosts.
    """
    value = zero.load(config.deepspeed).get("train_batch_size", "auto")
    samples, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if value in ("auto", samples * steps * ranks):
        return []
    return [
        f"train_batch_size = {value} in {config.deepspeed}: this run has {samples * steps * ranks} samples per step "
        f"(per_device_train_batch_size = {samples}, gradient_accumulation_steps = {steps}, {ranks} "
        f'rank{"s" * (ranks > 1)}); set it to "auto", or change the run'
    ]


def _check_precision(config: Config) -> list[str]:
    """Why this machine cannot train in the chosen precision; empty when it can."""
    if config.fp16 and not gpu_count():
        return ["fp16 needs a GPU, and this machine shows none: choose bf16, which CPUs compute too, or neither"]
    return []


def _head_problem(size: int, heads: int, key_value_heads: int) -> str:
    """Why a number of GPUs cannot share attention's heads; empty when it can."""
    if heads % size:
        return f"does not divide the model's {heads} attention heads"
    if key_value_heads % size and size % key_value_heads:
        return f"neither divides the model's {key_value_heads} key and value heads nor is a multiple of them"
    return ""


def _check_compiler(config: Config) -> list[str]:
    """What this machine lacks to compile what the chosen preset or file makes DeepSpeed compile."""
    on_cpu = not gpu_count()
    try:
        ds_config = zero.for_machine(zero.load(config.deepspeed), on_cpu=on_cpu)
    except HynbError:
        # `_check_deepspeed` reports it.
        return []
    problem, fix = ops.compile_problem(ds_config, host_facts.build_tools(), on_cpu=on_cpu)
    if not problem:
        return []
    presets = ", ".join(ops.without_ops(ds_config))
    return [f"deepspeed = {config.deepspeed}: {problem}: `{fix}`, or choose a preset that needs none: {presets}"]


def _missing_files(paths: str, parameter: str) -> list[str]:
    try:
        find_files(paths, parameter)
    except HynbError as error:
        return error.problems
    return []


def _check_allowed(config: Config) -> list[str]:
    """Names in allow_changed that are none of what may be changed."""
    known = allowable_names()
    return [
        f"allow_changed = {name}: not a parameter that a resumed run may change{nearest(name, known)}; those are "
        f"{', '.join(known)}"
        for name in config.allow_changed
        if name not in known
    ]


def _check_resume(config: Config, resume: Path | None) -> list[str]:
    """Why a run cannot go on from the checkpoint that its Config names; empty when it can."""
    if resume is not None:
        problems = check_checkpoint(resume, trusted=config.trust_checkpoint)
        if config.resume_from_checkpoint == "last" and not ended_well(RunDir(config.output_dir)):
            # The ranks compare the digests, and may resume from an earlier one.
            return problems
        return problems or _check_steps(config, resume) + _check_changes(config, resume)
    _, skipped = last_checkpoint(RunDir(config.output_dir))
    if skipped:
        return [*skipped, f"resume_from_checkpoint = last: no checkpoint in {config.output_dir} is whole"]
    return [
        f"resume_from_checkpoint = last: there is no checkpoint in output_dir = {config.output_dir}. "
        "Leave it out to start from the beginning"
    ]


def _check_steps(config: Config, resume: Path) -> list[str]:
    """Why a run has nothing left to train behind a checkpoint; empty when it has."""
    step, planned = saved_step(resume)
    if config.max_steps is not None and step >= config.max_steps:
        return [nothing_left(resume, step, f"max_steps = {config.max_steps}")]
    made_with = (read_record(resume / CHECKPOINT_RECORD) or {}).get("made_with", {})
    same_epochs = made_with.get("num_train_epochs") == config.num_train_epochs and not made_with.get("max_steps")
    if config.max_steps is None and same_epochs and planned is not None and step >= planned:
        return [nothing_left(resume, step, f"num_train_epochs = {config.num_train_epochs:g} ({planned} steps)")]
    return []


def _check_changes(config: Config, resume: Path) -> list[str]:
    """What a run must not change that goes on from a checkpoint; the ranks compare its data too."""
    now = made_with(config, "")
    del now[DATA]
    record = read_record(resume / CHECKPOINT_RECORD) or {}
    if config.num_processes != record.get("world_size"):
        # The ranks know their number, and compare it.
        now = {name: value for name, value in now.items() if name not in BATCH}
    before = record.get("made_with") or {}
    saved = [before.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    counts = [count for count in saved if isinstance(count, int)]
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    samples = (counts[0] * counts[1], batch) if len(counts) == 2 else None
    return compare(resume, now, config.allow_changed, samples=samples)[1]


def nothing_left(resume: Path, step: int, end: str) -> str:
    """The message that a run would train nothing.

    Args:
        step: of the checkpoint.
        end: the parameter that ends the run, with its value.
    """
    return (
        f"{end}: the checkpoint {resume} is of step {step}, so there is nothing left to train. The run is finished: "
        "raise max_steps or num_train_epochs and allow it (allow_changed), or start a new run from this model"
    )


def _adapter_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "; it is a LoRA adapter: merge it first (`hynb merge`), or resume its run with resume_from_checkpoint"
    return ""


def _missing_shards(folder: Path) -> list[str]:
    try:
        named = set((read_weight_map(folder) or {}).values())
    except HynbError as error:
        return error.problems
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        return [f"{folder}: {len(missing)} of {len(named)} shards are missing: {shown}. Finish the download"]
    return []


def _damaged_shards(folder: Path) -> list[str]:
    """Weight files whose size is not what their header says; the values themselves are not read."""
    problems = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if problem := header_problem(path):
                problems.append(f"{path}: {problem}. Download or copy the file again")
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
    return problems


def _code_files(model_config: dict[str, Any]) -> list[str]:
    """The Python files that an auto_map, whose entries are `file.Class`, would run."""
    auto_map = model_config["auto_map"]
    entries = auto_map.values() if isinstance(auto_map, dict) else []
    names = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry]) if item]
    return sorted({str(name).split("--")[-1].rpartition(".")[0] + ".py" for name in names})
