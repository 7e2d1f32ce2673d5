"""Which batch normalization layers can be folded, and into what exactly: obstacles, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.conditional import ConditionalBatchNorm
from batchnorm.domains import DomainBatchNorm
from batchnorm.layers import channels_of
from batchnorm.recurrent.base import Recurrent
from batchnorm.surgery.inspect.affine import (
    TRANSPOSED,
    does_not_take,
    inputs_of,
    is_plain,
    outputs_of,
    scale_and_shift_of,
    share_of,
)
from batchnorm.surgery.inspect.example import Arguments
from batchnorm.surgery.inspect.find import (
    NO_FORWARD,
    UNINITIALIZED,
    hooked_between,
    hooks_of,
    is_batch_norm,
    is_known,
    is_uninitialized,
    kind_of,
    names_of,
)
from batchnorm.surgery.inspect.reading import following, read
from batchnorm.surgery.inspect.view import Around, Share

__all__ = ["Obstacles", "layers_of"]

_ELSEWHERE: dict[type[nn.Module], str] = {
    DomainBatchNorm: "its scale and shift are others in each domain",
    ConditionalBatchNorm: "its scale and shift depend on what it is conditioned on",
    Recurrent: "it normalizes within its steps, with other statistics in each",
}


def layers_of(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of a model, by name, that are affine maps in evaluation; and why the others are none."""
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    parts: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        why = next((why for kind, why in _ELSEWHERE.items() if isinstance(module, kind)), None)
        if why is not None:
            reasons[name] = why
            parts |= dict.fromkeys(module.modules(), f"it is a part of {name or 'the model'}: {why}")
        elif is_batch_norm(module):
            reason = parts.get(module) or _no_affine_map(module)
            if reason is None and not name:
                reason = "it is the whole model: there is nothing to fold it into"
            if reason is None:
                layers[name] = module
            else:
                reasons[name] = reason
    return layers, reasons


def _no_affine_map(layer: Any) -> str | None:
    """Why a layer in evaluation is not scale · x + shift with known numbers; None if it is."""
    kind = kind_of(layer)
    if "forward" in vars(layer):
        return NO_FORWARD
    if is_uninitialized(layer):
        return UNINITIALIZED
    found = None if is_known(kind) else read(layer)
    if isinstance(found, str):
        subclass = issubclass(kind, nn.modules.batchnorm._BatchNorm)
        told = "a subclass, which may compute something else" if subclass else "not a batch normalization known here"
        return f"{kind.__name__} is {told}: {found}"
    if layer.running_mean is None or layer.running_var is None:
        return "it has no running statistics: its output depends on the batch in evaluation, too"
    if any(t.is_meta for t in (*layer.parameters(), *layer.buffers())):
        return "it is on the meta device, and has no numbers"
    if hooks_of(layer):
        return "it has hooks, which would no longer be called"
    if not all(bool(torch.isfinite(t).all()) for t in scale_and_shift_of(layer)):
        return (
            "its scale or shift is not finite: see its running statistics (a variance of 0 or below and eps?), weight "
            "and bias"
        )
    return None


class Obstacles:
    """What stands between a layer of one model and the modules that could take it over."""

    def __init__(self, model: nn.Module, called_with: Mapping[nn.Module, Arguments] | None = None) -> None:
        """Look at a model.

        Args:
            model: it is left as it was.
            called_with: what modules with a forward of their own were called with in a run.
        """
        self.names = names_of(model)
        self._model, self._called_with = model, called_with or {}

    def between(self, layer: Any, around: Around, place: Literal["before", "after", "beside"]) -> str | None:
        """Why the modules in one place around a layer cannot do the layer's work; None if they can."""
        shares: tuple[Share, ...] | str = getattr(around, place)
        if isinstance(shares, str):
            return shares
        if place == "before" and "mask" in around.extras:
            return "it is called with a mask, where its output is 0"
        if place != "before" and (around.extras or following(layer) is not None):
            what = "the sum" if place == "beside" else self.names[shares[0].module][0]
            return f"it does more than normalize before {what}"
        reasons = (self._obstacle(layer, share, around, before=place != "after") for share in shares)
        return next((reason for reason in reasons if reason is not None), None)

    def _obstacle(self, layer: Any, share: Share, around: Around, before: bool) -> str | None:
        module: Any = share.module
        name = self.names[module][0]
        channels = outputs_of(module) if before else inputs_of(module)
        if channels != (channels_of(layer) if share.channels is None else len(share.channels)):
            return f"{name} has {channels} channels there, not {channels_of(layer)}"
        if "forward" in vars(module):
            return f"the forward of {name} has been replaced"
        if "weight" not in module._parameters or module.weight.is_meta:
            return f"{name} has no weight of its own that could be changed"
        shared = len(self.names[module]) > 1 or len(self.names[layer]) > 1
        if shared and not around.everywhere:
            return f"{name} or the layer is shared, and not all of its calls could be seen: give example_inputs"
        if hooks_of(module) or hooked_between(self._model, name, self.names[layer][0]):
            return f"{name}, or something between it and the layer, has hooks"
        affine = share_of(layer, share.channels)
        reason = None if before else _at_the_border(affine[1], module, name)
        if reason is None and not is_plain(module):
            reason = does_not_take(module, affine, before, self._called_with.get(module))
            reason = reason and f"{name} ({type(module).__name__}) {reason}"
        return reason


def _at_the_border(shift: Tensor, module: Any, name: str) -> str | None:
    """Why a shift in front of a convolution is no bias behind it."""
    if isinstance(module, nn.Linear) or not shift.any():
        return None
    if isinstance(module, TRANSPOSED):
        return f"{name}, a transposed convolution, adds up fewer shifts at the border"
    if module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice):
        return f"{name} pads with zeros, which the layer does not shift"
    return None
