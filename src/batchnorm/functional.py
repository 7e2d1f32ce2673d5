"""Batch normalization as a function: arguments are checked, a kernel is chosen, running statistics move."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import estimation
from batchnorm.activations import Activation, activation_of, applied
from batchnorm.arguments import NARROW, Call, check
from batchnorm.kernels import (
    cpu,
    gate,
    library,  # noqa: F401  # defines torch.ops.batchnorm
    operators,
    plans,
    reference,
)
from batchnorm.kernels.choice import EVALUATE_FROM, EVALUATE_FUSED_FROM, asked_for, record, unwatched, which
from batchnorm.statistics import Batch, Policy

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    activation: Any = None,
    residual: Tensor | None = None,
    inplace: bool = False,
    mask: Tensor | None = None,
    statistics: Policy | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """Normalize each channel over the batch and its space, then scale and shift it; like ``F.batch_norm``.

    With ``residual`` and ``activation`` it gives ``activation(batch_norm(input) + residual)``, in one pass over memory.

    Args:
        input: ``(N, C, *space)`` of any floating dtype.
        running_mean, running_var: ``(C,)`` or None. In training they move towards the batch's mean and unbiased
            variance, in place; otherwise they are what normalizes.
        weight, bias: ``(C,)`` or None, the paper's gamma and beta.
        training: normalize with the batch's own moments.
        momentum: the weight of the new value, from 0 to 1; None for the plain average over batches, which
            ``num_batches_tracked`` must then count.
        eps: added to the variance, in the unit of ``input`` squared.
        num_batches_tracked: 0-dimensional int64 or None; in training it counts this batch, in place.
        activation: None; "relu", "leaky_relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh" or "elu", or a pair of
            a name and its parameter, ``("leaky_relu", 0.2)``; or the torch function or module, ``nn.LeakyReLU(0.2)``.
        residual: a tensor of the shape and dtype of ``input``, added before the activation.
        inplace: let the result overwrite ``input``, which must not be needed any more; the backward finds it again from
            the result. Possible without an activation and with "leaky_relu" (slope above 0) and "elu" (alpha above 0),
            without a residual, and as long as no ``|weight|`` is below 1/1024 of the larger of 1 and its ``|bias|``:
            the input's deviations come back with the result's rounding error times ``1 / |weight|``. Where another
            kernel than the loops serves (the compiler, other dtypes), nothing is overwritten.
        mask: which positions count: ``(N, *space)``, or of a shape that broadcasts to that; bool, or floating weights
            that are not negative. A position of weight 2 counts as two in mean and variance. What stands at positions
            of weight 0 influences nothing, nan included, and the result is 0 there, with a gradient of 0. It is not
            differentiated.
        statistics: a policy: over which sets the moments are taken in training, if not over the batch; see
            ``batchnorm.statistics``.
        state: what the policy remembers from batch to batch, ``statistics.state(C)``; changed in place.

    Returns:
        The shape, dtype and memory format of ``input``.

    A batch whose moments are not finite leaves all three buffers as they are, and so does a forward that runs inside a
    backward pass: activation checkpointing recomputes a batch that has been counted.

    Raises:
        ValueError: one value per channel in training, no channels, momentum or eps out of range, unknown activation, an
            activation that cannot be undone in place.
        RuntimeError: sizes or dtypes that do not fit each other, statistics missing in evaluation, an input that may
            not be overwritten.
        NotImplementedError: integer or complex input.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2; in place, Rota Bulo et al. 2018, arXiv
    1712.02616.
    """
    if (
        has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual)
        and not torch.compiler.is_compiling()
    ):
        more: dict[str, Any] = {
            "num_batches_tracked": num_batches_tracked, "activation": activation, "residual": residual,
            "inplace": inplace, "mask": mask, "statistics": statistics, "state": state,
        }  # fmt: skip
        return _overridden(input, running_mean, running_var, weight, bias, training, momentum, eps, **more)
    alone = activation is None and residual is None
    usual = mask is None and (statistics is None or type(statistics) is Batch)
    if not inplace and not torch.compiler.is_compiling():
        if training:
            plan = _common_case(input, running_mean, running_var, weight, bias, num_batches_tracked)
            if plan is not None and eps > 0 and momentum is not None and 0 <= momentum <= 1:
                running = cpu.Running(running_mean, running_var, num_batches_tracked, momentum)
                recomputing = torch._C._current_graph_task_id() != -1  # see _recomputing
                if alone and usual:
                    return operators.train_cpu(input, plan, weight, bias, None if recomputing else running, eps)
                if alone or _usual(activation, residual, input):
                    extras = operators.Extras(activation, residual)
                    if usual:
                        given = None if recomputing else running
                        return operators.fused_cpu(input, plan, weight, bias, given, eps, extras)
                    y = estimation.common_case(
                        input, running, weight, bias, eps, extras, mask, statistics, state, recomputing
                    )
                    if y is not None:
                        return y
        elif mask is None and alone:
            return _evaluate(input, running_mean, running_var, weight, bias, momentum, eps)
        elif (
            mask is None
            and input.numel() < EVALUATE_FUSED_FROM
            and asked_for.get() is None
            and _usual(activation, residual, input)
        ):
            y = _evaluate(input, running_mean, running_var, weight, bias, momentum, eps)
            return applied(activation, y if residual is None else y + residual)
    call = Call(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked,
        activation_of(activation), residual, inplace, mask, statistics, state,
    )  # fmt: skip
    check(call)
    if not usual and training:
        return estimation.train(call, _recomputing())
    if mask is not None:
        return estimation.evaluate_masked(call, _chosen)
    return _chosen(call)


_torchs = F.batch_norm  # as it is, whoever may put ours in its place


def _overridden(*positional: Any, **extras: Any) -> Tensor:
    """Let the tensors' own class, a mode or torch.fx's tracing do it, as torch's functions do."""
    extras = {name: value for name, value in extras.items() if value is not None and value is not False}
    y: Tensor = handle_torch_function(batch_norm, (*positional[:5], extras.get("residual")), *positional, **extras)
    return y


