"""The study of docs/choosing.md: each policy's accuracy on batches of 2 to 64, and what running statistics do to it."""

from __future__ import annotations

import copy
import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from joblib import cpu_count, delayed
from mnist1d.data import get_dataset_args, make_dataset
from torch import nn

import batchnorm
from batchnorm import BatchNorm1d, Ghost, Renorm, Warmup
from batchnorm.study.arms import CLASSES, Arm, build
from batchnorm.study.compare import MOST_PROCESSES, environment, in_parallel
from batchnorm.study.data import Data, Part
from batchnorm.study.results import Paired, Settings, Stage, paired
from batchnorm.study.train import accuracy, batch_accuracy, descend, one_thread

SCHEMA = "batchnorm.choose"
VERSION = 1
LADDER = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-5, 2) for mantissa in (1, 3))
SYNC = "sync"
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
SIGNALS = 5000
VALIDATION_SHARE = 0.2

Progress = Callable[[int, int], None]


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
        reached, batch_reached = accuracy(model, test), batch_accuracy(model, test, batch)
        return SmallRun(*at, reached, recalibrated(model, data.train, test), batch_reached)


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


def recalibrated(model: nn.Module, train: Part, test: Part) -> float | None:
    """Return the test accuracy with the statistics of the whole training part; `None` without such layers."""
    if not any(isinstance(module, BatchNorm1d) for module in model.modules()):
        return None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return 0.0  # it diverged, and knows nothing
    model = copy.deepcopy(model)
    batchnorm.recalibrate(model, [train.images])  # as one batch
    return accuracy(model, test)


@dataclass(frozen=True)
class Budget:
    """How much to train.

    Attributes:
        batches: samples in a step of one process.
        samples: of every run, whatever its batches: small ones take more steps.
        sweep_seeds: runs for each arm, batch size and rate, which choose the rate.
        seeds: runs at the rate that was chosen, on other seeds, which are reported.
        processes: over which ``Sync`` is taken.
    """

    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    samples: int = 2000
    sweep_seeds: int = 2
    seeds: int = 5
    processes: int = 4

    def __post_init__(self) -> None:
        largest = max(self.batches) * self.processes
        if self.samples < largest:
            raise ValueError(f"samples must be enough for one step of {largest}, got {self.samples}")


QUICK = Budget(batches=(4, 16), samples=64, sweep_seeds=1, seeds=2)


@dataclass(frozen=True, order=True)
class Point:
    """One arm at one batch size on one data set."""

    data: str
    arm: str
    batch: int


@dataclass(frozen=True)
class Cell:
    """One point in a few numbers: means over seeds, as shares of all samples.

    Attributes:
        at_edge: whether no rate above, or none below, the chosen one was tried.
        against_batch_norm: accuracy less batch norm's at the same batch size, paired by seed.
    """

    rate: float
    at_edge: bool
    accuracy: float
    lowest: float
    highest: float
    recalibrated: float | None
    batch_accuracy: float | None
    against_batch_norm: Paired


@dataclass(frozen=True)
class Study:
    """All runs, and everything that follows from them."""

    budget: Budget
    environment: dict[str, str]
    runs: tuple[SmallRun, ...]

    @property
    def data(self) -> list[str]:
        """The names of the data sets, in order."""
        return list(dict.fromkeys(run.data for run in self.runs))

    @property
    def arms(self) -> list[str]:
        """The arms of the tables: those that were trained, and ``Sync``."""
        return [*NORMS, SYNC]

    def cell(self, data: str, arm: str, batch: int) -> Cell | None:
        """Return an arm's results at a batch size; `None` where it was not trained.

        ``Sync`` over p processes of b samples each takes the moments of all p · b, and so does batch norm of p · b
        samples in one process: these are its results.
        """
        point = Point(data, "batch norm", batch * self.budget.processes) if arm == SYNC else Point(data, arm, batch)
        final = self._runs(point, "final")
        if not final:
            return None
        baseline = self._runs(Point(data, "batch norm", batch), "final")
        rates = [run.rate for run in self._runs(point, "sweep")]
        accuracies = [run.accuracy for run in final]
        return Cell(
            rate=final[0].rate,
            at_edge=final[0].rate in (min(rates), max(rates)),
            accuracy=statistics.mean(accuracies),
            lowest=min(accuracies),
            highest=max(accuracies),
            recalibrated=_mean(run.recalibrated for run in final),
            batch_accuracy=_mean(run.batch_accuracy for run in final),
            against_batch_norm=paired([a.accuracy - b.accuracy for a, b in zip(final, baseline, strict=True)]),
        )

    def _runs(self, point: Point, stage: Stage) -> list[SmallRun]:
        return [run for run in self.runs if (Point(run.data, run.arm, run.batch), run.stage) == (point, stage)]

    def to_json(self) -> str:
        """Return the study as JSON of one schema version."""
        return json.dumps(
            {"schema": SCHEMA, "version": VERSION, **asdict(self)}, allow_nan=False, separators=(",", ":")
        )

    @classmethod
    def from_json(cls, text: str) -> Study:
        """Return the study that `to_json` wrote.

        Raises:
            ValueError: if the text is of another schema or version.
        """
        values = json.loads(text)
        found = (values.pop("schema", None), values.pop("version", None)) if isinstance(values, dict) else None
        if found != (SCHEMA, VERSION):
            raise ValueError(f"expected {SCHEMA} version {VERSION}, got {found}")
        budget = values["budget"]
        budget["batches"] = tuple(budget["batches"])
        return cls(Budget(**budget), values["environment"], tuple(SmallRun(**one) for one in values["runs"]))


