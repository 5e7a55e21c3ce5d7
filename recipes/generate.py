"""Continue a prompt with an exported model, or with a run's newest checkpoint.

qrecipes generate MODEL_FOLDER --prompt TEXT [--max-tokens N] [--temperature T] [--top-k K] [--seed S]
"""

from __future__ import annotations

import argparse

from qrecipes.cli.report import run_main
from qrecipes.data.tokenizers import tokenizer_of
from qrecipes.errors import ConfigError
from qrecipes.generation import generate, load_model
from qrecipes.parallel.process import pick_device


def main(argv: list[str]) -> int:
    """Print the prompt and its continuation."""
    parser = argparse.ArgumentParser(prog="qrecipes generate", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of an export or of a run")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="most tokens to add (default %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default %(default)s)"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    model, run = load_model(args.model, device=pick_device(args.device))
    tokenizer = tokenizer_of(run)
    if tokenizer is None:
        raise ConfigError(f"{args.model}: was trained without a tokenizer, so it has no text to generate")
    text = generate(
        model,
        tokenizer,
        args.prompt,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    print(args.prompt + text)
    return 0


if __name__ == "__main__":
    run_main(main)
