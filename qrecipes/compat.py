"""What torchtune 0.6.1 and torchao need to work together, and repairs of faults met in released versions.

Every function looks for the fault itself rather than for a version, changes nothing where there is none, may
be called any number of times, and returns the names of what it changed. When a floor in pyproject.toml makes
one of them always return nothing, delete it.

`install` is called by `import qrecipes` and imports nothing heavy; the rest imports torch and torchao when
called.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from qrecipes.errors import ConfigError

AUTOGRAD_CACHE_VARIABLE = "TORCHINDUCTOR_AUTOGRAD_CACHE"
"""Switches AOTAutograd's compile cache; where it is set when torch is imported, nothing overrides it."""


class _BeforeTorchtune(MetaPathFinder):
    """Adds torchao's missing names when torchtune is first imported, then leaves `sys.meta_path` for good."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchtune":
            return None
        sys.meta_path.remove(self)
        alias_torchao_names()
        # Leaving the list while it is walked makes the import system pass over the next finder, so it starts
        # anew.
        return find_spec(fullname)


class _DropEnumWarning(logging.Filter):
    """Drops what torch 2.13 and later say when torchao 0.18 registers its Enum, which a user cannot mend."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "register_constant() on Enum" not in record.getMessage()


def install() -> tuple[str, ...]:
    """Arrange that the first `import torchtune` finds the torchao names it needs; does not import torch.

    Also hides one warning of torchao's import.
    """
    logger = logging.getLogger("torch.utils._pytree")
    if not any(isinstance(known, _DropEnumWarning) for known in logger.filters):
        logger.addFilter(_DropEnumWarning())
    if "torchtune" in sys.modules or any(isinstance(finder, _BeforeTorchtune) for finder in sys.meta_path):
        return ()
    sys.meta_path.insert(0, _BeforeTorchtune())
    return ("sys.meta_path",)


def alias_torchao_names() -> tuple[str, ...]:
    """Add the torchao names that torchtune 0.6.1 imports and torchao 0.16 to 0.18 dropped or moved.

    Nothing that exists is replaced, but for `torchao.quantization.qat.api.FakeQuantizeConfig`: torchtune's
    `QATLoRALinear` asserts that torchao's quantizers return it, and they return its base class.
    """
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise
        return ()  # torchtune says what is missing, and how to install it
    added = []
    for function in (int4_weight_only, int8_dynamic_activation_int4_weight):
        if not hasattr(quantization, function.__name__):
            setattr(quantization, function.__name__, function)
            added.append(f"torchao.quantization.{function.__name__}")
    return (*added, *_alias_dtypes(), *_alias_fake_quantize_config())


def int4_weight_only(group_size: int = 128, layout: TensorCoreTiledLayout | None = None) -> Any:
    """The function that torchao 0.16 removed, as torchtune's `Int4WeightOnlyQuantizer` calls it."""
    from torchao.quantization import Int4WeightOnlyConfig

    if layout is not None and layout.inner_k_tiles != 8:
        raise ConfigError(
            f"inner_k_tiles: {layout.inner_k_tiles}: torchao packs int4 weights in 8 tiles; use 8"
        )
    return Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")


