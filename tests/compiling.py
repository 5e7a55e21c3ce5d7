"""Triton kernels compiled without a device, as a launch specializes them for aligned arguments."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs the triton package, for its compiler"
)
SHARED_BYTES = {"H100": 232_448, "A100": 166_912, "RTX 4090": 101_376}
"""Shared memory that a block can have."""


def compiled(
    kernel: Any, capability: int, types: Mapping[str, str], constants: Mapping[str, Any], **options: Any
) -> Any:
    """What Triton makes of a kernel for CUDA devices of `capability`, such as 80.

    `types` are those of the arguments, such as "*bf16" or "i32". Pointers and i32 are multiples of 16, where
    "i32 any" does not say otherwise. Arguments in `constants` are constants, None included; names that the
    kernel does not have are ignored.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    signature = {
        name: "constexpr" if name in constants else types[name].removesuffix(" any") for name in names
    }
    aligned = [name for name in names if signature[name] == types.get(name) and types[name][0] in "*i"]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
