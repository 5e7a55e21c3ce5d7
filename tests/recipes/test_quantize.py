"""`qrecipes quantize` from outside: exports that other commands take, reports, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import Trial, command_line, tiny_run

from qrecipes import assets, load_export
from qrecipes.evaluation import perplexity, read_text
from qrecipes.export.opened import open_model
from qrecipes.quant.linear import QuantLinear
from qrecipes.training import checkpoint
from qrecipes.training.output import write_identity

MODEL = "hf:asset:stories260k"
TEXT = "asset:smalltalk/conversations.jsonl"
STORIES = ("--calibration", "asset:tinyshakespeare/train.txt.xz", "--samples", "24", "--length", "128")
ROWS = ("--group-size", "row", "--asymmetric")


def quantize(output: Path, *arguments: str, model: str = MODEL) -> dict:
    """The report of a command that must succeed."""
    assert command_line("quantize", model, *arguments, "--output", str(output), "--device", "cpu") == 0
    return json.loads((output / "quantization.json").read_text())


def refused(capsys, tmp_path, *arguments: str, model: str = MODEL, status: int = 2) -> str:
    """The message of a command that must fail and write nothing."""
    output = tmp_path / "refused"
    assert command_line("quantize", model, *arguments, "--output", str(output), "--device", "cpu") == status
    assert not output.exists()
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    """Folder and report of a story model at 3 bits a weight."""
    output = tmp_path_factory.mktemp("quantized") / "w3"
    return output, quantize(output, "--method", "gptq", "--bits", "3", *ROWS, *STORIES)


def test_other_commands_take_the_export(gptq, tmp_path, capsys):
    output, _ = gptq
    assert (
        command_line(
            "generate", str(output), "--prompt", "Once upon a time", "--max-tokens", "8", "--device", "cpu"
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("Once upon a time")
    found = tmp_path / "found.json"
    text = str(assets.resolve("asset:tinyshakespeare/validation.txt.xz"))
    shared = ("--text", text, "--block", "64", "--tokens", "1024", "--device", "cpu", "--json", str(found))
    assert command_line("evaluate", str(output), *shared) == 0
    assert json.loads(found.read_text())["perplexity"] > 1


def test_export_holds_low_bit_layers_and_the_tokenizer(gptq):
    output, _ = gptq
    model = load_export(output)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 35
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["linear_layers"] == {"QuantLinear": 35}
    assert manifest["quantization"]["settings"]["method"] == "gptq"
    assert not manifest["has_run"]
    assert not (output / "run.toml").exists()
    own, source = open_model(str(output)), open_model(MODEL)
    assert own.require_tokenizer().encode("Once upon a time") == source.require_tokenizer().encode(
        "Once upon a time"
    )
    assert own.require_tokenizer().end_ids == source.require_tokenizer().end_ids
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in output.iterdir()}


def test_report_has_the_errors_of_every_layer(gptq):
    _, report = gptq
    assert len(report["layers"]) == 35
    for layer in report["layers"]:
        assert 0 < layer["weight_error"] < 1
        assert 0 < layer["output_error"] < 1
        assert layer["damping"] == 0.01
        assert layer["seconds"] > 0
    # rows of 64 (172 in w2): 3 bits, a float32 scale and a zero point of 8 bits a row
    by_hand = {64: 3 + 40 / 64, 172: (8 * 65 + 40) / 172}
    assert all(e["bits_per_weight"] == pytest.approx(by_hand[e["in_features"]]) for e in report["layers"])
    weights = sum(e["in_features"] * e["out_features"] for e in report["layers"])
    assert report["quantized_weights"] == weights
    assert report["bytes_before"] - report["bytes_after"] == pytest.approx(
        weights * (4 - report["bits_per_weight"] / 8)
    )
    assert report["calibration"] == {
        "data": STORIES[1],
        "samples": 24,
        "sample_shape": [128],
        "seed": 0,
    }
    assert report["peak_memory_bytes"]["process"] > 1e8
    assert report["seconds"] > sum(e["seconds"] for e in report["layers"]) > 0


def test_gptq_beats_rounding_to_nearest_on_text_it_has_not_seen(gptq, tmp_path):
    """Held-out Shakespeare, 10 blocks: the story model's 131 becomes some 150 by GPTQ and 210 by rounding."""
    output, report = gptq
    rounded = quantize(tmp_path / "rtn", "--method", "rtn", "--bits", "3", *ROWS, *STORIES)
    text = read_text("asset:tinyshakespeare/validation.txt.xz")
    found = {}
    for folder in (output, tmp_path / "rtn"):
        opened = open_model(str(folder))
        found[folder] = perplexity(
            opened.model, opened.require_tokenizer(), text, block=256, tokens=2560
        ).perplexity
    assert found[output] < 0.9 * found[tmp_path / "rtn"]
    assert sum(e["output_error"] for e in report["layers"]) < sum(
        e["output_error"] for e in rounded["layers"]
    )


