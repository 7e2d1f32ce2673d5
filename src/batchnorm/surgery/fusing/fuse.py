"""Let the batch normalization layers of a model add the residual and apply the activation behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from batchnorm.activations import activation_of
from batchnorm.kernels.operators import expect
from batchnorm.surgery.adopt import adopted_activation
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fusing.ahead import Ahead
from batchnorm.surgery.fusing.observe import observed
from batchnorm.surgery.fusing.rewrite import absorb
from batchnorm.surgery.fusing.traced import Fusion
from batchnorm.surgery.inspect.example import calls_of
from batchnorm.surgery.inspect.find import TORCHS, hooked_between
from batchnorm.surgery.inspect.tensors import copied
from batchnorm.surgery.inspect.verify import Errors, verify
from batchnorm.surgery.report import Report, summary

__all__ = ["Fused", "fuse"]


@dataclass(frozen=True)
class Fused(Report):
    """A fused model, and what was done to it.

    Attributes:
        model: the new model.
        fused: for each layer that does more now, by its qualified name, what: "relu", "add", "add + relu", ...
        skipped: for every other batch normalization layer, why not.
        method: for each fused layer, how: "module replaced" (the activation's module made room; no forward changed),
            "forward rewritten" (see ``rewritten``), "observed" (as the first, found by running the example inputs),
            "done ahead" (found so, too: no forward changed, and what it calls as activation finds that it is done), or
            "its class's own" (another package's class that applied the activation itself, such as timm's).
        rewritten: the names of the modules whose forward is now the one that tracing recorded.
        max_error: the largest difference of an output or a buffer from the original model's on the example inputs,
            relative to the largest value of its tensor; None without example inputs.
        max_gradient_error: the same for the gradients of parameters and inputs.
    """

    model: nn.Module
    fused: dict[str, str]
    skipped: dict[str, str]
    method: dict[str, str]
    rewritten: tuple[str, ...]
    max_error: float | None = None
    max_gradient_error: float | None = None

    def __str__(self) -> str:
        done = {name: f"{what} ({self.method[name]})" for name, what in self.fused.items()}
        verified = "not verified: give example_inputs"
        if self.max_error is not None:
            verified = f"verified: outputs within {self.max_error:.1e}, gradients within {self.max_gradient_error:.1e}"
        return self._text([f"{len(self.fused)} fused, {len(self.skipped)} skipped"], done, [verified])


def fuse(model: nn.Module, example_inputs: Any = None) -> Fused:
    """Make a copy of a model whose batch normalization layers add the residual and apply the activation behind them.

    A fused layer reads and writes memory once where the original did twice or three times, and keeps less for the
    backward. The copy has the same parameter names, loads the same checkpoints, and can be trained: fuse before
    building the optimizer, which must hold the copy's parameters. ``batchnorm.revert`` undoes it. If something puts
    another layer in a fused one's place (SyncBatchNorm, a convolution with the layer folded in), the activation is
    applied behind it as before.

    Layers are found by tracing every module on its own (torch.fx), so that a forward which cannot be traced hides only
    what it does itself; there, with example inputs, activation modules are found by observing a run. Where an
    activation's module serves one layer alone it is replaced by a placeholder. Otherwise the forward of the smallest
    module that contains layer and activation is replaced by the recorded one, in which plain Python values (numbers,
    flags) are what they were when this function ran.

    Args:
        model: it is left as it was. Its ``torch.nn`` layers are converted in the copy, as ``batchnorm.convert`` does.
        example_inputs: the argument of the model, a tuple of its arguments, or a dict of its keyword arguments; more
            than one sample. They tell shapes, without which additions are left alone, and serve to verify: outputs,
            buffers and gradients of both models are compared in training and evaluation.

    Returns:
        The copy, and what was fused and what was skipped, and why.

    Raises:
        TypeError: if the model was scripted.
        RuntimeError: if the models' results differ; there is no fused model then.
        ValueError: if the example gives no output to compare; from torch, if a lazy layer has seen no input.

    Example:
        >>> result = batchnorm.fuse(torchvision.models.resnet50(), torch.randn(2, 3, 224, 224))
        >>> print(result)
        >>> optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the model was scripted, which hides its modules: fuse the original, then script the result")
    if isinstance(example_inputs, Mapping):  # of whatever class, which nothing need know
        example_inputs = dict(example_inputs)
    made = copied(model)
    unconverted = convert(made).skipped | _scripted(made)
    fusion = Fusion(made, None if example_inputs is None else calls_of(made, example_inputs))
    fusion.run()
    _observe(made, example_inputs, fusion)
    _adopted(made, fusion)
    with _kernels_expected(made):
        errors = None if example_inputs is None else verify(model, made, example_inputs)
    return _result(made, fusion, unconverted, errors)


@contextmanager
def _kernels_expected(model: nn.Module) -> Iterator[None]:
    """Have the kernels of a training step compiled beside this process, as soon as a layer is called."""
    known: set[str] = set()

    def tell(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training and name not in known:  # later calls may be in float64
            known.add(name)
            expect(args[0], activation_of(layer.activation), len(args) > 1 or "residual" in kwargs)

    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) in TORCHS]
    handles = [layer.register_forward_pre_hook(partial(tell, name), with_kwargs=True) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adopted(model: nn.Module, fusion: Fusion) -> None:
    """Note the layers whose own class applied an activation behind normalization, which is one pass now."""
    for layer in model.modules():
        activation = adopted_activation(layer)
        if activation is not None and layer not in fusion.fused:
            fusion.note(layer, activation.name, "its class's own")


def _scripted(model: nn.Module) -> dict[str, str]:
    """The layers that TorchScript has compiled, and why they are skipped."""
    return {
        name: "it was scripted: fuse before torch.jit.script"
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in module.original_name
    }


def _observe(model: nn.Module, inputs: Any, fusion: Fusion) -> None:
    """Look at a run for the layers that no graph shows."""
    candidates = []
    for layer, why in fusion.unseen.items():
        reason = fusion.obstacle(layer)
        fusion.reasons[layer] = reason or f"{why}; example_inputs would allow to observe it"
        if reason is None and inputs is not None:
            candidates.append(layer)
    if not candidates:
        return
    try:
        seen = observed(model, inputs, candidates)
    except Exception as error:  # it may not bear to be recorded; if it does not run at all, comparing raises this again
        seen = dict.fromkeys(candidates, f"a run fails: {summary(error)}")
    for layer, found in seen.items():
        if isinstance(found, str):
            fusion.reasons[layer] = f"{fusion.unseen[layer]}; observed: {found}"
            continue
        module, activation = found
        name, place = fusion.name(layer), "" if module is None else fusion.name(module)
        hooked = hooked_between(model, name, place)
        if hooked is not None:
            fusion.reasons[layer] = f"{hooked} has hooks, which would see the fused output"
        elif module is None:
            layer._ahead = Ahead(activation, name)  # type: ignore[assignment]
            fusion.note(layer, activation.name, "done ahead")
        else:
            absorb(model, name, place, activation)
            fusion.note(layer, activation.name, "observed")


def _result(model: nn.Module, fusion: Fusion, unconverted: dict[str, str], errors: Errors | None) -> Fused:
    layers = {fusion.name(m): m for m in model.modules() if type(m) in TORCHS}
    fused = {name: fusion.fused[layer] for name, layer in layers.items() if layer in fusion.fused}
    skipped = {name: fusion.reasons[layer] for name, layer in layers.items() if name not in fused}
    return Fused(
        model,
        fused,
        unconverted | skipped,
        {name: fusion.methods[layers[name]] for name in fused},
        tuple(sorted(fusion.name(module) for module in fusion.rewritten)),
        None if errors is None else errors.outputs,
        None if errors is None else errors.gradients,
    )
