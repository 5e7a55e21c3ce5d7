"""Synthetic data: a function of seed and index, the same in any world, and learnable."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from qrecipes.config.run import DataSection, TaskSection
from qrecipes.data import build_data, build_training_data, build_validation_data
from qrecipes.data.synthetic import NUM_FREQUENT, NUM_HELD_OUT, SURPRISE

TASKS = {"tokens": TaskSection(), "images": TaskSection(kind="classification")}


def section(**kwargs) -> DataSection:
    defaults = {"source": "synthetic", "sequence_length": 32, "batch_size": 4, "image_size": 12}
    return DataSection(**(defaults | kwargs))


def build(kind: str, *, seed=0, rank=0, world=1, **kwargs):
    return build_training_data(section(**kwargs), None, task=TASKS[kind], seed=seed, rank=rank, world=world)


@pytest.fixture(params=["tokens", "images"])
def kind(request) -> str:
    return request.param


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(batches)
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shapes_and_ranges():
    tokens = build("tokens", vocab_size=40).next_batch()
    assert tokens.inputs.shape == tokens.targets.shape == (4, 32)
    assert torch.equal(tokens.inputs[:, 1:], tokens.targets[:, :-1])
    assert 0 <= tokens.inputs.min() <= tokens.inputs.max() < 40
    images = build("images", num_classes=7).next_batch()
    assert (images.inputs.shape, images.inputs.dtype) == ((4, 3, 12, 12), torch.float32)
    assert images.targets.shape == (4,)
    assert 0 <= images.targets.min() <= images.targets.max() < 7
    assert (tokens.count(), images.count()) == (4 * 32, 4)


def test_two_ranks_see_what_one_sees(kind):
    parts = [build(kind, rank=rank, world=2, batch_size=2) for rank in range(2)]
    together = joined(part.next_batch() for _ in range(2) for part in parts)
    alone = build(kind)
    assert same(together, joined(alone.next_batch() for _ in range(2)))


def test_resume_goes_on_exactly(kind):
    data, resumed = build(kind), build(kind)
    data.next_batch()
    resumed.load_state_dict(data.state_dict())
    assert same(joined([data.next_batch()]), joined([resumed.next_batch()]))


def test_never_repeats_and_depends_on_the_seed(kind):
    data = build(kind)
    first, second = (joined([data.next_batch()]) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], build(kind, seed=1).next_batch().inputs)
    assert data.num_sequences is None


def test_held_out_data_is_fixed_and_apart(kind):
    training, held_out = build_data(section(), None, task=TASKS[kind], seed=0, rank=0, world=1)
    once, again = joined(held_out), joined(held_out)
    assert same(once, again)
    assert len(once[0]) == NUM_HELD_OUT
    trained = joined(training.next_batch() for _ in range(40))[0]
    assert not any(torch.equal(row, other) for row in once[0] for other in trained)


def test_held_out_items_come_once_over_uneven_ranks(kind):
    alone = joined(build_validation_data(section(), None, task=TASKS[kind], seed=0, rank=0, world=1))
    where = [{"rank": rank, "world": 3} for rank in range(3)]
    parts = [list(build_validation_data(section(), None, task=TASKS[kind], seed=0, **w)) for w in where]
    assert len({len(part) for part in parts}) == 1
    rows = joined(batch for batches in zip(*parts, strict=True) for batch in batches)
    assert same([part[:NUM_HELD_OUT] for part in rows], alone)
    assert (rows[1][NUM_HELD_OUT:] == -100).all()


def test_frequent_tokens_go_around_a_circle():
    data = build("tokens", vocab_size=64, sequence_length=4000, batch_size=1)
    tokens = data.next_batch().inputs[0].tolist()
    followers: dict[int, list[int]] = {}
    for one, next_one in pairwise(tokens):
        followers.setdefault(one, []).append(next_one)
    usual_next = {token: max(set(seen), key=seen.count) for token, seen in followers.items()}
    usual = sum(max(map(seen.count, set(seen))) for seen in followers.values())
    assert usual / len(tokens) > 1 - 2 * SURPRISE
    frequent = sorted(followers, key=lambda token: -len(followers[token]))[:NUM_FREQUENT]
    assert sum(len(followers[token]) for token in frequent) / len(tokens) > 1 - 1.5 * SURPRISE
    walk = [frequent[0]]
    for _ in frequent:
        walk.append(usual_next[walk[-1]])
    assert sorted(walk[1:]) == sorted(frequent)
    assert walk[0] == walk[-1]


def test_a_small_vocabulary_works():
    assert build("tokens", vocab_size=2).next_batch().inputs.max() <= 1
    assert build("tokens", vocab_size=1).next_batch().inputs.max() == 0


def test_a_tiny_model_learns_it_in_12_steps(kind):
    """Embedding or pixels, one linear layer: held-out loss falls clearly below that of a uniform guess."""
    data, held_out = build_data(section(batch_size=16), None, task=TASKS[kind], seed=0, rank=0, world=1)
    tokens = [nn.Embedding(256, 32), nn.Linear(32, 256)]
    model = nn.Sequential(*(tokens if kind == "tokens" else [nn.Flatten(), nn.Linear(3 * 12 * 12, 10)]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2 if kind == "tokens" else 1e-3)

    def loss(batch):
        return nn.functional.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten())

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(torch.stack([loss(batch) for batch in held_out]).mean())

    before = held_out_loss()
    for _ in range(12):
        optimizer.zero_grad()
        loss(data.next_batch()).backward()
        optimizer.step()
    assert held_out_loss() < 0.7 * before
