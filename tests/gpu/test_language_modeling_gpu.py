"""Losses and document masks on a device, where other kernels compute them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2

from qrecipes.config.run import ParallelSection, TaskSection
from qrecipes.data import IGNORE, Batch
from qrecipes.parallel.apply import parallelize
from qrecipes.parallel.process import Process
from qrecipes.training.losses import chunked_cross_entropy, cross_entropy_sum, liger_cross_entropy
from qrecipes.training.task import Task
from qrecipes.transforms.chain import Chain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {
    "vocab_size": 512,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 256,
    "intermediate_dim": 512,
    "max_seq_len": 512,
}
LOSSES = ["chunked", "liger"] if importlib.util.find_spec("liger_kernel") else ["chunked"]


def gradients(compute, hidden, head):
    hidden.grad = head.weight.grad = None
    loss = compute() / 201
    loss.backward()
    return loss.detach(), hidden.grad.clone(), head.weight.grad.clone()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_equal_the_plain_one_in_float64(name, dtype):
    torch.manual_seed(0)
    head = nn.Linear(128, 1000, bias=False, device="cuda", dtype=dtype)
    hidden = torch.randn(777, 128, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(1000, (777,), device="cuda")
    targets[::5] = IGNORE
    exact_head = nn.Linear(128, 1000, bias=False, device="cuda", dtype=torch.float64)
    exact_head.weight.data = head.weight.detach().double()
    exact = hidden.detach().double().requires_grad_()
    expected = gradients(
        lambda: nn.functional.cross_entropy(exact_head(exact), targets, ignore_index=IGNORE, reduction="sum"),
        exact,
        exact_head,
    )
    if name == "liger":
        found = gradients(lambda: liger_cross_entropy(hidden, targets, head), hidden, head)
    else:
        found = gradients(
            lambda: chunked_cross_entropy(hidden, targets, head, chunk_tokens=100), hidden, head
        )
    # relative error of the whole tensor: bfloat16 logits carry 2^-9 each
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    for got, wanted in zip(found, expected, strict=True):
        assert (got.double() - wanted).norm() <= bound * wanted.norm()


def test_chunks_take_a_fraction_of_the_memory():
    torch.manual_seed(0)
    head = nn.Linear(512, 32000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32000, (8192,), device="cuda")

    def peak(compute) -> int:
        hidden.grad = head.weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compute().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    plain = peak(lambda: cross_entropy_sum(head(hidden), targets))
    chunked = peak(lambda: chunked_cross_entropy(hidden, targets, head, chunk_tokens=1024))
    assert chunked < plain / 3


@pytest.mark.parametrize(
    ("compiled", "checkpointing", "heads"),
    [(False, "none", 4), (True, "none", 4), (False, "full", 4), (True, "full", 4), (False, "none", 32)],
)
def test_packed_documents_have_the_losses_they_have_alone(compiled, checkpointing, heads):
    """FlexAttention with a block mask, and a dense mask for heads of 8 features, against one document at a
    time through SDPA, in float32."""
    torch.manual_seed(0)
    model = llama3_2(**SIZES | {"num_heads": heads}).cuda().train()
    task = Task(TaskSection())
    lengths = [130, 1, 61, 64]
    texts = [torch.randint(512, (n + 1,), device="cuda") for n in lengths]
    apart = sum(task.loss(model, Batch(t[None, :-1], t[None, 1:])) for t in texts)
    apart.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    process = Process(0, 1, torch.device("cuda"), None)
    section = ParallelSection(compile=compiled, checkpointing=checkpointing)
    model = parallelize(model, section, process, Chain())
    packed = Batch(
        torch.cat([t[:-1] for t in texts])[None],
        torch.cat([t[1:] for t in texts])[None],
        torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int().cuda(),
        torch.cat([torch.arange(n) for n in lengths])[None].cuda(),
    )
    together = task.loss(model, packed)
    together.backward()
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=0)
    for name, p in model.named_parameters():
        # FlexAttention multiplies float32 with TF32 tensor cores inside
        error = (p.grad - alone[name]).norm() / alone[name].norm()
        assert error < 5e-3, (name, error)
