"""Data: images split into training, validation and test parts, and the order in which training sees them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

TRAINING_IMAGES = 1000
TEST_IMAGES = 400


@dataclass(frozen=True)
class Part:
    """Images [N, C, H, W] and their labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """One data set in three parts that share no image."""

    name: str
    classes: int
    train: Part
    validation: Part
    test: Part


def digits() -> Data:
    """Return scikit-learn's handwritten digits: 1797 images of 8×8, which come with scikit-learn.

    The split is the same in every run; images are standardized with the training images' mean and deviation.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1)
    labels = torch.from_numpy(bunch.target)
    rest, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, train_size=TRAINING_IMAGES, stratify=labels[rest], random_state=0)
    images = (images - images[train].mean()) / images[train].std()

    def part(indices: list[int]) -> Part:
        return Part(images[indices], labels[indices])

    return Data("digits", 10, part(train), part(validation), part(test))


def order(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield the image indices of each step: one fresh shuffle an epoch, its incomplete last batch left out."""
    generator = torch.Generator("cpu").manual_seed(seed)
    batch = min(batch, count)
    step = 0
    while step < steps:
        shuffled = torch.randperm(count, generator=generator, device="cpu")
        for indices in shuffled[: count - count % batch].split(batch)[: steps - step]:
            yield indices
            step += 1
