"""Give a whole model's batch normalization domains, and add one, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from batchnorm.domains import DomainBatchNorm
from batchnorm.surgery.adopt import obstacle, settle
from batchnorm.surgery.convert import Converted
from batchnorm.surgery.fused import Absorbed, Rewritten
from batchnorm.surgery.inspect.find import is_batch_norm, is_uninitialized, settle_lazy

__all__ = ["add_domain", "split_domains"]


def split_domains(model: nn.Module, domains: Iterable[str | int], *, shared_affine: bool = False) -> Converted:
    """Make every batch normalization layer of a model, torch.nn's or ours, a ``DomainBatchNorm``, in place.

    Every domain starts from the layer's statistics, weight and bias. The objects stay and change their class, with
    hooks and sharing; the first domain keeps the parameters and buffers. The others' parameters are new: make the
    optimizer afterwards.

    Args:
        model: any module; it may be a batch normalization layer itself.
        domains: the names, as ``DomainBatchNorm`` takes them.
        shared_affine: one weight and one bias for all domains.

    Returns:
        What was converted, and what was skipped, and why.

    Raises:
        ValueError: unusable names; a model that ``fuse`` has changed. Nothing has changed then.

    Example:
        >>> print(batchnorm.split_domains(model, ("source", "target")))
        >>> with batchnorm.domain("target"):
        ...     y = model(x)

    Source: Chang et al. 2019, arXiv 1906.03950.
    """
    domains = list(domains)
    DomainBatchNorm(1, domains)  # which looks at the names
    if any(isinstance(module, (Absorbed, Rewritten)) for module in model.modules()):
        raise ValueError("the model is fused, which is done for one layer at each place: batchnorm.revert(model) first")
    settle_lazy(model)
    whole = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    parts = {part for module in whole for part in module.children()}
    converted, skipped = {}, {}
    for name, module in list(model.named_modules()):
        if module in whole:
            skipped[name] = "it has domains already: add_domain"
        elif is_batch_norm(module) and module not in parts:
            reason = _obstacle(module)
            if reason is None:
                _split(module, domains, shared_affine)
                converted[name] = "DomainBatchNorm"
            else:
                skipped[name] = reason
    return Converted(converted, skipped)


def add_domain(model: nn.Module, name: str | int, like: str | int) -> list[str]:
    """Add a domain to every ``DomainBatchNorm`` of a model, starting as a copy of another one.

    An optimizer must be told of the new parameters.

    Returns:
        The names of the layers.

    Raises:
        ValueError: no such layers, one that has the domain already, or one that lacks ``like``. Nothing has changed
            then.

    Example:
        >>> batchnorm.add_domain(model, "hospital c", like="hospital a")
    """
    layers = {key: module for key, module in model.named_modules() if isinstance(module, DomainBatchNorm)}
    if not layers:
        raise ValueError("the model has no DomainBatchNorm: split_domains(model, domains) makes its layers that")
    for key, layer in layers.items():
        if str(name) in layer.domains or str(like) not in layer.domains:
            raise ValueError(
                f"cannot add {name!r} like {like!r} to layer {key!r}, which has the domains {layer.domains}"
            )
    for layer in layers.values():
        layer.add_domain(name, like)
    return list(layers)


def _obstacle(layer: Any) -> str | None:
    """Why a layer cannot get domains; None if it can."""
    reason = obstacle(layer)
    if reason is not None:
        return reason
    if is_uninitialized(layer):
        return "it does not know its number of channels yet: run the model once"
    if not {"weight", "bias"} <= layer._parameters.keys():
        return "its weight is pruned"
    return None


def _split(layer: nn.Module, domains: list[str | int], shared_affine: bool) -> None:
    settle(layer)
    made = vars(DomainBatchNorm.from_layer(layer, domains, shared_affine=shared_affine))
    for key, value in vars(layer).items():
        if "hook" in key and isinstance(value, dict):  # the handles, by which hooks are removed, know these very dicts
            value.update(made[key])
            made[key] = value
        elif "hook" in key:
            made[key] = value
    layer.__class__ = DomainBatchNorm
    vars(layer).clear()
    vars(layer).update(made)