# What TorchScript compiles in this function's place; it has no policies, activations or masks.
batch_norm.__prepare_scriptable__ = lambda: _torchs  # type: ignore[attr-defined]


def _chosen(call: Call) -> Tensor:
    if torch.compiler.is_compiling():
        return _traced(call)
    return _train(call) if call.training else _evaluate_with(call)


def _recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing."""
    if torch.compiler.is_compiling():
        return False  # the graph is the same for both
    return bool(torch._C._current_graph_task_id() != -1)


# --- training ---


def _common_case(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batches: Tensor | None,
) -> plans.Plan | None:
    """The loops' plan where nothing needs a closer look: what `check` and `which` establish, in a tenth of the time.

    None says only that they must be asked.
    """
    if type(x) is not Tensor or not x.is_cpu or x.is_neg() or not unwatched():
        return None
    plan = plans.plan(x.shape, x.stride(), x.dtype)
    if plan is None:
        return None
    if not gate.vectors(plan, running_mean, running_var, weight, bias):
        return None
    if batches is not None and not (type(batches) in gate.PLAIN and batches.is_cpu and batches.dtype == torch.int64):
        return None
    return plan if (running_mean is None) == (running_var is None) else None


def _usual(activation: Any, residual: Tensor | None, x: Tensor) -> bool:
    """Whether what follows is known, and can be added to x as it is: nothing that needs a closer look."""
    if activation is not None and type(activation) is not Activation:
        return False
    return residual is None or (
        type(residual) is Tensor
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.stride() == x.stride()
        and residual.is_cpu
        and not residual.is_neg()
    )


def _train(call: Call) -> Tensor:
    x, mean, var, weight, bias = call[:5]
    kernel = which(x, True, weight, bias, mean, var, call.batches, call.residual)
    if _recomputing():
        call = call._replace(running_mean=None, running_var=None, batches=None)
    if kernel == "numba" and (call.batches is None or call.batches.dtype == torch.int64):
        return _train_cpu(call)
    train = _train_reference if kernel == "reference" else _train_aten
    record.forward = kernel
    y, batch_mean, unbiased = train(x, weight, bias, call.eps)
    _track(call, batch_mean, unbiased)
    return _followed(y, call)


def _followed(y: Tensor, call: Call) -> Tensor:
    """Residual and activation by torch's own operators."""
    return applied(call.activation, y if call.residual is None else y + call.residual)


