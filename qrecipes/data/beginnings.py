"""How texts begin for a tokenizer: what transformers puts before each, and what stands for an empty one.

Scores agree with those of lm-eval on transformers only where texts begin alike.
"""

from __future__ import annotations

from qrecipes.data.tokenizers import HFTokenizer, Tokenizer


def empty_context_token(tokenizer: Tokenizer) -> int | None:
    """The token before a text that nothing comes before: the beginning of a text, or else the end of one."""
    if tokenizer.bos_id is not None:
        return tokenizer.bos_id
    # a tokenizer may have the token and put it before no text
    named = tokenizer.special_tokens.get(tokenizer.template_names.get("bos_token", ""))
    return tokenizer.eos_id if named is None else named


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers puts the beginning-of-text token before each text.

    A tokenizer.json says so by its post-processor, which transformers 5 follows whatever `add_bos_token` in
    tokenizer_config.json says. Tokenizers of other kinds do if they have the token.
    """
    if not isinstance(tokenizer, HFTokenizer):
        return tokenizer.bos_id is not None
    return tokenizer.first_id is not None and tokenizer.first_id == empty_context_token(tokenizer)
