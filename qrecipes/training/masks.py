"""Attention masks of rows that hold several documents: each token sees its own document up to itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def document_mask(model: nn.Module, documents: Tensor) -> Any:
    """The mask that a torchtune decoder takes for `documents` int32 [B, S]; see `Batch`.

    On a GPU a block-sparse mask for FlexAttention, which skips what no token sees, where all of the model's
    attention can take one (Gemma 2's cannot); elsewhere bool [B, S, S], true where the row's token may attend
    to the column's.
    """
    if documents.device.type == "cuda" and _takes_block_mask(model):
        return _block_mask(documents)
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return causal & (documents[:, :, None] == documents[:, None, :])


def _takes_block_mask(model: nn.Module) -> bool:
    from torchtune.modules import MultiHeadAttention

    attentions = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "output_proj")]
    return bool(attentions) and all(type(m) is MultiHeadAttention for m in attentions)


def _block_mask(documents: Tensor) -> Any:
    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (documents[b, q] == documents[b, kv])

    batch, length = documents.shape
    return _compiled_create()(visible, batch, None, length, length, device=documents.device)


@cache
def _compiled_create() -> Any:
    """`create_block_mask`, compiled so that the dense mask is never in memory."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)
