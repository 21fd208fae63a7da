"""Files of conversations: every line read by its place, converted or refused by name; no tokenizer, no torch."""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hynb.errors import DataError

ROLES = ("system", "user", "assistant")
FORMATS = '{"messages": [{"role": …, "content": …}, …]}, ShareGPT\'s conversations, or Alpaca\'s instruction/output'
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
Paths = str | Path | Sequence[str | Path]


@dataclass(kw_only=True, frozen=True)
class Conversation:
    """One sample: its messages, and where it stands as file:line."""

    messages: list[dict[str, Any]]
    source: str


def find_files(paths: Paths, parameter: str = "train_data_file") -> list[Path]:
    """The files that one path, several, or several in one text with commas between them name; globs too.

    Args:
        parameter: what gave the paths, named in messages.

    Raises:
        DataError: all that name no file.
    """
    files: list[Path] = []
    problems = []
    for item in _one_by_one(paths):
        text = str(item).strip()
        if Path(text).is_file():
            found = [text]
        elif glob.has_magic(text):
            found = sorted(name for name in _glob(text) if Path(name).is_file())
            if not found:
                problems.append(f"{parameter} = {text}: no file fits this pattern")
        elif Path(text).is_dir():
            problems.append(f"{parameter} = {text}: is a folder; name its files, or write {text}/*.jsonl")
            continue
        else:
            problems.append(f"{parameter} = {text}: there is no such file")
            continue
        # The same file by two patterns is one file.
        files += [Path(name) for name in found if Path(name) not in files]
    if problems or not files:
        raise DataError(problems or f"{parameter}: names no file")
    return files


def absolute_patterns(paths: str) -> str:
    """The same files in one text, each by a path that means the same in any folder; globs stay globs."""
    return ",".join(str(Path(str(item).strip()).expanduser().absolute()) for item in _one_by_one(paths))


def _one_by_one(paths: Paths) -> Sequence[str | Path]:
    if not isinstance(paths, (str, Path)):
        return paths
    # A comma may be part of a name.
    return [paths] if isinstance(paths, Path) or Path(paths).is_file() else str(paths).split(",")


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob refuses absolute patterns


