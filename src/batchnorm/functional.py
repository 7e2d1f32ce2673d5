"""Batch normalization as a function: arguments are checked, a kernel is chosen, running statistics move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.kernels import cpu, operators, reference
from batchnorm.kernels.choice import EVALUATE_FROM, asked_for, record, unwatched, which

__all__ = ["batch_norm"]

_NARROW = (torch.float16, torch.bfloat16)
_NAMES = {  # what torch calls them in this message
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}
_PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


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
) -> Tensor:
    """Normalize each channel over the batch and its space, then scale and shift it; like ``F.batch_norm``.

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

    Returns:
        The shape, dtype and memory format of ``input``.

    A batch whose moments are not finite leaves all three buffers as they are, and so does a forward that runs inside a
    backward pass: activation checkpointing recomputes a batch that has been counted.

    Raises:
        ValueError: one value per channel in training, no channels, momentum or eps out of range.
        RuntimeError: sizes or dtypes that do not fit each other, statistics missing in evaluation.
        NotImplementedError: integer or complex input.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithms 1 and 2.
    """
    if torch.compiler.is_compiling():
        _check(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
        return _traced(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if not training:
        return _evaluate(input, running_mean, running_var, weight, bias, momentum, eps)
    recomputing = torch._C._current_graph_task_id() != -1  # a forward inside a backward: activation checkpointing
    plan = _common_case(input, running_mean, running_var, weight, bias, num_batches_tracked)
    if plan is not None and eps > 0 and momentum is not None and 0 <= momentum <= 1:
        running = None if recomputing else cpu.Running(running_mean, running_var, num_batches_tracked, momentum)
        return operators.train_cpu(input, plan, weight, bias, running, eps)

    _check(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    kernel = which(input, True, weight, bias, running_mean, running_var, num_batches_tracked)
    if recomputing:
        running_mean = running_var = num_batches_tracked = None
    if kernel == "cpu" and (num_batches_tracked is None or num_batches_tracked.dtype == torch.int64):
        return _train_cpu(input, running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked)
    train = _train_reference if kernel == "reference" else _train_aten
    record.forward = kernel
    y, mean, var = train(input, weight, bias, eps)
    _track(input, running_mean, running_var, num_batches_tracked, momentum, mean, var)
    return y


# --- training ---


def _common_case(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batches: Tensor | None,
) -> cpu.Plan | None:
    """The loops' plan where nothing needs a closer look: what `_check` and `which` establish, in a tenth of the time.

    None says only that they must be asked.
    """
    if type(x) is not Tensor or not x.is_cpu or x.is_neg() or not unwatched():
        return None
    plan = cpu.plan(x.shape, x.stride(), x.dtype)
    if plan is None:
        return None
    size, dtype = plan.vector, plan.statistics
    for t in (running_mean, running_var, weight, bias):
        if t is not None and not (
            t.dtype == dtype and t.shape == size and type(t) in _PLAIN and t.is_cpu and t.is_contiguous()
        ):
            return None
    if batches is not None and not (type(batches) in _PLAIN and batches.is_cpu and batches.dtype == torch.int64):
        return None
    return plan if (running_mean is None) == (running_var is None) else None


def _train_cpu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    batches: Tensor | None,
) -> Tensor:
    x, plan = cpu.laid_out(x)
    if running_mean is None or running_var is None:
        running = None if batches is None else cpu.Running(None, None, batches, 0.0)
        return operators.train_cpu(x, plan, weight, bias, running, eps)
    # The loops move contiguous statistics of one dtype; others are copied there and back.
    mean, var = (t.to(plan.statistics).contiguous() for t in (running_mean, running_var))
    running = cpu.Running(mean, var, batches, -1.0 if momentum is None else momentum)
    y = operators.train_cpu(x, plan, weight, bias, running, eps)
    for buffer, moved in ((running_mean, mean), (running_var, var)):
        if moved is not buffer:
            buffer.copy_(moved)
    return y


def _train_aten(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Momentum 1 makes ATen write the batch's mean and unbiased variance where the running statistics would be."""
    if x.numel() == 0:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), None, None
    dtype = torch.float32 if x.dtype in _NARROW else x.dtype
    if x.dtype in _NARROW:
        weight, bias = _widened(weight), _widened(bias)
    mean, var = (torch.zeros(x.shape[1], dtype=dtype, device=x.device) for _ in range(2))
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    return y, mean, var


def _train_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y, mean, var = reference.train_forward(x, weight, bias, eps)
    if x.numel() == 0:
        return y, None, None
    count = x.numel() // x.shape[1]
    return y, mean.detach(), var.detach() * (count / (count - 1))


def _track(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    mean: Tensor | None,
    unbiased: Tensor | None,
) -> None:
    """Count the batch and move the running statistics, without ever looking at a value: no wait, no graph break."""
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


