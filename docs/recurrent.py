"""Trains LSTMs with and without batch normalization on digits that are read row by row, or pixel by pixel.

    python docs/recurrent.py

prints the tables of docs/recurrent.md; it takes some minutes. It needs the extra "tools", for scikit-learn's digits.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.study.data import digits, order

HIDDEN, BATCH, STEPS = 32, 100, 200
RATES, SEEDS = (0.01, 0.03, 0.1), (0, 1, 2)
TASKS = {"rows": (8, 8), "pixels": (64, 1)}  # steps, features


class Accuracy(NamedTuple):
    """Shares of images that were named right: with the statistics as training left them, and taken anew."""

    validation: float
    running: float
    recalibrated: float


def train(
    kind: Callable[..., Any], task: tuple[int, int], rate: float, seed: int, noise: float = 0.0, steps: int = STEPS
) -> Accuracy:
    """Train on 1000 digits with Adam; return accuracies on 397 validation images (recalibrated) and 400 test images.

    The hidden state begins with normal noise of the deviation given, which is one of the options of the paper's code.
    """
    data = digits()
    torch.manual_seed(seed)
    own = {} if kind in (nn.LSTM, nn.GRU) else {"max_steps": task[0]}
    network, head = kind(task[1], HIDDEN, batch_first=True, **own), nn.Linear(HIDDEN, 10)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)

    def logits(images: Tensor) -> Tensor:
        h = noise * torch.randn(1, len(images), HIDDEN)
        output, _ = network(images.reshape(-1, *task), (h, torch.zeros_like(h)) if noise else None)
        answer: Tensor = head(output[:, -1])
        return answer

    @torch.no_grad()
    def accuracy(part: Any) -> float:
        network.eval()
        return (logits(part.images).argmax(1) == part.labels).float().mean().item()

    for indices in order(len(data.train), BATCH, steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(logits(data.train.images[indices]), data.train.labels[indices]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    running = accuracy(data.test)
    if own:
        recalibrate(network, lambda: logits(data.train.images))
    return Accuracy(accuracy(data.validation), running, accuracy(data.test))


def recalibrate(network: Any, look: Callable[[], Any]) -> None:
    """Take the statistics anew, as the paper does after training: over the training data, with the final weights."""
    momentum, network.momentum = network.momentum, None
    network.reset_running_stats()
    network.train()
    with torch.no_grad():
        look()
    network.momentum = momentum


def main() -> None:
    """Print, for each task and network, what its best learning rate (on validation images) reaches on test images."""
    torch.set_num_threads(1)
    ours = batchnorm.recurrent.LSTM
    networks = {
        "torch.nn.LSTM": (nn.LSTM, 0.0),
        "torch.nn.LSTM, noise 0.1": (nn.LSTM, 0.1),
        "batchnorm": (ours, 0.0),
        "batchnorm, noise 0.1": (ours, 0.1),
    }
    for task, shape in TASKS.items():
        print(f"\n{task}: {shape[0]} steps, {STEPS} batches of {BATCH}\n")
        print("| | rate | test accuracy (seeds) | with training's running statistics |\n|---|---|---|---|")
        for name, (kind, noise) in networks.items():
            found = {rate: [train(kind, shape, rate, seed, noise) for seed in SEEDS] for rate in RATES}
            rate = max(found, key=lambda rate: mean(a.validation for a in found[rate]))
            last = [a.recalibrated for a in found[rate]]
            seeds = ", ".join(f"{a:.1%}" for a in last)
            before = f"{mean(a.running for a in found[rate]):.1%}" if kind is ours else "–"
            print(f"| {name} | {rate} | {mean(last):.1%} ({seeds}) | {before} |", flush=True)


if __name__ == "__main__":
    main()
