"""Blocks as detectors, segmentation networks and toolboxes write them, small, in their kinds of code."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- detectors of YOLO's kind ---


class Conv(nn.Module):
    """All blocks share one activation module, which is an attribute of the class."""

    default_act = nn.SiLU()

    def __init__(self, inputs: int, outputs: int, k: int = 1, s: int = 1, g: int = 1, act: Any = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = self.default_act if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class YoloBottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(channels, channels, 3), Conv(channels, channels, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Halves of a tensor, a growing list of what was computed, and all of it concatenated."""

    def __init__(self, inputs: int, outputs: int, n: int = 2) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, 2 * self.c), Conv((2 + n) * self.c, outputs)
        self.m = nn.ModuleList(YoloBottleneck(self.c) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = Conv(channels, 2), Conv(8, channels), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class RepConv(nn.Module):
    """Three branches into one activation; one of them may not be there."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.act, self.bn = nn.SiLU(), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = Conv(channels, channels, 3, act=False), Conv(channels, channels, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        id_out = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + id_out)


class Detector(nn.Module):
    """Layers in a list, each of which says from where it reads; a head that concatenates two scales."""

    def __init__(self) -> None:
        super().__init__()
        down, up = Conv(4, 4, 3, 2), nn.Upsample(scale_factor=2)
        self.model = nn.Sequential(Conv(2, 4, 3), C2f(4, 4), down, SPPF(4), RepConv(4), up, Conv(8, 4), C2f(4, 4, 1))
        self.reads = [-1, -1, -1, -1, -1, -1, (-1, 1), -1]

    def forward(self, x: Tensor) -> Tensor:
        y: list[Tensor] = []
        for reads, m in zip(self.reads, self.model, strict=True):
            if isinstance(reads, tuple):
                x = torch.cat([x if j == -1 else y[j] for j in reads], 1)
            x = m(x)
            y.append(x)
        return x


# --- toolboxes: a module that finds its parts by name, in an order that its configuration gives ---


class ConvModule(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        k: int = 1,
        order: tuple[str, ...] = ("conv", "norm", "act"),
        inplace: bool = True,
    ) -> None:
        super().__init__()
        self.order, self.with_norm, self.with_activation = order, "norm" in order, "act" in order
        self.conv = nn.Conv2d(inputs, outputs, k, padding=k // 2)
        self.norm_name = "bn"
        self.add_module(
            self.norm_name, nn.BatchNorm2d(outputs if order.index("norm") > order.index("conv") else inputs)
        )
        if self.with_activation:
            self.activate = nn.ReLU(inplace=inplace)

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class Toolbox(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ConvModule(2, 4, 3)
        self.before = ConvModule(4, 4, 3, order=("norm", "act", "conv"))
        self.last = nn.Sequential(ConvModule(4, 4), ConvModule(4, 4, 3, order=("conv", "norm")))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.first(x))
        return F.relu(x + self.last(x))


class NamedResidual(nn.Module):
    """Norms that are found by name; an inner function, which checkpointing would get; an addition in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.add_module(self.norm1_name, nn.BatchNorm2d(channels))
        self.add_module(self.norm2_name, nn.BatchNorm2d(channels))
        self.relu, self.with_cp = nn.ReLU(inplace=True), False

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.norm2(self.conv2(out))
            out += x
            return out

        return self.relu(inner(x))


# --- segmentation ---


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for i, o in ((inputs, outputs), (outputs, outputs)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class Up(nn.Module):
    """Pads to the size of what it is concatenated with; functions instead of modules."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        if dy > 0 or dx > 0:
            x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        x = F.relu(self.bn1(self.conv1(torch.cat([skip, x], dim=1))), inplace=True)
        return F.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down = DoubleConv(2, 4), nn.Sequential(nn.MaxPool2d(2), DoubleConv(4, 8))
        self.up, self.outc = Up(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        return self.outc(self.up(self.down(skip), skip))


class Pooling(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        super().__init__(nn.AdaptiveAvgPool2d(1), conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for part in self:
            x = part(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        branches: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate), nn.BatchNorm2d(outputs), nn.ReLU()
            )
            for rate in (1, 2)
        ]
        self.convs = nn.ModuleList([*branches, Pooling(inputs, outputs)])
        joined = nn.Conv2d(3 * outputs, outputs, 1)
        self.project = nn.Sequential(joined, nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for conv in self.convs:
            found.append(conv(x))
        return self.project(torch.cat(found, dim=1))


class DeepLab(nn.Module):
    """Returns a dict, and low-level features beside the pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), NamedResidual(4))
        self.high, self.aspp = DoubleConv(4, 4), ASPP(4, 4)
        self.shrink = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        high = F.interpolate(self.aspp(F.max_pool2d(self.high(low), 2)), size=low.shape[2:], mode="nearest")
        return {"out": self.classifier(torch.cat([self.shrink(low), high], 1))}


class HighResolution(nn.Module):
    """As in HRNet: a list of scales goes in, is written into, and sums of all scales come out."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(DoubleConv(4, 4) for _ in range(2))
        down = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4))
        up = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2))
        self.fuse_layers = nn.ModuleList([nn.ModuleList([nn.Identity(), up]), nn.ModuleList([down, nn.Identity()])])
        self.relu = nn.ReLU(False)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for i, branch in enumerate(self.branches):
            x[i] = branch(x[i])
        fused = []
        for i, row in enumerate(self.fuse_layers):
            y = x[0] if i == 0 else row[0](x[0])
            for j in range(1, len(row)):
                y = y + x[j] if i == j else y + row[j](x[j])
            fused.append(self.relu(y))
        return fused


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.stages = nn.Sequential(HighResolution(), HighResolution())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        high, low = self.stages([x, F.avg_pool2d(x, 2)])
        return high + F.interpolate(low, scale_factor=2)
