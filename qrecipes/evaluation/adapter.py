"""A model in memory as a model of lm-eval; needs the extra `eval`.

Contexts and continuations become tokens as in lm-eval's own class for transformers (`HFLM`), so that scores
agree: both together are encoded and split where the context's own tokens end, spaces at the context's end
belong to the continuation, and what exceeds the model is cut off on the left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from qrecipes.data.beginnings import begins_with_bos, empty_context_token
from qrecipes.data.markup import Markup
from qrecipes.data.templates import Template
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import ConfigError, DataError
from qrecipes.evaluation.scoring import check_tokens, max_length, require_decoder, score_targets
from qrecipes.generation import Generator, Sampling
from qrecipes.models.modes import evaluation_mode

Request = tuple[Any, list[int], list[int]]
"""What lm-eval calls it, tokens of the context, tokens of the continuation."""
Row = tuple[int, ...]

MAX_GENERATED = 256
"""Tokens that a generation task adds where it names no number, as in HFLM."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_IGNORED = ("do_sample", "until", *_LENGTHS)


class DecoderLM(TemplateLM):
    """A torchtune decoder, quantized ones included, and its tokenizer, for `lm_eval.simple_evaluate`.

    `bos` says whether texts begin with the beginning-of-text token; None means as transformers would have it.
    `template` is the chat template that conversations are written with, where a task asks for it.
    `left_truncated` counts requests that were longer than the model takes.

    Raises:
        ConfigError: if the model is no torchtune decoder, or the tokenizer has neither beginning nor end.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        longest: int | None = None,
        bos: bool | None = None,
        template: Template | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._vocabulary = require_decoder(model)
        self._device = next(model.parameters()).device  # type: ignore[assignment]
        self.batch_size = batch_size
        self.max_length = longest or max_length(model) or 2048
        self._begins = begins_with_bos(tokenizer) if bos is None else bos
        self._template = template
        self._seed = seed
        self._progress = progress
        self.left_truncated = 0
        prefix = empty_context_token(tokenizer)
        if prefix is None:
            raise ConfigError(
                "tokenizer: has neither a beginning-of-text nor an end-of-text token, and tasks need one "
                "before a text; name its eos_token in tokenizer_config.json"
            )
        self._prefix = prefix
        self._spelled_prefix = next(
            (text for text, number in tokenizer.special_tokens.items() if number == prefix), None
        )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or else the one that begins it."""
        return self._prefix if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing comes before."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; None puts the beginning before it where texts of this model have it."""
        spelled = self._spelled_prefix is not None and string.startswith(self._spelled_prefix)
        begins = self._begins and not spelled if add_special_tokens is None else add_special_tokens
        ids = self._encode(string)
        return [self._prefix, *ids] if begins else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not self._progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's length that predict each token
        once."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it.

        Requests that differ in their last token alone, such as the letters of a multiple choice, share a row.
        """
        shared: dict[Row, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            shared[self._row(request)].append(index)
        rows = sorted(shared, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        bar = tqdm(
            total=len(requests),
            desc="log-likelihood",
            disable=disable_tqdm or not self._progress,
            leave=False,
        )
        for first in range(0, len(rows), self.batch_size):
            batch = rows[first : first + self.batch_size]
            members = [(row, index) for row, tokens in enumerate(batch) for index in shared[tokens]]
            continuations = [requests[index][2] for _, index in members]
            scores = self._score(batch, [row for row, _ in members], continuations)
            found.update(zip((index for _, index in members), scores, strict=True))
            bar.update(len(members))
        bar.close()
        return [found[index] for index in range(len(requests))]

    def _row(self, request: Request) -> Row:
        """What the model is given: context and continuation without its last token, cut on the left."""
        text, context, continuation = request
        if not continuation:
            raise DataError(
                f"task: the continuation {text[1]!r} adds no token to what is before it, so it has no "
                "probability; change the task's choices or its target_delimiter"
            )
        if len(continuation) > self.max_length:
            raise DataError(
                f"task: a continuation of {len(continuation)} tokens is longer than the {self.max_length} "
                "that the model takes; leave the task out"
            )
        whole = context + continuation
        self.left_truncated += len(whole) > self.max_length + 1
        return tuple(whole[-(self.max_length + 1) : -1])

    def _score(
        self, batch: list[Row], rows: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Scores of each continuation, which ends one token after its row."""
        inputs = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        for row, tokens in enumerate(batch):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
        places = [
            (row, column)
            for row, tokens in zip(rows, continuations, strict=True)
            for column in range(len(batch[row]) - len(tokens), len(batch[row]))
        ]
        flat = [token for tokens in continuations for token in tokens]
        where = torch.tensor(places).T
        given = (inputs, where[0], where[1], torch.tensor(flat))
        with evaluation_mode(self._model):
            logprobs, likeliest = score_targets(self._model, *(t.to(self._device) for t in given))
        lengths = [len(tokens) for tokens in continuations]
        return [
            (float(logprob.sum()), bool(greedy.all()))
            for logprob, greedy in zip(
                logprobs.double().cpu().split(lengths), likeliest.cpu().split(lengths), strict=True
            )
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is added to each context, up to a stop string, the end of the text or the task's length."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(index)
        bar = tqdm(
            total=len(requests), desc="generation", disable=disable_tqdm or not self._progress, leave=False
        )
        texts: dict[int, str] = {}
        for members in groups.values():
            options = requests[members[0]].args[1]
            sampling = self._sampling(options)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise ConfigError(
                    f"task: generates {sampling.max_tokens} tokens, and the model takes {self.max_length} in "
                    "all; lower the task's max_gen_toks"
                )
            prompts = [self._prompt(requests[index].args[0], room) for index in members]
            generator = Generator(
                self._model,
                self._tokenizer,
                max_length=self.max_length,
                batch_size=self.batch_size,
                # on a GPU decoding is bound by launches, and many prompts make up for the compiling
                compile=self._device.type == "cuda" and len(prompts) > self.batch_size,
            )
            pieces = generator.stream(
                prompts, sampling, stop=_stop_strings(options), stop_tokens=self._stop_tokens()
            )
            for piece in pieces:
                if piece.generation is not None:
                    texts[members[piece.index]] = piece.generation.text
                    bar.update()
        bar.close()
        return [texts[index] for index in range(len(requests))]

    def _prompt(self, context: str, room: int) -> list[int]:
        ids = self.tok_encode(context) or [self._prefix]
        self.left_truncated += len(ids) > room
        return ids[-room:]

    def _stop_tokens(self) -> list[int]:
        return list(dict.fromkeys([self.eot_token_id, *self._tokenizer.end_ids]))

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """A task's generation_kwargs; greedy unless it samples at a temperature above 0, as in HFLM."""
        known = {"temperature", "top_k", "top_p", *_IGNORED}
        strange = sorted(set(options) - known)
        if strange:
            raise ConfigError(
                f"task: generation_kwargs.{strange[0]}: is not supported; it takes {', '.join(sorted(known))}"
            )
        length = next((options[name] for name in _LENGTHS if options.get(name) is not None), MAX_GENERATED)
        temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
        greedy = options.get("do_sample") is False or temperature == 0.0
        return Sampling(
            max_tokens=int(length),
            temperature=0.0 if greedy else temperature,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
            seed=self._seed,
        )

    def _encode(self, string: str) -> list[int]:
        """Tokens of a text; of a conversation, the special tokens that the template wrote among them."""
        if self._template is None:
            ids = self._tokenizer.encode(string)
        else:
            ids = self._tokenizer.encode_markup([Markup(string)])[0].ids
        check_tokens(ids, self._vocabulary)
        return ids

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells its caches of requests apart by."""
        return f"{type(self._tokenizer).__name__}-{self._tokenizer.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template; None where there is none or it is not asked for."""
        return self._template.source if self._template is not None and chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the template writes it."""
        assert self._template is not None, "lm-eval applies a template only where evaluate_tasks gave one"
        messages: list[Any] = list(chat_history)
        return self._template.render(messages, add_generation_prompt=add_generation_prompt).text


def _stop_strings(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]
