"""The report as one self-contained HTML page that needs no network and no script."""

from __future__ import annotations

from markupsafe import Markup

from batchnorm.reports import pages
from benchmarks import figures, report, tables, targets
from benchmarks.results import Report


def render(found: Report) -> str:
    """Return the report as HTML; names and values are escaped."""
    judged = [target for target in targets.judged(found) if target.passed is not None]
    return (
        pages.environment("benchmarks")
        .get_template("benchmark.html.j2")
        .render(
            found=found,
            passed=sum(target.passed is True for target in judged),
            judged=len(judged),
            quick=report.QUICK if found.quick else None,
            sections=[pair for pair in report.sections(found) if pair[0] != "Targets"],
            targets=tables.targets(found),
            cells=list(report.cell_sections(found)),
            networks=any(t.cell.kind == "model" and t.ratios for t in found.timings),
            # Matplotlib has escaped the names in the figures.
            figures={name: Markup(getattr(figures, name)(found)) for name in ("ratios", "floors", "networks")},
        )
    )
