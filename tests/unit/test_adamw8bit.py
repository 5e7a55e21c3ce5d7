"""AdamW with 8-bit moments by one kernel: the kernel, in Triton's interpreter, against torchao's own step."""

from __future__ import annotations

import pytest
import torch
from interpreter import outcomes_of, run_checks
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit

from qrecipes.training.adamw8bit import FusedAdamW8bit, update_by_kernel

LR, BETA1, BETA2, DECAY, EPS = 1e-2, 0.9, 0.95, 0.1, 1e-8


def moments(shape: tuple[int, ...], dtype: torch.dtype, quantized: bool) -> list[torch.Tensor]:
    if not quantized:
        return [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    return [OptimState8bit.zeros(shape, signed, 256, dtype=dtype) for signed in (True, False)]


def plain(moment: torch.Tensor) -> torch.Tensor:
    return moment.dequantize() if isinstance(moment, OptimState8bit) else moment.float()


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
        update_by_kernel(ours, grad, *our_moments, numbers)
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
    update_by_kernel(p, grad, m, v, (0.0, 1.0, 0.0, 0.0, EPS, 1.0, 1.0))  # beta 0: the gradient, its square
    for moment, wanted in ((m, grad), (v, grad * grad)):
        scale = wanted.abs().amax(1)
        torch.testing.assert_close(moment.scale, scale)
        distance = (wanted[..., None] / scale[:, None, None] - moment.qmap).abs()
        found = distance.gather(-1, moment.codes.long()[..., None])[..., 0]
        assert (found <= distance.amin(-1) + 1e-7).all()


def check_stochastic_rounding_is_right_on_average_and_another_for_each_number() -> None:
    p = torch.full((16, 256), 1.0, dtype=torch.bfloat16)
    m, v = moments((16, 256), torch.bfloat16, False)
    grad = torch.ones(16, 256)
    seed = torch.tensor(17)
    # 1 - 0.001 lies a quarter of the way from 1 to the next bfloat16 below, 1 - 2^-8
    update_by_kernel(p, grad, m, v, (1e-3, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0), (seed, 0))
    assert set(p.float().unique().tolist()) == {1.0, 1 - 2**-8}
    share = (p.float() < 1).float().mean().item()
    assert abs(share - 1e-3 * 2**8) < 5 * (0.19 / 4096) ** 0.5  # 5 standard deviations
    again = torch.full((16, 256), 1.0, dtype=torch.bfloat16)
    m, v = moments((16, 256), torch.bfloat16, False)
    update_by_kernel(again, grad, m, v, (1e-3, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0), (seed, 4096))
    assert not torch.equal(p, again)


def check_nan_is_not_hidden() -> None:
    p, grad = torch.zeros(2, 256), torch.ones(2, 256)
    grad[1, 7] = float("nan")
    m, v = moments((2, 256), torch.float32, True)
    update_by_kernel(p, grad, m, v, (1e-3, 1.0, BETA1, BETA2, EPS, 0.1, 0.2))
    assert p[1].isnan().any()
    assert p[0].isfinite().all()


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


if __name__ == "__main__":
    run_checks(CHECKS)
