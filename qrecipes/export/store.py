"""Finished models on disk: safetensors, a manifest, and the run they came from.

An export is a folder that needs nothing else: `model.safetensors` with the finalized model's tensors,
`manifest.json` with what they are, `run.toml` with the run that they came from, if one did, and the
tokenizer's files. Loading replays build, swap and finalize on an empty model, puts low-bit layers where the
manifest has some that no transform makes, and assigns the stored tensors, so every method's export reloads by
the same code. Where the model came from a Hugging Face folder, `huggingface/` beside it is one
that transformers loads; the manifest holds the builder and the arguments that its config.json asked for, so
that neither folder is needed to reload.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qrecipes import __version__
from qrecipes.config import parse
from qrecipes.config.run import ModelSection, Run, TokenizerSection
from qrecipes.data import Batch, build_data
from qrecipes.data.templates import find_template
from qrecipes.data.tokenizers import Tokenizer, load_own_tokenizer, tokenizer_of
from qrecipes.errors import ConfigError, DataError, ExportError
from qrecipes.export.merge_report import HELD_OUT_BATCHES, MergeReport, merge_report, sharing_parameters
from qrecipes.export.peft import save_peft
from qrecipes.models.build import build, resolve_dtype
from qrecipes.models.sources import resolve, source_folder
from qrecipes.models.weights import save_huggingface
from qrecipes.parallel.process import Process
from qrecipes.quant.formats import format_from_json, format_to_json
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.sharded import is_composite
from qrecipes.training import checkpoint, constants
from qrecipes.training.device_kind import device_of, kind_of
from qrecipes.training.output import RUN_FILE, read_run
from qrecipes.training.seed import seed_building
from qrecipes.transforms.chain import Chain

FORMAT = 1
MANIFEST, TENSORS, TEMPLATE = "manifest.json", "model.safetensors", "chat_template.jinja"
MERGE_REPORT = "merge_report.json"
_ALONE = Process(0, 1, torch.device("cpu"), None)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the model of an export came from."""

    model: ModelSection
    run: Run | None = None
    """The run that trained it; None for a model that was only converted."""
    tokenizer: Tokenizer | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    """More for the manifest, by key, such as how the model was quantized."""


def load_run(
    output: str | Path, *, step: int | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Run]:
    """The finalized model of a run's newest checkpoint, or of the one after `step` steps, in evaluation mode.

    Where bits depend on it, layers are merged on the kind of device that trained them, if there is one; if
    not, stderr says so.

    Raises:
        ConfigError: if `output` is no run folder.
        ExportError: if there is no such checkpoint.
        CheckpointError: if it is damaged.
    """
    trained = _open_checkpoint(output, step, device)
    merging = _merging(trained, output)
    return trained.chain.finalize(trained.model, merging.device).eval(), trained.run


def load_swapped(
    output: str | Path, *, step: int | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Chain, Run]:
    """The model of a run's checkpoint as it trained, in evaluation mode, with its transforms; raises as
    `load_run`."""
    trained = _open_checkpoint(output, step, device)
    return trained.model, trained.chain, trained.run


class _Trained(NamedTuple):
    """What a checkpoint holds."""

    model: nn.Module
    chain: Chain
    run: Run
    kind: str | None
    """The kind of device that it trained on; None where that is not on record."""


class _Merging(NamedTuple):
    """Where layers become what they are in the finished model."""

    device: torch.device | None
    """None: where they are."""
    note: str | None = None
    """What may differ from the model that trained."""


def _merging(trained: _Trained, output: str | Path) -> _Merging:
    """A device of the kind that trained, where it matters; says on stderr where there is none."""
    differs = trained.chain.merge_differs
    if differs is None:
        return _Merging(None)
    device = None if trained.kind is None else device_of(trained.kind)
    if device is not None:
        return _Merging(device)
    home = kind_of(next(trained.model.parameters()).device)
    trainer = "a kind of device that is not on record" if trained.kind is None else trained.kind
    note = f"trained on {trainer} and merged on {home}: {differs}"
    print(
        f"note: {output}: {note}; for equal bits, use a machine with such a device",
        file=sys.stderr,
    )
    return _Merging(None, note)


