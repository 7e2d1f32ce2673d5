"""Batch normalization as a function: arguments are checked, a kernel is chosen, running statistics move."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.activations import INVERTIBLE, Activation, activation_of, applied
from batchnorm.kernels import cpu, operators, reference
from batchnorm.kernels.choice import EVALUATE_FROM, EVALUATE_FUSED_FROM, asked_for, record, unwatched, which

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
_SMALLEST_SCALE = 2.0**-10  # of |weight|, in place; see batch_norm


class _Call(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float | None
    eps: float
    batches: Tensor | None
    activation: Activation | None = None
    residual: Tensor | None = None
    inplace: bool = False


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
    alone = activation is None and residual is None
    if not inplace and not torch.compiler.is_compiling():
        if training:
            plan = _common_case(input, running_mean, running_var, weight, bias, num_batches_tracked)
            if plan is not None and eps > 0 and momentum is not None and 0 <= momentum <= 1:
                running = None
                if torch._C._current_graph_task_id() == -1:  # else a recomputation, see _recomputing
                    running = cpu.Running(running_mean, running_var, num_batches_tracked, momentum)
                if alone:
                    return operators.train_cpu(input, plan, weight, bias, running, eps)
                if _usual(activation, residual, input):
                    extras = operators.Extras(activation, residual)
                    return operators.fused_cpu(input, plan, weight, bias, running, eps, extras)
        elif alone:
            return _evaluate(input, running_mean, running_var, weight, bias, momentum, eps)
        elif input.numel() < EVALUATE_FUSED_FROM and asked_for.get() is None and _usual(activation, residual, input):
            y = _evaluate(input, running_mean, running_var, weight, bias, momentum, eps)
            return applied(activation, y if residual is None else y + residual)
    call = _Call(
        input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked,
        activation_of(activation), residual, inplace,
    )  # fmt: skip
    _check(call)
    if torch.compiler.is_compiling():
        return _traced(call)
    return _train(call) if training else _evaluate_with(call)


def _recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)


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


def _train(call: _Call) -> Tensor:
    x, mean, var, weight, bias = call[:5]
    kernel = which(x, True, weight, bias, mean, var, call.batches, call.residual)
    if _recomputing():
        call = call._replace(running_mean=None, running_var=None, batches=None)
    if kernel == "cpu" and (call.batches is None or call.batches.dtype == torch.int64):
        return _train_cpu(call)
    train = _train_reference if kernel == "reference" else _train_aten
    record.forward = kernel
    y, batch_mean, unbiased = train(x, weight, bias, call.eps)
    _track(call, batch_mean, unbiased)
    return _followed(y, call)


def _followed(y: Tensor, call: _Call) -> Tensor:
    """Residual and activation by torch's own operators."""
    return applied(call.activation, y if call.residual is None else y + call.residual)


def _train_cpu(call: _Call) -> Tensor:
    x, plan = cpu.laid_out(call.x)
    weight, bias = _ready(call.weight, plan), _ready(call.bias, plan)
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
        buffer.copy_(t)
    return y


def _ready(t: Tensor | None, plan: cpu.Plan) -> Tensor | None:
    return None if t is None else t.to(plan.statistics).contiguous()


def _extras(call: _Call, x: Tensor) -> operators.Extras:
    """What goes along with x, laid out like it; a copy of the input, which it is then, can be overwritten as well."""
    residual = call.residual
    if residual is not None and residual.stride() != x.stride():
        residual = torch.empty_like(x).copy_(residual)
    return operators.Extras(call.activation, residual, call.inplace)


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


def _track(call: _Call, mean: Tensor | None, unbiased: Tensor | None) -> None:
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


def _traced(call: _Call) -> Tensor:
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
    call = _Call(x, running_mean, running_var, weight, bias, False, momentum, eps, None)
    small = asked_for.get() is None and x.numel() * x.element_size() < EVALUATE_FROM
    if small and eps >= 0:
        # ATen checks enough for itself. Evaluation changes nothing, so our own checks can wait until it objects.
        try:
            y = _evaluate_aten(x, running_mean, running_var, weight, bias, eps)
        except (RuntimeError, IndexError, ValueError):
            _check(call)
            if running_mean is None or running_var is None or x.dtype in _NARROW or running_mean.dtype == x.dtype:
                raise
            # Statistics of another precision, which training can move: ATen wants the input's.
            y = _evaluate_aten(x, running_mean.to(x.dtype), running_var.to(x.dtype), weight, bias, eps)
        record.forward = "aten"
        return y
    _check(call)
    return _evaluate_with(call)


