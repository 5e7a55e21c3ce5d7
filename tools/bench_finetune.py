"""Fine-tuning steps of a 7B model through adapters, ours, peft's with bitsandbytes and torchtune's, and of
quantization-aware training, in one run.

    tools/bench_finetune.py [--shapes 7b ...] [--cases NAME ...] [--layers N] [--output FILE.json] [--profile]

`7b` is Llama 2 7B's shape, all 32 layers, with 4 x 1024 tokens, `7b-long` the same with 8 x 2048; `tiny`
shows on a CPU that the tool works.
Weights and tokens are random; adapters have rank 64 and alpha 16 on every linear layer of the blocks, LR-QAT
rank 32. Each case is a process of its own. Cases have suffixes: `, checkpointing` recomputes every block,
`, checkpointing in the graph` has the compiler do so (parallel.recompute_in_graph), `, pointwise` recomputes
only norms and activation functions (parallel.recompute_pointwise). `INT8` cases multiply the frozen base on
INT8 tensor cores, `merged forward` cases by base and adapter as one weight, `bf16 scales` keep 5.5 bits a
weight where others keep 6. `--list` prints every case.

Our cases are built and stepped by what `qrecipes run train` calls: bfloat16 weights on the device, then the
transform, layer by layer, then compiled blocks; loss and optimizer as the options say, gradients clipped.
`build` in the JSON is how long that takes, and its peak memory. Peers are described in finetune_peers.py.

Medians of the steps after the warm-up. `before` is what the CUDA allocator holds before the first step,
`peak` its peak from the third step on, in 10**9 bytes, and once more in 2**30. `graphs` counts what Dynamo
compiled, and of these what it compiled after the third step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from finetune_peers import STD, Adapters, LlamaShape, peft_step, torchtune_step
from step_timing import Step, each_in_own_process, gigabytes, random_tokens, report, timed_steps
from torch import Tensor, nn
from torch.optim import Optimizer

from qrecipes.config.run import ModelSection, OptimSection, ParallelSection, TaskSection
from qrecipes.models.build import build
from qrecipes.parallel.apply import parallelize
from qrecipes.parallel.process import Process, pick_device
from qrecipes.training.optim import OPTIMIZERS, build_optimizer
from qrecipes.training.passes import passes_for
from qrecipes.training.step import train_step
from qrecipes.training.task import Task
from qrecipes.transforms import REGISTRY
from qrecipes.transforms.base import TransformConfig
from qrecipes.transforms.chain import Chain

SHAPES = {
    "7b": LlamaShape(32, 4096, 11008, 32, 32_000, 4, 1024),
    "7b-long": LlamaShape(32, 4096, 11008, 32, 32_000, 8, 2048),
    "tiny": LlamaShape(2, 128, 384, 4, 500, 2, 32),
}
ADAPTERS = {"7b": Adapters(64, 16.0), "7b-long": Adapters(64, 16.0), "tiny": Adapters(8, 16.0)}
CHECKPOINTING, IN_GRAPH, POINTWISE = ", checkpointing", ", checkpointing in the graph", ", pointwise"
INT8 = {"base_compute": "int8"}
MERGED = {"merged_forward": True}
Peer = Callable[..., Step]


@dataclass(frozen=True)
class Options:
    """What holds for a case of ours beside its method."""

    optimizer: str
    adapter_dtype: str
    loss: str
    parallel: ParallelSection


@dataclass(frozen=True)
class Ours:
    """A registered method with these settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Theirs:
    """A peer's step."""

    make: Peer
    quantized: bool


