"""What only a GPU can show, in one report of ten minutes: `python benchmarks/gpu.py > report.md`.

Each part runs in a process of its own with a time limit, so that one failure is a line of the report and not its end.
With `--cpu` all parts run at tiny sizes, which shows that they work, and nothing about speed. docs/gpu.md says what
each figure should be near. This file needs only the package hynb and what it depends on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hynb.cluster import peak_flops

if TYPE_CHECKING:
    import torch

    from hynb.hunyuan_large import HunYuanLargeMoE

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "flash_attn", "triton")
PRESETS = (
    "ds_zero2_no_offload",
    "ds_zero2_offload",
    "ds_zero3_no_offload",
    "ds_zero3_optimizer_offload",
    "ds_zero3_param_offload",
    "ds_zero3_offload",
)


@dataclass(kw_only=True, frozen=True)
class Part:
    """A part of the report.

    Args:
        run: prints the part's lines as Markdown.
        limit_seconds: after which its process is ended.
        arguments: passed on to `run`.
    """

    name: str
    title: str
    run: Callable[[Settings], None]
    limit_seconds: float
    arguments: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Settings:
    """What a part needs to know.

    Args:
        cpu: tiny sizes, without a GPU.
        work: a folder with the model and the data of the training runs.
        arguments: of this part.
    """

    cpu: bool
    work: Path
    arguments: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """torch's name of the device."""
        return "cpu" if self.cpu else "cuda"


def device_peak() -> float | None:
    """The device's peak in operations per second for bfloat16 matrix products; None where it is not known."""
    import torch

    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def seconds_of(run: Callable[[], object], settings: Settings, *, rounds: int = 5) -> float:
    """The fastest of some rounds, after one that warms up."""
    import torch

    found = []
    for _ in range(2 if settings.cpu else rounds + 1):
        if not settings.cpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if not settings.cpu:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def share_of(peak: float | None, flops: float, seconds: float) -> str:
    """Operations per second as a share of the device's peak, as a cell of a table."""
    return f"{flops / seconds / peak:.0%}" if peak else "unknown"


def table(*columns: str) -> None:
    """Prints the head of a table."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: object) -> None:
    """Prints a line of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def reason_of(error: BaseException) -> str:
    """An error as one cell of a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text[:200]


def device_and_versions(settings: Settings) -> None:
    """Device, driver, versions, date."""
    import torch

    print(f"- date: {time.strftime('%Y-%m-%d')}")
    if settings.cpu:
        print(f"- device: none; CPU with {torch.get_num_threads()} threads ({platform.machine()})")
    else:
        device = torch.cuda.get_device_properties(0)
        peak = device_peak()
        known = f"{peak / 1e12:g} TFLOPS in bfloat16" if peak else "unknown"
        print(f"- device: {device.name}, {device.total_memory / 2**30:.1f} GiB, peak {known}")
        print(f"- driver: {driver()}; CUDA of torch: {torch.version.cuda}; cuDNN: {torch.backends.cudnn.version()}")
        print(f"- compilers: nvcc {shutil.which('nvcc') or 'not found'}, g++ {shutil.which('g++') or 'not found'}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"- host: {os.cpu_count()} CPU cores, {memory / 2**30:.0f} GiB of memory")
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    print(f"- versions: {', '.join(versions)}")


def driver() -> str:
    """The driver's version as nvidia-smi reports it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({reason_of(error)})"


# Width, intermediate width, number of experts, top-k: one layer of each published model, with as many experts as fit.
EXPERT_SIZES = {"Hunyuan-Large": (6400, 18304, 16, 1), "Hunyuan-A13B": (4096, 3072, 64, 8)}


