"""Training steps of whole models: bf16, INT8 in every variant, and torchao's float8 and INT8, in one run.

    tools/bench_step.py [--shapes 8b 1b vit] [--cases NAME ...] [--output FILE.json] [--profile]

Shapes: `8b` is 4 layers of Llama 3 8B's with 4 x 2048 tokens, `1b` 8 layers of Llama 3.2 1B's with 8 x 2048,
both with a vocabulary of 32,000; `vit` is ViT-g/14 of DINOv2 with 64 images of 224 pixels, 257 tokens each.
Weights are random and bfloat16, blocks compiled one by one, AdamW fused; a step is forward, backward and
update, and the last layer is left alone in every case but one. Each case is a process of its own, since a
graph keeps its memory.

Medians of the steps after the warm-up. Peak memory is the CUDA allocator's, of these steps. `host` is the
time until all of a step's work is queued: near the step's own, the GPU waits for Python. `graphs` counts
those that Dynamo compiled after the third step: recompilations. With --profile the kernels of one more step
are listed, and how long the GPU had nothing to do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from step_timing import each_in_own_process, in_own_process, random_tokens, report, timed_steps
from torch import Tensor, nn

from qrecipes.config.run import ModelSection, OptimSection, ParallelSection, TaskSection
from qrecipes.data import Batch
from qrecipes.models.build import build
from qrecipes.models.view import ModelView
from qrecipes.parallel.apply import parallelize
from qrecipes.parallel.process import Process, pick_device
from qrecipes.training.optim import build_optimizer
from qrecipes.training.optimizer_verbs import norms_of_taken, taking_gradients
from qrecipes.training.passes import passes_for
from qrecipes.training.task import Task
from qrecipes.transforms import REGISTRY
from qrecipes.transforms.chain import Chain

VOCABULARY, CLASSES = 32_000, 45
Change = Callable[[nn.Module], nn.Module]
"""What a case makes of a bfloat16 model."""


@dataclass(frozen=True)
class Case:
    """A change of the model, and settings of the optimizer."""

    change: Change = lambda model: model
    optim: dict[str, Any] = field(default_factory=dict)


def llama(layers: int, width: int, heads: int, kv_heads: int, hidden: int) -> ModelSection:
    """A Llama of torchtune with the small vocabulary."""
    sizes: dict[str, Any] = {"num_layers": layers, "embed_dim": width, "intermediate_dim": hidden}
    sizes |= {"num_heads": heads, "num_kv_heads": kv_heads, "vocab_size": VOCABULARY, "max_seq_len": 2048}
    return ModelSection(source="torchtune:llama3.llama3", args=sizes, dtype="bfloat16")


SHAPES: dict[str, tuple[ModelSection, tuple[int, ...]]] = {
    "8b": (llama(4, 4096, 32, 8, 14336), (4, 2048)),
    "1b": (llama(8, 2048, 32, 8, 8192), (8, 2048)),
    "vit": (
        ModelSection(
            source="timm:vit_giant_patch14_dinov2",
            args={"img_size": 224, "num_classes": CLASSES},
            dtype="bfloat16",
        ),
        (64, 3, 224, 224),
    ),
    "tiny": (llama(2, 64, 4, 2, 128), (2, 64)),
}
"""Models, and sizes of a batch: sequences of tokens, or images. `tiny` shows on a CPU that the tool works."""


def ours(name: str, **settings: Any) -> Change:
    """A registered method with these settings."""

    def change(model: nn.Module) -> nn.Module:
        config: Any = REGISTRY[name].Config(**settings)
        if ModelView.of(model).width < 1024:  # the tiny shape
            tiny = {"min_size": 0, "min_size_grad_weight": 0, "emulate": True}
            config = replace(config, **{key: value for key, value in tiny.items() if hasattr(config, key)})
        return Chain.from_configs([config]).swap(model)

    return change


def float8(recipe: str) -> Change:
    """torchao's float8 training of the blocks."""

    def change(model: nn.Module) -> nn.Module:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        for block in ModelView.of(model).blocks:
            convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name(recipe))
        return model

    return change


def torchao_int8(**settings: Any) -> Change:
    """torchao's INT8 mixed precision of the blocks."""

    def change(model: nn.Module) -> nn.Module:
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_

        for block in ModelView.of(model).blocks:
            quantize_(block, int8_mixed_precision_training(**settings))
        return model

    return change


def ladder() -> dict[str, Case]:
    """Which products are in INT8, of all layers alike, with and without stochastic rounding."""
    every = {"min_size_grad_weight": 0}
    steps = {
        "output": {"grad_input": False, "grad_weight": False},
        "output, grad_input": {"grad_weight": False},
        "all three": {},
    }
    found = {}
    for title, off in steps.items():
        found[f"INT8 {title}"] = Case(ours("int8_mixed_precision", **every, **off))
        found[f"INT8 {title}, stochastic"] = Case(
            ours("int8_mixed_precision", stochastic_rounding=True, **every, **off)
        )
    return found


