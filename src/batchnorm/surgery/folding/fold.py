"""Fold batch normalization into the convolution or linear layer next to it, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from batchnorm.surgery.example import in_mode
from batchnorm.surgery.folding.fold_graph import fold_graph
from batchnorm.surgery.folding.foldable import Borders, layers_of
from batchnorm.surgery.folding.handover import Step, take
from batchnorm.surgery.folding.neighbours import neighbours
from batchnorm.surgery.fusing.undo import undo
from batchnorm.surgery.verify import evaluated, largest_difference

__all__ = ["Folded", "fold"]

_COARSE = {torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Folded:
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
        lines = [f"{len(self.folded)} folded, {len(self.skipped)} left"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.folded.items()]
        lines += [f"  {name or '(the model)'}: left, {reason}" for name, reason in self.skipped.items()]
        if self.max_error is None:
            lines.append("not verified: give example_inputs")
        elif self.max_error_float64 is None:
            lines.append(f"verified: outputs within {self.max_error:.1e}; the model does not run in float64")
        else:
            lines.append(f"verified: outputs within {self.max_error:.1e}, in float64 {self.max_error_float64:.1e}")
        return "\n".join(lines)


def fold(model: Any, example_inputs: Any = None) -> Folded:
    """Make a copy of a model for inference in which convolutions and linear layers do their batch normalization.

    In evaluation batch normalization is scale · x + shift. The convolution or linear layer before it takes both over,
    exactly: its weight is scaled along the outputs, and it gets a bias. Where there is none before, or it feeds others
    too, the one behind takes the line over, along its inputs, where that is exact: not where zeros are padded and the
    layer shifts. An activation or residual addition of a layer of ours remains in its place.

    Which modules are next to each other is read from the graphs of all modules that torch.fx can trace, and observed in
    a run of the example inputs. Without these, a module that cannot be traced hides what it does itself, except for
    the order in a ``Sequential``.

    Args:
        model: it is left as it was. Also a ``torch.fx.GraphModule`` or a ``torch.export.ExportedProgram``.
        example_inputs: the argument of the model, a tuple of its arguments, or a dict of its keyword arguments. They
            serve to verify, too: both models run on them in evaluation, in the model's own dtype and in float64.

    Returns:
        The copy in evaluation mode (it must stay there: in training it would not be the model that was given), and
        which layers were folded and which were left, with the reasons.

    Raises:
        RuntimeError: if the folded model computes something else in float64 (by more than 1e-9 of the output's size).
        ValueError: if a lazy layer has seen no input, or the example gives no output to compare.
        TypeError: if the model is none, or was scripted or compiled.

    Example:
        >>> result = batchnorm.fold(torchvision.models.resnet50(), torch.randn(2, 3, 224, 224))
        >>> print(result)
        53 folded, 0 left ...
        >>> torch.onnx.export(result.model, (torch.randn(1, 3, 224, 224),), "resnet50.onnx", dynamo=True)

    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.2.
    """
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        return _fold_graph(model, example_inputs)
    _check(model)
    made = _undone(copy.deepcopy(model))
    steps, skipped = _search(copy.deepcopy(made), example_inputs)
    tied = _tied(made)
    take(made, steps)
    folded = {step.layer: _told(made, step, tied) for step in steps}

    def again(twin: nn.Module) -> nn.Module:
        take(_undone(twin), steps)
        return twin

    errors = (None, None) if example_inputs is None else _verified(model, made, again, example_inputs)
    return Folded(made, folded, skipped, *errors)


def _fold_graph(model: fx.GraphModule | ExportedProgram, inputs: Any) -> Folded:
    whole: nn.Module = model.module() if isinstance(model, ExportedProgram) else in_mode(copy.deepcopy(model), False)
    made, folded, skipped = fold_graph(model if isinstance(model, ExportedProgram) else whole)  # type: ignore[arg-type]
    errors = (None, None) if inputs is None else _verified(whole, made, lambda twin: fold_graph(twin)[0], inputs)  # type: ignore[arg-type]
    return Folded(made, folded, skipped, *errors)


def _undone(copied: nn.Module) -> nn.Module:
    """A copy without what ``fuse`` gave to its layers, in evaluation."""
    undo(copied)
    return in_mode(copied, False)


def _check(model: Any) -> None:
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


def _search(scratch: nn.Module, inputs: Any) -> tuple[list[Step], dict[str, str]]:
    """The steps that can be taken, found by taking them: behind one layer there may be another."""
    steps: list[Step] = []
    while True:
        layers, skipped = layers_of(scratch)
        if not layers:
            return steps, skipped
        borders, found = Borders(scratch), neighbours(scratch, layers.values(), inputs)
        new = []
        for name, layer in layers.items():
            around = found[layer]
            reasons = borders.before(layer, around), borders.after(layer, around)
            if None in reasons:
                before = reasons[0] is None
                module: Any = around.before if before else around.after
                new.append(Step(name, borders.names[module][0], before, "residual" in around.given, around.guessed))
            else:
                skipped[name] = "; ".join(dict.fromkeys(str(reason) for reason in reasons))
        if not new:
            return steps, skipped
        steps += new
        take(scratch, new)


def _tied(model: nn.Module) -> set[str]:
    """The names of the modules that share a parameter with others."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {
        name
        for name, m in model.named_modules()
        if any(p is not None and owners[id(p)] > 1 for p in m._parameters.values())
    }


def _told(made: nn.Module, step: Step, tied: set[str]) -> str:
    said = f"into {step.module}" + ("" if step.before else ", which follows")
    if step.guessed:
        said += ", beside it in a Sequential"
    if step.module in tied:
        said += ", which has a weight of its own now"
    left = made.get_submodule(step.layer)
    return said if type(left) is nn.Identity else f"{said}; {left} remains"


def _verified(
    model: nn.Module, made: nn.Module, again: Callable[[nn.Module], nn.Module], inputs: Any
) -> tuple[float, float | None]:
    """How far the outputs are from the model's, in its own dtype and in float64, in which it is folded again."""
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    right = evaluated(model, inputs)
    own = largest_difference(_run(made, inputs), right)
    try:
        twin = copy.deepcopy(model).double()
        given = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
        right = evaluated(twin, given)
    except (RuntimeError, TypeError, AssertionError):  # a dtype is written into the model
        _judge(own, max([1e-5, *(_COARSE.get(p.dtype, 0.0) for p in model.parameters())]))
        return own, None
    wide = largest_difference(_run(again(twin), given), right)
    _judge(wide, 1e-9)
    return own, wide


def _run(folded: nn.Module, inputs: Any) -> list[Tensor]:
    try:
        return evaluated(folded, inputs)
    except Exception as error:
        raise RuntimeError(
            f"the folded model fails ({type(error).__name__}: {error}): does a forward use a layer other than by "
            "calling it? The model is unchanged"
        ) from error


def _judge(error: float, limit: float) -> None:
    if not error <= limit:
        raise RuntimeError(
            f"the folded model's outputs differ by {error:.1e} of their size (at most {limit:.0e} can be rounding): a "
            "forward does something that neither a graph nor the run showed; the model is unchanged"
        )
