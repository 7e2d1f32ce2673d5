"""The batch normalization layers of a model: which are torch.nn's, which are ours, which are somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from batchnorm import any_rank, layers

__all__ = [
    "FROZEN", "NO_FORWARD", "NO_STATISTICS", "OURS", "TORCHS", "UNINITIALIZED", "hooked_between", "hooks_of",
    "is_batch_norm", "is_frozen", "is_known", "is_uninitialized", "kind_of", "names_of", "served", "settle_lazy",
]  # fmt: skip

_KINDS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d")
OURS: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, kind): getattr(layers, kind) for kind in _KINDS}
# Back again; with what `adopt` makes ours of other packages' classes, as it makes them.
TORCHS = {ours: torchs for torchs, ours in OURS.items()}
TORCHS[any_rank.SyncBatchNorm] = nn.SyncBatchNorm  # which is not among OURS: it becomes ours with a Sync policy alone

# Why a layer is left alone, whatever is to be done to it.
FROZEN = "it is frozen: call batchnorm.unfreeze(model) before"
NO_FORWARD = "its forward has been replaced"
NO_STATISTICS = "it has no running statistics: it normalizes with the batch's in evaluation, too"
UNINITIALIZED = "it has seen no input, and has no statistics yet: run the model once"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is batch normalization of any make, by its class, its own running statistics or its name."""
    if isinstance(module, torch.jit.ScriptModule):  # TorchScript hides what it computes
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return isinstance(module, nn.modules.batchnorm._BatchNorm)  # rather than instance normalization
    named = "BatchNorm" in type(module).__name__ and not module._modules  # not a block of more than that
    # A scripted module's class has no forward; a module without one only holds a graph's tensors.
    computes = getattr(type(module), "forward", None) is not nn.Module.forward
    return named or (computes and all(name in module._buffers for name in ("running_mean", "running_var")))


def is_known(kind: type[nn.Module]) -> bool:
    """Whether layers of this very class are ours or torch.nn's, whose forwards are known."""
    return kind in OURS or kind in TORCHS or kind is nn.SyncBatchNorm


def is_frozen(module: Any) -> bool:
    """Whether ``batchnorm.freeze`` holds a layer at its running statistics."""
    return "_frozen" in vars(module)


def kind_of(module: Any) -> type[nn.Module]:
    """A module's class; of a frozen layer the one that it was frozen from."""
    kind: type[nn.Module] = module._frozen.kind if is_frozen(module) else type(module)
    return kind


def is_uninitialized(module: nn.Module) -> bool:
    """Whether a lazy module has seen no input, so that a tensor of it has no size."""
    return any(is_lazy(t) for t in (*module.parameters(), *module.buffers()))


def settle_lazy(model: nn.Module) -> None:
    """Make lazy layers whose state was loaded what their first input would make of them, in place.

    Such a layer has all its tensors, but it says 0 channels, and its class changes in its next call.
    """
    for layer in model.modules():
        kind: Any = layer
        if not is_batch_norm(layer) or is_uninitialized(layer):
            continue
        if isinstance(layer, LazyModuleMixin):
            kind._infer_parameters(layer, (torch.empty(1, layers.channels_of(layer), device="meta"),))
        if getattr(layer, "num_features", None) == 0:
            kind.num_features = layers.channels_of(layer)


def served(
    model: nn.Module, obstacle: Callable[[nn.Module], str | None]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The batch normalization layers of a model, by their first names, without an obstacle; and those of the others."""
    layers = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    reasons = {name: obstacle(layer) for name, layer in layers.items()}
    skipped = {name: why for name, why in reasons.items() if why is not None}
    return {name: layer for name, layer in layers.items() if name not in skipped}, skipped


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All qualified names of every module; more than one for a shared one."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def hooks_of(module: nn.Module) -> bool:
    """Whether something watches or changes the module's inputs, outputs or their gradients."""
    return any(getattr(module, hooks) for hooks in _HOOKS)


def hooked_between(model: nn.Module, first: str, second: str) -> str | None:
    """The name of a module with hooks around one of two modules, but not around both."""
    around = [{name[:end] for end, letter in enumerate(name) if letter == "."} for name in (first, second)]
    return next((name for name in sorted(around[0] ^ around[1]) if hooks_of(model.get_submodule(name))), None)
