"""Reads the JSON records in a run folder, and refuses those whose fields have wrong types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from hynb.errors import RunError
from hynb.files import read_json

State = Literal["absent", "starting", "running", "stopping", "finished", "stopped", "failed"]
# What is wrong with a value, behind "must be"; empty when nothing is.
_Check = Callable[[Any], str]
_LARGEST_NUMBER = 1 << 63
_LAUNCH_ID = re.compile("[0-9a-f]{32}")


def is_launch_id(value: object) -> bool:
    """Whether a value can be the id of a launch; no process of another one ever carries it."""
    return isinstance(value, str) and _LAUNCH_ID.fullmatch(value) is not None


def _is_a(words: str, *types: type) -> _Check:
    def checked(value: Any) -> str:
        # A bool is an int in Python, and not a number in a record.
        if not isinstance(value, types) or isinstance(value, bool):
            return words
        # What is computed with it are floats.
        return f"{words} below 2^63" if isinstance(value, int) and abs(value) >= _LARGEST_NUMBER else ""

    return checked


def _or_null(check: _Check) -> _Check:
    def checked(value: Any) -> str:
        problem = "" if value is None else check(value)
        return problem and f"{problem} or null"

    return checked


def _object(fields: Mapping[str, _Check], needed: tuple[str, ...]) -> _Check:
    def checked(value: Any) -> str:
        if not isinstance(value, dict):
            return "an object"
        if missing := [name for name in needed if name not in value]:
            return f"an object with {', '.join(missing)}"
        wrong = [
            f"{name}: {text}" for name, check in fields.items() if name in value and (text := check(value[name]))
        ]
        return f"an object with {wrong[0]}" if wrong else ""

    return checked


def _objects(fields: Mapping[str, _Check]) -> _Check:
    one = _object(fields, tuple(fields))

    def checked(value: Any) -> str:
        if not isinstance(value, list):
            return "a list"
        wrong = [text for item in value if (text := one(item))]
        return f"a list, each item {wrong[0]}" if wrong else ""

    return checked


def _pairs(value: Any) -> str:
    is_good = isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in value
    )
    return "" if is_good else "a list of pairs of a host's name and its number of ranks"


def _pid(value: Any) -> str:
    # psutil raises other errors than NoSuchProcess for numbers that no pid can have.
    is_pid = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
    return "" if is_pid else "a process id"


def _is_a_bool(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


_TEXT, _NUMBER = _is_a("a string", str), _is_a("a number", int, float)
_COUNT = _is_a("an integer", int)
_PROCESS_FIELDS = {"host": _TEXT, "pid": _pid, "boot_id": _TEXT, "start_ticks": _COUNT, "create_time": _NUMBER}


def _process(value: Any) -> str:
    # Earlier versions recorded the time of its start by the clock.
    start = ("create_time",) if isinstance(value, dict) and "create_time" in value else ("boot_id", "start_ticks")
    return _object(_PROCESS_FIELDS, ("host", "pid", *start))(value)


def _launch_id(value: Any) -> str:
    return "" if is_launch_id(value) else "the id of a launch: 32 hexadecimal digits"


_MEMBERSHIP = _object({"start_seconds": _NUMBER, "hosts": _pairs, "run_folder": _TEXT}, ())
_HOSTS = _objects({"name": _TEXT, "state": _TEXT})


def _state(value: Any) -> str:
    return "" if value in get_args(State) else f"one of {', '.join(get_args(State))}"


def _files(value: Any) -> str:
    if not isinstance(value, dict):
        return "an object"
    one = _object({"bytes": _COUNT, "sha256": _TEXT}, ("bytes", "sha256"))
    wrong = [f"{name}: {text}" for name, entry in value.items() if (text := one(entry))]
    # A path that leaves the folder is none of a checkpoint's.
    wrong += [
        f"{name}: a path inside the folder" for name in value if name.startswith("/") or ".." in name.split("/")
    ]
    return f"an object with {wrong[0]}" if wrong else ""


_END = {"state": _state, "exit_code": _or_null(_COUNT), "reason": _TEXT, "host": _or_null(_TEXT)}
_END["rank"] = _or_null(_COUNT)
# By file name; fields that are not listed are not looked at.
_FIELDS: dict[str, Mapping[str, _Check]] = {
    "status.json": _END
    | {"phase": _or_null(_TEXT), "global_step": _or_null(_COUNT), "max_steps": _or_null(_COUNT)}
    | {"updated_at": _or_null(_NUMBER), "process": _process, "skipped_steps": _COUNT, "terminated": _is_a_bool},
    "exit.json": _END | {"id": _TEXT, "terminated": _is_a_bool},
    "launch.json": {"id": _launch_id, "process": _process, "started_at": _NUMBER, "membership": _MEMBERSHIP}
    | {"ssh": _or_null(_TEXT), "restarts_left": _COUNT},
    "hosts.json": {"hosts": _HOSTS, "output_dir": _TEXT},
    "manifest.json": {"world_size": _COUNT},
    "hynb_checkpoint.json": {"world_size": _COUNT, "zero_stage": _COUNT, "use_lora": _is_a_bool}
    | {"sequence_parallel_size": _COUNT, "global_batch_size": _COUNT, "global_step": _COUNT, "files": _files}
    | {"saved_at": _NUMBER, "loss": _or_null(_NUMBER), "made_with": _is_a("an object", dict)},
    "base_identity.json": {"path": _TEXT, "hash": _TEXT, "weight_bytes": _COUNT, "values": _TEXT},
}


def _ranks(value: Any) -> str:
    return "" if isinstance(value, list) and not any(map(_COUNT, value)) else "a list of integers"


_FAILURE = {"rank": _COUNT, "host": _TEXT, "time": _NUMBER, "reason": _TEXT}
_NEEDED = {
    "status.json": ("state",),
    "exit.json": ("state",),
    "launch.json": ("id", "process"),
    "hosts.json": ("hosts",),
    "base_identity.json": ("path", "hash"),
}


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file of a run folder; None if there is no such file.

    Raises:
        RunError: the file cannot be read, has no JSON object, or a field is missing or has the wrong type.
    """
    return _checked(path, _FIELDS[path.name], _NEEDED.get(path.name, ()))


def read_failure(path: Path) -> dict[str, Any] | None:
    """The record of a failed rank; None if there is no such file.

    Raises:
        RunError: as `read_record`.
    """
    return _checked(path, _FAILURE | {"late": _ranks}, tuple(_FAILURE))


def _checked(path: Path, fields: Mapping[str, _Check], needed: tuple[str, ...]) -> dict[str, Any] | None:
    record = read_json(path)
    if record is None:
        return None
    problems = [f"has no {name}" for name in needed if name not in record]
    problems += [
        f"{name} = {record[name]!r:.200}: must be {text}"
        for name, check in fields.items()
        if name in record and (text := check(record[name]))
    ]
    if problems:
        raise RunError([f"{path}: {problem}; the file is damaged: remove it or restore it" for problem in problems])
    return record
