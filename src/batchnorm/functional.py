"""Batch normalization as a function: the fast path, or else arguments are checked, a kernel is chosen, and it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import backends, estimation, fast_path
from batchnorm.activations import activation_of
from batchnorm.arguments import Call, check
from batchnorm.kernels.epilogue import Epilogue
from batchnorm.kernels.running import Running, recomputing
from batchnorm.statistics import PLAIN, Policy, resolve

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
            kernel than the Numba kernel serves (the compiler, other dtypes), nothing is overwritten.
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
    compiling = torch.compiler.is_compiling()
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual) and not compiling:
        more: dict[str, Any] = {
            "num_batches_tracked": num_batches_tracked, "activation": activation, "residual": residual,
            "inplace": inplace, "mask": mask, "statistics": statistics, "state": state,
        }  # fmt: skip
        return _overridden(input, running_mean, running_var, weight, bias, training, momentum, eps, **more)

    if not (inplace or compiling):
        if training:
            y = fast_path.train(
                input, running_mean, running_var, weight, bias, momentum, eps, num_batches_tracked,
                activation, residual, mask, statistics, state,
            )  # fmt: skip
        else:
            y = fast_path.evaluate(input, running_mean, running_var, weight, bias, eps, activation, residual, mask)
        if y is not None:
            return y

    call = Call(
        input, Running(running_mean, running_var, num_batches_tracked, momentum), weight, bias, training, eps,
        Epilogue.of(activation_of(activation), residual, inplace), mask, resolve(statistics if training else None),
        state, updates=training and not recomputing(),
    )  # fmt: skip
    check(call)
    if mask is None and call.statistics is PLAIN:
        return backends.run(call)
    return estimation.run(call)


def _overridden(*positional: Any, **extras: Any) -> Tensor:
    """Let the tensors' own class, a mode or torch.fx's tracing do it, as torch's functions do."""
    extras = {name: value for name, value in extras.items() if value is not None and value is not False}
    y: Tensor = handle_torch_function(batch_norm, (*positional[:5], extras.get("residual")), *positional, **extras)
    return y


# What TorchScript compiles in this function's place; it has no policies, activations or masks.
batch_norm.__prepare_scriptable__ = lambda: backends.torchs_batch_norm  # type: ignore[attr-defined]
