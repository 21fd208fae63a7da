"""The loss of a language model without its logits: in pieces, at supervised positions alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T`, with both gradients made in the forward pass, piece by piece.

    The logits of a piece live only until its gradients are added up, so that memory grows with the piece and
    not with the sequence (the idea of Liger-Kernel's fused loss, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, piece: int
    ) -> torch.Tensor:
        """Sum of the losses of hidden (tokens × width) against targets (tokens), in float32."""
        # Thousands of losses: a float32 sum of them would be off in the sixth digit.
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for begin in range(0, len(hidden), piece):
            part, wanted = hidden[begin : begin + piece], targets[begin : begin + piece]
            logits = (part @ weight.T).float()
            chosen = logits.gather(1, wanted[:, None]).squeeze(1)
            normaliser = torch.logsumexp(logits, dim=1)
            total += (normaliser - chosen).sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax - one-hot, in the logits' own memory.
            gradient = logits.sub_(normaliser[:, None]).exp_()
            gradient[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[begin : begin + piece] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ part
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Scales what the forward pass made."""
        grads = (grad if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None)


class LanguageModelHead(nn.Linear):
    """The output layer: logits, or with targets the loss itself.

    Both are one call of this module, because ZeRO-3 gathers its weight once a call on every rank, and ranks
    have different numbers of supervised tokens.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None, piece: int = 1024) -> torch.Tensor:
        """Logits (… × vocabulary), or the sum of the losses.

        Args:
            hidden: … × width, or with targets tokens × width.
            targets: token ids (tokens); each is predicted from the hidden state of the same row.
            piece: tokens whose logits are in memory at once.
        """
        if targets is None:
            return super().forward(hidden)
        return _LinearCrossEntropy.apply(hidden, self.weight, targets, piece)


def causal_loss(
    head: LanguageModelHead,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    piece: int,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The mean loss of the next token over supervised positions.

    Args:
        hidden: batch × length × width; labels: batch × length, -100 where nothing is learnt.
        num_items_in_batch: what the sum is divided by instead, as transformers' Trainer counts it.
    """
    shifted = labels[:, 1:]
    supervised = shifted != IGNORED
    rows, targets = hidden[:, :-1][supervised], shifted[supervised]
    total = head(rows, targets.to(rows.device), piece)
    if num_items_in_batch is None:
        return total / supervised.sum().clamp(min=1)
    # A batch of parts of samples that were split may hold no answer: nothing is learnt, instead of 0 / 0.
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
