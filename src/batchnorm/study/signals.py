"""Signals: MNIST-1D, ten classes of short noisy curves, made here by their authors' generator; nothing is fetched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mnist1d.data import get_dataset_args, make_dataset

from batchnorm.study.data import Data, Part

SIGNALS = 5000
VALIDATION_SHARE = 0.2


def mnist1d(signals: int = SIGNALS) -> Data:
    """Return MNIST-1D: signals of 40 values, as images [N, 1, 40]; three fifths of them to train on.

    The generator's own seed and split are kept, so that its test part is the published one; a fifth of the whole,
    taken from its training part, is for validation. Signals are standardized with the training part's mean and
    deviation.

    Source: Greydanus & Kobak 2020, arXiv 2011.14439.
    """
    arguments = get_dataset_args()
    arguments.num_samples = signals
    with _random_state_kept():
        made = make_dataset(arguments)
    x, labels = (torch.from_numpy(np.concatenate((made[name], made[f"{name}_test"]))) for name in ("x", "y"))
    test = len(made["x"])
    validation = test - round(VALIDATION_SHARE * len(x))
    x = x.to(torch.float32).unsqueeze(1)
    x = (x - x[:validation].mean()) / x[:validation].std()
    bounds = (slice(validation), slice(validation, test), slice(test, None))
    return Data("MNIST-1D", 10, *(Part(x[bound], labels[bound]) for bound in bounds))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put back the global random states, which the generator seeds."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
