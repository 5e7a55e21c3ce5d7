"""Passes recorded as CUDA graphs train as those that Python runs."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from harness import Trial, methods, tiny_run, variants
from torch.nn.attention import SDPBackend, sdpa_kernel

from qrecipes.config.run import ParallelSection
from qrecipes.errors import TrainingError
from qrecipes.parallel.process import Process
from qrecipes.training.passes import WARMUP, CUDAGraphs, RecordedPasses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = WARMUP + 4
COMPILED = {"compile": True}
RECOMPUTED = {"compile": True, "checkpointing": "full", "recompute_in_graph": True}


def trained(family, name, *, cuda_graphs, parallel=None, **changes):
    """Losses and gradient norms of STEPS steps with evaluations between, the weights, and the passes."""
    torch._dynamo.reset()
    section = ParallelSection(cuda_graphs=cuda_graphs, **(parallel or {}))
    run = tiny_run(family, name, parallel=section, **changes)
    trial = Trial.of(run, Process(0, 1, torch.device("cuda", torch.cuda.current_device()), None))
    found = []
    with sdpa_kernel(SDPBackend.MATH):  # the others' gradients differ from time to time
        for _ in range(STEPS):
            found += trial.advance(1)
            trial.model.eval()
            with torch.no_grad():
                trial.task.measure(trial.model, trial.data.next_batch().to("cuda"))
            trial.model.train()
    return found, {n: p.detach().clone() for n, p in trial.model.state_dict().items()}, trial.passes


def assert_same(family, name, **settings):
    """Bit for bit, where Python repeats itself; compiled, nearly, since the compiler picks kernels by their
    speed."""
    python, again, recorded = (
        trained(family, name, cuda_graphs=graphs, **settings) for graphs in (False, False, True)
    )
    assert len(recorded[2]._recordings) >= 1
    if python[0] == again[0] and "parallel" not in settings:
        assert recorded[0] == python[0]
        assert all(torch.equal(recorded[1][n], t) for n, t in python[1].items())
    else:
        for mine, theirs in zip(recorded[0], python[0], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("name", [None, *methods(), *(n for n, f in variants().items() if "llm" in f)])
def test_every_method_trains_as_by_python(name):
    assert_same("llm", name)


@pytest.mark.parametrize("name", [None, "int8_mixed_precision"])
def test_images_are_trained_as_by_python(name):
    pytest.importorskip("timm")
    assert_same("vit", name)


@pytest.mark.parametrize("parallel", [COMPILED, RECOMPUTED], ids=["compiled", "recomputed"])
@pytest.mark.parametrize("name", ["int8_mixed_precision", "lora", "lr_qat"])
def test_compiled_blocks_train_as_by_python(name, parallel):
    assert_same("llm", name, parallel=parallel)


def test_micro_batches_are_added_up():
    assert_same("llm", "lora", optim__accumulate=3)


@pytest.mark.parametrize("compile", [False, True])
def test_stochastic_rounding_draws_anew_in_each_replay(compile):
    parallel = ParallelSection(cuda_graphs=True, compile=compile)
    run = tiny_run("llm", "int8_mixed_precision", parallel=parallel, optim__lr=0.0)
    run = replace(run, transform=(replace(run.transform[0], stochastic_rounding=True),))
    trial = Trial.of(run, Process(0, 1, torch.device("cuda", torch.cuda.current_device()), None))
    batch, divisor = trial.data.next_batch(), torch.ones(())
    drawn = []
    for _ in range(8):
        trial.model.zero_grad()
        trial.passes(trial.model, trial.task, batch, divisor)
        drawn.append(torch.cat([p.grad.flatten() for p in trial.model.parameters()]))
    assert len(trial.passes._recordings) == 1
    assert not any(torch.equal(a, b) for a, b in combinations(drawn, 2))


def test_passes_that_wait_for_the_device_are_refused():
    trial = Trial.of(
        tiny_run("llm", None, parallel=ParallelSection(cuda_graphs=True)),
        Process(0, 1, torch.device("cuda", torch.cuda.current_device()), None),
    )

    def waits(module, inputs, output):
        if float(output.sum()) > float("inf"):
            raise AssertionError

    next(iter(trial.model.children())).register_forward_hook(waits)
    trial.advance(WARMUP)
    with pytest.raises(
        TrainingError, match=r"parallel\.cuda_graphs: .* cannot be recorded: .*set it to false"
    ):
        trial.advance(1)


def test_a_model_of_small_kernels_trains_at_least_twice_as_fast():
    times = {}
    for graphs in (False, True):
        trial = Trial.of(
            tiny_run("llm", "int8_mixed_precision", parallel=ParallelSection(cuda_graphs=graphs)),
            Process(0, 1, torch.device("cuda", torch.cuda.current_device()), None),
        )
        trial.advance(WARMUP + 2)
        torch.cuda.synchronize()
        start = time.perf_counter()
        trial.advance(10)
        torch.cuda.synchronize()
        times[graphs] = time.perf_counter() - start
    assert times[True] < times[False] / 2, times


def test_recordings_share_their_memory():
    """A second shape takes no second set of activations."""
    device = torch.device("cuda", torch.cuda.current_device())
    trial = Trial.of(tiny_run("llm", None), Process(0, 1, device, None))
    passes = RecordedPasses(CUDAGraphs(device))
    batch, reserved = trial.data.next_batch(), []
    for rows in (len(batch.inputs), len(batch.inputs) - 1):
        for _ in range(WARMUP + 1):
            passes(trial.model, trial.task, batch.head(rows, 10**6), torch.ones((), device=device))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert len(passes._recordings) == 2
    assert reserved[1] - reserved[0] <= 2**21, reserved
