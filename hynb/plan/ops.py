"""DeepSpeed's ops in C++ and CUDA: which of them a DeepSpeed config makes it compile, and what that needs on a host.

DeepSpeed compiles an op at its first use (deepspeed/ops/op_builder, version 0.19.8), with ninja, the C++ compiler and
Python's headers; ops that contain CUDA code need nvcc too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hynb.plan.zero import PRESETS, stage_of

# Optimizers that DeepSpeed has of its own: the op on the host, if the optimizer is offloaded, and the one on a GPU
# (deepspeed/runtime/engine.py, `_configure_basic_optimizer`).
_OPTIMIZERS = {
    "adam": ("cpu_adam", "fused_adam"),
    "adamw": ("cpu_adam", "fused_adam"),
    "adagrad": ("cpu_adagrad", None),
    "lamb": ("fused_lamb", "fused_lamb"),
    "lion": ("cpu_lion", "fused_lion"),
}
_CUDA_OPS = ("fused_adam", "fused_lamb", "fused_lion", "async_io")


@dataclass(kw_only=True, frozen=True)
class Tool:
    """Something that compiling needs.

    Args:
        name: key in the facts of a host (`host_facts.build_tools`).
        package: Debian's package that contains it.
    """

    name: str
    title: str
    package: str


_TOOLS = {
    tool.name: tool
    for tool in (
        Tool(name="compiler", title="C++ compiler (c++)", package="g++"),
        Tool(name="ninja", title="ninja", package="ninja-build"),
        Tool(name="python", title="headers of Python (Python.h)", package="python3-dev"),
        Tool(name="cuda", title="CUDA toolkit (nvcc)", package="nvidia-cuda-toolkit"),
        Tool(name="libaio", title="headers of libaio (libaio.h)", package="libaio-dev"),
    )
}


def compiled_ops(ds_config: Mapping[str, Any], *, on_cpu: bool) -> dict[str, str]:
    """The ops that DeepSpeed compiles under a config, with the setting that is the reason, in the order of loading.

    Args:
        ds_config: as `zero.for_machine` returns it.
        on_cpu: the ranks compute on a CPU.
    """
    section = ds_config.get("zero_optimization")
    section = section if isinstance(section, dict) else {}
    devices = {name: _device(section.get(name)) for name in ("offload_optimizer", "offload_param")}
    found: dict[str, str] = {}
    if os.environ.get("DS_PIN_MEMORY_BACKEND", "").strip().lower() == "native":
        found["pin_memory"] = "DS_PIN_MEMORY_BACKEND = native"
    for name, device in devices.items():
        if device == "nvme":
            reason = f"zero_optimization.{name}.device = nvme"
            found |= {"pin_memory": reason, "async_io": reason}
    offloaded = devices["offload_optimizer"] in ("cpu", "nvme")
    optimizer = ds_config.get("optimizer")
    if isinstance(optimizer, dict):
        on_host, on_gpu = _OPTIMIZERS.get(str(optimizer.get("type", "")).lower(), (None, None))
        op = on_host if offloaded else on_gpu
        parameters = optimizer.get("params")
        torch_adam = isinstance(parameters, dict) and parameters.get("torch_adam")
        if op and not torch_adam:
            found[op] = f"optimizer.type = {optimizer['type']}" + (", offloaded" if offloaded else "")
    elif offloaded and ds_config.get("zero_force_ds_cpu_optimizer", True):
        # accelerate replaces PyTorch's AdamW (accelerate/accelerator.py, `_prepare_deepspeed`).
        found["cpu_adam"] = f"zero_optimization.offload_optimizer.device = {devices['offload_optimizer']}"
    return {op: reason for op, reason in found.items() if op not in _compiled_at_installation(on_cpu=on_cpu)}


def missing_tools(ops: Sequence[str], present: Mapping[str, bool], *, on_cpu: bool) -> list[Tool]:
    """What a host lacks to compile these ops.

    Args:
        ops: names of ops.
        present: what `host_facts.build_tools` found there.
    """
    needed = ["compiler", "ninja", "python"] if ops else []
    if not on_cpu and any(op in _CUDA_OPS for op in ops):
        needed.append("cuda")
    if "async_io" in ops:
        needed.append("libaio")
    return [_TOOLS[name] for name in needed if not present.get(name)]


def compile_problem(
    ds_config: Mapping[str, Any], present: Mapping[str, bool], *, on_cpu: bool, host: str = "this machine"
) -> tuple[str, str]:
    """What keeps a host from compiling the ops of a config, and the command that fixes it; empty if nothing does.

    Args:
        present: what `host_facts.build_tools` found there.
    """
    ops = compiled_ops(ds_config, on_cpu=on_cpu)
    missing = missing_tools(list(ops), present, on_cpu=on_cpu)
    if not missing:
        return "", ""
    reasons = ", ".join(f"{op} ({reason})" for op, reason in ops.items())
    problem = f"DeepSpeed compiles {reasons}, and {host} has no {' and no '.join(tool.title for tool in missing)}"
    return problem, f"apt-get install {' '.join(tool.package for tool in missing)}"


def without_ops(ds_config: Mapping[str, Any]) -> list[str]:
    """The presets of the same stage for which nothing is compiled; of any stage if the config has another one."""
    free = [preset for preset in PRESETS.values() if not preset.offload_optimizer]
    return [preset.name for preset in free if preset.stage == stage_of(dict(ds_config))] or [
        item.name for item in free
    ]


def _device(section: Any) -> str:
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def _compiled_at_installation(*, on_cpu: bool) -> set[str]:
    """The ops that were compiled when DeepSpeed was installed (DS_BUILD_OPS), read from its files."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return set()
    try:
        text = Path(spec.origin).with_name("git_version_info_installed.py").read_text(encoding="utf-8")
    except OSError:
        return set()
    accelerator = re.search(r"^accelerator_name='(\w+)'", text, re.MULTILINE)
    if accelerator is None or accelerator[1] != ("cpu" if on_cpu else "cuda"):
        return set()
    installed = re.search(r"^installed_ops=\{(.*)\}", text, re.MULTILINE)
    return set(re.findall(r"'(\w+)': True", installed[1])) if installed else set()


def with_own_programs(path: str) -> str:
    """A PATH that contains the programs of this environment too, such as pip's ninja."""
    own = str(Path(sys.executable).parent)
    return path if own in path.split(os.pathsep) else os.pathsep.join([path, own] if path else [own])
