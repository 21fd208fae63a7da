"""Every parameter once: name, type, default, bounds, help; form, flags, YAML and tables are generated from it."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hynb.config.parameter import Parameter
from hynb.plan import zero

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
]
SCHEDULERS_WITH_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _parameter(
    default: Any,
    group: str,
    help_text: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> Any:
    metadata = {
        "group": group,
        "help": help_text,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "unit": unit,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


GROUPS = {
    "model": "Model",
    "data": "Data",
    "lora": "LoRA",
    "zero": "ZeRO and memory",
    "schedule": "Schedule",
    "run": "Run folder",
    "launch": "Machines",
    "model_size": "Size of a random model",
}


@dataclass(kw_only=True)
class Config:
    """All parameters of one training run; None means automatic.

    Args:
        training_args: further TrainingArguments of transformers, by name.
        given: names of the parameters that the user set, as opposed to defaults.
    """

    model_name_or_path: str | None = _parameter(
        None,
        "model",
        "Folder of the base model. Without it, and without resuming, a random model of the sizes below is trained.",
    )
    tokenizer_name_or_path: str | None = _parameter(
        None, "model", "Folder of the tokenizer; automatic: the model's folder."
    )
    trust_remote_code: bool = _parameter(
        False, "model", "Run Python files of the model folder. Hunyuan models need none."
    )
    use_flash_attn: bool = _parameter(
        False, "model", "Use Flash Attention 2 if the package flash_attn is installed; otherwise PyTorch's sdpa."
    )
    attention: Literal["auto", "sdpa", "flash", "flex"] = _parameter(
        "auto",
        "model",
        "Attention kernels: PyTorch's sdpa, Flash Attention 2, or PyTorch's flex attention. auto: as use_flash_attn. "
        "What is missing is replaced by sdpa.",
    )

    train_data_file: str | None = _parameter(
        None,
        "data",
        'JSONL, one conversation per line: {"messages": [{"role": …, "content": …}]}, or a JSON array of them '
        "(.json); ShareGPT and Alpaca too. Several files separated by commas, globs, .gz and .zst.",
    )
    eval_data_file: str | None = _parameter(
        None, "data", "Files to evaluate on during training, in the same formats; automatic: none."
    )
    eval_split: float = _parameter(
        0.0, "data", "Fraction of the training samples that is held out for evaluation.", minimum=0, maximum=0.5
    )
    eval_steps: int | None = _parameter(
        None,
        "data",
        "Steps between evaluations; automatic: save_steps. Needs eval_data_file or eval_split.",
        minimum=1,
        unit="steps",
    )
    on_bad_sample: Literal["stop", "skip"] = _parameter(
        "stop",
        "data",
        "How to treat invalid lines. stop: refuse to train; skip: leave them out and list them in rejected.jsonl.",
    )
    train_on_prompt: bool = _parameter(False, "data", "Train on system and user messages too, not only on answers.")
    allow_special_tokens_in_text: bool = _parameter(
        False,
        "data",
        "Turn text that spells a special token (<|eos|>) into the token, as in upstream's script; off: it stays "
        "text.",
    )
    train_on_turns: Literal["as_rendered", "all", "last"] = _parameter(
        "as_rendered",
        "data",
        "Answers that are trained on: all as the template renders them, all in full, or the last; as upstream: "
        "as_rendered. Templates of reasoning models leave out the thoughts of earlier answers.",
    )
    split_turns: bool = _parameter(
        False, "data", "Make one sample per answer, with the conversation before it, so that each thought is trained."
    )
    allow_ignored_fields: bool = _parameter(
        False,
        "data",
        "Go on where the chat template does not render a field of a record, such as tools; off: refuse.",
    )
    max_cut_share: float = _parameter(
        0.05,
        "data",
        "Largest share of samples left out because nothing of their answers is within max_seq_length; above it the "
        "run does not start.",
        minimum=0,
        maximum=1,
    )
    packing: bool = _parameter(
        False,
        "data",
        "Pack whole conversations into sequences of max_seq_length, each attending only to itself: little padding.",
    )
    split_long_samples: bool = _parameter(
        False,
        "data",
        "Split a sample longer than max_seq_length into parts that are all trained on, instead of truncating it. "
        "Needs packing; a part does not attend to the one before.",
    )
    group_by_length: bool = _parameter(
        False, "data", "Batch samples of similar length: less padding, slightly less random sampling order."
    )
    dataloader_num_workers: int | None = _parameter(
        None,
        "data",
        "Processes of each rank that read batches ahead; automatic: by the CPU cores per rank, and by whether "
        "samples still have to be tokenised.",
        minimum=0,
        maximum=64,
    )
    max_seq_length: int = _parameter(
        2048, "data", "Longer samples are truncated to this length.", minimum=8, maximum=1 << 20, unit="tokens"
    )
    sequence_parallel_size: int = _parameter(
        1,
        "data",
        "GPUs that share each sequence (Ulysses), for sequences too long for one GPU. It must divide the number of "
        "GPUs and the number of the model's attention heads.",
        minimum=1,
    )
    model_max_length: int | None = _parameter(
        None,
        "data",
        "The tokenizer's maximum input length; automatic: its own value.",
        minimum=8,
        unit="tokens",
    )

    use_lora: bool = _parameter(False, "lora", "Train a LoRA adapter; off: full fine-tuning.")
    lora_rank: int = _parameter(64, "lora", "Rank of the adapter.", minimum=1, maximum=4096)
    lora_alpha: float = _parameter(128, "lora", "Scale of the adapter: alpha / rank.", above=0)
    lora_dropout: float = _parameter(0.05, "lora", "Dropout on the adapter's input.", minimum=0, maximum=0.95)
    lora_target_modules: list[str] = _parameter(
        list(LORA_TARGETS), "lora", "Modules that get an adapter, by the last part of their name."
    )

    lora_on_experts: bool = _parameter(
        False,
        "lora",
        "Train adapters on the weights of all routed experts too (PEFT's target_parameters). Takes far more memory; "
        "needs lora_dropout 0.",
    )

    deepspeed: str = _parameter(
        "ds_zero2_no_offload",
        "zero",
        f"ZeRO preset, or a DeepSpeed JSON file. Presets by decreasing GPU memory: {', '.join(zero.PRESETS)}.",
    )
    gradient_checkpointing: bool = _parameter(
        False, "zero", "Recompute activations in the backward pass: less memory, about a third more time."
    )
    make_moe_param_leaf_module: bool = _parameter(
        False,
        "zero",
        "Gather a whole MoE block at once under ZeRO-3: fewer, larger transfers, far more GPU memory.",
    )
    train_attention_params_only: bool = _parameter(
        False, "zero", "Train only the self_attn parameters and freeze the rest."
    )
    bf16: bool = _parameter(False, "zero", "Train in bfloat16 (GPUs from A100 on; CPUs too).")
    fp16: bool = _parameter(False, "zero", "Train in float16 with loss scaling (older GPUs).")

    learning_rate: float = _parameter(1e-5, "schedule", "Peak learning rate.", above=0, maximum=10)
    min_lr: float | None = _parameter(
        None,
        "schedule",
        "Final learning rate, absolute; automatic: a tenth of learning_rate. Used by cosine_with_min_lr.",
        minimum=0,
    )
    lr_scheduler_type: Scheduler = _parameter("cosine_with_min_lr", "schedule", "Learning rate schedule.")
    warmup_ratio: float = _parameter(
        0.01, "schedule", "Fraction of the steps in which the learning rate rises.", minimum=0, maximum=0.99
    )
    max_steps: int | None = _parameter(
        None, "schedule", "Optimizer steps; automatic: from num_train_epochs.", minimum=1, unit="steps"
    )
    num_train_epochs: float = _parameter(
        1.0, "schedule", "Passes over the data, if max_steps is automatic.", above=0, unit="epochs"
    )
    per_device_train_batch_size: int = _parameter(
        1,
        "schedule",
        "Micro-batch size: samples that a GPU processes at once, or that GPUs with sequence_parallel_size share.",
        minimum=1,
        unit="samples",
    )
    gradient_accumulation_steps: int = _parameter(
        1,
        "schedule",
        "Micro-batches accumulated before each optimizer step. Global batch = micro-batch × this × GPUs / "
        "sequence_parallel_size.",
        minimum=1,
    )
    weight_decay: float = _parameter(0.0, "schedule", "AdamW's weight decay.", minimum=0, maximum=1)
    max_grad_norm: float = _parameter(1.0, "schedule", "Gradients are clipped to this norm.", above=0)
    router_aux_loss_coef: float = _parameter(
        0.0,
        "schedule",
        "Weight of the loss that balances tokens over each layer's experts; 0: none, as in upstream's script.",
        minimum=0,
        maximum=10,
    )
    seed: int = _parameter(
        42, "schedule", "Seed of sampling order, dropout and new weights.", minimum=0, maximum=2**32 - 1
    )

    output_dir: str = _parameter("runs/train", "run", "Run folder: logs, TensorBoard events, checkpoints.")
    group_readable: bool = _parameter(
        False,
        "run",
        "Let the group enter output_dir (mode 0750); a new one is for its owner alone, as logs show data. Its files "
        "get the mode that umask gives them: with 077 the group can list them but not read them.",
    )
    overwrite_output_dir: bool = _parameter(
        False, "run", "Remove an earlier run's files from output_dir before starting."
    )
    resume_from_checkpoint: str | None = _parameter(
        None, "run", "Checkpoint folder to resume from; 'last': the newest whole one in output_dir."
    )
    allow_changed: list[str] = _parameter(
        [], "run", "Parameters that may differ from those of the run that is resumed; data: other training data."
    )
    trust_checkpoint: bool = _parameter(
        False, "run", "Resume from a checkpoint without digests that match its files; unpickling it runs code in it."
    )
    on_nan: Literal["stop", "skip"] = _parameter(
        "stop",
        "run",
        "What to do where a loss or gradient is NaN or infinite. stop: end the run, naming the samples and the "
        "module; skip: leave the step out on all ranks, and stop after ten in a row.",
    )
    on_spike: Literal["mark", "stop"] = _parameter(
        "mark",
        "run",
        "What to do where a logged loss is far above the median of those before it. mark: record it and show it in "
        "the chart; stop: end the run.",
    )
    on_full_disk: Literal["stop", "keep_training"] = _parameter(
        "stop",
        "run",
        "What to do where a checkpoint does not fit on the disk. stop: end the run; keep_training: leave it out, say "
        "so, and try again at the next save; the last one waits for space.",
    )
    logging_steps: int = _parameter(1, "run", "Steps between log lines in events.jsonl.", minimum=1, unit="steps")
    save_strategy: Literal["steps", "epoch", "no"] = _parameter("steps", "run", "When to save a checkpoint.")
    save_steps: int = _parameter(500, "run", "Steps between checkpoints.", minimum=1, unit="steps")
    save_total_limit: int | None = _parameter(
        None, "run", "How many of the newest checkpoints to keep; automatic: all.", minimum=1
    )
    async_save: bool = _parameter(
        False,
        "run",
        "Train on while a checkpoint's states are written from a copy in host memory (at most half of what is free).",
    )
    save_safetensors: bool = _parameter(
        True, "run", "Accepted for upstream's scripts; weights are always written as safetensors."
    )
    do_train: bool = _parameter(True, "run", "Accepted for upstream's scripts; a run always trains.")

    num_processes: int | None = _parameter(
        None, "launch", "Ranks on this machine; automatic: one per GPU, or one on a CPU.", minimum=1
    )
    hostfile: str | None = _parameter(
        None, "launch", "File with the hosts and slots of a run; automatic: this machine only."
    )
    include: str | None = _parameter(
        None, "launch", "Use only these hosts and slots of the hostfile: worker-0@worker-1:0,2; automatic: all."
    )
    exclude: str | None = _parameter(
        None, "launch", "Leave out these hosts and slots of the hostfile; automatic: none. Written as in include."
    )
    launcher: Literal["pdsh", "openmpi", "mpich", "slurm", "no_ssh"] = _parameter(
        "pdsh",
        "launch",
        "How ranks start on the other hosts; no_ssh: you paste a command on each.",
    )
    network_interface: str | None = _parameter(
        None,
        "launch",
        "Network interface of NCCL and gloo between the hosts. Automatic: on each host, the one that reaches the "
        "launching host.",
    )
    ssh_config: str | None = _parameter(
        None,
        "launch",
        "OpenSSH configuration file for the hosts. Automatic: ssh_config in the hostfile's folder, or your own.",
    )
    start_timeout_seconds: int = _parameter(
        300,
        "launch",
        "Time for all hosts and ranks to connect. If one has not connected by then, the run ends.",
        minimum=5,
        maximum=86400,
        unit="seconds",
    )
    silence_timeout_seconds: int = _parameter(
        10,
        "launch",
        "Silence of a host after which the run ends. The same holds for a rank that is stopped by a signal.",
        minimum=2,
        maximum=86400,
        unit="seconds",
    )
    reconnect_attempts: int | None = _parameter(
        None,
        "launch",
        "How often a host whose connection to the launching host broke tries to connect again. Automatic: until "
        "silence_timeout_seconds are over. 0: a broken connection ends the run.",
        minimum=0,
        maximum=100000,
    )
    reconnect_seconds: int = _parameter(
        1,
        "launch",
        "Pause between two attempts to connect again.",
        minimum=1,
        maximum=3600,
        unit="seconds",
    )
    max_restarts: int = _parameter(
        0,
        "launch",
        "How often a run that crashed starts again by itself, from its newest checkpoint; not after a mistake of the "
        "user's, nor twice at the same step for the same cause.",
        minimum=0,
        maximum=1000,
    )
    min_hosts: int | None = _parameter(
        None,
        "launch",
        "Fewest hosts of the hostfile with which a restart goes on when others no longer answer. Automatic: all of "
        "them.",
        minimum=1,
        maximum=100000,
    )
    collective_timeout_minutes: float = _parameter(
        60.0,
        "launch",
        "How long a rank waits for the others in a collective operation. A dead or stopped rank is noticed within "
        "seconds whatever this is; it ends ranks that would wait for each other without end.",
        minimum=0.01,
        unit="minutes",
    )
    save_timeout_minutes: float | None = _parameter(
        None,
        "launch",
        "The same while a checkpoint is written. Automatic: its size at 100 MB/s, and no less than "
        "collective_timeout_minutes.",
        minimum=0.01,
        unit="minutes",
    )
    master_port: int | None = _parameter(
        None,
        "launch",
        "Port of the ranks' rendezvous; automatic: a free port.",
        minimum=1024,
        maximum=65535,
    )

    vocab_size: int | None = _parameter(
        None, "model_size", "Size of the vocabulary; automatic: the tokenizer's.", minimum=8, unit="tokens"
    )
    hidden_size: int = _parameter(2048, "model_size", "Hidden size of the model.", minimum=8)
    intermediate_size: int = _parameter(
        8192,
        "model_size",
        "Intermediate size of an expert; of a dense layer if moe_intermediate_size is given.",
        minimum=8,
    )
    moe_intermediate_size: int | None = _parameter(
        None,
        "model_size",
        "Intermediate size of an expert of a Hy3 model (hy_v3). Automatic: the model is a Hunyuan-Large, unless "
        "moe_layer_num_skipped is given.",
        minimum=8,
    )
    moe_layer_num_skipped: int | None = _parameter(
        None,
        "model_size",
        "First layers of a Hy3 model (hy_v3) that are dense; automatic: 1 if moe_intermediate_size is given.",
        minimum=0,
    )
    num_layers: int = _parameter(24, "model_size", "Decoder layers.", minimum=1)
    num_attention_heads: int = _parameter(16, "model_size", "Query heads per layer.", minimum=1)
    num_key_value_heads: int | None = _parameter(
        None, "model_size", "Key and value heads per layer; automatic: as many as query heads.", minimum=1
    )
    num_experts: int = _parameter(1, "model_size", "Experts per layer; 1: a dense MLP.", minimum=1)
    moe_topk: int = _parameter(1, "model_size", "Experts that each token is routed to.", minimum=1)
    use_cla: bool = _parameter(False, "model_size", "Cross-layer attention: neighbouring layers share K and V.")
    cla_share_factor: int = _parameter(2, "model_size", "Layers that share one K and V.", minimum=1)
    use_mixed_mlp_moe: bool = _parameter(False, "model_size", "A shared MLP beside the experts.")
    num_shared_expert: int = _parameter(1, "model_size", "Width of the shared MLP, in experts.", minimum=1)
    use_qk_norm: bool = _parameter(False, "model_size", "RMSNorm on each head's query and key.")
    tie_word_embeddings: bool = _parameter(False, "model_size", "Output layer and token embedding share one matrix.")

    training_args: dict[str, Any] = field(default_factory=dict)

    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def values(self) -> dict[str, Any]:
        """All parameters by name, in the order of the schema, without `training_args`."""
        return {parameter.name: getattr(self, parameter.name) for parameter in parameters()}

    def deepspeed_values(self) -> dict[str, Any]:
        """What a DeepSpeed config may set too, by its path there; it has to be the same or "auto"."""
        return {
            "fp16.enabled": self.fp16,
            "bf16.enabled": self.bf16,
            "train_micro_batch_size_per_gpu": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "gradient_clipping": self.max_grad_norm,
            "optimizer.params.lr": self.learning_rate,
            "optimizer.params.weight_decay": self.weight_decay,
        }

    def replace(self, **changes: Any) -> Config:
        """A copy with some parameters changed; these then count as given by the user."""
        return dataclasses.replace(self, **changes, given=self.given | changes.keys())


def parameters() -> tuple[Parameter, ...]:
    """Every parameter in the order of the schema."""
    return _PARAMETERS


def parameter(name: str) -> Parameter:
    """The parameter of a name.

    Raises:
        KeyError: there is no parameter of this name.
    """
    return _BY_NAME[name]


def _describe(name: str, annotation: Any, definition: dataclasses.Field) -> Parameter:
    optional, choices = False, ()
    if isinstance(annotation, types.UnionType):
        optional = True
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Literal:
        choices, annotation = typing.get_args(annotation), str
    if typing.get_origin(annotation) is list:
        annotation = list
    default = definition.default
    if definition.default_factory is not dataclasses.MISSING:
        default = definition.default_factory()
    return Parameter(
        name=name,
        type=annotation,
        optional=optional,
        default=default,
        choices=choices,
        **definition.metadata,
    )


_HINTS = typing.get_type_hints(Config)
# Fields without metadata (training_args, given) are not parameters.
_PARAMETERS = tuple(
    _describe(item.name, _HINTS[item.name], item) for item in fields(Config) if "group" in item.metadata
)
_BY_NAME = {item.name: item for item in _PARAMETERS}
MODEL_SIZE_NAMES = tuple(item.name for item in _PARAMETERS if item.group == "model_size")
