"""Attention of packed rows without a mask: each document of a row is computed by itself.

transformers' own sdpa gets a mask of length × length for a packed row, with which PyTorch has no flash kernel.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED_SDPA = "packed_sdpa"
"""The name by which transformers finds this attention (`attn_implementation`)."""


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a row; with a mask or several rows, transformers' sdpa.

    Args:
        query: 1 × heads × length × head size; key and value alike.
        cu_seq_lens_q: where each document begins, and the length; as in transformers' FlashAttentionKwargs.
        position_ids: 1 × length; without cu_seq_lens_q, a document begins wherever they do not go up by one.

    Returns:
        1 × length × heads × head size, and None in place of the attention weights.
    """
    lengths = []
    if query.shape[0] == 1 and query.shape[2] == key.shape[2] and attention_mask is None:
        lengths = _document_lengths(cu_seq_lens_q, position_ids)
    if len(lengths) <= 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs, end = [], 0
    for length, run in groupby(lengths):
        count = len(list(run))
        begin, end = end, end + count * length
        # documents × heads × length × head size; packs hold documents by falling length, so that equal ones adjoin.
        documents = [
            states[0, :, begin:end].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)
        ]
        output, _ = sdpa_attention_forward(module, *documents, None, **kwargs)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def packed_sdpa_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask for sdpa, but none for one packed row, whose documents `packed_sdpa` separates."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None:
        # transformers forbids to leave out the mask where it has found several documents.
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def register() -> None:
    """Makes transformers know the attention by its name."""
    ALL_ATTENTION_FUNCTIONS.register(PACKED_SDPA, packed_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_SDPA, packed_sdpa_mask)


def _document_lengths(starts: torch.Tensor | None, positions: torch.Tensor | None) -> list[int]:
    """Lengths of the documents of a row, from where they start or from the positions; empty if neither is known.

    Reading them waits for the GPU. All layers of a step get the same tensor, so they are kept with it.
    """
    known = positions if starts is None else starts
    if known is None:
        return []
    found: list[int] | None = getattr(known, "document_lengths", None)
    if found is None:
        if starts is None:
            row = known.reshape(-1)
            begins = (row.diff() != 1).nonzero().reshape(-1) + 1
            marks = [0, *begins.tolist(), len(row)]
        else:
            marks = starts.tolist()
        found = [end - start for start, end in pairwise(marks) if end > start]
        known.document_lengths = found  # pyright: ignore[reportAttributeAccessIssue]
    return found
