"""Losses without whole logits, against the plain loss in float64."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TiedLinear

from qrecipes.config.run import TaskSection
from qrecipes.data import IGNORE, Batch
from qrecipes.errors import ConfigError
from qrecipes.training.losses import chunked_cross_entropy, chunked_measure, cross_entropy_sum
from qrecipes.training.task import Task

BUILDER = {
    "vocab_size": 97,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 64,
}


def oracle(hidden, weight, bias, targets, smoothing):
    """Loss and gradients by formulas in float64: p - onehot, smoothed, for targets that count."""
    h, w = hidden.double(), weight.double()
    logits = h @ w.T + (0 if bias is None else bias.double())
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    counts = targets != IGNORE
    wanted = nn.functional.one_hot(targets.clamp(min=0), len(w)).double()
    wanted = (1 - smoothing) * wanted + smoothing / len(w)
    loss = -(wanted * log_p).sum(-1)[counts].sum()
    error = (log_p.exp() - wanted) * counts[:, None]
    return loss, error @ w, error.T @ h, error.sum(0)


def draw(tokens, width, vocabulary, ignored, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return hidden, weight, bias, targets


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(2, 17),
    chunk=st.integers(1, 50),
    smoothing=st.sampled_from([0.0, 0.1]),
    biased=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_float64(
    tokens, width, vocabulary, chunk, smoothing, biased, ignored, seed
):
    hidden, weight, bias, targets = draw(tokens, width, vocabulary, ignored, seed)
    head = nn.Linear(width, vocabulary, bias=biased)
    head.weight.data = weight
    if biased:
        head.bias.data = bias
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, targets, head, chunk_tokens=chunk, label_smoothing=smoothing)
    (loss / 7).backward()
    expected, d_hidden, d_weight, d_bias = oracle(
        hidden.detach(), weight, bias if biased else None, targets, smoothing
    )
    near = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of at most 40 terms
    torch.testing.assert_close(loss.double(), expected, **near)
    torch.testing.assert_close(hidden.grad.double(), d_hidden / 7, **near)
    torch.testing.assert_close(head.weight.grad.double(), d_weight / 7, **near)
    if biased:
        torch.testing.assert_close(head.bias.grad.double(), d_bias / 7, **near)


def test_no_more_than_a_chunk_of_logits_exists():
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    hidden, _, _, targets = draw(33, 4, 11, 0.0, 0)
    chunked_cross_entropy(hidden.requires_grad_(), targets, Head(4, 11), chunk_tokens=8).backward()
    assert max(seen) <= 8
    assert sum(seen) == 33, "each token's logits are made once, backward included"


def test_bfloat16_gradients_are_scaled_without_a_common_error():
    """1/201 is not a bfloat16: rounding it first would scale all gradients by the same 0.2%."""
    hidden, weight, _, targets = draw(64, 16, 50, 0.0, 1, torch.bfloat16)
    head = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
    head.weight.data = weight
    (chunked_cross_entropy(hidden, targets, head, chunk_tokens=16) / 201).backward()
    _, _, d_weight, _ = oracle(hidden, weight, None, targets, 0.0)
    ratio = (head.weight.grad.double() * d_weight).sum() / (d_weight / 201 * d_weight).sum()
    assert abs(ratio - 1) < 5e-4, "bfloat16 rounding of single entries averages out"


def test_a_frozen_head_gets_no_gradient_and_a_tied_one_passes_it_to_the_embedding():
    hidden, weight, _, targets = draw(20, 8, 13, 0.2, 2)
    frozen = nn.Linear(8, 13, bias=False).requires_grad_(False)
    chunked_cross_entropy(hidden.requires_grad_(), targets, frozen, chunk_tokens=7).backward()
    assert frozen.weight.grad is None
    assert hidden.grad is not None
    embedding = nn.Embedding(13, 8)
    embedding.weight.data = weight
    chunked_cross_entropy(hidden.detach(), targets, TiedLinear(embedding), chunk_tokens=7).backward()
    _, _, d_weight, _ = oracle(hidden.detach(), weight, None, targets, 0.0)
    torch.testing.assert_close(embedding.weight.grad.double(), d_weight, rtol=1e-4, atol=1e-5)


def test_one_backward_pass_only():
    hidden, _, _, targets = draw(5, 4, 6, 0.0, 3)
    loss = chunked_cross_entropy(hidden.requires_grad_(), targets, nn.Linear(4, 6), chunk_tokens=2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()


def batch_of(seed=0, rows=3, length=21):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(97, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :9] = IGNORE
    return Batch(tokens[:, :-1], targets)


@pytest.mark.parametrize(("tied", "compiled"), [(True, False), (False, False), (True, True)])
def test_a_decoder_learns_the_same_by_either_loss(tied, compiled):
    torch.manual_seed(0)
    model = llama3_2(**BUILDER, tie_word_embeddings=tied).train()
    batch, found = batch_of(), {}
    for loss in ("plain", "chunked"):
        model.zero_grad()
        task = Task(TaskSection(loss=loss, chunk_tokens=10, label_smoothing=0.1), compile=compiled)
        value = task.loss(model, batch)
        (value / 50).backward()
        found[loss] = (value.detach(), {n: p.grad.clone() for n, p in model.named_parameters()})
        assert "unembed" not in vars(model), "the decoder is as it was"
    torch.testing.assert_close(found["plain"][0], found["chunked"][0], rtol=1e-5, atol=0)
    for name, gradient in found["plain"][1].items():
        # float32 sums in another order; gradients here are about 1e-2
        torch.testing.assert_close(found["chunked"][1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_measures_are_equal_and_leave_no_gradient():
    torch.manual_seed(0)
    model, batch = llama3_2(**BUILDER).eval(), batch_of(1)
    plain = Task(TaskSection()).measure(model, batch)
    chunked = Task(TaskSection(loss="chunked", chunk_tokens=7)).measure(model, batch)
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-5, atol=0)
    assert chunked[1] == plain[1]
    assert not chunked[0].requires_grad
    hidden, weight, _, targets = draw(30, 4, 5, 0.3, 4)
    head = nn.Linear(4, 5, bias=False)
    head.weight.data = weight
    logits = head(hidden)
    total, correct = chunked_measure(hidden, targets, head, 4)
    torch.testing.assert_close(total, cross_entropy_sum(logits, targets), rtol=1e-5, atol=0)
    assert correct == (logits.argmax(-1) == targets).sum()


def test_models_and_devices_that_cannot_are_told_so():
    with pytest.raises(ConfigError, match=r"task.loss: Linear does not show its head.*\"plain\""):
        Task(TaskSection(loss="chunked")).loss(nn.Linear(2, 2), batch_of())
    missing = importlib.util.find_spec("liger_kernel") is None
    with pytest.raises(ConfigError, match=r"install qrecipes\[liger\]" if missing else "runs on a GPU"):
        Task(TaskSection(loss="liger")).loss(llama3_2(**BUILDER), batch_of())