def experts(settings: Settings) -> None:
    """Routed experts of one layer, forward and backward in bfloat16, beside the products that they consist of."""
    import torch

    from hynb.hunyuan_large import HunYuanLargeConfig, HunYuanLargeMoE

    columns = (
        "grouped_mm",
        "TFLOPS",
        "of the peak",
        "bare products",
        "bare, of the peak",
        "eager loop",
        "dense dispatch",
    )
    table("layer", "tokens", *columns)
    peak = None if settings.cpu else device_peak()
    sizes = {"tiny": (64, 96, 4, 1)} if settings.cpu else EXPERT_SIZES
    for name, (width, inner, count, top_k) in sizes.items():
        if not settings.cpu:
            # Weights and their gradients, of which half of the memory may consist.
            fitting = int(torch.cuda.get_device_properties(0).total_memory / 2 / (3 * width * inner * 2 * 2))
            count = min(count, 1 << max(1, fitting.bit_length() - 1))
        config = HunYuanLargeConfig(
            **{"vocab_size": 64, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 1},
            **{"num_attention_heads": 1, "num_experts": count, "moe_topk": min(top_k, count), "use_cla": False},
            use_mixed_mlp_moe=False,
        )
        with torch.device(settings.device):
            torch.set_default_dtype(torch.bfloat16)
            block = HunYuanLargeMoE(config, 0)
            torch.set_default_dtype(torch.float32)
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        for tokens in (64,) if settings.cpu else (2048, 8192):
            rows = tokens * config.of_layer("moe_topk", 0)
            hidden = torch.randn(1, tokens, width, device=settings.device, dtype=torch.bfloat16, requires_grad=True)

            def routed(kind: str, hidden: torch.Tensor = hidden, block: Any = block) -> None:
                block.experts.config._experts_implementation = "eager" if kind == "dense" else kind
                output = dense_dispatch(block, hidden) if kind == "dense" else block(hidden)
                output.backward(torch.ones_like(output))
                block.zero_grad()

            seconds = {}
            # The dense dispatch computes every expert for every token, and for top-1 only.
            kinds = ["grouped_mm", "eager", *(["dense"] if tokens <= 2048 and rows == tokens else [])]
            for kind in kinds:
                try:
                    seconds[kind] = seconds_of(lambda kind=kind: routed(kind), settings)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    print(f"\n{name}, {tokens} tokens, {kind}: failed: {reason_of(error)}\n", flush=True)
            bare = seconds_of(bare_products(block, rows), settings)
            flops = 3 * 2 * rows * 3 * width * inner
            own = seconds.get("grouped_mm")
            cells: list[str] = ["failed"] * 3
            if own:
                cells = [f"{own * 1e3:.2f} ms", f"{flops / own / 1e12:.1f}", share_of(peak, flops, own)]
            others = (bare, seconds.get("eager"), seconds.get("dense"))
            ratios = [f"{other / own:.2f}×" if other and own else "-" for other in others]
            row(f"{name}, {count} experts", tokens, *cells, ratios[0], share_of(peak, flops, bare), *ratios[1:])
    print("\nColumns with × are multiples of the time of grouped_mm; bare products below 1.00× are faster.")


def dense_dispatch(moe: HunYuanLargeMoE, hidden: torch.Tensor) -> torch.Tensor:
    """One-hot dispatch with capacity = tokens: every expert computes every slot, as in upstream's model code."""
    import torch

    tokens = hidden.reshape(-1, hidden.shape[-1])
    _, weights, chosen = moe.gate(tokens)
    one_hot = torch.nn.functional.one_hot(chosen[:, 0], moe.gate.num_experts)
    slot = (one_hot.cumsum(0) - 1) * one_hot
    # tokens × experts × capacity
    dispatch = torch.nn.functional.one_hot(slot, len(tokens)).to(tokens.dtype) * one_hot[..., None].to(tokens.dtype)
    combine = dispatch * weights[:, 0, None, None].to(tokens.dtype)
    slots = torch.einsum("sec,sm->ecm", dispatch, tokens)
    gate, up = torch.einsum("ecm,efm->ecf", slots, moe.experts.gate_up_proj).chunk(2, -1)
    slots = torch.einsum("ecf,emf->ecm", torch.nn.functional.silu(gate) * up, moe.experts.down_proj)
    routed = torch.einsum("sec,ecm->sm", combine, slots).view_as(hidden)
    return routed if moe.shared_mlp is None else moe.shared_mlp(hidden) + routed


