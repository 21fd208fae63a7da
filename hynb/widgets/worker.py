"""Runs one heavy task of a notebook in a process of its own: `python -m hynb.widgets.worker TASK '{"argument": …}'`.

The notebook's kernel stays without torch. The process reports in JSON lines on its standard output: any number of
`progress` and `piece`, then one `result`, or `problems` for a user's mistake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from hynb import errors
from hynb.errors import HynbError
from hynb.widgets.tasks import TASKS, Piece, Progress

_SHOWN_LINES = 15
# How long a process that has reported its result may take to end.
_END_SECONDS = 5.0


def work(
    task: str,
    on_progress: Callable[[Progress], None] | None = None,
    on_piece: Callable[[Piece], None] | None = None,
    **arguments: Any,
) -> Any:
    """Runs a task in a fresh process and returns its result.

    Args:
        task: name of a function in `hynb.widgets.tasks.TASKS`.
        on_progress: called with each report of the task's progress.
        on_piece: called with each piece of an answer that the task's model writes.
        arguments: of the function; plain values.

    Returns:
        what the function returns, as JSON values: a dataclass as a dict, an iterator as a list.

    Raises:
        HynbError: the mistake of the user that the task found, in its own class.
        RuntimeError: the task failed otherwise; the message ends with its output.
    """
    command = [sys.executable, "-m", "hynb.widgets.worker", task, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, stdin=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message and on_progress is not None:
                    on_progress(Progress(**message["progress"]))
                if "piece" in message and on_piece is not None:
                    on_piece(Piece(**message["piece"]))
                if "problems" in message:
                    raise getattr(errors, message["error"], HynbError)(message["problems"])
                if "result" in message:
                    return message["result"]
            process.wait()
            output.seek(0)
            lines = output.read().splitlines()[-_SHOWN_LINES:]
            raise RuntimeError("\n".join([f"{task} failed with exit code {process.returncode}:", *lines]))
        finally:
            # After an interrupt nobody waits for the task.
            interrupted = sys.exc_info()[0] is KeyboardInterrupt
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0 if interrupted else _END_SECONDS)
            process.kill()
            process.wait()
            process.stdout.close()


def main(task: str, arguments: str) -> int:
    """Runs one task in this process; whatever a library prints goes to the standard error stream."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(key: str, content: Any, **more: Any) -> None:
        print(json.dumps({key: content} | more, default=str), file=reports, flush=True)

    def report(item: Progress | Piece) -> None:
        send("piece" if isinstance(item, Piece) else "progress", dataclasses.asdict(item))

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = TASKS[task](report, **json.loads(arguments))
        send("result", _plain(result))
    except HynbError as error:
        send("problems", error.problems, error=type(error).__name__)
        return error.exit_code
    return 0


def _plain(result: Any) -> Any:
    if isinstance(result, list):
        return [_plain(item) for item in result]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.asdict(result)
    return result


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
