"""AdamW with 8-bit moments by one kernel: the kernel, in Triton's interpreter, against torchao's own step."""

from __future__ import annotations

import io
import itertools
from unittest import mock

import pytest
import torch
from compiling import compiled, needs_triton
from interpreter import outcomes_of, run_checks
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from qrecipes.training.adamw8bit import FusedAdamW8bit, jobs_of, launch, of_one_kind

LR, BETA1, BETA2, DECAY, EPS = 1e-2, 0.9, 0.95, 0.1, 1e-8


def moments(shape: tuple[int, ...], dtype: torch.dtype, quantized: bool) -> list[torch.Tensor]:
    if not quantized:
        return [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    return [OptimState8bit.zeros(shape, signed, 256, dtype=dtype) for signed in (True, False)]


def plain(moment: torch.Tensor) -> torch.Tensor:
    return moment.dequantize() if isinstance(moment, OptimState8bit) else moment.float()


def update_by_kernel(updates, numbers, *, stochastic_rounding=False):
    """One launch for those of a kind."""
    for alike in of_one_kind(updates):
        part = [updates[i] for i in alike]
        launch(jobs_of(part), [grad for _, grad, _, _ in part], numbers, stochastic_rounding)


def steps_of_both(shape, grad_dtype: torch.dtype, quantized: bool):
    """Parameter and moments after five steps of the kernel, and of torchao's function.

    In float32: the interpreter truncates to bfloat16, where a device rounds.
    """
    p = torch.randn(shape)
    ours, theirs = p.clone(), p.clone()
    our_moments, their_moments = (moments(shape, torch.float32, quantized) for _ in range(2))
    for step in range(1, 6):
        grad = (torch.randn(shape) * 10.0 ** torch.randint(-4, 2, shape)).to(grad_dtype)
        correction = 1 - BETA1**step, (1 - BETA2**step) ** 0.5
        numbers = (LR, 1 - LR * DECAY, BETA1, BETA2, EPS, *correction)
        update_by_kernel([(ours, grad, *our_moments)], numbers)
        arguments = theirs, grad, torch.tensor(float(step)), *their_moments, None, torch.tensor(LR)
        single_param_adam(*arguments, BETA1, BETA2, DECAY, EPS, True, False)
    return (ours, *our_moments), (theirs, *their_moments)


def check_steps_are_torchaos() -> None:
    for shape, grad_dtype, quantized in (
        ((16, 512), torch.float32, True),
        ((5, 256), torch.bfloat16, True),
        ((3, 100), torch.float32, False),
        ((4100,), torch.bfloat16, False),
    ):
        ours, theirs = steps_of_both(shape, grad_dtype, quantized)
        for a, b in zip(ours, theirs, strict=True):
            # an ulp of float32 may tip a code to its neighbour
            same = torch.isclose(plain(a), plain(b), rtol=1e-5, atol=1e-9)
            assert same.float().mean() > 0.998, (shape, grad_dtype, same.float().mean())


def check_codes_are_the_nearest_of_the_map() -> None:
    m, v = moments((8, 256), torch.float32, True)
    grad = torch.randn(8, 256)
    p = torch.zeros(8, 256)
    update_by_kernel(
        [(p, grad, m, v)], (0.0, 1.0, 0.0, 0.0, EPS, 1.0, 1.0)
    )  # beta 0: the gradient, its square
    for moment, wanted in ((m, grad), (v, grad * grad)):
        scale = wanted.abs().amax(1)
        torch.testing.assert_close(moment.scale, scale)
        distance = (wanted[..., None] / scale[:, None, None] - moment.qmap).abs()
        found = distance.gather(-1, moment.codes.long()[..., None])[..., 0]
        assert (found <= distance.amin(-1) + 1e-7).all()


def check_stochastic_rounding_is_right_on_average_and_another_for_each_number() -> None:
    numbers = (1e-3, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    updates = []
    for _ in range(2):
        p, grad = torch.ones(16, 256, dtype=torch.bfloat16), torch.ones(16, 256)
        updates.append((p, grad, *moments((16, 256), torch.bfloat16, False)))
    update_by_kernel(updates, numbers, stochastic_rounding=True)
    (first, *_), (second, *_) = updates
    # 1 - 0.001 lies a quarter of the way from 1 to the next bfloat16 below, 1 - 2^-8
    assert set(first.float().unique().tolist()) == {1.0, 1 - 2**-8}
    share = (first.float() < 1).float().mean().item()
    assert abs(share - 1e-3 * 2**8) < 5 * (0.19 / 4096) ** 0.5  # 5 standard deviations
    assert not torch.equal(first, second)


def check_many_parameters_at_once_are_each_alone() -> None:
    shapes = ((3, 100), (16, 512), (1,), (4100,), (5, 256), (0, 7), (8, 1024))
    results = []
    for together in (True, False):
        torch.manual_seed(1)
        updates = []
        for shape in shapes:
            quantized = len(shape) == 2 and shape[0] * shape[1] % 256 == 0 and shape[0] > 0
            grad_type = torch.bfloat16 if shape[0] == 5 else torch.float32
            p, grad = torch.randn(shape), torch.randn(shape).to(grad_type)
            updates.append((p, grad, *moments(shape, torch.float32, quantized)))
        numbers = (LR, 1 - LR * DECAY, BETA1, BETA2, EPS, 0.1, 0.2)
        for part in [updates] if together else [[update] for update in updates]:
            update_by_kernel(part, numbers)
        results.append([plain(t) for p, _, m, v in updates for t in (p, m, v)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Forgetful(FusedAdamW8bit):
    """Finds out anew what it updates, at each step."""

    def step(self, closure=None):
        self._plan = None
        return super().step(closure)


def move(optimizer, p):
    p.data = p.data.clone()


def begin_anew(optimizer, p):
    optimizer.state.pop(p)


def restore(optimizer, p):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=False))


def lower_the_rate(optimizer, p):
    for group in optimizer.param_groups:
        group["lr"] *= 0.1


def move_a_moment(optimizer, p):
    moment = optimizer.state[p]["exp_avg"]
    moment.codes = moment.codes.clone()


def replace_a_moment(optimizer, p):
    optimizer.state[p]["exp_avg"] = optimizer._new_buffer(p, True)


def add_a_group(optimizer, p):
    torch.manual_seed(2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(4, 64))], "lr": 1e-3})


