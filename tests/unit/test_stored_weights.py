"""Optimizers on stored weights: what an update does, on average and to memory, and what is kept of it."""

from __future__ import annotations

import gc
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from qrecipes.config.run import OptimSection, ScheduleSection
from qrecipes.errors import ConfigError
from qrecipes.quant.stored_int8 import StoredInt8
from qrecipes.training import stored_weights
from qrecipes.training.optim import OPTIMIZERS, build_optimizer, lr_ratio, set_lr
from qrecipes.training.step import clip_gradients
from qrecipes.training.stored_weights import StoredWeightOptimizer, is_stored_low, with_stored_weights
from qrecipes.transforms.base import ParamGroup

NAMES = [name for name in OPTIMIZERS if name != "schedule_free_adamw"]  # which is refused


@pytest.fixture(autouse=True)
def _eagerly():
    """torchao's steps compile for seconds; tests/unit/test_optim.py and the configurations compile them."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stored(shape=(64, 64), group_size=None, dtype=torch.float32, std=0.02, seed=0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * std).to(dtype)
    return nn.Parameter(StoredInt8.of(weight, group_size))


def optimizer_of(*params: nn.Parameter, **optim: object) -> torch.optim.Optimizer:
    return build_optimizer([ParamGroup("rest", list(params))], OptimSection(**optim))


def bits(p: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor]:
    return p.q.clone(), p.scale.clone()


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_optimizers_own_in_float32_rounded(name, dtype):
    """The same optimizer on a plain float32 twin of the dequantized weight, decay included."""
    p, bias = stored(dtype=dtype), nn.Parameter(torch.randn(64, dtype=dtype))
    twin, twin_bias = nn.Parameter(p.dequantize().clone()), nn.Parameter(bias.detach().float())
    optim = {"name": name, "lr": 3e-3, "weight_decay": 0.5}
    ours, plain = optimizer_of(p, bias, **optim), optimizer_of(twin, twin_bias, **optim)
    assert isinstance(ours, StoredWeightOptimizer)
    assert not isinstance(plain, StoredWeightOptimizer)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        grad, bias_grad = (torch.randn(s, generator=generator).to(dtype) for s in ((64, 64), (64,)))
        before = p.dequantize()
        with torch.no_grad():
            twin.copy_(before)  # rounding does not add up in the comparison
        p.grad, bias.grad = grad, bias_grad
        twin.grad, twin_bias.grad = grad.float(), bias_grad.float()
        ours.step()
        plain.step()
        assert (before - twin).abs().max() > 2e-3  # there is something to see
        error = (p.dequantize() - twin.detach()).abs()
        # one step of the grid; the second step's moments were kept in the parameter's own type
        slack = 1e-5 if dtype is torch.float32 or step == 0 else 0.02 * 3e-3
        assert (error <= p.scale + slack).all()
        torch.testing.assert_close(bias.float(), twin_bias.detach(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("name", NAMES)
def test_zero_gradient_without_decay_changes_no_bit(name, group_size):
    p = stored(group_size=group_size)
    optimizer = optimizer_of(p, name=name, weight_decay=0.0)
    before = bits(p)
    for _ in range(3):
        p.grad = torch.zeros(64, 64)
        optimizer.step()
        optimizer.zero_grad()
    assert equal(bits(p), before)


def test_a_parameter_without_gradient_is_left_alone_by_decay_too():
    p, other = stored(), stored(seed=1)
    optimizer = optimizer_of(p, other, weight_decay=0.5)
    before = bits(p)
    other.grad = torch.ones(64, 64)
    optimizer.step()
    assert equal(bits(p), before)
    assert set(optimizer.state) == {other}


def test_tiny_constant_updates_add_up_on_average():
    """A hundredth of a lattice step at a time, which rounding to nearest would lose for ever."""
    steps, rows = 1000, 64
    row = torch.linspace(-0.5, 0.5, 32)
    row[[0, -1]] = torch.tensor([-1.0, 1.0])
    p = nn.Parameter(StoredInt8.of(row.expand(rows, 32).contiguous()))
    lattice = 1 / 127
    optimizer = with_stored_weights(
        [{"params": [p], "lr": 0.01 * lattice}], lambda settings: torch.optim.SGD(settings)
    )
    before = p.dequantize()
    gradient = torch.ones(rows, 32)
    gradient[:, [0, -1]] = 0  # the ends keep the scale where it is
    for _ in range(steps):
        p.grad = gradient.clone()
        optimizer.step()
    moved = (before - p.dequantize())[:, 1:-1].double() / lattice
    # an update of f steps is made by whole steps with probability f: variance f (1 - f) each
    standard_error = math.sqrt(steps * 0.01 * 0.99 / moved.numel())
    assert abs(moved.mean().item() - 0.01 * steps) < 6 * standard_error
    assert torch.equal(p.dequantize()[:, [0, -1]], before[:, [0, -1]])  # among 128,000 chances to move


def test_decay_alone_shrinks_weights_by_its_formula():
    p = stored((256, 64))
    before = p.dequantize()
    optimizer = optimizer_of(p, lr=1e-2, weight_decay=0.5)
    for _ in range(40):
        p.grad = torch.zeros(256, 64)
        optimizer.step()
    share = (p.dequantize() * before).sum() / before.square().sum()
    # (1 - lr decay)^40; 16,384 weights, each with a spread of some 3 % of their size
    assert share.item() == pytest.approx((1 - 1e-2 * 0.5) ** 40, abs=2e-3)


def test_the_learning_rate_that_is_set_is_used():
    schedule = ScheduleSection(warmup_steps=2, final_ratio=0.0)
    for name in NAMES:
        p = stored(std=1e-3)
        optimizer = optimizer_of(p, name=name, lr=1.0, weight_decay=0.0, betas=(0.0, 0.95))
        for step in (0, 1, 5):
            before = p.dequantize()
            ratio = lr_ratio(schedule, step, 6)
            set_lr(optimizer, 1e-3 * ratio)
            p.grad = torch.full((64, 64), 1e-2)
            optimizer.step()
            moved = (before - p.dequantize()).mean().item()
            expected = 1e-3 * ratio * (1e-2 if name == "sgd" else 1.0)
            assert moved == pytest.approx(expected, rel=0.1, abs=2e-6), (name, step)  # 8 and 4 bit moments


def test_clipping_scales_the_gradients_that_the_update_sees():
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = stored()
    layer.weight.grad = torch.full((64, 64), 3.0)
    norm = clip_gradients(layer, 1.0)
    assert norm.item() == pytest.approx(3.0 * 64)
    torch.testing.assert_close(layer.weight.grad, torch.full((64, 64), 1 / 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_have_the_types_that_the_optimizer_gives_a_plain_parameter(name, dtype):
    p, plain = stored(dtype=dtype), nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    ours, reference = (optimizer_of(q, name=name) for q in (p, plain))
    for q, optimizer in ((p, ours), (plain, reference)):
        q.grad = torch.randn(64, 64).to(dtype)
        optimizer.step()
    found, expected = ours.state[p], reference.state[plain]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is type(value), key
        if type(value) is torch.Tensor:
            assert found[key].dtype is value.dtype, key


def test_second_moment_in_bfloat16_follows_falling_gradients():
    """Rounded to nearest, a bfloat16 second moment with beta2 = 0.999 would stay where it is."""
    p = stored((64, 64), dtype=torch.bfloat16)
    optimizer = optimizer_of(p, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0)
    expected = 0.0
    for step in range(400):
        gradient = 1.0 if step < 100 else 0.01
        expected = 0.999 * expected + 0.001 * gradient**2
        p.grad = torch.full((64, 64), gradient, dtype=torch.bfloat16)
        optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"]
    assert v.dtype is torch.bfloat16
    assert v.double().mean().item() == pytest.approx(expected, rel=0.01)  # 4096 of them, 5 % spread each


@pytest.mark.parametrize("name", NAMES)
def test_it_resumes_bit_for_bit_from_its_state_dict(name):
    def run(p, optimizer, first, last):
        for step in range(first, last):
            p.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    torch.manual_seed(1)
    p = stored()
    optimizer = optimizer_of(p, name=name, lr=1e-2)
    run(p, optimizer, 0, 3)
    q = nn.Parameter(p.detach().clone())
    file, random = io.BytesIO(), torch.get_rng_state()
    torch.save(optimizer.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    other = optimizer_of(q, name=name, lr=1e-2)
    other.load_state_dict(saved)
    for resumed in (optimizer, other):
        set_lr(resumed, 5e-3)  # a loaded optimizer has groups of its own
    run(p, optimizer, 3, 6)
    torch.set_rng_state(random)
    run(q, other, 3, 6)
    assert equal(bits(q), bits(p))


def test_forgotten_state_begins_anew():
    p = stored()
    optimizer = optimizer_of(p, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.ones(64, 64)
        optimizer.step()
    optimizer.state.pop(p)
    p.grad = torch.ones(64, 64)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_buckets_bound_what_is_updated_together(monkeypatch):
    monkeypatch.setattr(stored_weights, "BUCKET_WEIGHTS", 3 * 64 * 64)
    params = [stored(seed=i) for i in range(7)] + [stored((256, 64))] + [nn.Parameter(torch.zeros(64))]
    optimizer = optimizer_of(*params)
    sizes = [len(part.stand_ins) for part in optimizer._parts]
    assert sizes == [0, 3, 3, 1, 1]
    whole = [stored(seed=i) for i in range(7)] + [stored((256, 64))] + [nn.Parameter(torch.zeros(64))]
    monkeypatch.setattr(stored_weights, "BUCKET_WEIGHTS", 1 << 30)
    together = optimizer_of(*whole)
    assert [len(part.stand_ins) for part in together._parts] == [0, 8]
    for opt, some in ((optimizer, params), (together, whole)):
        torch.manual_seed(3)
        for p in some:
            p.grad = torch.ones(p.shape)
        opt.step()
    assert all(equal(bits(a), bits(b)) for a, b in zip(params[:8], whole[:8], strict=True))


def test_stand_ins_have_memory_only_while_their_bucket_is_updated(monkeypatch):
    monkeypatch.setattr(stored_weights, "BUCKET_WEIGHTS", 2 * 64 * 64)
    params = [stored(seed=i) for i in range(5)]
    optimizer = optimizer_of(*params)
    stand_ins = [stand_in for part in optimizer._parts for stand_in in part.stand_ins]

    def held() -> int:
        return sum(s.value.untyped_storage().nbytes() for s in stand_ins)

    found = []
    for part in optimizer._parts:
        part.inner.register_step_pre_hook(lambda *_: found.append(held()))
    assert held() == 0
    for p in params:
        p.grad = torch.ones(64, 64)
    optimizer.step()
    assert found == [2 * 64 * 64 * 4, 2 * 64 * 64 * 4, 64 * 64 * 4]
    assert held() == 0


def living(least: int) -> list[torch.Tensor]:
    """Plain floating tensors of at least so many numbers whose memory exists."""
    gc.collect()
    return [
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter)
        and t.is_floating_point()
        and t.numel() >= least
        and t.untyped_storage().nbytes() >= least
    ]


@pytest.mark.parametrize("name", NAMES)
def test_no_float_copy_of_a_weight_outlives_a_step(name):
    others = living(96 * 64)  # left by other tests; held, so that no id is used anew
    before = {id(t) for t in others}
    p = stored((96, 64), dtype=torch.bfloat16)
    optimizer = optimizer_of(p, name=name)
    p.grad = torch.ones(96, 64, dtype=torch.bfloat16)
    optimizer.step()
    optimizer.zero_grad()
    states = {id(s) for s in optimizer.state[p].values()} | {
        id(inner)
        for s in optimizer.state[p].values()
        if hasattr(s, "__tensor_flatten__")
        for inner in map(lambda n, s=s: getattr(s, n), s.__tensor_flatten__()[0])
    }
    assert [t.shape for t in living(96 * 64) if id(t) not in states | before] == []
    assert all(part.stand_ins[0].value.untyped_storage().nbytes() == 0 for part in optimizer._parts)


def test_bytes_a_weight_are_those_of_the_table():
    """Parameters, states and gradients at their most together, in bytes a weight of a bfloat16 model."""
    table = {
        ("adamw", False): 8.0,  # 2 weight + 2 gradient + 4 moments
        ("adamw", True): 7.0,
        ("stochastic_adamw", False): 10.0,
        ("stochastic_adamw", True): 9.0,
        ("adamw8bit", False): 6.0,
        ("adamw8bit", True): 5.0,
        ("sgd", False): 6.0,
        ("sgd", True): 5.0,
    }
    N, K = 256, 512
    for (name, low), expected in table.items():
        p = stored((N, K), dtype=torch.bfloat16) if low else nn.Parameter(torch.randn(N, K).bfloat16())
        optimizer = optimizer_of(p, name=name)
        p.grad = torch.ones(N, K, dtype=torch.bfloat16)
        optimizer.step()
        total = sum(map(nbytes, [p, p.grad, *optimizer.state[p].values()]))
        scales = 4 / K + 2 * 4 / 256  # of rows, and of both moments' blocks
        tables = 2 * 256 * 4 / (N * K)  # the values that 8 bits stand for
        assert expected <= total / (N * K) <= expected + scales + tables + 1e-3, (name, low)


def nbytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def test_an_optimizer_a_parameter_gives_the_same_as_one_for_all():
    """As an update in the backward pass has it."""
    together, apart = [[stored(seed=i) for i in range(3)] for _ in range(2)]
    one = optimizer_of(*together)
    several = [optimizer_of(p) for p in apart]
    for params, optimizers in ((together, [one]), (apart, several)):
        torch.manual_seed(5)
        for p in params:
            p.grad = torch.ones(64, 64)
        for optimizer in optimizers:
            optimizer.step()
    assert all(equal(bits(a), bits(b)) for a, b in zip(together, apart, strict=True))


def test_it_steps_in_the_backward_pass():
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in layers:
        layer.weight = stored()
        optimizer = optimizer_of(layer.weight, lr=1e-2)

        def update(p, optimizer=optimizer):
            optimizer.step()
            p.grad = None

        layer.weight.register_post_accumulate_grad_hook(update)
    before = [bits(layer.weight) for layer in layers]
    layers(torch.randn(5, 64)).square().sum().backward()
    assert all(layer.weight.grad is None for layer in layers)
    assert not any(equal(bits(layer.weight), b) for layer, b in zip(layers, before, strict=True))


def test_plain_parameters_alone_need_no_wrapper():
    p = nn.Parameter(torch.zeros(4, 4))
    assert not is_stored_low(p)
    assert is_stored_low(stored())
    assert type(optimizer_of(p)) is torch.optim.AdamW


def test_an_optimizer_with_weights_of_its_own_is_refused():
    class Averaging(torch.optim.SGD):
        def eval(self) -> None:
            """Put the average in place."""

    with pytest.raises(ConfigError, match=r"Averaging keeps weights of its own .* use another optimizer, or"):
        with_stored_weights([{"params": [stored()], "lr": 1e-3}], Averaging)


def test_groups_keep_their_own_settings():
    p, q = stored(), stored(seed=1)
    optimizer = build_optimizer(
        [ParamGroup("a", [p], lr_scale=0.0, weight_decay=0.0), ParamGroup("b", [q])],
        replace(OptimSection(), lr=1e-2),
    )
    assert [(g["name"], g["lr_scale"], g["betas"]) for g in optimizer.param_groups] == [
        ("a", 0.0, (0.9, 0.95)),
        ("b", 1.0, (0.9, 0.95)),
    ]
    before = bits(p), bits(q)
    p.grad = q.grad = torch.ones(64, 64)
    optimizer.step()
    assert equal(bits(p), before[0])
    assert not equal(bits(q), before[1])


@pytest.mark.parametrize("in_backward", [False, True])
def test_parameters_that_come_later_are_refused(in_backward):
    weight = nn.Parameter(StoredInt8.of(torch.randn(8, 16)))
    section = OptimSection(in_backward=in_backward, clip_norm=0.0)
    optimizer = build_optimizer([ParamGroup("rest", [weight])], section)
    groups = len(optimizer.param_groups)
    name = "InBackward" if in_backward else "StoredWeightOptimizer"
    with pytest.raises(NotImplementedError, match=rf"{name}.add_param_group: .* with build_optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == groups
