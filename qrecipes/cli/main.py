"""The verbs: `qrecipes ls | cat | cp | check | schema | run | generate | evaluate | quantize | export |
data | download`.

Nothing here imports torch before a verb needs it, so that help and `ls` answer at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qrecipes import __version__, locate
from qrecipes.cli import launch
from qrecipes.cli.report import exit_code
from qrecipes.errors import ConfigError

_SCRIPTS = {
    "generate": "text from a model, or a chat with it",
    "evaluate": "perplexity and task scores of one or several models",
    "quantize": "a model's weights in 2 to 8 bits, as an export: the post-training baseline",
    "export": "a checkpoint as files to deploy",
    "data": "look at what a configuration trains on",
    "download": "fetch a model from the Hugging Face hub",
}
"""Verbs that hand all their arguments to the recipe of the same name, and what they give."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `qrecipes`; the result is the exit code."""
    return exit_code(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> int:
    # These take another program's flags, which argparse would try to read.
    if len(argv) > 1 and argv[0] == "run" and argv[1] not in ("-h", "--help"):
        return launch.launch(argv[1:])
    if argv and argv[0] in _SCRIPTS:
        return launch.run_here(locate.find("recipes", argv[0]), argv[1:])
    args = _parser().parse_args(argv)
    return args.verb(args)


def _ls(args: argparse.Namespace) -> int:
    for title, entries in (("RECIPES", locate.list_recipes()), ("CONFIGS", locate.list_configs())):
        width = max((len(entry.name) for entry in entries), default=0)
        print(title)
        for entry in entries:
            print(f"  {entry.name:<{width}}  {entry.description}")
    return 0


def _cat(args: argparse.Namespace) -> int:
    path = _find(args.name)
    if args.raw or path.suffix == ".py":
        if args.overrides:
            raise ConfigError(
                f"{args.name}: overrides apply to a resolved configuration, not to the file itself"
            )
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    from qrecipes.config.parse import dump, load

    print(dump(load(str(path), args.overrides)), end="")
    return 0


def _cp(args: argparse.Namespace) -> int:
    source, destination = _find(args.name), Path(args.destination)
    if destination.is_dir():
        destination /= source.name
    elif not destination.suffix:
        destination = destination.with_suffix(source.suffix)
    if destination.exists():
        if destination.samefile(source):
            raise ConfigError(f"{destination}: is {args.name} itself; name another destination")
        if not args.force:
            raise ConfigError(
                f"{destination}: exists; name another destination, or overwrite it with --force"
            )
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, destination)
        if source.suffix == ".toml":
            _keep_base(source, destination)
    except OSError as error:
        raise ConfigError(f"{destination}: cannot be written: {error.strerror}") from error
    print(f"copied {args.name} to {destination}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from qrecipes.config.parse import load
    from qrecipes.transforms.base import transform_for

    is_override = [("=" in text and not Path(text).is_file()) for text in args.paths]
    paths = [text for text, override in zip(args.paths, is_override, strict=True) if not override]
    overrides = [text for text, override in zip(args.paths, is_override, strict=True) if override]
    if not paths:
        raise ConfigError("check: no file; name at least one, as in `qrecipes check my.toml optim.lr=3e-4`")
    failed = False
    for path in paths:
        try:
            run = load(path, overrides, check_model=True)
        except ConfigError as error:
            print(error, file=sys.stderr)
            failed = True
        else:
            methods = ", ".join(transform_for(config).name for config in run.transform) or "no transform"
            print(f"{path}: ok: {run.model.source}, {run.data.source} data, {run.steps} steps, {methods}")
    return 2 if failed else 0


def _schema(args: argparse.Namespace) -> int:
    from qrecipes.config.parse import schema

    text = json.dumps(schema(), indent=2) + "\n"
    if args.output is None:
        print(text, end="")
        return 0
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.output}: cannot be written: {error.strerror}") from error
    return 0


def _find(name: str) -> Path:
    """A configuration, or else a recipe."""
    try:
        return locate.find("configs", name)
    except ConfigError:
        if any(recipe.name == name.removesuffix(".py") for recipe in locate.list_recipes()):
            return locate.find("recipes", name)
        raise


def _keep_base(source: Path, copy: Path) -> None:
    """Rewrite the copy's `extends` where it would no longer lead to the same file."""
    import tomli

    from qrecipes.config.lines import key_lines

    text = source.read_text(encoding="utf-8")
    try:
        extends = tomli.loads(text).get("extends")
    except tomli.TOMLDecodeError:
        return
    if not isinstance(extends, str):
        return
    base = locate.find_base(source, extends).resolve()
    try:
        if locate.find_base(copy, extends).resolve() == base:
            return
    except ConfigError:
        pass  # there is no such file beside the copy
    lines = text.splitlines(keepends=True)
    lines[key_lines(text)["extends",] - 1] = f"extends = {json.dumps(str(base))}\n"
    copy.write_text("".join(lines), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qrecipes",
        description="Composable low-precision training recipes for PyTorch.",
        epilog="""examples:
  qrecipes ls
  qrecipes run train --config tiny/llm steps=50 optim.lr=1e-3
  qrecipes run --nproc-per-node 2 train --config tiny/llm
  qrecipes cp tiny/llm my.toml && qrecipes check my.toml

QRECIPES_TRACEBACK=1 shows where an error came from.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qrecipes {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    ls = verbs.add_parser("ls", help="list the recipes and configurations that ship")
    ls.set_defaults(verb=_ls)

    cat = verbs.add_parser("cat", help="print a configuration as it resolves, or a recipe")
    cat.add_argument("name", help="shipped name or path")
    cat.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=3e-4")
    cat.add_argument("--raw", action="store_true", help="print the file itself")
    cat.set_defaults(verb=_cat)

    cp = verbs.add_parser("cp", help="copy a configuration or a recipe, to change it")
    cp.add_argument("name", help="shipped name or path")
    cp.add_argument("destination", help="file, or a folder that exists; folders on the way are made")
    cp.add_argument("-f", "--force", action="store_true", help="overwrite")
    cp.set_defaults(verb=_cp)

    check = verbs.add_parser(
        "check",
        aliases=["validate"],
        help="check configurations without building a model",
        description="Exit 0 if every file is right; else exit 2, with FILE:LINE: KEY: MESSAGE on stderr.",
    )
    check.add_argument(
        "paths", nargs="+", metavar="PATH|KEY=VALUE", help="files or shipped names, and overrides"
    )
    check.set_defaults(verb=_check)

    schema = verbs.add_parser("schema", help="print the JSON Schema of a configuration, for editors")
    schema.add_argument("--output", type=Path, metavar="FILE", help="write it there")
    schema.set_defaults(verb=_schema)

    verbs.add_parser(
        "run",
        help="run a recipe, here or under torchrun",
        usage="qrecipes run [torchrun flags] RECIPE --config NAME_OR_PATH [KEY=VALUE ...]",
        description="""RECIPE is a shipped name or the path of a .py file; what follows is the recipe's own.
Flags before it are torchrun's, such as --nproc-per-node 2; without any it runs here, in one process.""",
        epilog="""examples:
  qrecipes run train --config tiny/llm steps=50 optim.lr=1e-3
  qrecipes run --nproc-per-node 2 train --config tiny/llm""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).set_defaults(verb=lambda args: launch.launch([]))
    for script, text in _SCRIPTS.items():
        verbs.add_parser(script, help=f"{text}; `qrecipes {script} --help` has its arguments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
