"""Matches the keys of an adapter to the tensors of its base."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hynb.merge.adapter import Adapter
from hynb.merge.changes import Change, ExpertChange, LowRankChange, Replacement
from hynb.merge.shards import TensorEntry

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_PARTNERS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


@dataclass(kw_only=True)
class Match:
    """The changes of one adapter, by tensor of the base, and what cannot be matched, as messages."""

    changes: dict[str, list[Change]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def match_adapter(
    adapter: Adapter, tensors: Mapping[str, TensorEntry], *, stored_name: Callable[[str], str] = str
) -> Match:
    """Finds the change of each tensor of the base that an adapter's keys name.

    Args:
        tensors: the tensors of the base, by name.
        stored_name: the name of a parameter in weight files, from its name in the model (Family.stored_name).
    """
    matcher = _Matcher(adapter, tensors, stored_name)
    matcher.run()
    return matcher.match


class _Matcher:
    """The keys of one adapter that have been matched so far."""

    def __init__(
        self, adapter: Adapter, tensors: Mapping[str, TensorEntry], stored_name: Callable[[str], str]
    ) -> None:
        self._adapter = adapter
        self._stored_name = stored_name
        self._shapes = adapter.shapes
        self._tensors = tensors
        self._used: set[str] = set()
        self.match = Match()

    def run(self) -> None:
        """Matches every key once."""
        whole: list[str] = []
        parts: list[tuple[str, str, str]] = []
        for key in self._shapes:
            found = _LORA_KEY.fullmatch(key)
            if not key.startswith(_PREFIX):
                self._problem(key, f"does not start with {_PREFIX}, so it cannot be matched to a tensor of the base")
            elif found is None:
                whole.append(key)
            else:
                parts.append((key, found["module"].removeprefix(_PREFIX), found["part"]))
        # Whole tensors first: an adapter on the embeddings may bring the embeddings that it is to be added to.
        for key in whole:
            self._match_whole_tensor(key)
        for key, module, part in parts:
            if part in _PARTNERS:
                self._match_pair(key, module, part)
        for key, _, part in parts:
            if part not in _PARTNERS and key not in self._used:
                self._problem(key, "has no matching lora_A, so it would not be merged")

    def _match_whole_tensor(self, key: str) -> None:
        name = self._tensor_name(key.removeprefix(_PREFIX).replace(".base_layer.", "."))
        entry = self._tensors.get(name)
        if entry is None:
            self._absent(key, name)
        elif entry.shape != self._shapes[key]:
            self._problem(key, f"has shape {self._shapes[key]}, but {name} of the base has shape {entry.shape}")
        else:
            self._add(name, Replacement(weights_file=self._adapter.weights_file, key=key))

    def _match_pair(self, key: str, module: str, part: str) -> None:
        partner = key.replace(f".{part}", f".{_PARTNERS[part]}")
        if partner not in self._shapes:
            self._problem(key, f"has no matching {_PARTNERS[part]}")
            return
        self._used |= {key, partner}
        for name in (key, partner):
            if len(self._shapes[name]) != 2:
                self._problem(name, f"must be a matrix, and has shape {self._shapes[name]}")
                return
        if experts := _expert_tensors(module, self._tensors):
            self._match_experts(key, partner, module.removesuffix(".base_layer"), experts)
        else:
            self._match_weight(key, partner, module, embedding=part == "lora_embedding_A")

    def _match_weight(self, key: str, partner: str, module: str, *, embedding: bool) -> None:
        magnitude = next((k for k in self._shapes if k.startswith(f"{_PREFIX}{module}.lora_magnitude_vector")), None)
        if magnitude is not None:
            self._used.add(magnitude)
        name = self._tensor_name(f"{module}.weight")
        entry = self._tensors.get(name)
        if entry is None:
            self._absent(key, name)
            return
        rank = self._shapes[key][0]
        fan_in_fan_out = bool(self._adapter.settings.get("fan_in_fan_out"))
        shape = (self._shapes[partner][0], self._shapes[key][1])
        if embedding or fan_in_fan_out:
            shape = shape[::-1]
        if shape != entry.shape or self._shapes[partner][1] != rank:
            self._problem(key, f"changes a weight of shape {shape}, but {name} of the base has shape {entry.shape}")
            return
        change = LowRankChange(
            weights_file=self._adapter.weights_file,
            down=key,
            up=partner,
            factor=self._adapter.factor(module, rank),
            magnitude=magnitude,
            embedding=embedding,
            fan_in_fan_out=fan_in_fan_out,
        )
        self._add(name, change)

    def _match_experts(self, key: str, partner: str, module: str, experts: Mapping[str, list[TensorEntry]]) -> None:
        """Adds the change of each expert for an adapter on a fused parameter, which its shape tells."""
        (inner, width), count = experts["gate_proj"][0].shape, len(experts["gate_proj"])
        total_rank = self._shapes[key][0]
        shape, gate_up, down = (self._shapes[partner][0], self._shapes[key][1]), (2 * inner, width), (width, inner)
        if total_rank % count or self._shapes[partner][1] != total_rank or shape not in (gate_up, down):
            self._problem(
                key,
                f"changes a parameter of shape {shape}, but the base has {count} experts with fused parameters of "
                f"shapes {gate_up} and {down}",
            )
            return
        if shape == gate_up:
            parameter, rows = "gate_up_proj", {"gate_proj": (0, inner), "up_proj": (inner, 2 * inner)}
        else:
            parameter, rows = "down_proj", {"down_proj": (0, width)}
        factor = self._adapter.factor(f"{module}.{parameter}", total_rank // count)
        for projection, place in rows.items():
            for index, entry in enumerate(experts[projection]):
                change = ExpertChange(
                    weights_file=self._adapter.weights_file,
                    down=key,
                    up=partner,
                    factor=factor,
                    expert=index,
                    experts=count,
                    rows=place,
                )
                self._add(entry.name, change)

    def _tensor_name(self, name: str) -> str:
        """The tensor of the base that holds a parameter of the model."""
        stored = self._stored_name(name)
        return stored if stored in self._tensors else name

    def _add(self, name: str, change: Change) -> None:
        self.match.changes.setdefault(name, []).append(change)

    def _absent(self, key: str, name: str) -> None:
        self._problem(
            key, f"needs the tensor {name}, which the base does not have. Is the adapter for another model?"
        )

    def _problem(self, key: str, text: str) -> None:
        self.match.problems.append(f"{self._adapter.weights_file}: {key} {text}")


def _expert_tensors(module: str, tensors: Mapping[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """The tensors that a fused expert module is stored as, by projection; empty for other modules."""
    prefix = module.removesuffix(".base_layer")
    if not prefix.endswith(".experts") or f"{prefix}.0.down_proj.weight" not in tensors:
        return {}
    found: dict[str, list[TensorEntry]] = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        names = (f"{prefix}.{index}.{projection}.weight" for index in itertools.count())
        present = itertools.takewhile(tensors.__contains__, names)
        found[projection] = [tensors[name] for name in present]
    return found if len({len(entries) for entries in found.values()}) == 1 else {}
