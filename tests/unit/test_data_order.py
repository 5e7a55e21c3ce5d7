"""The global order of sequences does not depend on ranks, batch size or accumulation, and resumes exactly."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.order import IndexedTrainingData, Order, Share, ValidationData
from qrecipes.data.sequences import Sequences, TokenStream, cut
from qrecipes.errors import CheckpointError, DataError

SMALL = st.integers(1, 5)


class Numbered:
    """A source whose item is its own (epoch, index)."""

    def __init__(self, num_items: int | None) -> None:
        self.num_items = num_items

    def read(self, items) -> Batch:
        rows = [(-1, -1) if item is None else (item.epoch, item.index) for item in items]
        targets = [IGNORE if item is None else item.index for item in items]
        return Batch(torch.tensor(rows), torch.tensor(targets))

    def max_token(self) -> int:
        return 0

    def describe(self) -> str:
        return ""


def training(num_items, *, seed=0, shuffle=True, batch_size=1, rank=0, world=1, prefetch=False):
    order = Order(num_items, seed=seed, shuffle=shuffle)
    return IndexedTrainingData(Numbered(num_items), order, Share(batch_size, rank, world), prefetch=prefetch)


def drawn(parts, micro_batches):
    """(epoch, index) of every row, micro-batch by micro-batch, rank by rank."""
    rows = [part.next_batch().inputs for _ in range(micro_batches) for part in parts]
    return [tuple(row) for row in torch.cat(rows).tolist()]


def ranks(num_items, *, batch_size, world, **kwargs):
    return [training(num_items, batch_size=batch_size, rank=r, world=world, **kwargs) for r in range(world)]


@given(n=st.integers(1, 20), batch_size=SMALL, world=SMALL, seed=st.integers(0, 2**40), shuffle=st.booleans())
def test_order_is_that_of_one_rank_with_one_row(n, batch_size, world, seed, shuffle):
    parts = ranks(n, batch_size=batch_size, world=world, seed=seed, shuffle=shuffle)
    alone = ranks(n, batch_size=1, world=1, seed=seed, shuffle=shuffle)
    assert drawn(parts, 4) == drawn(alone, 4 * batch_size * world)


@given(n=st.integers(1, 20), before=st.tuples(SMALL, SMALL), after=st.tuples(SMALL, SMALL), steps=SMALL)
def test_resume_in_another_world_goes_on_exactly(n, before, after, steps):
    first = ranks(n, batch_size=before[0], world=before[1])
    head = drawn(first, steps)
    states = [json.loads(json.dumps(part.state_dict())) for part in first]
    assert all(state == states[0] for state in states)
    second = ranks(n, batch_size=after[0], world=after[1])
    for part in second:
        part.load_state_dict(states[0])
    whole = head + drawn(second, 3)
    assert whole == drawn(ranks(n, batch_size=1, world=1), len(whole))


@given(n=st.integers(1, 30), epochs=st.integers(1, 3), seed=st.integers(0, 2**40))
def test_every_item_comes_once_an_epoch(n, epochs, seed):
    rows = drawn([training(n, seed=seed)], n * epochs)
    assert Counter(rows) == Counter((epoch, index) for epoch in range(epochs) for index in range(n))
    assert [epoch for epoch, _ in rows] == [epoch for epoch in range(epochs) for _ in range(n)]


def test_epochs_and_seeds_differ_in_order():
    first, second = drawn([training(50)], 50), drawn([training(50)], 100)[50:]
    assert [i for _, i in first] != [i for _, i in second]
    assert first != drawn([training(50, seed=1)], 50)
    assert [i for _, i in drawn([training(50, shuffle=False)], 100)] == [*range(50), *range(50)]


def test_epoch_is_that_of_the_next_row():
    data = training(4, batch_size=2)
    assert [(data.next_batch() and data.epoch) for _ in range(4)] == [0, 1, 1, 2]


def test_endless_source_has_one_epoch_in_order():
    assert drawn([training(None, batch_size=3)], 2) == [(0, i) for i in range(6)]


def test_prefetching_changes_nothing_and_resumes():
    plain, ahead = training(7, batch_size=3), training(7, batch_size=3, prefetch=True)
    assert drawn([plain], 5) == drawn([ahead], 5)
    assert plain.state_dict() == ahead.state_dict()
    ahead.load_state_dict({"position": 3, "num_sequences": 7})
    plain.load_state_dict({"position": 3, "num_sequences": 7})
    assert drawn([plain], 5) == drawn([ahead], 5)


def test_state_of_other_data_is_refused():
    with pytest.raises(CheckpointError, match="made with 5 sequences an epoch, now there are 7"):
        training(7).load_state_dict(training(5).state_dict())
    with pytest.raises(CheckpointError, match="streamed"):
        training(7).load_state_dict({"rank": 0, "world": 1})


@given(n=st.integers(1, 30), batch_size=SMALL, world=SMALL)
def test_held_out_items_come_once_over_all_ranks(n, batch_size, world):
    parts = [ValidationData(Numbered(n), n, Share(batch_size, rank, world)) for rank in range(world)]
    batches = [list(part) for part in parts]
    assert {len(b) for b in batches} == {len(part) for part in parts} == {-(-n // (batch_size * world))}
    counted = [t for b in batches for batch in b for t in batch.targets.tolist() if t != IGNORE]
    assert sorted(counted) == list(range(n))
    again = [batch.inputs for part in parts for batch in part]
    assert all(torch.equal(a, b.inputs) for a, b in zip(again, (x for b in batches for x in b), strict=True))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum),
    bounds=st.tuples(st.integers(0, 45), st.integers(0, 45)),
)
def test_a_stream_of_pieces_reads_as_one_array(sizes, bounds):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    stream = TokenStream(np.split(whole, np.cumsum(sizes)[:-1]), "test")
    start, stop = sorted(min(b, len(whole)) for b in bounds)
    assert len(stream) == len(whole)
    np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])
    part = stream.part(start, stop)
    assert len(part) == stop - start
    np.testing.assert_array_equal(part.read(0, len(part)), whole[start:stop])


@given(total=st.integers(2, 60), length=st.integers(1, 12))
def test_held_out_tokens_but_the_first_are_each_predicted_once(total, length):
    sequences = Sequences(TokenStream([np.arange(total, dtype=np.uint16)], "test"), length, keeps_rest=True)
    batches = list(ValidationData(sequences, sequences.num_items, Share(2, 0, 1)))
    targets = torch.cat([batch.targets for batch in batches]).flatten()
    inputs = torch.cat([batch.inputs for batch in batches]).flatten()
    counts = targets != IGNORE
    assert targets[counts].tolist() == list(range(1, total))
    assert torch.equal(inputs[counts] + 1, targets[counts])
    assert sum(batch.count() for batch in batches) == total - 1


@given(total=st.integers(2, 60), length=st.integers(1, 12))
def test_training_sequences_are_whole_and_shifted(total, length):
    sequences = Sequences(TokenStream([np.arange(total, dtype=np.uint16)], "test"), length)
    assert sequences.num_items == (total - 1) // length
    for i in range(sequences.num_items):
        batch = sequences.read([Order(sequences.num_items, seed=0, shuffle=False).item(i)])
        assert batch.inputs[0].tolist() == list(range(i * length, (i + 1) * length))
        assert torch.equal(batch.targets, batch.inputs + 1)


@given(total=st.integers(2, 200), length=st.integers(1, 12), fraction=st.floats(0.01, 0.9))
@settings(max_examples=200)
def test_cutting_loses_and_shares_no_token(total, length, fraction):
    stream = TokenStream([np.arange(total, dtype=np.uint16)], "test")
    try:
        kept, held_out = cut(stream, length, fraction)
    except DataError:
        sequences = (total - 1) // length
        assert sequences < 2 or round(sequences * fraction) >= sequences or length == 1
        return
    joined = [*kept.read(0, len(kept)), *held_out.read(0, len(held_out))]
    assert joined == list(range(total))
    assert len(kept) % length == 1 % length  # whole sequences and their last target
    wanted = fraction * total
    assert abs(len(held_out) - wanted) <= 2 * length


def test_largest_token_of_a_huge_stream_is_looked_for_in_places(monkeypatch):
    monkeypatch.setattr("qrecipes.data.sequences.SAMPLE_TOKENS", 1 << 12)
    tokens = np.zeros(1 << 16, np.uint16)
    tokens[1023 * 64] = 7  # where the last of the 1024 runs begins
    assert TokenStream([tokens[:30000], tokens[30000:]], "test").max_token() == 7
    monkeypatch.undo()
    tokens[-1] = 9
    assert TokenStream([tokens], "test").max_token() == 9
