"""The LLaMA 7B recipes of QLoRA and QA-LoRA: the papers' settings, and that they train, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import command_line

from qrecipes.config import parse

CONFIGS = [
    f"finetune/{data}_{method}_llama_7b" for data in ("alpaca", "gsm8k") for method in ("qlora", "qa_lora")
]


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_those_of_the_papers(name):
    """Both train 16 rows a step at a constant rate without decay, clipped at 0.3, rank 64 and alpha 16."""
    run = parse.load(name)
    (transform,) = run.transform
    assert run.data.batch_size * run.optim.accumulate == 16
    assert (run.optim.clip_norm, run.optim.weight_decay, run.optim.betas) == (0.3, 0.0, (0.9, 0.999))
    assert (run.schedule.kind, run.schedule.warmup_steps) == ("constant", 0)
    assert (transform.rank, transform.alpha) == (64, 16.0)
    assert run.optim.name == "adamw8bit"
    assert not run.data.conversation.packing  # rows of like length, in buckets
    assert run.data.sequence_length == 1024 + 256
    assert run.optim.lr == (2e-4 if "_qlora_" in name else 2e-5)
    if "_qa_lora_" in name:
        assert (transform.bits, transform.group_size, transform.pool) == (4, 32, "sum")
    else:
        assert (transform.base, transform.double_quantized, transform.dropout) == ("nf4", True, 0.1)


@pytest.mark.parametrize("name", CONFIGS[:2])
def test_they_train_and_resume_exactly_on_a_small_model(name, tmp_path):
    """8-bit states, rows of like length, clipping and adapters together; the losses of a run that was
    stopped are those of one that was not.

    The optimizer's update is not compiled, which takes longer than the runs; the tests of checkpoints have it
    compiled.
    """

    def train(output: Path, steps: int) -> tuple[list[float], list[float]]:
        """Training and held-out losses."""
        overrides = {
            "model.source": '"hf:asset:stories260k"',
            "data.files": '["asset:smalltalk/conversations.jsonl"]',
            "data.validation_fraction": 0.2,
            "data.conversation.format": '"auto"',
            "data.sequence_length": 256,
            "parallel.compile": "false",
            "checkpoint.every": 2,
            "log.progress": "false",
            "log.evaluate_every": 0,
            # a sum over 32 inputs wants a lower rate than one input
            "optim.lr": 2e-4 if "qa_lora" in name else 5e-3,
            # B has the 4,096 values from which on torchao keeps states in 8 bits
            "transform.0.targets": '["*.q_proj", "*.output_proj"]',
            "steps": steps,
            "device": '"cpu"',
            "output": f'"{output}"',
        }
        given = [f"{key}={value}" for key, value in overrides.items()]
        with torch.compiler.set_stance("force_eager"):
            assert command_line("run", "train", "--config", name, *given) == 0
        rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
        return tuple([row[key] for row in rows if key in row] for key in ("loss", "val_loss"))

    losses, held_out = train(tmp_path / "unbroken", 4)
    train(tmp_path / "stopped", 2)
    resumed, judged = train(tmp_path / "stopped", 4)
    assert (resumed, judged[-1]) == (losses, held_out[-1])
    assert held_out[-1] < held_out[0]
    assert len(list((tmp_path / "stopped" / "checkpoints").glob("frozen_*"))) == 1
