"""The adapter for lm-eval against lm-eval's own class for transformers, and the tasks that ship."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("accelerate", reason="lm-eval's class for transformers imports it")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402
from lm_eval.utils import apply_template  # noqa: E402

from qrecipes.assets import resolve  # noqa: E402
from qrecipes.config.run import TokenizerSection  # noqa: E402
from qrecipes.data.beginnings import begins_with_bos, empty_context_token  # noqa: E402
from qrecipes.data.tokenizers import load_tokenizer  # noqa: E402
from qrecipes.errors import ConfigError, DataError  # noqa: E402
from qrecipes.evaluation import evaluate_tasks, harness  # noqa: E402
from qrecipes.evaluation.adapter import DecoderLM  # noqa: E402
from qrecipes.evaluation.harness import TASKS, load_tasks, shipped_tasks  # noqa: E402
from qrecipes.evaluation.table import table  # noqa: E402
from qrecipes.export.opened import open_model  # noqa: E402

STORIES = resolve("asset:stories260k")
STORY = "Once upon a time there was a girl named Lily. She liked to play with her red ball in the park. "
PAIRS = [
    ("Once upon a time", " there was"),
    ("Once upon a time there was a", " little girl"),
    ("The dog ran ", "to the park."),  # its last space belongs to the continuation
    ("The dog said \n ", "woof"),
    ("", "Once upon a time"),
    ("", "x"),
    ("Lily was", " très jolie 🙂"),
    ("A", "."),
    (STORY * 30, " The end."),  # longer than the model
    (STORY * 30, STORY * 5),
    ("Question: a or b?\nAnswer:", " a"),
    ("Question: a or b?\nAnswer:", " b"),  # shares a row with the one before
]


@pytest.fixture(scope="module")
def opened():
    return open_model("hf:asset:stories260k", dtype="float32")


@pytest.fixture(scope="module")
def ours(opened):
    return DecoderLM(opened.model, opened.tokenizer, batch_size=5)


@pytest.fixture(scope="module")
def theirs():
    return HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32),
        tokenizer=transformers.AutoTokenizer.from_pretrained(STORIES),
        device="cpu",
        batch_size=3,
    )


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_lm_eval_with_transformers(ours, theirs):
    greedy = theirs.generate_until(requests("generate_until", [("Once upon", {"max_gen_toks": 4})]))[0]
    asked = requests("loglikelihood", [*PAIRS, ("Once upon", f" {greedy}")])
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    for pair, (mine, mine_greedy), (other, other_greedy) in zip(PAIRS, found, expected, strict=False):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4), pair  # float32, other kernels
        assert mine_greedy == other_greedy, pair
    assert found[-1][1]
    assert expected[-1][1]


def test_scores_do_not_depend_on_the_batch(opened, ours):
    asked = requests("loglikelihood", PAIRS)
    one = DecoderLM(opened.model, opened.tokenizer, batch_size=1).loglikelihood(asked)
    for (a, greedy_a), (b, greedy_b) in zip(one, ours.loglikelihood(asked), strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # float32, other shapes
        assert greedy_a == greedy_b


def test_requests_that_differ_in_their_last_token_share_a_row(opened, ours, monkeypatch):
    """A multiple choice of letters costs one pass, not one a letter."""
    seen = []
    forward = opened.model.forward
    monkeypatch.setattr(opened.model, "forward", lambda tokens: seen.append(len(tokens)) or forward(tokens))
    ours.loglikelihood(requests("loglikelihood", [("Answer:", f" {letter}") for letter in "abc"]))
    assert sum(seen) == 1


def test_rolling_log_likelihoods_are_those_of_lm_eval_with_transformers(ours, theirs):
    asked = requests("loglikelihood_rolling", [(STORY,), (STORY * 30,), ("Hi",)])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)  # float32


def test_greedy_texts_are_those_of_lm_eval_with_transformers(ours, theirs):
    plain = {"max_gen_toks": 24, "do_sample": False}
    asked = requests(
        "generate_until",
        [
            ("Once upon a time", plain | {"until": ["."]}),
            ("Lily and Tom went to", plain | {"until": ["."]}),
            ("The dog", plain | {"until": ["\n\n", " the"]}),
            (STORY * 30, plain | {"until": []}),  # longer than the model
        ],
    )
    expected = theirs.generate_until(asked, disable_tqdm=True)
    # transformers decodes what was added on its own, where the tokenizer drops a leading space
    assert [text.removeprefix(" ") for text in ours.generate_until(asked)] == expected


def test_samples_follow_the_seed(opened):
    options = {"max_gen_toks": 24, "do_sample": True, "temperature": 1.0, "top_k": 50, "until": []}
    asked = requests("generate_until", [("Once upon a time", options)])
    texts = [
        DecoderLM(opened.model, opened.tokenizer, seed=seed).generate_until(asked)[0] for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_long_requests_are_counted(opened):
    lm = DecoderLM(opened.model, opened.tokenizer)
    lm.loglikelihood(requests("loglikelihood", PAIRS))
    assert lm.left_truncated == 2


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        {"bos_token": None, "eos_token": "</s>", "add_bos_token": False},
    ],
)
@pytest.mark.parametrize("processor", [True, False])
def test_texts_begin_as_transformers_has_them_begin(tmp_path, config, processor):
    content = json.loads((STORIES / "tokenizer.json").read_text())
    if not processor:
        content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    )
    shutil.copy(STORIES / "config.json", tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(TokenizerSection(path=str(tmp_path)))
    begins = expected("Once").input_ids[0] == expected.bos_token_id
    if config["bos_token"] is not None:
        assert begins_with_bos(tokenizer) == begins
    bos = expected.bos_token_id
    assert empty_context_token(tokenizer) == (expected.eos_token_id if bos is None else bos)


ROWS = [
    {"query": "Question: what does a dog say?", "choices": ["woof", "meow", "I am a cat"], "gold": 0},
    {"query": "Question: what is red?", "choices": ["the ball", "a sky", "grass"], "gold": 0},
    {"query": "Question: who is Lily?", "choices": ["a girl", "a very big green dog"], "gold": 0},
    {"query": "Question: where is the park?", "choices": ["near", "far", "there"], "gold": 2},
]


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with a few rows for every task that ships, in the layout of its README."""
    folder = tmp_path / "data"

    def write(name: str, rows: list[dict]) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name in (
        "arc-easy/arc_easy",
        "arc-challenge/arc_challenge",
        "boolq/boolq",
        "piqa/piqa",
        "hellaswag/validation",
        "openbook-qa/openbook_qa",
        "commonsense-qa/commonsense_qa",
    ):
        write(f"{name}.jsonl", ROWS)
    contexts = {"context_options": ["Lily so Lily", "Lily so Tom"], "continuation": "ran.", "gold": 1}
    write("winogrande/winogrande.jsonl", [contexts] * 3)
    sums = [{"question": f"What is {n} and 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    write("gsm8k/train.jsonl", sums)
    write("gsm8k/test.jsonl", sums)
    svamp = [{"context": f"Tom has {n}?", "chain_of_thought": f"( {n} )", "answer": str(n)} for n in range(8)]
    write("svamp/svamp.jsonl", svamp)
    subjects = [
        name
        for path in TASKS.glob("mmlu_*.yaml")
        for name in re.findall(r"where: \{subject: (\w+)\}", path.read_text())
    ]
    letters = {"question": "Which? ", "choices": ["one", "two", "three", "four"], "answer": 2}
    write(
        "mmlu/dev.jsonl",
        [{"subject": s, **letters, "question": f"{s} {i}"} for s in subjects for i in range(5)],
    )
    write("mmlu/test.jsonl", [{"subject": s, **letters} for s in subjects for _ in range(2)])
    wiki = folder / "wikitext2/wiki.test.raw"
    wiki.parent.mkdir()
    wiki.write_text(
        " \n = Lily = \n \n Lily ran . \n \n = = Life = = \n She ran . \n = Tom = \n Tom ran . \n"
    )
    return folder


def local_task(folder: Path) -> str:
    """A user's own definition, with lm-eval's own reader."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {folder / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
    )
    return str(path)


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_scores_of_a_users_task_are_those_of_lm_eval_with_transformers(opened, theirs, tmp_path, num_fewshot):
    path = local_task(tmp_path)
    found = evaluate_tasks(opened.model, opened.tokenizer, [path], num_fewshot=num_fewshot)["mine"]
    expected = lm_eval.simple_evaluate(
        model=theirs, tasks=[path], num_fewshot=num_fewshot, task_manager=TaskManager(include_defaults=False)
    )["results"]["mine"]
    assert found.metrics == {"acc": expected["acc,none"], "acc_norm": expected["acc_norm,none"]}
    assert found.stderrs["acc"] == expected["acc_stderr,none"]
    assert found.samples == 4
    assert found.definition == path


@pytest.mark.parametrize("name", ["gsm8k", "winogrande", "wikitext2", "mmlu_social_sciences"])
def test_scores_of_shipped_tasks_are_those_of_lm_eval_with_transformers(opened, theirs, data, name):
    """The model is given the same prompts by either; there are tasks of each kind."""
    found = evaluate_tasks(opened.model, opened.tokenizer, [name], data=data, limit=1)
    objects, _ = load_tasks([name], data)
    expected = lm_eval.simple_evaluate(
        model=theirs, tasks=objects, limit=1, task_manager=TaskManager(include_defaults=False)
    )["results"]
    assert set(found) == set(expected)
    for task, scores in found.items():
        for metric, value in scores.metrics.items():
            key = next(k for k in expected[task] if k.replace(",none", "").replace(",", "_") == metric)
            # float32 sums over other kernels; counts are equal
            assert value == pytest.approx(expected[task][key], rel=1e-4), (task, metric)


def test_every_shipped_task_runs_and_is_in_the_readme(opened, data):
    names = shipped_tasks()
    readme = (TASKS / "README.md").read_text()
    assert [name for name in names if f"`{name}`" not in readme] == []
    leaves = [name for name in names if not name.startswith("mmlu_")]
    scores = evaluate_tasks(opened.model, opened.tokenizer, leaves, data=data, limit=1)
    assert [name for name in leaves if not scores[name].metrics] == []
    assert {score.definition for score in scores.values()} == {"qrecipes"}
    assert sum(score.group is not None and score.group.startswith("mmlu_") for score in scores.values()) == 57
    assert scores["mmlu"].samples == 57
    lines = table(["a", "b"], [None, None], [scores, scores]).splitlines()
    assert sum(line.startswith("mmlu") for line in lines) == 5  # the groups, not their 57 tasks


LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.mark.parametrize(
    ("name", "file", "row", "published"),
    [
        (
            "arc_easy",
            "arc/arc_easy.yaml",
            {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
            {"question": "Why?"},
        ),
        (
            "piqa",
            "piqa/piqa.yaml",
            {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 1},
            {"goal": "dresser"},
        ),
        (
            "openbookqa",
            "openbookqa/openbookqa.yaml",
            {"query": "Fog is near", "choices": ["a", "b"], "gold": 1},
            {"question_stem": "Fog is near"},
        ),
        (
            "gsm8k",
            "gsm8k/gsm8k.yaml",
            {"question": "Why?", "answer": "x #### 1"},
            {"question": "Why?", "answer": "x #### 1"},
        ),
    ],
)
def test_prompts_are_those_of_lm_evals_own_task(data, name, file, row, published):
    task = load_tasks([name], data)[0][0]
    template = load_yaml(LM_EVAL_TASKS / file, resolve_func=False)["doc_to_text"]
    expected = published[template] if template in published else apply_template(template, published)
    assert task.doc_to_text(row) == expected
    assert task.config.target_delimiter == " "


def test_mmlu_prompts_are_those_of_lm_evals_own_task(data):
    group = load_tasks(["mmlu_stem"], data)[0][0]
    task = next(t for t in group.get_all_tasks() if t.task_name.endswith("anatomy"))
    own = load_yaml(LM_EVAL_TASKS / "mmlu/default/mmlu_anatomy.yaml", resolve_func=False)
    row = {"subject": "anatomy", "question": " Which? ", "choices": ["p", "q", "r", "s"], "answer": 2}
    assert task.doc_to_text(row) == apply_template(own["doc_to_text"], row)
    assert task.config.description == own["description"]
    task.set_fewshot_seed(0)
    prompt = task.fewshot_context(row, 5)
    assert [f"anatomy {i}\n" in prompt for i in range(5)] == [True] * 5
    assert prompt.count("Answer: C\n\n") == 5
    assert prompt.endswith("Answer:")


class Scripted(DecoderLM):
    """Says what it is told to, in the order of the requests."""

    answers: tuple[str, ...] = ()

    def generate_until(self, requests, disable_tqdm=False):
        return list(self.answers)


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("It is 1.\n#### 1", 1.0, 1.0),
        ("So it is $1.", 0.0, 1.0),
        ("#### 1 but then 7", 1.0, 0.0),
        ("nothing", 0.0, 0.0),
        ("#### -1", 0.0, 0.0),
    ],
)
def test_gsm8k_takes_the_marked_number_or_the_last_one(opened, data, answer, strict, flexible):
    objects, _ = load_tasks(["gsm8k"], data)
    lm = Scripted(opened.model, opened.tokenizer)
    lm.answers = (answer,)  # to "What is 0 and 1?"
    row = lm_eval.simple_evaluate(
        model=lm, tasks=objects, limit=1, task_manager=TaskManager(include_defaults=False)
    )["results"]["gsm8k"]
    assert (row["exact_match,strict"], row["exact_match,flexible"]) == (strict, flexible)


def test_articles_of_wikitext_begin_at_their_titles(data):
    task = load_tasks(["wikitext2"], data)[0][0]
    pages = [doc["page"] for doc in task.eval_docs]
    assert len(pages) == 2
    assert "= = Life = =" in pages[0]
    assert "".join(pages) == (data / "wikitext2/wiki.test.raw").read_text()


def test_results_for_json_have_the_error_of_their_first_metric(opened, data):
    scores = evaluate_tasks(opened.model, opened.tokenizer, ["arc_easy"], data=data)["arc_easy"].as_dict()
    assert scores["stderr"] == scores["acc_stderr"]
    # lm-eval's analytic error of a mean: sample deviation / sqrt(n)
    p, n = scores["acc"], 4
    assert scores["stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)


def test_conversations_are_written_with_the_chat_template(opened, data):
    def prompt(lm):
        task = load_tasks(["arc_easy"], data)[0][0]
        task.set_fewshot_seed(0)
        return task.fewshot_context(
            ROWS[0], 0, apply_chat_template=True, chat_template=lm.apply_chat_template
        )

    from qrecipes.data.templates import find_template

    lm = DecoderLM(opened.model, opened.tokenizer, template=find_template("alpaca", opened.tokenizer))
    assert ROWS[0]["query"] in prompt(lm)
    assert "### Response:" in prompt(lm)
    chat = evaluate_tasks(opened.model, opened.tokenizer, ["arc_easy"], data=data, chat="alpaca")
    assert chat["arc_easy"].samples == len(ROWS)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("arc_easi", "did you mean 'arc_easy' or 'arc_easy_mt'?"),
        ("wikitext2", "name their folder with --data"),
        ("xyzzy", "there are arc_challenge, "),
    ],
)
def test_an_unknown_task_names_what_there_is(name, remedy):
    with pytest.raises(ConfigError, match=re.escape(f"{name!r} is no task; ") + ".*" + re.escape(remedy)):
        harness.require_known(name, ["arc_easy_mt", "blimp"])


@pytest.mark.slow  # lm-eval reads its 14,000 definitions
def test_without_a_network_lm_evals_own_tasks_name_the_folder_option(opened):
    with pytest.raises(ConfigError, match="'arc_easi' is no task; did you mean 'arc_easy'"):
        evaluate_tasks(opened.model, opened.tokenizer, ["arc_easi"])
    with pytest.raises(DataError, match=r"piqa: cannot be loaded: .*--data"):
        evaluate_tasks(opened.model, opened.tokenizer, ["piqa"])


def test_a_missing_file_names_file_folder_and_readme(opened, data):
    (data / "piqa/piqa.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no piqa/piqa\.jsonl .*README"):
        evaluate_tasks(opened.model, opened.tokenizer, ["piqa"], data=data)


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 5: not JSON"), ('{"query": "q", "gold": 0}', "line 5: no 'choices'")]
)
def test_a_wrong_row_is_named(opened, data, line, message):
    with (data / "piqa/piqa.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        evaluate_tasks(opened.model, opened.tokenizer, ["piqa"], data=data)


def test_examples_for_a_task_that_takes_none_are_refused(opened, data):
    with pytest.raises(ConfigError, match="wikitext2 takes no examples"):
        evaluate_tasks(opened.model, opened.tokenizer, ["wikitext2"], data=data, num_fewshot=3)


@pytest.mark.parametrize("option", [{"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(opened, data, option):
    with pytest.raises(ConfigError, match="out of range"):
        evaluate_tasks(opened.model, opened.tokenizer, ["piqa"], data=data, **option)


def test_without_lm_eval_the_extra_is_named(opened, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"install qrecipes\[eval\]"):
        evaluate_tasks(opened.model, opened.tokenizer, ["piqa"], data=data)


def test_what_a_model_cannot_score_is_refused(opened, ours):
    with pytest.raises(DataError, match="longer than the 512"):
        ours.loglikelihood(requests("loglikelihood", [("a", STORY * 90)]))
    with pytest.raises(ConfigError, match="generates 512 tokens"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": 512})]))
    with pytest.raises(ConfigError, match=r"generation_kwargs\.num_beams"):
        ours.generate_until(requests("generate_until", [("a", {"num_beams": 4})]))
    with pytest.raises(DataError, match="adds no token"):
        ours.loglikelihood(requests("loglikelihood", [("a", "")]))