QAT: dict[str, Any] = {"bits": 4, "rank": 32, "alpha": 1.0}
METHODS: dict[str, Ours | Theirs] = {
    "LoRA bf16": Ours("lora"),
    "QLoRA": Ours("lora", {"base": "nf4"}),
    "QLoRA int4 g32": Ours("lora", {"base": "int4", "group_size": 32}),
    "QA-LoRA": Ours("qa_lora", {"bits": 4, "group_size": 32}),
    "QA-LoRA bf16 scales": Ours("qa_lora", {"bits": 4, "group_size": 32, "scale_dtype": "bfloat16"}),
    "QLoRA merged forward": Ours("lora", {"base": "nf4"} | MERGED),
    "QA-LoRA merged forward": Ours("qa_lora", {"bits": 4, "group_size": 32} | MERGED),
    "LoRA INT8": Ours("lora", INT8),
    "QLoRA INT8": Ours("lora", {"base": "nf4"} | INT8),
    "QA-LoRA INT8": Ours("qa_lora", {"bits": 4, "group_size": 32} | INT8),
    "LR-QAT W4": Ours("lr_qat", QAT),
    "LR-QAT W4 packed": Ours("lr_qat", QAT | {"storage": "int4"}),
    "LR-QAT W4A8 integers": Ours("lr_qat", QAT | {"activation_bits": 8, "integer_forward": True}),
    "full QAT W4": Ours("full_qat", {"bits": 4}),
    "torchao QAT W4 g128": Ours("torchao_qat"),
    "peft LoRA bf16": Theirs(peft_step, quantized=False),
    "peft QLoRA": Theirs(peft_step, quantized=True),
    "torchtune LoRA bf16": Theirs(torchtune_step, quantized=False),
    "torchtune QLoRA": Theirs(torchtune_step, quantized=True),
}
CASES = [
    name + how
    for name, method in METHODS.items()
    for how in ("", *([POINTWISE, IN_GRAPH] if isinstance(method, Ours) else []), CHECKPOINTING)
]


