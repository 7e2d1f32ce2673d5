"""How long changing a whole model takes, beside how long the model itself takes.

    python benchmarks/surgery_time.py [layers, at most]

Everything runs on one thread, and seconds are the process's, so that other work on the machine counts for little. What
must not happen is that the seconds for 100 layers grow with the number of layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import batchnorm

SIDE = 32
VERBS: dict[str, Callable[[nn.Module, Any], Any]] = {"fuse": batchnorm.fuse, "fold": batchnorm.fold}


class Block(nn.Module):
    """Two layers with an addition in place between them and one activation module for both, as in torchvision."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add what two convolutions find."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        found: Tensor = self.relu(out)
        return found


def flat(layers: int) -> nn.Module:
    """All blocks in one sequence."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), *(Block(8) for _ in range(layers // 2)))


def nested(layers: int) -> nn.Module:
    """Sequences within each other, as deep as the number of layers has doubled."""
    return Block(8) if layers <= 2 else nn.Sequential(nested(layers // 2), nested(layers - layers // 2))


def networks() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Networks of growing size, and some that others have written, where their packages are installed."""
    for layers in (25, 50, 100, 200):
        yield f"{layers} layers in a row", lambda n=layers: flat(n)  # type: ignore[misc]
    for layers in (25, 50, 100, 200):
        yield f"{layers} layers, nested", lambda n=layers: nn.Sequential(nn.Conv2d(3, 8, 1), nested(n))  # type: ignore[misc]
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    try:
        from with_timm import timm  # type: ignore[import-not-found]  # with a stand-in for torchvision
    except ImportError:
        print("timm is not installed: its networks are left out")
    else:
        for name in ("resnet50", "mobilenetv3_small_050", "regnetx_002", "repvgg_a0", "mobileone_s0"):
            yield f"timm {name}", lambda name=name: timm.create_model(name)  # type: ignore[misc]
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: its networks are left out")
    else:
        yield "transformers ResNet-50", lambda: transformers.ResNetModel(transformers.ResNetConfig())
        yield (
            "transformers ResNet-101",
            lambda: transformers.ResNetModel(transformers.ResNetConfig(depths=[3, 4, 23, 3])),
        )
        yield "transformers MobileNetV2", lambda: transformers.MobileNetV2Model(transformers.MobileNetV2Config())


def seconds(work: Callable[[], Any]) -> float:
    """The process's time for one call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    """Print one row for each network."""
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 10**6
    torch.set_num_threads(1)
    table = Table(title=f"Seconds on 2 × 3 × {SIDE} × {SIDE} values; /100: beyond 4 forwards, for 100 layers")
    table.add_column("network", no_wrap=True)
    for column in ("layers", "forward", *VERBS, *(f"{verb}/100" for verb in VERBS)):
        table.add_column(column, justify="right", no_wrap=True)
    x = torch.randn(2, 3, SIDE, SIDE)
    for verb in VERBS.values():  # what is loaded at first use does not count
        verb(flat(2), x)
    for name, build in networks():
        torch.manual_seed(0)
        model = build().eval()
        layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        if layers > most:
            continue
        with torch.no_grad():
            model(x)
            forward = min(seconds(lambda m=model: m(x)) for _ in range(3))  # type: ignore[misc]
        taken = [seconds(lambda m=model, verb=verb: verb(m, x)) for verb in VERBS.values()]  # type: ignore[misc]
        beyond = [(t - 4 * forward) * 100 / layers for t in taken]
        table.add_row(name, str(layers), f"{forward:.3f}", *(f"{t:.2f}" for t in (*taken, *beyond)))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