def study(
    data: Sequence[Data], budget: Budget, processes: int | None = None, progress: Progress | None = None
) -> Study:
    """Train every arm at every batch size on every data set, and return all that was measured.

    Each point's learning rate is chosen on the validation part: from three rates around one that grows with the batch,
    and, while the best is the highest or the lowest, one more beyond it. Then each point is trained at its rate on
    seeds that had no part in the choice, and only these runs see the test part. The numbers do not depend on how
    many processes share the work (by default one for each core). `progress(done, total)` is called after each run;
    the total grows with the rates.
    """
    parts = {one.name: one for one in data}
    tried = {point: _first_rates(point.batch) for name in parts for point in _points(name, budget)}
    rounds = _Rounds(parts, budget, processes or min(cpu_count(), MOST_PROCESSES), progress)
    rounds.expected = len(tried) * budget.seeds
    jobs = [(point, rate) for point, rates in tried.items() for rate in rates]
    while jobs:
        rounds.train(jobs, "sweep", range(budget.sweep_seeds))
        jobs = []
        for point, rates in tried.items():
            beyond = _beyond(rates, rounds.best_rate(point))
            if beyond is not None:
                rates.append(beyond)
                jobs.append((point, beyond))
    rounds.expected = 0
    best = [(point, rounds.best_rate(point)) for point in tried]
    rounds.train(best, "final", range(budget.sweep_seeds, budget.sweep_seeds + budget.seeds))
    return Study(budget, {**environment(), "mnist1d": version("mnist1d")}, tuple(rounds.runs))


class _Rounds:
    """The runs so far, and the processes that add to them."""

    def __init__(self, data: dict[str, Data], budget: Budget, processes: int, progress: Progress | None) -> None:
        self.data, self.budget, self.processes, self.progress = data, budget, processes, progress
        self.runs: list[SmallRun] = []
        self.expected = 0  # runs that will come after the present round
        self.accuracies: dict[Point, dict[float, list[float]]] = {}

    def train(self, jobs: list[tuple[Point, float]], stage: Stage, seeds: range) -> None:
        longest_first = sorted(jobs, key=lambda job: job[0].batch)
        total = len(self.runs) + len(jobs) * len(seeds) + self.expected
        for one in self._execute([(point, rate, seed) for point, rate in longest_first for seed in seeds], stage):
            self.runs.append(one)
            if stage == "sweep":
                by_rate = self.accuracies.setdefault(Point(one.data, one.arm, one.batch), {})
                by_rate.setdefault(one.rate, []).append(one.accuracy)
            if self.progress is not None:
                self.progress(len(self.runs), total)

    def best_rate(self, point: Point) -> float:
        """The rate with the highest mean accuracy over seeds; the smallest of equals."""
        by_rate = self.accuracies[point]
        return max(sorted(by_rate), key=lambda rate: statistics.mean(by_rate[rate]))

    def _execute(self, jobs: list[tuple[Point, float, int]], stage: Stage) -> Iterator[SmallRun]:
        samples = self.budget.samples
        calls = [
            delayed(run)(self.data[at.data], at.arm, at.batch, samples, rate, seed, stage) for at, rate, seed in jobs
        ]
        yield from in_parallel(calls, self.processes)


def _points(data: str, budget: Budget) -> Iterator[Point]:
    """What is trained on a data set: every arm at every batch size, and batch norm at the sizes that are ``Sync``'s."""
    synchronized = [batch * budget.processes for batch in budget.batches]
    for arm in NORMS:
        for batch in sorted({*budget.batches, *(synchronized if arm == "batch norm" else ())}):
            if arm != "ghost" or batch >= 2 * GHOST:  # of one part it is batch norm
                yield Point(data, arm, batch)


def _first_rates(batch: int) -> list[float]:
    """Three rates, the middle one growing with the batch (Goyal et al. 2017, arXiv 1706.02677)."""
    middle = min(range(1, len(LADDER) - 1), key=lambda i: abs(LADDER[i] - 0.005 * batch))
    return list(LADDER[middle - 1 : middle + 2])


def _beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate beyond the best one; `None` if that lies between others, or at the end of the ladder."""
    step = {min(rates): -1, max(rates): 1}.get(best, 0)
    place = LADDER.index(best) + step
    return LADDER[place] if step and 0 <= place < len(LADDER) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


# --- MNIST-1D ---


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
