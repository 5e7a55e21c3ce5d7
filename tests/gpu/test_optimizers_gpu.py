"""Every optimizer on a GPU: it learns in bfloat16, resumes exactly, and takes the memory that is said."""

from __future__ import annotations

import gc

import pytest
import torch
from harness import Trial, tiny_run
from torch import nn

from qrecipes.config.run import OptimSection
from qrecipes.parallel.process import Process
from qrecipes.training import checkpoint
from qrecipes.training.optim import OPTIMIZERS, build_optimizer
from qrecipes.training.optimizer_verbs import evaluation_weights, norms_of_taken, taking_gradients
from qrecipes.transforms.base import ParamGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EARLY = {"clip_norm": 0.0, "in_backward": True}
CHOICES = {
    **{name: {"name": name} for name in OPTIMIZERS},
    **{f"{name} in_backward": {"name": name, **EARLY} for name in OPTIMIZERS},
    "adamw8bit rounded": {"name": "adamw8bit", "stochastic_rounding": True},
    "offload": {"offload": "state"},
    "offload sgd": {"name": "sgd", "offload": "state"},
    "offload all": {"clip_norm": 0.0, "offload": "state_and_gradients"},
}
STEPS = 20


@pytest.fixture
def _deterministic():
    """Attention and embeddings add up gradients in any order otherwise."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def trial_of(run) -> Trial:
    process = Process(0, 1, torch.device("cuda", torch.cuda.current_device()), None)
    return Trial.of(run, process, dtype=torch.bfloat16)


def run_of(choice: str, folder):
    optim = {f"optim__{key}": value for key, value in CHOICES[choice].items()}
    return tiny_run("llm", None, output=str(folder / "run"), steps=STEPS, schedule__kind="constant", **optim)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("choice", CHOICES)
def test_learns_in_bfloat16_and_resumes_exactly(choice, tmp_path):
    run = run_of(choice, tmp_path)
    unbroken = trial_of(run)
    expected = unbroken.advance(STEPS)
    assert expected[-1][0] < expected[0][0] - 0.1  # nats; the data are learnable from the first step
    first = trial_of(run)
    beginning = first.advance(8)
    folder = checkpoint.save(run, 8, first.model, first.optimizer, first.data.state_dict(), first.process)
    second = trial_of(run)
    second.advance(2)
    second.done, position = checkpoint.restore(folder, run, second.model, second.optimizer, second.process)
    second.data.load_state_dict(position)
    assert beginning + second.advance(STEPS - 8) == expected
    for p, q in zip(second.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw", "adamw8bit", "sgd"])
def test_updates_in_the_backward_pass_equal_the_ordinary_ones(name, tmp_path):
    optim = {"optim__name": name, "optim__clip_norm": 0.0}
    late = trial_of(tiny_run("llm", None, output=str(tmp_path), **optim))
    early = trial_of(tiny_run("llm", None, output=str(tmp_path), **optim, optim__in_backward=True))
    found, expected = torch.tensor(early.advance(10)), torch.tensor(late.advance(10))
    assert torch.equal(found[:, 0], expected[:, 0])
    # norms of bfloat16 gradients, 2^-9 each, by another kernel
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=2**-7, atol=0)


BYTES = {
    "adamw": 4,
    "stochastic_adamw": 6,
    "schedule_free_adamw": 12,
    "adamw8bit": 2 + 2 * 4 / 256,  # codes of 8 bits, a float32 scale a block
    "adamw4bit": 1 + 2 * 4 / 128,
    "adamw_fp8": 2 + 2 * 4 / 256,
    "sgd": 2,
    "offload": 0,
    "offload sgd": 0,
}


@pytest.mark.parametrize("choice", BYTES)
def test_state_takes_the_memory_that_the_documentation_says(choice):
    p = nn.Parameter(torch.ones(4096, 4096, dtype=torch.bfloat16, device="cuda"))
    optimizer = build_optimizer([ParamGroup("rest", [p])], OptimSection(**CHOICES[choice]))
    gc.collect()
    before = torch.cuda.memory_allocated()
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    gc.collect()
    found = (torch.cuda.memory_allocated() - before) / p.numel()
    assert found == pytest.approx(BYTES[choice], abs=0.02)  # tables, counters, and sizes rounded up


def peak_of_backward(**optim) -> int:
    """Most bytes in a backward pass and update over what was there before, with states there."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16))).to("cuda", torch.bfloat16)
    groups = [ParamGroup("rest", list(model.parameters()))]
    optimizer = build_optimizer(groups, OptimSection(clip_norm=0.0, **optim))
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with taking_gradients(optimizer):
            model(torch.ones(8, 2048, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        norms_of_taken(optimizer)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("optim", [{"in_backward": True}, {"offload": "state_and_gradients"}])
def test_gradients_do_not_exist_together(optim):
    gradients = 16 * 2048 * 2048 * 2
    assert peak_of_backward() >= gradients
    # one of 16, or a few: copies to the CPU run behind, and what they free is found free a little later
    assert peak_of_backward(**optim) < gradients / 2


def test_going_to_the_average_and_back_changes_no_bit():
    p = nn.Parameter(torch.randn(1000, 33, dtype=torch.bfloat16, device="cuda"))
    optimizer = build_optimizer([ParamGroup("rest", [p])], OptimSection(name="schedule_free_adamw", lr=1e-2))
    for _ in range(7):
        p.grad = torch.randn_like(p)
        optimizer.step()
    before = p.detach().clone()
    with evaluation_weights(optimizer):
        assert torch.equal(p, optimizer.state[p]["x"].bfloat16())
        assert not torch.equal(p, before)
    assert torch.equal(p, before)


def test_copies_of_the_offloaded_update_wait_for_one_another():
    """Large tensors and a busy GPU against float32 AdamW on the CPU, bit for bit."""
    params = [nn.Parameter(torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")) for _ in range(8)]
    optimizer = build_optimizer([ParamGroup("rest", params)], OptimSection(offload="state"))
    copies = [nn.Parameter(p.detach().float().cpu()) for p in params]
    settings = OptimSection()
    reference = torch.optim.AdamW(
        copies,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        for p in params:
            for _ in range(3):
                busy = busy @ busy / 64
            p.grad = torch.randn_like(p)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        optimizer.zero_grad()
        for copy, grad in zip(copies, grads, strict=True):
            copy.grad = grad.float().cpu()
        reference.step()
    for p, copy in zip(params, copies, strict=True):
        assert torch.equal(p.cpu(), copy.detach().bfloat16())
