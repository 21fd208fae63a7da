"""Contradictions between the parameters of a Config, each with a way to resolve it."""

from __future__ import annotations

import dataclasses

from hynb.config.paths import PATHS
from hynb.config.schema import Config, parameters
from hynb.files import path_problem

# Several paths each, separated by commas.
_FILES = ("train_data_file", "eval_data_file")
# Characters of a path that cannot be one.
_SHOWN = 200
# TrainingArguments by which transformers would scale the loss or deal out the data in another way.
_NOT_IN_PARTS = ("accelerator_config", "label_smoothing_factor")


def check_config(config: Config) -> list[str]:
    """One message for each mistake in a Config that shows without looking at the disk."""
    invalid = {item: item.problems(getattr(config, item.name)) for item in parameters()}
    for item in parameters():
        invalid[item] += [] if invalid[item] else _path_problems(item.name, getattr(config, item.name))
    # An invalid value counts as its default here, so that it is reported once.
    corrected = {item.name: item.default for item, problems in invalid.items() if problems}
    problems = [problem for found in invalid.values() for problem in found]
    return problems + _contradictions(dataclasses.replace(config, **corrected))


def _path_problems(name: str, value: object) -> list[str]:
    """Why a parameter cannot name a file or folder, wherever it is."""
    if not isinstance(value, str) or name not in (*PATHS, *_FILES, "deepspeed"):
        return []
    parts = [part.strip() for part in value.split(",")] if name in _FILES else [value]
    shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    return [f"{name} = {shown!r}: {problem}" for part in parts if (problem := path_problem(part))]


def _contradictions(config: Config) -> list[str]:
    problems = [
        *_training_contradictions(config),
        *_lora_contradictions(config),
        *_data_contradictions(config),
        *_host_contradictions(config),
        *_sequence_contradictions(config),
    ]
    if config.model_name_or_path is None and config.resume_from_checkpoint is None:
        if config.tokenizer_name_or_path is None:
            problems.append(
                "model_name_or_path and tokenizer_name_or_path are both missing: name the model's folder, "
                "or a tokenizer's folder for a random model of the given sizes"
            )
        problems += _size_contradictions(config)
    return problems


def _training_contradictions(config: Config) -> list[str]:
    problems = []
    if config.bf16 and config.fp16:
        problems.append("bf16 and fp16 are both on: choose one (bf16 on A100 and newer, fp16 on older GPUs)")
    if config.use_flash_attn and config.attention in ("sdpa", "flex"):
        problems.append(
            f"use_flash_attn is on and attention = {config.attention}: leave use_flash_attn off, or attention on auto"
        )
    if config.min_lr is not None and config.min_lr > config.learning_rate:
        problems.append(
            f"min_lr = {config.min_lr:g} is above learning_rate = {config.learning_rate:g}: "
            "min_lr is the absolute final rate; lower it or leave it on auto"
        )
    if (seconds := config.training_args.get("ddp_timeout")) is not None:
        problems.append(
            f"ddp_timeout = {seconds}: DeepSpeed does not read it; set "
            f"collective_timeout_minutes to {float(seconds) / 60:g} instead"
        )
    if config.training_args.get("parallelism_config"):
        problems.append(
            "parallelism_config: hynb sets up the ranks itself; leave it out. For GPUs that share each sequence set "
            "sequence_parallel_size"
        )
    if config.training_args.get("enable_jit_checkpoint"):
        problems.append("enable_jit_checkpoint: hynb saves a checkpoint on SIGTERM itself; leave it out")
    if not config.do_train:
        problems.append("do_train is off: there is nothing to do; leave it out or set it to true")
    return problems


def _lora_contradictions(config: Config) -> list[str]:
    problems = []
    if config.use_lora and config.train_attention_params_only:
        problems.append(
            "use_lora and train_attention_params_only are both on: LoRA trains only its adapters; choose one"
        )
    if config.lora_on_experts and not config.use_lora:
        problems.append("lora_on_experts needs use_lora: turn it on, or leave lora_on_experts off")
    if config.lora_on_experts and config.use_lora and config.lora_dropout:
        problems.append(
            f"lora_on_experts and lora_dropout = {config.lora_dropout:g}: PEFT has no dropout on experts' weights; "
            "set lora_dropout to 0"
        )
    return problems


