"""Whole networks, written once: who builds one says what batch normalization is made of.

Every network takes a factory, ``norm(channels, activation)``, whose layers are called with an input and, to add it
before the activation, a residual. Ours does all of that in one pass; ``contenders.Plain`` does it with torch.nn, one
operator each.

Sources: He et al. 2015, arXiv 1512.03385 (ResNet); Huang et al. 2016, arXiv 1608.06993 (DenseNet); Sandler et al. 2018,
arXiv 1801.04381 (MobileNetV2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int, str | None], nn.Module]


class ConvNorm(nn.Module):
    """Convolution, batch normalization, a residual if one is given, activation."""

    def __init__(
        self, norm: Norm, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1,
        activation: str | None = "relu",
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.norm = norm(outputs, activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply them."""
        found: Tensor = self.norm(self.conv(x)) if residual is None else self.norm(self.conv(x), residual)
        return found


class _Residual(nn.Module):
    """A branch whose last layer adds the shortcut: the input itself, or a projection of it."""

    def __init__(self, branch: list[ConvNorm], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.branch, self.last, self.shortcut = nn.Sequential(*branch[:-1]), branch[-1], shortcut

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.branch(x), x if self.shortcut is None else self.shortcut(x))
        return found


def _basic(norm: Norm, inputs: int, width: int, stride: int) -> nn.Module:
    """ResNet-18's block."""
    project = stride != 1 or inputs != width
    shortcut = ConvNorm(norm, inputs, width, 1, stride, activation=None) if project else None
    return _Residual([ConvNorm(norm, inputs, width, 3, stride), ConvNorm(norm, width, width, 3)], shortcut)


def _bottleneck(norm: Norm, inputs: int, width: int, stride: int) -> nn.Module:
    """ResNet-50's block; the stride is in its 3×3 convolution."""
    project = stride != 1 or inputs != 4 * width
    shortcut = ConvNorm(norm, inputs, 4 * width, 1, stride, activation=None) if project else None
    branch = [
        ConvNorm(norm, inputs, width, 1),
        ConvNorm(norm, width, width, 3, stride),
        ConvNorm(norm, width, 4 * width, 1),
    ]
    return _Residual(branch, shortcut)


def _resnet(
    norm: Norm, classes: int, block: Callable[..., nn.Module], grows: int, depths: tuple[int, ...]
) -> nn.Module:
    layers: list[nn.Module] = [ConvNorm(norm, 3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for i in range(depth):
            layers.append(block(norm, channels, width, 2 if stage and not i else 1))
            channels = grows * width
    return nn.Sequential(*layers, *_head(channels, classes))


def resnet18(norm: Norm, classes: int = 100) -> nn.Module:
    """ResNet-18."""
    return _resnet(norm, classes, _basic, 1, (2, 2, 2, 2))


def resnet50(norm: Norm, classes: int = 100) -> nn.Module:
    """ResNet-50."""
    return _resnet(norm, classes, _bottleneck, 4, (3, 4, 6, 3))


class _NormConv(nn.Module):
    """The other order: batch normalization, activation, convolution."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.norm = norm(inputs, "relu")
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(self.norm(x))
        return found


class _Dense(nn.Module):
    """A layer that adds its channels to those it was given."""

    def __init__(self, norm: Norm, inputs: int, growth: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_NormConv(norm, inputs, 4 * growth, 1), _NormConv(norm, 4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.branch(x)), 1)


def densenet121(norm: Norm, classes: int = 100) -> nn.Module:
    """DenseNet-121."""
    growth, channels = 32, 64
    layers: list[nn.Module] = [ConvNorm(norm, 3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [_NormConv(norm, channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(_Dense(norm, channels, growth))
            channels += growth
    return nn.Sequential(*layers, norm(channels, "relu"), *_head(channels, classes))


class _Inverted(nn.Module):
    """MobileNetV2's block: wider, a convolution of each channel by itself, narrower without an activation."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        wider = [ConvNorm(norm, inputs, wide, 1, activation="relu6")] if expand > 1 else []
        self.branch = nn.Sequential(*wider, ConvNorm(norm, wide, wide, 3, stride, wide, "relu6"))
        self.last = ConvNorm(norm, wide, outputs, 1, activation=None)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.branch(x), x if self.adds else None)
        return found


def mobilenet_v2(norm: Norm, classes: int = 100) -> nn.Module:
    """MobileNetV2, without dropout."""
    layers: list[nn.Module] = [ConvNorm(norm, 3, 32, 3, 2, activation="relu6")]
    channels = 32
    for expand, outputs, depth, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for i in range(depth):
            layers.append(_Inverted(norm, channels, outputs, stride if not i else 1, expand))
            channels = outputs
    return nn.Sequential(*layers, ConvNorm(norm, channels, 1280, 1, activation="relu6"), *_head(1280, classes))


def _head(channels: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


MODELS: dict[str, Callable[[Norm], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "DenseNet-121": densenet121,
    "MobileNetV2": mobilenet_v2,
}


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Give what a training step goes down."""
    return F.cross_entropy(model(x), target)
