"""A base whose weights are pickled `.bin` files, converted once to safetensors so that a merge can read it."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from hynb.errors import MergeError
from hynb.files import INDEX_NAME, read_json, size_text, write_json
from hynb.merge.shards import is_weight_file
from hynb.runs import base_identity


@contextmanager
def as_safetensors(base: Path, output: Path) -> Iterator[Path]:
    """The base itself, or for a base of `.bin` files a converted copy that is removed when the merge has succeeded.

    The files are read one at a time and with `weights_only`, so that no code in a pickle runs. After a failure the
    copy stays, and the next merge uses it again.

    Args:
        output: the copy is made beside this path.

    Raises:
        MergeError: a file contains more than tensors or is truncated, or the disk has too little space.
    """
    pickled = sorted(base.glob("pytorch_model*.bin")) if base.is_dir() else []
    if not pickled or any(base.glob("*.safetensors")):
        yield base
        return
    copy, record = (output.with_name(f".{output.name}.converted{ending}") for ending in ("", ".json"))
    if not (base / "config.json").is_file():
        raise MergeError(f"base_model_path = {base}: has no config.json, so it is not a model folder")
    identity = base_identity(base)
    if read_json(record) != identity or not copy.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        needed_bytes, free_bytes = identity["weight_bytes"], shutil.disk_usage(output.parent).free
        if needed_bytes > free_bytes:
            raise MergeError(
                f"{base}: its .bin files are first converted to safetensors, which needs {size_text(needed_bytes)} "
                f"beside {output}, and the disk has {size_text(free_bytes)} free. Free some space, or choose "
                "another disk"
            )
        copy.mkdir(parents=True)
        _convert(base, pickled, copy)
        write_json(record, identity)
    yield copy
    record.unlink()
    shutil.rmtree(copy)


def _convert(base: Path, pickled: Sequence[Path], copy: Path) -> None:
    is_tied = (read_json(base / "config.json") or {}).get("tie_word_embeddings", False)
    weight_map: dict[str, str] = {}
    for path in pickled:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            # Tensors of a pickle may share memory; those of a safetensors file may not.
            kept = {
                name: tensor.clone().contiguous()
                for name, tensor in tensors.items()
                if not (is_tied and name == "lm_head.weight")
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
