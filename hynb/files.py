"""Files of all packages: JSON and text that is replaced atomically, a content's hash, a model's index of shards."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hynb.errors import ModelError, RunError

# The limits of Linux (linux/limits.h), in bytes.
_NAME_BYTES, _PATH_BYTES = 255, 4095
# Which shard of a model folder holds each tensor, as transformers writes it.
INDEX_NAME = "model.safetensors.index.json"


def path_problem(text: str) -> str:
    """Why a text cannot be the path of a file on any machine or for this user; empty when it can."""
    try:
        encoded = os.fsencode(Path(text).expanduser())
    except RuntimeError:
        return f"{Path(text).parts[0]}: there is no such user here; write the path in full"
    except UnicodeEncodeError:
        return "holds characters that no file name can have; choose another name"
    if b"\0" in encoded:
        return "holds a null byte, which no file name can have; choose another name"
    if len(encoded) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in encoded.split(b"/")):
        return f"is too long: a name may have {_NAME_BYTES} bytes and a path {_PATH_BYTES:,}; choose a shorter one"
    return ""


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file.

    Raises:
        RunError: the file cannot be read or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise RunError(f"{path}: is nested too deeply; remove the file or restore it") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove the file or restore it") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: must be a JSON object, not {type(content).__name__}; remove the file or restore it")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as json's `object_pairs_hook`; without it the last of several values of a key would be taken.

    Raises:
        ValueError: a key is given twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated[:80]!r} is given twice in one object; remove one of the two")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file atomically: a reader sees either the old content or the new one."""
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 text file atomically: a reader sees either the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def leave_request(path: Path, text: str) -> None:
    """Leaves a file that asks for something; on a full disk an empty one, which takes no space.

    Raises:
        OSError: it cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        if not is_full(error):
            raise
        path.touch()


def pattern_problem(path: Path) -> str:
    """Why no checkpoint can be loaded from below a folder; empty when it can."""
    # transformers 5 looks for `{path}/global_step*` (integrations/deepspeed.py, deepspeed_load_checkpoint).
    if glob.has_magic(str(path)):
        return (
            f"{path} holds *, ? or [, which is read as a pattern where a checkpoint is loaded; choose another folder"
        )
    return ""


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_there(path: Path) -> bool:
    """Whether a file is there that somebody may create at any time, looked for again and again.

    A network disk may answer a single look with an error (ESTALE, EIO): that look saw nothing.
    """
    try:
        return path.exists()
    except OSError:
        return False


def size_text(size_bytes: float) -> str:
    """A size in bytes with a decimal prefix, such as 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def combined_hash(hashes: Sequence[str]) -> str:
    """One hash of the content of several files: that of the only one, or SHA-256 of their hashes in order."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """The file name of each tensor's shard, from the index of a model folder; None if it has no index.

    Raises:
        ModelError: the index cannot be read, or does not name a file for each tensor.
    """
    path = folder / INDEX_NAME
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(name, str) and _is_file_name(name) for name in weight_map.values()):
            raise ValueError("its weight_map must name a file of this folder for each tensor")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: is not a valid index ({error}). Download or copy the file again") from None
    return weight_map


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and not path_problem(name)
