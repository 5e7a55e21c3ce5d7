"""From a model's name and arguments to an nn.Module with random weights, on any device.

`hf:` names a Hugging Face folder, whose config.json says which builder of torchtune makes it; `torchtune:`
reaches every builder, component builders included; `timm:` every model that timm knows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from torch import Tensor, nn

from qrecipes import compat
from qrecipes.errors import ConfigError, WeightsError
from qrecipes.models import gemma2, hub
from qrecipes.models.families import Config
from qrecipes.models.sources import pretrained, resolve, translate
from qrecipes.quant.linear import QuantLinear

if TYPE_CHECKING:
    from qrecipes.config.run import ModelSection

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Builder:
    """A function of torchtune that returns a model or a part of one."""

    family: str
    name: str
    function: Callable[..., nn.Module]
    exported: bool
    """Whether the family exports it; the name alone, without the family, reaches exported builders only."""

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Its arguments, by name."""
        return dict(inspect.signature(self.function).parameters)

    @property
    def required(self) -> list[str]:
        """Arguments without a default."""
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ]


def build(
    section: ModelSection,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    initialize: bool | None = None,
) -> nn.Module:
    """The model of `section`, ready for its weights; with random ones where it names none.

    Random weights are deterministic given torch's global seed. Where weights will be loaded, those of a
    torchtune decoder are left as the memory was, which saves minutes with a large model, and no random number
    is drawn; `initialize` says otherwise. Built in float32, then the parameters are cast to `dtype`, and the
    buffers of timm's models with them. torchtune's buffers, its rotary caches, stay float32, and so do norms
    that keep running statistics. On "meta" nothing is allocated or initialized.

    Raises:
        ConfigError: if the source is unknown, or does not take the arguments.
        WeightsError: if a Hugging Face folder is missing, or of a kind that torchtune does not compute.
    """
    section = resolve(section)
    kind, _, name = section.source.partition(":")
    if kind not in ("torchtune", "timm") or not name:
        raise ConfigError(
            f"model.source: {section.source!r} is not 'hf:FOLDER', 'torchtune:BUILDER', "
            "'torchtune:FAMILY.BUILDER' or 'timm:NAME'"
        )
    device = torch.device(device)
    construct = (
        _torchtune_model(name, section.args)
        if kind == "torchtune"
        else _timm_model(name, section.args, device)
    )
    default_dtype = dtype if _quantizes(construct) else torch.float32
    if initialize is None:
        initialize = pretrained(section) is None
    if kind == "torchtune" and not initialize and device.type != "meta":
        model = _uninitialized(construct, default_dtype, dtype, device)
        if model is not None:
            return model
    with _default_dtype(default_dtype), device:
        model = construct()
    if kind == "torchtune":
        gemma2.repair_(model)
        if device.type != "meta":
            initialize_(model, section.init_std)
    cast_(model, dtype, buffers=kind == "timm")
    return model


def build_skeleton(config: Config, folder: Path, args: dict[str, Any]) -> nn.Module:
    """The decoder that the config.json of a Hugging Face `folder` describes, on the meta device.

    Raises as `build`.
    """
    builder, arguments = translate(config, folder, args)
    with torch.device("meta"):
        model = _torchtune_model(builder, arguments)()
    gemma2.repair_(model)
    return model


def check_source(section: ModelSection) -> None:
    """Raise ConfigError where `build` would refuse the source or its arguments; allocates nothing, and
    fetches nothing from the hub."""
    kind, _, name = section.source.partition(":")
    if kind == "timm":
        build(section, dtype=torch.float32, device="meta")
        return
    if kind == "hf" and hub.is_repository(name) and not Path(name).exists():
        return  # its config.json is read when the run starts
    try:
        resolved = resolve(section)
        _torchtune_model(resolved.source.partition(":")[2], resolved.args)
    except WeightsError as error:
        raise ConfigError(f"model.source: {error}") from error


def resolve_dtype(section: ModelSection, device: torch.device | str) -> torch.dtype:
    """The type of the parameters: `section.dtype`, where "auto" is bfloat16 on a GPU, float32 elsewhere."""
    if section.dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return DTYPES[section.dtype]


@cache
def list_builders() -> dict[str, Builder]:
    """Every builder of torchtune that can be imported here, by "FAMILY.NAME".

    Families whose optional dependency is missing (torchvision, for those with images) are left out.
    """
    import torchtune.models

    builders = {}
    for info in iter_modules(torchtune.models.__path__):
        if info.ispkg:
            for builder in _family_builders(info.name):
                builders[f"{builder.family}.{builder.name}"] = builder
    return builders


