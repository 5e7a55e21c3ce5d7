"""From weights to low-bit payloads and back, and the two products of a layer whose weight is one.

T tokens, K input features, N output features. Each product is one operator, so that `torch.compile` cannot
keep the dequantized weight of the forward pass for the backward pass: traced operation by operation, its
partitioner may. `*_reference` are the same in plain PyTorch. On CUDA Triton kernels dequantize, bit for bit
as the reference does; where `dequantize_tiles` says so, inside the product. float64, devices that the kernels
do not run on, and an environment without Triton get the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from qrecipes.quant.affine import AffineGrid, dequantize_affine, quantize_affine
from qrecipes.quant.dequantize_tiles import Tiles, VectorTiles, choose_tiles
from qrecipes.quant.device import HAS_TRITON, LEAST_CAPABILITY, device_limits, on_device_of
from qrecipes.quant.formats import AffineFormat, NF4Format, Payload, WeightFormat, format_of_key
from qrecipes.quant.nf4 import dequantize_nf4, double_dequantize, double_quantize, quantize_nf4
from qrecipes.quant.operators import define_operator
from qrecipes.quant.packing import pack, signed_range, unpack

if HAS_TRITON:
    from qrecipes.quant import dequantize_kernels as kernels


def dequantize(payload: Payload, format: WeightFormat, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] of a payload, rounded to `dtype` once. It has no gradient.

    Computed in float32, or in float64 where a scale, an offset or `dtype` is.
    """
    return torch.ops.qrecipes.dequantize.default(list(payload), format.key, in_features, dtype)


def dequantize_mm(
    x_TK: Tensor,
    payload: Payload,
    format: WeightFormat,
    bias_N: Tensor | None = None,
    addend_TN: Tensor | None = None,
) -> Tensor:
    """`x W^T + addend + b`, [T, N], with the weight dequantized to the type of `x_TK`. It has no gradient.

    The addend is added to the product's own sums, which are rounded to that type afterwards, unless tokens
    are so few that a fused kernel multiplies.
    """
    return torch.ops.qrecipes.dequantize_mm.default(x_TK, list(payload), format.key, bias_N, addend_TN)


def dequantize_mm_grad_input(
    dy_TN: Tensor, payload: Payload, format: WeightFormat, in_features: int
) -> Tensor:
    """`dy W`, [T, K]: the gradient of the input of `dequantize_mm`, in the type of `dy_TN`."""
    return torch.ops.qrecipes.dequantize_mm_grad_input.default(dy_TN, list(payload), format.key, in_features)


def dequantize_reference(
    payload: Payload, format: WeightFormat, in_features: int, dtype: torch.dtype
) -> Tensor:
    """`dequantize` in plain PyTorch."""
    if isinstance(format, NF4Format):
        codes_NK = unpack(payload[0], format.bits, in_features, signed=False)
        return dequantize_nf4(codes_NK, nf4_absmax(payload, format), format.block_size, dtype)
    q_NK = unpack(payload[0], format.bits, in_features)
    return dequantize_affine(q_NK, affine_grid_of(payload, format), dtype)


def dequantize_mm_reference(
    x_TK: Tensor,
    payload: Payload,
    format: WeightFormat,
    bias_N: Tensor | None = None,
    addend_TN: Tensor | None = None,
) -> Tensor:
    """`dequantize_mm` in plain PyTorch."""
    weight_NK = dequantize_reference(payload, format, x_TK.shape[-1], x_TK.dtype)
    return linear_with_addend(x_TK, weight_NK, bias_N, addend_TN)


def linear_with_addend(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, addend_TN: Tensor | None
) -> Tensor:
    """`x W^T + addend + b`. The sum of product and addend is rounded once: a product that is rounded by
    itself lies on the type's grid, where all that is less than half a unit in the last place is lost."""
    if addend_TN is None:
        return linear(x_TK, weight_NK, bias_N)
    y_TN = torch.addmm(addend_TN, x_TK, weight_NK.t())
    return y_TN if bias_N is None else y_TN + bias_N


def dequantize_mm_grad_input_reference(
    dy_TN: Tensor, payload: Payload, format: WeightFormat, in_features: int
) -> Tensor:
    """`dequantize_mm_grad_input` in plain PyTorch."""
    return dy_TN @ dequantize_reference(payload, format, in_features, dy_TN.dtype)


