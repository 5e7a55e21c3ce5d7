"""Documents in one row do not see each other, and padding disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2

from qrecipes.config.run import TaskSection
from qrecipes.data import IGNORE, Batch
from qrecipes.training.masks import document_mask, takes_block_mask
from qrecipes.training.task import Task

SIZES = {
    "vocab_size": 61,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 64,
}
MODELS = {
    "llama": lambda: llama3_2(**SIZES),
    "qwen": lambda: qwen2(**SIZES),
    "gemma2": lambda: gemma2(**SIZES, head_dim=8, sliding_window_size=4, query_pre_attn_scalar=8),
}


def test_a_token_sees_its_own_document_up_to_itself():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]], dtype=torch.int32)
    mask = document_mask(MODELS["llama"](), documents)[0]
    for row in range(6):
        for column in range(6):
            visible = column <= row and documents[0, row] == documents[0, column]
            assert mask[row, column] == visible, (row, column)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("loss", ["plain", "chunked"])
def test_packed_documents_have_the_losses_and_gradients_they_have_alone(family, loss):
    torch.manual_seed(0)
    model = MODELS[family]().train()
    task = Task(TaskSection(loss=loss, chunk_tokens=5))
    lengths = [9, 4, 7]
    texts = [torch.randint(61, (n + 1,)) for n in lengths]
    apart = sum(task.loss(model, Batch(t[None, :-1], t[None, 1:])) for t in texts)
    apart.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    padding = 3
    packed = Batch(
        torch.cat([*(t[:-1] for t in texts), torch.zeros(padding, dtype=torch.int64)])[None],
        torch.cat([*(t[1:] for t in texts), torch.full((padding,), IGNORE)])[None],
        torch.repeat_interleave(torch.arange(4), torch.tensor([*lengths, padding]))[None].int(),
        torch.cat([torch.arange(n) for n in (*lengths, padding)])[None],
    )
    together = task.loss(model, packed)
    together.backward()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        # float32 sums in another order
        torch.testing.assert_close(p.grad, alone[name], rtol=1e-3, atol=2e-6, msg=name)


def test_without_the_mask_the_losses_differ():
    """The test above is able to fail."""
    torch.manual_seed(0)
    model, task = MODELS["llama"](), Task(TaskSection())
    tokens = torch.randint(61, (1, 13))
    documents = torch.tensor([[0] * 6 + [1] * 6], dtype=torch.int32)
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    masked = task.loss(model, Batch(tokens[:, :-1], tokens[:, 1:], documents, positions))
    bare = task.loss(model, Batch(tokens[:, :-1], tokens[:, 1:]))
    assert (masked - bare).abs() > 1e-2


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({}, True),
        (
            {"num_heads": 8, "num_kv_heads": 8},
            False,
        ),  # heads of 8 features: FlexAttention multiplies no fewer than 16
        ({"attn_dropout": 0.1}, False),
    ],
)
def test_only_attention_that_can_gets_a_block_mask(change, takes, monkeypatch):
    monkeypatch.setattr("torchtune.utils._import_guard._SUPPORTS_FLEX_ATTENTION", True)
    assert takes_block_mask(llama3_2(**SIZES | {"embed_dim": 64} | change)) is takes
    assert not takes_block_mask(MODELS["gemma2"]())
    monkeypatch.setattr("torchtune.utils._import_guard._SUPPORTS_FLEX_ATTENTION", False)
    assert not takes_block_mask(llama3_2(**SIZES | {"embed_dim": 64} | change))
