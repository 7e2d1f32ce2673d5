"""The gate: a cell whose results are not right, or depend on the number of threads, gets no figures.

Everything a training step and an evaluation give is compared with the closed form in float64. Ours may err no more than
torch.nn errs in the same cell, neither at worst nor in the root of the mean square: in bfloat16, the rounding of the
largest values hides what is wrong with the others. Two allowances: a tenth, since which of two roundings is luckier is
chance, and one unit in the last place, of the largest value, which is what rounding the exact result may cost, and for
the root of the mean square that of float32, which the kernels compute in; a few units where an activation has an
exponential.

Where an activation's argument is within rounding of a kink, on which side it lies is chance, and both gradients are
right. There the gradient of y is zero, so that the side does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from batchnorm import kernels, layers
from batchnorm.activations import applied
from batchnorm.benchmark.cells import Cell, Operation
from batchnorm.benchmark.contenders import OURS, TORCH, Inputs, inputs, layer
from batchnorm.benchmark.memory import Saved, saved
from batchnorm.kernels import reference
from batchnorm.kernels.choice import record

C = TypeVar("C", bound=Cell)

ALLOWED = 1.1
_ARGUMENT = ", before the activation"
_SMOOTH = 4  # units in the last place that an exponential within an activation may cost
_KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
_UNDECIDED = 8  # roundings of an activation's argument, which its terms' sizes bound
_CHUNK = 2**18  # values that the oracle takes at a time: its temporaries stay in the cache
_HARD = 1e4  # a mean so many deviations from zero costs the naive formula all digits
_HARD_UP_TO = 16 * 2**20  # bytes
_MOMENTUM, _EPS = 0.1, 1e-5


@dataclass(frozen=True)
class Check(Generic[C]):
    """A cell's verdict.

    Attributes:
        training, evaluation: the kernels that ran.
        errors: the largest errors against float64, ours and torch.nn's, for each result.
        saved: for each contender, what a training forward keeps.
        problems: why there are no figures; none if it passed.
    """

    cell: C
    training: str = ""
    evaluation: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    saved: dict[str, Saved] = field(default_factory=dict, hash=False)
    problems: tuple[str, ...] = ()

    def kernel(self, operation: Operation) -> str:
        """The kernel that an operation ran through."""
        return self.evaluation if operation == "evaluation" else self.training


def check(cell: C, allowed: float = ALLOWED) -> Check[C]:
    """Judge a layer; never raises for what a kernel does: an exception is a problem, too.

    Args:
        cell: what it is called with.
        allowed: how many times as far off as torch.nn ours may be.
    """
    return guarded(partial(_check, allowed=allowed), cell)


def guarded(judge: Callable[[C], Check[C]], cell: C) -> Check[C]:
    """Judge a cell; what is raised becomes a problem, and the number of threads is put back."""
    before = torch.get_num_threads()
    try:
        return judge(cell)
    except Exception as error:
        return Check(cell, problems=(f"{type(error).__name__}: {error}",))
    finally:
        torch.set_num_threads(before)


def _check(cell: C, allowed: float) -> Check[C]:
    threads = max(2, torch.get_num_threads())
    given = settled(inputs(cell), cell)
    alone = observe(layer(layers, given, cell), given, 1)
    built = {OURS: layer(layers, given, cell), TORCH: layer(nn, given, cell)}
    many = {name: observe(one, given, threads) for name, one in built.items()}
    training, evaluation, problems = _ran(layer(layers, given, cell), given)
    problems += [
        f"{name} differs between 1 and {threads} threads" for name in alone if not _same(alone[name], many[OURS][name])
    ]
    errors, worse = _errors(many, given, cell, allowed)
    if cell.dtype == "float32" and cell.bytes <= _HARD_UP_TO:
        hard = settled(inputs(cell, offset=_HARD), cell)
        both = {name: observe(layer(one, hard, cell), hard, threads) for name, one in ((OURS, layers), (TORCH, nn))}
        hard_errors, hard_worse = _errors(both, hard, cell, allowed)
        errors |= {f"{name}, mean = 1e4 deviations": pair for name, pair in hard_errors.items()}
        worse += [f"{problem}, where the mean is 1e4 deviations" for problem in hard_worse]
    kept = {name: saved(one, given.arguments) for name, one in built.items()}
    return Check(cell, training, evaluation, errors, kept, tuple(problems + worse))


def observe(one: nn.Module, given: Inputs, with_threads: int) -> dict[str, Tensor]:
    """Evaluate, then take one training step on a fresh layer; everything that comes of it."""
    torch.set_num_threads(with_threads)
    arguments = [t.detach().requires_grad_() for t in given.arguments]
    with torch.no_grad():
        evaluated = one.eval()(*arguments)
    y = one.train()(*arguments)
    y.backward(given.grad_y)
    results: dict[str, Tensor | None] = {"evaluation": evaluated, "y": y.detach()}
    results |= {f"d{name}": t.grad for name, t in zip(("x", "residual"), arguments, strict=False)}
    results |= {f"d{name}": parameter.grad for name, parameter in one.named_parameters()}
    results |= {name: buffer for name, buffer in one.named_buffers() if buffer.is_floating_point()}
    return {name: _there(t) for name, t in results.items()}


def _there(t: Tensor | None) -> Tensor:
    if t is None:
        raise RuntimeError("a gradient or a statistic is missing")
    return t


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def _ran(one: nn.Module, given: Inputs) -> tuple[str, str, list[str]]:
    """The kernels that training and evaluation ran through, and where they are not those that were announced."""
    others: list[Any] = [one.weight, one.bias, one.running_mean, one.running_var, given.residual]
    fused = getattr(one, "activation", None) is not None or given.residual is not None
    problems = []
    kernel = {mode: kernels.which(given.x, mode, *others, fused=fused) for mode in (True, False)}
    record.forward = record.backward = None
    one.train()(*given.arguments).sum().backward()
    for t in given.arguments:
        t.grad = None
    if kernels.ran() != expected(kernel[True]):
        problems.append(f"kernel {kernel[True]!r} was announced for training, and {kernels.ran()} ran")
    with torch.no_grad():
        one.eval()(*given.arguments)
    if kernels.ran().forward != kernel[False]:
        problems.append(f"kernel {kernel[False]!r} was announced for evaluation, and {kernels.ran().forward!r} ran")
    return kernel[True], kernel[False], problems


def expected(kernel: str) -> tuple[str, str | None]:
    """What a forward and a backward through a kernel record. ATen's backward, which is torch's own, leaves nothing."""
    return kernel, kernel if kernel == "numba" else None


# --- the oracle -------------------------------------------------------------------------------------------------------


def settled(given: Inputs, cell: Cell) -> Inputs:
    """Clear the gradient of y wherever an activation's argument is within rounding of a kink."""
    kinks = () if cell.activation is None else _KINKS.get(cell.activation.name, ())
    if not kinks:
        return given
    grad_y = given.grad_y.clone()
    for part in _parts(given.x):
        z, size, _, _ = _argument(given, part)
        near = torch.stack([(z - kink).abs() for kink in kinks]).amin(0)
        grad_y[:, part].masked_fill_(near <= _UNDECIDED * torch.finfo(given.x.dtype).eps * size, 0)
    return replace(given, grad_y=grad_y)


