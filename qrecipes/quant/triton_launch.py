"""Launches of Triton kernels in a third of the time of `kernel[grid](...)`; imported only where Triton is.

Triton binds the arguments of every launch anew to find the compiled kernel: 25 to 35 microseconds, and a
training step of a deep model makes a thousand launches. Here what was compiled for the same numbers and types
of tensors is kept, and launched by itself.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from torch import Tensor
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

KEPT = 4096
"""Sets of arguments whose kernels a `Launcher` remembers; then it starts over. Shapes are arguments."""
TRIED_VERSIONS = ((3, 6), (3, 7), (3, 8))
"""Versions of Triton whose compiled kernels are known to be launched this way; others bind every time."""
_FAST = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) in TRIED_VERSIONS


class Launcher:
    """A Triton function with fixed constants and options.

    `constants` are its `tl.constexpr` parameters, which come last.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self.kernel, self.named = kernel, constants | options
        names = getattr(kernel, "arg_names", constants)
        self.constants = tuple(constants[name] for name in names if name in constants)
        self._compiled: dict[tuple[object, ...], CompiledKernel] = {}
        self._binds = not (_FAST and isinstance(kernel, JITFunction))  # or the interpreter's

    def __call__(self, grid: int | tuple[int, ...], *arguments: Any) -> None:
        """Launch on the current device and stream: tensors, tensor descriptors, numbers or None.

        A descriptor's blocks are those that the constants say, of the type that the kernel is for.
        """
        programs = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        hooks = knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls
        if self._binds or hooks:
            self.kernel[programs](*arguments, **self.named)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = (device, *map(_trait, arguments))
        compiled = self._compiled.get(key)
        if compiled is None:
            if len(self._compiled) >= KEPT:
                self._compiled.clear()
            self._compiled[key] = self.kernel[programs](*arguments, **self.named)
            return
        compiled.run(
            *programs,
            driver.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,  # metadata for hooks, of which there are none
            None,
            None,
            *arguments,
            *self.constants,
        )


class Launchers:
    """The launchers of one Triton function, by their constants and options."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._made: dict[tuple[Any, ...], Launcher] = {}

    def __call__(self, constants: dict[str, Any], **options: Any) -> Launcher:
        """The launcher for them; the order of the names must not differ between calls."""
        key = (*constants.values(), *options.values())
        launcher = self._made.get(key)
        if launcher is None:
            launcher = self._made[key] = Launcher(self.kernel, constants, **options)
        return launcher


def _trait(argument: Any) -> object:
    """All that Triton may specialize a kernel for."""
    if type(argument) is int or argument is None:
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if type(argument) is float:
        return float  # is never specialized for
    return TensorDescriptor
