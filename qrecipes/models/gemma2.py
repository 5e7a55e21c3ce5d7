"""Repair of torchtune 0.6.1's Gemma 2, which computes other logits than the model that was published.

Gemma 2 (arXiv 2408.00118, section 2) caps its logits: 30 tanh(logits / 30). torchtune caps the hidden state
before the head instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SoftCappedHead:
    """Logits cap * tanh(W x / cap) of a head that is tied to the embedding W."""

    def __init__(self, head: Any, cap: float) -> None:
        self.head = head
        self.tied_module: nn.Module = head.tied_module
        """The embedding, under the name that torchtune's own tied head gives it."""
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return torch.tanh(self.head(x) / self.cap) * self.cap


def repair_(model: Any) -> bool:
    """Mend a Gemma 2 of torchtune in place; False, and nothing done, for any other model.

    Names and values of parameters stay the same.
    """
    from torchtune.models.gemma2._component_builders import Gemma2FinalNorm

    norm = getattr(model, "norm", None)
    if not isinstance(norm, Gemma2FinalNorm) or isinstance(norm.logit_capping, nn.Identity):
        return False
    norm.logit_capping = nn.Identity()
    model.output = SoftCappedHead(model.output, norm.capping_value)
    return True
