"""Adapts small networks, trained on digits, to digits that look different, and counts what they get right.

    python docs/adapting.py

prints the tables of docs/adapting.md; it takes some two minutes. It needs the extra "tools", for scikit-learn's digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.study.arms import Arm, batch_normalized, build
from batchnorm.study.data import digits
from batchnorm.study.results import Settings
from batchnorm.study.train import descend

SEEDS, STEPS, BATCH, RATE = (0, 1, 2), 300, 64, 0.1
SIZES, MOST = (4, 16, 64, 256), 8  # samples in a batch; batches of a size that are looked at
METHODS: dict[str, dict[str, Any]] = {
    "AdaBN": {},
    "prior 16": {"prior": 16},
    "alpha 0.5": {"method": "alpha"},
    "tent": {"method": "tent"},
}


def blurred(x: Tensor) -> Tensor:
    """Smooth images (standardized, so that their ground is not 0) with a binomial filter of 3×3."""
    line = torch.tensor([0.25, 0.5, 0.25])
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), torch.outer(line, line)[None, None])


def noisy(x: Tensor) -> Tensor:
    """Add normal noise as large as the images' own deviation."""
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "contrast": lambda x: 0.3 * x - 0.5,
    "noise": noisy,
    "blur": blurred,
    "inversion": lambda x: -x,
}


def trained(seed: int) -> nn.Module:
    """Train the network of ``batchnorm compare`` on 1000 digits."""
    model = build(Arm("batch norm", batch_normalized), seed)
    for _ in descend(model, digits().train, RATE, seed, Settings(steps=STEPS, batch=BATCH, every=STEPS)):
        pass
    return model.eval()


@torch.no_grad()
def right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the share of images that a model names right."""
    return (model(x).argmax(1) == labels).float().mean().item()


def batch_by_batch(
    models: list[nn.Module], x: Tensor, labels: Tensor, size: int, options: dict[str, Any]
) -> tuple[float, float]:
    """Adapt to each batch anew and name its images; return the share named right, and that of batches warned of."""
    found, warned = [], []
    for model in models:
        for part, named in list(zip(x.split(size), labels.split(size), strict=True))[:: max(len(x) // size // MOST, 1)]:
            if len(part) == size:
                with batchnorm.adapt(model, part, **options) as adapted:
                    found.append(right(model, part, named))
                    warned.append(bool(adapted.warnings))
    return mean(found), mean(warned)


def to_all(models: list[nn.Module], x: Tensor, labels: Tensor, size: int, options: dict[str, Any]) -> float:
    """Adapt to all images at once, in batches of a size, and name them; return the share named right."""
    found = []
    for model in models:
        with batchnorm.adapt(model, x.split(size), **options):
            found.append(right(model, x, labels))
    return mean(found)


def main() -> None:
    """Print what the source model and each method reach: batch by batch, shuffled and sorted; then on all images."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    models = [trained(seed) for seed in SEEDS]
    images, labels = digits().test.images, digits().test.labels
    orders = {
        "shuffled": torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)),
        "sorted by class": labels.sort(stable=True).indices,
    }
    for order, index in orders.items():
        print(f"\n{order}, adapted to each batch\n")
        print(f"| shift | batch | as trained | {' | '.join(METHODS)} | AdaBN warns |")
        print(f"|---|---|---{'|---' * len(METHODS)}|---|")
        for shift, changed in SHIFTS.items():
            x, named = changed(images)[index], labels[index]
            source = mean(right(model, x, named) for model in models)
            for size in SIZES:
                found = {name: batch_by_batch(models, x, named, size, options) for name, options in METHODS.items()}
                reached = " | ".join(f"{accuracy:.1%}" for accuracy, _ in found.values())
                print(f"| {shift} | {size} | {source:.1%} | {reached} | {found['AdaBN'][1]:.0%} |", flush=True)
    ways = {"AdaBN": {}, "tent": {"method": "tent"}, "tent, 10 steps": {"method": "tent", "steps": 10}}
    print("\nadapted to all 400 images, in batches of 64\n")
    print(f"| shift | order | {' | '.join(ways)} |\n|---|---{'|---' * len(ways)}|")
    for shift, changed in SHIFTS.items():
        for order, index in orders.items():
            x, named = changed(images)[index], labels[index]
            reached = " | ".join(f"{to_all(models, x, named, BATCH, options):.1%}" for options in ways.values())
            print(f"| {shift} | {order} | {reached} |", flush=True)


if __name__ == "__main__":
    main()