def dequantize_triton(payload: Payload, format: WeightFormat, in_features: int, dtype: torch.dtype) -> Tensor:
    """`dequantize` by its kernel, which Triton's interpreter runs on the CPU; for no float64."""
    out_NK = payload[0].new_empty((payload[0].shape[0], in_features), dtype=dtype)
    if out_NK.numel() > 0:
        with on_device_of(out_NK):
            kernels.launch_dequantize(kernels.stored_weight(payload, format, in_features), out_NK)
    return out_NK


def dequantize_mm_triton(
    x_TK: Tensor, payload: Payload, format: WeightFormat, bias_N: Tensor | None, tiles: Tiles
) -> Tensor:
    """`dequantize_mm` by a kernel that reads the packed weight once, for as many tokens as `tiles` takes.

    Each weight is that of the reference; sums are in float32, in an order that `tiles` fixes. Needs at least
    one token, and no float64.
    """
    (T, K), N = x_TK.shape, payload[0].shape[0]
    x_TK = x_TK.contiguous()
    out_TN = x_TK.new_empty((T, N))
    if out_TN.numel() == 0:
        return out_TN
    bias_N = None if bias_N is None else bias_N.contiguous()
    with on_device_of(out_TN):
        weight = kernels.stored_weight(payload, format, K)
        if isinstance(tiles, VectorTiles):
            kernels.launch_vector(x_TK, weight, bias_N, out_TN, tiles)
        else:
            kernels.launch_matrix(x_TK, weight, bias_N, out_TN, tiles)
    return out_TN


def affine_payload(q_NK: Tensor, grid: AffineGrid, format: AffineFormat) -> Payload:
    """The payload of signed integers [N, K] on a grid, whose tensors are converted to the format's types.

    Raises:
        ValueError: if an integer does not fit the format's bits, or the grid is not the format's. Reads the
        integers, unless they are on the meta device.
    """
    least, greatest = signed_range(format.bits)
    if not q_NK.is_meta and q_NK.numel() and (q_NK.min() < least or q_NK.max() > greatest):
        raise ValueError(
            f"affine_payload.q_NK: holds {int(q_NK.min())} to {int(q_NK.max())}; signed integers of "
            f"{format.bits} bits are {least} to {greatest}; subtract {2 ** (format.bits - 1)} from unsigned "
            "ones"
        )
    return grid_payload(pack(q_NK, format.bits), grid, format, q_NK.shape[1])


def grid_payload(packed_NB: Tensor, grid: AffineGrid, format: AffineFormat, in_features: int) -> Payload:
    """The payload of packed integers on a grid, whose tensors are converted to the format's types.

    Raises:
        ValueError: if the grid is not the format's.
    """
    N = packed_NB.shape[0]
    _check_grid(grid, format, N, in_features)
    types = [dtype for _, dtype in format.payload_spec(N, in_features).values()]
    tensors = (packed_NB, *(t for t in grid if t is not None))
    return tuple(t.to(dtype).contiguous() for t, dtype in zip(tensors, types, strict=True))


def affine_grid_of(payload: Payload, format: AffineFormat) -> AffineGrid:
    """The grid of an affine payload."""
    if format.has_zero:
        return AffineGrid(payload[1], zero=payload[2])
    return AffineGrid(payload[1], offset=payload[2]) if format.has_offset else AffineGrid(payload[1])


def quantize_to_affine(w_NK: Tensor, grid: AffineGrid, format: AffineFormat) -> Payload:
    """The payload of the weights' nearest levels on a grid of the format's types."""
    return affine_payload(quantize_affine(w_NK, grid, format.bits), grid, format)


def quantize_to_nf4(w_NK: Tensor, format: NF4Format) -> Payload:
    """The NF4 payload of a weight."""
    codes_NK, absmax_NG = quantize_nf4(w_NK, format.block_size)
    packed = pack(codes_NK, format.bits, signed=False)
    if not format.double_quantized:
        return packed, absmax_NG
    return packed, *double_quantize(absmax_NG, format.scale_block_size)


def nf4_absmax(payload: Payload, format: NF4Format) -> Tensor:
    """The magnitudes of an NF4 payload's blocks, float32 [N, G]."""
    if not format.double_quantized:
        return payload[1]
    return double_dequantize(payload[1], payload[2], payload[3], format.scale_block_size)


