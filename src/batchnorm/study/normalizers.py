"""Normalizers: the arms of the study of small batches, and one run of one of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from batchnorm.layers import BatchNorm1d
from batchnorm.statistics import Ghost, Renorm, Warmup
from batchnorm.study.arms import CLASSES, Arm, build
from batchnorm.study.data import Data, Part
from batchnorm.study.results import Settings, Stage
from batchnorm.study.train import accuracy, batch_accuracy, descend, one_thread

GHOST = 8
GROUP = 4  # channels; what ``batchnorm.replace(model, "group")`` makes of 32 to 124 channels
# Of a run's steps: the paper's schedule (5, 25 and 40 thousand steps), for a run of a hundred thousand.
PLAIN, D_UNTIL, R_UNTIL = 0.05, 0.25, 0.4

# From channels and the steps of the run to a layer.
NORMS: dict[str, Callable[[int, int], nn.Module] | None] = {
    "no norm": None,
    "batch norm": lambda channels, steps: BatchNorm1d(channels),
    "ghost": lambda channels, steps: BatchNorm1d(channels, statistics=Ghost(GHOST)),
    "renorm": lambda channels, steps: BatchNorm1d(channels, statistics=Renorm(schedule=warmup(steps))),
    "group norm": lambda channels, steps: nn.GroupNorm(channels // GROUP, channels),
    "layer norm": lambda channels, steps: nn.GroupNorm(1, channels),
}


@dataclass(frozen=True)
class SmallRun:
    """One training run.

    Attributes:
        batch: samples in a step.
        accuracy: with running statistics: of the validation part in the sweep, of the test part in the end.
        recalibrated: the same with the training part's statistics, measured after training; `None` in the sweep and
            for arms without running statistics.
        batch_accuracy: the same in training mode, in batches of the training size; `None` as for `recalibrated`.
    """

    data: str
    arm: str
    batch: int
    rate: float
    seed: int
    stage: Stage
    accuracy: float
    recalibrated: float | None
    batch_accuracy: float | None


def run(data: Data, norm: str, batch: int, samples: int, rate: float, seed: int, stage: Stage) -> SmallRun:
    """Train one network on so many samples, and return what was measured.

    The seed sets the initial weights and the order of the data, the same for every arm, batch size and rate.
    """
    steps = samples // batch
    with one_thread():
        model = build(Arm(norm, partial(network, data.name, norm, steps)), seed)
        settings = Settings(steps=steps, batch=batch, every=steps)
        for _ in descend(model, data.train, rate, seed, settings):
            pass  # a loss that is not finite ends it early
        at = (data.name, norm, batch, rate, seed, stage)
        if stage == "sweep":
            return SmallRun(*at, accuracy(model, data.validation), None, None)
        test = data.test
        return SmallRun(
            *at, accuracy(model, test), recalibrated(model, data.train, test), batch_accuracy(model, test, batch)
        )


def network(data: str, norm: str, steps: int) -> nn.Module:
    """Build a data set's network, untrained, with a normalization before each ReLU.

    For the digits a perceptron of three layers of 64, in which each channel has one value a sample; for MNIST-1D a
    convolutional network of three layers of 32 channels, in which it has 20, 10 and 5. With He initialization:
    without it the arm with no norm would start handicapped.
    """
    make = NORMS[norm]

    def block(layer: nn.Linear | nn.Conv1d, channels: int) -> list[nn.Module]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
        return [layer, nn.ReLU()] if make is None else [layer, make(channels, steps), nn.ReLU()]

    if data == "digits":
        hidden = [part for _ in range(3) for part in block(nn.Linear(64, 64), 64)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, CLASSES))
    hidden = [
        part
        for channels in (1, 32, 32)
        for part in block(nn.Conv1d(channels, 32, kernel_size=5, stride=2, padding=2), 32)
    ]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(32 * 5, CLASSES))


def warmup(steps: int) -> Warmup:
    """Scale batch renormalization's schedule to a run of so many steps."""
    return Warmup(plain=round(PLAIN * steps), r_until=round(R_UNTIL * steps), d_until=round(D_UNTIL * steps))


@torch.no_grad()
def recalibrated(model: nn.Module, train: Part, test: Part) -> float | None:
    """Return the test accuracy with the statistics of the whole training part; `None` without such layers.

    The model is not touched. One pass over all of it as one batch is the population statistics of Wu & Johnson 2021,
    arXiv 2105.07576, in one step.
    """
    model = copy.deepcopy(model).eval()
    layers = [module for module in model.modules() if isinstance(module, BatchNorm1d)]
    for layer in layers:
        layer.statistics, layer.momentum = None, 1.0
        layer.train()
    model(train.images)
    return accuracy(model, test) if layers else None
