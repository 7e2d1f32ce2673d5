"""Small batches: each policy's accuracy against the size of the batch, and what running statistics do to it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from joblib import cpu_count, delayed

from batchnorm.files import write_texts
from batchnorm.study.compare import MOST_PROCESSES, environment, in_parallel
from batchnorm.study.data import Data
from batchnorm.study.normalizers import GHOST, NORMS, SmallRun, run
from batchnorm.study.results import Stage
from batchnorm.study.verdict import Paired, paired

SCHEMA = "batchnorm.choose"
VERSION = 1
LADDER = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-5, 2) for mantissa in (1, 3))
SYNC = "sync"

Progress = Callable[[int, int], None]


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

    def save(self, directory: Path) -> list[Path]:
        """Write results.json, tables.md and choosing.svg into a directory, which is made if need be."""
        from batchnorm.study.guide import figure, markdown  # here, so that reading results needs no plotting library

        contents = {"results.json": self.to_json(), "tables.md": markdown(self), "choosing.svg": figure(self)}
        directory.mkdir(parents=True, exist_ok=True)
        write_texts({directory / name: text for name, text in contents.items()})
        return [directory / name for name in contents]


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
