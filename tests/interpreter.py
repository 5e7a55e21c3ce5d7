"""Checks of Triton kernels under Triton's interpreter, in a process of their own, so that no other test meets
it: a test file prints the outcomes of its checks when it is run as a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def run_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Print a JSON object: for every check None, or the exception."""
    outcomes: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            torch.manual_seed(0)
            check()
            outcomes[name] = None
        except Exception as error:
            outcomes[name] = repr(error)
    print(json.dumps(outcomes))


def outcomes_of(file: str, timeout: float = 240) -> dict[str, str | None]:
    """What the checks of a test file gave, run as a script; a skip where the interpreter cannot run."""
    if (reason := broken()) is not None:
        pytest.skip(reason)
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    process = subprocess.run(
        [sys.executable, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def broken() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    if find_spec("triton") is None:
        return "needs the triton package, for its interpreter"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        return "triton 3.6's interpreter takes int() of an array, which numpy 2.4 refuses"
    return None
