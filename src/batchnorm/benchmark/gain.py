"""What a model would gain, before a line of it changes: layer by layer, and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.benchmark import networks
from batchnorm.benchmark.cells import Cell, cell_of
from batchnorm.benchmark.contenders import OURS, TORCH, contenders, inputs
from batchnorm.benchmark.figures import Figures, by_first, by_ours
from batchnorm.benchmark.gate import check
from batchnorm.benchmark.memory import saved
from batchnorm.benchmark.report import Table, markdown, size, time, times
from batchnorm.benchmark.timing import Call
from batchnorm.reports.progress import Advance
from batchnorm.statistics import Batch
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fusing.fuse import fuse
from batchnorm.surgery.inspect.example import copied_inputs, forward, in_mode, seeded
from batchnorm.surgery.inspect.find import is_batch_norm
from batchnorm.surgery.inspect.tensors import copied

AS_IS, CONVERTED, FUSED = "as it is", "converted", "fused"
TRAINING, EVALUATION = "training step", "evaluation"
_LUCK = 1.5  # times torch.nn's error: of shapes that nobody has tried before, one rounding may be much luckier
_LONGEST = 26  # letters of a layer's name, whose end says more than its beginning
_WHOLE = 20  # a whole model is timed so many times as long as a layer


@dataclass(frozen=True)
class LayerGain:
    """Calls of layers that are alike: forward and backward by our layer and by torch.nn's.

    Attributes:
        cell: the input that the layers are called with, and what `fuse` would let them do besides.
        names: the layers.
        calls: how often they are called in one pass through the model.
        kernel: which one ran in training.
        figures: of one call, with torch.nn's time by ours.
        problems: why there are none; the results differ.
    """

    cell: Cell
    names: tuple[str, ...]
    calls: int
    kernel: str = ""
    figures: Figures = field(default_factory=Figures)
    problems: tuple[str, ...] = ()

    def seconds(self, contender: str) -> float:
        """What all calls of one pass take."""
        return self.calls * self.figures.seconds.get(contender, 0.0)


@dataclass(frozen=True)
class Gain:
    """What a model would gain.

    Attributes:
        layers: what batch normalization takes, the most first.
        skipped: for each layer that has no figures, why not.
        whole: training step and evaluation of the model as it is, converted and fused, with the first one's time by
            the others'.
        kept: bytes that a training step keeps for its backward.
        refused: for each way that has no figures, why not.
    """

    layers: tuple[LayerGain, ...]
    skipped: dict[str, str]
    whole: dict[str, Figures]
    kept: dict[str, int]
    refused: dict[str, str]

    @property
    def sentence(self) -> str:
        """Say what the model would gain."""
        best = FUSED if FUSED in self.kept else CONVERTED
        if best not in self.kept:
            return f"Nothing can be said: {'; '.join(f'{way}: {why}' for way, why in self.refused.items())}."
        said = [self._said(operation, best) for operation in (TRAINING, EVALUATION)]
        how = {FUSED: "batchnorm.fuse", CONVERTED: "batchnorm.convert"}[best]
        return f"With {how}, {said[0]}, and {said[1]}."

    def _said(self, operation: str, best: str) -> str:
        found = self.whole[operation]
        ratio = found.ratios[best]
        took = f"{time(found.seconds[best])} instead of {time(found.seconds[AS_IS])}"
        if ratio.low <= 1 <= ratio.high:
            return f"{_article(operation)} takes as long as before ({took}, {times(ratio)})"
        words = (
            f"is {ratio.median:.2f} times as fast" if ratio.low > 1 else f"takes {1 / ratio.median:.2f} times as long"
        )
        return f"{_article(operation)} {words} ({took}, {times(ratio)})"

    def tables(self) -> dict[str, Table]:
        """The figures as text, with titles."""
        found = {
            "Batch normalization in a training step": self._layers(),
            "The whole model": self._whole(),
            "Skipped layers": Table(("layer", "why"), list(self.skipped.items()), words=2),
            "Without figures": Table(("what", "why"), list(self._failures()), words=2),
        }
        return {title: table for title, table in found.items() if table.rows}

    def _layers(self) -> Table:
        rows = [
            (
                _listed(one.names), one.cell.name, str(one.calls), one.kernel, time(one.seconds(TORCH)),
                time(one.seconds(OURS)), times(one.figures.ratios[TORCH]),
            )
            for one in self.layers if not one.problems
        ]  # fmt: skip
        calls = sum(one.calls for one in self.layers if not one.problems)
        theirs, ours = (sum(one.seconds(name) for one in self.layers) for name in (TORCH, OURS))
        if rows:
            rows.append(("all", "", str(calls), "", time(theirs), time(ours), f"{theirs / ours:.2f} ×"))
        return Table(("layers", "called with", "calls", "kernel", TORCH, OURS, "× torch.nn"), rows, words=2)

    def _whole(self) -> Table:
        ways = [way for way in (CONVERTED, FUSED) if way in self.kept]
        if not ways:
            return Table(())
        rows = [
            (operation, time(found.seconds[AS_IS]), *(x for way in ways for x in _pair(found, way)))
            for operation, found in self.whole.items()
        ]
        kept = (x for way in ways for x in (size(self.kept[way]), f"{self.kept[way] / self.kept[AS_IS]:.2f} ×"))
        rows.append(("kept for the backward", size(self.kept[AS_IS]), *kept))
        return Table(("", AS_IS, *(column for way in ways for column in (way, "×"))), rows)

    def _failures(self) -> list[tuple[str, str]]:
        return [
            *((_listed(one.names), "; ".join(one.problems)) for one in self.layers if one.problems),
            *self.refused.items(),
        ]

    def __str__(self) -> str:
        parts = [f"{title}\n{markdown(table)}" for title, table in self.tables().items()]
        return "\n\n".join((*parts, self.sentence))


def gain(model: nn.Module, example_inputs: Any, seconds: float = 0.15, advance: Advance | None = None) -> Gain:
    """Measure what a model would gain from `convert` and from `fuse`; the model is left as it is.

    Nothing is timed before its results agree with float64 about as well as those of torch.nn.

    Args:
        model: on the CPU.
        example_inputs: the argument of the model, a tuple of its arguments, or a dict of its keyword arguments.
        seconds: for how long a layer is repeated; the whole model, twenty times as long.
        advance: called with what is being done, how much of it is done and of how much.

    Raises:
        ValueError: if the model has no batch normalization, none that could be converted, or is not on the CPU.
    """
    with seeded(model):  # and afterwards the generators as they were
        return _gain(model, copied_inputs(example_inputs), seconds, advance or (lambda *_: None))


def _gain(model: nn.Module, inputs: Any, seconds: float, tell: Advance) -> Gain:
    _check(model)
    base = copied(model)
    tell("fusing", 0, 1)
    built, fused, skipped, refused = _built(base, inputs)
    cells = _calls(copied(built[-1][1]), inputs, fused, skipped)
    layers = []
    for done, (cell, calls) in enumerate(cells.items()):
        tell("layers", done, len(cells))
        layers.append(_layer(cell, tuple(calls), sum(calls.values()), seconds))
    tell("the whole model", 0, 3)
    problems = {way: _problem(base, network, inputs) for way, network in built}
    refused |= {way: why for way, why in problems.items() if why is not None}
    right = {way: network for way, network in built if problems[way] is None}
    whole, kept = _whole(base, right, inputs, _WHOLE * seconds, tell) if right else ({}, {})
    return Gain(tuple(sorted(layers, key=lambda one: -one.seconds(TORCH))), skipped, whole, kept, refused)


def _check(model: nn.Module) -> None:
    """Refuse a model that cannot be measured."""
    tensors = (*model.parameters(), *model.buffers())
    if not any(map(is_batch_norm, model.modules())):
        raise ValueError(f"{type(model).__name__} has no batch normalization layer")
    if any(map(is_lazy, tensors)):
        raise ValueError("the model has lazy layers, which have no shapes yet: call it once before")
    devices = sorted({str(t.device) for t in tensors} - {"cpu"})
    if devices:
        raise ValueError(f"the model is on {', '.join(devices)}: the benchmark measures CPUs")


def _built(
    base: nn.Module, inputs: Any
) -> tuple[list[tuple[str, nn.Module]], dict[str, str], dict[str, str], dict[str, str]]:
    """What the model is made into, the best last; what is fused; and why layers and whole ways are not there."""
    converted = copied(base)
    skipped = dict(convert(converted).skipped)
    if len(skipped) == sum(map(is_batch_norm, converted.modules())):
        raise ValueError(f"no batch normalization of the model can be converted: {next(iter(skipped.values()))}")
    try:
        result = fuse(base, inputs)
    except Exception as error:  # the library's verdict, or whatever a forward does that no graph shows
        return [(CONVERTED, converted)], {}, skipped, {FUSED: f"{type(error).__name__}: {error}"}
    return [(CONVERTED, converted), (FUSED, result.model)], result.fused, skipped, {}


def _calls(
    network: nn.Module, inputs: Any, fused: dict[str, str], skipped: dict[str, str]
) -> dict[Cell, dict[str, int]]:
    """How often a copy's layers are called in one training pass, by what with; notes who is skipped."""
    cells: dict[Cell, dict[str, int]] = {}

    def note(name: str, layer: Any, args: tuple[Any, ...]) -> None:
        reason = _unmeasured(layer, args)
        if reason is not None:
            skipped[name] = reason
        elif name not in skipped:
            alone = "" if getattr(layer, "activation", None) is None else layer.activation.name
            does = "+".join(("bn", *fused.get(name, alone).split(" + "))).removesuffix("+")
            calls = cells.setdefault(cell_of(args[0], does), {})
            calls[name] = calls.get(name, 0) + 1

    for name, layer in network.named_modules():
        if is_batch_norm(layer) and name not in skipped:
            layer.register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        forward(in_mode(network, True), inputs)
    return cells


