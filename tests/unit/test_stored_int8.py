"""A weight stored as INT8: its arithmetic against NumPy in float64, and what may be done with the tensor."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qrecipes.quant import stored_int8
from qrecipes.quant.sharded import is_composite, parts
from qrecipes.quant.stored_int8 import StoredInt8, dequantize_groups, plain_parts

DRAWS = 4096
ROUNDED_TWICE = 2.0**-22
"""Relative error of q * scale where the scale and the product are each rounded to float32."""


def exact(stored: StoredInt8) -> np.ndarray:
    """q * scale in float64, scales repeated over their groups."""
    size = stored.shape[1] // stored.scale.shape[1]
    return stored.q.numpy().astype(np.float64) * np.repeat(stored.scale.double().numpy(), size, axis=1)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 1000),
)
def test_each_group_is_rounded_to_nearest_on_its_own_grid(rows, groups, size, dtype, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, groups * size, generator=generator) * 2.0**exponent).to(dtype)
    stored = StoredInt8.of(weight, size)
    assert (stored.shape, stored.dtype) == (weight.shape, dtype)
    assert stored.scale.shape == (rows, groups)
    values = weight.double().numpy().reshape(rows, groups, size)
    scale = np.abs(values).max(-1, keepdims=True) / 127 if rows else np.zeros((0, groups, 1))
    error = np.abs(exact(stored).reshape(values.shape) - values)
    assert (error <= scale * (0.5 + 1e-4)).all()  # half a step; scale and quotient are rounded to float32
    torch.testing.assert_close(
        stored.dequantize().double(), torch.from_numpy(exact(stored)), rtol=ROUNDED_TWICE, atol=0
    )


def test_one_scale_a_row_is_one_group_of_all_inputs():
    weight = torch.randn(6, 40)
    row, group = StoredInt8.of(weight), StoredInt8.of(weight, 40)
    assert torch.equal(row.q, group.q)
    assert torch.equal(row.scale, group.scale)


def test_small_groups_keep_more_of_a_row_with_one_large_weight():
    weight = torch.randn(8, 64)
    weight[:, 3] *= 100
    errors = [(StoredInt8.of(weight, size).dequantize() - weight)[:, 32:].abs().max() for size in (64, 32)]
    assert errors[1] < errors[0] / 10


def test_dequantizing_into_memory_equals_dequantizing():
    stored = StoredInt8.of(torch.randn(6, 40), 8)
    out = torch.empty(6, 40)
    assert stored.dequantize(out=out) is out
    assert torch.equal(out, stored.dequantize())
    assert torch.equal(out.bfloat16(), dequantize_groups(stored.q, stored.scale, torch.bfloat16))


@settings(deadline=None, max_examples=40)
@given(
    exponent=st.integers(-30, 30),
    group_size=st.sampled_from([None, 8]),
    stochastic=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_its_own_value_changes_no_bit(exponent, group_size, stochastic, seed):
    """Whatever is drawn: rounding down shows every quotient that is a little below its integer."""
    generator = torch.Generator().manual_seed(seed)
    stored = StoredInt8.of(torch.randn(64, 32, generator=generator) * 2.0**exponent, group_size)
    q, scale = stored.q.clone(), stored.scale.clone()

    def rounding_down(rows, *, stochastic_rounding):
        scale = rows.abs().amax(1, keepdim=True) / 127
        return torch.floor(rows / scale).to(torch.int8), scale

    with pytest.MonkeyPatch.context() as patch:
        if stochastic:
            patch.setattr(stored_int8, "quantize_rows", rounding_down)
        stored.requantize_(stored.dequantize(), stochastic=stochastic)
    assert torch.equal(stored.q, q)
    assert torch.equal(stored.scale, scale)


def test_rounding_alone_would_not_give_lattice_points_back():
    """The reason why unchanged groups are kept: stochastic rounding sees fractions where there are none."""
    stored = StoredInt8.of(torch.randn(256, 32))
    grid = stored.dequantize() / stored.scale
    assert not torch.equal(grid, stored.q.float())


def test_only_groups_with_another_value_are_rounded_anew():
    stored = StoredInt8.of(torch.randn(8, 32), 8)
    q, scale = stored.q.clone(), stored.scale.clone()
    value = stored.dequantize()
    value[2, 9] *= 1.5
    stored.requantize_(value, stochastic=True)
    other = torch.ones(8, 4, dtype=torch.bool)
    other[2, 1] = False
    assert torch.equal(stored.scale[other], scale[other])
    assert torch.equal(stored.q.view(8, 4, 8)[other], q.view(8, 4, 8)[other])
    assert stored.scale[2, 1] == value[2, 8:16].abs().max() / 127


def test_where_the_scale_stays_entries_with_their_own_value_keep_their_bits():
    stored = StoredInt8.of(torch.randn(512, 64))
    q, scale = stored.q.clone(), stored.scale.clone()
    largest = stored.dequantize().abs().argmax(1)
    value = stored.dequantize()
    value[largest != 0, 0] *= 0.5
    for _ in range(20):
        stored.requantize_(value, stochastic=True)
        assert torch.equal(stored.q[:, 1:], q[:, 1:])
        assert torch.equal(stored.scale, scale)
    assert not torch.equal(stored.q[:, 0], q[:, 0])


def test_stochastic_rounding_is_right_on_average_by_the_stored_scale():
    row = torch.tensor([1.7, 0.31, -0.017, -1.1, 0.5, 0.0])
    stored = StoredInt8.of(torch.zeros(DRAWS, 6))
    stored.requantize_(row.expand(DRAWS, 6).contiguous(), stochastic=True)
    step = 1.7 / 127
    bias = stored.dequantize().double().mean(0) - row.double()
    assert (
        bias.abs() < 6 * 0.5 * step / math.sqrt(DRAWS)
    ).all()  # six standard errors of a spread of half a step
    assert stored.q.unique(dim=0).shape[0] > 8  # four values between two lattice points


def test_rounding_repeats_under_one_seed():
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        stored = StoredInt8.of(torch.zeros(8, 64))
        stored.requantize_(torch.linspace(-1, 1, 512).view(8, 64), stochastic=True)
        found.append(stored.q.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_replacing_compiled_as_for_a_gpu_equals_eager():
    """One graph for many shapes, whose sizes are symbols."""
    compiled = torch.compile(stored_int8._replace_moved_, fullgraph=True, dynamic=True, backend="aot_eager")
    for N, K, group_size in (
        (64, 32, None),
        (48, 40, None),
        (48, 40, 8),
        (30, 48, 16),
        (1, 7, None),
        (0, 8, 4),
    ):
        ours, eager = (StoredInt8.of(torch.ones(N, K), group_size) for _ in range(2))
        value, untouched = torch.randn(N, K), ours.dequantize()
        value[::3] = untouched[::3]
        new = StoredInt8.of(value, group_size)
        for function, stored in ((compiled, ours), (stored_int8._replace_moved_, eager)):
            function(stored.q, stored.scale, new.q, new.scale, value)
        assert torch.equal(ours.q, eager.q)
        assert torch.equal(ours.scale, eager.scale)
        assert torch.equal(ours.q[1:2], new.q[1:2])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_shows(poison):
    stored = StoredInt8.of(torch.randn(3, 8))
    value = stored.dequantize()
    value[1, 2] = poison
    stored.requantize_(value, stochastic=True)
    assert torch.isfinite(stored.dequantize()).all(1).tolist() == [True, False, True]


def test_a_copy_writes_values_rounded_to_nearest():
    stored, weight = StoredInt8.of(torch.randn(6, 40)), torch.randn(6, 40)
    with torch.no_grad():
        stored.copy_(weight)
    assert torch.equal(stored.q, StoredInt8.of(weight).q)
    source = StoredInt8.of(torch.randn(6, 40))
    with torch.no_grad():
        stored.copy_(source)
    assert torch.equal(stored.q, source.q)
    assert stored.q.data_ptr() != source.q.data_ptr()


def test_reading_computes_on_the_dequantized_weight():
    stored = StoredInt8.of(torch.randn(6, 40).bfloat16())
    x = torch.randn(3, 40).bfloat16()
    plain = stored.dequantize().bfloat16()
    assert torch.equal(nn.functional.linear(x, stored), nn.functional.linear(x, plain))
    assert torch.equal(stored, plain)
    assert type(stored + 1) is torch.Tensor
    assert stored.norm() == plain.norm()
    assert stored[:, :4].dtype is torch.bfloat16
    target = torch.empty(6, 40)
    target.copy_(stored)
    assert torch.equal(target, plain.float())


LOST = r"lost; train the weight with .*build_optimizer, or compute the new value and give it to requantize_"
WRITES = {
    "add_": lambda w: w.add_(1),
    "zero_": lambda w: w.zero_(),
    "mul_": lambda w: w.mul_(2),
    "fill_": lambda w: w.fill_(2),
    "foreach_add_": lambda w: torch._foreach_add_([torch.zeros(6, 40), w], 1),
    "foreach_zero_": lambda w: torch._foreach_zero_([w]),
    "foreach_copy_": lambda w: torch._foreach_copy_([w], [torch.ones(6, 40)]),
    "out": lambda w: torch.add(w, 1, out=w),
    "an entry": lambda w: w.__setitem__((0, 0), 1.0),
    "a row": lambda w: w.__setitem__(0, 0.0),
    "columns": lambda w: w[:, :2].zero_(),
    "a view of a view": lambda w: w.t()[3].view(2, 3).zero_(),
    "a transpose": lambda w: w.t().copy_(torch.ones(40, 6)),
    "unbound": lambda w: w.unbind(1)[0].add_(1),
    "rows": lambda w: w[1:3].zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_other_writes_are_refused(write):
    stored = StoredInt8.of(torch.randn(6, 40))
    before = stored.dequantize()
    with pytest.raises(NotImplementedError, match=LOST):
        write(stored)
    assert torch.equal(stored.dequantize(), before)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("way", ["fused", "foreach", "neither"])
def test_optimizers_that_do_not_know_it_are_refused(optimizer, way):
    """Several write many tensors by one operator, which would have changed copies."""
    weight = nn.Parameter(StoredInt8.of(torch.randn(6, 40)))
    ways = {name: name == way for name in ("fused", "foreach")}
    optimizer = optimizer([weight, nn.Parameter(torch.zeros(3))], lr=0.1, **ways)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones(p.shape)
    with pytest.raises(NotImplementedError, match=LOST):
        optimizer.step()


def test_views_read_the_dequantized_weight_and_have_its_gradient():
    stored = StoredInt8.of(torch.randn(6, 40))
    plain = stored.dequantize()
    views = {
        "column": lambda w: w[:, 3],
        "transpose": lambda w: w.t()[2:],
        "flat": lambda w: w.t().reshape(-1),
    }
    for name, view in views.items():
        assert torch.equal(view(stored) * 2, view(plain) * 2), name
        assert torch.equal(view(stored).clone(), view(plain)), name
        weight = nn.Parameter(stored)
        view(weight).sum().backward()
        reference = plain.clone().requires_grad_()
        view(reference).sum().backward()
        assert type(weight.grad) is torch.Tensor, name
        assert torch.equal(weight.grad, reference.grad), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StoredInt8.of(torch.randn(6, 40), 7),
            r"group_size 7 does not divide 40 inputs; use a divisor",
        ),
        (lambda: StoredInt8.of(torch.randn(6)), r"shape \(6,\), where a matrix is needed"),
        (
            lambda: StoredInt8.of(torch.randn(6, 4, dtype=torch.float16)),
            r"float16 is not bfloat16 or float32",
        ),
        (lambda: StoredInt8.of(torch.randn(6, 4)).half(), r"float16 is not bfloat16 or float32"),
        (
            lambda: StoredInt8(torch.zeros(6, 4, dtype=torch.int8), torch.ones(5, 1), torch.float32),
            r"shape \(5, 1\) for values of \(6, 4\); give a scale for each row",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moving_copying_and_converting_keep_it_stored():
    stored = StoredInt8.of(torch.randn(6, 40), 8)
    for other in (
        stored.detach(),
        stored.clone(),
        copy.deepcopy(stored),
        copy.deepcopy(nn.Parameter(stored)),
        nn.Parameter(stored),
        stored.to(torch.bfloat16),
        stored.to("meta"),
    ):
        assert isinstance(other, StoredInt8)
        assert other.q.dtype is torch.int8
        assert other.scale.shape == (6, 5)
    assert stored.to(torch.bfloat16).dtype is torch.bfloat16
    assert torch.equal(stored.to(torch.bfloat16).scale, stored.scale)
    assert copy.deepcopy(stored).q.data_ptr() != stored.q.data_ptr()
    assert is_composite(stored)
    assert {name: t.dtype for name, t in parts(stored).items()} == {"q": torch.int8, "scale": torch.float32}


def test_a_module_with_it_moves():
    module = nn.Linear(40, 6)
    module.weight = nn.Parameter(StoredInt8.of(module.weight, 8))
    before = module.weight
    q = before.q.clone()
    module.to("cpu")
    module.to(torch.bfloat16)
    assert module.weight is before
    assert (before.dtype, before.requires_grad) == (torch.bfloat16, True)
    assert torch.equal(before.q, q)


def test_new_tensors_are_plain_and_rows_are_cut_on_the_same_memory():
    stored = StoredInt8.of(torch.randn(7, 40).bfloat16())
    for fresh in (
        torch.zeros_like(stored),
        torch.empty_like(stored),
        stored.new_zeros(3),
        stored.new_empty(0),
    ):
        assert type(fresh) is torch.Tensor
        assert fresh.dtype is torch.bfloat16
    assert torch.zeros_like(stored, dtype=torch.float32).dtype is torch.float32
    first, second = stored.chunk(2)
    assert (first.shape, second.shape) == ((4, 40), (3, 40))
    assert second.q.data_ptr() == stored.q[4:].data_ptr()
    assert torch.equal(second.dequantize(), stored.dequantize()[4:])
    assert first.num_rows == second.num_rows == 7
    with torch.no_grad():
        stored.new_zeros(9, 40).narrow(0, 0, 7).copy_(stored)


def test_plain_parts_alias_the_weight():
    weight = nn.Parameter(StoredInt8.of(torch.randn(6, 40)))
    q, scale = plain_parts(weight)
    assert (q.data_ptr(), scale.data_ptr()) == (weight.q.data_ptr(), weight.scale.data_ptr())
    assert not q.requires_grad
    assert not scale.requires_grad
