"""Merges LoRA adapters into a base model, shard by shard: the function behind `hynb merge`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hynb.errors import HynbError, MergeError
from hynb.files import INDEX_NAME, read_json, size_text, write_json
from hynb.merge import shards
from hynb.merge.pickled_base import as_safetensors
from hynb.merge.plan import MergePlan, plan_merge
from hynb.merge.receipt import write_receipt
from hynb.merge.shard_writer import MergeProgress, ShardWriter, TensorChange, largest_and_mean
from hynb.merge.shards import SAVE_DTYPES
from hynb.merge.tensors import TORCH_DTYPES

_STATE = "merge_state.json"


@dataclass(kw_only=True)
class MergeResult:
    """What a merge wrote; its receipt records the same.

    Args:
        weight_bytes: size of the output's weights.
        largest_change, mean_change: over the absolute differences of the elements of all changed tensors.
        resumed_shards: shards that an interrupted merge had already written.
        linked_shards: shards that were hard-linked.
        mtp_tensors: tensors of MTP layers, which no adapter changes; they are among the copied ones.
        changes: of each changed tensor, by name.
    """

    output_path: str
    tensors_changed: int
    tensors_copied: int
    weight_bytes: int
    largest_change: float
    mean_change: float
    seconds: float
    resumed_shards: int = 0
    linked_shards: int = 0
    mtp_tensors: int = 0
    changes: dict[str, TensorChange] = field(default_factory=dict)


def merge_lora(
    *,
    base_model_path: str | Path,
    adapter_model_path: str | Path | Sequence[str | Path],
    output_path: str | Path,
    save_dtype: str = "keep",
    adapter_weights: Sequence[float] | None = None,
    overwrite: bool = False,
    link: bool = False,
    progress: Callable[[MergeProgress], None] | None = None,
) -> MergeResult:
    """Writes a model folder that is equal to the base with its adapters merged in.

    The bytes of unchanged tensors are copied by the kernel. Changed tensors are computed in float32, one at a time,
    and rounded once (LoRA: arXiv 2106.09685, DoRA: arXiv 2402.09353, rsLoRA: arXiv 2312.03732).

    Args:
        adapter_model_path: one adapter folder, or several that are merged one after the other.
        output_path: a new folder, which appears when it is complete. An interrupted merge is continued.
        save_dtype: keep (each tensor's own dtype), bf16, fp16 or fp32; router weights in float32 are kept in it.
        adapter_weights: a factor for each adapter; 1 by default.
        overwrite: replace an existing output folder.
        link: hard-link shards that no adapter touches instead of copying them.
        progress: called from several threads, one at a time.

    Raises:
        MergeError: everything that does not fit together, by name, before a byte is written; or the output folder
            cannot be written.
        ModelError: the base folder is incomplete or corrupt.
    """
    started = time.monotonic()
    single = isinstance(adapter_model_path, (str, Path))
    adapters = [Path(item).expanduser() for item in ([adapter_model_path] if single else adapter_model_path)]
    base, output = Path(base_model_path).expanduser().absolute(), Path(output_path).expanduser().absolute()
    _check_request(base, adapters, output, save_dtype, overwrite=overwrite)
    with as_safetensors(base, output) as source:
        plan = plan_merge(source, adapters, adapter_weights, converted_from=base)
        partial = output.with_name(f".{output.name}.partial")
        _prepare_partial(partial, {"plan": plan.fingerprint, "save_dtype": save_dtype, "link": link})
        writer = ShardWriter(plan, partial, save_dtype=save_dtype, link=link, progress=progress)
        _check_space(output, partial, writer.missing_bytes())
        try:
            writer.write()
        except OSError as error:
            raise MergeError(
                f"{output}: cannot be written: {error}. The base is unchanged; running the merge again continues it"
            ) from error
        _write_other_files(plan, partial, writer, save_dtype)
        result = _result(plan, writer, output, time.monotonic() - started)
        write_receipt(
            partial,
            base=plan.base_identity,
            adapters=plan.adapter_identities,
            save_dtype=save_dtype,
            result=asdict(result),
        )
        _remove_records(partial)
        _move_into_place(partial, output)
    return result


def _check_request(base: Path, adapters: Sequence[Path], output: Path, save_dtype: str, *, overwrite: bool) -> None:
    if save_dtype not in SAVE_DTYPES:
        raise MergeError(f"save_dtype = {save_dtype}: must be one of {', '.join(SAVE_DTYPES)}")
    if output.exists() and not overwrite:
        raise MergeError(
            f"output_path = {output}: already exists; choose another path, or replace the folder with --overwrite"
        )
    if output in (base, *(item.absolute() for item in adapters)) or output in base.parents:
        raise MergeError(f"output_path = {output}: would replace the base or an adapter; choose another path")


def _prepare_partial(partial: Path, state: dict[str, Any]) -> None:
    """Makes the folder to write into, or keeps the one that an interrupted merge of the same inputs left."""
    try:
        same = read_json(partial / _STATE) == state
    except HynbError:
        same = False
    if same:
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise MergeError(f"{partial.parent}: cannot be written: {error.strerror}") from None
    write_json(partial / _STATE, state)


def _check_space(output: Path, partial: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(output.parent).free
    if needed_bytes <= free_bytes:
        return
    if not any(partial.glob("*.safetensors")):
        shutil.rmtree(partial)
    raise MergeError(
        f"output_path = {output}: the merged model needs {size_text(needed_bytes)} and the disk has "
        f"{size_text(free_bytes)} free. Free some space, or choose another disk"
    )


def _write_other_files(plan: MergePlan, partial: Path, writer: ShardWriter, save_dtype: str) -> None:
    """Writes the index, copies every other file of the base, and adjusts config.json to what was written."""
    for item in plan.base.iterdir():
        if item.is_dir() and not item.name.startswith("."):
            shutil.copytree(item, partial / item.name, dirs_exist_ok=True)
        elif item.is_file() and not shards.is_weight_file(item.name):
            shutil.copyfile(item, partial / item.name)
    if weight_map := writer.weight_map():
        index = {"metadata": {"total_size": writer.total_bytes}, "weight_map": weight_map}
        write_json(partial / INDEX_NAME, index)
    model_config = read_json(plan.base / "config.json") or {}
    changes: dict[str, Any] = {"tie_word_embeddings": False} if plan.untied else {}
    if dtype := SAVE_DTYPES[save_dtype]:
        # transformers 5 writes dtype, older releases torch_dtype; some configs have both.
        keys = [key for key in ("dtype", "torch_dtype") if key in model_config] or ["torch_dtype"]
        changes |= dict.fromkeys(keys, str(TORCH_DTYPES[dtype]).removeprefix("torch."))
    if changes:
        write_json(partial / "config.json", model_config | changes)


def _result(plan: MergePlan, writer: ShardWriter, output: Path, seconds: float) -> MergeResult:
    largest, mean = largest_and_mean(writer.changes)
    return MergeResult(
        output_path=str(output),
        tensors_changed=len(writer.changes),
        tensors_copied=len(writer.dtypes) - len(writer.changes),
        weight_bytes=writer.total_bytes,
        largest_change=largest,
        mean_change=mean,
        seconds=round(seconds, 3),
        resumed_shards=writer.resumed_shards,
        linked_shards=writer.linked_shards,
        mtp_tensors=plan.mtp_tensors,
        changes=dict(sorted(writer.changes.items())),
    )


def _remove_records(partial: Path) -> None:
    """Removes the files that an interrupted merge continues from."""
    # The state first: without it a merge that is interrupted from here on starts again instead of losing records.
    for record in [partial / _STATE, *partial.glob("*.changes.json")]:
        record.unlink()


def _move_into_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    partial.rename(output)
    shutil.rmtree(old)
