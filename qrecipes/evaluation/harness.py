"""Scores on standard tasks through lm-eval, which the extra `eval` installs.

With a folder of task files, the tasks that ship (qrecipes/evaluation/tasks) read them and nothing is fetched;
other names, and all names without a folder, mean lm-eval's own tasks, whose data come from the hub.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import ConfigError, DataError, QRecipesError

TASKS = Path(__file__).with_name("tasks")
"""Definitions that ship."""
YAML = (".yaml", ".yml")
SEED = 1234
"""Of the draw of few-shot examples; lm-eval's own."""


@dataclass(frozen=True)
class TaskScores:
    """What one task, or a group of tasks, measured."""

    metrics: dict[str, float]
    """By metric, such as acc; a filter's name follows its metric, as in exact_match_strict."""
    stderrs: dict[str, float]
    """Standard errors as lm-eval gives them; those that it gives none for are left out."""
    samples: int | None
    """Rows that were scored; a group's are those of its tasks."""
    num_fewshot: int | None
    """Examples before each row; None for a group of groups."""
    definition: str
    """Whose task it is: "qrecipes", "lm-eval" or the path of a file."""
    group: str | None = None
    """The group that it is in."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: each metric, its METRIC_stderr, and `stderr`, that of the first metric that has one."""
        known = [self.stderrs[name] for name in self.metrics if name in self.stderrs]
        rest = asdict(self)
        del rest["metrics"], rest["stderrs"]
        return {
            **self.metrics,
            "stderr": known[0] if known else None,
            **{f"{name}_stderr": value for name, value in self.stderrs.items()},
            **rest,
        }


def shipped_tasks() -> list[str]:
    """Names of the tasks and groups whose definitions ship."""
    return sorted(path.stem for path in TASKS.glob("*.yaml") if not path.name.startswith("_"))


def require_tasks(names: Sequence[str], data: str | Path | None) -> None:
    """Refuse what `evaluate_tasks` would refuse of names and folder, before a model is opened for it.

    Names that may be lm-eval's are left to `load_tasks`, since its index takes seconds to build.

    Raises:
        ConfigError: if lm-eval is missing, or a file or the folder does not exist.
    """
    _lm_eval()
    for name in names:
        if name.endswith(YAML) and not Path(name).is_file():
            raise ConfigError(f"--tasks: {name} is no file (from {Path.cwd()}); correct the path")
    if data is not None and not Path(data).is_dir():
        raise ConfigError(f"--data: {data} is no folder (from {Path.cwd()}); name that of the task files")


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = SEED,
    bos: bool | None = None,
    chat: bool | str = False,
    progress: bool = False,
) -> dict[str, TaskScores]:
    """Scores by task, in lm-eval's order; a group's own come before those of its tasks.

    `tasks` are names, or paths of definitions in lm-eval's YAML. `limit` is the number of rows of each task,
    None for all; `num_fewshot` replaces the tasks' own number of examples; `bos` is as in
    `adapter.DecoderLM`; `chat` writes each prompt as a conversation, with the tokenizer's template or with
    the one of that name (as `data.conversation.template`).

    Raises:
        ConfigError: if lm-eval is missing, a task is unknown, or a number is out of range.
        DataError: if a task's data cannot be had, or are wrong.
    """
    evaluator = _lm_eval()
    from qrecipes.evaluation.adapter import DecoderLM

    for name, value, least in (
        ("--limit", limit, 1),
        ("--num-fewshot", num_fewshot, 0),
        ("--batch-size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: {value} is out of range; must be at least {least}")
    template = None
    if chat:
        from qrecipes.data.templates import find_template

        template = find_template("auto" if chat is True else chat, tokenizer)
    lm = DecoderLM(
        model, tokenizer, batch_size=batch_size, bos=bos, template=template, seed=seed, progress=progress
    )
    with _quiet():
        loaded, definitions = load_tasks(tasks, data)
        _check_fewshot(loaded, num_fewshot)
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=loaded,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            log_samples=False,
            apply_chat_template=template is not None,
            task_manager=_manager(data, shipped=False),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if lm.left_truncated:
        logging.getLogger(__name__).warning(
            "%d requests were longer than the model's %d tokens and were cut on the left",
            lm.left_truncated,
            lm.max_length,
        )
    return _scores(results, definitions)


def load_tasks(names: Sequence[str], data: str | Path | None) -> tuple[list[Any], dict[str, str]]:
    """lm-eval's Task and Group objects, and whose definition each task's and group's name has.

    Raises:
        ConfigError: if a name is unknown; it names what is close.
        DataError: if a task's data cannot be had.
    """
    require_tasks(names, data)
    ours = set(shipped_tasks()) if data is not None else set()
    objects: list[Any] = []
    definitions: dict[str, str] = {}
    theirs = None
    for name in dict.fromkeys(names):
        if name in ours:
            manager, definition = _manager(data, shipped=True), "qrecipes"
        elif name.endswith(YAML):
            manager, definition = _manager(data, shipped=False), name
        else:
            theirs = theirs or _manager(data, shipped=False, defaults=True)
            require_known(name, theirs.all_tasks)
            manager, definition = theirs, "lm-eval"
        found = _load(manager, name, data)
        objects += _outermost(found)
        definitions |= dict.fromkeys([*found["tasks"], *found["groups"]], definition)
    if not objects:
        raise ConfigError(f"--tasks: names no task; there are {', '.join(shipped_tasks())} (with --data)")
    return objects, definitions


def _lm_eval() -> Any:
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise ConfigError(f"--tasks: needs lm-eval ({error}); install qrecipes[eval]") from error
    return evaluator


def _manager(data: str | Path | None, *, shipped: bool, defaults: bool = False) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=str(TASKS) if shipped else None,
        include_defaults=defaults,
        metadata={} if data is None else {"data_folder": str(data)},
    )