def bare_products(block: HunYuanLargeMoE, rows: int) -> Callable[[], None]:
    """Computes the matrix products of balanced experts: one forward and two backward for each weight.

    With the block's own weights and random rows: a GPU computes with zeros at a higher clock.
    """
    import torch

    ups, downs = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    count, width, inner = downs.shape
    each = rows // count
    tokens, middle, both = (
        torch.randn(count, each, size, device=ups.device, dtype=ups.dtype) for size in (width, inner, 2 * inner)
    )

    def run() -> None:
        for expert in range(count):
            products = (
                (tokens[expert], ups[expert], both[expert]),
                (middle[expert], downs[expert], tokens[expert]),
            )
            for inputs, weight, gradient in products:
                inputs @ weight.T
                gradient @ weight
                gradient.T @ inputs

    return run


PLAIN = "transformers' sdpa"


def attention(settings: Settings) -> None:
    """Attention of one layer, forward and backward in bfloat16: one document, and a pack of documents."""

    heads, kv_heads, size = (4, 2, 16) if settings.cpu else (32, 8, 128)
    lengths = (128,) if settings.cpu else (4096, 16384)
    peak = None if settings.cpu else device_peak()
    table(
        "tokens", "documents", "implementation", "time", "TFLOPS", "of the peak", "extra memory", "largest difference"
    )
    for tokens in lengths:
        for documents in (1, 8):
            # Of different lengths, as packs have them.
            shares = [2 * (number + 1) / (documents * (documents + 1)) for number in range(documents)]
            sizes = [int(tokens * share) for share in shares]
            sizes[-1] += tokens - sum(sizes)
            flops = 3.5 * sum(2 * length * length * heads * size for length in sizes)
            reference = None
            for kind in (PLAIN, *(settings.arguments or ("sdpa", "flash_attention_2"))):
                if kind == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
                    # transformers would look for a substitute on a hub.
                    row(tokens, documents, kind, "the package flash_attn is not installed", "-", "-", "-", "-")
                    continue
                try:
                    seconds, extra, output = attend(kind, sizes, (heads, kv_heads, size), settings)
                except Exception as error:
                    row(tokens, documents, kind, f"failed: {reason_of(error)}", "-", "-", "-", "-")
                    continue
                reference = output if reference is None else reference
                difference = (output.float() - reference.float()).abs().max().item()
                measured = [
                    f"{seconds * 1e3:.2f} ms",
                    f"{flops / seconds / 1e12:.2f}",
                    share_of(peak, flops, seconds),
                ]
                row(tokens, documents, kind, *measured, f"{extra / 1e6:.0f} MB", f"{difference:.1e}")
    print(
        "\nThe operations counted are those of the causal halves. Differences are from the first line of each pack."
    )


def attend(kind: str, sizes: list[int], shape: tuple[int, int, int], settings: Settings) -> tuple[float, int, Any]:
    """Seconds, bytes of GPU memory above the inputs, and the output of one implementation."""
    import torch
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from hynb.hunyuan_large import PACKED_SDPA, HunYuanLargeConfig

    heads, kv_heads, size = shape
    tokens, device = sum(sizes), settings.device
    # hynb's has no mask for a pack.
    name = {PLAIN: "sdpa", "sdpa": PACKED_SDPA}.get(kind, kind)
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.randn(1, count, tokens, size, **options) for count in (heads, kv_heads, kv_heads))
    positions = torch.cat([torch.arange(length) for length in sizes]).to(device)[None]
    config = HunYuanLargeConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=heads * size)
    config._attn_implementation = name
    starts = torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)
    packed = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
    }
    embeds = torch.empty(1, tokens, 8, device=device, dtype=torch.bfloat16)
    mask = create_causal_mask(
        config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=positions
    )
    module = torch.nn.Module()
    module.config, module.is_causal, module.num_key_value_groups = config, True, heads // kv_heads  # type: ignore
    module.train()
    function = ALL_ATTENTION_FUNCTIONS[name]

    def run() -> Any:
        output, _ = function(module, query, key, value, mask, scaling=size**-0.5, position_ids=positions, **packed)
        output.backward(torch.ones_like(output))
        return output.detach()

    output = run()
    extra = 0
    if not settings.cpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        extra = torch.cuda.max_memory_allocated() - before
    return seconds_of(run, settings), extra, output


