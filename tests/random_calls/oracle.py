"""What is right, in float64 by plain formulas, and how far from it rounding may lead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INF = math.inf


# --- activations: (kinks and the jump of the slope there, bound on the second derivative elsewhere) ---


def value(activation: tuple[str, float] | None, z: Tensor) -> Tensor:
    """The activation by its formula; nan stays nan."""
    if activation is None:
        return z
    name, p = activation
    if name == "relu":
        return torch.where(z > 0, z, torch.where(z.isnan(), z, 0.0))
    if name == "leaky_relu":
        return torch.where(z > 0, z, p * z)
    if name == "relu6":
        return torch.where(z > 0, torch.where(z < 6, z, torch.where(z.isnan(), z, 6.0)), torch.where(z.isnan(), z, 0.0))
    if name == "silu":
        return z * torch.sigmoid(z)
    if name == "hardswish":
        return torch.where(z <= -3, 0.0, torch.where(z < 3, z * (z + 3) / 6, z))
    if name == "gelu":
        return 0.5 * z * torch.erfc(-z / math.sqrt(2))
    if name == "gelu_tanh":
        return z * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
    if name == "elu":
        return torch.where(z > 0, z, p * torch.expm1(torch.where(z > 0, 0.0, z)))
    raise KeyError(name)


def bends(activation: tuple[str, float] | None) -> tuple[tuple[tuple[float, float], ...], float]:
    """((where the slope jumps, how far), …) and a bound on the second derivative elsewhere."""
    if activation is None:
        return (), 0.0
    name, p = activation
    return {
        "relu": (((0.0, 1.0),), 0.0),
        "leaky_relu": (((0.0, abs(1 - p)),), 0.0),
        "relu6": (((0.0, 1.0), (6.0, 1.0)), 0.0),
        "silu": ((), 0.5),
        "hardswish": (((-3.0, 0.5), (3.0, 0.5)), 1 / 3),
        "gelu": ((), 0.8),
        "gelu_tanh": ((), 0.9),
        "elu": (((0.0, abs(1 - p)),), abs(p)),
    }[name]


# --- the problem ---


@dataclass
class Problem:
    """All that decides the result besides x, weight, bias and residual."""

    eps: float
    size: int = 0  # samples of a set; 0 for given moments
    mean: Tensor | None = None  # running statistics
    var: Tensor | None = None
    weights: Tensor | None = None  # of positions, (N, space)
    limits: tuple[float, float] | None = None  # of renormalization
    activation: tuple[str, float] | None = None


class Set(NamedTuple):
    """What a set of samples gave: count, and (C,) each."""

    count: Tensor
    mean: Tensor
    var: Tensor
    r: Tensor
    d: Tensor


class Found(NamedTuple):
    """y, and what it came from, each (N, C, space) or one a set."""

    y: Tensor
    z: Tensor
    normalized: Tensor  # (x − mean) / deviation
    sets: list[Set]


def forward(p: Problem, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Found:
    """Ioffe & Szegedy's Algorithm 1 over each set, with weights, renormalization, residual and activation."""
    N, C = x.shape[:2]
    flat = x.reshape(N, C, math.prod(x.shape[2:]))
    w = flat.new_ones((N, 1, flat.shape[2])) if p.weights is None else p.weights.reshape(N, 1, flat.shape[2])
    flat = torch.where(w > 0, flat, 0.0)
    one, zero = flat.new_ones(C), flat.new_zeros(C)
    sets, parts = [], []
    for first in range(0, N, p.size or max(N, 1)):
        part, own = flat[first : first + (p.size or N)], w[first : first + (p.size or N)]
        r, d = one, zero
        if p.size == 0:
            assert p.mean is not None
            assert p.var is not None
            count, mean, var, centred = own.sum(), p.mean, p.var, part - p.mean[:, None]
        else:
            count = own.sum()
            share = torch.where(count > 0, 1 / torch.where(count > 0, count, 1.0), 0.0)
            mean = (own * part).sum((0, 2)) * share
            centred = part - mean[:, None]
            rest = (own * centred).sum((0, 2)) * share  # what rounding left of the mean
            centred, mean = centred - rest[:, None], mean + rest
            var = (own * centred.square()).sum((0, 2)) * share
        if p.limits is not None:
            assert p.mean is not None
            assert p.var is not None
            sigma = (p.var + p.eps).sqrt()
            r = ((var.detach() + p.eps).sqrt() / sigma).clamp(1 / p.limits[0], p.limits[0])
            d = ((mean.detach() - p.mean) / sigma).clamp(-p.limits[1], p.limits[1])
        sets.append(Set(count, mean, var, r, d))
        parts.append(centred / (var + p.eps).sqrt()[:, None])
    normalized = torch.cat(parts) if parts else flat
    r, d = (_spread([getattr(s, name) for s in sets], p, N) for name in ("r", "d"))
    z = normalized * r + d
    z = z if weight is None else z * weight[:, None]
    z = z if bias is None else z + bias[:, None]
    if residual is not None:
        z = z + torch.where(w > 0, residual.reshape(flat.shape), 0.0)
    y = torch.where(w > 0, value(p.activation, z), 0.0).reshape(x.shape)
    return Found(y, z, normalized, sets)