def _open_checkpoint(output: str | Path, step: int | None, device: str | torch.device) -> _Trained:
    """A run's checkpoint; raises as `load_run`."""
    output = Path(output)
    run = read_run(output)
    available = checkpoint.list_checkpoints(output)
    wanted = (
        available[-1:] if step is None else [p for p in available if p == checkpoint.folder_of(output, step)]
    )
    if not wanted:
        known = ", ".join(p.name for p in available) or "none"
        raise ExportError(
            f"{output}: has no checkpoint{'' if step is None else f' of step {step}'}; it has: {known}"
        )
    state = checkpoint.read_state(wanted[0])
    if constants.needs_rebuilding(wanted[0], state):
        model, chain = _swapped_anew(run, state)
        model.to(device)
    else:
        frozen = constants.file_of(wanted[0], state)
        files = [wanted[0] / checkpoint.MODEL, *([] if frozen is None else [frozen])]
        model, chain = _swapped_empty(run, _stored_dtype(files, run.model), device)
        _materialize_(model, device)
    checkpoint.load_model(wanted[0], state, model, _ALONE)
    return _Trained(model.eval(), chain, run, state.get("device"))


def _build_empty(section: ModelSection, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """The model with any values; nothing is downloaded, and the random state is put back."""
    args = {key: value for key, value in section.args.items() if key != "pretrained"}
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return build(replace(section, args=args), dtype=dtype, device=device, initialize=False)


def _swapped_empty(run: Run, dtype: torch.dtype, device: str | torch.device) -> tuple[nn.Module, Chain]:
    """The run's model after its transforms, with any values; the random state is put back.

    Layers that a transform replaces are on the meta device, where none of its work is done: weights that are
    overwritten need no quantizing, nor do they lend themselves to it.
    """
    model = _build_empty(run.model, dtype, device)
    chain = Chain.from_configs(run.transform)
    for transform in chain.transforms:
        for site in transform.sites(model).values():
            if isinstance(site, nn.Linear):
                site.to("meta")
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return chain.swap(model), chain


def _swapped_anew(run: Run, state: Mapping[str, Any]) -> tuple[nn.Module, Chain]:
    """The run's model after its transforms as the run began, made on the kind of device that it trained on,
    if there is one; the random state is put back."""
    from qrecipes.export.opened import starting_model  # which opens runs, too

    has_device = torch.device(state["frozen"]["device"]).type == "cpu" or torch.cuda.is_available()
    device = torch.device(state["frozen"]["device"] if has_device else "cpu")
    home = device if state["world"] == 1 else torch.device("cpu")  # as a run of several processes builds
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_building(run.seed)
        model = starting_model(run.model, dtype=resolve_dtype(run.model, device), device=home)
        chain = Chain.from_configs(run.transform)
        return chain.swap(model), chain


def _materialize_(model: nn.Module, device: str | torch.device) -> None:
    """Put zeros in the place of every parameter that is on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                zeros = _zeros_like(parameter.detach(), device)
                setattr(module, name, nn.Parameter(zeros, parameter.requires_grad))


def _zeros_like(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Zeros on `device`, in every part of a tensor subclass that is made of several."""
    if not is_composite(tensor):
        return torch.zeros_like(tensor, device=device)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: _zeros_like(getattr(tensor, name), device) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]


def _stored_dtype(paths: Iterable[Path], section: ModelSection) -> torch.dtype:
    """The type of a model in files: bfloat16 if any of its tensors has it, as buffers stay float32.

    Tensors that the model had not before its transforms, such as scales, have types of their own.
    """
    from safetensors import safe_open

    plain = _build_empty(section, torch.float32, "meta").state_dict().keys()
    types: dict[str, str] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            types |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no dict
    kept = [dtype for name, dtype in types.items() if name in plain] or types.values()
    return torch.bfloat16 if "BF16" in kept else torch.float32


def save(model: nn.Module, run: Run, destination: str | Path) -> Path:
    """Write a run's finalized model as an export; raises as `save_model`."""
    return save_model(model, Origin(model=run.model, run=run, tokenizer=tokenizer_of(run)), destination)