def _unmeasured(layer: Any, args: tuple[Any, ...]) -> str | None:
    """Why a call is not one that torch.nn's layer could take instead."""
    if not args or not isinstance(args[0], Tensor):
        return "it is called with keyword arguments alone"
    if not layer.training:
        return "it is in evaluation mode, also while the model trains"
    if type(getattr(layer, "statistics", Batch())) is not Batch:
        return "it has a policy of statistics, which torch.nn has not"
    return None if 2 <= args[0].dim() <= 5 else f"its input has {args[0].dim()} dimensions"


def _layer(cell: Cell, names: tuple[str, ...], calls: int, seconds: float) -> LayerGain:
    judged = check(cell, _LUCK)
    if judged.problems:
        return LayerGain(cell, names, calls, judged.training, problems=judged.problems)
    taking = contenders(cell, inputs(cell), "forward+backward")
    figures = by_ours({name: taking[name] for name in (OURS, TORCH)}, seconds, judged.training)
    return LayerGain(cell, names, calls, judged.training, figures)


def _problem(base: nn.Module, network: nn.Module, inputs: Any) -> str | None:
    """Why a changed model gets no figures; None if it computes the same."""
    try:
        problems = networks.errors(base, network, inputs)[1]
    except (RuntimeError, TypeError) as error:  # a dtype is written into the model
        return f"it cannot be compared in float64: {error}"
    return "; ".join(problems) or None


