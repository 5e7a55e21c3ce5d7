"""The folder of a run, and what in it says which run that was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qrecipes.config import parse
from qrecipes.config.run import Run
from qrecipes.errors import ConfigError
from qrecipes.parallel.process import Process
from qrecipes.transforms.receipt import Receipt

RUN_FILE = "run.toml"


def prepare_output(run: Run, process: Process) -> None:
    """Make the run's folder, before anything takes long.

    Raises:
        ConfigError: if the folder cannot be made or written.
    """
    if not process.is_main:
        return
    output = Path(run.output)
    trial = output / f".writable-{os.getpid()}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error}; set another `output`") from error


def write_identity(run: Run, receipt: Receipt, environment: dict[str, Any]) -> None:
    """Write the run's exact input, what its transforms did, and where it runs."""
    output = Path(run.output)
    (output / RUN_FILE).write_text(parse.dump(run), encoding="utf-8")
    receipt.save(output / "receipt.json")
    (output / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def read_run(output: Path) -> Run:
    """The run whose folder this is.

    Raises:
        ConfigError: if the folder holds no run.toml.
    """
    path = output / RUN_FILE
    if not path.is_file():
        raise ConfigError(
            f"{output}: is no run: it holds no {RUN_FILE}; give the `output` folder of a training run"
        )
    return parse.load(str(path))
