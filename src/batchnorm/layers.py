"""Layers that take the place of ``torch.nn``'s: buffers, modes and repr; the work is in ``functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import UninitializedBuffer, is_lazy

from batchnorm.activations import activation_of, module_of
from batchnorm.arguments import check_momentum
from batchnorm.epilogue import WithEpilogue, recorded
from batchnorm.functional import batch_norm
from batchnorm.statistics import Accumulated, Batch, Policy, Renorm, alone, bind, check_policy, resolve
from batchnorm.takeover import Guarded

__all__ = [
    "OWN", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d",
    "channels_of", "widen_statistics",
]  # fmt: skip

if TYPE_CHECKING:
    _Base = nn.modules.batchnorm._BatchNorm  # what it is mixed into
else:
    _Base = object

OWN = ("activation", "inplace", "_statistics", "_watched", "_ahead")  # attributes that torch.nn's layers do not have
_STATISTICS = ("running_mean", "running_var")


def channels_of(layer: Any) -> int:
    """How many channels a batch normalization layer has: as its tensors say, where it has any.

    A lazy layer whose state was loaded before its first input says 0 for good; torchvision's frozen one does not say.
    """
    for name in ("running_mean", "weight", "bias"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor) and not is_lazy(tensor):
            return tensor.numel()
    return int(layer.num_features)


class _Ours(WithEpilogue, Guarded, _Base):
    """What the layers change of torch's own: the way to the kernels, and statistics that stay wide."""

    # Also what layers have that were pickled, or came from torch.nn, without them.
    inplace: bool = False
    _statistics: Policy | None = None

    def _obstacle_to_takeover(self, by: str) -> str | None:
        """What no layer of torch.nn does in this one's place, and what to do instead."""
        if self.activation is None or self._watched:
            return None
        return (
            f"without its activation {self.activation.name}: set its activation to None and put the activation's "
            "module behind it; or keep it, and convert(model, statistics=Sync()) instead"
        )

    @property
    def statistics(self) -> Policy:
        """Over which sets the moments are taken; setting it replaces what the layer remembers for the old policy."""
        return self._statistics or Batch()

    @statistics.setter
    def statistics(self, policy: Policy | None) -> None:
        check_policy(policy)
        if self._statistics is not None and self._statistics.buffer is not None:
            self._buffers.pop(self._statistics.buffer, None)
            self._non_persistent_buffers_set.discard(self._statistics.buffer)
        self._statistics = None if policy is None or type(policy) is Batch else bind(policy)
        if policy is not None and policy.buffer is not None:
            tensors = (*self._buffers.values(), *self._parameters.values())
            state = policy.state(channels_of(self), next((t.device for t in tensors if t is not None), None))
            self.register_buffer(policy.buffer, state, persistent=policy.persistent)

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize ``(N, C, *space)``, add the residual, apply the activation.

        It normalizes with the batch's moments in training, with the running statistics otherwise.

        Args:
            input: ``(N, C, *space)``.
            residual: of the same shape and dtype; added before the activation.
            mask: ``(N, *space)``, or of a shape that broadcasts to that; bool or weights: the positions that count.
        """
        if isinstance(input, Proxy):  # torch.fx: a leaf, as torch.nn's layers are
            call: Tensor = recorded(self, input, residual, mask, self.activation)
            return call
        self._check_input_dim(input)
        parameters, buffers = self._parameters, self._buffers
        try:  # a third of what getattr costs
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # pruning, parametrization and DataParallel's replicas keep some elsewhere
            weight, bias = self.weight, self.bias
            mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        training = self.training
        if not training:
            batches, training = None, mean is None and var is None
        elif not self.track_running_stats:
            mean = var = batches = None
        policy, state = self._statistics, None
        if policy is not None and training and not self.training:
            policy = alone(policy)  # as in torch.nn, evaluation waits for nobody
        if policy is not None and policy.buffer is not None:
            state = getattr(self, policy.buffer)
            if training and mean is None:  # whatever moves must move elsewhere
                statistics = buffers["running_mean"], buffers["running_var"], state
                mean, var, state = (None if t is None else t.clone() for t in statistics)
        activation, ahead = self.activation, self._ahead
        if ahead is not None:
            if type(input) is not Tensor or torch.compiler.is_compiling():
                ahead = None  # whoever records the forward sees its own activation
            else:
                activation = ahead.activation
        y = batch_norm(
            input, mean, var, weight, bias, training, self.momentum, self.eps, num_batches_tracked=batches,
            activation=activation, residual=residual, inplace=self.inplace, mask=mask, statistics=policy, state=state,
        )  # fmt: skip
        return y if ahead is None else ahead(y)

    def extra_repr(self) -> str:
        """Say what torch's layer says, and what is fused."""
        said: str = super().extra_repr()
        if self.activation is not None:
            name, parameter = self.activation
            said += f", activation={name}" + (f"({parameter:g})" if name in ("leaky_relu", "elu") else "")
        said += ", inplace=True" if self.inplace else ""
        return said + ("" if self._statistics is None else f", statistics={self._statistics}")

    def reset_running_stats(self) -> None:
        """Forget all batches, also what a policy remembers."""
        super().reset_running_stats()
        if self._statistics is not None and self._statistics.buffer is not None:
            self._buffers[self._statistics.buffer].zero_()  # type: ignore[union-attr]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        """Load as torch does; a checkpoint of a layer without this policy leaves what the policy remembers as it is."""
        policy = self._statistics
        if (
            policy is not None
            and policy.buffer is not None
            and policy.persistent
            and prefix + policy.buffer not in state_dict
        ):
            state_dict = {**state_dict, prefix + policy.buffer: self._buffers[policy.buffer]}
        super()._load_from_state_dict(state_dict, prefix, *more)
        widen_statistics(self)  # assign=True takes the checkpoint's own tensors
        for name in ("num_batches_tracked", Renorm.buffer):
            count = self._buffers.get(name)
            if count is not None and count.is_floating_point():  # a checkpoint whose every tensor was narrowed
                self._buffers[name] = count.long()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _STATISTICS:
            widen_statistics(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert everything as asked, but keep running statistics in float32 or wider, unrounded."""
        before = {name: self._buffers.get(name) for name in (*_STATISTICS, Accumulated.buffer)}
        super()._apply(fn, recurse)
        gathered = before.pop(Accumulated.buffer)
        widen_statistics(self, before)
        if gathered is not None:
            now = self._buffers[Accumulated.buffer]
            self._buffers[Accumulated.buffer] = gathered.to(now.device) if not gathered.is_meta else now.double()  # type: ignore[union-attr]
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Give TorchScript, which cannot compile this layer, what does the same in ``torch.nn``, with its tensors.

        TorchScript puts it in the layer's place in the model that it was given.
        """
        if self._statistics is not None and self.training:
            raise RuntimeError(
                f"TorchScript cannot train with {self._statistics}: call eval() first, or use torch.export"
            )
        twin = _torch_twin(self)
        if self.activation is not None:
            twin = nn.Sequential(twin, module_of(self.activation))
        # TorchScript remembers by id which layers it has seen: an id must not come back while it works.
        twin.__dict__["_stands_for"] = (self,)
        return twin


def widen_statistics(layer: nn.Module, values: dict[str, Tensor | None] | None = None) -> None:
    """Make narrow running statistics float32 again, from the values they had."""
    for name in _STATISTICS:
        buffer = layer._buffers.get(name)
        if buffer is None or buffer.dtype not in (torch.float16, torch.bfloat16):
            continue
        if isinstance(buffer, UninitializedBuffer):
            layer._buffers[name] = UninitializedBuffer(device=buffer.device, dtype=torch.float32)  # type: ignore[call-arg]
            continue
        kept = None if values is None else values[name]
        source = buffer if kept is None or kept.is_meta else kept
        layer._buffers[name] = source.to(device=buffer.device, dtype=torch.float32)


def _torch_twin(layer: nn.Module) -> nn.Module:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kind = next(kind for kind in kinds if isinstance(layer, kind))
    twin: nn.Module = kind.__new__(kind)
    twin.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in OWN})
    return twin


