"""Blocks as detectors and segmentation decoders have them: every layer is folded, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import randomized
from torch import Tensor, nn

import batchnorm


class Conv(nn.Module):
    """As YOLO's: convolution, normalization, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(channels, channels, 3), Conv(channels, channels, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """The parts of a chunk go on one after the other, in a list that grows."""

    def __init__(self, inputs: int, outputs: int, number: int = 2) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = Conv(inputs, 2 * self.c), Conv((2 + number) * self.c, outputs)
        self.m = nn.ModuleList(Bottleneck(self.c) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(inputs, inputs // 2), Conv(inputs * 2, outputs)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class RepConv(nn.Module):
    """Branches of two sizes and one without a convolution, added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels, 3, act=False), Conv(channels, channels, 1, act=False)
        self.bn, self.act = nn.BatchNorm2d(channels), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x) + self.bn(x))


class Joined(nn.Module):
    """One normalization of two convolutions side by side, as YOLOv3's CSP block has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        c = outputs // 2
        self.cv1, self.m = Conv(inputs, c), Bottleneck(c, shortcut=False)
        self.cv2, self.cv3 = nn.Conv2d(inputs, c, 1, bias=False), nn.Conv2d(c, c, 1, bias=False)
        self.bn, self.act, self.cv4 = nn.BatchNorm2d(2 * c), nn.SiLU(), Conv(2 * c, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y1, y2 = self.cv3(self.m(self.cv1(x))), self.cv2(x)
        return self.cv4(self.act(self.bn(torch.cat((y1, y2), 1))))


class Detector(nn.Module):
    """Layers numbered in a list, each of which says from where it comes; boxes computed from numbers of the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList([Conv(3, 8, 3, 2), C2f(8, 8), Conv(8, 16, 3, 2), SPPF(16, 16), nn.Upsample(None, 2)])
        self.model.extend([Joined(24, 8), RepConv(8), nn.Conv2d(8, 6, 1)])
        self.save, self.sources = {1}, {5: (4, 1)}

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor | None] = []
        for i, layer in enumerate(self.model):
            if i in self.sources:
                x = torch.cat([x, *(kept for j in self.sources[i] if (kept := outputs[j]) is not None)], 1)
            x = layer(x)
            outputs.append(x if i in self.save else None)
        ys, xs = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
        return x.sigmoid() + torch.stack([xs, ys]).sum(0)


class UNet(nn.Module):
    """Encoder and decoder with skips, transposed convolutions, and padding by differences of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.twice(3, 4), self.twice(4, 8)
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.last, self.head = self.twice(8, 4), nn.Conv2d(4, 2, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Sequential:
        pairs = [(inputs, outputs), (outputs, outputs)]
        parts = [(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)) for i, o in pairs]
        return nn.Sequential(*(part for each in parts for part in each))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        y = self.up(self.down2(F.max_pool2d(first, 2)))
        height, width = (first.size(i) - y.size(i) for i in (2, 3))
        y = F.pad(y, [width // 2, width - width // 2, height // 2, height - height // 2])
        return self.head(self.last(torch.cat([first, y], 1)))


class ASPP(nn.Module):
    """As DeepLab's: dilated branches beside each other, one of them pooled to a single pixel and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(3, 6, 3)

        def unit(*options: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(6, 4, *options, bias=False), nn.BatchNorm2d(4), nn.ReLU())

        self.branches = nn.ModuleList([unit(1), unit(3, 1, 2, 2), unit(3, 1, 4, 4)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *unit(1))
        self.project = nn.Sequential(nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        found = [branch(x) for branch in self.branches]
        found.append(F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(found, 1))


class Separable(nn.Module):
    """As mmcv's ConvModule: the order is a matter of options, and layers are found by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm_name = nn.Conv2d(3, 6, 3, padding=1, bias=False), "bn"
        self.add_module(self.norm_name, nn.BatchNorm2d(6))
        self.activate, self.order = nn.ReLU(inplace=True), ("conv", "norm", "act")
        self.deep, self.point = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.Conv2d(6, 4, 1, bias=False)
        self.last = nn.BatchNorm2d(4)

    @property
    def norm(self) -> nn.Module:
        return self.get_submodule(self.norm_name)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate:
                x = self.activate(x)
        return self.last(self.point(self.deep(x)))


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "YOLO": (Detector, 18),
    "U-Net": (UNet, 7),
    "DeepLab": (ASPP, 6),
    "ConvModule": (Separable, 2),
}


@pytest.mark.parametrize(("make", "layers"), BLOCKS.values(), ids=BLOCKS)
def test_every_layer_is_folded(make: Callable[[], nn.Module], layers: int) -> None:
    torch.manual_seed(0)
    model = randomized(make()).double().eval()
    x = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    result = batchnorm.fold(model, x)
    assert len(names) == layers
    assert (sorted(result.folded), result.skipped) == (sorted(names), {})
    assert result.max_error_float64 <= 1e-12
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-11, atol=1e-11)
    other = torch.randn(1, 3, 24, 20, dtype=torch.float64)
    torch.testing.assert_close(result.model(other), model(other), rtol=1e-11, atol=1e-11)
    alone = batchnorm.fold(model)
    assert sorted([*alone.folded, *alone.skipped]) == sorted(names)
    torch.testing.assert_close(alone.model(x), model(x), rtol=1e-11, atol=1e-11)
