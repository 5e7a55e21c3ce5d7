"""Every section of a run: frozen dataclasses with defaults and units.

A field is documented by the string below it; the JSON Schema (`qrecipes schema`) carries those strings to
editors. Rules about one field live in its annotation, rules across the fields of a section in
`__post_init__`, rules against the rest of the run in the transform's `check`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from qrecipes.errors import ConfigError
from qrecipes.transforms.base import TransformConfig

Scalar = bool | int | float | str
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model is built, and from which weights it starts."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: str
    """`hf:FOLDER` or `hf:OWNER/NAME` for a Hugging Face model, whose config.json says what is built;
    `torchtune:BUILDER`, `torchtune:FAMILY.BUILDER` or `timm:NAME`, such as "torchtune:llama3_2_1b"."""
    args: dict[str, Scalar | list[Scalar]] = field(default_factory=dict)
    """Keyword arguments of the builder, such as `num_layers = 2` for a component builder; with `hf:` they
    override what config.json says, such as `max_seq_len = 4096`."""
    weights: str | None = None
    """Folder with Hugging Face files (config.json and safetensors, whole or sharded), `asset:NAME` for
    weights that ship with qrecipes, or a hub repository `OWNER/NAME`. Absent: with `hf:` the source's own,
    else random weights. "random" leaves a Hugging Face model's weights random."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the random embeddings and linear weights of torchtune models; timm initializes
    its own."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the parameters; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    quantized: str | None = None
    """Export of `qrecipes quantize`, or `hf:FOLDER` with a GPTQ checkpoint, of this same model, which starts
    from it instead of `weights`; `source` may be that GPTQ checkpoint, too. A transform must take each
    low-bit layer as the base of an adapter."""
    adapter: str | None = None
    """Folder of a LoRA as peft writes it (adapter_config.json, adapter_model.safetensors), which the adapters
    of the run's transforms start from; for models of Hugging Face."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"hf:\S.*|(torchtune|timm):\S+", self.source):
            raise ConfigError(
                f"model.source: {self.source!r} does not say where the model comes from; "
                "write hf:FOLDER, torchtune:BUILDER or timm:NAME"
            )


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """What is learnt: the loss and the metrics of evaluation."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["language_modeling", "classification"] = "language_modeling"
    """`language_modeling` predicts the next token, `classification` the class of an image."""
    label_smoothing: Fraction = 0.0
    """Weight of the uniform distribution mixed into the targets while training."""
    loss: Literal["plain", "chunked", "liger"] = "plain"
    """How the cross-entropy of a language model is computed. `plain` makes the logits of all tokens;
    `chunked` those of `chunk_tokens` tokens at a time, never all; `liger` calls Liger's fused kernel on a GPU
    (extra `liger`). All give the same loss to rounding; where a transform quantizes the head itself, its
    scales are then over a chunk's tokens."""
    chunk_tokens: PositiveInt = 2048
    """Tokens whose logits exist at a time with `loss = "chunked"`."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """How text becomes token numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["auto", "hf", "tiktoken", "sentencepiece", "bytes"] = "auto"
    """`hf` reads tokenizer.json, `tiktoken` a file of ranks, `sentencepiece` a .model, `bytes` is UTF-8
    itself (256 values, then the end of text, 256). `auto` tells by what `path` holds."""
    path: str | None = None
    """File or folder, `asset:NAME`, or a hub repository `OWNER/NAME`. Not used by `bytes`."""
    pattern: Literal["cl100k", "gpt2", "llama3", "qwen2"] = "llama3"
    """The regular expression that splits text before byte-pair encoding; tiktoken files do not carry it."""

    def __post_init__(self) -> None:
        if self.kind == "bytes" and self.path is not None:
            raise ConfigError(
                f"tokenizer.path: {self.path!r} has no use, bytes need no file; remove it, or change the kind"
            )
        if self.kind != "bytes" and not self.path:
            raise ConfigError(
                f'tokenizer.path: missing, and {self.kind!r} reads one; name a file, or set kind = "bytes"'
            )


