"""Loss and metrics over held-out data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from qrecipes.data import Batch
from qrecipes.models.modes import evaluation_mode
from qrecipes.parallel.process import Process
from qrecipes.training.task import Task


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], task: Task, process: Process, most: int = 0
) -> dict[str, float]:
    """Metrics over `batches` (the first `most` of each rank; 0: all), every target weighing the same.

    Training state is left as it was, to the bit: mode and random state are put back.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)
    devices = [process.device] if process.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluation_mode(model):
        torch.manual_seed(0)  # a method that rounds stochastically is judged on one draw, the same each time
        for batch in islice(batches, most or None):
            count = batch.count()
            loss, correct = task.measure(model, batch.to(process.device))
            sums[0] += loss
            sums[1] += correct
            sums[2] += count
    total, hits, counted = process.sum(sums).tolist()
    return task.summarize(total / max(counted, 1), hits / max(counted, 1), int(counted))
