"""Run a case and say what is wrong with it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import kernels
from batchnorm.kernels import cpu, plans
from batchnorm.statistics import resolve

from . import oracle
from .cases import Case
from .changes import changed, hooks, refused_by_torch
from .guards import guarded
from .refusals import refusal
from .subject import NARROW, Subject, torchs
from .transforms import transformed

_STORED = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_TINY = {torch.float32: 2e-38, torch.float64: 1e-307, torch.bfloat16: 2e-38, torch.float16: 1.2e-7}
_DIVISIONS = {"usual": (), "streamed": (("_beyond_cache", lambda: 0),)}
_FINE = (("_SLAB", 4096), ("_LONG", 64), ("PER_THREAD", 64))  # so that small tensors are cut into many parts


def run(case: Case) -> list[str]:
    """Make the call and its backward; give complaints, or nothing if all is as mathematics and torch have it."""
    faults: list[str] = []
    try:
        with _settings(case):
            _run(case, faults)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{f.filename.rsplit('/', 2)[-1]}:{f.lineno} {f.name}" for f in where if "batchnorm" in f.filename]
        faults.append(f"raised {type(error).__name__}: {error} [{' < '.join(reversed(ours[-3:]))}]")
    return faults


@contextmanager
def _settings(case: Case) -> Iterator[None]:
    before = torch.get_num_threads()
    alone = "Sync" in case.policy and not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(case.threads)
    try:
        with _divided(case.division):
            yield
    finally:
        torch.set_num_threads(before)
        if alone:  # other tests of this process look whether there is a group
            dist.destroy_process_group()


@contextmanager
def _divided(how: str) -> Iterator[None]:
    changes = [(plans, *change) for change in (_FINE if how == "fine" else _DIVISIONS[how])]
    changes += [(cpu, "PER_THREAD", 64)] if how == "fine" else []
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    caches = [getattr(plans, name) for name in ("plan", "inference_plan", "sets_plan", "planned")]
    for change in changes:
        setattr(*change)
    for cached in caches if changes else ():
        cached.cache_clear()
    try:
        yield
    finally:
        for change in before:
            setattr(*change)
        for cached in caches if changes else ():
            cached.cache_clear()


def _refused(case: Case, subject: Subject) -> bool:
    """Whether a batch has one value a channel, so that there is no variance: torch refuses that."""
    if not case.training or "Sync" in case.policy:
        return False
    if case.values == 1:
        return True
    ghost = resolve(subject.policy).ghost
    if ghost is None or case.mask or case.values == 0:
        return False
    last = case.shape[0] % ghost.size or min(ghost.size, case.shape[0])
    return last * (case.values // case.shape[0]) == 1


def _run(case: Case, faults: list[str]) -> None:
    subject = Subject(case)
    if case.bad:
        faults += refusal(case, subject)
        return
    if _refused(case, subject):
        _must_refuse(case, subject, faults)
        return
    if case.transform:
        with guarded(case.memory) if case.memory else nullcontext():  # type: ignore[arg-type]
            faults += transformed(case, subject)
        return
    gathered: list[oracle.Set] = []
    for _ in range(case.batches):
        with guarded(case.memory) if case.memory else nullcontext() as guard:  # type: ignore[arg-type]
            _batch(case, subject, gathered, guard, faults)
        if faults:
            break
    faults += subject.memory.touched()


def _must_refuse(case: Case, subject: Subject, faults: list[str]) -> None:
    before = subject.before()
    x = subject.leaf(subject.values(), case.layout, "x", False)
    residual = x.clone() if case.residual else None
    try:
        subject.call(x * 1 if case.inplace else x, subject.weight, subject.bias, residual, subject.mask())
    except ValueError:
        faults += _different(before, subject.before())
        faults += subject.memory.touched()
    else:
        faults.append("one value per channel was accepted; torch raises ValueError")


def _different(before: Any, after: Any) -> list[str]:
    same = all(
        a is b or a == b if not isinstance(a, Tensor) else torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )
    return [] if same else ["buffers moved although the call was refused"]


def _batch(case: Case, subject: Subject, gathered: list[oracle.Set], guard: Any, faults: list[str]) -> None:
    """One forward and backward, with everything that is to be compared."""
    mask = subject.mask()
    values = [subject.values(), subject._normal(*case.shape), subject._normal(*case.shape)]
    hidden = None
    if mask is not None and case.seed % 2:
        hidden = (mask == 0).expand(case.shape[0], *case.shape[2:]).unsqueeze(1).expand(case.shape)
    given_x = subject.leaf(values[0], "neg" if case.neg else case.layout, "x", "x" in case.wanted, hidden)
    residual = None
    if case.residual:
        layout = case.layout if case.residual == "same" else case.residual
        residual = subject.leaf(
            values[1], layout, "residual", "r" in case.wanted, None if layout == "expanded" else hidden
        )
    wide = [
        None if t is None else t.detach().double().clone() for t in (given_x, subject.weight, subject.bias, residual)
    ]
    before = subject.before()
    problem = subject.problem(before, mask)
    leaves: list[Tensor | None] = [given_x, subject.weight, subject.bias, residual]
    x = given_x * 1 if case.inplace else given_x
    if case.inplace and x.stride() != given_x.stride() and given_x.numel():
        x = torch.empty_strided(x.shape, given_x.stride(), dtype=x.dtype).copy_(given_x) if not case.neg else x
    if guard is not None:
        for t in (x, residual, subject.weight, subject.bias, *subject.running, subject.batches, mask):
            if t is not None:
                guard.know(t.detach())
    with subject.insisting(), hooks(case.hooks, guard):
        y = subject.call(x, subject.weight, subject.bias, residual, mask)
    # --- right ---
    right_leaves = [None if t is None else t.requires_grad_() for t in wide]
    found = oracle.forward(problem, *right_leaves)  # type: ignore[arg-type]
    dy = _gradient(case, subject, values[2], y, hidden)
    wanted = [i for i, t in enumerate(leaves) if t is not None and t.requires_grad]
    again, error, grads = None, None, [None] * 4
    if wanted and y.requires_grad:
        again = changed(case, subject, given_x, y, residual)
        try:
            got = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
            for i, g in zip(wanted, got, strict=True):
                grads[i] = g
        except Exception as raised:
            error = raised
            if not refused_by_torch(case, raised):
                raise
    elif wanted and found.y.numel():
        faults.append("gradients are wanted, and none are recorded")
    dy64 = dy.to(subject.dtype).double()  # as autograd makes it
    right = [None] * 4
    if wanted:
        inputs = [right_leaves[i] for i in wanted]
        outs = torch.autograd.grad(
            found.y, inputs, dy64 if hidden is None else torch.where(hidden, 0.0, dy64), materialize_grads=True
        )
        for i, g in zip(wanted, outs, strict=True):
            right[i] = g
    ran = kernels.ran()
    u = _precision(case, subject, ran)
    bound = oracle.allowed(
        problem,
        found,
        right_leaves[1],
        right_leaves[3],
        dy64 if hidden is None else torch.where(hidden, 0.0, dy64),
        u,
        _TINY[subject.dtype],
        case.inplace,
    )
    special = case.special in ("nan", "inf")
    if case.between != "y_inplace":
        faults += _compare("y", y, found.y, bound.y)
    if error is None:
        names = ("x", "weight", "bias", "residual")
        for name, g, r, b in zip(names, grads, right, (bound.x, bound.weight, bound.bias, bound.residual), strict=True):
            if r is None or g is None:
                continue
            if special:  # what comes out of the first channel is nan, and what of it depends on conventions
                g, r, b = (t[1:] if t.dim() == 1 else t[:, 1:] for t in (g, r, b))
            faults += _compare(f"{name}'s gradient", g, r, b)
    faults += _strides(case, subject, given_x, residual, y, dy, grads)
    if y.dtype != subject.dtype:
        faults.append(f"y is {y.dtype}")
    _buffers(case, subject, before, found, bound, gathered, faults, again)


def _gradient(case: Case, subject: Subject, values: Tensor, y: Tensor, hidden: Tensor | None) -> Tensor:
    layout = case.grad
    if layout == "same":
        made = torch.empty_like(y, requires_grad=False).copy_(values)
        made = made if hidden is None else made.masked_fill_(hidden, float("nan"))
        return made
    if layout in ("wider", "narrower"):
        exact = values.to(subject.dtype if layout == "wider" else torch.float16)
        return exact.to(torch.float64 if layout == "wider" else torch.float16)
    dy = subject.leaf(values, layout, "dy", False)
    if hidden is not None and all(stride != 0 for stride in dy.stride()):
        dy = subject.leaf(values, layout, "dy", False, hidden)
    return dy


def _precision(case: Case, subject: Subject, ran: Any) -> oracle.Precision:
    """What the kernels that ran promise; of torch's own less is asked."""
    stored = _STORED[subject.dtype]
    computed = 2.0**-53 if subject.dtype == torch.float64 else 2.0**-24
    mean = 2.0**-53
    if "aten" in ran:
        computed, mean = 4 * computed, 4 * computed
    if "Sync" in case.policy:  # processes tell each other their means in the precision of the parameters
        mean = max(mean, computed)
    composed = case.activation is not None or bool(case.residual)
    if subject.dtype in NARROW and ("aten" in ran or ("reference" in ran and composed)):
        computed = stored
    if case.hooks == "bfloat16":
        computed, mean = 2.0**-8, 2.0**-8
    dtypes = [t.dtype for t in (subject.weight, subject.bias) if t is not None]
    vectors = max([_STORED[d] for d in dtypes], default=0.0)
    return oracle.Precision(0.0 if stored <= computed else stored, computed, mean, max(vectors, computed), stored)