@dataclass(frozen=True, kw_only=True)
class ConversationSection:
    """How rows become conversations, and which of their tokens are learnt; for source "conversations"."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: Literal["auto", "instruction", "messages", "sharegpt", "text"] = "auto"
    """`instruction`: a request and its answer in columns of their own, perhaps with an input beside the
    request. `messages`: a list of {role, content}. `sharegpt`: a list of {from, value}. `text`: one column,
    all of it learnt. `auto` tells by the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the data's, for instruction, input, output, system, messages and text, where
    the usual names do not fit: `columns = { instruction = "query", output = "response" }`."""
    template: str = "auto"
    """How a conversation is written out. `chat`: the tokenizer's own chat template. `alpaca`, `plain`
    (request, blank line, answer) and `question` ("Question: ... Answer: ...") ship; anything else is the path
    of a jinja2 chat template. `auto`: the tokenizer's own if it has one, else `alpaca`."""
    system: str | None = None
    """System message of conversations that have none."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens count in the loss: those of the assistant's turns, with the token that ends a turn; of
    its last turn only; or all."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a conversation of more than `data.sequence_length` tokens; how many is reported."""
    malformed: Literal["error", "drop"] = "error"
    """What becomes of a row that is no conversation: a column is missing or holds no text, nobody answers,
    or the template refuses the order of its turns. Rows with an empty answer are always dropped; how many is
    reported."""
    packing: bool = True
    """Put several conversations into one sequence; none attends to another. Otherwise each has a row of its
    own, padded."""
    length_buckets: tuple[PositiveInt, ...] = ()
    """Without packing, the lengths to which rows are padded, so that a compiled model sees few shapes; a
    micro-batch holds rows of one bucket. Absent: powers of two from 64 to `data.sequence_length`."""

    def __post_init__(self) -> None:
        known = ("instruction", "input", "output", "system", "messages", "text")
        unknown = [name for name in self.columns if name not in known]
        if unknown:
            raise ConfigError(
                f"data.conversation.columns: {unknown[0]!r} is not one of {', '.join(known)}; our name comes "
                'first, the data\'s second: columns = { instruction = "query", output = "response" }'
            )
        if self.packing and self.length_buckets:
            raise ConfigError(
                "data.conversation.length_buckets: have no use with packing, where every row has "
                "data.sequence_length tokens; remove them, or set packing = false"
            )
        if list(self.length_buckets) != sorted(set(self.length_buckets)):
            raise ConfigError(
                f"data.conversation.length_buckets: {list(self.length_buckets)} do not ascend; sort them, "
                "each once"
            )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Where the batches come from."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    source: Literal["text", "tokens", "dataset", "conversations", "images", "synthetic"]
    """`text`: files of documents, tokenized here. `tokens`: tokenized `.bin` shards. `dataset`: the name of a
    Hugging Face dataset, or a local folder of .parquet, .jsonl, .csv or .txt files or of what `save_to_disk`
    wrote. `conversations`: rows of instructions or chats from .json, .jsonl, .csv or .parquet files, or else
    a Hugging Face dataset, named as for `dataset`; `[data.conversation]` says how they are read. `images`: a
    folder with one folder a class. `synthetic`: random but learnable data, a function of the seed."""
    files: tuple[str, ...] = ()
    """Files, globs or `asset:` names of the training data; for `images` one folder; for `dataset` its name,
    then optionally its configuration's name. Text: .txt, .jsonl or .parquet, each also as .xz or .gz."""
    validation_files: tuple[str, ...] = ()
    """The same for held-out data."""
    validation_fraction: Fraction = 0.0
    """Share of the training data's end that is held out where `validation_files` is empty."""
    split: str = "train"
    """Split of a Hugging Face dataset used for training."""
    validation_split: str | None = None
    """Split of a Hugging Face dataset that is held out."""
    text_column: str = "text"
    """Column or JSON key that holds a document."""
    document_separator: str | None = None
    """Line that separates documents in .txt files; absent, a .txt file is one document."""
    streaming: bool = False
    """Read a Hugging Face dataset as a stream, without downloading it whole."""
    sequence_length: PositiveInt = 1024
    """Tokens a sequence, the model's input; one more is read for the last target."""
    batch_size: PositiveInt = 8
    """Sequences or images a micro-batch on each rank."""
    shuffle: bool = True
    """Draw sequences in an order made from the run's seed, another one each epoch."""
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    """Integer type of `.bin` shards without an index file."""
    image_size: PositiveInt = 224
    """Height and width of an image, in pixels."""
    vocab_size: PositiveInt = 256
    """Range of `synthetic` tokens."""
    num_classes: PositiveInt = 10
    """Number of classes of `synthetic` images."""
    augment: bool = True
    """Random crop and horizontal flip of training images."""
    conversation: ConversationSection = field(default_factory=ConversationSection)
    """How rows of `conversations` are read."""

    def __post_init__(self) -> None:
        if self.source == "synthetic" and self.files:
            raise ConfigError(
                "data.files: synthetic data reads no files; set files = [], or choose another source"
            )
        if self.source != "synthetic" and not self.files:
            raise ConfigError(
                f"data.files: missing, and source {self.source!r} reads them; name at least one"
            )
        most = {"images": 1, "dataset": 2}.get(self.source, len(self.files))
        may_split = self.source in ("dataset", "conversations")
        if len(self.files) > most:
            raise ConfigError(
                f"data.files: {len(self.files)} values; source {self.source!r} takes "
                + ("one folder" if most == 1 else "a name and at most one configuration's name")
            )
        if self.source != "dataset" and self.streaming:
            raise ConfigError(f"data.streaming: only source 'dataset' has it, not {self.source!r}; remove it")
        if not may_split and self.validation_split is not None:
            raise ConfigError(
                f"data.validation_split: only sources 'dataset' and 'conversations' have it, not "
                f"{self.source!r}; remove it"
            )
        if self.streaming and self.validation_fraction:
            raise ConfigError(
                "data.validation_fraction: a stream has no known end; name a validation_split instead"
            )


