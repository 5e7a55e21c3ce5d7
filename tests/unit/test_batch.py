"""What becomes of a batch's optional parts."""

from __future__ import annotations

import torch

from qrecipes.data import IGNORE, Batch


def packed() -> Batch:
    tokens = torch.arange(12).reshape(2, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2, dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    return Batch(tokens, torch.full_like(tokens, IGNORE), documents, positions)


def test_head_and_to_keep_documents_and_positions():
    part = packed().head(1, 4).to("cpu")
    assert part.inputs.tolist() == [[0, 1, 2, 3]]
    assert part.documents.tolist() == [[0, 0, 0, 1]]
    assert part.positions.tolist() == [[0, 1, 2, 0]]
    plain = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)).head(1, 2)
    assert plain.documents is None
    assert plain.positions is None


def test_all_targets_predicts_every_token_but_the_first_whatever_counted():
    batch = packed().all_targets()
    assert batch.targets.tolist() == [[1, 2, 3, 4, 5, IGNORE], [7, 8, 9, 10, 11, IGNORE]]
    assert batch.count() == 10
    assert batch.documents is not None
    images = Batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, 2]))
    assert images.all_targets() is images
