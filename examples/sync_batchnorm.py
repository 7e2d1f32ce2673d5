"""Train with DistributedDataParallel and batch normalization over all processes.

    torchrun --nproc-per-node 2 examples/sync_batchnorm.py

Two processes train a small CNN on handwritten digits, each on half of every batch. Every layer normalizes by the
moments of both halves, so a step is that of one process with the whole batch. One process has more data than the other,
as if they read files of different sizes; ``Join`` ends the epoch for both when one has run out.
"""

import argparse
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

import batchnorm


def network() -> nn.Module:
    """Two convolutions with batch normalization, as torch.nn writes them."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Give scikit-learn's 8×8 digits: 1488 images to train on and 309 to test on."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(bunch.target)
    return (images[:1488], targets[:1488]), (images[1488:], targets[1488:])


def main() -> None:
    """Train, and let the first process tell the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16, help="samples a process and step")
    options = parser.parse_args()

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (images, targets), (test_images, test_targets) = digits()

    model = network()
    report = batchnorm.convert(model, statistics=batchnorm.Sync())
    if rank == 0:
        print(report)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, max(1, options.epochs - 1))

    steps = 0
    for epoch in range(options.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        own = order.split(len(images) // world + 24)[rank]
        try:
            # Without Join, the process with more batches would wait for the others until the timeout.
            with Join([parallel], throw_on_early_termination=True):
                for part in own.split(options.batch):
                    loss = F.cross_entropy(parallel(images[part]), targets[part])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    steps += 1
        except RuntimeError as error:
            if "exhausted" not in str(error):
                raise
        schedule.step()
    if rank == 0:
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_images).argmax(1) == test_targets).float().mean().item()
        print(f"{world} processes, {steps} steps each: test accuracy {accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
