"""Combinations of an optimizer with the rest of a run that are refused, with what to do instead."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from harness import Inert

from qrecipes.config import parse, rules
from qrecipes.errors import ConfigError
from qrecipes.training.optim import OPTIMIZERS
from qrecipes.transforms import REGISTRY
from qrecipes.transforms.base import StepContext, TransformConfig, register

CLIP = "optim.clip_norm=0"
SCHEDULE_FREE = ['optim.name="schedule_free_adamw"', 'schedule.kind="constant"']


def loaded(*overrides: str):
    return parse.load("tiny/llm", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ['optim.name="schedule_free_adamw"'],
            r"schedule\.kind: 'cosine' lowers .*set schedule\.kind = \"constant\" \(warm-up is fine\)",
        ),
        (["optim.in_backward=true"], r"optim\.clip_norm: 1\.0 .*in_backward = true .*set clip_norm = 0, or"),
        (
            ["optim.in_backward=true", CLIP, "optim.accumulate=2"],
            r"optim\.accumulate: 2 micro-batches .*set accumulate = 1 and raise data\.batch_size",
        ),
        (['optim.offload="state_and_gradients"'], r'optim\.clip_norm: .*clip_norm = 0, or offload = "state"'),
        (
            ['optim.offload="state_and_gradients"', CLIP, "optim.accumulate=2"],
            r'optim\.accumulate: .*or offload = "state"',
        ),
        (
            ['optim.offload="state"', CLIP, "optim.in_backward=true"],
            r"optim\.in_backward: an offloaded update",
        ),
        (['optim.offload="state"', 'device="cpu"'], r"optim\.offload: 'state' moves .*device is 'cpu'"),
        *(
            ([f'optim.name="{name}"', 'optim.offload="state"', 'schedule.kind="constant"'], r"where .* saves")
            for name in OPTIMIZERS
            if name not in ("adamw", "sgd")
        ),
    ],
)
def test_what_cannot_go_together_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        loaded(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [*SCHEDULE_FREE, "schedule.warmup_steps=5"],
        [*SCHEDULE_FREE, CLIP, "optim.in_backward=true"],
        ['optim.offload="state"'],
        ['optim.offload="state"', "optim.accumulate=4"],
        ['optim.offload="state_and_gradients"', 'optim.name="sgd"', CLIP],
        *(
            [f'optim.name="{n}"', 'schedule.kind="constant"', "optim.in_backward=true", CLIP]
            for n in OPTIMIZERS
        ),
    ],
)
def test_what_goes_together_is_accepted(overrides):
    assert loaded(*overrides)


@dataclass(frozen=True, kw_only=True)
class EarlyConfig(TransformConfig):
    pass


class Early(Inert):
    Config = EarlyConfig

    def before_step(self, ctx: StepContext) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class LateConfig(TransformConfig):
    pass


class Late(Inert):
    Config = LateConfig

    def after_backward(self, ctx: StepContext) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def methods_with_hooks():
    register("early")(Early)
    register("late")(Late)
    yield
    del REGISTRY["early"], REGISTRY["late"]


def test_a_transform_says_which_hooks_it_uses():
    assert Early(EarlyConfig()).hooks == {"before_step"}
    assert Late(LateConfig()).hooks == {"after_backward"}
    assert not Inert(EarlyConfig()).hooks


def complaints(config: TransformConfig, *overrides: str) -> str:
    try:
        rules.check(replace(loaded(*overrides), transform=(config,)))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "early", "late"),
    [
        (["optim.in_backward=true", CLIP], "", "optim.in_backward: True leaves no gradients"),
        (
            ['optim.offload="state_and_gradients"', CLIP],
            "optim.offload: 'state_and_gradients' keeps its own copy",
            "optim.offload: 'state_and_gradients' leaves no gradients",
        ),
        (
            ['optim.offload="state"'],
            "optim.offload: 'state' keeps its own copy",
            "would undo what late may do to them in after_backward",
        ),
        (SCHEDULE_FREE, "optim.name: 'schedule_free_adamw' keeps its own copy", "set another name"),
        ([], "", ""),
    ],
)
def test_transforms_whose_hooks_would_do_nothing_are_refused(overrides, early, late):
    for config, said in ((EarlyConfig(), early), (LateConfig(), late)):
        found = complaints(config, *overrides)
        assert said in found
        assert bool(found) == bool(said)