def check_destination(destination: str | Path) -> None:
    """Raise ExportError where `save_model` would not write: what is there is no export."""
    destination = Path(destination)
    if destination.is_file():
        raise ExportError(f"{destination}: is a file, and an export is a folder; give another --output")
    if destination.exists() and any(destination.iterdir()) and not (destination / MANIFEST).is_file():
        raise ExportError(f"{destination}: exists and is no export; give another --output, or remove it")


def save_model(model: nn.Module, origin: Origin, destination: str | Path) -> Path:
    """Write a model of plain and low-bit layers as an export.

    Raises:
        ExportError: if the folder exists and is no export, or cannot be written.
    """
    destination = Path(destination)
    check_destination(destination)
    run, tokenizer = origin.run, origin.tokenizer
    partial = destination.with_name(destination.name + ".partial")
    tensors = _unshared(model.state_dict())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        if run is not None:
            (partial / RUN_FILE).write_text(parse.dump(run), encoding="utf-8")
        tokenizer_files = () if tokenizer is None else tokenizer.files
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)
        if tokenizer is not None and (partial / "tokenizer.json").is_file():
            _write_ends(tokenizer, partial / "generation_config.json")
        if tokenizer is not None and run is not None:
            _write_template(run, tokenizer, partial)
        manifest = _manifest(model, origin, tensors, partial)
        manifest["tokenizer_files"] = [file.name for file in tokenizer_files]
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(partial / MANIFEST, partial / TENSORS)  # safetensors makes files for the owner alone
        shutil.rmtree(destination, ignore_errors=True)
        partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{destination}: cannot be written: {error}; give another --output") from error
    return destination


def _write_ends(tokenizer: Tokenizer, path: Path) -> None:
    """Name the tokens that begin and end texts, which the model's own config.json may have told, not its
    tokenizer's files."""
    told: dict[str, Any] = {"eos_token_id": list(tokenizer.end_ids)} if tokenizer.end_ids else {}
    beginning = tokenizer.special_tokens.get(tokenizer.template_names.get("bos_token", ""))
    if beginning is not None:
        told["bos_token_id"] = beginning
    path.write_text(json.dumps(told) + "\n", encoding="utf-8")


