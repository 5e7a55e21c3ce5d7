"""The permutation without memory is one, and looks drawn by lot."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrecipes.data import order as order_module
from qrecipes.data.order import Order
from qrecipes.data.shuffle import Shuffle


@given(n=st.integers(1, 400), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_every_number_comes_once(n, seed, epoch):
    shuffle = Shuffle(n, seed, epoch)
    assert sorted(shuffle[position] for position in range(n)) == list(range(n))


@given(n=st.integers(2**24, 10**13), seed=st.integers(0, 2**40), data=st.data())
def test_numbers_of_huge_permutations_lie_in_range_and_differ(n, seed, data):
    shuffle = Shuffle(n, seed, 0)
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=20, unique=True))
    numbers = [shuffle[position] for position in positions]
    assert len(set(numbers)) == len(positions)
    assert all(0 <= number < n for number in numbers)


def test_each_number_comes_equally_often_at_each_position():
    counts = Counter((i, Shuffle(5, seed, 3)[i]) for seed in range(4000) for i in range(5))
    chi_squared = sum((count - 800) ** 2 / 800 for count in counts.values())
    assert len(counts) == 25
    assert chi_squared < 40  # 16 degrees of freedom: exceeded by chance once in 1,300


@pytest.mark.parametrize("n", [100_000, 2**31, 97_656_250])
def test_neighbours_are_scattered_as_if_by_lot(n):
    """Numbers at consecutive positions, and the steps between them, fill their range evenly."""
    numbers = np.array([Shuffle(n, 7, 1)[position] for position in range(n // 3, n // 3 + 8000)], np.float64)
    for sample in (numbers / n, np.diff(numbers) % n / n):
        counts, _ = np.histogram(sample, 50, (0, 1))
        expected = len(sample) / 50
        # 49 degrees of freedom: exceeded by chance once in 10,000
        assert ((counts - expected) ** 2 / expected).sum() < 95
    correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(correlation) < 0.05  # standard deviation 1 / sqrt(8000) = 0.011


def test_epochs_and_seeds_have_permutations_of_their_own():
    drawn = {
        tuple(Shuffle(50, seed, epoch)[i] for i in range(50)) for seed in range(20) for epoch in range(20)
    }
    assert len(drawn) == 400


def test_an_epoch_of_a_huge_source_takes_no_memory_and_every_item_once(monkeypatch):
    order = Order(order_module.MOST_DRAWN + 1, seed=0, shuffle=True)
    assert order.item(123) == order.item(123)
    assert order.item(123).index != order.item(order_module.MOST_DRAWN + 1 + 123).index  # the next epoch
    assert len(pickle.dumps(order)) < 10_000  # bytes, where an array would take eight times 2^24
    monkeypatch.setattr(order_module, "MOST_DRAWN", 30)
    items = [Order(31, seed=0, shuffle=True).item(position) for position in range(62)]
    assert Counter((item.epoch, item.index) for item in items) == Counter(
        (e, i) for e in (0, 1) for i in range(31)
    )


def test_the_order_of_a_source_that_is_not_huge_is_what_it_was():
    """Runs that were begun with a drawn permutation resume with it."""
    drawn = np.random.default_rng([5, 2]).permutation(40)
    items = [Order(40, seed=5, shuffle=True).item(position) for position in range(80, 120)]
    assert [item.index for item in items] == drawn.tolist()
