"""Which tensors of weight files a parameter of the model consists of, one behind the other.

transformers fuses the experts of a layer when it loads a model, and names some parameters differently from the files
(transformers 5.23, conversion_mapping.py). Every one of these changes is a concatenation in memory order: a stack of
experts, and of gate and up projection within each expert. So a range of a flattened parameter is a list of ranges of
stored tensors, and a rank that holds such a range can read or write it without the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(kw_only=True, frozen=True)
class Part:
    """A stored tensor, or a range of one, as a range of a flattened parameter.

    Args:
        stored: name of the stored tensor.
        begin, end: of the range in the flattened stored tensor, in elements.
        at: where the range begins in the flattened parameter, in elements.
    """

    stored: str
    begin: int
    end: int
    at: int


def stored_parts(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], conversions: Sequence[Any] | None = None
) -> dict[str, list[Part]] | None:
    """The stored tensors of each entry of a model's state_dict, in memory order; what the model lacks is left out.

    Args:
        shapes: of all stored tensors, by name.
        conversions: transformers' mapping between stored and loaded names; None for the model's own.

    Returns:
        None if a conversion does more than to stack or to concatenate.
    """
    if conversions is None:
        conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model) or []
    assert conversions is not None
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known: dict[str, Any] = dict.fromkeys(model.state_dict(), True)
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    plain: dict[str, str] = {}
    fused: dict[str, dict[str, list[str]]] = {}
    for stored in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(
            stored, renamings, converters, base_model_prefix=model.base_model_prefix, meta_state_dict=known
        )
        if name not in known:
            continue
        if pattern is None:
            plain[name] = stored
        else:
            fused.setdefault(name, {}).setdefault(pattern, []).append(stored)
    found = {name: list(_whole([stored], shapes)) for name, stored in plain.items()}
    for name, by_pattern in fused.items():
        converter = converter_of[next(iter(by_pattern))]
        ordered = _memory_order(converter, by_pattern)
        if ordered is None:
            return None
        found[name] = list(_whole(ordered, shapes))
    return found


def range_of(parts: Iterable[Part], begin: int, end: int) -> Iterator[Part]:
    """What of a parameter's parts lies in a range of the flattened parameter, in elements."""
    for part in parts:
        first, last = max(begin, part.at), min(end, part.at + part.end - part.begin)
        if first < last:
            moved = part.begin - part.at
            yield Part(stored=part.stored, begin=first + moved, end=last + moved, at=first)


def _memory_order(converter: WeightConverter, by_pattern: Mapping[str, list[str]]) -> list[str] | None:
    """The stored names in the order of their elements in the fused parameter."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    lists = [by_pattern.get(pattern, []) for pattern in converter.source_patterns]
    if operations == [(MergeModulelist, 0)] and len(lists) == 1:
        return lists[0]
    if operations == [(MergeModulelist, 0), (Concatenate, 1)] and len({len(names) for names in lists}) == 1:
        # Of each expert its projections, which are concatenated by rows.
        return [name for expert in zip(*lists, strict=True) for name in expert]
    return None


def _whole(stored: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Part]:
    at = 0
    for name in stored:
        count = math.prod(shapes[name])
        yield Part(stored=name, begin=0, end=count, at=at)
        at += count
