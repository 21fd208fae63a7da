"""What a run will do, shown before it starts: DeepSpeed's configuration, and the commands that start the same run."""

from __future__ import annotations

import json
import shlex
from typing import Any

from hynb.cluster import gpu_count, this_machine
from hynb.config import Config, absolute_paths, parameters, value_text
from hynb.plan import ops, zero
from hynb.runs import RunReader, check_run, planned_slots, with_derived_limits, workload
from hynb.supervision import command_text
from hynb.widgets.markup import Shown, block, element


def deepspeed_plan(config: Config) -> Shown:
    """DeepSpeed's configuration as the run uses it, and the command that starts the same run from a terminal.

    Raises:
        ConfigError: everything that would keep the run from starting, at once.
    """
    config = absolute_paths(config)
    if RunReader(config.output_dir).status().state == "absent":
        check_run(config)
    on_cpu = not gpu_count()
    ds_config, notes = zero.used(config.deepspeed, config.deepspeed_values(), on_cpu=on_cpu)
    gpus = this_machine().gpus
    work = workload(config, planned_slots(config, len(gpus)))
    gpu_bytes = min((gpu.memory_bytes for gpu in gpus), default=None)
    ds_config, note = with_derived_limits(config, ds_config, work, gpu_bytes)
    notes += [note] if note else []
    compiled = [f"{op}: {reason}" for op, reason in ops.compiled_ops(ds_config, on_cpu=on_cpu).items()]
    parts = {
        'DeepSpeed\'s configuration ("auto" is filled in from the other parameters when the run starts)': json.dumps(
            ds_config, indent=2
        ),
        **({"What the run changes, and why": "\n".join(notes)} if notes else {}),
        **({"What DeepSpeed compiles first, once on each host": "\n".join(compiled)} if compiled else {}),
        "The same run from a terminal": terminal_command(config),
        "The command that starts the ranks": command_text(config),
    }
    text = "\n\n".join(f"# {title}\n{content}" for title, content in parts.items())
    return Shown(text, "".join(element("b", title) + block(content) for title, content in parts.items()))


def terminal_command(config: Config) -> str:
    """The `hynb launch` command with every parameter that differs from its default."""
    changed: dict[str, Any] = {
        item.name: getattr(config, item.name) for item in parameters() if getattr(config, item.name) != item.default
    }
    changed |= config.training_args
    # A float is written with all of its digits, so that the run is the same.
    texts = {name: repr(value) if isinstance(value, float) else value_text(value) for name, value in changed.items()}
    settings = [f"--set {shlex.quote(f'{name}={text}')}" for name, text in texts.items()]
    return " \\\n  ".join(["hynb launch", *settings])
