"""Routers whose choice is forced, for test_zero_equality: each rank sends all of its tokens to one expert."""

from __future__ import annotations

import os

import torch

from hynb.hunyuan_large.modeling import HunYuanLargeGate


def force(expert_of_row) -> None:
    """Replaces the routers' choice; the weights stay the probabilities of the forced experts.

    Args:
        expert_of_row: function of the number of tokens that returns the expert of each (tokens).
    """
    plain = HunYuanLargeGate.forward

    def forward(self, tokens):
        logits, _, chosen = plain(self, tokens)
        chosen = expert_of_row(len(tokens)).view(-1, 1).expand_as(chosen)
        return logits, torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, chosen), chosen

    HunYuanLargeGate.forward = forward


def force_expert_of_rank() -> None:
    """Called in a rank before it begins: sends all of its tokens to the expert with its number."""
    rank = int(os.environ["RANK"])
    force(lambda count: torch.full((count,), rank))
