"""Which batch normalization layers can be folded, and into what exactly: obstacles, each with its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.conditional import ConditionalBatchNorm
from batchnorm.domains import DomainBatchNorm
from batchnorm.recurrent.base import Recurrent
from batchnorm.surgery.find import hooked_between, hooks_of, is_batch_norm, is_frozen, is_known, names_of
from batchnorm.surgery.folding.neighbours import Neighbours
from batchnorm.surgery.line import TRANSPOSED, channels_of, line_of
from batchnorm.surgery.reading import following, read

__all__ = ["Borders", "layers_of", "no_line"]

_ELSEWHERE: dict[type[nn.Module], str] = {
    DomainBatchNorm: "its line is another one in each domain",
    ConditionalBatchNorm: "its scale and shift depend on what it is conditioned on",
    Recurrent: "it normalizes within its steps, with other statistics in each",
}


def layers_of(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of a model, by their first names, that are a line in evaluation; and why the others are none."""
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    parts: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        why = next((why for kind, why in _ELSEWHERE.items() if isinstance(module, kind)), None)
        if why is not None:
            reasons[name] = why
            parts |= dict.fromkeys(module.modules(), f"it is a part of {name or 'the model'}: {why}")
        elif is_batch_norm(module):
            reason = parts.get(module) or no_line(module)
            if reason is None and not name:
                reason = "it is the whole model: there is nothing to fold it into"
            if reason is None:
                layers[name] = module
            else:
                reasons[name] = reason
    return layers, reasons


def no_line(layer: Any) -> str | None:
    """Why a layer in evaluation is not scale · x + shift with known numbers; None if it is."""
    kind = layer._frozen.kind if is_frozen(layer) else type(layer)
    if "forward" in vars(layer):
        return "its forward has been replaced"
    if any(is_lazy(t) for t in (*layer.parameters(), *layer.buffers())):
        return "it has seen no input, and has no statistics yet: run the model once"
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
    if not all(bool(torch.isfinite(t).all()) for t in line_of(layer)):
        return "its line is not finite: see its running statistics (a variance of 0 or below and eps?), weight and bias"
    return None


class Borders:
    """What stands between a layer of one model and the module that could take it over."""

    def __init__(self, model: nn.Module) -> None:
        self.names = names_of(model)
        self._model = model

    def before(self, layer: Any, found: Neighbours) -> str | None:
        """Why the module in front of a layer cannot do the layer's work."""
        if isinstance(found.before, str):
            return found.before
        module: Any = found.before
        if "mask" in found.given:
            return "it is called with a mask, where its output is 0"
        channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        return self._common(layer, module, channels, found)

    def after(self, layer: Any, found: Neighbours) -> str | None:
        """Why the module behind a layer cannot do the layer's work."""
        if isinstance(found.after, str):
            return found.after
        module: Any = found.after
        name = self.names[module][0]
        if found.given or following(layer) is not None:
            return f"it does more than normalize before {name}"
        channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        return self._common(layer, module, channels, found) or _at_the_border(layer, module, name)

    def _common(self, layer: Any, module: Any, channels: int, found: Neighbours) -> str | None:
        name = self.names[module][0]
        if channels != channels_of(layer):
            return f"{name} has {channels} channels there, not {channels_of(layer)}"
        if "forward" in vars(module):
            return f"the forward of {name} has been replaced"
        if "weight" not in module._parameters or module.weight.is_meta:
            return f"{name} has no weight of its own that could be changed"
        shared = len(self.names[module]) > 1 or len(self.names[layer]) > 1
        if shared and not found.everywhere:
            return f"{name} or the layer is shared, and not all of its calls could be seen: give example_inputs"
        if hooks_of(module) or hooked_between(self._model, name, self.names[layer][0]):
            return f"{name}, or something between it and the layer, has hooks"
        if isinstance(module, nn.Linear) and not found.flat and not _is_flat(layer, found):
            return f"its channels are dimension 1, and those of {name}, which is linear, the last one"
        return None


def _is_flat(layer: Any, found: Neighbours) -> bool:
    """Whether a layer's input is (N, C); where nobody has seen it, whether it can be."""
    if found.dimensions:
        return found.dimensions == {2}
    kind = layer._frozen.kind if is_frozen(layer) else type(layer)
    return issubclass(kind, (nn.BatchNorm1d, nn.SyncBatchNorm))


def _at_the_border(layer: Any, module: Any, name: str) -> str | None:
    """Why a shift in front of a convolution is no bias behind it."""
    _, shift = line_of(layer)
    if isinstance(module, nn.Linear) or not shift.any():
        return None
    if isinstance(module, TRANSPOSED):
        return f"{name}, a transposed convolution, adds up fewer shifts at the border"
    if module.padding_mode == "zeros" and any(module._reversed_padding_repeated_twice):
        return f"{name} pads with zeros, which the layer does not shift"
    return None
