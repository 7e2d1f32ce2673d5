"""What policies and masks cost: our layer with each, against our layer without, in training steps.

Run by torchrun, this module is two processes that time ``Sync`` against the same layer alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm import kernels, layers
from batchnorm.benchmark.cells import Operation
from batchnorm.benchmark.contenders import OURS, TORCH, Inputs, call, inputs, layer
from batchnorm.benchmark.gate import Check
from batchnorm.benchmark.timing import Call, measured, ratio, taking_turns
from batchnorm.kernels import reference
from batchnorm.statistics import Ghost, Policy, Renorm, Sync
from benchmarks import results
from benchmarks.grid import Cell
from benchmarks.results import Timing

GHOST, RENORM, MASKED, SYNC = "ghost", "renorm", "masked", "Sync"
COUNTED = 0.8  # of the positions, drawn at random, which is harder than padding at the end
REGIME = "two processes"
_PARTS = 4  # ghosts in a batch
_CHECKED = 8  # samples of a cell that are checked; what follows does the same with more
_LIMITS = 1.5, 0.5  # of renormalization, narrow enough to be reached
_ALLOWED = 3e-6, 1e-2  # relative errors against float64, in float32 and in bfloat16
_ROUNDS = 30


def contenders(cell: Cell, given: Inputs, operation: Operation) -> dict[str, Call]:
    """Give training steps of the plain layer, ours first, and of every other."""
    ghost, renorm = Ghost(-(-cell.shape[0] // _PARTS)), Renorm(*_LIMITS, schedule=None)
    mask = _mask(cell.shape)
    calls = {name: call(layer(source, given, cell), given, operation) for name, source in _SOURCES}
    calls[GHOST] = _step(_with(cell, given, ghost), given)
    calls[RENORM] = _step(_with(cell, given, renorm), given)
    calls[MASKED] = _step(_with(cell, given, None), given, mask)
    return calls


def check(cell: Cell) -> Check[Cell]:
    """Compare all of them with plain PyTorch in float64, on the first samples of the cell."""
    cell = replace(cell, shape=(min(cell.shape[0], _CHECKED), *cell.shape[1:]))
    given, problems, errors = inputs(cell), [], {}
    samples = cell.shape[0]
    size = -(-samples // _PARTS)
    mask = _mask(cell.shape)
    weights = mask.reshape(samples, -1).double()

    def correction(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        sigma = (given.running_var.double() + 1e-5).sqrt()
        r, d = (var + 1e-5).sqrt() / sigma, (mean - given.running_mean.double()) / sigma
        return r.clamp(1 / _LIMITS[0], _LIMITS[0]), d.clamp(-_LIMITS[1], _LIMITS[1])

    exact: dict[str, tuple[Policy | None, int, Tensor | None, Any]] = {
        GHOST: (Ghost(size), size, None, None),
        RENORM: (Renorm(*_LIMITS, schedule=None), samples, None, correction),
        MASKED: (None, samples, weights, None),
    }
    kernel = ""
    for name, (policy, parts, counted, renorm) in exact.items():
        x = given.x.detach().double().requires_grad_()
        right, _ = reference.sets_forward(x, given.weight.double(), given.bias.double(), 1e-5, parts, counted, renorm)
        right.backward(given.grad_y.double())
        built, own = _with(cell, given, policy), given.x.detach().requires_grad_()
        y = built(own) if counted is None else built(own, mask=mask)
        y.backward(given.grad_y)
        kernel = str(kernels.ran().forward)
        if kernels.ran() != ("numba", "numba"):
            problems.append(f"{name}: kernels {kernels.ran()} ran, not the Numba kernel")
        for what, found, wanted in (("y", y, right), ("dx", own.grad, x.grad)):
            assert found is not None
            assert wanted is not None
            error = float((found.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())
            errors[f"{name}, {what}"] = error, 0.0
            if not error <= _ALLOWED[cell.dtype == "bfloat16"]:
                problems.append(f"{name}: {what} is off by {error:.2g} of its largest value")
    return Check(cell, kernel, "", errors, problems=tuple(problems))


_SOURCES = ((OURS, layers), (TORCH, nn))


def _with(cell: Cell, given: Inputs, policy: Policy | None) -> Any:
    built: Any = layer(layers, given, cell)
    built.statistics = policy
    return built


def _mask(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(2)) < COUNTED


def _step(built: nn.Module, given: Inputs, mask: Tensor | None = None) -> Call:
    leaves = [given.x, *built.parameters()]
    more = {} if mask is None else {"mask": mask}

    def step() -> None:
        built(given.x, **more).backward(given.grad_y)
        for leaf in leaves:
            leaf.grad = None

    return step


# --- two processes ---


def time_sync(cell: Cell) -> Timing:
    """Time a layer alone and with ``Sync``; every process calls it, and all take the same number of steps."""
    given = inputs(cell)
    calls = {OURS: _step(_with(cell, given, None), given), SYNC: _step(_with(cell, given, Sync()), given)}
    samples = taking_turns(calls, _ROUNDS, before=dist.barrier)
    found = {name: measured(values) for name, values in samples.items()}
    return Timing(
        cell, 1, REGIME, "forward+backward",
        seconds={name: one.seconds for name, one in found.items()},
        spread={name: one.spread for name, one in found.items()},
        ratios={SYNC: ratio(samples[SYNC], samples[OURS])},
        rounds=_ROUNDS,
    )  # fmt: skip


def main(cells: list[Cell], out: Callable[[str], object]) -> None:
    """Time every cell, and let the first process tell."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    for cell in cells:
        timing = time_sync(cell)
        if dist.get_rank() == 0:
            out(json.dumps(asdict(timing)) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    with open(sys.argv[1], "a", encoding="utf-8") as file:
        main([results.cell(entry) for entry in json.loads(sys.argv[2])], file.write)