def _train_cpu(call: Call) -> Tensor:
    x, plan = plans.laid_out(call.x)
    weight, bias = gate.ready(call.weight, plan), gate.ready(call.bias, plan)
    running = None if call.batches is None else cpu.Running(None, None, call.batches, 0.0)
    moved: list[tuple[Tensor, Tensor]] = []
    if call.running_mean is not None and call.running_var is not None:
        # The loops move contiguous statistics of one dtype; others are copied there and back.
        buffers = call.running_mean, call.running_var
        mean, var = (t.to(plan.statistics).contiguous() for t in buffers)
        running = cpu.Running(mean, var, call.batches, -1.0 if call.momentum is None else call.momentum)
        moved = [(buffer, t) for buffer, t in zip(buffers, (mean, var), strict=True) if t is not buffer]
    if call.activation is None and call.residual is None and not call.inplace:
        y = operators.train_cpu(x, plan, weight, bias, running, call.eps)
    else:
        y = operators.fused_cpu(x, plan, weight, bias, running, call.eps, _extras(call, x))
    for buffer, t in moved:
        estimation.put_back(buffer, t)
    return y


def _extras(call: Call, x: Tensor) -> operators.Extras:
    """What goes along with x, laid out like it; a copy of the input, which it is then, can be overwritten as well."""
    return operators.Extras(call.activation, gate.laid_like(call.residual, x), call.inplace)