def test_the_same_command_gives_the_same_bytes(gptq, tmp_path):
    output, _ = gptq
    quantize(tmp_path / "again", "--method", "gptq", "--bits", "3", *ROWS, *STORIES)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        output / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "format"),
    [
        (("--format", "nf4"), {"kind": "nf4", "block_size": 64}),
        (("--format", "nf4", "--group-size", "32"), {"kind": "nf4", "block_size": 32}),
        (
            ("--bits", "4", "--group-size", "32", "--skip", "*.w2"),
            {"bits": 4, "group_size": 32, "symmetric": True},
        ),
        (("--method", "hqq", "--bits", "2", *ROWS), {"zero_point": "float", "symmetric": False}),
        (("--method", "lp", "--p", "3", "--bits", "8", *ROWS), {"bits": 8, "zero_point": "integer"}),
        (("--method", "mse", "--bits", "4", *ROWS, "--zero-point", "float"), {"zero_point": "float"}),
    ],
)  # fmt: skip
def test_formats_and_methods_of_the_command_line(tmp_path, arguments, format):
    report = quantize(tmp_path / "export", *arguments)
    assert format.items() <= report["settings"]["format"].items()
    assert all(layer["output_error"] is None for layer in report["layers"])
    assert load_export(tmp_path / "export")(torch.arange(8)[None]).isfinite().all()


def test_skipped_layers_stay_as_they_are_and_are_reported(tmp_path):
    report = quantize(
        tmp_path / "export", "--bits", "4", "--group-size", "32", "--skip", "*.w2", "--skip", "layers.0.*"
    )
    assert report["left_alone"]["layers.4.mlp.w2"] == "skip pattern '*.w2'"
    assert len(report["left_alone"]) == 5 + 6
    model = load_export(tmp_path / "export")
    assert torch.equal(model.layers[4].mlp.w2.weight, open_model(MODEL).model.layers[4].mlp.w2.weight)


def test_huggingface_folder_holds_the_dequantized_weights(tmp_path):
    quantize(tmp_path / "export", "--bits", "4", *ROWS, "--huggingface")
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        expected = load_export(tmp_path / "export")(tokens)
        assert torch.equal(open_model(f"hf:{tmp_path / 'export' / 'huggingface'}").model(tokens), expected)


def test_model_without_a_huggingface_folder_is_refused_before_the_work(capsys, tmp_path):
    model = trained(tmp_path, "llm")
    arguments = ("--bits", "4", "--group-size", "32", "--huggingface")
    assert "came from no Hugging Face folder" in refused(capsys, tmp_path, *arguments, model=model)


def test_rest_of_an_earlier_export_can_be_quantized(tmp_path):
    quantize(tmp_path / "first", "--bits", "4", "--group-size", "32", "--target", "*.attn.*")
    report = quantize(
        tmp_path / "second", "--bits", "8", "--group-size", "row", model=str(tmp_path / "first")
    )
    assert report["left_alone"]["layers.0.attn.q_proj"] == "is low-bit already, affine of 4 bits"
    model = load_export(tmp_path / "second")
    assert model.layers[0].attn.q_proj.format.bits == 4
    assert model.layers[0].mlp.w2.format.bits == 8


def trained(tmp_path, family: str) -> str:
    """The folder of a run of one step."""
    run = tiny_run(family, None, output=str(tmp_path / "run"))
    trial = Trial.of(run)
    trial.advance(1)
    checkpoint.save(run, 1, trial.model, trial.optimizer, trial.data.state_dict(), trial.process)
    write_identity(run, trial.chain.receipt if trial.chain.transforms else _receipt(), {})
    return run.output


def _receipt():
    from qrecipes.transforms.receipt import Receipt

    return Receipt([])


@pytest.mark.parametrize(("family", "layers"), [("llm", 14), ("vit", 8)])
def test_runs_are_calibrated_on_the_data_of_a_configuration(tmp_path, family, layers):
    """A vision transformer, too, on images."""
    model = trained(tmp_path, family)
    samples = ("--calibration", f"tiny/{family}", "--samples", "6", "--length", "32")
    report = quantize(
        tmp_path / "w4", "--method", "gptq", "--bits", "4", "--group-size", "32", *samples, model=model
    )
    assert len(report["layers"]) == layers
    assert all(0 < layer["output_error"] < 0.2 for layer in report["layers"])  # 4 bits leave a tenth
    again = open_model(str(tmp_path / "w4"))
    assert again.run is not None
    assert sum(isinstance(m, QuantLinear) for m in again.model.modules()) == layers


