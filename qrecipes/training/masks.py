"""Attention masks of rows that hold several documents: each token sees its own document up to itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

LEAST_HEAD_DIM = 16
"""FlexAttention's kernel for a GPU multiplies no narrower matrices."""


def document_mask(model: nn.Module, documents: Tensor) -> Any:
    """The mask that a torchtune decoder takes for `documents` int32 [B, S]; see `Batch`.

    On a GPU a block-sparse mask for FlexAttention, which skips what no token sees, where all of the model's
    attention can take one (Gemma 2's cannot, nor heads of fewer than 16 features, nor attention with
    dropout); elsewhere bool [B, S, S], true where the row's token may attend to the column's.
    """
    if documents.device.type == "cuda" and takes_block_mask(model):
        return _block_mask(documents)
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return causal & (documents[:, :, None] == documents[:, None, :])


def takes_block_mask(model: nn.Module) -> bool:
    """Whether torchtune gives the model's attention to FlexAttention, and that can compute it."""
    from torchtune.modules import MultiHeadAttention
    from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION

    attentions: list[Any] = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "output_proj")]
    return bool(_SUPPORTS_FLEX_ATTENTION and attentions) and all(
        type(m) is MultiHeadAttention and m.head_dim >= LEAST_HEAD_DIM and not m.attn_dropout
        for m in attentions
    )


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
