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


@dataclass(kw_only=True)
class _LayerSums:
    """Sums over the tokens of one layer since the last reset.

    Args:
        slots: tokens routed to each expert (experts).
        entropy: of the router's probabilities, in nats.
        tokens: number of tokens.
    """

    slots: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor


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

    Padding is left out where `mask` is set, and so is the second forward pass of gradient checkpointing.

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
        self._sums: list[_LayerSums | None] = []
        self._losses: list[torch.Tensor] = []
        for name, module in routers(model, model_type):
            # …layers.7.mlp.gate
            self.layers.append(int(name.split("layers.")[1].split(".")[0]))
            module.register_forward_hook(self._hook(len(self.layers) - 1))
        self.reset()

    @property
    def mask(self) -> torch.Tensor | None:
        """Attention mask of the current batch (batch × length); None where nothing is padded."""
        return self._mask

    @mask.setter
    def mask(self, mask: torch.Tensor | None) -> None:
        self._mask = mask
        self._counted = {}

    def reset(self) -> None:
        """Starts to count from zero."""
        self._sums = [None] * len(self.layers)

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
        sums = [item for item in self._sums if item is not None]
        if not sums:
            return None
        scalars = torch.stack([item.entropy for item in sums] + [item.tokens for item in sums])
        return torch.cat([*(item.slots for item in sums), scalars])

    def summary(self, packed: torch.Tensor) -> dict[str, list[float]]:
        """What was counted since the last reset, one entry per layer; counts from zero again.

        Args:
            packed: the sum of all ranks' `counts`.

        Returns:
            layer; max_share and min_share, the fractions of tokens of the most and the least used expert (top_k /
            experts for uniform routing); dead, the number of experts without a token; entropy of the router's
            probabilities, from 0 (one expert) to 1 (uniform).
        """
        widths = [len(item.slots) for item in self._sums if item is not None]
        counts = packed[: sum(widths)].split(widths)
        entropy, tokens = packed[sum(widths) :].chunk(2)
        totals = tokens.clamp(min=1).tolist()
        shares = [count / total for count, total in zip(counts, totals, strict=True)]
        self.reset()
        return {
            "layer": [*self.layers],
            "max_share": [round(share.max().item(), 4) for share in shares],
            "min_share": [round(share.min().item(), 4) for share in shares],
            "dead": [int((count == 0).sum()) for count in counts],
            "entropy": [
                round(value / total / math.log(width), 4)
                for value, total, width in zip(entropy.tolist(), totals, widths, strict=True)
            ],
        }

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
            scores = self._scores(logits if self._coefficient else logits.detach())
            counted = self._counted_of(logits, top_k=chosen.shape[-1])
            if self._coefficient:
                slots = torch.zeros(logits.shape[-1], device=logits.device)
                slots.index_add_(0, chosen.reshape(-1), counted.slots)
                loss = self._balancing_loss(scores, slots, counted.tokens, top_k=chosen.shape[-1])
                if not recomputed:
                    self._losses.append(loss)
            if not recomputed:
                self._add(place, scores.detach(), chosen, counted)

        return hook

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (tokens × experts) of the router's logits."""
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

    def _add(self, place: int, scores: torch.Tensor, chosen: torch.Tensor, counted: _Counted) -> None:
        entropy = torch.dot(torch.special.entr(scores).sum(-1), counted.tokens)
        sums = self._sums[place]
        if sums is None:
            slots = torch.zeros(scores.shape[-1], device=scores.device)
            sums = self._sums[place] = _LayerSums(slots=slots, entropy=entropy, tokens=counted.total.clone())
        else:
            sums.entropy += entropy
            sums.tokens += counted.total
        sums.slots.index_add_(0, chosen.reshape(-1), counted.slots)


def routers(model: nn.Module, model_type: str) -> list[tuple[str, nn.Module]]:
    """Name and module of every router of a model; empty for a dense one."""
    family = FAMILIES.get(model_type)
    router_class = family.router_class() if family else None
    if router_class is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, router_class)]