def test_conversations_and_texts_of_any_name_calibrate(tmp_path):
    (tmp_path / "stories.raw").write_text("Once upon a time, there was a little girl. She was happy. " * 80)
    (tmp_path / "chat.toml").write_text(
        f'steps = 1\n[model]\nsource = "{MODEL}"\n[data]\nsource = "conversations"\nfiles = ["{TEXT}"]\n'
    )
    for data in ("stories.raw", "chat.toml"):
        named = ("--calibration", str(tmp_path / data), "--samples", "3", "--length", "256")
        report = quantize(tmp_path / data.partition(".")[0], "--method", "gptq", "--bits", "4", *ROWS, *named)
        assert report["calibration"]["samples"] == 3


GPTQ = ("--method", "gptq", "--bits", "4", *ROWS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gptq", "--bits", "4"), "'gptq' needs text to calibrate on; add --calibration"),
        ((), "--bits: missing; use 2, 3, 4 or 8"),
        (
            ("--bits", "4", "--group-size", "48"),
            "48 does not divide 64 input features of layers.0.attn.q_proj and 29 more (use 32), nor 172 "
            "input features of layers.0.mlp.w2 and 4 more (use row); choose another, or leave layers alone",
        ),
        (("--bits", "4", "--group-size", "12"), "--group-size: 12 is no multiple of 8; use a multiple"),
        (("--bits", "4", "--group-size", "all"), "--group-size: 'all'; use a number, or 'row'"),
        (
            ("--bits", "4", "--zero-point", "float"),
            "--zero-point: a symmetric format has none; add --asymmetric",
        ),
        (("--bits", "4", "--method", "hqq"), "--asymmetric: missing, and 'hqq' optimizes zero points"),
        (
            ("--method", "hqq", "--bits", "4", *ROWS, "--zero-point", "integer"),
            "'hqq' optimizes float zero points",
        ),
        (("--format", "nf4", "--bits", "4"), "--bits: NF4 has its own 16 levels; leave it out"),
        (("--format", "nf4", "--method", "mse"), "'mse', but NF4 has fixed levels"),
        (("--bits", "4", "--damping", "0.1"), "--damping: is of --method gptq; leave it out"),
        (("--bits", "4", "--static-groups"), "--static-groups: is of --method gptq; leave it out"),
        (("--bits", "4", "--p", "3"), "--p: is the exponent of --method lp"),
        (("--method", "lp", "--bits", "4", *ROWS, "--p", "9"), "p: 9; use 2 to 5"),
        (("--bits", "4", *ROWS, "--skip", "*"), "no plain linear layer is left to quantize"),
        (
            (*GPTQ, "--calibration", STORIES[1], "--length", "4096"),
            "--length: 4096 is more than the 512 tokens",
        ),
        (
            (*GPTQ, "--calibration", STORIES[1], "--samples", "0", "--length", "8"),
            "0 samples of 8 tokens; use at least 1",
        ),
        (
            (*GPTQ, "--calibration", "tiny/vit", "--length", "64"),
            "tiny/vit holds images, and the model takes tokens",
        ),
        ((*GPTQ, *STORIES, "--damping", "-1"), "GPTQSettings.damping: -1"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, tmp_path, *arguments)


def test_text_that_is_too_short_is_refused_with_the_tokens_needed_and_found(capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time, there was a little girl. " * 10)  # one sample, not twenty
    count = (
        len(open_model(MODEL).require_tokenizer().encode(short.read_text())) + 2
    )  # and its beginning and end
    error = refused(
        capsys, tmp_path, *GPTQ, "--calibration", str(short), "--length", "64", "--samples", "20", status=1
    )
    assert (
        f"20 samples of 64 tokens need 1,280 tokens, and {short} has {count}; take fewer or shorter" in error
    )


def test_too_few_conversations_are_refused(capsys, tmp_path):
    path = tmp_path / "chat.toml"
    path.write_text(
        f'steps = 1\n[model]\nsource = "{MODEL}"\n[data]\nsource = "conversations"\nfiles = ["{TEXT}"]\n'
    )
    arguments = ("--calibration", str(path), "--length", "512", "--samples", "9999")
    assert "9999 samples are needed, and" in refused(capsys, tmp_path, *GPTQ, *arguments, status=1)


def test_a_folder_that_is_no_export_is_kept(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert command_line("quantize", MODEL, "--bits", "4", *ROWS, "--output", str(tmp_path / "mine")) == 1
    assert "exists and is no export" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
