"""Publishing: a run's tables take the place of the last run's in a folder's ``README.md`` and ``cells.md``."""

from __future__ import annotations

from pathlib import Path

from batchnorm.reports.files import around, write_text
from benchmarks import report
from benchmarks.results import Report

# The headings between which results go.
RESULTS, FOLDING = ("## Latest results", "## How to read it"), ("## Folding", "## Changing whole models")
_CELLS = "# Every cell of the latest full run\n\nThe summary and how to read it are in [README.md](README.md).\n\n"


def check(folder: Path, place: tuple[str, str], quick: bool) -> None:
    """Refuse, before anything is measured, what could not be published after it.

    Raises:
        OSError: if there is no README with a place for results, or the run is to be a quick one.
    """
    if quick:
        raise OSError("a quick run judges nothing and is not published: leave out --quick or --publish")
    around(folder / "README.md", *place)


def put(folder: Path, place: tuple[str, str], text: str) -> Path:
    """Write results into the README, between two of its headings."""
    path = folder / "README.md"
    before, after = around(path, *place)
    write_text(path, f"{before}{place[0]}\n\n{text}\n{after}")
    return path


def publish(found: Report, folder: Path) -> list[Path]:
    """Write the summary into the README, and the cells into their own file."""
    summary = report.written(tuple(report.sections(found)), 3)
    cells = folder / "cells.md"
    write_text(cells, _CELLS + report.written(tuple(report.cell_sections(found)), 2))
    return [put(folder, RESULTS, f"{summary}\nEvery cell stands in [cells.md](cells.md).\n"), cells]
