"""Descriptions of low-bit weights: to JSON and back, what they refuse, and what they cost."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qrecipes.quant.formats import (
    AffineFormat,
    NF4Format,
    bits_per_weight,
    format_from_json,
    format_of_key,
    format_to_json,
    nearest_group_size,
)

group_sizes = st.none() | st.integers(2, 32).map(lambda n: 8 * n)
zero_points = st.sampled_from([(True, "integer"), (False, "integer"), (False, "float")])
affine_formats = st.builds(
    lambda bits, size, zero, scale, offset: AffineFormat(
        bits=bits,
        group_size=size,
        symmetric=zero[0],
        zero_point=zero[1],
        scale_dtype=scale,
        offset_dtype=offset,
    ),
    st.sampled_from([2, 3, 4, 8]),
    group_sizes,
    zero_points,
    st.sampled_from(["float32", "bfloat16", "float64"]),
    st.sampled_from(["float32", "bfloat16", "float64"]),
)
nf4_formats = st.builds(
    NF4Format,
    block_size=st.integers(2, 32).map(lambda n: 8 * n),
    double_quantized=st.booleans(),
    scale_block_size=st.integers(1, 1000),
)


@given(affine_formats | nf4_formats)
def test_formats_survive_json(format):
    assert format_from_json(json.loads(json.dumps(format_to_json(format)))) == format
    assert format_of_key(format.key) == format
    assert '"' not in format.key  # in which Inductor's C++ wrapper puts it
    assert hash(format_of_key(format.key)) == hash(format)


def test_formats_are_frozen_and_replaceable():
    format = AffineFormat(bits=3, group_size=32)
    with pytest.raises(FrozenInstanceError):
        format.bits = 4
    changed = replace(format, symmetric=False, zero_point="float")
    assert changed.key == AffineFormat(bits=3, group_size=32, symmetric=False, zero_point="float").key


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (AffineFormat(bits=4, group_size=32), 4 + 32 / 32),
        (AffineFormat(bits=4, group_size=32, scale_dtype="bfloat16"), 4 + 16 / 32),
        (AffineFormat(bits=3, group_size=128, symmetric=False), 3 + 40 / 128),
        (AffineFormat(bits=2, group_size=64, symmetric=False, zero_point="float"), 2 + 64 / 64),
        (AffineFormat(bits=8), 8 + 32 / 4096),
        (NF4Format(double_quantized=False), 4.5),
        # QLoRA, section 3: 8 / 64 + 32 / (64 * 256) beside the 4 bits; the mean's 32 bits vanish
        (NF4Format(), 4 + 0.127),
    ],
    ids=str,
)
def test_bits_per_weight_are_those_of_the_parts(format, bits):
    assert bits_per_weight(format, 4096, 4096) == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits: 5; use one of 2, 3, 4, 8"),
        ({"group_size": 12}, "group_size: 12 is no multiple of 8; use a multiple of 8 from 16 to 256"),
        ({"group_size": 512}, "group_size: 512 is out of range; use a multiple of 8"),
        ({"group_size": 36}, "group_size: 36 is no multiple"),
        ({"group_size": 32.0}, "group_size: 32.0 is no multiple"),
        ({"zero_point": "int"}, "zero_point: 'int'; use 'integer' or 'float'"),
        ({"zero_point": "float"}, "a symmetric format has no zero point; set symmetric=False"),
        ({"scale_dtype": "float16"}, "scale_dtype: 'float16'; use one of float32, bfloat16, float64"),
    ],
)
def test_wrong_affine_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AffineFormat(**arguments)


def test_wrong_nf4_formats_are_refused():
    with pytest.raises(ValueError, match=r"block_size: 100 .* QLoRA's is 64"):
        NF4Format(block_size=100)
    with pytest.raises(ValueError, match=r"scale_block_size: 0 is not positive"):
        NF4Format(scale_block_size=0)


def test_wrong_json_is_refused():
    with pytest.raises(ValueError, match=r"format.kind: 'fp4'; use one of affine, nf4"):
        format_from_json({"kind": "fp4"})
    with pytest.raises(ValueError, match=r"format.groupsize: unknown key of affine; known: bits, group_size"):
        format_from_json({"kind": "affine", "groupsize": 32})


def test_a_group_that_does_not_divide_names_the_nearest_that_does():
    with pytest.raises(
        ValueError, match=r"^q_proj: group_size 128 .* 576 input features; use group_size 144,"
    ):
        AffineFormat(group_size=128).check_width(576, "q_proj")
    with pytest.raises(ValueError, match=r"use group_size None \(one scale a row\)"):
        AffineFormat(group_size=32).check_width(100)
    AffineFormat(group_size=None).check_width(100)
    NF4Format().check_width(100)
    with pytest.raises(ValueError, match="0 input features"):
        NF4Format().check_width(0)


@given(st.integers(1, 5000), st.integers(16, 256))
def test_nearest_group_size_is_the_nearest(in_features, wanted):
    allowed = [s for s in range(16, 257) if s % 8 == 0 and in_features % s == 0]
    found = nearest_group_size(in_features, wanted)
    if found is None:
        assert not allowed
    else:
        assert found in allowed
        assert abs(found - wanted) == min(abs(s - wanted) for s in allowed)


def test_payloads_have_a_row_for_each_output():
    """What FSDP2 cuts along its first dimension; NF4's float32 scales are counted along the rows instead."""
    for format in (AffineFormat(group_size=32), AffineFormat(symmetric=False), NF4Format()):
        spec = format.payload_spec(7, 96)
        assert {shape[0] for name, (shape, _) in spec.items() if not name.startswith("absmax_")} == {7}
    assert NF4Format().payload_spec(700, 96)["absmax_scale"] == ((6,), torch.float32)