FAMILIES: dict[str, dict[str, Any]] = {
    "hunyuan": {"num_experts": 8, "moe_topk": 1, "use_cla": True, "use_mixed_mlp_moe": True, "use_qk_norm": True},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "hunyuan_v1_dense": {},
    "hy_v3": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
}


def parity(settings: Settings) -> None:
    """Loss and gradients of each family in bfloat16 beside those in float32 with the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hynb.hunyuan_large  # noqa: F401  registers the model
    from hynb.train import save_loss_memory

    torch.backends.cuda.matmul.allow_tf32 = False
    width, layers, length = (64, 2, 64) if settings.cpu else (1024, 4, 1024)
    sizes = {"vocab_size": 1000, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": width // 8}

    def measure(model_type: str, device: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **(sizes | FAMILIES[model_type]), pad_token_id=0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = model.to(device=device, dtype=dtype).train()
        if dtype == torch.float32:
            # The plain loop, so that grouped_mm is compared with something else.
            model.config._experts_implementation = "eager"
        save_loss_memory(model)
        ids = torch.randint(1, 1000, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return loss.item(), torch.cat([gradient.double().flatten().cpu() for gradient in gradients])

    table("family", "compared", "loss, difference", "gradients, relative difference", "gradients, cosine")
    for model_type in FAMILIES:
        reference = measure(model_type, settings.device, torch.float32)
        compared = {"bfloat16 with float32": (settings.device, torch.bfloat16)}
        if not settings.cpu:
            compared["float32 on the CPU with float32 on the GPU"] = ("cpu", torch.float32)
        for text, (device, dtype) in compared.items():
            loss, gradient = measure(model_type, device, dtype)
            relative = (gradient - reference[1]).norm() / reference[1].norm()
            cosine = torch.nn.functional.cosine_similarity(gradient, reference[1], dim=0)
            difference = f"{reference[0]:.5f}, {abs(loss - reference[0]):.1e}"
            row(model_type, text, difference, f"{relative:.1e}", f"{cosine:.6f}")


def prepare(settings: Settings) -> None:
    """Writes the model and the data of the following parts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hynb.hunyuan_large  # noqa: F401  registers the model
    from hynb.demo import car_samples
    from hynb.demo.pretrain import write_tokenizer
    from hynb.demo.texts import write_jsonl

    folder = settings.work / "model"
    tokenizer = write_tokenizer(folder, vocab_size=700, samples=500)
    sizes = {"hidden_size": 2048, "intermediate_size": 2560, "num_hidden_layers": 6, "vocab_size": 32000}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    if settings.cpu:
        sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 2000}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model("hunyuan", **(sizes | FAMILIES["hunyuan"] | ids | {"tie_word_embeddings": True}))
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    write_jsonl(settings.work / "data.jsonl", car_samples(20 if settings.cpu else 400, 1, seed=0)[0])
    count, size = sum(weight.numel() for weight in model.parameters()), size_of(folder)
    print(f"Hunyuan-Large's layout, {count / 1e6:.3g}M parameters, {size / 1e9:.3g} GB in bfloat16, random weights.")


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    import psutil

    places = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    inside = [(len(place), fstype) for place, fstype in places if folder.resolve().is_relative_to(place)]
    # Of two mounts at one place, the later one hides the other.
    return max(reversed(inside), key=lambda found: found[0], default=(0, "unknown"))[1]


def in_memory_warning(folder: Path) -> str:
    """Why times of files in a folder mean nothing; empty where they do."""
    kind = file_system(folder)
    if kind not in ("tmpfs", "ramfs"):
        return ""
    return (
        f"WARNING: {folder} is in memory ({kind}): nothing is read from a disk, and comparisons with cat and cp mean "
        "nothing. Choose a folder on a disk with --folder."
    )


