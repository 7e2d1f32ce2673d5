"""Networks as people write them, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomized(model: nn.Module) -> nn.Module:
    """Weights and statistics that are not the initial ones, so that nothing cancels by luck."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.normal_(layer.weight, 1, 0.2)
            nn.init.normal_(layer.bias, 0, 0.2)
            if layer.running_mean is not None:
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.5, 2)
    return model


def image(channels: int = 2, side: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, channels, side, side, generator=generator).to(dtype)


class BasicBlock(nn.Module):
    """As in torchvision: one ReLU module for two places, and an addition in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """With functions instead of modules."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.conv3, self.bn3 = nn.Conv2d(2, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)).relu_()
        return torch.relu(torch.add(x, self.bn3(self.conv3(out))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 6))
        self.layer2 = nn.Sequential(Bottleneck(6))
        self.fc = nn.Linear(6, 3)
        self.about = {"name": "resnet"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """As in MobileNetV2: the last layer has no activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
            nn.Conv2d(8, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class DenseNet(nn.Module):
    """BN before ReLU before convolution, of concatenated features."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(2), nn.BatchNorm2d(5)])
        self.relus = nn.ModuleList([nn.ReLU(inplace=True), nn.ReLU(inplace=True)])
        self.convs = nn.ModuleList([nn.Conv2d(2, 3, 1), nn.Conv2d(5, 3, 1)])
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, relu, conv in zip(self.norms, self.relus, self.convs, strict=True):
            features.append(conv(relu(norm(torch.cat(features, 1)))))
        return F.relu(self.norm(torch.cat(features, 1)), inplace=True).mean((2, 3))


class Undecided(nn.Module):
    """Cannot be traced: what it does depends on values."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), activation
        self.second = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = x - 1
        return self.second(self.act(self.norm(self.conv(x)))).mean((2, 3))


class Branches(nn.Module):
    """As in Inception: convolutions of several sizes beside each other, and what they find concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = self.unit(inputs, 3, 1)
        self.three = nn.Sequential(self.unit(inputs, 2, 1), self.unit(2, 3, (1, 3)), self.unit(3, 3, (3, 1)))
        self.pooled = self.unit(inputs, 2, 1)

    @staticmethod
    def unit(inputs: int, outputs: int, kernel: Any) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, kernel, padding="same", bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        three = self.three(x)
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([F.relu(self.one(x)), F.relu(three), F.relu(pooled)], 1)


class Inception(nn.Module):
    """With a dropout that looks at the mode, and a head of its own for training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Branches(2)
        self.second = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.branches = Branches(4).three
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.branches(F.dropout(self.second(self.first(x)), 0.2, self.training))
        return self.head(x.mean((2, 3)))


class Tail(nn.Module):
    """A convolution, a layer, and whatever a test wants behind."""

    def __init__(self, tail: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()
        for name, part in parts.items():
            setattr(self, name, part)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, x, self.bn(self.conv(x)))