def check_what_is_kept_from_step_to_step_changes_no_bit() -> None:
    changes = (move, begin_anew, restore, lower_the_rate, move_a_moment, replace_a_moment, add_a_group)
    results, plans = [], []
    with mock.patch("qrecipes.training.adamw8bit._has_kernel", return_value=True):
        for cls in (FusedAdamW8bit, Forgetful):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 256), (3, 100), (16, 512))]
            optimizer = cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}], lr=1e-2)
            for change in (None, None, *changes, None):
                if change is not None:
                    change(optimizer, params[0])
                trained = [p for group in optimizer.param_groups for p in group["params"]]
                for p in trained:
                    p.grad = torch.randn_like(p)
                if change is lower_the_rate:
                    trained[1].grad = None
                optimizer.step()
                plans.append(optimizer._plan)
            state = [plain(m) for p in trained for m in list(optimizer.state[p].values())[1:]]
            steps = [float(optimizer.state[p]["step"]) for p in trained]
            results.append([*(p.detach() for p in trained), *state, torch.tensor(steps)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    kept = [a is b for a, b in itertools.pairwise(plans[: len(changes) + 3])]
    assert kept == [True, *[False] * len(changes), True], kept
    assert results[0][-1].tolist() == [7.0, 9.0, 10.0, 2.0]


def check_nan_is_not_hidden() -> None:
    p, grad = torch.zeros(2, 256), torch.ones(2, 256)
    grad[1, 7] = float("nan")
    m, v = moments((2, 256), torch.float32, True)
    update_by_kernel([(p, grad, m, v)], (1e-3, 1.0, BETA1, BETA2, EPS, 0.1, 0.2))
    assert p[1].isnan().any()
    assert p[0].isfinite().all()


@needs_triton
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("p_type", ["fp32", "bf16"])
def test_kernel_compiles_and_reads_several_values_at_a_time(p_type, capability, quantized):
    import triton.language as tl

    from qrecipes.training.adamw8bit_kernels import BLOCK, ROWS, _adamw8bit_kernel

    kind = {"fp32": tl.float32, "bf16": tl.bfloat16}[p_type]
    constants = {"P_TYPE": kind, "GRAD_TYPE": kind, "MOMENT_TYPE": kind}
    constants |= {"UNIT": 8, "SIZE": BLOCK, "ROWS": ROWS}
    if not quantized:
        constants |= {"m_map_ptr": None, "v_map_ptr": None}
    if p_type == "fp32":
        constants["seed_ptr"] = None
    types = {"table_ptr": "*i64", "owners_ptr": "*i32", "firsts_ptr": "*i32", "seed_ptr": "*i64"}
    types |= {"m_map_ptr": "*fp32", "v_map_ptr": "*fp32"}
    numbers = ("lr", "kept", "beta1", "beta2", "eps", "correction1", "root_correction2")
    types |= dict.fromkeys(numbers, "fp32")
    kernel = compiled(_adamw8bit_kernel, capability, types, constants, num_warps=4)
    assert "ld.global.v4" in kernel.asm["ptx"] or "ld.global.v2" in kernel.asm["ptx"]


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_kernel_in_the_interpreter(outcomes, name):
    assert outcomes[name] is None, outcomes[name]


def test_on_the_cpu_the_step_is_torchaos():
    from torchao.optim import AdamW8bit

    results = []
    for cls in (FusedAdamW8bit, AdamW8bit):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(16, 256))
        optimizer = cls([p], lr=1e-2)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        results.append((p.detach(), optimizer.state_dict()["state"][0]["exp_avg"].codes))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def no_kernel(monkeypatch):
    """Only torchao's step can update, uncompiled."""
    monkeypatch.setattr("qrecipes.training.adamw8bit.launch", None)
    with torch.compiler.set_stance("force_eager"):
        yield


def test_a_closure_that_makes_the_gradients_is_called_once_and_its_loss_returned(no_kernel):
    p = torch.nn.Parameter(torch.ones(16, 256))
    optimizer = FusedAdamW8bit([p], lr=1e-2, weight_decay=0.0)
    calls = []

    def closure():
        calls.append(1)
        (p * p).sum().backward()
        return "loss"

    assert optimizer.step(closure) == "loss"
    assert len(calls) == 1
    torch.testing.assert_close(p.detach(), torch.full((16, 256), 0.99))  # Adam's first step is the rate


def test_blocks_that_the_kernel_does_not_know_are_left_to_torchao(no_kernel, monkeypatch):
    monkeypatch.setattr("qrecipes.training.adamw8bit._has_kernel", lambda p: True)
    p = torch.nn.Parameter(torch.ones(16, 512))
    optimizer = FusedAdamW8bit([p], lr=1e-2, weight_decay=0.0, block_size=512)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((16, 512), 0.99))
    assert optimizer.state[p]["exp_avg"].block_size == 512


if __name__ == "__main__":
    run_checks(CHECKS)
