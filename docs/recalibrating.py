"""Measures what recalibration gives back, and which way of it, on networks trained for 50 steps.

    python docs/recalibrating.py

prints the tables of docs/recalibrating.md, in about two minutes. It needs the extra "tools", for scikit-learn's digits,
and transformers, for the ResNet.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import batchnorm
from batchnorm.study.arms import ARMS, build
from batchnorm.study.data import Part, digits, order
from batchnorm.study.train import accuracy

STEPS, RATE, SEEDS = 50, 0.1, range(3)


class Logits(nn.Module):
    """A model of transformers that takes images of one channel and gives logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(F.interpolate(images, size=32)).logits
        return logits


def cnn(seed: int) -> nn.Module:
    """The network of `batchnorm compare`: six convolutions, each with batch normalization."""
    return build(ARMS[1], seed)


def resnet(seed: int) -> nn.Module:
    """A small ResNet of transformers: 9 layers of batch normalization."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8, 16, 32],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return Logits(ResNetForImageClassification(config))


def trained(make: Callable[[int], nn.Module], seed: int, momentum: float, batch: int = 100) -> nn.Module:
    """Train with running statistics that follow at the given momentum."""
    model, part = make(seed).train(), digits().train
    for layer in norms(model):
        layer.momentum = momentum
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for indices in order(len(part), batch, STEPS, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(part.images[indices]), part.labels[indices]).backward()
        optimizer.step()
    return model


def norms(model: nn.Module) -> list[Any]:
    """The layers, in the order in which they are registered."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def fvcore(model: nn.Module, data: list[Tensor]) -> None:
    """What fvcore's `update_bn_stats` computes, after facebookresearch/fvcore, fvcore/nn/precise_bn.py.

    At momentum 1, the buffers are a batch's mean and unbiased variance; E[x] and E[x²] are taken over batches, weighted
    by their sizes, in the buffers' float32; the variance is E[x²] − E[x]², without correction.
    """
    sizes: dict[nn.Module, int] = {}
    layers = norms(model)
    hooks = [m.register_forward_pre_hook(lambda m, x: sizes.update({m: x[0].numel() // x[0].shape[1]})) for m in layers]
    sums = {m: [torch.zeros_like(m.running_mean), torch.zeros_like(m.running_var), 0] for m in layers}
    momenta = [m.momentum for m in layers]
    for m in layers:
        m.momentum = 1.0
    for x in data:
        model(x)
        for m, so_far in sums.items():
            n, square = sizes[m], m.running_mean.square() + m.running_var * ((sizes[m] - 1) / sizes[m])
            so_far[2] += n
            so_far[0] += (m.running_mean - so_far[0]) * (n / so_far[2])
            so_far[1] += (square - so_far[1]) * (n / so_far[2])
    for m, momentum, hook in zip(layers, momenta, hooks, strict=True):
        m.running_mean, m.running_var, m.momentum = sums[m][0], sums[m][1] - sums[m][0].square(), momentum
        hook.remove()


@contextmanager
def inputs(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Notes all that the layers are given."""
    seen: dict[nn.Module, list[Tensor]] = {m: [] for m in norms(model)}
    hooks = [m.register_forward_pre_hook(lambda m, x: seen[m].append(x[0].detach())) for m in seen]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def distance(model: nn.Module, data: list[Tensor]) -> tuple[float, float]:
    """How far running statistics are, at most, from those of all inputs side by side, in float64, layers in training.

    Means in standard deviations, variances relative; the first of the layers, and the worst of all.
    """
    twin = copy.deepcopy(model).double().train()
    with inputs(twin) as seen:
        for x in data:
            twin(x.double())
    found = []
    for layer, right in zip(norms(model), norms(twin), strict=True):
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen[right]], 1)
        mean, var = values.mean(1), values.var(1)
        off = (layer.running_mean.double() - mean).abs() / (var + layer.eps).sqrt()
        found.append(float(torch.maximum(off, (layer.running_var.double() - var).abs() / (var + layer.eps)).max()))
    return found[0], max(found)


@torch.no_grad()
def batch_accuracy(model: nn.Module, part: Part) -> float:
    """Accuracy where each layer normalizes with all of the part, statistics of the right size for once."""
    twin = copy.deepcopy(model).eval()
    for layer in norms(twin):
        layer.train()
    return float((twin(part.images).argmax(1) == part.labels).float().mean())


def lost_and_found() -> None:
    """What evaluation loses by stale statistics, and gets back."""
    data = digits()
    loader = list(data.train.images.split(100))
    print("accuracy on the test images, running | recalibrated | layerwise | all test images as one batch | came back")
    for name, make in (("cnn", cnn), ("resnet", resnet)):
        for momentum in (0.1, 0.001):
            rows = []
            for seed in SEEDS:
                model = trained(make, seed, momentum)
                stale, batch = accuracy(model, data.test), batch_accuracy(model, data.test)
                other = copy.deepcopy(model)
                batchnorm.recalibrate(model, loader)
                batchnorm.recalibrate(other, loader, method="layerwise")
                rows.append((stale, accuracy(model, data.test), accuracy(other, data.test), batch))
            a, b, c, d = (mean(column) for column in zip(*rows, strict=True))
            back = f"{(b - a) / (d - a):.0%}" if d - a > 0.05 else "–"
            print(f"| {name} | {momentum:g} | {a:.3f} | {b:.3f} | {c:.3f} | {d:.3f} | {back} |", flush=True)


def uneven() -> None:
    """Ours, update_bn and fvcore's on batches of 64, 64 and 3 that come in the order of their classes."""
    data = digits()
    images = data.train.images[data.train.labels.argsort()]
    loader = [images[:64], images[400:464], images[-3:]]
    print("largest error against all inputs side by side: of the first layer | of any layer")
    model = trained(cnn, 0, 0.001)
    ways = {
        "batchnorm.recalibrate": lambda m: batchnorm.recalibrate(m, loader),
        "update_bn": lambda m: update_bn(loader, m),
        "fvcore's algorithm": lambda m: fvcore(m.train(), loader),
    }
    for name, way in ways.items():
        twin = copy.deepcopy(model)
        way(twin)
        first, worst = distance(twin, loader)
        print(f"| {name} | {first:.1e} | {worst:.1e} |", flush=True)


@torch.no_grad()
def methods() -> None:
    """Both methods with little data and small batches against layerwise on all training images."""
    data = digits()
    print("method, batch size, images: accuracy | distance of the logits to those of all images layer by layer")
    for name, make in (("cnn", cnn), ("resnet", resnet)):
        results: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
        for seed in SEEDS:
            with torch.enable_grad():
                model = trained(make, seed, 0.001)
            shuffled = data.train.images[torch.randperm(1000, generator=torch.Generator().manual_seed(seed))]
            best = copy.deepcopy(model)
            batchnorm.recalibrate(best, [shuffled], method="layerwise")
            right = best.eval()(data.test.images)
            for count, size, method in itertools.product((512, 64), (4, 64), ("batch", "layerwise")):
                twin = copy.deepcopy(model)
                batchnorm.recalibrate(twin, shuffled[:count].split(size), method=method)
                far = float((twin.eval()(data.test.images) - right).norm() / right.norm())
                results.setdefault((count, size, method), []).append((accuracy(twin, data.test), far))
        for (count, size, method), found in results.items():
            acc, far = (mean(column) for column in zip(*found, strict=True))
            print(f"| {name} | {count} | {size} | {method} | {acc:.3f} | {far:.3f} |", flush=True)


def main() -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    for table in (lost_and_found, uneven, methods):
        table()
        print()


if __name__ == "__main__":
    main()