def main() -> int:
    """Measure every case of every shape, and print the table last."""
    args = arguments()
    if args.list:
        print("\n".join(args.cases))
        return 0
    if args.worker:
        report(measure(args))
        return 0
    cases = [
        ({"shape": shape, "case": case}, worker_arguments(args, shape, case))
        for shape in args.shapes
        for case in args.cases
    ]
    return each_in_own_process(__file__, cases, args.timeout, table, args.output)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the cases, and measure none")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw8bit", help="of our cases")
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--loss", choices=("plain", "chunked", "liger"), default="chunked")
    parser.add_argument("--eager", action="store_true", help="do not compile our cases")
    parser.add_argument("--cuda-graphs", action="store_true", help="of our cases: parallel.cuda_graphs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def worker_arguments(args: argparse.Namespace, shape: str, case: str) -> list[str]:
    """The arguments with which this script measures one case."""
    passed = ["--shapes", shape, "--cases", case, "--steps", str(args.steps), "--optimizer", args.optimizer]
    passed += ["--adapter-dtype", args.adapter_dtype, "--loss", args.loss]
    passed += ["--layers", str(args.layers)] if args.layers else []
    flags = {"--eager": args.eager, "--cuda-graphs": args.cuda_graphs, "--profile": args.profile}
    return [*passed, *(flag for flag, is_set in flags.items() if is_set)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build and train one model in this process."""
    name, case = args.shapes[0], args.cases[0]
    shape, adapters, device = SHAPES[name], ADAPTERS[name], pick_device("auto")
    shape = replace(shape, layers=args.layers or shape.layers)
    method = METHODS[case.removesuffix(CHECKPOINTING).removesuffix(POINTWISE).removesuffix(IN_GRAPH)]
    checkpointing = case.endswith((CHECKPOINTING, IN_GRAPH))
    torch.manual_seed(0)
    settings: dict[str, Any] = {}
    if isinstance(method, Ours):
        parallel = ParallelSection(
            compile=not args.eager,
            checkpointing="full" if checkpointing else "none",
            recompute_pointwise=case.endswith(POINTWISE),
            recompute_in_graph=case.endswith(IN_GRAPH),
            cuda_graphs=args.cuda_graphs,
        )
        options = Options(args.optimizer, args.adapter_dtype, args.loss, parallel)
        settings = asdict(options)
        training = our_training(shape, adapters, device, method, options)
        step, built = training.step, training.built
    else:
        start = time.perf_counter()
        step = method.make(shape, adapters, device, quantized=method.quantized, checkpointing=checkpointing)
        built = build_cost(start, device)
    found = timed_steps(step, args.steps, shape.rows * shape.length, device, profile=args.profile)
    return found | {"layers": shape.layers, "settings": settings, "build": built}


def build_cost(start: float, device: torch.device) -> dict[str, Any]:
    """Seconds since `start`, and peak memory of the process so far."""
    if device.type != "cuda":
        return {"seconds": round(time.perf_counter() - start, 1)}
    torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 1)
    gc.collect()
    torch.cuda.empty_cache()  # what was quantized leaves holes that no activation may fit
    return {"seconds": seconds, "peak_memory_gb": gigabytes(torch.cuda.max_memory_allocated)}


@dataclass(frozen=True)
class Training:
    """A model with adapters, ready to be trained as `qrecipes run train` does it."""

    section: ModelSection
    """What the model was built of."""
    config: TransformConfig
    model: nn.Module
    optim: OptimSection
    optimizer: Optimizer
    process: Process
    step: Step
    built: dict[str, Any]
    """What building cost."""


def our_training(
    shape: LlamaShape,
    adapters: Adapters,
    device: torch.device,
    method: Ours,
    options: Options,
) -> Training:
    """The training of random weights with this method."""
    start = time.perf_counter()
    section = model_section(shape)
    model = random_model(shape, device)
    cls: Any = REGISTRY[method.name].Config
    common: dict[str, Any] = {"rank": adapters.rank, "alpha": adapters.alpha}
    common |= {"adapter_dtype": options.adapter_dtype, "emulate": device.type != "cuda"}
    known = {setting.name for setting in fields(cls)}
    config = cls(**{key: value for key, value in common.items() if key in known} | method.settings)
    chain = Chain.from_configs([config])
    model = chain.swap(model)
    built = build_cost(start, device)
    process = Process(0, 1, device, None)
    model = parallelize(model, options.parallel, process, chain).train()
    optimized: Any = OptimSection
    optim = optimized(name=options.optimizer, lr=1e-4, weight_decay=0.0, clip_norm=0.3)
    optimizer = build_optimizer(chain.param_groups(model), optim)
    learnt: Any = TaskSection
    task = Task(learnt(loss=options.loss), compile=options.parallel.compile)
    passes = passes_for(options.parallel, process, optimizer)
    batch = random_tokens(shape.rows, shape.length, shape.vocabulary)

    numbers = itertools.count()

    def step() -> Tensor:
        number = next(numbers)  # what a method does at some steps only costs as much as in a run
        clip_norm = optim.clip_norm
        return train_step(model, optimizer, chain, [batch], task, number, clip_norm, process, passes).loss

    return Training(section, config, model, optim, optimizer, process, step, built)


def model_section(shape: LlamaShape) -> ModelSection:
    """torchtune's Llama 2 of a shape."""
    sizes: dict[str, Any] = {"num_layers": shape.layers, "embed_dim": shape.width, "num_heads": shape.heads}
    sizes |= {"num_kv_heads": shape.heads, "intermediate_dim": shape.hidden, "vocab_size": shape.vocabulary}
    return ModelSection(
        source="torchtune:llama2.llama2",
        args=sizes | {"max_seq_len": max(4096, shape.length)},
        dtype="bfloat16",
    )


def random_model(shape: LlamaShape, device: torch.device) -> nn.Module:
    """Llama 2 in bfloat16, made on the device as one is whose weights will be loaded."""
    model = build(model_section(shape), dtype=torch.bfloat16, device=device, initialize=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, STD) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def table(results: list[dict[str, Any]]) -> str:
    """Speed, memory and compilations of every case."""
    lines = [
        f"{'shape':8}{'case':50}{'step ms':>9}{'tok/s':>9}{'before GB':>11}{'peak GB':>9}{'GiB':>7}"
        f"{'graphs':>8}{'later':>7}{'build s':>9}"
    ]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['shape']:8}{r['case']:50} failed: {r['failed'].strip().splitlines()[-1][:120]}")
            continue
        before, peak = (r[key] or float("nan") for key in ("memory_before_gb", "peak_memory_gb"))
        lines.append(
            f"{r['shape']:8}{r['case']:50}{r['step_ms']:9.2f}{r['per_s']:9,.0f}{before:11.2f}{peak:9.2f}"
            f"{peak * 1e9 / 2**30:7.2f}{r['graphs']:8}{r['graphs_after_step_3']:7}"
            f"{r['build']['seconds']:9.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
