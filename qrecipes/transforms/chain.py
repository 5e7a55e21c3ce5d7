"""Many transforms as one, and what only their sum can tell: disjoint parameters, what is frozen, the
receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from qrecipes.errors import ConfigError
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms import probe
from qrecipes.transforms.base import (
    Adapter,
    LinearTransform,
    MergeBounds,
    ParamGroup,
    StepContext,
    Transform,
    TransformConfig,
    named_linears,
    parameter_bytes,
    transform_for,
)
from qrecipes.transforms.receipt import LayerReceipt, Receipt

if TYPE_CHECKING:
    from qrecipes.config.run import Run


class Chain:
    """Transforms applied in order, with the verbs of one Transform.

    >>> chain = Chain.from_configs([Int8MixedPrecisionConfig()])
    >>> model = chain.swap(model)
    >>> print(chain.receipt.summary())
    >>> model = chain.finalize(model)
    """

    def __init__(self, transforms: Sequence[Transform] = ()) -> None:
        self.transforms = tuple(transforms)
        self._receipt: Receipt | None = None

    @classmethod
    def from_configs(cls, configs: Sequence[TransformConfig]) -> Chain:
        """The chain of the registered transforms that `configs` configure.

        Raises:
            ConfigError: if a configuration belongs to no registered transform.
        """
        import qrecipes.transforms  # noqa: F401 - registers every method

        return cls([transform_for(config) for config in configs])

    @property
    def receipt(self) -> Receipt:
        """What `swap` did to every linear layer.

        Raises:
            ConfigError: before `swap`.
        """
        if self._receipt is None:
            raise ConfigError("chain.receipt: there is none before chain.swap(model)")
        return self._receipt

    @property
    def freezes_rest(self) -> bool:
        """Whether parameters that no transform owns stop training: so if any transform says so."""
        return any(transform.freezes_rest for transform in self.transforms)

    def check(self, run: Run) -> None:
        """Raise ConfigError where the run contradicts a transform."""
        for transform in self.transforms:
            transform.check(run)

    def check_device(self, device: torch.device) -> None:
        """Raise ConfigError where a transform cannot train on `device`."""
        for transform in self.transforms:
            transform.check_device(device)

    def swap(
        self, model: nn.Module, *, loss: probe.Loss | None = None, device: torch.device | None = None
    ) -> nn.Module:
        """Apply every transform, and probe the result where `loss` is given.

        The model is changed in place where possible; use the returned one. `loss(model)` is one forward pass
        over real data, before and after which the layers are compared, on `device` or where the model is.

        Raises:
            ConfigError: if a transform selects no layer.
            ProbeError: if a swapped layer is bit-equal to the original or beyond its method's bounds.
        """
        rows = [_untouched(fqn, linear) for fqn, linear in named_linears(model)]
        by_name = {row.fqn: row for row in rows}
        faults: list[str] = []
        changed: dict[Transform, set[str]] = {}
        for transform in self.transforms:
            sites = list(transform.sites(model))  # names: no layer lives longer than it is needed
            if not sites:
                raise ConfigError(self._selected_nothing(transform, model))
            if transform.compares_layers:
                model, found = self._swap_layers(transform, model, sites, by_name, loss, device)
            else:
                model, added, found = self._swap_tensors(transform, model, sites, loss)
                rows += added
            faults += found
            changed[transform] = set(sites) & set(transform.layers(model))
        self._check_kept(model, changed)
        self._explain(rows, model)
        self._receipt = Receipt(rows)
        probe.raise_faults(faults)
        self._freeze(model)
        return model

    @staticmethod
    def _swap_layers(
        transform: Transform,
        model: nn.Module,
        sites: Sequence[str],
        rows: Mapping[str, LayerReceipt],
        loss: probe.Loss | None,
        device: torch.device | None,
    ) -> tuple[nn.Module, list[str]]:
        """The model with a transform's layers, each compared with the one before it; and what is wrong."""
        there = {fqn: model.get_submodule(fqn) for fqn in sites}
        recordings = probe.record(model, there, loss) if loss is not None else {}
        partly = {fqn: transform.reason_in_part(fqn, site) for fqn, site in there.items()}
        low_bit = {fqn for fqn, site in there.items() if isinstance(site, QuantLinear)}
        there.clear()
        model = transform.swap(model)
        swapped = transform.layers(model)
        owned = {id(p) for group in transform.param_groups(model) for p in group.params}
        faults = []
        for fqn in sites:
            layer, row = swapped.get(fqn), rows.get(fqn)
            if layer is None:
                faults.append(f"{fqn}: selected by {transform.name}, but not replaced")
                continue
            if row is not None:
                row.method, row.bytes_after = transform.name, parameter_bytes(layer)
                row.partly = partly[fqn]
            if fqn in recordings:
                allowed = transform.layer_bounds(layer)
                if fqn in low_bit:  # it keeps its integers, and so may keep its products
                    allowed = replace(allowed, may_equal=True)
                sqnr, found = probe.compare(
                    fqn, transform.name, layer, allowed, recordings[fqn], owned, device
                )
                faults += found
                if row is not None:
                    row.sqnr_db = sqnr
            elif loss is not None:
                faults.append(
                    f"{fqn}: {transform.name} replaced it, but its forward was not called, or got no "
                    "gradient; a model that reads the layer's weight itself needs it in `skip`"
                )
        return model, faults

    @staticmethod
    def _swap_tensors(
        transform: Transform, model: nn.Module, sites: Sequence[str], loss: probe.Loss | None
    ) -> tuple[nn.Module, list[LayerReceipt], list[str]]:
        """The model with a transform that compares no layers; rows of the receipt, and what is wrong."""
        model = transform.swap(model)
        swapped = transform.layers(model)
        measured: dict[str, float] = {}
        if loss is not None:
            measured = probe.undisturbed(model, lambda: transform.measure(model, lambda: loss(model)))
        bounds = transform.bounds()
        rows, faults = [], []
        for fqn in sites:
            rows.append(LayerReceipt(fqn, (), transform.name, None, 0, 0))
            if fqn not in swapped:
                faults.append(f"{fqn}: selected by {transform.name}, but not changed")
            elif loss is None:
                continue
            elif fqn not in measured:
                faults.append(f"{fqn}: was not computed: {transform.name} is not on")
            else:
                rows[-1].sqnr_db, found = probe.judge(fqn, transform.name, {"output": measured[fqn]}, bounds)
                faults += found
        return model, rows, faults

    @staticmethod
    def _check_kept(model: nn.Module, changed: Mapping[Transform, set[str]]) -> None:
        """Raise ConfigError where a transform undid what one before it had changed."""
        for transform, names in changed.items():
            lost = sorted(names - set(transform.layers(model)))
            if lost:
                raise ConfigError(
                    f"transform {transform.name}: a later transform replaced {', '.join(lost[:3])}"
                    f"{', ...' if len(lost) > 3 else ''}, and with it what {transform.name} had changed; put "
                    f"{transform.name} after it"
                )

    @staticmethod
    def _selected_nothing(transform: Transform, model: nn.Module) -> str:
        config = transform.config
        linears = list(named_linears(model))
        some = [
            f"{fqn} ({transform.reason_to_leave(fqn, layer) or 'not free'})" for fqn, layer in linears[:3]
        ]
        listed = (": " + ", ".join(some) if some else "") + (", ..." if len(linears) > 3 else "")
        return (
            f"transform {transform.name}: targets {list(config.targets)} less skip {list(config.skip)} "
            "select no plain linear layer that is still free; a transform must change at least one; "
            f"the model has {len(linears)}{listed}; choose other targets, skip or settings, or remove the "
            "transform"
        )

    def _explain(self, rows: list[LayerReceipt], model: nn.Module) -> None:
        taken = {kind for t in self.transforms if isinstance(t, LinearTransform) for kind in t.kinds}
        for row in rows:
            if row.method is None:
                layer = model.get_submodule(row.fqn)
                if type(layer) not in taken | {nn.Linear}:
                    row.reason = f"{type(layer).__name__} is no plain nn.Linear"
                else:
                    reasons = [t.reason_to_leave(row.fqn, layer) for t in self.transforms]
                    row.reason = "; ".join(dict.fromkeys(r for r in reasons if r)) or "no transform"

    def _freeze(self, model: nn.Module) -> None:
        if not self.freezes_rest:
            return
        owned = {id(p) for group in self._owned(model) for p in group.params}
        for parameter in model.parameters():
            if id(parameter) not in owned:
                parameter.requires_grad_(False)

    def before_shard(self, model: nn.Module) -> None:
        """Tell every transform, in order, that FSDP2 will shard the model."""
        for transform in self.transforms:
            transform.before_shard(model)

    def _owned(self, model: nn.Module) -> list[ParamGroup]:
        return [group for transform in self.transforms for group in transform.param_groups(model)]

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        """Groups that partition the trainable parameters: the transforms' own, then `rest` where it trains.

        Call it after sharding, which replaces Parameter objects.

        Raises:
            ConfigError: if two groups share a parameter.
        """
        groups = self._owned(model)
        owners: dict[int, str] = {}
        for group in groups:
            for parameter in group.params:
                if id(parameter) in owners:
                    raise ConfigError(
                        f"parameter groups {owners[id(parameter)]!r} and {group.name!r} share a parameter; "
                        "every parameter belongs to one transform"
                    )
                owners[id(parameter)] = group.name
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in owners]
        if rest and not self.freezes_rest:
            groups.append(ParamGroup("rest", rest))
        return groups

    def constants(self, model: nn.Module) -> set[str]:
        """Names of the parameters that training cannot change: frozen ones that no transform writes."""
        written = {
            id(parameter)
            for transform in self.transforms
            if transform.writes_frozen
            for layer in transform.layers(model).values()
            for parameter in layer.parameters()
        }
        return {
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if not parameter.requires_grad and id(parameter) not in written
        }

    def before_step(self, ctx: StepContext) -> None:
        """Call every transform's hook, in order."""
        for transform in self.transforms:
            transform.before_step(ctx)

    def after_backward(self, ctx: StepContext) -> None:
        """Call every transform's hook, in order."""
        for transform in self.transforms:
            transform.after_backward(ctx)

    def merge_bounds(self) -> MergeBounds:
        """What an export holds `finalize` to: the sum over the transforms."""
        bounds = MergeBounds(0.0, 0.0, 0.0, 0.0)
        for transform in self.transforms:
            bounds = bounds.plus(transform.merge_bounds())
        return bounds

    def detach_adapters(self, model: nn.Module) -> dict[str, Adapter]:
        """Leave the frozen layers in the place of adapted ones, and give their adapters by name."""
        adapters: dict[str, Adapter] = {}
        for transform in self.transforms:
            adapters |= transform.detach_adapters(model)
        return adapters

    def load_adapters(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Overwrite the adapters of the model's layers.

        Raises:
            ConfigError: if one does not fit its layer, or a name is of no layer with an adapter.
        """
        taken = {name for transform in self.transforms for name in transform.load_adapters(model, adapters)}
        left = [name for name in adapters if name not in taken]
        if left:
            raise ConfigError(
                f"{len(left)} of {len(adapters)} adapters have no layer to go to: {', '.join(left[:3])}"
                f"{', ...' if len(left) > 3 else ''}; widen the transform's targets, or skip less"
            )

    @property
    def merge_differs(self) -> str | None:
        """What of `finalize` can depend on the kind of device that computes it; None where nothing does."""
        return "; ".join(t.merge_differs for t in self.transforms if t.merge_differs) or None

    def finalize(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        """Turn every swapped layer into `nn.Linear` or `QuantLinear`, last transform first; a second call is
        no-op. What layers become is computed on `device`, a layer at a time; None: where they are."""
        for transform in reversed(self.transforms):
            model = transform.finalize(model, device)
        return model


def _untouched(fqn: str, linear: nn.Linear | QuantLinear) -> LayerReceipt:
    size = parameter_bytes(linear)
    return LayerReceipt(fqn, (linear.out_features, linear.in_features), None, None, size, size)
