"""The comparison: every arm over every rate and seed, then each at its best rate on fresh seeds."""

import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from typing import Any

import torch
from joblib import Parallel, cpu_count, delayed

from batchnorm.study.arms import ARMS, Arm
from batchnorm.study.data import Data, digits
from batchnorm.study.results import Comparison, Run, Settings, Stage, best_rate
from batchnorm.study.train import train

MOST_PROCESSES = 8
Progress = Callable[[int, int], None]


def compare(
    arms: tuple[Arm, Arm] = ARMS,
    data: Data | None = None,
    settings: Settings | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Train two arms, the control first, on the same data and seeds, and return all that was measured.

    Each arm's learning rate is chosen on the validation images; then each arm is trained at its own best rate on
    seeds that had no part in the choice, and only these runs see the test images. The numbers, other than times,
    do not depend on how many processes share the work (by default one for each core). `progress(done, total)` is
    called after each run.

    Raises ValueError if both arms have one name.
    """
    names = (arms[0].name, arms[1].name)
    if names[0] == names[1]:
        raise ValueError(f"the arms need different names, both are {names[0]!r}")
    data = data if data is not None else digits()
    settings = settings if settings is not None else Settings()
    total = len(arms) * (settings.sweep_seeds * len(settings.rates) + settings.seeds)
    runs: list[Run] = []

    def work(stage: Stage, rates: Mapping[str, Sequence[float]], seeds: range) -> None:
        jobs = [(arm, data, rate, seed, stage, settings) for arm in arms for rate in rates[arm.name] for seed in seeds]
        for run in _execute(jobs, processes or min(cpu_count(), MOST_PROCESSES)):
            runs.append(run)
            if progress is not None:
                progress(len(runs), total)

    work("sweep", {arm.name: settings.rates for arm in arms}, range(settings.sweep_seeds))
    best = {arm.name: [best_rate([run for run in runs if run.arm == arm.name])] for arm in arms}
    work("final", best, range(settings.sweep_seeds, settings.sweep_seeds + settings.seeds))
    return Comparison(data.name, data.classes, names, settings, environment(), tuple(runs))


def environment() -> dict[str, str]:
    """Return the versions and the machine that the results come from; no name of a host or a user."""
    packages = ("batchnorm", "torch", "numba", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(cpu_count()),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _execute(jobs: list[tuple[Arm, Data, float, int, Stage, Settings]], processes: int) -> Iterator[Run]:
    """Yield the runs of all jobs, in the jobs' order, as they end."""
    yield from in_parallel([delayed(train)(*job) for job in jobs], processes)


def in_parallel(calls: Sequence[Any], processes: int) -> Iterator[Any]:
    """Yield the results of delayed calls, in their order, as they end.

    A terminal sends Ctrl-C to all processes. Those that work do not hear it, since this one ends them: they would each
    show a traceback of what they were importing.
    """
    parallel = Parallel(n_jobs=min(processes, len(calls)), return_as="generator")
    if parallel.n_jobs == 1 or os.name != "posix":
        yield from parallel(calls)
        return
    resource_tracker.ensure_running()  # which unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as the processes that are started inherit it
    try:
        results = parallel(calls)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    yield from results
