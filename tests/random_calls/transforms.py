"""Derivatives of derivatives, forward mode and function transforms, against the same of the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jacrev, jvp, vjp, vmap

from . import oracle
from .cases import Case
from .subject import NARROW, torchs

_RELATIVE = {torch.float32: 3e-4, torch.float64: 1e-9, torch.bfloat16: 0.08, torch.float16: 0.02}
_SECOND = ("double", "hessian", "dual_grad")
Function = Callable[..., Tensor]


def transformed(case: Case, subject: Any) -> list[str]:
    """Complaints about one transform of one call."""
    mask = subject.mask()
    problem = subject.problem(subject.before(), mask)
    x = _tame(case, subject, problem)
    vectors = [None if t is None else t.detach() for t in (subject.weight, subject.bias)]
    args = [subject.leaf(x, case.layout, "x", False), *vectors]
    extra = [subject._normal(3, *case.shape).to(subject.dtype) for _ in range(2)]
    vector = (1 + subject._uniform(case.channels)).to(subject.dtype)
    wide = [None if t is None else t.double().resolve_neg() for t in args]  # which the oracle views

    def ours(*a: Any) -> Tensor:
        return subject.call(*a, None, mask)

    def right(*a: Any) -> Tensor:
        return oracle.forward(problem, *a, None).y

    expected = _apply(case.transform, right, wide, [e.double() for e in extra], vector.double())
    try:
        found = _apply(case.transform, ours, args, extra, vector)
    except Exception as error:
        theirs = torchs(case, subject.running)  # without mask and policy, which torch has not
        wide = [args[0], *(t if t is None or subject.dtype not in NARROW else t.float() for t in args[1:])]
        try:  # half precision beside float32 parameters, which is how ours calls torch's kernels
            _apply(case.transform, lambda *a: theirs(*a, None), wide, extra, vector)
        except type(error):
            return []
        raise
    faults = []
    relative = _RELATIVE[subject.dtype] * (10 if case.transform in _SECOND else 1)
    for i, (f, r) in enumerate(zip(found, expected, strict=True)):
        if f is None:
            faults.append(f"{case.transform}: result {i} is missing")
            continue
        allowed = torch.full_like(r, relative * max(1.0, float(r.abs().max())))
        good = (f.double() - r).abs() <= allowed
        if f.shape != r.shape or not bool(good.all()):
            off = float((f.double() - r).abs().max()) if f.shape == r.shape else float("nan")
            faults.append(f"{case.transform}: result {i} is off by {off:.3g} of {float(r.abs().max()):.3g}")
    return faults + subject.memory.touched()


def _tame(case: Case, subject: Any, problem: oracle.Problem) -> Tensor:
    """Values with variances that are not small and activations that do not lie at a bend: derivatives are tame."""
    kinks, _ = oracle.bends(case.activation)
    vectors = [None if t is None else t.detach().double() for t in (subject.weight, subject.bias)]
    for _ in range(200):
        x: Tensor = subject.values().to(subject.dtype).double()
        found = oracle.forward(problem, x, *vectors, None)
        near = any(bool(((found.z - kink).abs() < 0.02).any()) for kink, _ in kinks)
        if not near and all(bool((s.var > 0.02).all()) or float(s.count) == 0 for s in found.sets):
            break
    return x


def _apply(name: str, f: Function, args: list[Any], extra: list[Tensor], vector: Tensor) -> tuple[Any, ...]:
    """The results of a transform of f(x, weight, bias)."""
    given = [i for i, t in enumerate(args) if t is not None]

    def of(*some: Tensor) -> Tensor:
        every = list(args)
        for i, t in zip(given, some, strict=True):
            every[i] = t
        return f(*every)

    some = [args[i] for i in given]
    dy, dys = extra[0][0], extra[0]
    x = args[0]
    if name == "vmap":
        return (vmap(lambda a: of(a, *some[1:]))(dys),)
    if name == "vmap_weight":
        if args[1] is None:
            return (vmap(lambda a: of(a, *some[1:]))(dys),)
        return (vmap(lambda w: of(some[0], w, *some[2:]))(torch.stack((args[1], 2 * args[1]))),)
    if name == "jvp":
        tangents = tuple(e if e.dim() > 1 else vector[: len(e)].to(e.dtype) for e in some)
        tangents = (dy, *tangents[1:])
        return jvp(of, tuple(some), tangents)
    if name == "jacrev":
        return (jacrev(lambda a: of(a, *some[1:]))(x),)
    if name == "hessian":
        return (hessian(lambda a: (of(a, *some[1:]) * dy).pow(2).sum())(x[..., :]),)
    if name == "vjp":
        return vjp(of, *some)[1](dy)
    if name == "dual":
        with forward_ad.dual_level():
            y = of(forward_ad.make_dual(x, dy), *some[1:])
            return tuple(forward_ad.unpack_dual(y))
    leaves = [t.detach().requires_grad_() for t in some]
    y = of(*leaves)
    if name == "batched":
        return torch.autograd.grad(y, leaves, dys, is_grads_batched=True)
    if name == "vmap_grads":
        return vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(dys)
    if name == "dual_grad":
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(dy, dys[1])
            return tuple(forward_ad.unpack_dual(torch.autograd.grad(y, leaves[0], dual)[0]))
    seed = dy.clone().requires_grad_()
    first = torch.autograd.grad(y, leaves, seed, create_graph=True)
    total = sum(((g * e).sum() for g, e in zip(first, (extra[1][0], vector, vector), strict=False)), torch.zeros(()))
    return torch.autograd.grad(total, [leaves[0], seed, *leaves[1:2]], materialize_grads=True)