def _traced(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    batches: Tensor | None,
) -> Tensor:
    """What torch.compile and torch.export record."""
    if not training:
        return _evaluate_aten(x, running_mean, running_var, weight, bias, eps)
    mean: Tensor | None
    var: Tensor | None
    opaque = x.is_cpu and x.dtype in (torch.float32, torch.float64, torch.bfloat16) and 2 <= x.dim() <= 5
    if opaque and x.numel() > 0 and not torch.compiler.is_exporting():
        y, moments = torch.ops.batchnorm.train(x, weight, bias, eps)
        count = x.numel() // x.shape[1]
        mean, var = moments[0], moments[1] * (count / (count - 1))
    else:
        y, mean, var = _train_aten(x, weight, bias, eps)
    _track(x, running_mean, running_var, batches, momentum, mean, var)
    normalized: Tensor = y
    return normalized


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
    small = asked_for.get() is None and x.numel() * x.element_size() < EVALUATE_FROM
    if small and eps >= 0:
        # ATen checks enough for itself. Evaluation changes nothing, so our own checks can wait until it objects.
        try:
            y = _evaluate_aten(x, running_mean, running_var, weight, bias, eps)
        except (RuntimeError, IndexError, ValueError):
            _check(x, running_mean, running_var, weight, bias, False, momentum, eps, None)
            if running_mean is None or running_var is None or x.dtype in _NARROW or running_mean.dtype == x.dtype:
                raise
            # Statistics of another precision, which training can move: ATen wants the input's.
            y = _evaluate_aten(x, running_mean.to(x.dtype), running_var.to(x.dtype), weight, bias, eps)
        record.forward = "aten"
        return y
    _check(x, running_mean, running_var, weight, bias, False, momentum, eps, None)
    assert running_mean is not None  # _check has seen to it
    assert running_var is not None
    kernel = record.forward = which(x, False, weight, bias, running_mean, running_var)
    if kernel == "reference":
        return reference.inference(x, running_mean, running_var, weight, bias, eps)
    if kernel == "cpu":
        return operators.evaluate_cpu(x, running_mean, running_var, weight, bias, eps)
    return _evaluate_aten(x, running_mean, running_var, weight, bias, eps)


def _evaluate_aten(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    if x.dtype in _NARROW and running_mean is not None and running_mean.dtype == torch.float32:
        weight, bias = _widened(weight), _widened(bias)
    return torch.batch_norm(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        False,
        0.0,
        eps,
        torch.backends.cudnn.enabled,
    )


def _widened(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float()


# --- checks ---


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    batches: Tensor | None,
) -> None:
    """Raise what torch would raise, with the sizes and the remedy, before anything is changed."""
    shape, dtype = x.shape, x.dtype
    if len(shape) < 2:
        raise ValueError(f"expected at least 2D input (got {len(shape)}D input): batch_norm needs (N, C, *space)")
    if not dtype.is_floating_point:
        kind = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        raise NotImplementedError(f'"batch_norm" not implemented for {kind!r}: convert the input to a floating dtype')
    channels = shape[1]
    if channels == 0:
        raise ValueError(f"expected at least 1 channel, got input size {shape}: dimension 1 counts the channels")
    if training and shape[0] == 1 and x.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}: one value has no variance; "
            "use a larger batch, drop the last one, or eval()"
        )
    if eps <= 0 and (training or eps < 0):
        raise ValueError(
            f"batch_norm eps must be {'positive during training' if training else 'non-negative'}, but got {eps}"
        )
    if momentum is None:
        if training and running_mean is not None and batches is None:
            raise ValueError("momentum=None averages over batches and needs num_batches_tracked to count them")
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1 (the weight of the new value) or None, but got {momentum}")
    if running_mean is None or running_var is None:
        if not training:
            name = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"{name} must be defined in evaluation mode: pass statistics, or training=True")
        if running_mean is not running_var:
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    else:
        _check_channels("running_mean", running_mean, x, channels)
        _check_channels("running_var", running_var, x, channels)
    if weight is not None:
        _check_channels("weight", weight, x, channels)
    if bias is not None:
        _check_channels("bias", bias, x, channels)
    if batches is not None and batches.device != x.device:
        raise _elsewhere("num_batches_tracked", batches, x)


def _check_channels(name: str, t: Tensor, x: Tensor, channels: int) -> None:
    if t.shape != (channels,):
        if t.numel() != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements not {t.numel()}: "
                f"the input of size {tuple(x.shape)} has {channels} channels"
            )
        raise RuntimeError(
            f"{name} should be a vector of {channels} elements, got size {tuple(t.shape)}: use reshape(-1)"
        )
    if t.device != x.device:
        raise _elsewhere(name, t, x)
    if t.dtype == x.dtype or (t.dtype == torch.float32 and x.dtype in _NARROW):
        return
    if name.startswith("running") and t.dtype.is_floating_point:
        return  # a store of values, which may be wider (or, if somebody insists, narrower)
    raise RuntimeError(
        f"mixed dtype: {name} is {t.dtype} and the input is {x.dtype}; parameters have the input's dtype, "
        "or float32 beside half precision"
    )


def _elsewhere(name: str, t: Tensor, x: Tensor) -> RuntimeError:
    return RuntimeError(
        f"Tensor on device {t.device} is not on the expected device {x.device}!: {name} must be moved to the input's"
    )
