"""torchtune imports on the installed torchao, and each repair cures its fault and no more."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._functorch import config
from torch.distributed.tensor import DTensor
from torch.utils._config_module import _UNSET_SENTINEL
from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingLinearWeight as Int8Weight
from torchao.prototype.quantized_training import int8_mixed_precision_training
from torchao.quantization import Int4WeightOnlyConfig, quantize_

from qrecipes import compat
from qrecipes.errors import ConfigError

ROOT = Path(__file__).parents[2]


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    variables = {key: value for key, value in os.environ.items() if key != compat.AUTOGRAD_CACHE_VARIABLE}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd="/"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def test_importing_qrecipes_imports_no_torch():
    loaded = run_python(
        "import sys, qrecipes; print([m for m in ('torch', 'torchao', 'torchtune') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_torchtune_imports_after_qrecipes():
    """Everything that used to fail on this torchao: training, the models, NF4 and QAT layers."""
    printed = run_python("""
import json, sys
import qrecipes
import torchtune.training, torchtune.models.llama3_2, torchtune.modules.peft, torchtune.training.quantization
from qrecipes import compat
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchtune.modules.peft.lora import QATLoRALinear
import torch

config = IntxFakeQuantizeConfig(torch.int4, group_size=32)
layer = QATLoRALinear(64, 64, rank=4, alpha=8, weight_qat_config=config)
print(json.dumps({
    "output": list(layer(torch.randn(2, 64)).shape),
    "one NF4 class": NF4Tensor is torchtune.modules.common_utils.NF4Tensor,
    "finder left": not any(isinstance(finder, compat._BeforeTorchtune) for finder in sys.meta_path),
    "again": [compat.install(), compat.alias_torchao_names()],
}))
""")
    assert json.loads(printed.splitlines()[-1]) == {
        "output": [2, 64],
        "one NF4 class": True,
        "finder left": True,
        "again": [[], []],
    }


def test_quantizers_of_torchtune_get_working_configurations():
    from torchtune.training.quantization import Int8DynActInt4WeightQuantizer

    x, linear = torch.randn(4, 64), nn.Linear(64, 32, bias=False)
    expected = linear(x)
    quantized = Int8DynActInt4WeightQuantizer(groupsize=32).quantize(nn.Sequential(linear))(x)
    error = (quantized - expected).norm() / expected.norm()
    assert 0 < error < 0.2  # int4 weights in groups of 32 err by about a tenth
    weight_only = compat.int4_weight_only(64, compat.TensorCoreTiledLayout(8))
    assert isinstance(weight_only, Int4WeightOnlyConfig)
    assert weight_only.group_size == 64
    with pytest.raises(ConfigError, match="inner_k_tiles"):
        compat.int4_weight_only(64, compat.TensorCoreTiledLayout(4))


def test_finder_is_installed_once():
    printed = run_python("""
import sys, qrecipes
from qrecipes import compat
print(compat.install(), sum(isinstance(finder, compat._BeforeTorchtune) for finder in sys.meta_path))
""")
    assert printed == "() 1"


def test_low_bit_states_keep_their_dtype_only_after_the_repair():
    printed = run_python("""
import json
import torch
from qrecipes import compat
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

def dtypes():
    found = []
    for cls in (OptimState8bit, OptimState4bit, OptimStateFp8):
        state = cls.zeros((512, 2), dtype=torch.bfloat16)
        made = state.view(-1), state.detach(), torch.ops.aten.slice(state, 0, 0, 256)
        found.append([str(tensor.dtype) for tensor in made])
    return found

