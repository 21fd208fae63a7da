"""What a rank runs in test_zero_equality: training whose every token goes to one expert, another on each rank."""

from __future__ import annotations

import os
import sys

import torch

from hynb import train_entry
from hynb.hunyuan_large.modeling import HunYuanLargeGate


def force(expert_of_row) -> None:
    """Replaces the routers' choice; the weights stay the probabilities of the forced experts.

    Args:
        expert_of_row: of the number of tokens, the expert of each (tokens).
    """
    plain = HunYuanLargeGate.forward

    def forward(self, tokens):
        logits, _, chosen = plain(self, tokens)
        chosen = expert_of_row(len(tokens)).view(-1, 1).expand_as(chosen)
        return logits, torch.softmax(logits, dim=-1, dtype=torch.float32).gather(1, chosen), chosen

    HunYuanLargeGate.forward = forward


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    force(lambda count: torch.full((count,), rank))
    code = train_entry.main([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
    sys.stdout.flush()
    os._exit(code)
