"""Results: plain values that go to JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.benchmark.gate import Check
from batchnorm.benchmark.memory import Saved
from batchnorm.benchmark.timing import Ratio
from benchmarks.grid import Cell
from benchmarks.traffic import COPIED

SCHEMA, VERSION = "batchnorm.benchmarks", 3


@dataclass(frozen=True)
class Timing:
    """What an operation of a cell took.

    Attributes:
        seconds, spread: for each contender, the median over rounds and the relative distance of its quartiles.
        ratios: for each contender, its time by ours, paired by rounds.
        floor: bytes that must be moved, see ``traffic``; 0 for chains and networks.
        skipped: why a baseline has no figures.
        problem: why nobody has.
    """

    cell: Cell
    threads: int
    regime: str
    operation: str
    seconds: dict[str, float] = field(default_factory=dict, hash=False)
    spread: dict[str, float] = field(default_factory=dict, hash=False)
    ratios: dict[str, Ratio] = field(default_factory=dict, hash=False)
    floor: int = 0
    rounds: int = 0
    skipped: dict[str, str] = field(default_factory=dict, hash=False)
    problem: str | None = None

    def ratio(self, baseline: str) -> float | None:
        """How many times as fast as the baseline ours is; None if either was not measured."""
        return self.ratios[baseline].median if baseline in self.ratios else None

    def times_floor(self) -> float | None:
        """Our time over what the floor's bytes take at the speed of the copy; None where nothing was copied."""
        copy = self.ratio("copy")
        return None if copy is None else COPIED * self.cell.bytes / (copy * self.floor)

    def slower(self, baseline: str, limit: float) -> bool:
        """Whether the ratio to the baseline is below a limit beyond doubt: its whole interval."""
        return baseline in self.ratios and self.ratios[baseline].high < limit


@dataclass(frozen=True)
class Memory:
    """Bytes of the same thing for several contenders, and what they are bytes of."""

    what: str
    bytes: dict[str, int] = field(hash=False)

    def share(self, ours: str, theirs: str) -> float | None:
        """Our bytes over theirs."""
        found = self.bytes.get(ours), self.bytes.get(theirs)
        return found[0] / found[1] if found[0] is not None and found[1] else None


@dataclass(frozen=True)
class Report:
    """Everything that a run found out.

    Attributes:
        created: when, ISO 8601 in UTC.
        quick: too short a run to judge by.
        seconds: how long it took.
        machine: what it ran on, in words.
        last_level: bytes of its last-level cache.
        load_after: the load average at the end: what else kept the machine busy.
        first_call: seconds of a process's first training step, with its kernels to be compiled and cached.
        kept: what blocks of layers keep for the backward.
        peaks: the most memory that a training step of a cell holds at once, beyond its inputs.
    """

    created: str
    quick: bool
    seconds: float
    machine: dict[str, str]
    last_level: int
    load_after: str
    first_call: dict[str, float]
    checks: tuple[Check[Cell], ...]
    timings: tuple[Timing, ...]
    kept: tuple[Memory, ...] = ()
    peaks: tuple[Memory, ...] = ()

    def to_json(self, **derived: Any) -> str:
        """Give the JSON text, with values that follow from the figures for readers who do not compute."""
        values = {"schema": SCHEMA, "version": VERSION, **asdict(self), "derived": derived}
        return json.dumps(values, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is something else, or of another version.
        """
        data: dict[str, Any] = json.loads(text)
        if (data.pop("schema", None), data.pop("version", None)) != (SCHEMA, VERSION):
            raise ValueError(f"this is not {SCHEMA}, version {VERSION}: run the benchmark again")
        data.pop("derived")
        data["checks"] = tuple(_check(entry) for entry in data["checks"])
        data["timings"] = tuple(timing(entry) for entry in data["timings"])
        for name in ("kept", "peaks"):
            data[name] = tuple(Memory(**entry) for entry in data[name])
        return cls(**data)


def cell(data: dict[str, Any]) -> Cell:
    """Read a cell."""
    return Cell(**{**data, "shape": tuple(data["shape"])})


def timing(data: dict[str, Any]) -> Timing:
    """Read a timing."""
    ratios = {name: Ratio(**values) for name, values in data["ratios"].items()}
    return Timing(**{**data, "cell": cell(data["cell"]), "ratios": ratios})


def _check(data: dict[str, Any]) -> Check[Cell]:
    errors = {name: (ours, theirs) for name, (ours, theirs) in data["errors"].items()}
    saved = {name: Saved(**values) for name, values in data["saved"].items()}
    new = {"cell": cell(data["cell"]), "errors": errors, "saved": saved, "problems": tuple(data["problems"])}
    return Check(**{**data, **new})