@dataclass(frozen=True, kw_only=True)
class OptimSection:
    """The optimizer, and what happens to gradients before it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Literal[
        "adamw", "stochastic_adamw", "schedule_free_adamw", "adamw8bit", "adamw4bit", "adamw_fp8", "sgd"
    ] = "adamw"
    """State in bytes a bfloat16 weight, beside the weight and its gradient: `adamw4bit` 1.06, `sgd` 2,
    `adamw8bit` and `adamw_fp8` 2.03, `adamw` 4, `stochastic_adamw` 6, `schedule_free_adamw` 12; a float32
    weight: `sgd` 4, `adamw` and `stochastic_adamw` 8, the others the same.

    `stochastic_adamw` rounds bfloat16 weights stochastically and keeps its second moment in float32.
    `schedule_free_adamw` (arXiv 2405.15682) needs no falling learning rate: what is judged, saved and
    exported is an average of the weights, kept in float32; `betas[0]` is its share where gradients are taken.
    `adamw8bit`, `adamw4bit` and `adamw_fp8` are torchao's, with moments quantized in blocks; they, too, round
    bfloat16 weights stochastically where `stochastic_rounding` is set."""
    stochastic_rounding: bool = False
    """With torchao's optimizers: round bfloat16 weights stochastically instead of to nearest."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's two moments; the first is the momentum of SGD."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; vectors such as norms and biases are never decayed."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the gradient of all trained parameters together; 0 leaves gradients alone."""
    accumulate: PositiveInt = 1
    """Micro-batches an optimizer step."""
    fused: bool = True
    """Use the fused kernel of AdamW and SGD on a GPU."""
    in_backward: bool = False
    """Update each parameter in the backward pass, as soon as its gradient is complete, and free that: one
    gradient exists at a time (one block's under FSDP2 or `compile`), 2 bytes a bfloat16 weight less. Needs
    `clip_norm = 0` and `accumulate = 1`."""
    offload: Literal["none", "state", "state_and_gradients"] = "none"
    """`state` keeps the state of `adamw` or `sgd` in host memory, with a float32 copy of each weight, and
    updates on the CPU; the GPU holds only weights and gradients. With `state_and_gradients` each gradient,
    too, leaves the GPU as soon as it is complete; this needs `clip_norm = 0` and `accumulate = 1`. For one
    GPU."""

    @property
    def takes_gradients(self) -> bool:
        """Whether gradients are used or moved during the backward pass, and are not there after it."""
        return self.in_backward or self.offload == "state_and_gradients"

    @property
    def copies_weights(self) -> bool:
        """Whether the optimizer's own copy of the weights counts, not what is written into the model."""
        return self.name == "schedule_free_adamw" or self.offload != "none"

    def __post_init__(self) -> None:
        if self.stochastic_rounding and self.name not in ("adamw8bit", "adamw4bit", "adamw_fp8"):
            raise ConfigError(
                f"optim.stochastic_rounding: {self.name!r} has no such switch; "
                'set name = "stochastic_adamw" or one of torchao\'s, or leave it out'
            )
        if self.offload != "none" and self.name not in ("adamw", "sgd"):
            raise ConfigError(
                f"optim.offload: {self.offload!r} keeps float32 weights and moments on the CPU, where "
                f'{self.name!r} saves nothing; set name = "adamw" or "sgd", or offload = "none"'
            )
        if self.offload != "none" and self.in_backward:
            raise ConfigError(
                "optim.in_backward: an offloaded update runs on the CPU, after the backward pass; set "
                'in_backward = false with offload = "state_and_gradients", which also frees gradients at once'
            )
        if self.takes_gradients:
            self._check_gradients_are_not_needed()

    def _check_gradients_are_not_needed(self) -> None:
        """Refuse what needs all gradients of a step together."""
        key = "in_backward = true" if self.in_backward else f'offload = "{self.offload}"'
        otherwise = "in_backward = false" if self.in_backward else 'offload = "state"'
        if self.clip_norm:
            raise ConfigError(
                f"optim.clip_norm: {self.clip_norm} limits the norm of all gradients together, and with "
                f"{key} most are gone when it is known; set clip_norm = 0, or {otherwise}"
            )
        if self.accumulate > 1:
            raise ConfigError(
                f"optim.accumulate: {self.accumulate} micro-batches add up their gradients, and with {key} "
                f"each is gone after its own; set accumulate = 1 and raise data.batch_size, or {otherwise}"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """The learning rate as a function of the optimizer step."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up: a cosine or a line down to `final_ratio` at the last step; `wsd` (warm-up,
    stable, decay) stays at the peak and falls along a line over the last `decay_steps`; `constant` stays."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up; the first step already has a rate above zero."""
    decay_steps: NonNegativeInt = 0
    """Optimizer steps of the fall of `wsd`."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step as a share of the peak."""

    def __post_init__(self) -> None:
        if self.kind == "wsd" and not self.decay_steps:
            raise ConfigError("schedule.decay_steps: 0 leaves wsd without its fall; set it to at least 1")
        if self.kind != "wsd" and self.decay_steps:
            raise ConfigError(
                f"schedule.decay_steps: {self.decay_steps} has no use with kind {self.kind!r}; "
                'set it to 0, or kind to "wsd"'
            )


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How the model is compiled, recomputed and sharded."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    compile: bool = False
    """Compile each block, and the loss, with `torch.compile`."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing: recompute every block, or every `selective_every`-th, in the backward
    pass."""
    selective_every: PositiveInt = 2
    """With `selective`, every how many blocks one is recomputed."""
    recompute_pointwise: bool = False
    """With `compile`, recompute in the backward pass what costs no matrix product: norms, activation
    functions, casts. Otherwise the compiler keeps their results wherever the backward pass multiplies them.
    A Llama with LoRA on all linear layers keeps 95 instead of 136 KB a token and block of width 4096."""
    recompute_in_graph: bool = False
    """With `compile` and `checkpointing`, let the compiler recompute inside a block's graph, which leaves out
    what no gradient needs, such as the last product; otherwise the compiled block runs a second time. 7 to
    13% faster on an H100. The backward pass fuses otherwise than the forward pass did, and so rounds some
    values elsewhere: gradients are as near to float32's as those of kept activations, not bit-equal."""
    cuda_graphs: bool = False
    """On one GPU, record the forward and backward pass of each shape of micro-batches as a CUDA graph, at the
    third of them, and replay it: the GPU no longer waits for Python, which takes longer than the kernels
    where these are many and small. The memory of the passes stays reserved, gradients too, which otherwise
    live from the backward pass to the update."""
    reshard_after_forward: bool = True
    """FSDP2: free gathered parameters between forward and backward."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """FSDP2: type in which gradients are averaged over ranks."""

    def __post_init__(self) -> None:
        if self.recompute_in_graph and (not self.compile or self.checkpointing == "none"):
            raise ConfigError(
                "parallel.recompute_in_graph: true, which says how compiled blocks are checkpointed, but "
                f"compile is {str(self.compile).lower()} and checkpointing {self.checkpointing!r}; set both, "
                "or leave it out"
            )
        if self.cuda_graphs and self.checkpointing != "none" and not self.recompute_in_graph:
            raise ConfigError(
                f"parallel.cuda_graphs: true, but checkpointing {self.checkpointing!r} reads the state of "
                "random numbers, which cannot be recorded; set compile and recompute_in_graph to true, or "
                "cuda_graphs to false"
            )
        if self.recompute_pointwise and not self.compile:
            raise ConfigError(
                "parallel.recompute_pointwise: true, but it is the compiler that recomputes, and compile is "
                "false; set compile = true, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """When the whole state of a run is saved, and what it resumes from."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every: NonNegativeInt = 0
    """Optimizer steps between checkpoints; 0 saves at the end only."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    frozen: Literal["once", "rebuild"] = "once"
    """Where parameters are that a run cannot change, such as the base under adapters. `once`: in a file
    beside the checkpoints, one for all of them. `rebuild`: nowhere, since the run's model, seed and
    transforms give them again on the same kind of device; resuming and exporting compare what they give with
    fingerprints, and stop where a bit differs."""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint in `output` if there is one, `never` demands that there is
    none, and anything else is the path of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LogSection:
    """What is measured and where it is written."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    evaluate_every: NonNegativeInt = 0
    """Optimizer steps between evaluations on held-out data; 0 evaluates before the first and after the last
    only."""
    evaluate_batches: NonNegativeInt = 0
    """Most batches of one evaluation on each rank; 0 reads all held-out data."""
    progress: bool = True
    """Show a progress bar, or a line from time to time where the output is not a terminal."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides `metrics.jsonl`; several at once are fine."""
    wandb_project: str = "qrecipes"
    """Project of Weights & Biases."""
    peak_tflops: PositiveFloat | None = None
    """Peak bf16 rate of the device for the model FLOPs utilization (MFU), where the device is not in the
    table."""


@dataclass(frozen=True, kw_only=True)
class ExportSection:
    """What is written after the last step."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    at_end: bool = False
    """Export the finished model into `output/export`, as `qrecipes export` does."""
    huggingface: bool = True
    """Also write a Hugging Face folder where the weights came from one."""
    peft: bool = False
    """Also write the adapters as peft reads them, into `output/export/peft`."""
    check_merge: bool = True
    """Refuse to export where merging costs more than the method's bounds allow."""


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """How `qrecipes generate` computes with the run's model, and with its export."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kv_bits: Annotated[int, Field(ge=2, le=8)] | Literal["model"] | None = None
    """Bits of the key-value cache: 2 to 8, or `model`, those that the model quantizes its keys and values to;
    left out, it keeps the type that they have. `--kv-bits` wins."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run; a TOML file holds exactly these keys."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    steps: NonNegativeInt
    """Optimizer steps. 0 only judges, saves and exports what the transforms make of the model."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, of the data's order and of stochastic rounding."""
    output: str = "runs/default"
    """Folder for run.toml, metrics.jsonl, receipt.json, checkpoints and exports."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses a GPU where there is one."""
    model: ModelSection
    """The model."""
    task: TaskSection = field(default_factory=TaskSection)
    """Loss and metrics."""
    tokenizer: TokenizerSection | None = None
    """Tokenizer of text data."""
    data: DataSection
    """Training and held-out data."""
    optim: OptimSection = field(default_factory=OptimSection)
    """Optimizer."""
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    """Learning rate."""
    parallel: ParallelSection = field(default_factory=ParallelSection)
    """Compilation, checkpointing, sharding."""
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    """Saving and resuming."""
    log: LogSection = field(default_factory=LogSection)
    """Measuring."""
    export: ExportSection = field(default_factory=ExportSection)
    """Export after the last step."""
    generation: GenerationSection = field(default_factory=GenerationSection)
    """Text from the finished model."""
    transform: tuple[TransformConfig, ...] = ()
    """Low-precision methods, applied in order; each `[[transform]]` table's `name` says which."""
