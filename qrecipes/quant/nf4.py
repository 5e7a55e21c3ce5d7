"""NF4 of QLoRA (arXiv 2305.14314): 16 quantiles of a normal distribution, and 8-bit magnitudes of blocks.

N rows, K columns, G blocks of a row. Blocks lie in rows: where the block size divides K they are those of the
flattened matrix, as in bitsandbytes and torchao; elsewhere a row's last block is shorter, where theirs run
over into the next row. Levels, nearest-level rule (a tie goes down) and block magnitudes are bitsandbytes'.
Its second level is an 8-bit float code; here, as in torchao, it is INT8. The first of two weights is in the
low half of a byte; in both of theirs, in the high half.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from qrecipes.quant.primitives import dequantize_int8, quantize_int8

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The published levels (appendix E), to the bit in float32: quantiles of the normal distribution's negative
side, 0, and quantiles of its positive side, scaled to end at -1 and 1."""
_BOUNDARIES = tuple((low + high) / 2 for low, high in pairwise(NF4_LEVELS))


def quantize_nf4(w_NK: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K], 0 to 15, and the greatest magnitude of each block, float32 [N, G].

    A block of zeros has magnitude 0, and one that is not finite a magnitude that is not.
    """
    K = w_NK.shape[1]
    blocks = _blocks(w_NK.float(), block_size)
    absmax_NG = blocks.abs().amax(-1)
    scaled = blocks / torch.where(absmax_NG == 0, 1.0, absmax_NG).unsqueeze(-1)
    codes = torch.bucketize(scaled, torch.tensor(_BOUNDARIES, device=w_NK.device), out_int32=True)
    return codes.to(torch.uint8).flatten(1)[:, :K].contiguous(), absmax_NG


def dequantize_nf4(codes_NK: Tensor, absmax_NG: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """Level times magnitude, [N, K], computed in float32 and rounded to `dtype` once."""
    K = codes_NK.shape[1]
    levels = torch.tensor(NF4_LEVELS, device=codes_NK.device)
    blocks = levels[_blocks(codes_NK.int(), block_size)] * absmax_NG.unsqueeze(-1)
    return blocks.flatten(1)[:, :K].to(dtype)


def double_quantize(absmax_NG: Tensor, scale_block_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes in 8 bits: INT8 [N, G], float32 scales [ceil(N * G / scale_block_size)], float32 mean [1].

    The mean is subtracted first. Blocks run along the rows, over their ends; the last one may be shorter.
    """
    mean_1 = absmax_NG.float().mean().reshape(1)
    blocks = _blocks((absmax_NG.float() - mean_1).reshape(1, -1), scale_block_size)[0]
    q, scale = quantize_int8(blocks)
    return q.flatten()[: absmax_NG.numel()].reshape(absmax_NG.shape).contiguous(), scale.flatten(), mean_1


def double_dequantize(q_NG: Tensor, scale: Tensor, mean_1: Tensor, scale_block_size: int = 256) -> Tensor:
    """The magnitudes of `double_quantize`, float32 [N, G], each off by at most half its scale."""
    blocks = _blocks(q_NG.reshape(1, -1), scale_block_size)[0]
    absmax = dequantize_int8(blocks, scale.unsqueeze(-1), torch.float32).flatten()[: q_NG.numel()]
    return absmax.reshape(q_NG.shape) + mean_1


def _blocks(matrix_NK: Tensor, size: int) -> Tensor:
    """[N, G, size], with zeros after each row."""
    missing = -matrix_NK.shape[-1] % size
    return (pad(matrix_NK, (0, missing)) if missing else matrix_NK).unflatten(-1, (-1, size))