def _spread(values: list[Tensor], p: Problem, N: int) -> Tensor:
    """One a set, (C,), as (N, C, 1)."""
    if not values:
        return torch.ones(())
    size = p.size or N
    return torch.cat([v.expand(min(size, N - i * size), -1) for i, v in enumerate(values)])[..., None]


# --- how exact a result can be asked to be ---


class Precision(NamedTuple):
    """Unit roundoffs."""

    stored: float  # of the values
    computed: float
    mean: float  # of the mean, relative to itself
    vectors: float  # of weight and bias and their gradients
    kept: float  # of what the backward finds of the forward's input


class Allowed(NamedTuple):
    """How far each result may be off, elementwise."""

    y: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    mean: list[Tensor]  # of each set's moments
    var: list[Tensor]


SLACK = 32.0  # roundings, where sums of thousands of float32 are taken in lanes of 16


def allowed(
    p: Problem, found: Found, weight: Tensor | None, residual: Tensor | None, dy: Tensor, u: Precision,
    tiny: float, inplace: bool,
) -> Allowed:  # fmt: skip
    """First-order bounds: each rounding of the formulas, times how much it moves the result."""
    shape = dy.shape
    N, C = shape[:2]
    y, z, hat = found.y.detach().reshape(found.z.shape), found.z.detach(), found.normalized.detach()
    dy = dy.reshape(z.shape)
    w = torch.ones_like(z[:, :1]) if p.weights is None else p.weights.reshape(N, 1, z.shape[2])
    counts = w > 0
    dy = torch.where(counts, dy, 0.0)
    detached = [Set(*(t.detach() for t in s)) for s in found.sets]
    inverse = _spread([(s.var + p.eps).rsqrt() for s in detached], p, N)
    r, d = (_spread([getattr(s, name) for s in detached], p, N) for name in ("r", "d"))
    gamma = torch.ones(C, 1, dtype=z.dtype) if weight is None else weight.detach().abs()[:, None]
    added = torch.zeros_like(z) if residual is None else residual.detach().reshape(z.shape).abs()
    K = SLACK * u.computed
    # errors of the moments
    off_mean = [K * s.var.sqrt() + 4 * u.mean * s.mean.abs() for s in detached]
    off_hat = inverse * _spread(off_mean, p, N) + K * hat.abs()
    off_d = torch.zeros_like(off_hat)
    if p.limits is not None:
        assert p.var is not None
        off_d = _spread([m / (p.var + p.eps).sqrt() for m in off_mean], p, N) + K * d.abs()
    normalized = (hat * r).abs() + d.abs()
    shift = z.abs()
    off_z = gamma * (r * off_hat + off_d) + K * (gamma * normalized + shift + added)
    kinks, bend = bends(p.activation)
    steepest = 2.0 * max(1.0, abs(p.activation[1]) if p.activation else 1.0)
    off_y = steepest * off_z + K * y.abs() + u.stored * y.abs() + tiny
    # the backward: h is dy times the slope
    leaf = z.clone().requires_grad_()
    slope = (
        torch.autograd.grad(value(p.activation, leaf).sum(), leaf)[0]
        if p.activation and z.numel()
        else torch.ones_like(z)
    )
    off_back = off_z
    if inplace:  # z is found from the rounded y
        lost = SLACK * u.kept * (y.abs() / slope.abs().clamp(min=1e-12) + z.abs() + shift)
        off_back = off_z + lost.clamp(max=40.0)
        off_hat = off_hat + off_back / (gamma * r)
    jumps = sum((jump * ((z - kink).abs() <= off_back) for kink, jump in kinks), torch.zeros_like(z))
    off_h = dy.abs() * (jumps + (bend * off_back).clamp(max=2.0) + 4 * K * steepest)
    h = (dy * slope).abs()
    off_h, h = torch.where(counts, off_h, 0.0), torch.where(counts, h, 0.0)
    off_hat, hat = torch.where(counts, off_hat, 0.0), torch.where(counts, hat.abs(), 0.0)

    def over(t: Tensor) -> Tensor:
        """The mean over each set, everywhere."""
        if p.size == 0:
            return torch.zeros_like(t[:, :, :1])
        means = [
            t[i * p.size : (i + 1) * p.size].sum((0, 2)) / max(float(s.count), 1e-30) for i, s in enumerate(detached)
        ]
        return _spread(means, p, N)

    scale = gamma * r * inverse
    exact = h + w * over(h) + w * hat * over(h * hat)
    off_x = scale * (
        off_h + w * over(off_h) + w * hat * over(off_h * hat) + K * exact
        + w * (off_hat * over(h * hat) + hat * over(h * off_hat))
        + u.stored * exact
    ) + tiny  # fmt: skip
    own = hat * r + d.abs()
    off_weight = (off_h * own + K * h * own + h * (r * off_hat + off_d)).sum((0, 2))
    off_bias = (off_h + K * h).sum((0, 2))
    sums = (h * own).sum((0, 2)), h.sum((0, 2))
    return Allowed(
        off_y.reshape(shape),
        torch.where(counts, off_x, tiny).reshape(shape),
        off_weight + u.vectors * sums[0] + 1e-37,
        off_bias + u.vectors * sums[1] + 1e-37,
        (off_h + (K + u.stored) * h + tiny).reshape(shape),
        off_mean,
        [K * s.var + 8 * u.mean * s.mean.abs() * (s.var.sqrt() + u.mean * s.mean.abs()) for s in detached],
    )


# --- running statistics ---


class Buffers(NamedTuple):
    """Running mean and variance in float64, the count, and what a policy remembers."""

    mean: Tensor | None
    var: Tensor | None
    batches: int | None
    state: Tensor | None


def learn(
    before: Buffers, sets: list[Set], momentum: float | None, eps: float, renorm: bool, largest: float
) -> Buffers:
    """Move them by each set in turn, unless it has no variance or something would be stored as not finite."""
    mean, var, batches, state = before
    for s in (Set(*(t.detach() for t in one)) for one in sets):
        count = float(s.count)
        if count <= 1:
            continue
        unbiased = s.var * count / (count - 1)
        if not bool(((s.mean.abs() <= largest) & (unbiased <= largest)).all()):
            continue
        batches = None if batches is None else batches + 1
        if mean is None or var is None:
            continue
        factor = momentum if momentum is not None else 1 / (batches or 1)
        mean = (1 - factor) * mean + factor * s.mean
        if renorm:
            sigma = (1 - factor) * (var + eps).sqrt() + factor * (s.var + eps).sqrt()
            var = (sigma.square() - eps).clamp(min=0)
        else:
            var = (1 - factor) * var + factor * unbiased
    return Buffers(mean, var, batches, state)
