"""Text from a run, an export or a Hugging Face model: continue prompts, or chat at the terminal.

qrecipes generate MODEL --prompt TEXT [--max-tokens N] [--temperature 0]
qrecipes generate MODEL --prompts FILE.txt|FILE.jsonl --output FILE.jsonl
qrecipes generate MODEL --chat

Texts go to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from qrecipes.cli.report import run_main
from qrecipes.errors import ConfigError, QRecipesError
from qrecipes.export.opened import OpenedModel, open_model
from qrecipes.generation import Generation, Generator, Sampling
from qrecipes.generation.chat import ChatFormat, chat
from qrecipes.generation.prompts import PromptLine, read_prompts
from qrecipes.generation.quantized_cache import KVBits
from qrecipes.models.activation_quantizers import pattern_of
from qrecipes.models.build import DTYPES, cast_
from qrecipes.parallel.process import pick_device


def main(argv: list[str]) -> int:
    """Generate what the arguments ask for."""
    args = parse(argv)
    sampling = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    lines = [] if args.chat else prompts_of(args)
    opened = open_model(
        args.model,
        device=pick_device(args.device),
        dtype=args.dtype,
        as_trained=args.as_trained,
        activations=None if args.activations is None else pattern_of(args.activations),
    )
    if args.dtype != "auto":
        cast_(opened.model, DTYPES[args.dtype], buffers=False)  # what a run or an export is stored in differs
    generator = Generator(
        opened.model,
        opened.require_tokenizer(),
        max_length=opened.max_length,
        batch_size=1 if args.chat else min(args.batch_size, len(lines)),
        compile=args.compile,
        kv_bits=kv_bits(args, opened),
    )
    named = args.chat_template if args.chat_template != "auto" else None
    system = opened.system if args.system is None else args.system
    form = ChatFormat(generator.tokenizer, named or opened.chat_template, system)
    if args.chat:
        chat(generator, form, sampling, stop=args.stop, read=read_line, write=say)
    else:
        answer(generator, form, lines, sampling, args)
    print(generator.speed, file=sys.stderr)
    return 0


def kv_bits(args: argparse.Namespace, opened: OpenedModel) -> KVBits | None:
    """Bits of the cache: the argument, else what the run's configuration says."""
    if args.kv_bits is None:
        return None if opened.run is None else opened.run.generation.kv_bits
    if args.kv_bits == "none":
        return None
    return "model" if args.kv_bits == "model" else int(args.kv_bits)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments.

    Raises:
        ConfigError: if two of them do not go together.
    """
    parser = argparse.ArgumentParser(prog="qrecipes generate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="folder of a run or of an export, or hf:FOLDER for a Hugging Face model"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text to continue")
    what.add_argument(
        "--prompts", metavar="FILE", help=".txt with a prompt a line, or .jsonl with `prompt` or `messages`"
    )
    what.add_argument("--chat", action="store_true", help="talk: a line asks, /reset forgets, /exit ends")
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the texts there, a line each")
    add = parser.add_argument
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="continue prompts as they are; the default")
    form.add_argument(
        "--chat-template",
        nargs="?",
        const="auto",
        metavar="NAME",
        help="answer prompts as a user's message, written by the template of the model's own training, else "
        "by the tokenizer's, or by NAME",
    )
    add("--system", metavar="TEXT", help="system message of chats and templates")
    add("--max-tokens", type=int, default=128, help="most tokens to add (default %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default %(default)s)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P only")
    add("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default %(default)s)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print one prompt's text as it comes; the default where it goes to stdout",
    )
    add(
        "--as-trained",
        action="store_true",
        help="a run's model as its transforms compute, instead of finalized",
    )
    add(
        "--activations",
        metavar="PATTERN",
        help="quantize activations: a8, a8kv4, a4, or bits by name as in na=8,k=4,v=4",
    )
    add(
        "--kv-bits",
        choices=("8", "4", "model", "none"),
        help="store keys and values in so many bits, or in those that the model quantizes them to (default: "
        "the run's generation.kv_bits, else none)",
    )
    add("--compile", action="store_true", help="compile the step of one token; pays over many tokens")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="type of the parameters (default: as stored)",
    )
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError where one argument makes another meaningless."""
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: {args.batch_size} is out of range; must be at least 1")
    if "" in args.stop:
        raise ConfigError("--stop: is empty, and would end every text at once; give some text")
    if args.chat and args.raw:
        raise ConfigError("--raw: a chat needs a template; leave --raw out")
    if args.chat and args.output is not None:
        raise ConfigError("--output: a chat goes to the terminal; leave --output out")
    if args.stream and args.prompt is None and not args.chat:
        raise ConfigError("--stream: the prompts of a file are continued side by side; leave --stream out")
    if args.stream is False and args.chat:
        raise ConfigError("--no-stream: a chat is always streamed; leave --no-stream out")
    if args.system is not None and args.raw:
        raise ConfigError("--system: with --raw there is no template to write it; leave one of them out")


