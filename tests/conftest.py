"""What every test gets: no network, no stale caches, a fixed seed, the tiny models."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "TIKTOKEN_CACHE_DIR", ""
)  # tiktoken caches local files by path; a rewritten one would be stale
os.environ.setdefault(
    "TORCHINDUCTOR_AUTOGRAD_CACHE", "0"
)  # its key mixes up tensor subclasses inside DTensor
os.environ.setdefault(
    "TORCHINDUCTOR_COMPILE_THREADS", "1"
)  # more would start helpers, each of which imports torch, beside every process that compiles
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import qrecipes  # noqa: F401 - lets tests import torchtune before anything of ours


@pytest.fixture(autouse=True)
def _fresh_state():
    """A fixed seed before each test, and no compiled code left after it."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
