"""Results: plain values that go to JSON and back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from batchnorm.benchmark.grid import Cell

SCHEMA, VERSION = "batchnorm.benchmark", 1


@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward: the input, the layer's own parameters and buffers, and what is extra."""

    input: int
    layer: int
    extra: int


@dataclass(frozen=True)
class Check:
    """A cell's verdict.

    Attributes:
        training, evaluation: the kernels that ran.
        errors: the largest errors against float64, ours and torch.nn's, for each result.
        saved: for each contender, what a training forward keeps.
        problems: why there are no figures; none if it passed.
    """

    cell: Cell
    training: str = ""
    evaluation: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    saved: dict[str, Saved] = field(default_factory=dict, hash=False)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """What an operation of a cell took: median seconds and relative spread for each contender.

    `left_out` says why a rival has none, and `problem` why nobody has.
    """

    cell: Cell
    threads: int
    regime: str
    operation: str
    seconds: dict[str, float] = field(default_factory=dict, hash=False)
    spread: dict[str, float] = field(default_factory=dict, hash=False)
    rounds: int = 0
    left_out: dict[str, str] = field(default_factory=dict, hash=False)
    problem: str | None = None

    def ratio(self, rival: str) -> float | None:
        """How many times as fast as the rival ours is; None if either was not measured."""
        if "ours" not in self.seconds or rival not in self.seconds:
            return None
        return self.seconds[rival] / self.seconds["ours"]


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
    """

    created: str
    quick: bool
    seconds: float
    machine: dict[str, str]
    last_level: int
    load_after: str
    first_call: dict[str, float]
    checks: tuple[Check, ...]
    timings: tuple[Timing, ...]

    def to_json(self) -> str:
        """Give the JSON text, with the bars that follow from the figures for readers who do not compute."""
        from batchnorm.benchmark.bars import bars  # they are computed from a report
        from batchnorm.benchmark.summary import geometric_means

        derived = {
            "bars": [asdict(b) for b in bars(self)],
            "geometric_means": [asdict(m) for m in geometric_means(self)],
        }
        return json.dumps(
            {"schema": SCHEMA, "version": VERSION, **asdict(self), **derived}, indent=1, ensure_ascii=False
        )

    def save(self, path: Path) -> Path:
        """Write the JSON file, whole or not at all."""
        write_text(path, self.to_json() + "\n")
        return path

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is something else, or of another version.
        """
        data: dict[str, Any] = json.loads(text)
        if (data.pop("schema", None), data.pop("version", None)) != (SCHEMA, VERSION):
            raise ValueError(f"this is not {SCHEMA}, version {VERSION}: run the benchmark again")
        for derived in ("bars", "geometric_means"):
            data.pop(derived)
        data["checks"] = tuple(_check(entry) for entry in data["checks"])
        data["timings"] = tuple(timing(entry) for entry in data["timings"])
        return cls(**data)


def cell(data: dict[str, Any]) -> Cell:
    """Read a cell."""
    return Cell(**{**data, "shape": tuple(data["shape"])})


def timing(data: dict[str, Any]) -> Timing:
    """Read a timing."""
    return Timing(**{**data, "cell": cell(data["cell"])})


def _check(data: dict[str, Any]) -> Check:
    errors = {name: (ours, theirs) for name, (ours, theirs) in data["errors"].items()}
    saved = {name: Saved(**values) for name, values in data["saved"].items()}
    new = {"cell": cell(data["cell"]), "errors": errors, "saved": saved, "problems": tuple(data["problems"])}
    return Check(**{**data, **new})


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
