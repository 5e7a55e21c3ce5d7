"""How the next token is chosen: the likeliest, or a draw from what temperature, top-k and top-p leave.

A draw inverts the cumulative distribution at a number that each row draws for itself, so a row's text depends
on its prompt and the seed alone, whatever is generated beside it.

B rows, V vocabulary, K candidates, T steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrecipes.errors import ConfigError

NO_TOKEN = -1
"""What `choose` gives for a row whose logits are no numbers."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many tokens to add, and how each is chosen.

    Raises:
        ConfigError: if a number is out of its range.
    """

    max_tokens: int = 128
    """Most tokens to add to a prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities, after temperature and top-k, sum to it; in
    (0, 1]."""
    seed: int = 0
    """Of the draws. The same prompt twice in one call is drawn twice."""

    def __post_init__(self) -> None:
        for name, value, least in (("max_tokens", self.max_tokens, 1), ("top_k", self.top_k, 1)):
            if value is not None and value < least:
                raise ConfigError(f"{name}: {value} is out of range; must be at least {least}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: {self.temperature} is out of range; must be at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_p: {self.top_p} is out of range; must be above 0 and at most 1, which leaves all tokens"
            )


def choose(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row, int64 [B]; `NO_TOKEN` where a row's largest logit is NaN or infinite.

    `uniform_B` float64 in [0, 1) decides the draws; unused at temperature 0.
    """
    if sampling.temperature == 0:
        token_B = logits_BV.argmax(-1)
    else:
        weight_BK, token_BK = candidates(logits_BV, sampling)
        cumulative_BK = weight_BK.cumsum(-1)
        # Divided by itself the last is exactly 1, above any draw: a token without weight is never drawn.
        cumulative_BK /= cumulative_BK[:, -1:].clone()
        place_B1 = torch.searchsorted(cumulative_BK, uniform_B[:, None], right=True)
        # beyond the end only where the weights are NaN
        token_B = token_BK.gather(-1, place_B1.clamp(max=token_BK.shape[-1] - 1)).squeeze(-1)
    return torch.where(logits_BV.amax(-1).isfinite(), token_B, NO_TOKEN)


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn and their weights, float64 [B, K] and int64 [B, K], at a temperature above 0.

    Weights need not sum to 1; those of tokens that top-p leaves out are 0.
    """
    vocabulary = logits_BV.shape[-1]
    if sampling.top_k is not None and sampling.top_k < vocabulary:
        logit_BK, token_BK = logits_BV.topk(sampling.top_k, dim=-1)
    elif sampling.top_p is not None:
        logit_BK, token_BK = logits_BV.sort(dim=-1, descending=True)
    else:
        logit_BK, token_BK = logits_BV, torch.arange(vocabulary, device=logits_BV.device).expand_as(logits_BV)
    logit_BK = logit_BK.double()
    # The largest becomes 0 before the division, which a tiny temperature would otherwise overflow.
    weight_BK = ((logit_BK - logit_BK.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        before_BK = weight_BK.cumsum(-1) - weight_BK
        weight_BK = weight_BK * (before_BK < sampling.top_p)
    return weight_BK, token_BK


def uniforms(seed: int, prompt: Sequence[int], occurrence: int, count: int) -> Tensor:
    """A row's numbers, float64 [count] in [0, 1) on the CPU; the first ones do not depend on `count`.

    They follow from the seed, the prompt's tokens and how many equal prompts came before.
    """
    text = f"{seed} {occurrence} {' '.join(map(str, prompt))}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    generator = torch.Generator().manual_seed(key)
    return torch.rand(count, dtype=torch.float64, generator=generator)