def _evaluate_with(call: _Call) -> Tensor:
    x, running_mean, running_var, weight, bias = call[:5]
    assert running_mean is not None  # _check has seen to it
    assert running_var is not None
    alone = call.activation is None and call.residual is None and not call.inplace
    others = weight, bias, running_mean, running_var, call.residual
    kernel = record.forward = which(x, call.inplace, *others, fused=not alone)
    if kernel == "reference":
        return _followed(reference.inference(x, running_mean, running_var, weight, bias, call.eps), call)
    if kernel == "cpu":
        x, plan = cpu.laid_out(x, given=True)
        given = torch.stack((running_mean.double(), running_var.double()))
        weight, bias = _ready(weight, plan), _ready(bias, plan)
        return operators.fused_cpu(x, plan, weight, bias, None, call.eps, _extras(call, x), given)
    if x.dtype not in _NARROW and running_mean.dtype != x.dtype:
        running_mean, running_var = running_mean.to(x.dtype), running_var.to(x.dtype)
    return _followed(_evaluate_aten(x, running_mean, running_var, weight, bias, call.eps), call)


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


def _check(call: _Call) -> None:
    """Raise what torch would raise, with the sizes and the remedy, before anything is changed."""
    x, running_mean, running_var, weight, bias, training, momentum, eps, batches = call[:9]
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
    if call.residual is not None:
        _check_residual(call.residual, x)
    if call.inplace:
        _check_inplace(call)


def _check_residual(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape:
        raise RuntimeError(
            f"residual should have the input's size {tuple(x.shape)}, got {tuple(residual.shape)}: "
            "it is not broadcast; use expand_as"
        )
    if residual.device != x.device:
        raise _elsewhere("residual", residual, x)
    if residual.dtype != x.dtype:
        raise RuntimeError(f"mixed dtype: residual is {residual.dtype} and the input is {x.dtype}: convert one of them")
    if residual.layout != torch.strided:
        raise RuntimeError(f"residual is {residual.layout}, and only strided tensors can be added: use to_dense()")


def _check_inplace(call: _Call) -> None:
    """Refuse what could not be undone, or must not be overwritten, before anything is."""
    x, weight, bias, activation = call.x, call.weight, call.bias, call.activation
    if call.residual is not None:
        raise ValueError("inplace=True keeps no residual, so the input could not be found again: use inplace=False")
    name, parameter = ("identity", 1.0) if activation is None else activation
    if name not in INVERTIBLE or parameter <= 0:
        raise ValueError(
            f"inplace=True needs an activation that can be undone ({', '.join(sorted(INVERTIBLE))}, with a parameter "
            f"above 0), not {name} with {parameter}: use inplace=False"
        )
    if name == "elu" and x.dtype in _NARROW:
        raise ValueError(f"inplace=True cannot undo 'elu' in {x.dtype}, where it is flat below -6: use inplace=False")
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation: batch_norm(inplace=True) would "
            f"overwrite the input of size {tuple(x.shape)}; use inplace=False, or give it a convolution's result"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location: "
            f"the input of size {tuple(x.shape)} is expanded; use clone() or inplace=False"
        )
    if weight is not None:
        size = weight.detach().abs().double()
        limit = _SMALLEST_SCALE * (1.0 if bias is None else bias.detach().abs().double().clamp(min=1.0))
        small = (~(size >= limit)).nonzero().flatten().tolist() if not torch.compiler.is_compiling() else []
        if small:
            raise RuntimeError(
                f"inplace=True cannot find the input again through a weight of {weight[small[0]].item():g} in channel "
                f"{small[0]} ({len(small)} of {len(weight)} channels below 1/1024 of their bias or of 1): "
                "use inplace=False, or keep weights away from 0"
            )


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
