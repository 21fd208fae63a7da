"""One heavy act of a notebook in a process of its own: `python -m hynb.widgets.worker ACT '{"argument": …}'`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hynb import errors
from hynb.errors import HynbError, MergeError
from hynb.files import read_json

_SHOWN_LINES = 15
_REPORT_SECONDS = 0.25
Emit = Callable[[dict[str, Any]], None]


def work(act: str, on_progress: Callable[[dict[str, Any]], None] | None = None, **arguments: Any) -> Any:
    """Runs an act in a fresh process, so that the caller's never holds torch, and returns its result.

    Args:
        act: `preview`, `check_data`, `ask`, `merge` or `verify`.
        on_progress: takes each report while the act goes on.
        arguments: plain values for the act's function.

    Raises:
        HynbError: the user's mistake that the act found, of the same class.
        RuntimeError: the act broke off; the message ends with its output.
    """
    command = [sys.executable, "-m", "hynb.widgets.worker", act, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL, text=True)
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message and on_progress is not None:
                    on_progress(message["progress"])
                if "problems" in message:
                    raise getattr(errors, message["error"], HynbError)(message["problems"])
                if "result" in message:
                    return message["result"]
            process.wait()
            said.seek(0)
            lines = said.read().splitlines()[-_SHOWN_LINES:]
            raise RuntimeError("\n".join([f"{act} broke off with exit code {process.returncode}:", *lines]))
        finally:
            # After a result nothing is left to do; after an interrupt nobody waits for one.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0 if sys.exc_info()[0] is KeyboardInterrupt else 5)
            process.kill()
            process.wait()
            process.stdout.close()


def _preview(emit: Emit, config: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    from hynb.config import Config
    from hynb.data import IGNORED, ChatDataset, as_html, as_text, encode
    from hynb.errors import DataError
    from hynb.runs import find_base
    from hynb.train import label_options, load_tokenizer

    made = Config(**config)
    tokenizer, _ = load_tokenizer(made, find_base(made))
    options = label_options(made)
    dataset = ChatDataset(made.train_data_file, tokenizer, made.max_seq_length, options=options)
    shown = 0
    for index in range(len(dataset)):
        try:
            conversation = dataset.conversation(index)
        except DataError:
            if made.on_bad_sample == "stop":
                raise
            continue
        encoded = encode(conversation, tokenizer, made.max_seq_length, options)
        arguments = (conversation, tokenizer, made.max_seq_length)
        yield {
            "source": conversation.source,
            "text": as_text(*arguments, options=options),
            "html": as_html(*arguments, options=options),
            "tokens": len(encoded["input_ids"]),
            "trained_tokens": sum(label != IGNORED for label in encoded["labels"]),
        }
        shown += 1
        if shown == count:
            return


def _check_data(emit: Emit, config: dict[str, Any]) -> list[dict[str, Any]]:
    from hynb.config import Config
    from hynb.runs import find_base
    from hynb.train import check_files, load_tokenizer

    made = Config(**config)
    tokenizer, _ = load_tokenizer(made, find_base(made))
    found = []
    given = [name for name in ("train_data_file", "eval_data_file") if getattr(made, name) is not None]
    reported = [0.0]
    for number, parameter in enumerate(given):

        def report(done: int, total: int, number: int = number, parameter: str = parameter) -> None:
            if done == total or time.monotonic() - reported[0] > _REPORT_SECONDS:
                reported[0] = time.monotonic()
                text = f"{parameter}, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB"
                emit({"done": number + done / total, "total": len(given), "text": text})

        checked = check_files(made, tokenizer, parameter, on_bad_sample="report", progress=report)
        batch_size = made.per_device_train_batch_size
        allowed = made.allow_special_tokens_in_text
        text = checked.text(batch_size=batch_size, special_tokens_allowed=allowed)
        if made.split_long_samples and checked.cut_samples:
            text += "\nsplit_long_samples: longer samples are divided instead, and nothing is cut"
        found.append({"text": text, "problems": checked.problems(), "samples": checked.samples})
    return found


def _ask(emit: Emit, folders: list[str], questions: str, count: int, max_new_tokens: int) -> Iterator[dict[str, Any]]:
    from hynb.data import read_conversations
    from hynb.generate import answers, split_answer

    read = itertools.islice(read_conversations(questions), count)
    asked = [split_answer(conversation.messages) for conversation in read]
    given = []
    for folder in folders:
        emit({"folder": folder})
        given.append(list(answers(folder, [item for item, _ in asked], max_new_tokens=max_new_tokens)))
    for index, (messages, expected) in enumerate(asked):
        replies = [texts[index] for texts in given]
        yield {"question": messages[-1]["content"], "expected": expected, "answers": replies}


def _merge(
    emit: Emit, base_model_path: str, adapter_model_path: str, output_path: str, save_dtype: str, overwrite: bool
) -> dict[str, Any]:
    from hynb.merge import RECEIPT, MergeProgress, merge_lora, plan_merge

    made = read_json(Path(output_path) / RECEIPT)
    if made is not None:
        plan = plan_merge(Path(base_model_path), [Path(adapter_model_path)])
        same = made["base"]["hash"] == plan.base_identity["hash"] and made["save_dtype"] == save_dtype
        if same and made["adapters"] == plan.adapter_identities:
            return made | {"found": True}
    if Path(output_path).exists() and not overwrite:
        raise MergeError(
            f"output_path = {output_path}: is there already and holds something else than this merge; "
            "choose another, or replace it with overwrite_output_path"
        )
    arguments = {"base_model_path": base_model_path, "adapter_model_path": adapter_model_path}
    arguments |= {"output_path": output_path, "save_dtype": save_dtype, "overwrite": overwrite}
    reported = [0.0]

    def report(progress: MergeProgress) -> None:
        done = progress.done_bytes == progress.total_bytes
        if done or progress.seconds - reported[0] > _REPORT_SECONDS:
            reported[0] = progress.seconds
            emit({"done": progress.done_bytes, "total": progress.total_bytes, "text": progress.shard})

    return dataclasses.asdict(merge_lora(**arguments, progress=report)) | {"found": False}


def _verify(emit: Emit, output_path: str) -> int:
    from hynb.merge import verify_merge

    reported = [0.0]

    def report(done: int, total: int) -> None:
        if done == total or time.monotonic() - reported[0] > _REPORT_SECONDS:
            reported[0] = time.monotonic()
            emit({"done": done, "total": total, "text": f"tensor {done} of {total}"})

    return verify_merge(output_path, progress=report)


_ACTS = {"preview": _preview, "check_data": _check_data, "ask": _ask, "merge": _merge, "verify": _verify}


def main(act: str, arguments: str) -> int:
    """Runs one act and reports in JSON lines; whatever a library prints goes to the error stream."""
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(key: str, content: Any, **more: Any) -> None:
        print(json.dumps({key: content} | more, default=str), file=reports, flush=True)

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        result = _ACTS[act](lambda report: send("progress", report), **json.loads(arguments))
        send("result", list(result) if isinstance(result, Iterator) else result)
    except HynbError as error:
        send("problems", error.problems, error=type(error).__name__)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
