"""Batch normalization as other packages write it: subclasses of torch.nn's, and classes of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from with_timm import timm

BatchNormAct2d: Any = timm.layers.BatchNormAct2d
FrozenBatchNormAct2d: Any = timm.layers.norm_act.FrozenBatchNormAct2d
FrozenBatchNorm2d: Any = timm.layers.norm_act.FrozenBatchNorm2d
SyncBatchNormAct: Any = timm.layers.SyncBatchNormAct
SplitBatchNorm2d: Any = timm.layers.SplitBatchNorm2d


class Renamed(nn.BatchNorm2d):
    """With another constructor and an attribute more."""

    def __init__(self, width: int, name: str = "stem") -> None:
        super().__init__(width, eps=1e-3, momentum=0.01)
        self.label = name


class NormRelu(nn.BatchNorm2d):
    """With a function behind normalization."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class NormLeaky(nn.BatchNorm1d):
    """With names that our layers have, too, and mean something else."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation, self.inplace, self.slope = "leaky_relu", True, 0.2

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.leaky_relu(y, self.slope, self.inplace) if self.activation == "leaky_relu" else y


class SwishByHand(nn.Module):
    """As in YOLOv5, for export."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class NormSwish(nn.BatchNorm3d):
    """With a module of its author's own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=None)
        self.act = SwishByHand()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class ByHand(nn.BatchNorm2d):
    """Calls the function, as timm and inplace_abn do, and applies what a string says."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return y * F.relu6(y + 3) / 6


class FromScratch(nn.BatchNorm2d):
    """Has no function of torch's for it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                count = x.numel() / x.size(1)
                self.running_mean.mul_(1 - self.momentum).add_(mean * self.momentum)
                self.running_var.mul_(1 - self.momentum).add_(var * (self.momentum * count / (count - 1)))
                self.num_batches_tracked.add_(1)
        else:
            mean, var = self.running_mean, self.running_var
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + self.eps)
        return y * self.weight.view(shape) + self.bias.view(shape)


class HeldInEvaluation(nn.BatchNorm2d):
    """Inherits its forward, and overrides something else."""

    def train(self, mode: bool = True) -> HeldInEvaluation:
        super().train(False)
        return self


class DetectronFrozen(nn.Module):
    """As in detectron2."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.to(x.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class Held(nn.BatchNorm2d):
    """Never normalizes with the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


# --- which compute something else ---


class Shifted(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class WithSkip(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Absolute(nn.BatchNorm2d):
    """As inplace_abn's weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.abs() + self.eps
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, self.training, 0.1, self.eps)


class Patient(nn.BatchNorm2d):
    """Does nothing to single samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if not self.training or x.size(0) > 1 else x


class Negligent(nn.BatchNorm2d):
    """Does not count batches, and moves its statistics twice as fast."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 2 * self.momentum, self.eps)


class Synchronized(nn.BatchNorm2d):
    """As detectron2's NaiveSyncBatchNorm: alone, it is batch normalization."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or _processes() == 1:
            return super().forward(x)
        raise AssertionError("this test has one process")


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Remembering(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Gated(nn.BatchNorm2d):
    """With a learned tensor of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class Broken(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a bug of its author's")


class Conditional(nn.BatchNorm2d):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if scale is None else y * scale
