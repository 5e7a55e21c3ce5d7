"""Loss and metrics over held-out data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from qrecipes.data import Batch
from qrecipes.parallel.process import Process
from qrecipes.training.task import Task, cross_entropy_sum


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], task: Task, process: Process, most: int = 0
) -> dict[str, float]:
    """Metrics over `batches` (the first `most` of each rank; 0: all), every target weighing the same.

    Training state is left as it was, to the bit: mode and random state are put back.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)
    was_training = model.training
    devices = [process.device] if process.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)  # a method that rounds stochastically is judged on one draw, the same each time
        model.eval()
        try:
            for batch in islice(batches, most or None):
                count = batch.count()
                batch = batch.to(process.device)
                logits = task.logits(model, batch)
                sums[0] += cross_entropy_sum(logits, batch.targets)
                sums[1] += task.correct(logits, batch.targets)
                sums[2] += count
        finally:
            model.train(was_training)
    loss, correct, count = process.sum(sums).tolist()
    return task.summarize(loss / max(count, 1), correct / max(count, 1), int(count))
