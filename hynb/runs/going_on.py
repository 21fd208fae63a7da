"""How a run that has failed goes on: the command, and from which checkpoint."""

from __future__ import annotations

import shlex

from hynb.runs.folder import RunDir


def how_to_go_on(run_dir: RunDir) -> str:
    """The command that goes on with a run from its newest checkpoint, or starts it again where there is none."""
    if not run_dir.config.is_file():
        return f"{run_dir.path} was removed while the run was live: nothing is kept of it. Start the run as before"
    kept = run_dir.checkpoints()
    command = f"hynb launch --config {shlex.quote(str(run_dir.config))} --set"
    if kept:
        return f"To go on from {kept[-1].name}: {command} resume_from_checkpoint=last"
    return f"There is no checkpoint; to start again: {command} overwrite_output_dir=true"
