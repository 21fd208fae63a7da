"""How evenly the routers of a model spread tokens over experts, and the loss that balances them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from hynb.errors import ModelError
from hynb.families import FAMILIES

# Logits that are kept until many layers' statistics are computed at once: 16 MB in float32.
_PENDING_ELEMENTS = 4_000_000
# Columns of the sums of a layer, before those of its experts.
_ENTROPY, _TOKENS, _EXPERTS = 0, 1, 2


@dataclass(kw_only=True, frozen=True)
class _Counted:
    """What of a micro batch counts, in float32.

    Args:
        tokens: 1 for each token and 0 for padding (tokens).
        slots: the same for each expert that a token is sent to (tokens · top-k).
        total: the number of tokens.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    total: torch.Tensor


class RouterWatch:
    """Counts to which experts each router of a model sends its tokens, in forward hooks and without a device sync.

    Padding is left out where `mask` is set, and so is the second forward pass of gradient checkpointing. What the
    routers of a pass have returned is counted for many layers at once: ten operations for each would cost a small
    model several percent of its step.

    Args:
        model: with or without an adapter around it.
        model_type: of its config.
        coefficient: weight of the balancing loss; 0 for none.
        group: the ranks that share each row, whose tokens are balanced together; None where none do.

    Attributes:
        layers: index of each layer that has a router.
    """

    def __init__(
        self,
        model: nn.Module,
        model_type: str,
        coefficient: float = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._mask: torch.Tensor | None = None
        self._counted: dict[tuple[int, int, torch.device], _Counted] = {}
        self.layers: list[int] = []
        self._coefficient = coefficient
        self._group = group
        self._sigmoid = model_type in FAMILIES and FAMILIES[model_type].sigmoid_router
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._sums: torch.Tensor | None = None
        self._rows: dict[tuple[torch.device, tuple[int, ...]], torch.Tensor] = {}
        self._losses: list[torch.Tensor] = []
        for name, module in routers(model, model_type):
            # …layers.7.mlp.gate
            self.layers.append(int(name.split("layers.")[1].split(".")[0]))
            module.register_forward_hook(self._hook(len(self.layers) - 1))
        self._widths = [0] * len(self.layers)

    @property
    def mask(self) -> torch.Tensor | None:
        """Attention mask of the current batch (batch × length); None where nothing is padded."""
        return self._mask

    @mask.setter
    def mask(self, mask: torch.Tensor | None) -> None:
        self._add_pending()
        self._mask = mask
        self._counted = {}

    def reset(self) -> None:
        """Starts to count from zero."""
        self._pending, self._sums = [], None

    def take_loss(self) -> torch.Tensor | None:
        """The balancing loss of the last forward pass, times its coefficient; None without one.

        The mean over layers of experts · Σ fraction of tokens · mean probability, which is 1 for uniform routing
        (Switch Transformer, arXiv 2101.03961, equation 4, here for any top-k).

        Raises:
            ModelError: the pass recorded no graph, as under reentrant checkpointing.
        """
        losses, self._losses = self._losses, []
        if not self._coefficient or not losses:
            return None
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses):
            raise ModelError(
                "router_aux_loss_coef: the routers' outputs carry no gradient. Reentrant checkpointing causes that: "
                "leave gradient_checkpointing_kwargs out. If nothing before the routers is trained, set it to 0"
            )
        return self._coefficient * torch.stack(losses).mean()

    def counts(self) -> torch.Tensor | None:
        """What this rank has counted since the last reset, to be summed over all ranks; None without routers."""
        self._add_pending()
        return None if self._sums is None else self._sums.reshape(-1)

    def summary(self, packed: torch.Tensor) -> dict[str, list[float]]:
        """What was counted since the last reset, one entry per layer; counts from zero again.

        Args:
            packed: the sum of all ranks' `counts`.

        Returns:
            layer; max_share and min_share, the fractions of tokens of the most and the least used expert (top_k /
            experts for uniform routing); dead, the number of experts without a token; entropy of the router's
            probabilities, from 0 (one expert) to 1 (uniform).
        """
        # Numbers of Python: a tensor operation takes longer than the sum of a layer's experts.
        rows = packed.view(len(self.layers), -1).tolist()
        self.reset()
        found: dict[str, list[float]] = {"layer": [*self.layers]}
        found |= {name: [] for name in ("max_share", "min_share", "dead", "entropy")}
        for row, width in zip(rows, self._widths, strict=True):
            slots, total = row[_EXPERTS : _EXPERTS + width], max(1.0, row[_TOKENS])
            found["max_share"].append(round(max(slots) / total, 4))
            found["min_share"].append(round(min(slots) / total, 4))
            found["dead"].append(slots.count(0))
            found["entropy"].append(round(row[_ENTROPY] / total / math.log(width), 4))
        return found

    def _hook(self, place: int) -> Callable[[nn.Module, object, tuple[torch.Tensor, ...]], None]:
        """The forward hook of the router at a place in `layers`."""

        def hook(module: nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if not module.training:
                return
            # In the backward pass this is the layer's recomputation, which must save what the first pass saved.
            recomputed = torch._C._current_graph_task_id() != -1
            if recomputed and not self._coefficient:
                return
            logits, chosen = output[0], next(item for item in output if not item.is_floating_point())
            if self._coefficient:
                counted = self._counted_of(logits, top_k=chosen.shape[-1])
                slots = torch.zeros(logits.shape[-1], device=logits.device)
                slots.index_add_(0, chosen.reshape(-1), counted.slots)
                loss = self._balancing_loss(self._scores(logits), slots, counted.tokens, top_k=chosen.shape[-1])
                if not recomputed:
                    self._losses.append(loss)
            if not recomputed:
                self._pending.append((place, logits.detach(), chosen))
                if sum(kept.numel() for _, kept, _ in self._pending) > _PENDING_ELEMENTS:
                    self._add_pending()

        return hook

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (… × tokens × experts) of routers' logits."""
        if not self._sigmoid:
            return torch.softmax(logits.float(), dim=-1)
        scores = torch.sigmoid(logits.float())
        return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)

    def _counted_of(self, logits: torch.Tensor, top_k: int) -> _Counted:
        # The same for all layers, so that a step of many layers computes it once.
        key = len(logits), top_k, logits.device
        if key not in self._counted:
            if self._mask is not None and self._mask.numel() == len(logits):
                tokens = self._mask.reshape(-1).to(logits.device, torch.float32)
            else:
                tokens = torch.ones(len(logits), device=logits.device)
            self._counted[key] = _Counted(tokens=tokens, slots=tokens.repeat_interleave(top_k), total=tokens.sum())
        return self._counted[key]

    def _balancing_loss(
        self, scores: torch.Tensor, slots: torch.Tensor, counted: torch.Tensor, *, top_k: int
    ) -> torch.Tensor:
        sums = torch.cat([slots, counted.sum()[None]])
        ranks = 1
        if self._group is not None:
            # Of whole rows; this rank's loss is its part, times the ranks over which the engine averages gradients.
            dist.all_reduce(sums, group=self._group)
            ranks = dist.get_world_size(self._group)
        total = sums[-1].clamp(min=1)
        mean = (scores * counted[:, None]).sum(0) / total
        fraction = sums[:-1] / (total * top_k)
        return ranks * scores.shape[-1] * (fraction * mean).sum()

    @torch.no_grad()
    def _add_pending(self) -> None:
        """Adds what was kept to the sums: for all layers at once whose routers have the same shape."""
        alike: dict[tuple[torch.Size, torch.device, int], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for item in self._pending:
            alike.setdefault((item[1].shape, item[1].device, item[2].shape[-1]), []).append(item)
        self._pending = []
        for ((_, width), device, top_k), items in alike.items():
            counted = self._counted_of(items[0][1], top_k)
            scores = self._scores(torch.stack([logits for _, logits, _ in items]))
            sums = torch.zeros(len(items), _EXPERTS + width, device=device)
            # Not torch.special.entr, which takes several times as long on a CPU.
            logarithms = scores.clamp(min=torch.finfo(scores.dtype).tiny).log_()
            sums[:, _ENTROPY] = -(logarithms.mul_(scores).sum(-1) @ counted.tokens)
            sums[:, _TOKENS] = counted.total
            chosen = torch.stack([chosen for _, _, chosen in items]).view(len(items), -1)
            sums[:, _EXPERTS:].scatter_add_(1, chosen, counted.slots.expand(len(items), -1))
            self._add(tuple(place for place, _, _ in items), sums)

    def _add(self, places: tuple[int, ...], sums: torch.Tensor) -> None:
        """Adds sums of layers (layers × entropy, tokens, experts) to those of all."""
        key = (sums.device, places)
        if key not in self._rows:
            # Once, as a copy to a GPU would wait for it.
            self._rows[key] = torch.tensor(places, device=sums.device)
            for place in places:
                self._widths[place] = sums.shape[1] - _EXPERTS
        if self._sums is None:
            self._sums = torch.zeros(len(self.layers), _EXPERTS + max(self._widths), device=sums.device)
        missing = sums.shape[1] - self._sums.shape[1]
        if missing > 0:
            self._sums = nn.functional.pad(self._sums, (0, missing))
        self._sums[:, : sums.shape[1]].index_add_(0, self._rows[key], sums)


def routers(model: nn.Module, model_type: str) -> list[tuple[str, nn.Module]]:
    """Name and module of every router of a model; empty for a dense one."""
    family = FAMILIES.get(model_type)
    router_class = family.router_class() if family else None
    if router_class is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, router_class)]
