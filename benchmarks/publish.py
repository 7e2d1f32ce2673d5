"""Publishing: a run's tables take the place of the last run's in a folder's ``README.md`` and ``cells.md``."""

from __future__ import annotations

from pathlib import Path

from batchnorm.reports.files import around, write_text
from benchmarks import report
from benchmarks.results import Report

_BEGIN, _END = "## Latest results", "## How to read it"
_CELLS = "# Every cell of the latest full run\n\nThe summary and how to read it are in [README.md](README.md).\n\n"


def check(folder: Path, quick: bool) -> None:
    """Refuse, before anything is measured, what could not be published after it.

    Raises:
        OSError: if there is no README with a place for results, or the run is to be a quick one.
    """
    if quick:
        raise OSError("a quick run judges nothing and is not published: leave out --quick or --publish")
    around(folder / "README.md", _BEGIN, _END)


def publish(found: Report, folder: Path) -> list[Path]:
    """Write the summary into the README, between two of its headings, and the cells into their own file."""
    before, after = around(folder / "README.md", _BEGIN, _END)
    summary = report.written(tuple(report.sections(found)), 3)
    write_text(
        folder / "README.md", f"{before}{_BEGIN}\n\n{summary}\nEvery cell stands in [cells.md](cells.md).\n\n{after}"
    )
    write_text(folder / "cells.md", _CELLS + report.written(tuple(report.cell_sections(found)), 2))
    return [folder / "README.md", folder / "cells.md"]
