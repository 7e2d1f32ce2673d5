"""Arms: the networks that a comparison sets against each other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

DEPTH = 6
WIDTH = 16
CLASSES = 10


@dataclass(frozen=True)
class Arm:
    """One configuration in a comparison: a name and a function that builds its untrained network."""

    name: str
    build: Callable[[], nn.Module]


def build(arm: Arm, seed: int) -> nn.Module:
    """Build an arm's network from a seed, in float32 on the CPU, leaving the caller's random state as it was.

    Normalization layers draw no random numbers, so all arms of one architecture get the same initial weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return arm.build().float()


def plain() -> nn.Module:
    """Return the small CNN without normalization."""
    return _cnn(norm=None)


def batch_normalized() -> nn.Module:
    """Return the same CNN with `batchnorm.BatchNorm2d` between each convolution and its ReLU."""
    from batchnorm.layers import BatchNorm2d

    return _cnn(norm=BatchNorm2d)


def _cnn(norm: Callable[[int], nn.Module] | None) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for index in range(DEPTH):
        layers.append(_convolution(channels, stride=2 if index == DEPTH // 2 else 1))
        if norm is not None:
            layers.append(norm(WIDTH))
        layers.append(nn.ReLU())
        channels = WIDTH
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, CLASSES))


def _convolution(channels: int, stride: int) -> nn.Conv2d:
    """Return a 3×3 convolution with He initialization: without it the arm with no norm would start handicapped.

    The bias is redundant before batch normalization; it stays so that both arms have the same parameters.
    """
    convolution = nn.Conv2d(channels, WIDTH, kernel_size=3, stride=stride, padding=1)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


ARMS = (Arm("no norm", plain), Arm("batch norm", batch_normalized))
