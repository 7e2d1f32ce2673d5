"""Names of data sets in timm's table of them; none is made."""

from __future__ import annotations

from typing import Any


class ImageFolder:
    """No data set: whoever makes one has forgotten that this is not torchvision."""

    def __init__(self, *given: Any, **named: Any) -> None:
        raise NotImplementedError("the tests have no data sets of torchvision")


class CIFAR10(ImageFolder):
    """A name."""


class CIFAR100(ImageFolder):
    """A name."""


class MNIST(ImageFolder):
    """A name."""


class KMNIST(ImageFolder):
    """A name."""


class FashionMNIST(ImageFolder):
    """A name."""
