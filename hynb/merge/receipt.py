"""The receipt in a merged folder: what was merged into what, by which a merge that exists already is recognised."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hynb.files import read_json, write_json
from hynb.merge.adapter import open_adapter
from hynb.runs import base_identity, same_base

RECEIPT = "merge_receipt.json"
_VERSION = 1


def write_receipt(
    folder: Path,
    *,
    base: dict[str, Any],
    adapters: Sequence[dict[str, Any]],
    save_dtype: str,
    result: dict[str, Any],
) -> None:
    """Writes the receipt of a merge.

    Args:
        folder: the merged model's.
        base, adapters: identities of what was merged.
        result: what the merge wrote.
    """
    inputs = {"v": _VERSION, "base": base, "adapters": list(adapters), "save_dtype": save_dtype}
    versions = {name: metadata.version(name) for name in ("hynb", "torch")}
    write_json(folder / RECEIPT, inputs | result | {"versions": versions, "made_at": time.time()})


def find_merge(
    *, base_model_path: str | Path, adapter_model_path: str | Path, output_path: str | Path, save_dtype: str
) -> dict[str, Any] | None:
    """The receipt of a folder that already has the merge of a base and one adapter; None if it has not.

    Raises:
        MergeError: the adapter folder is not one.
        ModelError: the adapter's weight file is truncated or corrupt.
    """
    receipt = read_json(Path(output_path).expanduser() / RECEIPT)
    base = Path(base_model_path).expanduser().absolute()
    if receipt is None or receipt.get("save_dtype") != save_dtype or not (base / "config.json").is_file():
        return None
    adapter = open_adapter(Path(adapter_model_path).expanduser().absolute(), 1.0)
    is_same = same_base(receipt["base"], base_identity(base))
    return receipt if is_same and receipt["adapters"] == [adapter.identity()] else None