def size_of(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def drop_page_cache(folder: Path) -> None:
    """Makes the next reader of the files read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Seconds of `cat` over all weight files."""
    drop_page_cache(folder)
    began = time.perf_counter()
    with Path("/dev/null").open("wb") as null:
        subprocess.run(["cat", *map(str, sorted(folder.glob("*.safetensors")))], stdout=null, check=True)
    return time.perf_counter() - began


def files(settings: Settings) -> None:
    """hynb's loading and saving of a full model under ZeRO-3 beside `cat` and `cp`, in turns."""
    from hynb.train import init_process_group, set_up_process

    set_up_process()
    init_process_group(timedelta(minutes=30))
    import torch

    from hynb.config import Config
    from hynb.plan import zero
    from hynb.train import ByteProgress, base_tensors, load_model, load_tokenizer, plan_shards, training_arguments
    from hynb.train.saving import write_model

    folder, saved, copied = (settings.work / name for name in ("model", "saved", "copied"))
    preset = "ds_zero3_no_offload"
    config = Config(model_name_or_path=str(folder), output_dir=str(saved), deepspeed=preset, bf16=True, max_steps=1)
    tokenizer, _ = load_tokenizer(config, folder)
    # Kept alive: ZeRO-3 is enabled only as long as this object exists.
    args = training_arguments(config, zero.for_machine(zero.load(preset), on_cpu=settings.cpu), evaluates=False)
    assert args.hf_deepspeed_config.is_zero3()
    total, model = size_of(folder), None

    def load() -> float:
        nonlocal model
        # The model of the last round makes room.
        model = None
        gc.collect()
        drop_page_cache(folder)
        began = time.perf_counter()
        model = load_model(config, folder, tokenizer)
        return time.perf_counter() - began

    def write() -> float:
        shards = plan_shards(model, base_tensors(folder), [], dtype=torch.bfloat16, has_index=True)
        saved.mkdir()
        began = time.perf_counter()
        write_model(model, shards, saved, shared=True, progress=ByteProgress("saving"))
        return time.perf_counter() - began

    def copy() -> float:
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(folder), str(copied)], check=True)
        return time.perf_counter() - began

    ways = {"load_model": load, "cat": lambda: read_once(folder), "write_model": write, "cp": copy}
    found = in_turns(ways, [("load_model", "cat"), ("write_model", "cp")], [saved, copied])
    table("what", "seconds", "GB/s", "compared with", "in each round")
    for way, other in (("load_model", "cat"), ("write_model", "cp")):
        seconds, ratios = (
            statistics.median(found[way]),
            [a / b for a, b in zip(found[way], found[other], strict=True)],
        )
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        text = f"{statistics.median(ratios):.2f} × {other}"
        row(way, f"{seconds:.2f}", f"{total / seconds / 1e9:.2f}", text, rounds)
    count = len(found["cp"])
    print(
        f"\nMedians of {count} rounds after one that counts for nothing; the page cache is dropped before each read."
    )
    print(f"{in_memory_warning(settings.work) or f'On {file_system(settings.work)}.'}")


