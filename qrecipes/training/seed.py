"""One seed for building a model, the same on every rank, and one for running it, different on every rank."""

from __future__ import annotations

import torch


def seed_building(seed: int) -> None:
    """Seed torch alike on every rank: FSDP2 slices each rank's own copy of the model and does not
    broadcast."""
    torch.manual_seed(seed)


def seed_running(seed: int, rank: int) -> None:
    """Seed torch differently on every rank, so that dropout and stochastic rounding are independent."""
    torch.manual_seed((seed + 1) * 1_000_003 + rank)