def _data_contradictions(config: Config) -> list[str]:
    problems = []
    if config.train_data_file is None:
        problems.append("train_data_file is missing: name a JSONL file with one conversation per line")
    if config.packing and config.group_by_length:
        problems.append(
            "packing and group_by_length are both on: packed sequences have about the same length; choose one"
        )
    if config.split_long_samples and not config.packing:
        problems.append("split_long_samples needs packing: turn it on too")
    if config.eval_data_file is not None and config.eval_split:
        problems.append(
            f"eval_data_file and eval_split = {config.eval_split:g} are both given: evaluate on a file, or on a "
            "fraction of the training samples"
        )
    if config.eval_steps is not None and config.eval_data_file is None and not config.eval_split:
        problems.append(
            f"eval_steps = {config.eval_steps}: there is nothing to evaluate on; give eval_data_file or eval_split"
        )
    return problems


def _host_contradictions(config: Config) -> list[str]:
    problems = []
    if config.include is not None and config.exclude is not None:
        problems.append("include and exclude are both given: name the hosts to use, or those to leave out")
    for name in ("include", "exclude", "ssh_config", "network_interface"):
        if config.hostfile is None and (value := getattr(config, name)) is not None:
            problems.append(f"{name} = {value}: needs a hostfile; name one, or leave {name} out")
    if config.min_hosts is not None and not config.max_restarts:
        problems.append(f"min_hosts = {config.min_hosts}: has an effect on restarts alone; set max_restarts too")
    if config.min_hosts is not None and config.hostfile is None:
        problems.append(f"min_hosts = {config.min_hosts}: needs a hostfile; name one, or leave min_hosts out")
    if config.max_restarts and config.hostfile is not None and config.launcher == "no_ssh":
        problems.append(
            f"max_restarts = {config.max_restarts} and launcher = no_ssh: nobody is there to paste the lines again; "
            "choose a launcher with ssh, or max_restarts: 0"
        )
    if config.min_hosts is not None and config.launcher == "slurm":
        problems.append(f"min_hosts = {config.min_hosts}: launcher = slurm cannot ask the hosts; leave it out")
    if config.hostfile is not None and config.num_processes is not None:
        problems.append(
            f"num_processes = {config.num_processes} and hostfile are both given: the hostfile's slots set the "
            "number of ranks on each host; leave num_processes out"
        )
    return problems


def check_ranks(config: Config, ranks: int) -> list[str]:
    """Why a run cannot have so many ranks, one message per reason; empty when it can."""
    size = config.sequence_parallel_size
    if ranks % size == 0:
        return []
    sizes = [str(number) for number in range(1, ranks + 1) if ranks % number == 0]
    return [
        f"sequence_parallel_size = {size}: does not divide the run's {ranks} rank{'s' * (ranks > 1)}; set it to "
        f"{' or '.join(sizes)}, or change the number of ranks to a multiple of {size}"
    ]


def _sequence_contradictions(config: Config) -> list[str]:
    size = config.sequence_parallel_size
    if size == 1:
        return []
    problems = check_ranks(config, config.num_processes) if config.num_processes is not None else []
    if config.attention == "flex":
        problems.append(
            f"sequence_parallel_size = {size} and attention = flex: GPUs can share a sequence under sdpa and flash "
            "only; choose one of them, or set sequence_parallel_size to 1"
        )
    given = [name for name in _NOT_IN_PARTS if config.training_args.get(name)]
    if config.training_args.get("average_tokens_across_devices") in (False, "false", "False", 0):
        given.append("average_tokens_across_devices")
    problems += [
        f"sequence_parallel_size = {size} and {name} = {config.training_args[name]}: transformers would compute "
        f"another loss from the parts of a sequence; leave {name} out, or set sequence_parallel_size to 1"
        for name in given
    ]
    return problems


def _size_contradictions(config: Config) -> list[str]:
    problems = []
    heads = config.num_attention_heads
    is_hy3 = config.moe_intermediate_size is not None or config.moe_layer_num_skipped is not None
    if not is_hy3 and config.hidden_size % heads:
        problems.append(f"hidden_size = {config.hidden_size} is not a multiple of num_attention_heads = {heads}")
    key_value_heads = config.num_key_value_heads or heads
    if heads % key_value_heads:
        problems.append(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {key_value_heads}")
    if is_hy3 and config.use_cla:
        problems.append(
            "use_cla belongs to Hunyuan-Large, moe_intermediate_size and moe_layer_num_skipped to Hy3: leave out one"
        )
    if (config.moe_layer_num_skipped or 0) > config.num_layers:
        problems.append(
            f"moe_layer_num_skipped = {config.moe_layer_num_skipped} is above num_layers = {config.num_layers}"
        )
    if config.moe_topk > config.num_experts:
        problems.append(f"moe_topk = {config.moe_topk} is above num_experts = {config.num_experts}")
    return problems