def _compare(name: str, found: Tensor, right: Tensor, bound: Tensor) -> list[str]:
    if found.shape != right.shape:
        return [f"{name} has the shape {tuple(found.shape)}, not {tuple(right.shape)}"]
    largest = 1e4 if found.dtype == torch.float16 else 1e38  # beyond which rounding may make infinity
    found, right = found.detach().double(), right.detach()
    off = (found - right).abs()
    good = (off <= bound) | (found.isnan() & right.isnan()) | (found == right)
    good |= found.isinf() & (right.abs() >= largest)
    if bool(good.all()):
        return []
    ratio = torch.where(good, 0.0, off / bound).nan_to_num(nan=float("inf"), posinf=float("inf"))
    i = int(ratio.flatten().argmax())
    where = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), found.shape))
    return [
        f"{name} at {where} is {found.flatten()[i]:.9g}, not {right.flatten()[i]:.9g} (off by {off.flatten()[i]:.3g}, "
        f"allowed {bound.flatten()[i]:.3g}); {int((~good).sum())} of {good.numel()} wrong"
    ]


def _seen(t: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions in which one can step."""
    return tuple(step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1)


def _strides(
    case: Case, subject: Subject, x: Tensor, residual: Tensor | None, y: Tensor, dy: Tensor, grads: list[Any]
) -> list[str]:
    """Layouts are torch's: of the output and of the gradients of x and the residual."""
    if case.values < 2 or case.hooks or case.between or case.inplace:
        return []
    leaf = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.detach()).requires_grad_()
    added = None if residual is None else torch.empty_strided(x.shape, residual.stride(), dtype=x.dtype)
    added = (
        None
        if added is None
        else added.copy_(residual.detach()).requires_grad_()
        if 0 not in added.stride()
        else residual
    )
    vectors = [None if t is None else t.detach() for t in (subject.weight, subject.bias)]
    theirs = torchs(case, subject.running)(leaf, *vectors, added)
    found = [] if _seen(y) == _seen(theirs) else [f"y has strides {y.stride()}, torch's {theirs.stride()}"]
    if grads[0] is not None:
        like = torch.empty_strided(theirs.shape, dy.stride(), dtype=x.dtype) if dy.numel() else dy
        (own,) = torch.autograd.grad(theirs, leaf, like.zero_() if 0 not in dy.stride() else dy.to(x.dtype))
        if _seen(grads[0]) != _seen(own):
            found.append(f"x's gradient has strides {grads[0].stride()}, torch's {own.stride()} (dy: {dy.stride()})")
    return found


