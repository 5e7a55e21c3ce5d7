"""Packed integers against the definition, a stream of bits, written out with Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.quant.packing import BITS, pack, packed_width, signed_range, unpack


def packed_by_hand(codes: list[int], bits: int) -> list[int]:
    """A row as one long integer: value i from bit i * bits on, lowest byte first."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(stream.to_bytes(-(-len(codes) * bits // 8), "little"))


@st.composite
def integers(draw) -> tuple[torch.Tensor, int, bool]:
    """A matrix of integers, how many bits they have, and whether they are signed."""
    bits, signed = draw(st.sampled_from(BITS)), draw(st.booleans())
    rows, width = draw(st.integers(0, 4)), draw(st.integers(1, 70))
    low = signed_range(bits)[0] if signed else 0
    values = draw(st.lists(st.integers(low, low + 2**bits - 1), min_size=rows * width, max_size=rows * width))
    dtype = draw(st.sampled_from([torch.int8 if signed else torch.uint8, torch.int32, torch.int64]))
    return torch.tensor(values, dtype=dtype).reshape(rows, width), bits, signed


@settings(deadline=None, max_examples=150)
@given(integers())
def test_packing_is_the_stream_of_bits_and_unpacking_its_inverse(case):
    q, bits, signed = case
    packed = pack(q, bits, signed=signed)
    assert packed.dtype is torch.uint8
    assert packed.shape == (q.shape[0], packed_width(q.shape[1], bits))
    first_code = signed_range(bits)[0] if signed and bits < 8 else 0
    codes = [[(value - first_code) % 2**bits for value in row] for row in q.tolist()]
    assert packed.tolist() == [packed_by_hand(row, bits) for row in codes]
    restored = unpack(packed, bits, q.shape[1], signed=signed)
    assert restored.dtype is (torch.int8 if signed else torch.uint8)
    assert torch.equal(restored.long(), q.long())


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(BITS), st.integers(1, 40), st.binary(min_size=1, max_size=120))
def test_every_byte_string_survives_unpacking(bits, width, content):
    """Where rows fill their bytes, packing is the inverse of unpacking, too: no code is lost or doubled."""
    width = width * 8
    rows = len(content) // packed_width(width, bits)
    packed = torch.tensor(list(content[: rows * packed_width(width, bits)]), dtype=torch.uint8)
    packed = packed.reshape(rows, packed_width(width, bits))
    assert torch.equal(pack(unpack(packed, bits, width), bits), packed)


@pytest.mark.parametrize(("bits", "bytes_"), [(2, 8), (3, 12), (4, 16), (8, 32)])
def test_32_values_take_no_byte_more_than_their_bits(bits, bytes_):
    assert pack(torch.zeros(5, 32, dtype=torch.int8), bits).shape == (5, bytes_)


def test_rows_are_cut_and_joined_without_unpacking():
    """What FSDP2 does with a payload: rows start at bytes of their own, ragged widths included."""
    q = torch.randint(-4, 4, (6, 13))
    packed = pack(q, 3)
    assert torch.equal(torch.cat([pack(q[:1], 3), pack(q[1:], 3)]), packed)
    assert torch.equal(unpack(packed[2:5], 3, 13).long(), q[2:5])


def test_leading_dimensions_and_strides_do_not_matter():
    q = torch.randint(-8, 8, (3, 9, 4)).transpose(1, 2)
    assert torch.equal(pack(q, 4), pack(q.contiguous(), 4))
    assert torch.equal(unpack(pack(q, 4), 4, 9).long(), q)


def test_signed_8_bits_are_the_int8_bytes():
    q = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert torch.equal(pack(q, 8).view(torch.int8), q)


@pytest.mark.parametrize("bits", [3, 4])
def test_compiled_packing_equals_eager(bits):
    q = torch.randint(*signed_range(bits), (5, 21), dtype=torch.int8)
    packed = pack(q, bits)
    assert torch.equal(torch.compile(pack, fullgraph=True)(q, bits), packed)
    assert torch.equal(torch.compile(unpack, fullgraph=True)(packed, bits, 21), q)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"pack.bits: 5; use one of 2, 3, 4, 8"):
        pack(torch.zeros(1, 8, dtype=torch.int8), 5)
    with pytest.raises(ValueError, match=r"pack.q: torch.float32 is not an integer type"):
        pack(torch.zeros(1, 8), 4)
    with pytest.raises(ValueError, match=r"9 values of 3 bits are torch.uint8 rows of 4 bytes"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 3, 9)
    with pytest.raises(ValueError, match=r"unpack.packed: torch.int8"):
        unpack(torch.zeros(1, 4, dtype=torch.int8), 4, 8)
