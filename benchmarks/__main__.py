"""``python -m benchmarks``: time everything, and publish it."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks import folding_report
from benchmarks import run as everything

HERE = Path(__file__).parent


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), default=Path("batchnorm-benchmarks"), show_default=True)
@click.option("--quick", is_flag=True, help="Measure a few small shapes, to see that all works.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="For how long an operation is repeated.")
@click.option("--publish", is_flag=True, help="Put the results into README.md and cells.md beside this script.")
@click.option("--folding", is_flag=True, help="Measure folded networks, which have a report of their own.")
def main(out: Path, quick: bool, seconds: float | None, publish: bool, folding: bool) -> None:
    """Time the layers against torch.nn and the baselines, after a check that all agree; the files go to --out."""
    (folding_report if folding else everything).run(out, quick, seconds, HERE if publish else None)


if __name__ == "__main__":
    main()
