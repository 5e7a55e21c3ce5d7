"""Low-bit weights on a device: the reference's bits, products in float64's neighborhood, nothing kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qrecipes.quant.dequantize import (
    dequantize,
    dequantize_mm,
    dequantize_mm_grad_input,
    dequantize_mm_triton,
    dequantize_reference,
    quantize_to_affine,
    quantize_to_nf4,
)
from qrecipes.quant.dequantize_tiles import MAX_FUSED_TOKENS, MatrixTiles, VectorTiles
from qrecipes.quant.formats import AffineFormat, NF4Format, Payload, WeightFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.ranges import minmax_grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = [
    AffineFormat(bits=8),
    AffineFormat(bits=8, group_size=64, symmetric=False),
    AffineFormat(bits=4, symmetric=False),
    AffineFormat(bits=4, group_size=128),
    AffineFormat(bits=4, group_size=32, symmetric=False, scale_dtype="bfloat16"),
    AffineFormat(bits=4, group_size=32, symmetric=False, zero_point="float"),
    AffineFormat(bits=3, group_size=32, symmetric=False, zero_point="float", offset_dtype="bfloat16"),
    AffineFormat(bits=3, group_size=64),
    AffineFormat(bits=2, group_size=16, symmetric=False),
    AffineFormat(bits=2),
    NF4Format(),
    NF4Format(double_quantized=False, block_size=24),
]
every_format = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f.kind}{FORMATS.index(f)}")
COPY_FRACTION = 0.7
"""Least bandwidth of dequantization to bfloat16, as a fraction of a copy's. Kernels that wait for memory
reach 0.9; the rest is for devices with a smaller ratio of arithmetic to bandwidth."""


def payload_of(w: torch.Tensor, format: WeightFormat) -> Payload:
    if isinstance(format, NF4Format):
        return quantize_to_nf4(w, format)
    return quantize_to_affine(w, minmax_grid(w, format), format)


def random_payload(N: int, K: int, format: WeightFormat, seed: int = 0) -> Payload:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    magnitude = 2.0 ** torch.randint(-9, 3, (N, 1), device="cuda", generator=generator)
    return payload_of(torch.randn(N, K, device="cuda", generator=generator) * magnitude, format)


def on_cpu(payload: Payload) -> Payload:
    return tuple(t.cpu() for t in payload)


def assert_products_are_close(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias=None) -> None:
    """Against float64: sums of up to 11008 products in float32, in parts, and one rounding of the output."""
    exact, scale = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    bound = 2e-6 * scale + torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    assert bool(((y.double() - exact).abs() <= bound).all())


@every_format
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (70, 768), (5, 4096), (257, 11008)], ids=str)
def test_weights_have_the_bits_of_the_reference_on_the_cpu(shape, dtype, format):
    N, K = shape
    if isinstance(format, AffineFormat) and K % (format.group_size or 1):
        pytest.skip("the groups do not divide the rows")
    payload = random_payload(N, K, format)
    found = dequantize(payload, format, K, dtype).cpu()
    wanted = dequantize_reference(on_cpu(payload), format, K, dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(
    format=st.sampled_from([f for f in FORMATS if isinstance(f, NF4Format) or f.group_size is None]),
    N=st.integers(1, 9),
    K=st.integers(1, 600),
    T=st.sampled_from([1, 2, 16, 33, 64, 65]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
def test_ragged_weights_and_products(format, N, K, T, dtype, seed):
    payload = random_payload(N, K, format, seed)
    w = dequantize(payload, format, K, dtype)
    assert torch.equal(w.cpu(), dequantize_reference(on_cpu(payload), format, K, dtype))
    x, bias = torch.randn(T, K, device="cuda").to(dtype), torch.randn(N, device="cuda").to(dtype)
    y = dequantize_mm(x, payload, format, bias)
    if T > MAX_FUSED_TOKENS:  # torch's own product, whose bfloat16 sums cuBLAS may add up in bfloat16
        assert torch.equal(y, torch.nn.functional.linear(x, w, bias))
    else:
        assert_products_are_close(y, x, w, bias)


@every_format
@pytest.mark.parametrize("T", [1, 2, 16, 17, 64, MAX_FUSED_TOKENS + 1, 512])
@pytest.mark.parametrize("shape", [(384, 768), (4096, 4096), (1024, 11008)], ids=str)
def test_products_are_those_of_the_references_weight(shape, T, format):
    (N, K), dtype = shape, torch.bfloat16
    payload = random_payload(N, K, format)
    w = dequantize(payload, format, K, dtype)
    x, bias = torch.randn(T, K, device="cuda", dtype=dtype), torch.randn(N, device="cuda", dtype=dtype)
    y = dequantize_mm(x, payload, format, bias)
    assert_products_are_close(y, x, w, bias)
    dy = torch.randn(T, N, device="cuda", dtype=dtype)
    assert_products_are_close(dequantize_mm_grad_input(dy, payload, format, K), dy, w.t())


@pytest.mark.parametrize("T", [1, 16, 64])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_products_repeat_bit_for_bit_however_they_are_split(T, splits):
    format = AffineFormat(bits=4, group_size=128, symmetric=False)
    payload = random_payload(1024, 4096, format)
    x = torch.randn(T, 4096, device="cuda", dtype=torch.bfloat16)
    tiles = VectorTiles(splits=splits) if T == 1 else MatrixTiles(T, splits=splits)
    first = dequantize_mm_triton(x, payload, format, None, tiles)
    assert_products_are_close(first, x, dequantize(payload, format, 4096, torch.bfloat16))
    for _ in range(20):
        assert torch.equal(dequantize_mm_triton(x, payload, format, None, tiles), first)


@every_format
def test_float64_is_computed_as_on_the_cpu(format):
    payload = random_payload(5, 768, format)
    wanted = dequantize_reference(on_cpu(payload), format, 768, torch.float64)
    assert torch.equal(dequantize(payload, format, 768, torch.float64).cpu(), wanted)


def test_offsets_beyond_int32_reach_the_right_weights():
    """An output of more than 2**31 elements, checked at its ends."""
    N, K = 70_000, 32_768
    format = AffineFormat(bits=2, group_size=256)
    packed = torch.randint(0, 256, (N, K // 4), dtype=torch.uint8, device="cuda")
    payload = (packed, torch.rand(N, K // 256, device="cuda"))
    found = dequantize(payload, format, K, torch.bfloat16)
    for rows in (slice(0, 50), slice(N - 50, N)):
        part = tuple(t[rows].cpu() for t in payload)
        assert torch.equal(found[rows].cpu(), dequantize_reference(part, format, K, torch.bfloat16))


@every_format
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_compiled_layers_equal_eager_ones_in_both_passes(tokens, format):
    layer = QuantLinear.from_linear(nn.Linear(768, 512, device="cuda", dtype=torch.bfloat16), format)
    model = nn.Sequential(layer, nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16)
    outcomes = []
    for run in (model, compiled):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        outcomes.append([y.detach(), leaf.grad, layer.bias.grad])
    for eager, of_compiled in zip(*outcomes, strict=True):
        # the same operators between others that Inductor fuses: a rounding of bfloat16, relative to the norm
        error = (eager.float() - of_compiled.float()).norm() / eager.float().norm()
        assert error < 2**-7


@pytest.mark.parametrize("format", [FORMATS[4], FORMATS[6], FORMATS[10]], ids=["int4", "int3", "nf4"])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("tokens", [8, 256])
def test_nothing_of_a_weights_size_is_kept_after_the_forward_pass(tokens, is_compiled, format):
    """Eight layers of 2048 x 2048: a dequantized weight takes 8.4 MB, an output of 256 tokens 1 MB."""
    width, layers = 2048, 8
    weight_bytes = 2 * width * width
    linear = nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16)
    blocks = [QuantLinear.from_linear(linear, format) for _ in range(layers)]
    del linear
    model = nn.Sequential(*blocks)
    run = torch.compile(model, fullgraph=True) if is_compiled else model
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    run(x).sum().backward()  # compiles, and leaves what the libraries keep
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(x)
    outputs = 2 * tokens * width
    assert torch.cuda.memory_allocated() - before <= layers * outputs + 2**16
    y.sum().backward()
    # one temporary at a time, besides activations and their gradients
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * weight_bytes + (layers + 4) * outputs + 2**20


def median_ms(function) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=200, return_mode="median")


@pytest.mark.parametrize("format", [FORMATS[4], FORMATS[10]], ids=["int4", "nf4"])
def test_dequantization_is_about_as_fast_as_a_copy_of_as_many_bytes(format):
    N, K = 11008, 8192  # larger than an L2 cache
    payload = random_payload(N, K, format)
    num_bytes = sum(t.numel() * t.element_size() for t in payload) + 2 * N * K
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    dequantize_ms = median_ms(lambda: dequantize(payload, format, K, torch.bfloat16))
    copy_ms = median_ms(lambda: target.copy_(source))
    assert copy_ms / dequantize_ms > COPY_FRACTION, f"{copy_ms:.3f} ms, {dequantize_ms:.3f} ms"


@pytest.mark.parametrize("format", [FORMATS[4], FORMATS[10]], ids=["int4", "nf4"])
@pytest.mark.parametrize("T", [1, 16])
def test_products_of_few_tokens_are_faster_than_in_bfloat16(T, format):
    N, K = 11008, 8192
    payload = random_payload(N, K, format)
    w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    low_bit_ms = median_ms(lambda: dequantize_mm(x, payload, format))
    plain_ms = median_ms(lambda: x @ w.t())
    assert low_bit_ms < plain_ms, f"{low_bit_ms:.3f} ms, {plain_ms:.3f} ms"
