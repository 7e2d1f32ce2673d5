"""Training: one run of one arm at one learning rate, and its measurement."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.study.arms import Arm, build
from batchnorm.study.data import Data, Part, order
from batchnorm.study.results import Outcome, Run, Settings, Stage

# Both times the loss of guessing: a dead network comes no lower than the first by the luck of its last batches, and no
# network starts from the second.
LEARNED, EXPLODED = 0.98, 2.0


def train(arm: Arm, data: Data, rate: float, seed: int, stage: Stage, settings: Settings) -> Run:
    """Train one network and return what was measured.

    SGD with momentum; the rate falls to zero along a cosine. The seed sets the initial weights and the order of the
    data, the same for every arm and rate. A loss that is not finite ends the run, which counts as diverged.
    """
    with one_thread():
        model = build(arm, seed)
        curves = _Curves(settings.target)
        for step, losses, seconds in descend(model, data.train, rate, seed, settings):
            curves.record(step, losses, seconds, accuracy(model, data.validation))
            if stage == "final":  # only the runs that are drawn step by step are worth the time that this takes
                curves.record_batch(batch_accuracy(model, data.validation, settings.batch))
        measured_on = data.test if stage == "final" else data.validation
        return Run(
            arm=arm.name,
            rate=rate,
            seed=seed,
            stage=stage,
            outcome=curves.outcome(math.log(data.classes)),
            steps=tuple(curves.steps),
            loss=tuple(curves.loss),
            validation=tuple(curves.validation),
            validation_batch=tuple(curves.validation_batch),
            steps_to_target=curves.steps_to_target,
            accuracy=accuracy(model, measured_on),
            batch_accuracy=batch_accuracy(model, measured_on, settings.batch),
            seconds=round(curves.seconds, 4),
        )


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Return the share of images that a network classifies rightly in evaluation mode; the mode is put back."""
    training = model.training
    model.eval()
    correct = _correct(model(part.images), part.labels)
    model.train(training)
    return correct / len(part)


@torch.no_grad()
def batch_accuracy(model: nn.Module, part: Part, batch: int) -> float | None:
    """Return the accuracy with each batch's own statistics in place of the running ones; `None` without such layers.

    The images come in batches of the training size, because the statistics depend on it. The model is not touched:
    a copy of it takes the layers' updates.
    """
    model = copy.deepcopy(model).eval()
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return None
    for layer in layers:
        layer.train()
    pairs = zip(part.images.split(batch), part.labels.split(batch), strict=True)
    return sum(_correct(model(images), labels) for images, labels in pairs) / len(part)


def _correct(logits: Tensor, labels: Tensor) -> int:
    """Count right answers; a row that is not finite is no answer, though argmax would make it class 0."""
    right = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
    return int(right.sum())


def descend(
    model: nn.Module, part: Part, rate: float, seed: int, settings: Settings
) -> Iterator[tuple[int, list[float], float]]:
    """Train, pausing for each record with the step, the losses since the last record and the seconds they took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=settings.momentum)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    losses: list[float] = []
    start = time.perf_counter()
    for step, indices in enumerate(order(len(part), settings.batch, settings.steps, seed), start=1):
        loss = nn.functional.cross_entropy(model(part.images[indices]), part.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        finite = math.isfinite(losses[-1])
        if step % settings.every == 0 or step == settings.steps or not finite:
            yield step, losses, time.perf_counter() - start
            losses, start = [], time.perf_counter()
        if not finite:
            return


class _Curves:
    """What a run records while it trains."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.steps: list[int] = []
        self.loss: list[float | None] = []
        self.validation: list[float] = []
        self.validation_batch: list[float] = []
        self.steps_to_target: int | None = None
        self.seconds = 0.0

    def record(self, step: int, losses: list[float], seconds: float, validation: float) -> None:
        loss = sum(losses) / len(losses)
        self.steps.append(step)
        self.loss.append(float(f"{loss:.5g}") if math.isfinite(loss) else None)
        self.validation.append(validation)
        self.seconds += seconds
        if self.steps_to_target is None and validation >= self.target:
            self.steps_to_target = step

    def record_batch(self, validation: float | None) -> None:
        if validation is not None:
            self.validation_batch.append(validation)

    def outcome(self, guessing: float) -> Outcome:
        """Name the run's end, given the loss of guessing every class equally often."""
        finite = [loss for loss in self.loss if loss is not None]
        if len(finite) < len(self.loss):
            return "diverged"
        if finite[-1] < LEARNED * guessing:
            return "learned"
        return "diverged" if max(finite) > EXPLODED * guessing else "stuck"


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: tensors this small gain nothing from more, and runs side by side would fight for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