state = OptimState8bit.zeros((512,), dtype=torch.float32)
state.copy_(torch.randn(512))
before, changed, again = dtypes(), compat.repair_low_bit_optimizers(), compat.repair_low_bit_optimizers()
equal = torch.equal(state.view(-1).dequantize(), state.dequantize())
print(json.dumps([before, len(changed), again, dtypes(), equal]))
""")
    before, num_changed, again, after, equal = json.loads(printed.splitlines()[-1])
    assert num_changed >= 15
    assert "torch.float32" in before[0]
    assert after == [["torch.bfloat16"] * 3] * 3
    assert again == []
    assert equal


has_the_cache_trap = pytest.mark.skipif(
    not hasattr(DTensor, "_stable_hash_for_caching"),
    reason="this torch keeps tensor classes in the cache's key",
)


@has_the_cache_trap
def test_fsdp2_shards_integers_after_the_repair_and_only_where_it_could_not(monkeypatch):
    """The fault is looked for in FSDP2's source; a torch that has it is stood in for by that source."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    monkeypatch.setattr(_fsdp_param, "nn", nn)  # undone afterwards
    faulty = "self.sharded_param = nn.Parameter(self.to_sharded_dtensor(sharded_param))"
    monkeypatch.setattr(compat.inspect, "getsource", lambda _: "self.sharded_param = nn.Parameter(x, False)")
    assert compat.repair_fsdp2_integers() == ()
    assert _fsdp_param.nn is nn
    monkeypatch.setattr(compat.inspect, "getsource", lambda _: faulty)
    with pytest.raises(RuntimeError, match="can require gradients"):
        _fsdp_param.nn.Parameter(torch.zeros(2, dtype=torch.uint8))
    assert compat.repair_fsdp2_integers() == ("FSDPParam.sharded_param",)
    assert compat.repair_fsdp2_integers() == ()
    integers = _fsdp_param.nn.Parameter(torch.zeros(2, dtype=torch.uint8))
    assert isinstance(integers, nn.Parameter)
    assert not integers.requires_grad
    assert _fsdp_param.nn.Parameter(torch.zeros(2)).requires_grad
    assert not _fsdp_param.nn.Parameter(torch.zeros(2), requires_grad=False).requires_grad


def test_autograd_cache_is_switched_off_here_and_for_children(monkeypatch):
    monkeypatch.setenv(compat.AUTOGRAD_CACHE_VARIABLE, "1")
    monkeypatch.setattr(config._config["enable_autograd_cache"], "env_value_force", _UNSET_SENTINEL)
    with config.patch(enable_autograd_cache=True):
        assert len(compat.disable_autograd_cache()) == 2
        assert not config.enable_autograd_cache
        assert os.environ[compat.AUTOGRAD_CACHE_VARIABLE] == "0"
        assert compat.disable_autograd_cache() == ()


@has_the_cache_trap
def test_autograd_cache_that_the_environment_forces_is_refused(monkeypatch):
    monkeypatch.setattr(config._config["enable_autograd_cache"], "env_value_force", True)
    with pytest.raises(ConfigError, match="unset the variable"):
        compat.disable_autograd_cache()


def test_torchao_int8_training_multiplies_in_int8_only_after_the_repair(monkeypatch):
    """Before, output and gradients are bit-equal to the plain layer's: nothing was quantized."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    monkeypatch.setitem(Int8Weight._TORCH_FN_TABLE, Int8Weight, dict(Int8Weight._TORCH_FN_TABLE[Int8Weight]))
    Int8Weight._TORCH_FN_TABLE[Int8Weight].pop(
        nn.functional.linear, None
    )  # another test may have repaired it

    def errors():
        quantized = copy.deepcopy(plain)
        quantize_(quantized, int8_mixed_precision_training())
        pairs = zip(outputs_and_gradients(quantized, x), outputs_and_gradients(plain, x), strict=True)
        return [((a - b).float().norm() / b.float().norm()).item() for a, b in pairs]

    assert errors() == [0, 0, 0]
    assert len(compat.repair_torchao_int8_mixed_precision()) == 1
    assert compat.repair_torchao_int8_mixed_precision() == ()
    assert all(0.001 < error < 0.1 for error in errors())  # a row of 64 INT8 values errs by about a hundredth


def outputs_and_gradients(model: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    model, point = copy.deepcopy(model), x.clone().requires_grad_()
    y = model(point)
    y.float().square().sum().backward()
    return [y.detach(), point.grad, model[0].weight.grad]
