"""Which vocabulary a tokenizer has, told by what it does, so that a copy that another program saved is the
same.

Files of equal tokenizers differ in spelling, order and unrelated settings; a run must not be refused for
those, nor train on tokens of another vocabulary because the file's name is right.
"""

from __future__ import annotations

import hashlib
from typing import Any

from qrecipes.data.tokenizers import Tokenizer

PROBE = (
    "The cat's 1234567 mice, they'd said; DON'T   stop!\n\n\tdef f(x):\n        return x ** 2  # naïve\r\n"
    " Ça va? Привет, мир. 你好世界 ¡señor! ½ ² ﬁ 🙂🏽 \u200b\u00a0end<|endoftext|></s><s>"
)
"""Text whose tokens tell apart splitting rules (digits, contractions, runs of blanks), normalization, and the
treatment of characters that spell special tokens."""


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256, in hexadecimal, of the text of every token number and of the tokens of PROBE.

    Takes some microseconds a token number. What begins and ends a document has no part in it.
    """
    digest = hashlib.sha256(f"{tokenizer.vocab_size}\n".encode())
    for number in range(tokenizer.vocab_size):
        text = tokenizer.decode([number]).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(4, "little"))
        digest.update(text)
    digest.update(",".join(map(str, tokenizer.encode(PROBE))).encode())
    return digest.hexdigest()


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What an index says of the tokenizer that made its shards: files by name and SHA-256, numbers, and the
    fingerprint."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizer.files}
    return {
        "files": files,
        "fingerprint": fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }
