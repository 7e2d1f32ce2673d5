"""Fold batch normalization into the convolution or linear layer next to it, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy

from batchnorm.kernels import using
from batchnorm.surgery.folding.fold_graph import fold_graph, sized
from batchnorm.surgery.folding.proof import Proof
from batchnorm.surgery.folding.steps import Step, apply, leaves_nothing
from batchnorm.surgery.fused import undo
from batchnorm.surgery.inspect.example import copied_inputs, forward, in_mode, seeded
from batchnorm.surgery.inspect.find import settle_lazy
from batchnorm.surgery.inspect.neighbours import Neighbours
from batchnorm.surgery.inspect.obstacles import Obstacles, layers_of
from batchnorm.surgery.inspect.recorded import recorded
from batchnorm.surgery.inspect.tensors import copy_sharing_parameters
from batchnorm.surgery.norms import Zero
from batchnorm.surgery.report import Report, summary

__all__ = ["Folded", "fold"]


@dataclass(frozen=True)
class Folded(Report):
    """A folded model, and what was done to it.

    Attributes:
        model: the new model, in evaluation mode.
        folded: for each layer that was folded, by its qualified name, into what.
        skipped: for every other batch normalization layer, why not.
        max_error: the largest difference of an output from the original model's on the example inputs, in the model's
            own dtype, relative to the largest value of its tensor; None without example inputs.
        max_error_float64: the same with both models in float64; None, too, if the model cannot run in it.
    """

    model: nn.Module
    folded: dict[str, str]
    skipped: dict[str, str]
    max_error: float | None = None
    max_error_float64: float | None = None

    def __str__(self) -> str:
        if self.max_error is None:
            verified = "not verified: give example_inputs"
        elif self.max_error_float64 is None:
            verified = f"verified: outputs within {self.max_error:.1e}; the model does not run in float64"
        else:
            verified = f"verified: outputs within {self.max_error:.1e}, in float64 {self.max_error_float64:.1e}"
        return self._text([f"{len(self.folded)} folded, {len(self.skipped)} skipped"], self.folded, [verified])


def fold(model: Any, example_inputs: Any = None) -> Folded:
    """Make a copy of a model for inference in which convolutions and linear layers do their batch normalization.

    In evaluation batch normalization is scale · x + shift. The convolution or linear layer before it takes both over,
    exactly: its weight is scaled along the outputs, and it gets a bias. Where there is none before, or it feeds others
    too, the one behind takes the line over, along its inputs, where that is exact: not where zeros are padded and the
    layer shifts. Where a run shows that the output of a convolution with the same input is added to the layer's, as in
    RepVGG, the convolution takes the line over in the middle of its kernel, and 0 is added. An activation or residual
    addition of a layer of ours remains in its place.

    Which modules are next to each other is observed in a run of the example inputs. Without these it is read from the
    graphs of all modules that torch.fx can trace; one that cannot be traced hides what it does itself, except for the
    order in a ``Sequential``, and linear layers are skipped whose outputs might have more dimensions than two.

    Args:
        model: it is left as it was. Also a ``torch.fx.GraphModule`` or a ``torch.export.ExportedProgram``.
        example_inputs: the argument of the model, a tuple of its arguments, or a dict of its keyword arguments. They
            serve to verify, too: both models run on them in evaluation, in the model's own dtype and in float64.

    Returns:
        The copy in evaluation mode (it must stay there: in training it would not be the model that was given), and
        which layers were folded and which were skipped, and why.

    Raises:
        RuntimeError: if the model gives other outputs in each run, so that nothing can be verified.
        ValueError: if a lazy layer has seen no input, or the example gives no output to compare.
        TypeError: if the model is none, or was scripted or compiled.

    Example:
        >>> result = batchnorm.fold(torchvision.models.resnet50(), torch.randn(2, 3, 224, 224))
        >>> print(result)
        53 folded, 0 skipped ...
        >>> torch.onnx.export(result.model, (torch.randn(1, 3, 224, 224),), "resnet50.onnx", dynamo=True)

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
    """
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        return _fold_graph(model, example_inputs)
    _check_model(model)
    made = _undone(copy.deepcopy(model))
    if example_inputs is None:
        steps, skipped = _search(made, _traced(made), Obstacles(made))
        return _result(made, steps, skipped)
    inputs = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    outputs, seen, obstacles = _seen(made, inputs)
    proof = Proof(made, inputs, outputs, _taken)
    found, skipped = _search(made, seen, obstacles)
    steps = proof.sound(found)
    skipped |= {step.layer: why for step, why in proof.refused.items()}
    return _result(made, steps, skipped, proof)


def _seen(model: nn.Module, inputs: Any) -> tuple[Any, Neighbours, Obstacles]:
    """What a model returns for example inputs, and what is next to what."""
    try:
        run = recorded(model, inputs)
    except Exception:  # it may not bear to be recorded; if it does not run at all, this raises again
        return _outputs(model, inputs), _traced(model), Obstacles(model)
    return run.outputs, Neighbours(model, [run]), Obstacles(model, run.called_with)


def _traced(model: nn.Module) -> Neighbours:
    """What graphs show of a model that stays in evaluation."""
    return Neighbours(model, modes=(False, False))


def _outputs(model: nn.Module, inputs: Any) -> Any:
    with seeded(model), torch.no_grad(), using("aten"):
        return forward(copy.deepcopy(model), copied_inputs(inputs))


def _taken(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    made, _ = copy_sharing_parameters(model)  # steps put new parameters into modules, and write into none
    apply(made, steps)
    return made


def _result(made: nn.Module, steps: list[Step], skipped: dict[str, str], proof: Proof[Any] | None = None) -> Folded:
    """Take the steps, and tell."""
    tied = _tied(made)
    apply(made, steps)
    folded = {step.layer: _told(made, step, tied) for step in steps}
    return Folded(made, folded, skipped, *(() if proof is None else proof.errors))


def _fold_graph(model: fx.GraphModule | ExportedProgram, inputs: Any) -> Folded:
    whole: Any = model.module() if isinstance(model, ExportedProgram) else in_mode(copy.deepcopy(model), False)
    given: Any = model if isinstance(model, ExportedProgram) else whole
    if inputs is None:
        return Folded(*fold_graph(given))
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    if given is whole:
        sized(whole, inputs)
    proof: Proof[str] = Proof(whole, inputs, _outputs(whole, inputs), _folded)
    made, folded, skipped = fold_graph(given, proof.sound(list(fold_graph(whole)[1])))
    return Folded(made, folded, skipped | proof.refused, *proof.errors)


def _folded(graph: Any, names: Sequence[str]) -> nn.Module:
    return fold_graph(graph, names)[0]


def _undone(copied: nn.Module) -> nn.Module:
    """A copy without what ``fuse`` gave to its layers, in evaluation."""
    undo(copied)
    settle_lazy(copied)
    return in_mode(copied, False)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"fold needs a torch.nn.Module or a torch.export.ExportedProgram, but got {type(model).__name__}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("the model was scripted, which hides its modules: fold the original, then script the result")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise TypeError(
                f"{name or 'the model'} was compiled, which hides its modules: fold the original (its _orig_mod), then "
                "compile the result"
            )
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has seen no input and has no weights yet: run the "
                "model once before folding"
            )


def _search(model: nn.Module, seen: Neighbours, obstacles: Obstacles) -> tuple[list[Step], dict[str, str]]:
    """The steps that can be taken; behind a layer that goes there may be another."""
    steps: list[Step] = []
    layers, others = layers_of(model)
    while True:
        new, skipped = [], dict(others)
        for name, layer in layers.items():
            try:
                found = _step(name, layer, seen, obstacles)
            except Exception as error:  # of one layer; the others are none the worse
                found = summary(error)
            if isinstance(found, Step):
                new.append(found)
            else:
                skipped[name] = found
        if not new:
            return steps, skipped
        steps += new
        gone = [layers.pop(step.layer) for step in new]
        seen.mark_identities([layer for layer, step in zip(gone, new, strict=True) if leaves_nothing(layer, step)])


def _step(name: str, layer: nn.Module, seen: Neighbours, obstacles: Obstacles) -> Step | str:
    """How a layer goes into its neighbours, or why it cannot."""
    around = seen.of(layer)
    reasons = obstacles.between(layer, around, "before"), obstacles.between(layer, around, "after")
    if None in reasons:
        before = reasons[0] is None
        modules = _named(around.before if before else around.after, obstacles)
        return Step(name, modules, before, "residual" in around.extras, around.guessed)
    if obstacles.between(layer, around, "beside") is None:
        return Step(name, _named(around.beside, obstacles), before=False, beside=True)
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons))


def _named(shares: Any, obstacles: Obstacles) -> tuple[tuple[str, Tensor | None], ...]:
    return tuple((obstacles.names[module][0], channels) for module, channels in shares)


def _tied(model: nn.Module) -> set[str]:
    """The names of the modules that share a parameter with others."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {name for name, m in model.named_modules() if any(owners[id(p)] > 1 for p in m._parameters.values())}


def _told(made: nn.Module, step: Step, tied: set[str]) -> str:
    names = [name for name, _ in step.modules]
    where = ", which is added to it" if step.beside else "" if step.before else ", which follows"
    said = f"into {' and '.join(names)}{where}"
    if step.guessed:
        said += ", beside it in a Sequential"
    if any(name in tied for name in names):
        said += ", which has a weight of its own now"
    left = made.get_submodule(step.layer)
    return said if type(left) in (nn.Identity, Zero) else f"{said}; {left} remains"
