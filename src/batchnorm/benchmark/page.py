"""The report as one self-contained HTML page that needs no network and no script."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from batchnorm import pages
from batchnorm.benchmark import figures, report, tables
from batchnorm.benchmark.bars import bars
from batchnorm.benchmark.results import Report
from batchnorm.files import write_text


def save(found: Report, path: Path) -> Path:
    """Write the page, whole or not at all."""
    write_text(path, render(found))
    return path


def render(found: Report) -> str:
    """Return the report as HTML; names and values are escaped."""
    judged = [bar for bar in bars(found) if bar.passed is not None]
    return (
        pages.environment("batchnorm.benchmark")
        .get_template("benchmark.html.j2")
        .render(
            found=found,
            passed=sum(bar.passed is True for bar in judged),
            judged=len(judged),
            quick=report.QUICK if found.quick else None,
            sections=[pair for pair in report.sections(found) if pair[0] != "Bars"],
            bars=tables.targets(found),
            cells=list(report.cell_sections(found)),
            networks=any(t.cell.kind == "model" and t.ratios for t in found.timings),
            # Matplotlib has escaped the names in the figures.
            figures={name: Markup(getattr(figures, name)(found)) for name in ("ratios", "floors", "networks")},
        )
    )
