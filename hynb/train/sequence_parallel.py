"""Each row over several ranks: Ulysses sequence parallelism (arXiv 2309.14509).

A rank holds a part of the positions of a row. Attention alone needs the others: DeepSpeed's exchange gives each rank
all positions for its share of the heads. Nothing else of DeepSpeed or accelerate knows of it: to the engine, which
averages gradients over all ranks, the parts are micro-batches of their own, whose losses are divided by the labels of
all ranks.

The Trainer's own way (`sp_backend="deepspeed"` of accelerate's parallelism) is not used: with transformers 5.23.0 and
DeepSpeed 0.19.8, on two ranks, the gradient norm is doubled under ZeRO-2, a run that is resumed in the middle of an
epoch fails in `skip_first_batches`, and an evaluation fails where there are more ranks than key and value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hynb.data import IGNORED, Collator

TOKEN_MASK = "token_mask"
"""The entry of a batch that is 1 at each token and 0 in the padding; the model does not take it."""


@dataclass(kw_only=True, frozen=True)
class RowParts:
    """Which part of which rows a rank computes. Neighbouring ranks share a row; each such group is a replica.

    Args:
        size: ranks that share a row; they divide the world size.
        group: these ranks; None where each has rows of its own.
    """

    rank: int
    world_size: int
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def place(self) -> int:
        """The index of this rank's part."""
        return self.rank % self.size

    @property
    def replica(self) -> int:
        """The index of this rank's group, which decides the rows that it gets."""
        return self.rank // self.size

    @property
    def replicas(self) -> int:
        """The number of groups."""
        return self.world_size // self.size

    def collator(self, pad_token_id: int) -> Collator | PartCollator:
        """Makes this rank's batches of samples."""
        if self.size == 1:
            return Collator(pad_token_id=pad_token_id, flatten=True)
        return PartCollator(pad_token_id=pad_token_id, size=self.size, place=self.place)


@dataclass(kw_only=True)
class PartCollator:
    """One row of all samples of a batch, of which a rank gets its part.

    Args:
        size: number of parts.
        place: index of the part.
    """

    pad_token_id: int
    size: int
    place: int

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """This rank's part of a row; each tensor has the shape (1, length / size).

        Returns:
            `input_ids` and `position_ids`; `shift_labels`, the label of each position's next token, which may be
            another rank's, and the same as `labels`; TOKEN_MASK; and where the conversations of the whole row begin,
            as `Collator` gives it.
        """
        documents = [_as_pack(sample) for sample in samples]
        length = sum(len(item["input_ids"]) for item in documents)
        if missing := -length % self.size:
            # One more conversation, without labels.
            padding = {"input_ids": [self.pad_token_id] * missing, "labels": [IGNORED] * missing}
            documents.append(padding | {"position_ids": list(range(missing))})
        row = Collator(pad_token_id=self.pad_token_id, flatten=True)(documents)
        part_length = (length + missing) // self.size
        begin = self.place * part_length

        def part(values: torch.Tensor) -> torch.Tensor:
            # A copy, because a view would keep the whole row.
            return values[:, begin : begin + part_length].clone()

        shifted = part(torch.nn.functional.pad(row["labels"], (0, 1), value=IGNORED)[:, 1:])
        mask = (torch.arange(begin, begin + part_length) < length).long()[None]
        own = {name: part(row[name]) for name in ("input_ids", "position_ids")}
        return row | own | {"labels": shifted, "shift_labels": shifted, TOKEN_MASK: mask}


def share_rows(model: PreTrainedModel, size: int) -> RowParts:
    """This rank's part of the rows, after each rank has called it at the same point.

    Args:
        model: its attention exchanges heads for positions from now on, unless size is 1.
        size: ranks that share a row.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return RowParts(rank=rank, world_size=world_size)
    # Every rank takes part in the creation of every group.
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)]
    group = groups[rank // size]
    assert isinstance(group, dist.ProcessGroup)
    _exchange_heads(model, group)
    return RowParts(rank=rank, world_size=world_size, size=size, group=group)


def _exchange_heads(model: PreTrainedModel, group: Any) -> None:
    """Makes a model's attention get all positions of a row, for a share of the heads, from the ranks of a group."""
    # Imports DeepSpeed, which takes seconds.
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    config = model.config
    name = config._attn_implementation
    assert name is not None
    exchange = UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS[name],
        batch_size=1,
        attn_head_count=config.num_attention_heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        # A mask of this rank's positions alone; those of the whole row say where its conversations begin.
        return exchange(module, query, key, value, None, **kwargs)

    # Under the same name, by which transformers also chooses the mask and the kernels.
    ALL_ATTENTION_FUNCTIONS.register(name, attend)


def _as_pack(sample: dict[str, list[int]]) -> dict[str, list[int]]:
    """A sample as a pack of one conversation, if it is not one."""
    if "position_ids" in sample:
        return sample
    # The first token is not predicted: the token before it belongs to another conversation.
    labels = [IGNORED, *sample["labels"][1:]]
    return {"input_ids": sample["input_ids"], "labels": labels, "position_ids": list(range(len(labels)))}
