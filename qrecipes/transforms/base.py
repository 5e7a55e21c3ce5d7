"""What a low-precision method is: the Transform interface, its configuration and what it is told each
step."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from qrecipes.errors import ConfigError
from qrecipes.quant.linear import QuantLinear

if TYPE_CHECKING:
    from qrecipes.config.run import Run


@dataclass(frozen=True, kw_only=True)
class TransformConfig(AOBaseConfig):
    """Keys that every method's TOML table has; each method's own dataclass adds its keys.

    It is also a torchao configuration: `torchao.quantization.quantize_(model, config)` replaces layers as
    `Chain.swap` does. There `filter_fn` alone selects layers: `targets`, `skip` and sizes are not read, and
    without one every linear layer is taken, the last one, too. `selects` is one that reads the names.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    targets: tuple[str, ...] = ("*",)
    """Fully qualified names of the layers to change, as shell patterns in which `*` also matches dots."""
    skip: tuple[str, ...] = (
        *("output", "head", "lm_head", "*.output", "*.head", "*.lm_head", "*.head.*", "head.*"),
        *("fc", "classifier"),
    )
    """Layers to leave alone, in the same patterns; wins over `targets`."""

    free_on_resume: ClassVar[tuple[str, ...]] = ()
    """Fields that a run may change when it resumes from a checkpoint; the others must be equal."""

    def __post_init__(self) -> None:
        """Raise ConfigError where a field has a value that its type does not allow, as TOML is told before it
        comes here: a choice that is none would be taken for another. A method's own rules come after."""
        for name, adapter in _adapters(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            try:
                adapter.validate_python(value, strict=not isinstance(value, list))
            except ValidationError as error:
                rules = " and ".join(dict.fromkeys(found["msg"] for found in error.errors()))
                raise ConfigError(f"{_method_of(type(self))}.{name}: {value!r}: {rules}") from error

    def fingerprint(self) -> dict[str, Any]:
        """The method and every field that must be equal for a checkpoint to fit a run."""
        fixed = {key: value for key, value in asdict(self).items() if key not in self.free_on_resume}
        return {"method": type(self).__name__} | fixed

    def selects(self, module: nn.Module, fqn: str) -> bool:
        """Whether a linear layer is selected by its name: a `filter_fn` for torchao's `quantize_`."""
        return isinstance(module, nn.Linear) and self.reason_to_skip(fqn) is None

    def reason_to_skip(self, fqn: str) -> str | None:
        """Why the layer called `fqn` is left alone by name, or None where it is selected."""
        for pattern in self.skip:
            if fnmatchcase(fqn, pattern):
                return f"skip pattern {pattern!r}"
        if not any(fnmatchcase(fqn, pattern) for pattern in self.targets):
            return "no target pattern matches"
        return None


@dataclass
class ParamGroup:
    """Parameters that a method owns and trains, with their own optimizer settings."""

    name: str
    params: list[nn.Parameter]
    lr_scale: float = 1.0
    """Times the run's learning rate."""
    weight_decay: float | None = None
    """None: the run's."""


@dataclass
class StepContext:
    """What a method's hooks know of the optimizer step at hand, and may ask of it."""

    step: int
    """Optimizer step, from 0."""
    model: nn.Module
    optimizer: Optimizer
    skip_update: bool = False
    """Set by a hook to leave out this step's update: zero gradients would still move AdamW."""
    state_to_reset: list[nn.Parameter] = field(default_factory=list)
    """Parameters whose optimizer state is forgotten before the update."""
    passes_changed: bool = False
    """Set by `before_step` where forward or backward passes compute otherwise from now on, and not because of
    a tensor: values of tensors, and parameters put in the place of others, are seen without. Passes that were
    recorded (parallel.cuda_graphs) are recorded anew."""

    def apply_requests(self) -> None:
        """Forget the optimizer state of `state_to_reset`, and the request with it."""
        for parameter in self.state_to_reset:
            self.optimizer.state.pop(parameter, None)
        self.state_to_reset.clear()


@dataclass(frozen=True)
class Bounds:
    """What the probe holds a swapped layer to: the least SQNR, in dB, against the original layer.

    A product with a number must also differ from the original in at least one bit. None says that the method
    leaves that product alone, or that there is none (a frozen weight has no gradient); it is not compared.
    """

    output: float | None
    grad_input: float | None
    grad_weight: float | None
    may_equal: bool = False
    """A layer may start bit-equal to the original, as one does whose adapter starts at zero."""


@dataclass(frozen=True)
class MergeBounds:
    """What an export holds a finalized model to, against the same model before: largest relative error of a
    logit in models converted to each type, and of held-out perplexity in the model's own.

    None says that the method does not compute in that type, so nothing is measured; infinity, that it is
    measured and any error is allowed.
    """

    float64: float | None = None
    float32: float | None = math.inf
    bfloat16: float | None = math.inf
    perplexity: float = math.inf

    def plus(self, other: MergeBounds) -> MergeBounds:
        """The bounds of two methods in one model: their errors add up."""

        def add(mine: float | None, theirs: float | None) -> float | None:
            return None if mine is None or theirs is None else mine + theirs

        return MergeBounds(
            add(self.float64, other.float64),
            add(self.float32, other.float32),
            add(self.bfloat16, other.bfloat16),
            self.perplexity + other.perplexity,
        )


class Adapter(NamedTuple):
    """A low-rank change of a frozen linear layer: W + scaling * B A, in peft's terms; with DoRA's magnitudes
    each row of that is scaled to its magnitude."""

    a: Tensor
    """[R, K]."""
    b: Tensor
    """[N, R]."""
    scaling: float
    magnitude: Tensor | None = None
    """[N]."""


C = TypeVar("C", bound=TransformConfig)


class Transform(abc.ABC, Generic[C]):
    """check -> swap -> before_shard -> param_groups -> (before_step, after_backward)* -> finalize.

    Hooks are functions of (step, parameters). A transform keeps no counter, so a resumed run repeats an
    unbroken one bit for bit.
    """

    name: ClassVar[str]
    """Name in TOML, set by `register`."""
    Config: ClassVar[type[TransformConfig]]
    """The frozen dataclass of its TOML table."""
    sqnr_floor_db: ClassVar[float]
    """Least SQNR of a tiny model's output after `swap` against before, in dB."""
    finalize_floor_db: float = 80.0
    """Least SQNR of the output after `finalize` against before, in float32, in dB; a method whose
    configuration decides it sets it when it is made."""
    compares_layers: ClassVar[bool] = True
    """Whether each site is a layer, rows in and rows out, which the probe compares with what came in its
    place; where it is not, `measure` tells what changed."""
    parity_rtol: ClassVar[float] = 1e-3
    """Relative difference of losses allowed between one process and FSDP2, and between one batch and several
    micro-batches; a looser value states its reason."""

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def freezes_rest(self) -> bool:
        """Whether parameters that no transform owns stop training."""
        return True

    @property
    def hooks(self) -> frozenset[str]:
        """Which of `before_step` and `after_backward` the method uses: those that its class overrides.

        A method that uses one only in some configurations says so here. An optimizer that updates in the
        backward pass leaves no gradients to `after_backward`.
        """
        names = ("before_step", "after_backward")
        return frozenset(n for n in names if getattr(type(self), n) is not getattr(Transform, n))

    @property
    def writes_frozen(self) -> bool:
        """Whether parameters of its layers change that no optimizer trains: checkpoints then hold them.

        Only hooks can write them, so a method with hooks that do not says so here.
        """
        return bool(self.hooks)

    def check(self, run: Run) -> None:
        """Raise ConfigError where the run contradicts the method; called before a model is built."""

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError where the method cannot train on `device`; called before a model is built."""

    def reason_to_leave(self, fqn: str, module: nn.Module) -> str | None:
        """Why the layer called `fqn` is left alone, or None where it is to be changed."""
        return self.config.reason_to_skip(fqn)

    def reason_in_part(self, fqn: str, module: nn.Module) -> str | None:
        """What the method leaves as it was in a layer that it changes, called `fqn`, and why; None where that
        is the same for all its layers."""
        return None

    @abc.abstractmethod
    def sites(self, model: nn.Module) -> dict[str, nn.Module]:
        """Modules of the unchanged model that `swap` will replace, by fully qualified name."""

    @abc.abstractmethod
    def swap(self, model: nn.Module) -> nn.Module:
        """Change the model, in place where possible; may return a new root."""

    @abc.abstractmethod
    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """This method's layers in a swapped model, by fully qualified name."""

    @abc.abstractmethod
    def bounds(self) -> Bounds:
        """What the probe holds each of this method's layers to."""

    def layer_bounds(self, layer: nn.Module) -> Bounds:
        """What it holds one of them to, where they differ."""
        return self.bounds()

    def measure(self, model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
        """SQNR in dB of what the method changes at each of its sites in a swapped model, while `run()`
        computes with it, once; of a method that compares no layers. Sites not reached are absent."""
        return {}

    def merge_bounds(self) -> MergeBounds:
        """What an export holds `finalize` to."""
        return MergeBounds()

    def before_shard(self, model: nn.Module) -> None:
        """Called before FSDP2 shards a swapped model, in runs of several processes only; it may replace
        Parameters by ones that say how FSDP2 gathers them.

        Raises:
            ConfigError: if a parameter cannot be gathered as the method asks.
        """

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """Only what this method owns and trains."""
        return []

    def detach_adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """Leave the frozen layers in the place of this method's, and give what they were adapted by, by fully
        qualified name; nothing where the method has no low-rank adapters."""
        return {}

    def load_adapters(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> list[str]:
        """Overwrite the adapters of this method's layers with those of their names; the names that it took.

        Raises:
            ConfigError: if one does not fit its layer: another rank, scaling or kind.
        """
        return []

    def before_step(self, ctx: StepContext) -> None:
        """Called before the first forward pass of an optimizer step."""

    def after_backward(self, ctx: StepContext) -> None:
        """Called after the last backward pass of an optimizer step, before clipping and the update."""

    @property
    def merge_differs(self) -> str | None:
        """What of a layer that `finalize` makes can depend on the kind of device that computes it, where
        training computes the same; None where nothing does."""
        return None

    @abc.abstractmethod
    def finalize(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        """Turn this method's layers into `nn.Linear` or `QuantLinear`, in place where possible.

        What they become is computed on `device`, a layer at a time, and put where the layer was; None: there.
        """


REGISTRY: dict[str, type[Transform]] = {}


@cache
def _adapters(cls: Any) -> dict[str, TypeAdapter[Any]]:
    """What checks each of a configuration's fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {part.name: TypeAdapter(hints[part.name]) for part in fields(cls)}


def _method_of(config: type[TransformConfig]) -> str:
    return next((name for name, cls in REGISTRY.items() if cls.Config is config), config.__name__)


def register(name: str) -> Callable[[type[Transform]], type[Transform]]:
    """Class decorator: make a Transform known by `name` in TOML, and to torchao's `quantize_` by its Config.

    Raises:
        ValueError: if the name is taken.
    """

    def decorate(cls: type[Transform]) -> type[Transform]:
        if name in REGISTRY:
            raise ValueError(f"transform {name!r} is registered twice, by {REGISTRY[name]} and {cls}")
        cls.name = name
        REGISTRY[name] = cls
        if issubclass(cls, LinearTransform):
            register_quantize_module_handler(cls.Config)(cls._replace_alone)
        return cls

    return decorate


def transform_for(config: TransformConfig) -> Transform:
    """The registered Transform that `config` configures.

    Raises:
        ConfigError: if no registered method has this configuration class.
    """
    for cls in REGISTRY.values():
        if cls.Config is type(config):
            return cls(config)
    raise ConfigError(
        f"{type(config).__name__}: no registered transform has this configuration; "
        f"registered: {', '.join(REGISTRY)}"
    )


class LinearTransform(Transform[C]):
    """A method that replaces one `nn.Linear` by one layer.

    A subclass names `Config` and `Layer`. `Layer.from_linear(linear, config)` takes over the linear layer's
    parameters, and `layer.merged()` gives the plain layer that it has become.
    """

    Layer: ClassVar[type[nn.Module]]
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    """Classes of layers that `from_linear` takes; a class derived from one of them is another method's."""

    def check_site(self, fqn: str, module: nn.Module) -> None:
        """Raise ConfigError, naming `fqn`, where the method cannot replace a layer that it selects."""

    @classmethod
    def check_alone(cls, config: C) -> None:
        """Raise ConfigError where torchao's `quantize_`, which gives a method one layer after the other and
        no names, cannot do what a configuration asks for."""

    @classmethod
    def _replace_alone(cls, module: nn.Module, config: C) -> nn.Module:
        cls.check_alone(config)
        return cls._replace(module, config)

    @classmethod
    def _replace(cls, module: nn.Module, config: TransformConfig) -> nn.Module:
        if type(module) not in cls.kinds:
            kinds = ("nn.Linear" if kind is nn.Linear else kind.__name__ for kind in cls.kinds)
            raise ConfigError(
                f"{cls.name}: {type(module).__name__} is not a plain {' or '.join(kinds)}; one method "
                "applies to one layer, so leave it out with filter_fn, or with `skip` in a recipe"
            )
        layer = cls.Layer.from_linear(module, config)  # type: ignore[attr-defined]
        layer.train(module.training)
        return layer

    def sites(self, model: nn.Module) -> dict[str, nn.Module]:
        """Layers of the `kinds` that there is no reason to leave alone."""
        return {
            fqn: module
            for fqn, module in model.named_modules()
            if type(module) in self.kinds and self.reason_to_leave(fqn, module) is None
        }

    def swap(self, model: nn.Module) -> nn.Module:
        """Replace every site by a `Layer`, one after the other: none is kept beyond its replacement."""
        for fqn in self._checked_sites(model):
            if not fqn:  # the model itself is one linear layer
                return self._replace(model, self.config)
            model.set_submodule(fqn, self._replace(model.get_submodule(fqn), self.config))
        return model

    def _checked_sites(self, model: nn.Module) -> list[str]:
        sites = self.sites(model)
        for fqn, module in sites.items():
            self.check_site(fqn, module)
        return list(sites)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Every `Layer` of the model."""
        return {fqn: module for fqn, module in model.named_modules() if isinstance(module, self.Layer)}

    def finalize(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        """Replace every `Layer` by what its `merged()` gives."""
        for fqn, layer in self.layers(model).items():
            merged = _merged_on(layer, device)
            merged.train(layer.training)
            if not fqn:
                return merged
            model.set_submodule(fqn, merged)
        return model


def _merged_on(layer: nn.Module, device: torch.device | None) -> nn.Module:
    """What a layer's `merged()` gives on `device`, where the layer is; the layer stays as it is."""
    home = next(layer.parameters()).device
    if device is None or home.type == "meta" or home == device:
        return layer.merged()  # type: ignore[operator]
    return copy.deepcopy(layer).to(device).merged().to(home)  # type: ignore[operator]


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | QuantLinear]]:
    """Every linear layer of a model, plain, derived or low-bit, with its fully qualified name."""
    for fqn, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantLinear)):
            yield fqn, module


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's own parameters and buffers, parts of tensor subclasses included."""
    return sum(_tensor_bytes(t) for t in [*module.parameters(), *module.buffers()])


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