def in_turns(
    ways: Mapping[str, Callable[[], float]],
    pairs: list[tuple[str, str]],
    made: list[Path],
    *,
    limit_seconds: float = 75,
) -> dict[str, list[float]]:
    """The seconds of each way in up to 3 rounds after one that counts for nothing, as memory is new in it.

    Args:
        ways: return their seconds.
        pairs: of ways that are compared; which of a pair begins alternates.
        made: folders that a round makes, which are deleted after it.
        limit_seconds: no further round begins that would not end within it; there are two at least.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    began = last = time.monotonic()
    for number in range(4):
        for pair in pairs:
            for name in reversed(pair) if number % 2 else pair:
                found[name].append(ways[name]())
        for path in made:
            shutil.rmtree(path)
        now = time.monotonic()
        if number and now + (now - last) > began + limit_seconds:
            break
        last = now
    return {name: seconds[1:] for name, seconds in found.items()}


@contextlib.contextmanager
def least_host_memory() -> Iterator[list[int]]:
    """The lowest available host memory within it, in bytes, as the only item of a list.

    Pinned memory belongs to no process's resident set, so the whole host is measured.
    """
    import psutil

    found, ended = [psutil.virtual_memory().available], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            found[0] = min(found[0], psutil.virtual_memory().available)

    threading.Thread(target=watch, daemon=True).start()
    yield found
    ended.set()


def training(settings: Settings) -> None:
    """One short run under one preset; planned and measured memory as a line of a table."""
    import psutil

    preset, kind = settings.arguments
    from hynb.config import Config, to_yaml
    from hynb.plan import memory
    from hynb.runs import RunReader

    steps, length = (2, 128) if settings.cpu else (6, 2048)
    output, limits = settings.work / f"{preset}-{kind}", {"max_seq_length": length, "gradient_checkpointing": True}
    config = Config(
        **{"model_name_or_path": str(settings.work / "model"), "train_data_file": str(settings.work / "data.jsonl")},
        **{"output_dir": str(output), "deepspeed": preset, "use_lora": kind == "LoRA", "bf16": True, "packing": True},
        **{"max_steps": steps, "save_strategy": "no", "warmup_ratio": 0.0, "learning_rate": 1e-4, **limits},
        **{"lr_scheduler_type": "constant", "lora_dropout": 0.0},
    )
    run_yaml = settings.work / f"{preset}-{kind}.yaml"
    run_yaml.write_text(to_yaml(config))
    before = psutil.virtual_memory().available
    from hynb.train_entry import main as train

    # Its own lines would stand in the report.
    with least_host_memory() as least, contextlib.redirect_stdout(sys.stderr):
        code = train([str(run_yaml)])
    if code:
        raise RuntimeError(f"the run ended with exit code {code}")
    logs = [event for event in RunReader(output).events() if event["kind"] == "log"]
    losses = [event["loss"] for event in logs]
    assert len(losses) == steps and all(map(math.isfinite, losses)), losses
    workload = memory.Workload(world_size=1, gpus_per_host=1, use_lora=kind == "LoRA", **limits)
    model_config = json.loads((settings.work / "model" / "config.json").read_text())
    plan = memory.estimate(model_config, workload, preset=preset)
    cells = [kind, preset, f"{(plan.gpu_bytes - plan.parts['CUDA']) / 1e9:.2f}", *gpu_memory(plan)]
    cells += [f"{plan.host_bytes / 1e9:.2f}", f"{(before - least[0]) / 1e9:.2f}"]
    # The first step warms up. Packs are not full, so that the tokens are counted.
    seconds, rate = (
        statistics.median(event[name] for event in logs[1:]) for name in ("step_seconds", "tokens_per_second")
    )
    row(*cells, f"{seconds:.3f} s", f"{rate:.0f}", f"{losses[0]:.4f}, {losses[-1]:.4f}")
    shutil.rmtree(output)


def gpu_memory(plan: Any) -> list[str]:
    """GB allocated and reserved at the peak, and reserved as a share of the plan."""
    import torch

    if not torch.cuda.is_available():
        return ["-", "-", "-"]
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    share = reserved / (plan.gpu_bytes - plan.parts["CUDA"])
    return [f"{allocated / 1e9:.2f}", f"{reserved / 1e9:.2f}", f"{share:.2f}"]


TRAINING_COLUMNS = (
    *("run", "preset", "GPU planned, GB", "allocated", "reserved", "reserved / planned"),
    *("host planned, GB", "host measured", "step", "tokens/s", "first, last loss"),
)


def parts(settings: Settings) -> list[Part]:
    """All parts in the order of the report."""
    runs = [(preset, kind) for kind in ("LoRA", "full") for preset in PRESETS]
    if settings.cpu:
        runs = [("ds_zero2_no_offload", "LoRA")]
    return [
        Part(name="device", title="Device and versions", run=device_and_versions, limit_seconds=60),
        Part(name="experts", title="Routed experts", run=experts, limit_seconds=90),
        Part(name="attention", title="Attention", run=attention, limit_seconds=120),
        Part(name="parity", title="bfloat16 and float32", run=parity, limit_seconds=90),
        Part(name="prepare", title="Model of the following parts", run=prepare, limit_seconds=60),
        Part(name="files", title="Loading and saving", run=files, limit_seconds=120),
        # The first run with an optimizer in host memory compiles DeepSpeed's CPUAdam.
        *(
            Part(name="training", title="Training, 1 GPU", run=training, limit_seconds=150, arguments=arguments)
            for arguments in runs
        ),
        # Last, because its compilation may take long.
        Part(
            name="flex",
            title="Flex attention",
            run=attention,
            limit_seconds=120,
            arguments=("flex_attention",),
        ),
    ]


def run_part(part: Part, settings: Settings, limit_seconds: float) -> None:
    """Runs a part in a process of its own; prints what it printed, or why it failed."""
    command = [sys.executable, __file__, "--part", part.name, "--work", str(settings.work), *part.arguments]
    command += ["--cpu"] if settings.cpu else []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if settings.cpu else {}
    text = " ".join((part.name, *part.arguments))
    log = settings.work / f"{text.replace(' ', '-')}.log"
    with log.open("w") as errors:
        # A group of its own, so that a compiler that hangs ends with it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=limit_seconds)
            reason = f"exit code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            printed, _ = process.communicate()
            reason = f"not ended after {limit_seconds:.0f} seconds"
    sys.stdout.write(printed)
    if reason:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].replace("|", "/")[:300] if lines else "no message"
        say(part, f"FAILED, {reason}: {last}")
    sys.stdout.flush()


def say(part: Part, text: str) -> None:
    """Prints why a part has no figures; as a row where its figures are rows of one table of several parts."""
    message = f"{' '.join((part.name, *part.arguments))}: {text}"
    if part.name == "training":
        row(message, *["-"] * (len(TRAINING_COLUMNS) - 1))
    else:
        print(f"\n{message}", flush=True)


def report(settings: Settings, minutes: float, chosen: Mapping[str, bool]) -> None:
    """Prints the report; parts that the time does not suffice for are named."""
    deadline, title = time.monotonic() + minutes * 60, ""
    print("# hynb on a GPU" if not settings.cpu else "# hynb's GPU report, tried on a CPU at tiny sizes")
    for part in parts(settings):
        if not chosen.get(part.name, not chosen):
            continue
        if part.title != title:
            title = part.title
            print(f"\n## {title}\n", flush=True)
            if part.name == "training":
                table(*TRAINING_COLUMNS)
        left = deadline - time.monotonic()
        if left < 5:
            say(part, f"LEFT OUT, {minutes:g} minutes are over (--minutes)")
            continue
        run_part(part, settings, min(part.limit_seconds, left))
    print(f"\n{(time.monotonic() - deadline) / 60 + minutes:.1f} minutes.")


def main() -> None:
    """Prints the report, or in a child process one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="tiny sizes without a GPU; says nothing about speed")
    parser.add_argument("--minutes", type=float, default=10.0, help="parts that begin later are left out")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts: device experts attention …")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="on a disk, for a model of 2 GB (default: %(default)s)",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        settings = Settings(cpu=args.cpu, work=args.work, arguments=tuple(args.arguments))
        next(part for part in parts(settings) if part.name == args.part).run(settings)
        sys.stdout.flush()
        # Without what libraries do at the end: DeepSpeed's threads were seen to abort the interpreter.
        os._exit(0)
    if not args.folder.is_dir() or not os.access(args.folder, os.W_OK):
        parser.error(f"--folder {args.folder}: no folder that can be written to; create it or choose another one")
    if warning := in_memory_warning(args.folder):
        print(warning, file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        report(Settings(cpu=args.cpu, work=Path(name)), args.minutes, dict.fromkeys(args.only, True))


if __name__ == "__main__":
    main()
