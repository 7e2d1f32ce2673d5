"""The arguments of batch normalization: what they are, and whether they fit together.

Whatever is wrong is found before anything is changed, and said as torch says it, with the sizes and the remedy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.activations import INVERTIBLE
from batchnorm.kernels.epilogue import Epilogue
from batchnorm.kernels.running import Running
from batchnorm.statistics import Policy, Resolved

__all__ = ["NARROW", "Call", "check", "check_mask", "check_momentum", "check_residual"]

NARROW = (torch.float16, torch.bfloat16)
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
_SMALLEST_SCALE = 2.0**-10  # of |weight|, in place; see batch_norm


class Call(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    running: Running
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float
    epilogue: Epilogue
    mask: Tensor | None
    statistics: Resolved
    state: Tensor | None
    updates: bool  # whether buffers move: in training, and not in a recomputation


def check(call: Call) -> None:
    """Raise what torch would raise, with the sizes and the remedy, before anything is changed."""
    x, (running_mean, running_var, batches, momentum), weight, bias, training, eps = call[:6]
    shape, dtype = x.shape, x.dtype
    if len(shape) < 2:
        raise ValueError(f"expected at least 2D input (got {len(shape)}D input): batch_norm needs (N, C, *space)")
    if not dtype.is_floating_point:
        kind = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        raise NotImplementedError(f'"batch_norm" not implemented for {kind!r}: convert the input to a floating dtype')
    channels = shape[1]
    if channels == 0:
        raise ValueError(f"expected at least 1 channel, got input size {shape}: dimension 1 counts the channels")
    alone = training and call.statistics.sync is None  # other processes may have more values
    if alone and shape[0] == 1 and x.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {shape}: one value has no variance; "
            "use a larger batch, drop the last one, or eval()"
        )
    if eps <= 0 and (training or eps < 0):
        raise ValueError(
            f"batch_norm eps must be {'positive during training' if training else 'non-negative'}, but got {eps}"
        )
    check_momentum(momentum)
    if momentum is None and training and running_mean is not None and batches is None:
        raise ValueError("momentum=None averages over batches and needs num_batches_tracked to count them")
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
    if call.epilogue.residual is not None:
        check_residual(call.epilogue.residual, x)
    if call.epilogue.inplace:
        _check_inplace(call)
    if call.mask is not None:
        check_mask(call.mask, x)
    if training and call.statistics.policy is not None:
        _check_policy(call, call.statistics.policy)


def check_momentum(momentum: float | Tensor | None) -> None:
    """Raise unless it is the weight of the new value in an average, or None."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1 (the weight of the new value) or None, but got {momentum}")


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raise unless the mask says of each position of x whether, or how much, it counts."""
    wanted = (*x.shape[:1], *x.shape[2:])
    try:
        fits = torch.broadcast_shapes(mask.shape, wanted) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(
            f"mask should have size {wanted}, the input's {tuple(x.shape)} without channels, or broadcast to it, "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool or floating weights, got {mask.dtype}: use mask.bool()")
    if mask.device != x.device:
        raise _elsewhere("mask", mask, x)
    if mask.requires_grad:
        raise ValueError("mask requires grad, and moments are not differentiated by their weights: use mask.detach()")
    known = not (mask.is_meta or torch.compiler.is_compiling())
    if mask.is_floating_point() and known and not bool(((mask >= 0) & mask.isfinite()).all()):
        raise ValueError("mask has negative, infinite or nan weights: a position counts with a weight of 0 or more")


def _check_policy(call: Call, policy: Policy) -> None:
    x, (_, ghost, renorm, _, accumulated) = call.x, call.statistics
    if ghost is not None and call.mask is None and x.numel() > 0:
        last = x.shape[0] % ghost.size or min(ghost.size, x.shape[0])
        if last * (x.numel() // (x.shape[0] * x.shape[1])) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}, of which "
                f"{ghost} leaves {last} sample for {'each' if ghost.size == 1 else 'the last'} part: one value has no "
                "variance; use a larger size, a batch size that it divides, or eval()"
            )
    if renorm is not None and call.running.mean is None:
        raise ValueError(
            f"{policy} corrects towards running statistics, and there are none: use track_running_stats=True"
        )
    state = call.state
    wanted = policy.state(x.shape[1])
    needed = accumulated is not None or (renorm is not None and renorm.schedule is not None)
    if needed and state is None and call.running.mean is not None:
        raise ValueError(
            f"{policy} keeps what it knows of earlier batches in state, and there is none: "
            f"pass state=statistics.state({x.shape[1]}), the same one for every batch"
        )
    if state is not None and wanted is not None and (state.shape != wanted.shape or state.dtype != wanted.dtype):
        raise RuntimeError(
            f"state should have size {tuple(wanted.shape)} and {wanted.dtype} for {policy} and {x.shape[1]} channels, "
            f"got {tuple(state.shape)} and {state.dtype}"
        )
    if state is not None and state.device != x.device:
        raise _elsewhere("state", state, x)


def check_residual(residual: Tensor, x: Tensor) -> None:
    """Raise unless the residual can be added to x."""
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


def _check_inplace(call: Call) -> None:
    """Refuse what could not be undone, or must not be overwritten, before anything is."""
    x, weight, bias, (activation, residual, _) = call.x, call.weight, call.bias, call.epilogue
    if residual is not None:
        raise ValueError("inplace=True keeps no residual, so the input could not be found again: use inplace=False")
    name, parameter = ("identity", 1.0) if activation is None else activation
    if name not in INVERTIBLE or parameter <= 0:
        raise ValueError(
            f"inplace=True needs an activation that can be undone ({', '.join(sorted(INVERTIBLE))}, with a parameter "
            f"above 0), not {name} with {parameter}: use inplace=False"
        )
    if name == "elu" and x.dtype in NARROW:
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
    if t.dtype == x.dtype or (t.dtype == torch.float32 and x.dtype in NARROW):
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