CASES: dict[str, Case] = {
    "bf16": Case(),
    **ladder(),
    "INT8 all three, INT8 inputs kept": Case(
        ours("int8_mixed_precision", min_size_grad_weight=0, save_int8_input=True)
    ),
    "INT8": Case(ours("int8_mixed_precision")),
    **{
        f"INT8, grad_weight from {size}": Case(ours("int8_mixed_precision", min_size_grad_weight=size))
        for size in (1300, 1800)
    },
    "INT8, last layer too": Case(ours("int8_mixed_precision", skip=())),
    "INT8, from 1100": Case(ours("int8_mixed_precision", min_size=1100)),
    "INT8 weights": Case(ours("int8_weights")),
    "INT8 weights, INT8 forward": Case(ours("int8_weights", int8_forward=True)),
    "bf16, 8-bit AdamW": Case(optim={"name": "adamw8bit"}),
    "INT8 weights, 8-bit AdamW": Case(ours("int8_weights"), {"name": "adamw8bit"}),
    "bf16, AdamW in backward": Case(optim={"in_backward": True, "clip_norm": 0.0}),
    "INT8 weights, AdamW in backward": Case(ours("int8_weights"), {"in_backward": True, "clip_norm": 0.0}),
    "torchao float8 tensorwise": Case(float8("tensorwise")),
    "torchao float8 rowwise": Case(float8("rowwise")),
    "torchao INT8": Case(torchao_int8()),
    "torchao INT8, module_swap": Case(torchao_int8(module_swap=True)),
}


def main() -> int:
    """Measure every case of every shape, and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8b", "1b", "vit"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cuda-graphs", action="store_true", help="parallel.cuda_graphs, of all cases")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one case")
    parser.add_argument(
        "--prepare", type=int, default=0, metavar="N", help="first compile all cases, N at a time, untimed"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        report(measure(args.shapes[0], args.cases[0], args))
        return 0
    chosen = [(shape, case) for shape in args.shapes for case in args.cases]

    def compile_case(pair: tuple[str, str]) -> None:
        in_own_process(__file__, worker_arguments(*pair, args, steps=0), args.timeout)

    if args.prepare:
        with ThreadPoolExecutor(args.prepare) as pool:
            list(pool.map(compile_case, chosen))
    cases = [
        ({"shape": shape, "case": case}, worker_arguments(shape, case, args, args.steps))
        for shape, case in chosen
    ]
    return each_in_own_process(__file__, cases, args.timeout, table, args.output)


def worker_arguments(shape: str, case: str, args: argparse.Namespace, steps: int) -> list[str]:
    """The arguments with which this script measures one case."""
    flags = {"--cuda-graphs": args.cuda_graphs, "--profile": args.profile and steps > 0}
    passed = ["--shapes", shape, "--cases", case, "--steps", str(steps)]
    return [*passed, *(flag for flag, is_set in flags.items() if is_set)]


def measure(shape: str, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build, change and train one model in this process."""
    section, size = SHAPES[shape]
    device = pick_device("auto")
    torch.manual_seed(0)
    model = build(section, dtype=torch.bfloat16, device=device)
    model = CASES[case].change(model)
    parallel = ParallelSection(compile=True, cuda_graphs=args.cuda_graphs)
    process = Process(0, 1, device, None)
    model = parallelize(model, parallel, process, Chain()).train()
    optimizer = build_optimizer(Chain().param_groups(model), OptimSection(lr=1e-5, **CASES[case].optim))
    batch = random_batch(size, device)
    learnt = TaskSection() if len(size) == 2 else TaskSection(kind="classification")
    task, units = Task(learnt, compile=True), batch.targets.numel()
    passes, divisor = passes_for(parallel, process, optimizer), torch.tensor(float(units), device=device)

    def step() -> Tensor:
        with taking_gradients(optimizer):
            loss = passes(model, task, batch, divisor)
        norms_of_taken(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return loss / divisor

    return timed_steps(step, args.steps, units, device, profile=args.profile)


def random_batch(size: tuple[int, ...], device: torch.device) -> Batch:
    """Random tokens and the next ones, or random images and their classes."""
    if len(size) == 2:
        return random_tokens(*size, VOCABULARY, device)
    images = torch.randn(size, device=device, dtype=torch.bfloat16)
    return Batch(images, torch.randint(CLASSES, size[:1], device=device))


def table(results: list[dict[str, Any]]) -> str:
    """Times, in brackets how many times as fast as bf16, and memory."""
    names = ("step ms", 9), ("host", 8), ("per s", 12), ("x bf16", 8), ("peak GB", 9), ("graphs", 8)
    lines = [f"{'shape':6}{'case':38}" + "".join(f"{name:>{width}}" for name, width in names)]
    base = {r["shape"]: r["step_ms"] for r in results if r["case"] == "bf16" and "step_ms" in r}
    for r in results:
        if "failed" in r:
            lines.append(f"{r['shape']:6}{r['case']:38} failed: {r['failed'].strip().splitlines()[-1][:120]}")
            continue
        ratio = base.get(r["shape"], float("nan")) / r["step_ms"]
        memory = r["peak_memory_gb"] or float("nan")
        lines.append(
            f"{r['shape']:6}{r['case']:38}{r['step_ms']:9.2f}{r['host_ms']:8.1f}{r['per_s']:12,.0f}{ratio:8.3f}"
            f"{memory:9.2f}{r['graphs_after_step_3']:8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
