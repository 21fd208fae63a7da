"""How evenly a router spreads tokens over its experts, counted in training, and the loss that evens it out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hynb.errors import ModelError
from hynb.families import FAMILIES


class RouterWatch:
    """Counts where each router of a model sends its tokens, from forward hooks, without waiting for the GPU.

    Tokens that are padding are left out where `mask` is set, and so is the second forward pass of gradient
    checkpointing.

    Args:
        model: with or without an adapter around it.
        model_type: of its config.
        coefficient: of the balancing loss; 0 for none.
    """

    def __init__(self, model: nn.Module, model_type: str, coefficient: float = 0.0) -> None:
        self.mask: torch.Tensor | None = None
        self.layers: list[int] = []
        self._coefficient = coefficient
        self._sigmoid = model_type in FAMILIES and FAMILIES[model_type].sigmoid_router
        self._counts: list[torch.Tensor | None] = []
        self._entropy: list[torch.Tensor | None] = []
        self._tokens: list[torch.Tensor | None] = []
        self._losses: list[torch.Tensor] = []
        for name, module in routers(model, model_type):
            # …layers.7.mlp.gate
            self.layers.append(int(name.split("layers.")[1].split(".")[0]))
            module.register_forward_hook(self._hook(len(self.layers) - 1))
        self.reset()

    def reset(self) -> None:
        """Begins to count anew."""
        self._counts, self._entropy, self._tokens = ([None] * len(self.layers) for _ in range(3))

    def take_loss(self) -> torch.Tensor | None:
        """The balancing loss of the forward pass that has just ended, times its coefficient; None without one.

        The mean over layers of experts · Σ share of tokens · mean probability: 1 when all experts are used alike
        (Switch Transformer, arXiv 2101.03961, equation 4, for any top-k).

        Raises:
            ModelError: the pass left no graph behind, as reentrant checkpointing does.
        """
        losses, self._losses = self._losses, []
        if not self._coefficient or not losses:
            return None
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses):
            raise ModelError(
                "router_aux_loss_coef: the routers' outputs carry no gradient. Reentrant checkpointing does that: "
                "leave gradient_checkpointing_kwargs out; or nothing before the routers is trained: set it to 0"
            )
        return self._coefficient * torch.stack(losses).mean()

    def summary(self, reduce: Any) -> dict[str, list[float]] | None:
        """What was counted since the last reset, one number a layer; None for a model without routers.

        Args:
            reduce: sums a tensor over all ranks; called once, on every rank.

        Returns:
            layer; max_share and min_share of an expert, where an even spread has top_k / experts; dead, experts
            that no token went to; entropy of the router's probabilities, from 0 (always one) to 1 (all alike).
        """
        if not self.layers or self._counts[0] is None:
            return None
        widths = [len(counts) for counts in self._counts]
        packed = torch.cat([*self._counts, torch.stack(self._entropy), torch.stack(self._tokens)])
        packed = reduce(packed).cpu()
        counts = packed[: sum(widths)].split(widths)
        entropy, tokens = packed[sum(widths) :].chunk(2)
        found: dict[str, list[float]] = {"layer": self.layers}
        shares = [count / total.clamp(min=1) for count, total in zip(counts, tokens, strict=True)]
        found["max_share"] = [round(share.max().item(), 4) for share in shares]
        found["min_share"] = [round(share.min().item(), 4) for share in shares]
        found["dead"] = [int((count == 0).sum()) for count in counts]
        found["entropy"] = [
            round((value / total.clamp(min=1)).item() / math.log(width), 4)
            for value, total, width in zip(entropy, tokens, widths, strict=True)
        ]
        self.reset()
        return found

    def _hook(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            if not module.training:
                return
            # In the backward pass this is the layer's recomputation, which must save what the first pass saved.
            recomputed = torch._C._current_graph_task_id() != -1
            if recomputed and not self._coefficient:
                return
            logits, chosen = _logits_and_chosen(output)
            scores = self._scores(logits if self._coefficient else logits.detach())
            real = torch.ones(len(logits), device=logits.device)
            if self.mask is not None and self.mask.numel() == len(logits):
                real = self.mask.reshape(-1).to(logits.device, torch.float32)
            total = real.sum()
            slots = torch.zeros(logits.shape[-1], device=logits.device)
            slots.index_add_(0, chosen.reshape(-1), real.repeat_interleave(chosen.shape[-1]))
            if self._coefficient:
                mean = (scores * real[:, None]).sum(0) / total.clamp(min=1)
                share = slots / (total.clamp(min=1) * chosen.shape[-1])
                loss = logits.shape[-1] * (share * mean).sum()
                if not recomputed:
                    self._losses.append(loss)
            if recomputed:
                return
            with torch.no_grad():
                entropy = -(torch.special.xlogy(scores, scores).sum(-1) * real).sum()
                for sums, value in ((self._counts, slots), (self._entropy, entropy), (self._tokens, total)):
                    sums[place] = value if sums[place] is None else sums[place] + value

        return hook

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._sigmoid:
            return torch.softmax(logits.float(), dim=-1)
        scores = torch.sigmoid(logits.float())
        return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def _logits_and_chosen(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [item for item in output if not item.is_floating_point()]
    return output[0], ids[0]


def routers(model: nn.Module, model_type: str) -> list[tuple[str, nn.Module]]:
    """Name and module of every router of a model; none for a dense one."""
    family = FAMILIES.get(model_type)
    kind = family.router_class() if family else None
    if kind is None:
        return []
    return [(name, module) for name, module in model.named_modules() if type(module) is kind]