def _whole(
    base: nn.Module, built: dict[str, nn.Module], inputs: Any, seconds: float, tell: Advance
) -> tuple[dict[str, Figures], dict[str, int]]:
    """Time the model and what it was made into, and count what they keep."""
    every = {AS_IS: base, **built}
    counted = {way: saved(network, inputs) for way, network in every.items()}
    whole: dict[str, Figures] = {}
    makes: dict[str, Callable[[nn.Module, Any], Call]] = {
        TRAINING: networks.training_step,
        EVALUATION: networks.evaluation,
    }
    for done, (operation, make) in enumerate(makes.items()):
        tell("the whole model", done + 1, 3)
        with torch.set_grad_enabled(operation == TRAINING):
            whole[operation] = by_first({way: make(network, inputs) for way, network in every.items()}, seconds)
    return whole, {way: one.input + one.extra for way, one in counted.items()}


def _pair(found: Figures, way: str) -> tuple[str, str]:
    return time(found.seconds[way]), times(found.ratios[way])


def _listed(names: tuple[str, ...]) -> str:
    first = names[0] or "(the model)"
    first = first if len(first) <= _LONGEST else f"…{first[-_LONGEST:]}"
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _article(operation: str) -> str:
    return f"{'an' if operation == EVALUATION else 'a'} {operation}"