def _train_aten(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Momentum 1 makes ATen write the batch's mean and unbiased variance where the running statistics would be."""
    if x.numel() == 0:
        return _torchs(x, None, None, weight, bias, True, 0.0, eps), None, None
    dtype = torch.float32 if x.dtype in NARROW else x.dtype
    if x.dtype in NARROW:
        weight, bias = _widened(weight), _widened(bias)
    weight, bias = _dense(weight), _dense(bias)
    mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    y = _torchs(x, mean, var, weight, bias, True, 1.0, eps)
    return y, mean, var


def _train_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    moments: list[Tensor] = []

    def normalized(x: Tensor) -> Tensor:
        y, *found = reference.train_forward(x, weight, bias, eps)
        moments.extend(found)
        return y

    y = operators.formatted(normalized, x)
    if x.numel() == 0:
        return y, None, None
    mean, var = moments
    count = x.numel() // x.shape[1]
    return y, mean.detach(), var.detach() * (count / (count - 1))


def _track(call: Call, mean: Tensor | None, unbiased: Tensor | None) -> None:
    """Count the batch and move the running statistics, without ever looking at a value: no wait, no graph break."""
    running_mean, running_var, batches, momentum = call.running_mean, call.running_var, call.batches, call.momentum
    with torch.no_grad():
        if mean is None or unbiased is None:  # an empty batch is counted, as torch does, and teaches nothing
            if batches is not None:
                batches.add_(1)
            return
        if running_mean is None or running_var is None:
            finite = mean.isfinite().all() & unbiased.isfinite().all()
            if batches is not None:
                batches.add_(finite)
            return
        stored_mean, stored_var = mean.to(running_mean.dtype), unbiased.to(running_var.dtype)
        finite = stored_mean.isfinite().all() & stored_var.isfinite().all()
        if batches is not None:
            batches.add_(finite)
        factor = 1.0 / batches.clamp(min=1).to(mean.dtype) if momentum is None and batches is not None else momentum
        new_mean = (1 - factor) * running_mean + factor * mean  # type: ignore[operator]
        new_var = (1 - factor) * running_var + factor * unbiased  # type: ignore[operator]
        running_mean.copy_(torch.where(finite, new_mean.to(running_mean.dtype), running_mean))
        running_var.copy_(torch.where(finite, new_var.to(running_var.dtype), running_var))


def _traced(call: Call) -> Tensor:
    """What torch.compile and torch.export record."""
    x, running_mean, running_var, weight, bias = call[:5]
    if not call.training:
        return _followed(_evaluate_aten(x, running_mean, running_var, weight, bias, call.eps), call)
    opaque = x.is_cpu and x.dtype in (torch.float32, torch.float64, torch.bfloat16) and 2 <= x.dim() <= 5
    if opaque and x.numel() > 0 and not torch.compiler.is_exporting():
        name, parameter = (None, 0.0) if call.activation is None else call.activation
        y, moments = torch.ops.batchnorm.train(x, weight, bias, call.residual, call.eps, name, parameter)
        count = x.numel() // x.shape[1]
        _track(call, moments[0], moments[1] * (count / (count - 1)))
        done: Tensor = y
        return done
    y, mean, var = _train_aten(x, weight, bias, call.eps)
    _track(call, mean, var)
    return _followed(y, call)


# --- evaluation ---


def _evaluate(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    call = Call(x, running_mean, running_var, weight, bias, False, momentum, eps, None)
    small = asked_for.get() is None and x.numel() * x.element_size() < EVALUATE_FROM
    if small and eps >= 0:
        # ATen checks enough for itself. Evaluation changes nothing, so our own checks can wait until it objects.
        try:
            y = _evaluate_aten(x, running_mean, running_var, weight, bias, eps)
        except (RuntimeError, IndexError, ValueError):
            check(call)
            if running_mean is None or running_var is None or running_mean.dtype == running_var.dtype == _kept(x):
                raise
            y = _evaluate_aten(x, running_mean.to(_kept(x)), running_var.to(_kept(x)), weight, bias, eps)
        record.forward = "aten"
        return y
    check(call)
    return _evaluate_with(call)


def _evaluate_with(call: Call) -> Tensor:
    x, running_mean, running_var, weight, bias = call[:5]
    assert running_mean is not None  # _check has seen to it
    assert running_var is not None
    alone = call.activation is None and call.residual is None and not call.inplace
    others = weight, bias, running_mean, running_var, call.residual
    kernel = record.forward = which(x, call.inplace, *others, fused=not alone)
    if kernel == "reference":
        mean, var = running_mean, running_var
        y = operators.formatted(lambda x: reference.inference(x, mean, var, weight, bias, call.eps), x)
        return _followed(y, call)
    if kernel == "numba":
        x, plan = plans.laid_out(x, given=True)
        moments = torch.stack((running_mean.double(), running_var.double()))
        weight, bias = gate.ready(weight, plan), gate.ready(bias, plan)
        return operators.fused_cpu(x, plan, weight, bias, None, call.eps, _extras(call, x), moments)
    if running_mean.dtype != x.dtype:
        running_mean, running_var = running_mean.to(_kept(x)), running_var.to(_kept(x))
    return _followed(_evaluate_aten(x, running_mean, running_var, weight, bias, call.eps), call)


def _evaluate_aten(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    if x.dtype in NARROW and running_mean is not None and running_mean.dtype == torch.float32:
        weight, bias = _widened(weight), _widened(bias)
    return torch.batch_norm(
        x,
        _dense(weight),
        _dense(bias),
        _dense(running_mean),
        _dense(running_var),
        False,
        0.0,
        eps,
        torch.backends.cudnn.enabled,
    )


def _kept(x: Tensor) -> torch.dtype:
    """What ATen wants statistics to be in; training moves those of another precision, too."""
    return torch.float32 if x.dtype in NARROW else x.dtype


def _dense(t: Tensor | None) -> Tensor | None:
    """ATen's backward (2.13) takes weights and statistics with gaps for contiguous ones, and gives nonsense."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def _widened(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype not in NARROW else t.float()
