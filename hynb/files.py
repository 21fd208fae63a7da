"""Files that are replaced atomically: text and JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hynb.errors import RunError


def read_json(path: Path) -> dict[str, Any] | None:
    """A snapshot file's content; None when it is absent.

    Raises:
        RunError: when it is no JSON, which no writer of ours leaves behind.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it, or the whole run folder") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a snapshot file at once: a reader sees the old content or the new."""
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
