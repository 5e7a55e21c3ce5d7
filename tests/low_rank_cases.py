"""Weights with a low-rank correction inside their rounding for tests, and their dense twin in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from qrecipes.quant.low_rank_storage import MOST_BITS, LowRankRounding, decode, encode


class Case(NamedTuple):
    """The tensors of one weight, in the order in which functions take them."""

    phi: Tensor
    a: Tensor | None
    b: Tensor | None
    scale: Tensor
    zero: Tensor | None
    rounding: LowRankRounding


def make_case(
    rounding: LowRankRounding,
    N: int,
    rank: int,
    *,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
    seed: int = 0,
) -> Case:
    """A random weight whose levels reach beyond the grid; scales and zero points are random, too.

    With `exact`, phi, A and B are multiples of 1/64 and 1/8, so that every Z is exact in float32 in whatever
    order A B is summed, and halves are frequent.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    K, G, reach = rounding.in_features, rounding.num_groups, 2.0 ** (rounding.bits - 2)
    levels = normal(N, K) * reach
    phi = encode((levels * 64).round() / 64 if exact else levels, rounding)
    a = b = zero = None
    if rank > 0:
        a, b = normal(N, rank), normal(rank, K)
        if exact:
            a, b = ((t * 8).round().clamp(-16, 16) / 8 for t in (a, b))
        a, b = a.to(dtype), b.to(dtype)
    scale = normal(N, G).abs() * 0.1 + 0.01
    if not symmetric:
        zero = normal(N, G) * reach
    return Case(phi, a, b, scale, zero, rounding)


@st.composite
def roundings(draw) -> LowRankRounding:
    """Every storage, width and way to group, also ragged rows."""
    storage = draw(st.sampled_from(sorted(MOST_BITS)))
    group_size = draw(st.sampled_from([None, None, 8, 24, 32, 136]))
    K = draw(st.integers(1, 150)) if group_size is None else group_size * draw(st.integers(1, 3))
    return LowRankRounding(
        bits=draw(st.integers(2, MOST_BITS[storage])),
        in_features=K,
        group_size=group_size,
        storage=storage,
        scaling=draw(st.sampled_from([0.0, 0.25, 1.0])),
    )


@st.composite
def cases(draw, *, exact: bool = True, most_rows: int = 9) -> Case:
    """A weight of any rounding, rank 0 among them."""
    return make_case(
        draw(roundings()),
        draw(st.integers(1, most_rows)),
        draw(st.sampled_from([0, 1, 3, 16, 70])),
        symmetric=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        exact=exact,
        seed=draw(st.integers(0, 2**31)),
    )


def z_in_float64(case: Case) -> Tensor:
    """Z [N, K] before it is rounded."""
    z = decode(case.phi, case.rounding).double()
    if case.a is not None:
        z = z + case.rounding.scaling * (case.a.double() @ case.b.double())
    return z


def leaves(case: Case) -> Case:
    """The same in float64, what trains as leaves."""
    a, b, scale, zero = (
        None if t is None else t.detach().double().requires_grad_()
        for t in (case.a, case.b, case.scale, case.zero)
    )
    return Case(case.phi, a, b, scale, zero, case.rounding)


def dense_weight(case: Case) -> Tensor:
    """W_hat [N, K] by autograd's own operations, with a straight-through round, in the type of the scales."""
    least, greatest = -(2 ** (case.rounding.bits - 1)), 2 ** (case.rounding.bits - 1) - 1

    def level(x: Tensor) -> Tensor:
        rounded = x.round().detach() + (x - x.detach())  # an integer, exactly
        inside = (rounded >= least) & (rounded <= greatest)
        # torch 2.14's clamp has no gradient at its bounds, torch 2.13's has
        return torch.where(inside, rounded, rounded.detach().clamp(least, greatest))

    q = level(z_in_float64(case) if case.a is None else _z(case))
    q = q.unflatten(1, (case.rounding.num_groups, -1))
    if case.zero is not None:
        q = q - level(case.zero).unsqueeze(-1)
    return (q * case.scale.unsqueeze(-1)).flatten(1)


def _z(case: Case) -> Tensor:
    assert case.a is not None
    return decode(case.phi, case.rounding).double() + case.rounding.scaling * (case.a @ case.b)