def _write_template(run: Run, tokenizer: Tokenizer, folder: Path) -> None:
    """Put the chat template that the model was trained in beside its tokenizer, where it is another one than
    the tokenizer's own."""
    if run.data.source != "conversations":
        return
    template = find_template(run.data.conversation.template, tokenizer)
    if template.source != tokenizer.chat_template:
        (folder / TEMPLATE).write_text(template.standalone(), encoding="utf-8")


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, each with memory of its own, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        apart[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return apart


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(
    model: nn.Module, origin: Origin, tensors: dict[str, torch.Tensor], folder: Path
) -> dict[str, Any]:
    layers = {fqn: type(m).__name__ for fqn, m in model.named_modules() if hasattr(m, "in_features")}
    resolved = resolve(origin.model)
    transforms = () if origin.run is None else origin.run.transform
    return {
        "format": FORMAT,
        "written_by": f"qrecipes {__version__}, torch {torch.__version__}",
        "model": {"source": resolved.source, "args": resolved.args, "from": origin.model.source},
        "parameter_dtype": str(_stored_dtype([folder / TENSORS], origin.model)).removeprefix("torch."),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "has_run": origin.run is not None,
        "transforms": sorted({type(config).__name__ for config in transforms}),
        "linear_layers": {kind: list(layers.values()).count(kind) for kind in sorted(set(layers.values()))},
        "quantized_layers": _quantized_layers(model),
        "sha256": {TENSORS: _sha256(folder / TENSORS)},
        **origin.notes,
    }


def _quantized_layers(model: nn.Module) -> list[dict[str, Any]]:
    """Each format of the model's low-bit weights, and the names of the layers that have it."""
    found: dict[str, dict[str, Any]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, QuantLinear):
            described = {"format": format_to_json(module.format), "layers": []}
            found.setdefault(module.format.key, described)["layers"].append(fqn)
    return list(found.values())


def load_export(path: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """The model of an export, in evaluation mode: on the same device, its outputs are the exported model's to
    the bit.

    Raises:
        ExportError: if the folder is no export, or is damaged.
    """
    model, _ = load_export_and_origin(path, device=device)
    return model


def load_export_and_run(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[nn.Module, Run]:
    """`load_export`, and the run that the export came from.

    Raises:
        ExportError: also if it came from none.
    """
    model, origin = load_export_and_origin(path, device=device)
    if origin.run is None:
        raise ExportError(f"{path}: came from no run of qrecipes, so it holds no {RUN_FILE}")
    return model, origin.run


def load_export_and_origin(
    path: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Origin]:
    """`load_export`, and where the model came from."""
    folder = Path(path)
    manifest = _read_manifest(folder)
    origin = _origin(folder, manifest)
    try:
        tensors = load_file(folder / TENSORS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder / TENSORS}: cannot be read: {error}; export again") from error
    if _sha256(folder / TENSORS) != manifest["sha256"][TENSORS]:
        raise ExportError(
            f"{folder / TENSORS}: was changed since it was written (its SHA-256 differs); export again"
        )
    dtype = getattr(torch, manifest["parameter_dtype"])
    if origin.run is None:
        model = _build_empty(origin.model, dtype, device)
    else:
        model, chain = _swapped_empty(origin.run, dtype, device)
        model = chain.finalize(model)
    _place_low_bit_layers(folder, model, manifest)
    _check_formats(folder, model, manifest)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), origin


def _origin(folder: Path, manifest: dict[str, Any]) -> Origin:
    """The origin of an export, whose model and tokenizer are those in the folder: they may be all that is
    left."""
    if manifest.get("has_run", True):
        run = _alone(read_run(folder), folder, manifest)
        return Origin(model=run.model, run=run, tokenizer=tokenizer_of(run))
    described = manifest["model"]
    section = ModelSection(source=described["source"], args=described["args"], weights="random")
    return Origin(model=section, tokenizer=load_own_tokenizer(folder))


def _place_low_bit_layers(folder: Path, model: nn.Module, manifest: dict[str, Any]) -> None:
    """Put empty low-bit layers where the manifest has them and the model has plain ones."""
    for part in manifest.get("quantized_layers", []):
        format = format_from_json(part["format"])
        for fqn in part["layers"]:
            try:
                linear = model.get_submodule(fqn)
            except AttributeError as error:
                raise ExportError(f"{folder / MANIFEST}: names a layer {fqn} that the model lacks") from error
            if type(linear) is nn.Linear:
                empty = QuantLinear(
                    linear.in_features,
                    linear.out_features,
                    format,
                    bias=linear.bias is not None,
                    device="meta",
                    dtype=linear.weight.dtype,
                )
                model.set_submodule(fqn, empty)


def _check_formats(folder: Path, model: nn.Module, manifest: dict[str, Any]) -> None:
    """Raise ExportError where the transforms make other low-bit layers than the export holds."""
    stored, made = manifest.get("quantized_layers", []), _quantized_layers(model)
    if stored != made:
        described = [
            "; ".join(f"{len(part['layers'])} x {part['format']}" for part in parts) or "none"
            for parts in (stored, made)
        ]
        raise ExportError(
            f"{folder}: holds low-bit layers ({described[0]}) other than its run.toml makes "
            f"({described[1]}); use the version of qrecipes that wrote it "
            f"({manifest.get('written_by', 'unknown')})"
        )


def _alone(run: Run, folder: Path, manifest: dict[str, Any]) -> Run:
    """The run with its model and tokenizer as the export holds them: they may be all that is left."""
    described = manifest["model"]
    model = replace(run.model, source=described["source"], args=described["args"])
    if run.model.source != model.source and run.model.weights is None:
        model = replace(model, weights="random")  # its own are in the export
    if (folder / TEMPLATE).is_file():
        told = replace(run.data.conversation, template="chat")
        run = replace(run, data=replace(run.data, conversation=told))
    files = manifest["tokenizer_files"]
    if not files or (run.tokenizer is not None and run.tokenizer.path is None):
        return replace(run, model=model)
    name = "" if run.tokenizer is None else Path(str(run.tokenizer.path)).name
    tokenizer = run.tokenizer or TokenizerSection(path=".")
    path = str(folder / name if name in files else folder)
    return replace(run, model=model, tokenizer=replace(tokenizer, path=path))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder}: is no export: {MANIFEST} cannot be read ({error})") from error
    if version != FORMAT:
        raise ExportError(
            f"{folder}: has export format {version}; this version reads {FORMAT}; "
            f"use the version of qrecipes that "
            f"wrote it ({manifest.get('written_by', 'unknown')})"
        )
    return manifest


def export_run(
    output: str | Path,
    destination: str | Path | None = None,
    *,
    step: int | None = None,
    huggingface: bool = True,
    peft: bool = False,
    check_merge: bool = True,
    held_out: Iterable[Batch] | None = None,
) -> list[Path]:
    """Export a run's newest checkpoint, or the one after `step` steps, and check that it reloads bit for bit.

    Writes `destination` (default `output/export`); where the weights came from a Hugging Face folder and
    `huggingface` is true, `destination/huggingface`; and with `peft`, the adapters in `destination/peft`.
    Where the run has transforms, `destination/merge_report.json` compares the model before and after they
    are merged, on `held_out`, by default the run's own; with `check_merge`, a merge worse than its method's
    bounds is refused before anything is written. Layers are merged where `load_run` merges them; the report
    has a note where that is another kind of device than trained.

    Raises:
        ExportError: if there is nothing to export, the reloaded tensors differ, or the merge is worse than
        its bounds or cannot be measured.
    """
    destination = Path(destination) if destination is not None else Path(output) / "export"
    trained = _open_checkpoint(output, step, "cpu")
    merging = _merging(trained, output)
    model, chain, run, _ = trained
    report = _merge_report(trained, merging, destination, held_out, check_merge)
    adapted = sharing_parameters(model)
    model = chain.finalize(model, merging.device).eval()
    written = [save(model, run, destination)]
    if report is not None:
        path = destination / MERGE_REPORT
        path.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    reloaded = load_export(destination).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(reloaded[name], tensor):
            raise ExportError(
                f"{destination}: {name} differs after reloading; this is a fault of the exporter"
            )
    source = source_folder(run.model) if huggingface else None
    if source is not None:
        save_huggingface(model, source, destination / "huggingface", args=run.model.args)
        tokenizer = tokenizer_of(run)
        if tokenizer is not None:
            _write_template(run, tokenizer, destination / "huggingface")
        written.append(destination / "huggingface")
    if peft:
        written.append(save_peft(adapted, chain, run, destination / "peft"))
    return written


def _merge_report(
    trained: _Trained,
    merging: _Merging,
    destination: Path,
    held_out: Iterable[Batch] | None,
    check: bool,
) -> MergeReport | None:
    """The comparison, None where nothing was swapped, or where it may be left out and there is no data."""
    model, chain, run, _ = trained
    if not chain.transforms:
        return None
    try:
        batches = _held_out(run) if held_out is None else held_out
        report = replace(merge_report(model, chain, batches, merging.device), note=merging.note)
    except (ConfigError, DataError, ExportError) as error:
        if not check:
            print(f"note: the merge was not measured: {error}", file=sys.stderr)
            return None
        raise ExportError(
            f"{destination}: the merge cannot be measured: {error}; a run with transforms is compared before "
            "and after them on its held-out data; bring the data back, or export with --no-merge-check"
        ) from error
    if check:
        report.check(destination)
    print(report.summary(), file=sys.stderr)
    return report


def _held_out(run: Run) -> Iterable[Batch]:
    """The run's held-out data; the first batches of its training data where it has none."""
    shared = {"task": run.task, "seed": run.seed, "rank": 0, "world": 1}
    data, held_out = build_data(run.data, tokenizer_of(run), **shared)  # type: ignore[arg-type]
    if held_out is not None:
        return held_out
    return (data.next_batch() for _ in range(HELD_OUT_BATCHES))