def _buffers(
    case: Case, subject: Subject, before: oracle.Buffers, found: oracle.Found, bound: oracle.Allowed,
    gathered: list[oracle.Set], faults: list[str], again: Any,
) -> None:  # fmt: skip
    """Running statistics, the count and a policy's memory."""
    after = subject.before()
    renorm = resolve(subject.policy).renorm is not None
    accumulated = resolve(subject.policy).accumulated
    kept = subject.running[0].dtype if subject.running[0] is not None else torch.float64
    largest = torch.finfo(kept).max
    sets = found.sets if case.training else []
    if case.values == 0:
        if (
            case.training
            and accumulated is None
            and after.batches != (None if before.batches is None else before.batches + 1)
        ):
            faults.append(f"an empty batch counts {after.batches}, and torch counts it once")
        return
    if accumulated is not None and case.training:
        gathered += [s for s in sets if bool((s.mean.isfinite() & s.var.isfinite()).all())]
        steps = int(before.state[0]) + 1  # type: ignore[index]
        sets = []
        if steps >= accumulated.steps:
            sets = [_together(gathered)]
            gathered.clear()
        if int(after.state[0]) != steps % accumulated.steps:  # type: ignore[index]
            faults.append(f"{int(after.state[0])} micro-batches are remembered, not {steps % accumulated.steps}")  # type: ignore[index]
    right = oracle.learn(before, sets, case.momentum, case.eps, renorm, largest)
    if right.batches != after.batches:
        faults.append(f"the count is {after.batches}, not {right.batches}")
    if right.mean is None or after.mean is None or right.var is None or after.var is None:
        return
    own = 2.0**-53 if subject.dtype == torch.float64 else 2.0**-24
    u = (len(found.sets) + 2) * max(_STORED[kept], own)  # they are moved in the precision of the parameters
    size = sum(s.mean.detach().abs() for s in sets) + right.mean.abs() + before.mean.abs()  # type: ignore[union-attr]
    faults += _compare("running_mean", after.mean, right.mean, 2 * sum(bound.mean) + u * size + 1e-37)
    scale = 2.0 if not sets else max(1.0, *(float(s.count) / max(float(s.count) - 1, 1e-3) for s in sets), 2.0)
    size = sum(s.var.detach() for s in sets) * scale + right.var + before.var + case.eps * renorm  # type: ignore[operator]
    faults += _compare(
        "running_var",
        after.var,
        right.var,
        scale * 2 * sum(bound.var) + u * size + 4e-7 * size * (len(sets) > 0) * 8 + 1e-37,
    )


def _together(sets: list[oracle.Set]) -> oracle.Set:
    sets = [oracle.Set(*(t.detach() for t in s)) for s in sets]
    count = sum(s.count for s in sets)
    share = 1 / count if float(count) > 0 else count
    mean = sum(s.count * s.mean for s in sets) * share
    var = sum(s.count * (s.var + (s.mean - mean).square()) for s in sets) * share
    return oracle.Set(count, mean, var, sets[0].r, sets[0].d)
