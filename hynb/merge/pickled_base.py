"""A base whose weights are pickled `.bin` files, written once as safetensors for a merge to read."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from hynb.errors import MergeError
from hynb.files import read_json, write_json
from hynb.merge.shards import INDEX_NAME, is_weight_file
from hynb.runs import base_identity


@contextmanager
def as_safetensors(base: Path, beside: Path) -> Iterator[Path]:
    """The base itself, or where it holds `.bin` files a converted copy that is removed at the end.

    Weights are read with `weights_only`, so that no code in a pickle runs, one file at a time.

    Args:
        beside: where the copy goes; one that an earlier, broken-off merge finished is used again.

    Raises:
        MergeError: a file that holds more than tensors, or is cut off, by name.
    """
    pickled = sorted(base.glob("pytorch_model*.bin")) if base.is_dir() else []
    if not pickled or any(base.glob("*.safetensors")):
        yield base
        return
    copy, record = (beside.with_name(f".{beside.name}.converted{ending}") for ending in ("", ".json"))
    identity = base_identity(base) if (base / "config.json").is_file() else None
    if identity is None:
        raise MergeError(f"base_model_path = {base}: has no config.json, so it is no model folder")
    if read_json(record) != identity or not copy.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        needed, free = identity["weight_bytes"], shutil.disk_usage(beside.parent).free
        if needed > free:
            raise MergeError(
                f"{base}: its .bin files are first written as safetensors, which takes {needed / 1e9:.3g} GB beside "
                f"{beside}, and the disk has {free / 1e9:.3g} GB free"
            )
        copy.mkdir(parents=True)
        _convert(base, pickled, copy)
        write_json(record, identity)
    yield copy
    record.unlink()
    shutil.rmtree(copy)


def _convert(base: Path, pickled: list[Path], copy: Path) -> None:
    tied = (read_json(base / "config.json") or {}).get("tie_word_embeddings", False)
    weight_map: dict[str, str] = {}
    for path in pickled:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            # Each on its own: a pickle lets tensors share memory, safetensors doesn't.
            kept = {
                name: tensor.clone().contiguous()
                for name, tensor in tensors.items()
                if not (tied and name == "lm_head.weight")
            }
        except (pickle.UnpicklingError, RuntimeError, AttributeError, ValueError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise MergeError(f"{path}: cannot be read as plain tensors ({reason}). Download the file again") from None
        name = f"{path.stem.replace('pytorch_model', 'model')}.safetensors"
        save_file(kept, copy / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, name)
    if len(pickled) > 1:
        write_json(copy / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    for item in base.iterdir():
        if item.is_file() and not is_weight_file(item.name):
            shutil.copyfile(item, copy / item.name)