class _BatchNorm(_Ours, nn.modules.batchnorm._BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: Any = None,
        inplace: bool = False,
        statistics: Policy | None = None,
        **bias: bool,
    ) -> None:
        if num_features <= 0:
            raise ValueError(f"num_features must be at least 1, got {num_features}: it counts the channels")
        check_momentum(momentum)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **bias)
        self.activation, self.inplace, self.statistics = activation_of(activation), inplace, statistics
        widen_statistics(self)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch normalization of ``(N, C)`` or ``(N, C, L)``; takes the place of ``torch.nn.BatchNorm1d``.

    Args:
        num_features: C.
        eps: added to the variance, in the unit of the input squared.
        momentum: the weight of a new batch in the running statistics, 0 to 1; None for the plain average.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics for evaluation; without them, evaluation uses the batch's too.
        device, dtype, bias: as in ``torch.nn``; running statistics stay float32 or wider whatever ``dtype`` says.
        activation: what follows, computed in the same pass: a name such as "relu" or ``("leaky_relu", 0.2)``, or
            torch's function or module. Called with a residual, ``layer(x, skip)``, it gives
            ``activation(normalized + skip)``.
        inplace: let the result overwrite the input; see ``batchnorm.functional.batch_norm`` for when that is possible.
        statistics: a policy that says over which sets the moments are taken: ``Ghost(16)``, ``Renorm()``, ``Sync()``,
            ``Accumulated(4)``; see ``batchnorm.statistics``. By default over the batch.

    Raises:
        ValueError: input of other dimensions, one value per channel in training.
        RuntimeError: another number of channels, or a dtype that does not fit the parameters'.

    Example:
        >>> layer = BatchNorm1d(100)
        >>> y = layer(torch.randn(20, 100))

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch normalization of ``(N, C, H, W)``; takes the place of ``torch.nn.BatchNorm2d``. See ``BatchNorm1d``."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch normalization of ``(N, C, D, H, W)``; takes the place of ``torch.nn.BatchNorm3d``. See ``BatchNorm1d``."""


class _LazyBatchNorm(_Ours):
    """Becomes a layer of ours at the first input, which tells the number of channels."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: Any = None,
        inplace: bool = False,
        statistics: Policy | None = None,
        **bias: bool,
    ) -> None:
        check_momentum(momentum)
        arguments: Any = (eps, momentum, affine, track_running_stats, device, dtype)  # num_features is yet unknown
        super().__init__(*arguments, **bias)
        self.activation, self.inplace, self.statistics = activation_of(activation), inplace, statistics
        widen_statistics(self)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Take the number of channels from the first input; residual and mask, if there are any, say nothing new."""
        super().initialize_parameters(input)  # type: ignore[misc]
        self.num_features = input.shape[1]  # torch leaves it at 0 where a checkpoint was loaded before
        if resolve(self._statistics).accumulated is not None:
            self.statistics = self._statistics  # whose buffer is of that size


class LazyBatchNorm1d(_LazyBatchNorm, nn.LazyBatchNorm1d):
    """``BatchNorm1d`` that learns ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, nn.LazyBatchNorm2d):
    """``BatchNorm2d`` that learns ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, nn.LazyBatchNorm3d):
    """``BatchNorm3d`` that learns ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
