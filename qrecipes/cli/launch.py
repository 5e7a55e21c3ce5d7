"""Run a recipe in this process, or under torchrun where torchrun's flags come before its name."""

from __future__ import annotations

import os
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from qrecipes import locate
from qrecipes.errors import ConfigError


def launch(argv: Sequence[str]) -> int:
    """Run `[torchrun flags] RECIPE [arguments]`; the result is the exit code.

    Raises:
        ConfigError: if there is no such recipe.
        SystemExit: the recipe's own, when it runs in this process.
    """
    if not argv:
        raise ConfigError("run: no recipe; name one, as in `qrecipes run train --config tiny/llm`")
    if argv[0].startswith("-"):
        return run_distributed(argv)
    return run_here(_recipe(argv[0]), argv[1:])


def run_here(script: Path, arguments: Sequence[str]) -> int:
    """Run a script as `python script arguments` would, in this process."""
    before = sys.argv
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def run_distributed(argv: Sequence[str]) -> int:
    """Run `torchrun flags RECIPE arguments` under torchrun; the result is the code of the first process to
    fail.

    A process that a signal ended counts as 128 plus the signal, as in a shell.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = torchrun.get_args_parser()
    parser.prog = "qrecipes run"
    parser.usage = "qrecipes run [torchrun flags] RECIPE [arguments]"
    args = parser.parse_args(list(argv))
    args.training_script = str(_recipe(args.training_script))
    args.standalone = args.standalone or _is_alone(args, parser)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"error: rank {rank} ended with exit code {code}", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _recipe(name: str) -> Path:
    path = locate.find("recipes", name)
    if path.suffix != ".py":
        raise ConfigError(f"{name}: a recipe is a .py file; name one, or a shipped one such as train")
    return path


def _is_alone(args: Namespace, parser: ArgumentParser) -> bool:
    """Whether one host was asked for and no meeting point, by flag or by torchrun's PET_ variables.

    Then a free port is taken, so that two runs on a host do not collide.
    """
    meeting = (
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
        "rdzv_conf",
        "master_addr",
        "master_port",
        "node_rank",
    )
    return args.nnodes in ("1", "1:1") and not any(
        getattr(args, name) != parser.get_default(name) or f"PET_{name.upper()}" in os.environ
        for name in meeting
    )