def oracle(given: Inputs, part: slice, cell: Cell) -> dict[str, Tensor]:
    """What `observe` should give for some of the channels, in float64; an activation's argument, too, by a longer name.

    Args:
        given: the inputs.
        part: which channels.
        cell: says what the layer does besides.
    """
    z, _, mean, var = _argument(given, part)
    x, grad_y = (t.detach()[:, part].double() for t in (given.x, given.grad_y))
    weight, bias, running_mean, running_var = _vectors(given, part)
    evaluated = reference.inference(x, running_mean, running_var, weight, bias, _EPS)
    results: dict[str, Tensor] = {}
    if given.residual is not None:
        evaluated = evaluated + given.residual.detach()[:, part].double()
    if cell.activation is not None:
        results = {"y" + _ARGUMENT: z, "evaluation" + _ARGUMENT: evaluated}
        leaf = z.clone().requires_grad_()
        with torch.enable_grad():
            y = applied(cell.activation, leaf)
        (grad_y,) = torch.autograd.grad(y, leaf, grad_y)
        z, evaluated = y.detach(), applied(cell.activation, evaluated)
    if given.residual is not None:
        results["dresidual"] = grad_y
    dx, dweight, dbias = reference.train_backward(grad_y, x, weight, mean, var, _EPS)
    moved = reference.running_update(running_mean, running_var, mean, var, x.numel() // x.shape[1], _MOMENTUM)
    return results | {
        "evaluation": evaluated, "y": z,
        "dx": dx, "dweight": dweight, "dbias": dbias, "running_mean": moved[0], "running_var": moved[1],
    }  # fmt: skip


def _argument(given: Inputs, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An activation's argument for some of the channels, what bounds its terms, and the moments, in float64."""
    weight, bias, _, _ = _vectors(given, part)
    z, mean, var = reference.train_forward(given.x.detach()[:, part].double(), weight, bias, _EPS)
    per_channel = bias.reshape(-1, *(1,) * (z.dim() - 2))
    size = (z - per_channel).abs_() + per_channel.abs()
    if given.residual is not None:
        residual = given.residual.detach()[:, part].double()
        z, size = z + residual, size + residual.abs()
    return z, size, mean, var


def _vectors(given: Inputs, part: slice) -> tuple[Tensor, ...]:
    return tuple(t[part].double() for t in (given.weight, given.bias, given.running_mean, given.running_var))


def _parts(x: Tensor) -> Iterator[slice]:
    """The channels, some at a time."""
    channels = x.shape[1]
    step = max(1, _CHUNK * channels // x.numel())
    return (slice(start, start + step) for start in range(0, channels, step))


class _Error:
    """What differs from the exact values, gathered part by part."""

    def __init__(self) -> None:
        self.largest = self.squares = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def add(self, differences: Tensor) -> None:
        self.largest = torch.maximum(self.largest, differences.abs().max())  # which keeps nan
        self.squares = self.squares + differences.square().sum()
        self.count += differences.numel()

    def values(self) -> tuple[float, float]:
        """The largest, and the root of the mean square."""
        return float(self.largest), float((self.squares / self.count).sqrt())


def _errors(
    found: dict[str, dict[str, Tensor]], given: Inputs, cell: Cell, allowed: float
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """The errors, ours and torch.nn's, of every result, and which of ours are too large."""
    gathered = {name: {whose: _Error() for whose in (OURS, TORCH, "exact")} for name in found[OURS]}
    for part in _parts(given.x):
        exact = oracle(given, part, cell)
        for name in gathered:
            gathered[name]["exact"].add(exact.get(name + _ARGUMENT, exact[name]))  # what has been rounded
            for whose in (OURS, TORCH):
                got = found[whose][name].detach()
                gathered[name][whose].add((got[:, part] if got.dim() > 1 else got[part]) - exact[name])
    errors, problems = {}, []
    steps = 1 if cell.activation is None or cell.activation.name in _KINKS else _SMOOTH
    for name, sums in gathered.items():
        units = [steps * torch.finfo(dtype).eps for dtype in (found[OURS][name].dtype, torch.float32)]
        kinds = ("", ", root mean square")
        for kind, unit, *pair, size in zip(kinds, units, *(one.values() for one in sums.values()), strict=True):
            ours, theirs = errors[name + kind] = (pair[0], pair[1])
            most = max(allowed * theirs, unit * size)
            if not ours <= most:  # nan fails, too
                words = f"{name} is off by {ours:.2g}{kind}, and torch.nn's by {theirs:.2g} (allowed: {most:.2g})"
                problems.append(words)
    return errors, problems