def int8_dynamic_activation_int4_weight(group_size: int = 32) -> Any:
    """The function that torchao 0.16 removed, as torchtune's `Int8DynActInt4WeightQuantizer` calls it."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    int4 = getattr(torch, "int4")  # noqa: B009 - torch's type stubs lack it
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=int4, weight_granularity=PerGroup(group_size))


class TensorCoreTiledLayout:
    """The layout that torchao 0.18 removed; torchtune only makes one and hands it to `int4_weight_only`."""

    def __init__(self, inner_k_tiles: int = 8) -> None:
        self.inner_k_tiles = inner_k_tiles


def _alias_dtypes() -> list[str]:
    """`torchao.dtypes`, its layout, and the NF4 module under its old name: the same module, so one class."""
    added = []
    if find_spec("torchao.dtypes") is None:
        module = ModuleType("torchao.dtypes")
        module.__path__ = []
        sys.modules["torchao.dtypes"] = module
        sys.modules["torchao"].dtypes = module  # type: ignore[attr-defined]
        added.append("torchao.dtypes")
    dtypes: Any = importlib.import_module("torchao.dtypes")
    if not hasattr(dtypes, "TensorCoreTiledLayout"):
        dtypes.TensorCoreTiledLayout = TensorCoreTiledLayout
        added.append("torchao.dtypes.TensorCoreTiledLayout")
    if "torchao.dtypes.nf4tensor" not in sys.modules and find_spec("torchao.dtypes.nf4tensor") is None:
        nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
        sys.modules["torchao.dtypes.nf4tensor"] = dtypes.nf4tensor = nf4
        added.append("torchao.dtypes.nf4tensor")
    return added


def _alias_fake_quantize_config() -> list[str]:
    qat = importlib.import_module("torchao.quantization.qat")
    api: Any = importlib.import_module("torchao.quantization.qat.api")
    fake_quantizer: Any = importlib.import_module("torchao.quantization.qat.fake_quantizer")
    base = getattr(qat, "IntxFakeQuantizeConfig", None)
    if base is None or getattr(api, "FakeQuantizeConfig", base) is base:
        return []
    api.FakeQuantizeConfig = base
    fake_quantizer.FakeQuantizer = (
        fake_quantizer.IntxFakeQuantizer
    )  # the same class without its deprecation warning
    return ["torchao.quantization.qat.api.FakeQuantizeConfig"]


def repair_low_bit_optimizers() -> tuple[str, ...]:
    """Let AdamW8bit, AdamW4bit and AdamWFp8 train bf16 parameters under FSDP2.

    torchao 0.17 gave their states an appearance dtype, but `view`, `detach`, `slice` and the collectives
    rebuild a state without it. A bf16 state then claims to be float32, and the compiled step stops at
    `aten.view.dtype`. Returns "Class.operator" for each repaired operator.
    """
    import torch
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    probe = OptimState8bit.zeros((256,), dtype=torch.bfloat16)
    if probe.dtype is not torch.bfloat16 or probe.view(-1).dtype is torch.bfloat16:
        return ()
    aten, collective = torch.ops.aten, torch.ops._c10d_functional
    operators = [
        aten.view.default,
        aten.detach.default,
        aten.slice.Tensor,
        collective.all_gather_into_tensor.default,
        collective.wait_tensor.default,
    ]
    if hasattr(collective, "_wrap_tensor_autograd"):
        operators.append(collective._wrap_tensor_autograd.default)
    repaired = []
    for cls in (OptimState8bit, OptimState4bit, OptimStateFp8):
        handlers = cls._ATEN_OP_TABLE[cls]
        for operator in operators:
            if operator in handlers:
                handlers[operator] = _keeping_dtype(handlers[operator], cls)
                repaired.append(f"{cls.__name__}.{operator}")
    return tuple(repaired)


def _keeping_dtype(handler: Callable[..., Any], cls: Any) -> Callable[..., Any]:
    """`handler`, giving its result the dtype that its input appears to have."""
    import torch

    def keep_dtype(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result, dtype = handler(func, types, args, kwargs), args[0].dtype
        if type(result) is not cls or result.dtype is dtype:
            return result
        names, attributes = result.__tensor_flatten__()
        attributes = [dtype if isinstance(value, torch.dtype) else value for value in attributes]
        return cls.__tensor_unflatten__({name: getattr(result, name) for name in names}, attributes)

    return keep_dtype


def repair_fsdp2_integers() -> tuple[str, ...]:
    """Let FSDP2 shard frozen parameters of integers, such as packed weights.

    In torch 2.11 it makes every sharded Parameter one that trains, and then says which do; one of integers
    cannot be made so.
    """
    import torch

    if not torch.distributed.is_available():
        return ()
    module: Any = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    faulty = "nn.Parameter(self.to_sharded_dtensor(sharded_param))"
    if module.nn is not torch.nn or faulty not in inspect.getsource(module.FSDPParam._init_sharded_param):
        return ()

    def parameter(data: torch.Tensor, requires_grad: bool = True) -> torch.nn.Parameter:
        return torch.nn.Parameter(data, requires_grad and (data.is_floating_point() or data.is_complex()))

    module.nn = SimpleNamespace(Module=torch.nn.Module, Parameter=parameter)  # all that it reads of torch.nn
    return ("FSDPParam.sharded_param",)


def disable_autograd_cache() -> tuple[str, ...]:
    """Switch AOTAutograd's compile cache off, here and in child processes, before a low-bit optimizer steps.

    torch 2.13 and 2.14 leave the class of a DTensor's local tensor out of the cache's key, so that under
    FSDP2 a graph compiled for one format of optimizer state is run on another, also by a later process
    through the disk. Torch without `DTensor._stable_hash_for_caching` pickles the local tensor into the key,
    class and all.

    Raises:
        ConfigError: if the environment forces the cache on.
    """
    import torch

    if not torch.distributed.is_available():
        return ()
    from torch._functorch import config
    from torch.distributed.tensor import DTensor

    if not hasattr(DTensor, "_stable_hash_for_caching") or not getattr(
        config, "enable_autograd_cache", False
    ):
        return ()
    config.enable_autograd_cache = False
    if config.enable_autograd_cache:  # the variable was read when torch was imported, and wins
        raise ConfigError(
            f"{AUTOGRAD_CACHE_VARIABLE}={os.environ.get(AUTOGRAD_CACHE_VARIABLE)}: low-bit optimizers and "
            "this cache do not go together in this torch, which mixes up their states; unset the variable"
        )
    os.environ[AUTOGRAD_CACHE_VARIABLE] = "0"
    return ("torch._functorch.config.enable_autograd_cache", AUTOGRAD_CACHE_VARIABLE)


def repair_torchao_int8_mixed_precision() -> tuple[str, ...]:
    """Make torchao's own `int8_mixed_precision_training()` multiply in INT8, for honest comparisons with it.

    Released torchao registers its `F.linear` among the ATen operators, where it is never looked up: training
    goes on in high precision and nothing says so. Never called by qrecipes itself.
    """
    import torch
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingLinearWeight as Weight

    linear = torch.nn.functional.linear
    handler = getattr(Weight, "_ATEN_OP_TABLE", {}).get(Weight, {}).get(linear)
    registered = getattr(Weight, "_TORCH_FN_TABLE", {}).get(Weight, {})
    if handler is None or linear in registered or not hasattr(Weight, "implements_torch_function"):
        return ()
    Weight.implements_torch_function(linear)(handler)
    return ("Int8MixedPrecisionTrainingLinearWeight.linear",)