def _check_grid(grid: AffineGrid, format: AffineFormat, N: int, K: int) -> None:
    format.check_width(K, "affine_payload")
    wanted = (N, format.num_groups(K))
    found = [name for name, t in zip(grid._fields, grid, strict=True) if t is not None]
    needed = [name for name in format.payload_spec(N, K) if name != "packed"]
    shapes = {tuple(t.shape) for t in grid if t is not None}
    if found != needed or shapes != {wanted}:
        raise ValueError(
            f"affine_payload.grid: has {', '.join(found)} of shape {sorted(shapes)}; {format} of {N} x {K} "
            f"takes {', '.join(needed)} of shape {wanted}; `with_offset` turns any grid into one with offsets"
        )


def _dequantize(payload: list[Tensor], key: str, in_features: int, dtype: torch.dtype) -> Tensor:
    return dequantize_reference(tuple(payload), format_of_key(key), in_features, dtype)


def _mm(
    x_TK: Tensor,
    payload: list[Tensor],
    key: str,
    bias_N: Tensor | None = None,
    addend_TN: Tensor | None = None,
) -> Tensor:
    return dequantize_mm_reference(x_TK, tuple(payload), format_of_key(key), bias_N, addend_TN)


def _mm_grad_input(dy_TN: Tensor, payload: list[Tensor], key: str, in_features: int) -> Tensor:
    return dequantize_mm_grad_input_reference(dy_TN, tuple(payload), format_of_key(key), in_features)


def _dequantize_cuda(payload: list[Tensor], key: str, in_features: int, dtype: torch.dtype) -> Tensor:
    dequantized = dequantize_triton if has_kernel(payload, dtype) else dequantize_reference
    return dequantized(tuple(payload), format_of_key(key), in_features, dtype)


def _mm_cuda(
    x_TK: Tensor,
    payload: list[Tensor],
    key: str,
    bias_N: Tensor | None = None,
    addend_TN: Tensor | None = None,
) -> Tensor:
    (T, K), N = x_TK.shape, payload[0].shape[0]
    if T > 0 and has_kernel(payload, x_TK.dtype):
        tiles = choose_tiles(T, N, K, x_TK.dtype, device_limits(x_TK.device))
        if tiles is not None:
            y_TN = dequantize_mm_triton(x_TK, tuple(payload), format_of_key(key), bias_N, tiles)
            return y_TN if addend_TN is None else y_TN + addend_TN
    return linear_with_addend(x_TK, _dequantize_cuda(payload, key, K, x_TK.dtype), bias_N, addend_TN)


def _mm_grad_input_cuda(dy_TN: Tensor, payload: list[Tensor], key: str, in_features: int) -> Tensor:
    return dy_TN @ _dequantize_cuda(payload, key, in_features, dy_TN.dtype)


def has_kernel(payload: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether a weight on a CUDA device is dequantized to `dtype` by kernels."""
    wide = torch.float64 in (dtype, *(t.dtype for t in payload))
    return HAS_TRITON and not wide and device_limits(payload[0].device).capability >= LEAST_CAPABILITY


def _dequantize_fake(payload: list[Tensor], key: str, in_features: int, dtype: torch.dtype) -> Tensor:
    return payload[0].new_empty((payload[0].shape[0], in_features), dtype=dtype)


def _mm_fake(
    x_TK: Tensor,
    payload: list[Tensor],
    key: str,
    bias_N: Tensor | None = None,
    addend_TN: Tensor | None = None,
) -> Tensor:
    return x_TK.new_empty((x_TK.shape[0], payload[0].shape[0]))


def _mm_grad_input_fake(dy_TN: Tensor, payload: list[Tensor], key: str, in_features: int) -> Tensor:
    return dy_TN.new_empty((dy_TN.shape[0], in_features))


define_operator(
    "dequantize(Tensor[] payload, str format, SymInt in_features, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    CompositeExplicitAutograd=_dequantize,
    CUDA=_dequantize_cuda,
)
define_operator(
    "dequantize_mm(Tensor x_TK, Tensor[] payload, str format, Tensor? bias_N=None, "
    "Tensor? addend_TN=None) -> Tensor",
    _mm_fake,
    CompositeExplicitAutograd=_mm,
    CUDA=_mm_cuda,
)
define_operator(
    "dequantize_mm_grad_input(Tensor dy_TN, Tensor[] payload, str format, SymInt in_features) -> Tensor",
    _mm_grad_input_fake,
    CompositeExplicitAutograd=_mm_grad_input,
    CUDA=_mm_grad_input_cuda,
)
