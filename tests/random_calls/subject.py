"""What a case stands for: tensors, a callable, and the same problem for the oracle."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.functional import batch_norm
from batchnorm.statistics import Accumulated, Batch, Ghost, Policy, Renorm, Sync, Warmup, resolve

from .cases import Case
from .oracle import Buffers, Problem
from .tensors import Memory, expanded

NARROW = (torch.float16, torch.bfloat16)
_LAYERS = {2: batchnorm.BatchNorm1d, 3: batchnorm.BatchNorm1d, 4: batchnorm.BatchNorm2d, 5: batchnorm.BatchNorm3d}
_POLICIES = {
    "Accumulated": Accumulated, "Batch": Batch, "Ghost": Ghost, "Renorm": Renorm, "Sync": Sync, "Warmup": Warmup,
}  # fmt: skip


def policy_of(case: Case) -> Policy | None:
    """The policy that a case names."""
    return eval(case.policy, {"__builtins__": {}}, _POLICIES) if case.policy else None


class Subject:
    """The parameters and buffers of a case, and what one batch of it needs."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.memory = Memory()
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.random = torch.Generator().manual_seed(case.seed)
        self.policy = policy_of(case)
        C = case.channels
        wide = torch.float32 if self.dtype in NARROW else self.dtype
        sign = torch.where(self._uniform(C) < 0.3, -1.0, 1.0)
        # Multiples of 1/64, which every dtype can hold.
        self.weight = self._vector(case.weight, sign * ((0.5 + self._uniform(C)) * 64).round() / 64, "weight")
        self.bias = self._vector(case.bias, ((2 * self._uniform(C) - 1) * 64).round() / 64, "bias")
        self.running: list[Tensor | None] = [None, None]
        if case.buffers != "none":
            kept = torch.float64 if case.buffers == "double" else wide
            layout = {"strided": "gaps", "odd": "odd"}.get(case.buffers, "contiguous")
            for i, values in enumerate((self._normal(C), 0.3 + self._uniform(C))):
                name = ("running_mean", "running_var")[i]
                self.running[i] = self.memory.place(values, kept, layout, name, writable=True)
        zero = torch.zeros((), dtype=torch.int64)
        self.batches = self.memory.place(zero, torch.int64, name="counter", writable=True) if case.counted else None
        self.state = None if self.policy is None else self.policy.state(C)
        self.layer = self._layer() if case.call == "layer" else None

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random, dtype=torch.float64)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def _vector(self, kind: str, values: Tensor, name: str) -> Tensor | None:
        if kind == "none":
            return None
        dtype = torch.float32 if kind == "wide" and self.dtype in NARROW else self.dtype
        layout = {"strided": "gaps", "neg": "neg"}.get(kind, "contiguous")
        writable = self.case.between.startswith((name, "layer", "moved"))
        return self.memory.place(values, dtype, layout, name, writable).requires_grad_(name[0] in self.case.wanted)

    def _layer(self) -> nn.Module:
        case = self.case
        layer = _LAYERS[len(case.shape)](
            case.channels, case.eps, case.momentum, track_running_stats=case.buffers != "none",
            activation=case.activation, inplace=case.inplace, statistics=self.policy,
        )  # fmt: skip
        for name, t in (("weight", self.weight), ("bias", self.bias)):
            layer._parameters[name] = None if t is None else nn.Parameter(t.detach(), requires_grad=t.requires_grad)
            setattr(self, name, layer._parameters[name])
        if case.buffers != "none":
            layer._buffers.update(running_mean=self.running[0], running_var=self.running[1])
            layer._buffers["num_batches_tracked"] = self.batches
        if self.policy is not None and self.policy.buffer is not None:
            self.state = getattr(layer, self.policy.buffer)
        return layer.train(case.training)

    # --- one batch ---

    def values(self) -> Tensor:
        """Of x: channels with means and deviations of their own."""
        case, C = self.case, self.case.channels
        per_channel = (1, C, *(1,) * (len(case.shape) - 2))
        deviation = case.scale * (0.25 + 2 * self._uniform(*per_channel))
        x = case.scale * case.ratio * self._normal(*per_channel) + deviation * self._normal(*case.shape)
        if case.special == "constant":
            x[:, ::2] = 0.1 * case.scale * case.ratio
        elif case.special and x.numel():
            x[(-1, 0, *(-1,) * len(case.shape[2:]))] = {"nan": math.nan, "inf": math.inf}[case.special]
        return x

    def mask(self) -> Tensor | None:
        """Which positions count."""
        case = self.case
        shape = (case.shape[0], *case.shape[2:])
        dtype = getattr(torch, case.mask_dtype)
        if not case.mask or 0 in shape:
            return None
        made = torch.ones(shape, dtype=torch.float64)
        if case.mask in ("some", "weights", "small_weights"):
            made = (self._uniform(*shape) < 0.6).double()
        elif case.mask == "few":
            made = (self._uniform(*shape) < 0.1).double()
        elif case.mask == "nothing":
            made = torch.zeros(shape, dtype=torch.float64)
        elif case.mask == "sample":
            made[-1] = 0
        elif case.mask == "first":
            made[: -(-shape[0] // 2)] = 0
        elif case.mask == "broadcast":
            made = (self._uniform(1, *shape[1:]) < 0.7).double()
        elif case.mask == "broadcast_batch":
            made = (self._uniform(shape[0], *(1,) * (len(shape) - 1)) < 0.7).double()
        if "weights" in case.mask:
            dtype = torch.float32 if dtype == torch.bool else dtype
            made = made * (self._uniform(*shape) * (4 if case.mask == "weights" else 0.01)).to(dtype).double()
        return self.memory.place(made, dtype, name="mask")

    def leaf(self, values: Tensor, layout: str, name: str, wanted: bool, poison: Tensor | None = None) -> Tensor:
        """The values as the user's tensor; nan where nothing counts."""
        values = values if poison is None else torch.where(poison, math.nan, values)
        small = expanded(values, layout)
        if small is not None:
            made = self.memory.place(small, self.dtype, name=name).expand(values.shape)
        else:
            writable = self.case.inplace or self.case.between.startswith(name)
            made = self.memory.place(values, self.dtype, layout, name, writable)
        return made.detach().requires_grad_(wanted)

    def call(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Any) -> Tensor:
        """Ours."""
        case = self.case
        if self.layer is not None:
            y: Tensor = self.layer(x, residual, mask)
            return y
        return batch_norm(
            x, *self.running, weight, bias, case.training, case.momentum, case.eps, num_batches_tracked=self.batches,
            activation=case.activation, residual=residual, inplace=case.inplace, mask=mask,
            statistics=self.policy, state=self.state,
        )  # fmt: skip

    def insisting(self) -> Any:
        """The kernel that the case asks for."""
        return kernels.using("numba") if self.case.kernel == "numba" else copy.copy(_NOTHING)

    def before(self) -> Buffers:
        """The buffers as they are, in float64."""
        mean, var = (None if t is None else t.double().clone() for t in self.running)
        batches = None if self.batches is None else int(self.batches)
        return Buffers(mean, var, batches, None if self.state is None else self.state.double().clone())

    def problem(self, before: Buffers, mask: Tensor | None) -> Problem:
        """The same for the oracle."""
        case, (_, ghost, renorm, _, _) = self.case, resolve(self.policy)
        size = 0
        if case.training:
            size = max(case.shape[0], 1) if ghost is None else min(ghost.size, max(case.shape[0], 1))
        weights = None
        if mask is not None:
            shape = (case.shape[0], *case.shape[2:])
            weights = mask.double().expand(shape).reshape(case.shape[0], math.prod(case.shape[2:]))
        limits = None
        if renorm is not None and case.training:
            limits = renorm.limits(0.0 if before.state is None else float(before.state))
        return Problem(case.eps, size, before.mean, before.var, weights, limits, case.activation)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


_NOTHING = _Nothing()


def torchs(case: Case, running: list[Tensor | None]) -> Callable[..., Tensor]:
    """The same by torch's own operators, where torch has it: no mask, no policy."""
    from batchnorm.activations import Activation, applied

    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        dtypes = {t.dtype for t in (weight, bias) if t is not None}
        mixed = x.dtype in NARROW and (running[0] is not None or torch.float32 in dtypes)
        own = torch.float32 if mixed else x.dtype
        weight, bias = (t if t is None or t.dtype == own else t.to(own) for t in (weight, bias))
        mean, var = (None if t is None else t.to(own, copy=True) for t in running)
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, case.training, 0.1, case.eps)
        y = y if residual is None else y + residual
        return applied(None if case.activation is None else Activation(*case.activation), y)

    return call
