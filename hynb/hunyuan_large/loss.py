"""The loss of a language model without whole logits: in pieces, at supervised positions only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T`, with both gradients computed in the forward pass, piece by piece.

    The logits of a piece are freed once its gradients are accumulated, so memory grows with the piece and not with
    the sequence (the idea of Liger-Kernel's fused loss, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, piece: int
    ) -> torch.Tensor:
        """Sum of the losses of hidden (tokens × width) against targets (tokens), in float32."""
        # A float32 sum of thousands of losses would be wrong in the sixth digit.
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), piece):
            part, target = hidden[start : start + piece], targets[start : start + piece]
            logits = (part @ weight.T).float()
            target_logits = logits.gather(1, target[:, None]).squeeze(1)
            normaliser = torch.logsumexp(logits, dim=1)
            total += (normaliser - target_logits).sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax - one-hot, in the memory of the logits.
            gradient = logits.sub_(normaliser[:, None]).exp_()
            gradient[torch.arange(len(target), device=target.device), target] -= 1
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + piece] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ part
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the forward pass, times that of the loss."""
        (factor,) = grad_outputs
        grads = (grad if grad is None else grad * factor.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None)


class LanguageModelHead(nn.Linear):
    """The output layer: logits, or with targets the loss itself.

    Either is one call of this module, because ZeRO-3 gathers its weight once per call on every rank, and ranks have
    different numbers of supervised tokens.
    """

    def forward(self, input: torch.Tensor, targets: torch.Tensor | None = None, piece: int = 1024) -> torch.Tensor:
        """Logits (… × vocabulary), or the sum of the losses.

        Args:
            input: hidden states (… × width); with targets, tokens × width.
            targets: token ids (tokens), each predicted from the hidden state of the same row.
            piece: number of tokens whose logits are in memory at the same time.
        """
        if targets is None:
            return super().forward(input)
        loss = _LinearCrossEntropy.apply(input, self.weight, targets, piece)
        assert isinstance(loss, torch.Tensor)
        return loss


def causal_loss(
    head: LanguageModelHead,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    *,
    piece: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean next-token loss over supervised positions.

    Args:
        hidden: batch × length × width.
        labels: batch × length; -100 at unsupervised positions.
        piece: number of tokens whose logits are in memory at the same time.
        num_items_in_batch: divisor of the sum in place of the number of supervised positions, as transformers'
            Trainer passes it.
        shift_labels: batch × length; the label of each position's next token, in place of `labels`. Under sequence
            parallelism the next token of a rank's last position belongs to another rank.
    """
    predicting = hidden
    if shift_labels is None:
        predicting, shift_labels = hidden[:, :-1], labels[:, 1:]
    supervised = shift_labels != IGNORED
    rows, targets = predicting[supervised], shift_labels[supervised]
    total = head(rows, targets.to(rows.device), piece)
    if num_items_in_batch is None:
        return total / supervised.sum().clamp(min=1)
    # A batch of parts of split samples may have no supervised position: a loss of 0 instead of 0 / 0.
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