@torch.no_grad()
def initialize_(model: nn.Module, std: float) -> None:
    """Draw the weights of linear layers and embeddings from N(0, `std`^2), in place; biases become zero.

    torchtune leaves embeddings at N(0, 1), which starts the loss far above log(vocabulary). Norms and
    adapters keep torchtune's values; a DoRA magnitude follows from its weight.
    """
    from torchtune.modules.peft import get_adapter_params

    adapters = get_adapter_params(model)
    for fqn, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or hasattr(module, "adapter_params"):
            own = {
                name: p
                for name, p in module.named_parameters(recurse=False)
                if f"{fqn}.{name}" not in adapters
            }
            if "weight" in own:
                # not normal_, which NF4 weights lack
                own["weight"].copy_(torch.randn(own["weight"].shape, device=own["weight"].device) * std)
            if "bias" in own:
                own["bias"].zero_()
        position = getattr(module, "position_embedding", None)
        if isinstance(position, nn.Parameter):  # uninitialized in torchtune's CLIP text encoder
            position.normal_(0.0, std)
    initialize_adapter_magnitudes_(model)


def initialize_adapter_magnitudes_(model: nn.Module) -> None:
    """Set the magnitudes of DoRA layers from their weights; to be called whenever those have changed."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()


@torch.no_grad()
def cast_(model: nn.Module, dtype: torch.dtype, *, buffers: bool) -> None:
    """Cast floating-point parameters in place, and buffers if asked; tensor subclasses (NF4) stay as is, and
    low-bit layers compute in `dtype` with their scales as they are.

    Modules that keep running statistics stay float32 as a whole: batch norm refuses weights of another type
    than its statistics, and statistics lose their small updates in bfloat16.
    """
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            continue
        if isinstance(module, QuantLinear):
            module.to(dtype)
            continue
        for tensor in [
            *module.parameters(recurse=False),
            *(module.buffers(recurse=False) if buffers else ()),
        ]:
            if type(tensor.data) is Tensor and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _uninitialized(
    construct: partial[nn.Module], default_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> nn.Module | None:
    """A torchtune decoder whose parameters are memory as it was, and whose rotary caches are right.

    None where a model holds what its weights' file may not: adapters, quantized weights, other buffers.
    """
    from torchtune.modules import TransformerDecoder

    with _default_dtype(default_dtype), torch.device("meta"):
        model = construct()
    rotary: list[Any] = [module for module in model.modules() if hasattr(module, "rope_init")]
    cached = {id(buffer) for module in rotary for buffer in module.buffers()}
    if (
        not isinstance(model, TransformerDecoder)
        or any(hasattr(module, "adapter_params") for module in model.modules())
        or any(type(parameter.data) is not Tensor for parameter in model.parameters())
        or any(id(buffer) not in cached for buffer in model.buffers())
        or any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    ):
        return None
    gemma2.repair_(model)
    cast_(model, dtype, buffers=False)
    model.to_empty(device=device)
    with _default_dtype(torch.float32), device:
        for module in rotary:
            module.rope_init()
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _quantizes(construct: partial[nn.Module]) -> bool:
    """Whether a torchtune builder makes NF4 weights, which keep the type that they were made from."""
    parameter = inspect.signature(construct).parameters.get("quantize_base")
    return parameter is not None and parameter.default is True


def _torchtune_model(name: str, arguments: dict[str, Any]) -> partial[nn.Module]:
    builder = _find_builder(name)
    return partial(builder.function, **_checked_arguments(builder, arguments))


def _find_builder(name: str) -> Builder:
    """The builder called `name`, "BUILDER" or "FAMILY.BUILDER"."""
    compat.install()
    builders = list_builders()
    if name in builders:
        return builders[name]
    family, dot, _ = name.partition(".")
    candidates = {full: builder for full, builder in builders.items() if builder.name == name}
    exported = [builder for builder in candidates.values() if builder.exported]
    if len(exported) == 1:
        return exported[0]
    if candidates:
        why = "several families export it" if exported else "no family exports it"
        raise ConfigError(
            f"model.source: torchtune:{name}: {why}; name the family: "
            + ", ".join(f"torchtune:{full}" for full in sorted(candidates))
        )
    if dot:
        _require_family(family)
    short = [builder.name for builder in builders.values() if builder.exported]
    close = get_close_matches(name, [*short, *builders], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(match) for match in close)}?" if close else "see torchtune.models"
    raise ConfigError(f"model.source: torchtune:{name}: torchtune has no such builder; {hint}")


def _require_family(family: str) -> None:
    """Raise where `family` is unknown, or cannot be imported for want of an optional dependency."""
    import torchtune.models

    families = [info.name for info in iter_modules(torchtune.models.__path__) if info.ispkg]
    if family not in families:
        close = get_close_matches(family, families, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(
            f"model.source: torchtune has no model family {family!r}{hint}; families: {', '.join(families)}"
        )
    try:
        import_module(f"torchtune.models.{family}")
    except ImportError as error:
        raise ConfigError(
            f"model.source: torchtune's family {family!r} cannot be imported: {error}; "
            "install qrecipes[vision]"
        ) from error


def _family_builders(family: str) -> list[Builder]:
    """Builders that a family exports, under whatever name, and those that its modules define besides."""
    package = f"torchtune.models.{family}"
    try:
        exports = import_module(package)
        modules = [import_module(f"{package}.{info.name}") for info in iter_modules(exports.__path__)]
    except ImportError:
        return []
    found = {name: value for name, value in vars(exports).items() if _is_builder(value)}
    exported = set(found)
    for module in modules:
        for name, value in vars(module).items():
            if (
                getattr(value, "__module__", None) == module.__name__
                and not name.startswith("_")
                and _is_builder(value)
            ):
                found.setdefault(name, value)
    return [Builder(family, name, found[name], exported=name in exported) for name in sorted(found)]


def _is_builder(value: object) -> bool:
    """Whether `value` is a function, or a partial of one, that returns a module."""
    function = value.func if isinstance(value, partial) else value
    if not inspect.isfunction(function):
        return False
    if "return" not in function.__annotations__:  # two component builders of torchtune lack the annotation
        return function.__module__.endswith("._component_builders")
    returned = _type_hints(function)["return"]
    return inspect.isclass(returned) and issubclass(returned, nn.Module)


def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function.func if isinstance(function, partial) else function)


def _checked_arguments(builder: Builder, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with the types that the builder's signature declares."""
    parameters = builder.parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    for name in arguments:
        if name not in named and not open_ended:
            close = get_close_matches(name, named, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes: {', '.join(named) or 'none'}"
            raise ConfigError(f"model.args.{name}: {builder.name} has no such argument; {hint}")
    missing = [name for name in builder.required if name not in arguments]
    if missing:
        raise ConfigError(f"model.args: {builder.name} also needs {', '.join(missing)}")
    hints = _type_hints(builder.function)
    return {name: _checked_argument(name, value, hints.get(name, Any)) for name, value in arguments.items()}


def _checked_argument(name: str, value: Any, hint: Any) -> Any:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
        return adapter.validate_python(
            tuple(value) if _wants_tuple(hint) and isinstance(value, list) else value
        )
    except (ValidationError, PydanticUserError) as error:
        wanted = (
            getattr(hint, "__name__", str(hint))
            if inspect.isclass(hint)
            else str(hint).replace("typing.", "")
        )
        raise ConfigError(
            f"model.args.{name}: expected {wanted}, got {value!r} ({type(value).__name__})"
        ) from error


def _wants_tuple(hint: Any) -> bool:
    return getattr(hint, "__origin__", hint) is tuple


def _timm_model(name: str, arguments: dict[str, Any], device: torch.device) -> partial[nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.source: timm:{name} needs timm and torchvision ({error}); install qrecipes[vision]"
        ) from error
    if not timm.is_model(name):
        close = get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(repr(match) for match in close)}?"
            if close
            else "see timm.list_models()"
        )
        raise ConfigError(f"model.source: timm:{name}: timm has no such model; {hint}")
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # what follows the dot of `name`
        raise ConfigError(f"model.source: timm:{name}: {error}") from error
    if device.type == "meta":
        arguments = arguments | {"pretrained": False}  # weights have no place to go to
    return partial(_create_timm_model, name, arguments)


def _create_timm_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise ConfigError(f"model.args: timm:{name} refuses them: {error}{_timm_hint(error)}") from error
    except (OSError, RuntimeError) as error:
        if not arguments.get("pretrained"):
            raise
        raise ConfigError(
            f"model.args.pretrained: timm could not fetch the weights of {name}: {error}; without a network, "
            "leave `pretrained` out and give model.weights a safetensors file of this model"
        ) from error


def _timm_hint(error: TypeError) -> str:
    """A close match for the argument that a timm class does not take."""
    import timm.models

    refused = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = refused and getattr(timm.models, refused[1], None)
    if not refused or cls is None:
        return ""
    close = get_close_matches(refused[2], list(inspect.signature(cls).parameters), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
