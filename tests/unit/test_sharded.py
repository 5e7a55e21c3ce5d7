"""Reads and writes of whole tensors, without sharding; tests/multiprocess has it with."""

from __future__ import annotations

import pytest
import torch
from torchao.optim.subclass_8bit import OptimState8bit

from qrecipes.quant.sharded import flat_locals, is_composite, parts, whole, write_whole_


def test_plain_tensors_are_their_own_whole():
    tensor = torch.randn(3, 2)
    assert whole(tensor) is not None
    write_whole_(tensor, torch.ones(3, 2))
    assert (tensor == 1).all()
    assert not is_composite(tensor)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\); the tensor has \(3, 2\)"):
        write_whole_(torch.zeros(3, 2), torch.zeros(2, 3))


def test_composite_tensors_come_apart_and_can_be_overwritten():
    """Copying the parts copies the tensor, bit for bit."""
    source, target = (OptimState8bit.zeros((64, 64), signed=True, block_size=256) for _ in range(2))
    source.copy_(torch.randn(64, 64))
    assert is_composite(source)
    for name, tensor in parts(source).items():
        parts(target)[name].copy_(tensor)
    assert torch.equal(source.dequantize(), target.dequantize())
    assert source.dequantize().abs().max() > 0


def test_flat_parts_are_views_and_share_one_shape():
    tensor, other = torch.randn(3, 4), torch.randn(3, 4)
    flat, flat_other = flat_locals(tensor, other)
    assert flat.shape == flat_other.shape == (12,)
    flat.zero_()
    assert (tensor == 0).all()
    transposed = torch.randn(4, 3).t()  # elements in another order: flat, the two would not match
    assert [t.shape for t in flat_locals(tensor, transposed)] == [(3, 4), (3, 4)]
