"""The probe: proof, on real activations, that swapped layers do what their method says.

Before a swap, one forward and backward pass of the model records a few rows of every chosen layer's input and
output gradient, and what the original layer makes of them. After the swap each new layer is given the same
rows. A product that the method changes must differ from the original's and stay within the method's bound.
Where a layer has parameters that its method trains, a gradient must reach one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from qrecipes.errors import ProbeError
from qrecipes.quant.primitives import sqnr_db
from qrecipes.transforms.base import Bounds

ROWS = 128
"""Rows of input (tokens) recorded for each layer, evenly spaced over the batch."""
LEAST_ROWS = 16
"""Fewer rows than this (a pooled head sees one an image) are repeated at other sizes."""
WEIGHT_ROWS = 128
"""Rows of the weight's gradient that are compared, evenly spaced; the whole gradient of every layer would be
as large as the model."""

Loss = Callable[[nn.Module], Tensor]
T = TypeVar("T")


class Products(NamedTuple):
    """The three products of a linear layer on the recorded rows; the last holds some rows of the weight's
    gradient."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor | None


@dataclass
class Recording:
    """Rows that passed through one layer, and what the original layer made of them; held on the CPU."""

    x: Tensor
    grad_output: Tensor
    products: Products


def record(model: nn.Module, sites: dict[str, nn.Module], loss: Loss) -> dict[str, Recording]:
    """Run `loss(model)` forward and backward once and record every site that took part.

    Parameters get no gradients, and the random state is put back. Sites that the loss does not reach are
    absent from the result.
    """
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # batch norm counts what it sees
    hooks = [
        site.register_forward_hook(_recorder(fqn, rows), with_kwargs=True) for fqn, site in sites.items()
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            for parameter in trained:
                parameter.requires_grad_(False)  # the recorders start the graph at the first layer's output
            found = loss(model)
            if found.requires_grad:  # else no site was called
                found.backward()
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {
        fqn: Recording(x.cpu(), grad.cpu(), _to_cpu(layer_products(sites[fqn], x, grad)))
        for fqn, (x, grad) in rows.items()
    }


def undisturbed(model: nn.Module, run: Callable[[], T]) -> T:
    """What `run()`, which computes with the model, returns; without gradients, and with the model's buffers
    and the random state put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            return run()
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def judge(
    fqn: str, method: str, found_db: Mapping[str, float], bounds: Bounds
) -> tuple[dict[str, float], list[str]]:
    """What may be reported of SQNRs by product, inf being no change, and what is wrong with them."""
    sqnr, faults = {}, []
    for product, db in found_db.items():
        floor = getattr(bounds, product)
        if db == math.inf:
            if not bounds.may_equal:
                faults.append(f"{fqn}: {product} is bit-equal to the original: {method} is not on")
        elif floor is not None and (math.isnan(db) or db < floor):
            faults.append(
                f"{fqn}: {product} has an SQNR of {db:.1f} dB; {method} allows no less than {floor:.1f} dB"
            )
        else:
            sqnr[product] = round(db, 2)
    return sqnr, faults


def _recorder(
    fqn: str, rows: dict[str, tuple[Tensor, Tensor]]
) -> Callable[[nn.Module, tuple, dict, Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        # a copy, so that what follows may work in place
        output = output.clone()
        x = _some_rows(_matrix(args[0] if args else kwargs["input"]), ROWS)

        def keep(grad: Tensor) -> None:
            grad_rows = _some_rows(_matrix(grad), ROWS)
            if not grad_rows.any():  # behind a zero-initialized layer nothing could differ
                grad_rows = torch.randn_like(grad_rows)
            rows[fqn] = _at_least_rows(x, LEAST_ROWS), _at_least_rows(grad_rows, LEAST_ROWS)

        output.register_hook(keep)
        return output

    return hook


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _at_least_rows(matrix: Tensor, least: int) -> Tensor:
    """The matrix, followed by its rows at other sizes where they are few: a scale over one value is exact."""
    if matrix.shape[0] >= least:
        return matrix
    sizes = torch.linspace(0.3, 1.7, -(-least // matrix.shape[0]), device=matrix.device, dtype=matrix.dtype)
    return torch.cat([matrix, *(matrix * size for size in sizes)])


def _some_rows(matrix: Tensor, most: int) -> Tensor:
    if matrix.shape[0] <= most:
        return matrix.clone()
    chosen = torch.linspace(0, matrix.shape[0] - 1, most, device=matrix.device).long()
    return matrix[chosen]


def layer_products(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Products:
    """What `layer` makes of rows x [M, K] and grad_output [M, N]; the weight's part only where `layer.weight`
    trains. A gradient that does not arrive is zero."""
    x = x.detach().requires_grad_(True)
    weight = getattr(layer, "weight", None)
    wanted: list[Tensor] = [x]
    if isinstance(weight, nn.Parameter) and weight.requires_grad:
        wanted.append(weight)
    with torch.enable_grad():
        output = layer(x)
        grads = torch.autograd.grad(output, wanted, grad_output, allow_unused=True)
    found = [
        torch.zeros(t.shape, dtype=t.dtype, device=t.device) if grad is None else grad.detach()
        for t, grad in zip(wanted, grads, strict=True)
    ]
    grad_weight = _some_rows(found[1], WEIGHT_ROWS) if len(found) > 1 else None
    return Products(output.detach(), found[0], grad_weight)


def _reached(layer: nn.Module, own: list[str], x: Tensor, grad_output: Tensor) -> bool:
    """Whether a gradient other than zero reaches one of the layer's parameters named in `own`."""
    if not own:
        return False
    named = dict(layer.named_parameters())
    with torch.enable_grad():
        output = layer(x.detach().requires_grad_(True))
        grads = torch.autograd.grad(output, [named[n] for n in own], grad_output, allow_unused=True)
    return any(grad is not None and bool(grad.any()) for grad in grads)


def _to_cpu(products: Products) -> Products:
    return Products(*(None if t is None else t.cpu() for t in products))  # type: ignore[arg-type]


def compare(
    fqn: str,
    method: str,
    layer: nn.Module,
    bounds: Bounds,
    recording: Recording,
    owned: Collection[int] = (),
    device: torch.device | None = None,
) -> tuple[dict[str, float], list[str]]:
    """SQNR in dB of each product the method changes, and what is wrong with them.

    `owned` are the ids of the parameters that the method trains. The layer is moved to `device` meanwhile, so
    that a model built on the CPU is probed with the kernels it will train with.
    """
    own = [name for name, p in layer.named_parameters() if id(p) in owned]
    home = next((t.device for t in [*layer.parameters(), *layer.buffers()]), torch.device("cpu"))
    device = device or home
    layer.to(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        rows = recording.x.to(device), recording.grad_output.to(device)
        found = _to_cpu(layer_products(layer, *rows))
        reached = _reached(layer, own, *rows)
    layer.to(home)
    sqnr, faults = {}, []
    if own and not reached:
        faults.append(f"{fqn}: no gradient reaches {', '.join(own)}: {method} is not on")
    for product in Products._fields:
        floor = getattr(bounds, product)
        if floor is None:
            continue
        ours, original = getattr(found, product), getattr(recording.products, product)
        if ours is None or original is None:
            faults.append(f"{fqn}: {method} promises a {product}, but the layer's weight gets no gradient")
            continue
        db = sqnr_db(original, ours)
        if not (original.any() or ours.any()):
            continue  # a zero-initialized weight: nothing could differ
        if torch.equal(ours, original):
            if bounds.may_equal:
                continue
            faults.append(f"{fqn}: {product} is bit-equal to the original layer's: {method} is not on")
        elif math.isnan(db) or db < floor:
            faults.append(
                f"{fqn}: {product} has an SQNR of {db:.1f} dB; {method} allows no less than {floor:.1f} dB"
            )
        else:
            sqnr[product] = round(db, 2)
    return sqnr, faults


def raise_faults(faults: list[str], most: int = 5) -> None:
    """Raise ProbeError with the first few of `faults`, if there are any."""
    if not faults:
        return
    shown = "\n  ".join(faults[:most])
    more = f"\n  and {len(faults) - most} more" if len(faults) > most else ""
    raise ProbeError(
        f"the probe refused {len(faults)} products of swapped layers:\n  {shown}{more}\n"
        "a layer whose inputs are too spread for the method can be left out with `skip`"
    )
