"""The gate: a cell whose results are not right, or depend on the number of threads, gets no figures.

Everything a training step and an evaluation give is compared with the closed form in float64. Ours may err no more than
torch.nn errs in the same cell, neither at worst nor in the root of the mean square: in bfloat16, the rounding of the
largest values hides what is wrong with the others. Two allowances: a tenth, since which of two roundings is luckier is
chance, and one unit in the last place, of the largest value, which is what rounding the exact result may cost, and for
the root of the mean square that of float32, which the kernels compute in.

Where a ReLU's argument is within rounding of zero, on which side it lies is chance, and both gradients are right. There
the exact gradients are those of the side that the contender's own result says it took.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import kernels, layers
from batchnorm.benchmark import memory, policies, whole
from batchnorm.benchmark.grid import Cell, Fused, threads
from batchnorm.benchmark.peers import OURS, TORCH, Inputs, inputs, layer, module
from batchnorm.benchmark.results import Check
from batchnorm.kernels import reference
from batchnorm.kernels.choice import record

ALLOWED = 1.1
_ARGUMENT = ", before ReLU"
_UNDECIDED = 8  # roundings of a ReLU's argument, which its terms' sizes bound
_CHUNK = 2**18  # values that the oracle takes at a time: its temporaries stay in the cache
_HARD = 1e4  # a mean so many deviations from zero costs the naive formula all digits
_HARD_UP_TO = 16 * 2**20  # bytes
_MOMENTUM, _EPS = 0.1, 1e-5


def check(cell: Cell) -> Check:
    """Judge one cell; never raises for what a kernel does: an exception is a problem, too."""
    before = torch.get_num_threads()
    try:
        checks = {"layer": _check_layer, "chain": _check_chain, "model": whole.check, "policy": policies.check}
        return replace(checks[cell.kind](cell), cell=cell)
    except Exception as error:
        return Check(cell, problems=(f"{type(error).__name__}: {error}",))
    finally:
        torch.set_num_threads(before)


def _check_layer(cell: Cell) -> Check:
    given = inputs(cell)
    alone = observe(layer(layers, given, cell.fused), given, 1)
    built = {OURS: layer(layers, given, cell.fused), TORCH: layer(nn, given, cell.fused)}
    many = {name: observe(one, given, threads()) for name, one in built.items()}
    training, evaluation, problems = _ran(layer(layers, given, cell.fused), given)
    problems += [
        f"{name} differs between 1 and {threads()} threads"
        for name in alone
        if not _same(alone[name], many[OURS][name])
    ]
    errors, worse = _errors(many, given, cell.fused)
    if cell.dtype == "float32" and cell.bytes <= _HARD_UP_TO:
        hard = inputs(cell, offset=_HARD)
        sources = ((OURS, layers), (TORCH, nn))
        both = {name: observe(layer(source, hard, cell.fused), hard, threads()) for name, source in sources}
        hard_errors, hard_worse = _errors(both, hard, cell.fused)
        errors |= {f"{name}, mean = 1e4 deviations": pair for name, pair in hard_errors.items()}
        worse += [f"{problem}, where the mean is 1e4 deviations" for problem in hard_worse]
    saved = {name: memory.saved(one, *given.arguments) for name, one in built.items()}
    return Check(cell, training, evaluation, errors, saved, tuple(problems + worse))


def _check_chain(cell: Cell) -> Check:
    """Check the layer alone at this shape, since convolutions round as they please, and the kernel in the chain."""
    alone = _check_layer(Cell(cell.shape, cell.dtype, cell.layout))
    given = inputs(cell)
    chain = module(layers, cell, given)
    record.forward = record.backward = None
    chain(given.x).backward(given.grad_y)
    problems = alone.problems
    if kernels.ran() != _expected(alone.training):
        problems += (f"kernel {kernels.ran()} ran in the chain, and {alone.training!r} in the layer alone",)
    return Check(cell, alone.training, alone.evaluation, alone.errors, alone.saved, problems)


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
    alone = getattr(one, "activation", None) is None
    problems = []
    kernel = {mode: kernels.which(given.x, mode, *others, fused=not alone) for mode in (True, False)}
    record.forward = record.backward = None
    one.train()(*given.arguments).sum().backward()
    for t in given.arguments:
        t.grad = None
    if kernels.ran() != _expected(kernel[True]):
        problems.append(f"kernel {kernel[True]!r} was announced for training, and {kernels.ran()} ran")
    with torch.no_grad():
        one.eval()(*given.arguments)
    if kernels.ran().forward != kernel[False]:
        problems.append(f"kernel {kernel[False]!r} was announced for evaluation, and {kernels.ran().forward!r} ran")
    return kernel[True], kernel[False], problems


def _expected(kernel: str) -> tuple[str, str | None]:
    """What a forward and a backward through a kernel record. ATen's backward, which is torch's own, leaves nothing."""
    return kernel, kernel if kernel == "numba" else None


# --- the oracle -------------------------------------------------------------------------------------------------------


def oracle(given: Inputs, channels: slice, fused: Fused, y: Tensor) -> dict[str, Tensor]:
    """What `observe` should give for some of the channels, in float64; a ReLU's argument, too, after its result's name.

    Args:
        given: the inputs.
        channels: which.
        fused: what the layer does besides.
        y: what a contender found for `y`, all channels.
    """
    x, grad_y = (t.detach()[:, channels].double() for t in (given.x, given.grad_y))
    weight, bias, running_mean, running_var = (
        t[channels].double() for t in (given.weight, given.bias, given.running_mean, given.running_var)
    )
    z, mean, var = reference.train_forward(x, weight, bias, _EPS)
    evaluated = reference.inference(x, running_mean, running_var, weight, bias, _EPS)
    results: dict[str, Tensor] = {}
    if fused != "bn":
        per_channel = (slice(None), *(None,) * (x.dim() - 2))
        size = (z - bias[per_channel]).abs_() + bias.abs()[per_channel]
        if given.residual is not None:
            residual = given.residual.detach()[:, channels].double()
            z, evaluated, size = z + residual, evaluated + residual, size + residual.abs()
        undecided = z.abs() <= _UNDECIDED * torch.finfo(y.dtype).eps * size
        grad_y = grad_y * torch.where(undecided, y[:, channels] > 0, z > 0)
        results = {"y" + _ARGUMENT: z, "evaluation" + _ARGUMENT: evaluated}
        z, evaluated = z.relu(), evaluated.relu()
        if given.residual is not None:
            results["dresidual"] = grad_y
    dx, dweight, dbias = reference.train_backward(grad_y, x, weight, mean, var, _EPS)
    count = x.numel() // x.shape[1]
    moved = reference.running_update(running_mean, running_var, mean, var, count, _MOMENTUM)
    return results | {
        "evaluation": evaluated, "y": z,
        "dx": dx, "dweight": dweight, "dbias": dbias, "running_mean": moved[0], "running_var": moved[1],
    }  # fmt: skip


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
    found: dict[str, dict[str, Tensor]], given: Inputs, fused: Fused
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """The errors, ours and torch.nn's, of every result, and which of ours are too large."""
    gathered = {name: {whose: _Error() for whose in (OURS, TORCH, "exact")} for name in found[OURS]}
    channels = given.x.shape[1]
    step = max(1, _CHUNK * channels // given.x.numel())
    for start in range(0, channels, step):
        part = slice(start, start + step)
        exact = {OURS: oracle(given, part, fused, found[OURS]["y"])}
        exact[TORCH] = exact[OURS] if fused == "bn" else oracle(given, part, fused, found[TORCH]["y"])
        for name in gathered:
            gathered[name]["exact"].add(exact[OURS].get(name + _ARGUMENT, exact[OURS][name]))  # what has been rounded
            for whose in (OURS, TORCH):
                got = found[whose][name].detach()
                gathered[name][whose].add((got[:, part] if got.dim() > 1 else got[part]) - exact[whose][name])
    errors, problems = {}, []
    for name, sums in gathered.items():
        units = torch.finfo(found[OURS][name].dtype).eps, torch.finfo(torch.float32).eps
        kinds = ("", ", root mean square")
        for kind, unit, *pair, size in zip(kinds, units, *(one.values() for one in sums.values()), strict=True):
            ours, theirs = errors[name + kind] = (pair[0], pair[1])
            allowed = max(ALLOWED * theirs, unit * size)
            if not ours <= allowed:  # nan fails, too
                words = f"{name} is off by {ours:.2g}{kind}, and torch.nn's by {theirs:.2g} (allowed: {allowed:.2g})"
                problems.append(words)
    return errors, problems