def prompts_of(args: argparse.Namespace) -> list[PromptLine]:
    """What to continue or to answer."""
    lines = read_prompts(args.prompts) if args.prompts else [PromptLine("--prompt", args.prompt)]
    if args.system is not None and args.chat_template is None and any(is_text(line) for line in lines):
        raise ConfigError(
            "--system: a prompt that is continued as it is has no place for it; add --chat-template"
        )
    return lines


def is_text(line: PromptLine) -> bool:
    """Whether it is to be continued, unless a template is asked for."""
    return isinstance(line.prompt, str)


@dataclass(frozen=True)
class Job:
    """A prompt as tokens."""

    line: PromptLine
    ids: list[int]
    templated: bool


def answer(
    generator: Generator,
    form: ChatFormat,
    lines: list[PromptLine],
    sampling: Sampling,
    args: argparse.Namespace,
) -> None:
    """Generate for all prompts, and print or write what comes."""
    jobs = [encode(generator, form, line, args) for line in lines]
    for job in jobs:
        generator.check(job.ids, sampling.max_tokens, job.line.where)
    found: dict[int, Generation] = {}
    streams = args.stream is not False and args.prompt is not None and args.output is None
    with_template = [i for i, job in enumerate(jobs) if job.templated]
    as_text = [i for i, job in enumerate(jobs) if not job.templated]
    output = open_output(args.output) if args.output is not None else None
    try:
        for group, stop_tokens in (
            (as_text, None),
            (with_template, form.stop_tokens() if with_template else None),
        ):
            if streams and group:
                say(opening(jobs[group[0]]))
            for piece in generator.stream(
                [jobs[i].ids for i in group], sampling, stop=args.stop, stop_tokens=stop_tokens
            ):
                if streams:
                    say(piece.text)
                if piece.generation is not None:
                    found[group[piece.index]] = piece.generation
    finally:  # what was finished is kept, whatever happened then
        if output is not None:
            write_records(output, jobs, found)
    if streams:
        say("\n")
    elif output is None:
        for number, (index, generation) in enumerate(sorted(found.items())):
            say(("\n" if number else "") + opening(jobs[index]) + generation.text + "\n")


def encode(generator: Generator, form: ChatFormat, line: PromptLine, args: argparse.Namespace) -> Job:
    """The tokens of a prompt.

    Raises:
        ConfigError: if a conversation is to be continued as text.
        DataError: if its template refuses it.
    """
    if isinstance(line.prompt, str) and args.chat_template is None:
        return Job(line, generator.encode(line.prompt), templated=False)
    if args.raw:
        raise ConfigError(f"{line.where}: is a conversation, which needs a template; leave --raw out")
    messages = [{"role": "user", "content": line.prompt}] if isinstance(line.prompt, str) else line.prompt
    try:
        return Job(line, form.encode(messages), templated=True)  # type: ignore[arg-type]
    except QRecipesError as error:
        raise type(error)(f"{line.where}: {error}") from error


def opening(job: Job) -> str:
    """What is printed before the text: the prompt that it continues, nothing before an answer."""
    return job.line.prompt if isinstance(job.line.prompt, str) and not job.templated else ""


def open_output(name: str) -> IO[str]:
    """The file, made before the work begins."""
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {path}: cannot be written: {error.strerror}") from error


def write_records(file: IO[str], jobs: list[Job], found: dict[int, Generation]) -> None:
    """A JSON line for each prompt that was finished, in their order."""
    with file:
        for index, generation in sorted(found.items()):
            prompt = jobs[index].line.prompt
            record = {
                "prompt" if isinstance(prompt, str) else "messages": prompt,
                "text": generation.text,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": generation.prompt_tokens,
                "tokens": len(generation.token_ids),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """Text to stdout, at once."""
    print(text, end="", flush=True)


def read_line() -> str:
    """A line from the terminal, with a mark before it, or from a pipe."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return input()


if __name__ == "__main__":
    run_main(main)
