"""A key-value cache of integers: each token's keys and values of each head as bits on a grid of their own.

A token is stored as what `quant.activations.fake_quantize` makes of it, so a model whose activations are
quantized generates, over a cache of the same bits, as it computes without one. Where keys are stored follows
the model: before rotation where it quantizes the outputs of its key projections (k), and they are rotated
whenever they are read; after rotation where it quantizes only what attention multiplies (ke), or nothing.
The cache does the work of the model's own quantizers of what it stores, which rest meanwhile.

B rows, H heads of keys and values, G grids of a token (H, or 1 over all heads), S tokens of this pass, C
columns of the cache, D features of a head, W features of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.generation.cursor import Cursor
from qrecipes.models.activation_quantizers import ActivationQuantizer, quantizers_of, suspended
from qrecipes.quant.activations import MAX_BITS, MIN_BITS, QuantizedTokens, dequantize, quantize
from qrecipes.quant.packing import BITS, pack, unpack

READ_BLOCK = 2048
"""Columns that are turned back into numbers at a time, which bounds the float32 between."""

KVBits = int | Literal["model"]
"""Bits of a cache; "model" takes those that the model quantizes its keys and values to."""


@dataclass(frozen=True)
class GridFormat:
    """How tokens are stored."""

    bits: int
    symmetric: bool = False
    per_head: bool = True

    @property
    def container(self) -> int:
        """Bits that a value takes: 5 to 7 are not packed."""
        return self.bits if self.bits in BITS else 8


class TokenStore(nn.Module):
    """Integers, scales and zero points of a layer's keys, or of its values; allocated at the first write."""

    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, cursor: Cursor, format: GridFormat) -> None:
        super().__init__()
        self.cursor, self.format = cursor, format
        for name in ("codes", "scale", "zero"):
            self.register_buffer(name, None, persistent=False)

    def write(self, x_BHSD: Tensor) -> None:
        """Store tokens in the cursor's columns."""
        x_BGSW = x_BHSD if self.format.per_head else x_BHSD.transpose(1, 2).flatten(2).unsqueeze(1)
        tokens = quantize(x_BGSW, self.format.bits, symmetric=self.format.symmetric)
        codes = pack(tokens.codes, self.format.container)
        parts = {"codes": codes, "scale": tokens.scale, "zero": tokens.zero}
        for name, part in parts.items():
            if part is None:
                continue
            if getattr(self, name) is None:
                # zeros: a column that is masked weighs 0, and 0 x NaN would still be NaN
                batch, grids, _, width = part.shape
                setattr(self, name, part.new_zeros(batch, grids, self.cursor.capacity, width))
            getattr(self, name).index_copy_(2, self.cursor.columns, part)

    def read(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """All tokens up to the cursor's end, [B, H, end, D]."""
        assert self.codes is not None and self.scale is not None  # noqa: PT018 - written before it is read
        width = head_dim if self.format.per_head else num_heads * head_dim
        blocks = []
        for start in range(0, self.cursor.end, READ_BLOCK):
            part = slice(start, min(start + READ_BLOCK, self.cursor.end))
            codes = unpack(self.codes[:, :, part], self.format.container, width)
            zero = None if self.zero is None else self.zero[:, :, part]
            blocks.append(dequantize(QuantizedTokens(codes, self.scale[:, :, part], zero), dtype))
        x_BGCW = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        if self.format.per_head:
            return x_BGCW
        return x_BGCW.squeeze(1).unflatten(-1, (num_heads, head_dim)).transpose(1, 2)


class QuantizedKVCache(nn.Module):
    """Takes the place of `KVCache` in one attention layer."""

    def __init__(self, cursor: Cursor, attention: Any, plan: CachePlan) -> None:
        super().__init__()
        self.cursor, self.plan = cursor, plan
        self.keys, self.values = TokenStore(cursor, plan.keys), TokenStore(cursor, plan.values)
        self._attention = [attention]  # in a list: it holds the cache, and modules must not hold each other
        self._unrotated: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, the model's own quantizers of what is stored rest, and keys before rotation are seen."""
        with ExitStack() as after:
            after.enter_context(suspended(*self.plan.replaces))
            if self.plan.before_rotation:
                after.callback(self._attention[0].k_proj.register_forward_hook(self._see).remove)
            yield

    def update(self, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, S, D]; all up to the cursor's end, [B, H, end, D]."""
        attention = self._attention[0]
        num_heads, head_dim, dtype = attention.num_kv_heads, k_BHSD.shape[-1], k_BHSD.dtype
        repeats = k_BHSD.shape[1] // num_heads  # an attention may hand over its heads already repeated
        if self.plan.before_rotation:
            assert self._unrotated is not None, "the key projection was not called"
            given = self._unrotated.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
            self._unrotated = None
            self.keys.write(given)
            keys = self._rotated(self.keys.read(num_heads, head_dim, dtype))
        else:
            self.keys.write(k_BHSD[:, ::repeats])
            keys = self.keys.read(num_heads, head_dim, dtype)
        self.values.write(v_BHSD[:, ::repeats])
        values = self.values.read(num_heads, head_dim, dtype)
        if repeats > 1:
            return keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        return keys, values

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._unrotated = output

    def _rotated(self, k_BHCD: Tensor) -> Tensor:
        """Keys as attention multiplies them: rotated to their positions, then normed."""
        attention = self._attention[0]
        if attention.pos_embeddings is not None:
            columns = torch.arange(self.cursor.end, device=k_BHCD.device)
            written = columns.minimum(self.cursor.columns[-1])  # what lies beyond has no position
            position_BC = (written - self.cursor.padding[:, None]).clamp(min=0)
            k_BHCD = attention.pos_embeddings(k_BHCD.transpose(1, 2), input_pos=position_BC).transpose(1, 2)
        return k_BHCD if attention.k_norm is None else attention.k_norm(k_BHCD)


@dataclass(frozen=True)
class CachePlan:
    """How one attention layer's keys and values are stored."""

    keys: GridFormat
    values: GridFormat
    before_rotation: bool
    """Whether keys are stored before rotation."""
    replaces: tuple[ActivationQuantizer, ...]
    """The model's quantizers whose work the cache does."""

    @classmethod
    def of(cls, attention: Any, fqn: str, bits: KVBits) -> CachePlan:
        """The plan of an attention layer called `fqn`.

        Raises:
            ConfigError: if the bits are out of range, others than the layer quantizes its keys or values to,
                or "model" and it quantizes one of them not at all; or its grids have no integers.
        """
        if bits != "model" and not MIN_BITS <= bits <= MAX_BITS:
            raise ConfigError(f"kv_bits: {bits} is out of range; use {MIN_BITS} to {MAX_BITS}")
        projected = quantizers_of(attention.k_proj).get("k")
        multiplied = quantizers_of(attention).get("ke")
        keys = projected or multiplied
        values = quantizers_of(attention.v_proj).get("v")
        return cls(
            _format(keys, "keys", fqn, bits),
            _format(values, "values", fqn, bits),
            before_rotation=projected is not None,
            replaces=tuple(quantizer for quantizer in (keys, values) if quantizer is not None),
        )


def _format(quantizer: ActivationQuantizer | None, what: str, fqn: str, bits: KVBits) -> GridFormat:
    if quantizer is None:
        if bits == "model":
            raise ConfigError(
                f"kv_bits: 'model', but {fqn} does not quantize its {what}; give 8 or 4 (quantizers that a "
                "transform only inserts are gone from a finished model; kv_bits of a method that trains "
                "weights stays)"
            )
        return GridFormat(bits)
    if bits not in ("model", quantizer.bits):
        raise ConfigError(
            f"kv_bits: {bits}, but {fqn} computes with {what} of {quantizer.bits} bits; use 'model', or none"
        )
    if not quantizer.symmetric and quantizer.zero_point == "float":
        raise ConfigError(
            f"kv_bits: {fqn} quantizes its {what} with float zero points, whose ends no integer stands for; "
            "use zero_point = 'integer'"
        )
    per_head = quantizer.num_heads > 0 or quantizer.place == "key"
    return GridFormat(quantizer.bits, quantizer.symmetric, per_head)