def read_conversations(paths: Paths) -> Iterator[Conversation]:
    """The conversations of JSONL files in order; blank lines are passed over.

    Args:
        paths: a file, several, or a glob; `.gz` and `.zst` are unpacked while they are read.

    Raises:
        DataError: at the first line that is none, with file:line and what is wrong.
    """
    for path in find_files(paths):
        for source, line in lines(path):
            yield parse_line(line, source)


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place (file:line) and bytes of every line that is not blank."""
    with open_data(path) as file:
        for number, line in enumerate(file, 1):
            line = without_mark(line, number)
            if line.strip():
                yield f"{path}:{number}", line


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where its name ends in .gz or .zst.

    Raises:
        DataError: it cannot be read or unpacked.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(path.open("rb"))
            if path.suffix == ".gz":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif path.suffix == ".zst":
                file = stack.enter_context(_zstd_reader(path, file))
            yield file
    except OSError as error:
        # gzip's own errors are OSErrors without an errno.
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except EOFError:
        raise DataError(f"{path}: breaks off: the compressed file is not whole") from None
    except Exception as error:
        if type(error).__name__ not in ("ZstdError", "error"):
            raise
        raise DataError(f"{path}: cannot be unpacked: {error}") from None


def _zstd_reader(path: Path, file: IO[bytes]) -> Any:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise DataError(
            f"{path}: .zst needs the package zstandard (pip install zstandard), or unpack the file"
        ) from None
    import io

    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.BufferedReader(reader, _BLOCK_BYTES)


def plain_file(path: Path) -> Path:
    """A file that can be read by offsets: the path itself, or its unpacked copy in the cache, made once."""
    if path.suffix not in (".gz", ".zst"):
        return path
    target = cache_folder() / f"{file_hash(path)}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_data(path) as packed, tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as copy:
            try:
                while block := packed.read(_BLOCK_BYTES):
                    copy.write(block)
            except BaseException:
                Path(copy.name).unlink()
                raise
        Path(copy.name).replace(target)
    return target


def cache_folder() -> Path:
    """Where unpacked files and results of checks are kept: `hynb` under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hynb"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hash(paths: Paths) -> str:
    """SHA-256 of a file's bytes; of several files, that of their hashes in order."""
    hashes = [file_hash(path) for path in find_files(paths)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def without_mark(line: bytes, number: int) -> bytes:
    """A line without the byte order mark that a first line may begin with."""
    return line.removeprefix(_BOM) if number == 1 else line


def parse_line(line: bytes, source: str) -> Conversation:
    """One line as a conversation, converted where it is ShareGPT's or Alpaca's.

    Raises:
        DataError: with the line's place, what is wrong and an excerpt.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is no UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}:{error.colno}: no valid JSON: {error.msg}; the line begins {excerpt(line)}"
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{source}: no readable JSON: {error or 'nested too deeply'}") from None
    messages = _messages(record, source)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{source}: must be {FORMATS}; the line begins {excerpt(line)}")
    for number, message in enumerate(messages, 1):
        if problem := _message_problem(message, messages[number - 2] if number > 1 else None):
            raise DataError(f"{source}: message {number}: {problem}")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{source}: the last message is the {messages[-1]['role']}'s: there is no answer to learn")
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise DataError(f'{source}: every answer has "train": false: there is nothing to learn')
    return Conversation(messages=messages, source=source)


def excerpt(line: bytes) -> str:
    """The beginning of a line, for a message."""
    return repr(line[:60].decode("utf-8", errors="replace").strip())


def _messages(record: Any, source: str) -> Any:
    if not isinstance(record, dict):
        return None
    if "messages" in record:
        return record["messages"]
    if isinstance(record.get("conversations"), list):
        return _from_sharegpt(record, source)
    if "instruction" in record and "output" in record:
        return _from_alpaca(record, source)
    return None


def _from_sharegpt(record: dict[str, Any], source: str) -> list[dict[str, Any]]:
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for number, turn in enumerate(record["conversations"], 1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(f'{source}: conversations, turn {number}: must be {{"from": …, "value": …}}')
        name = turn["from"]
        if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
            raise DataError(
                f"{source}: conversations, turn {number}: from {short(name)} is unknown; there are "
                f"{', '.join(_SHAREGPT_ROLES)}"
            )
        message = {"role": _SHAREGPT_ROLES[name], "content": turn["value"]}
        messages.append(message | ({"train": turn["train"]} if "train" in turn else {}))
    return messages


def _from_alpaca(record: dict[str, Any], source: str) -> list[dict[str, Any]]:
    question = record["instruction"]
    for key in ("instruction", "input", "output", "system"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise DataError(f"{source}: {key} must be text, not {type(record[key]).__name__}")
    if record.get("input"):
        question = f"{question}\n{record['input']}"
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise DataError(f"{source}: history must be a list of [question, answer]")
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def short(value: Any) -> str:
    """A value as a message shows it, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "…"


def _message_problem(message: Any, before: dict[str, Any] | None) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return 'must be {"role": …, "content": …}'
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"role {short(role)} is unknown; there are {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"the content of the {role} must be text, not {type(content).__name__}"
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return f"the content of the {role} holds half of a surrogate pair; write the character itself"
    if not isinstance(message.get("train", True), bool):
        return f"train must be true or false, not {short(message['train'])}"
    if role == "system":
        return "" if before is None else "the system's message must be the first"
    if before is None:
        return "" if role == "user" else "the first message is the assistant's; the user's comes before it"
    if role == "assistant" and before["role"] != "user":
        return f"the assistant's message follows the {before['role']}'s; the user's must come before it"
    if role == "user" and before["role"] == "user":
        return "two messages of the user's follow each other"
    if role == "assistant" and not content.strip():
        return "the assistant's answer is empty"
    return ""


def split_share(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to evaluate on: a share of all, chosen by the seed, each in the file's order.

    Args:
        share: between 0 and 1; at least one sample goes to either side.

    Raises:
        DataError: fewer than two samples, or a share outside of its range.
    """
    if not 0 < share < 1:
        raise DataError(f"eval_split = {share}: must lie between 0 and 1")
    if count < 2:
        raise DataError(f"eval_split = {share}: {count} sample cannot be divided; give eval_data_file")
    import random

    held = sorted(random.Random(seed).sample(range(count), min(count - 1, max(1, round(count * share)))))
    chosen = bytearray(count)
    for index in held:
        chosen[index] = 1
    return list(itertools.compress(range(count), (not flag for flag in chosen))), held
