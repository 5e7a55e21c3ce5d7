"""Fetch a model from the Hugging Face hub: safetensors, configuration and tokenizer.

qrecipes download OWNER/NAME [--output FOLDER] [--revision REVISION] [--token TOKEN]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from qrecipes.cli.report import run_main
from qrecipes.errors import ConfigError, WeightsError
from qrecipes.models import hub
from qrecipes.models.checkpoint_files import Checkpoint, read_config
from qrecipes.models.families import FAMILIES, family_of
from qrecipes.models.sources import translate


def main(argv: list[str]) -> int:
    """Download, then say what has come and what to do with it."""
    parser = argparse.ArgumentParser(prog="qrecipes download", description=__doc__.splitlines()[0])
    parser.add_argument("repository", metavar="OWNER/NAME", help="name of the repository on the hub")
    parser.add_argument("--output", type=Path, help="folder to write; default: the hub's own cache")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument(
        "--token", help="of your account, for gated and private models; default: the one stored"
    )
    args = parser.parse_args(argv)
    if not hub.is_repository(args.repository):
        raise ConfigError(f"{args.repository}: is no repository of the hub; write OWNER/NAME")
    if args.output is not None and args.output.is_file():
        raise ConfigError(f"--output {args.output}: is a file; name a folder")
    folder = hub.download(args.repository, output=args.output, revision=args.revision, token=args.token)
    print(folder)
    print(describe(folder))
    cached = args.output is None and args.revision is None
    print(f"next: qrecipes generate hf:{args.repository if cached else folder} --prompt TEXT")
    return 0


def describe(folder: Path) -> str:
    """Family, builder, number of parameters and size of a Hugging Face folder, in a line.

    Raises:
        WeightsError: if it is incomplete, or no model that can be built.
    """
    checkpoint = Checkpoint.open(folder)
    config = read_config(folder)
    if config is None:
        supported = ", ".join(family.architecture for family in FAMILIES)
        raise WeightsError(f"{folder}: has no config.json of a Hugging Face model; supported: {supported}")
    family = family_of(config, folder)
    builder, args = translate(config, folder, {})
    parameters = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    size = sum(file.stat().st_size for file in set(checkpoint.files.values()))
    return (
        f"{family.architecture}, torchtune:{builder}, {parameters:,} parameters, {size / 1e9:.2f} GB, "
        f"up to {args['max_seq_len']:,} tokens"
    )


if __name__ == "__main__":
    run_main(main)