def require_known(name: str, theirs: Sequence[str]) -> None:
    """Raise ConfigError, with what is close, where `name` is none of lm-eval's names `theirs`."""
    if name in theirs:
        return
    ours = shipped_tasks()
    close = list(dict.fromkeys(get_close_matches(name, ours) + get_close_matches(name, theirs)))
    if name in ours:
        remedy = "it ships with qrecipes and reads local files: name their folder with --data"
    elif close:
        remedy = f"did you mean {' or '.join(map(repr, close[:4]))}?"
    else:
        remedy = f"there are {', '.join(ours)} with --data, and lm-eval's (`lm-eval ls tasks`)"
    raise ConfigError(f"--tasks: {name!r} is no task; {remedy}")


def _load(manager: Any, name: str, data: str | Path | None) -> Any:
    try:
        return manager.load([name])
    except QRecipesError:
        raise
    except Exception as error:  # whatever a task's own code and the hub's client raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "check the network, or the task's definition"
        if data is None and name in shipped_tasks():
            remedy = "without a network, give the folder of its files with --data"
        raise DataError(f"--tasks: {name}: cannot be loaded: {reason}; {remedy}") from error


def _outermost(found: Any) -> list[Any]:
    """Groups that are in no other group, and tasks that are in no group."""
    inner = {child for children in found["group_map"].values() for child in children}
    everything = {**found["groups"], **found["tasks"]}
    return [item for name, item in everything.items() if name not in inner]


def _check_fewshot(tasks: Sequence[Any], num_fewshot: int | None) -> None:
    """lm-eval keeps a task's own 0 whatever is asked for, so asking for more is refused here."""
    if not num_fewshot:
        return
    for item in tasks:
        leaves = item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]
        for task in leaves:
            if task.get_config("num_fewshot") == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling":
                raise ConfigError(
                    f"--num-fewshot: {num_fewshot}, but {task.task_name} takes no examples; leave it out of "
                    "--tasks, or the option"
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval tells of its every step; only its errors are let through."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scores(results: dict[str, Any], definitions: dict[str, str]) -> dict[str, TaskScores]:
    """lm-eval's results, each group before what it holds."""
    children: dict[str, list[str]] = {
        name: held for name, held in results.get("group_subtasks", {}).items() if held
    }
    parents = {child: group for group, held in children.items() for child in held}

    def below(name: str) -> list[str]:
        return [name, *(deeper for child in children.get(name, ()) for deeper in below(child))]

    outermost = [name for name in results["results"] if name not in parents]
    samples = {name: counts["effective"] for name, counts in results["n-samples"].items()}
    scores = {}
    for name in (deeper for top in outermost for deeper in below(top)):
        metrics, stderrs = _metrics(results["results"][name])
        scores[name] = TaskScores(
            metrics,
            stderrs,
            sum(samples.get(task, 0) for task in below(name)),
            results["n-shot"].get(name),
            definitions[name],
            parents.get(name),
        )
    return scores


def _metrics(row: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and standard errors of one row, which lm-eval writes as "METRIC,FILTER" and
    "METRIC_stderr,FILTER"."""
    metrics: dict[str, float] = {}
    stderrs: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue  # the alias, the number of rows, or an "N/A" in place of a standard error
        plain = metric.removesuffix("_stderr")
        label = plain if kind == "none" else f"{plain}_{kind}"
        (stderrs if metric.endswith("_stderr") else metrics)[label] = float(value)
    return metrics, stderrs
