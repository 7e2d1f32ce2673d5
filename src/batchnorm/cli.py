"""The command `batchnorm`. What a command needs is imported when it runs, so that --help comes at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDS_TOOLS = "batchnorm: {} is missing; the command needs the tools: pip install 'batchnorm[tools]'"

try:
    import click
except ModuleNotFoundError as error:
    print(NEEDS_TOOLS.format(error.name), file=sys.stderr)
    raise SystemExit(2) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="batchnorm")
def main() -> None:
    """Batch normalization for PyTorch: compare, choose, measure."""


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("batchnorm-compare"),
    show_default=True,
    help="Directory for results.json and report.html.",
)
@click.option("--seeds", type=click.IntRange(min=1), help="Runs for each arm and learning rate.  [default: 5]")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of each run.  [default: 250]")
@click.option("--quick", is_flag=True, help="Take seconds, not minutes: too few runs for a verdict.")
def compare(out: Path, seeds: int | None, steps: int | None, quick: bool) -> None:
    """Train a small CNN on handwritten digits with and without batch normalization, and report."""
    with _tools():
        from dataclasses import replace

        from rich.console import Console

        from batchnorm.study import terminal
        from batchnorm.study.compare import compare as run
        from batchnorm.study.results import QUICK, Settings
        from batchnorm.study.verdict import judge

    default = QUICK if quick else Settings()
    settings = replace(default, seeds=seeds or default.seeds, steps=steps or default.steps)
    console = Console()
    with _one_line_errors():
        _check_writable(out)
        with terminal.progress(console) as progress:
            comparison = run(settings=settings, processes=1 if quick else None, progress=progress)
        paths = comparison.save(out)
    console.print(terminal.table(comparison))
    console.print(judge(comparison).sentence, highlight=False)
    for path in paths:
        click.echo(path)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("batchnorm-choose"),
    show_default=True,
    help="Directory for results.json, tables.md and choosing.svg.",
)
@click.option("--quick", is_flag=True, help="Take seconds, not minutes: too little training to tell the arms apart.")
@click.option(
    "--publish",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder whose choosing.md is to show the results.",
)
def choose(out: Path, quick: bool, publish: Path | None) -> None:
    """Train with each policy on batches of 2 to 64, and tell which is best where."""
    with _tools():
        from rich.console import Console

        from batchnorm.study import guide, terminal
        from batchnorm.study.data import digits
        from batchnorm.study.signals import SIGNALS, mnist1d
        from batchnorm.study.small_batches import QUICK, Budget, study

    console = Console()
    with _one_line_errors():
        _check_writable(out)
        if publish is not None:
            guide.check(publish, quick)
        with terminal.progress(console) as progress:
            data = digits(), mnist1d(SIGNALS // 10 if quick else SIGNALS)
            found = study(data, QUICK if quick else Budget(), processes=1 if quick else None, progress=progress)
        paths = [*found.save(out), *([] if publish is None else guide.publish(found, publish))]
    guide.show(found, console)
    for path in paths:
        click.echo(path)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("batchnorm-benchmark"),
    show_default=True,
    help="Directory for the measurements.",
)
@click.option("--quick", is_flag=True, help="Measure a few small shapes, to see that all works.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="For how long each operation of a cell is repeated.  [default: 0.15; quick: 0.02]",
)
@click.option(
    "--publish",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder whose README.md and cells.md are to show the results.",
)
@click.option("--only", type=click.Choice(["folding"]), help="Measure this part, which has a report of its own.")
def benchmark(out: Path, quick: bool, seconds: float | None, publish: Path | None, only: str | None) -> None:
    """Time the kernels against torch.nn and its rivals, after a check that all agree."""
    with _tools():
        if only == "folding":
            from batchnorm.benchmark.folding_report import run
        else:
            from batchnorm.benchmark import run

    with _one_line_errors():
        run(out, quick, seconds, publish)


@contextmanager
def _tools() -> Iterator[None]:
    """Turn the lack of a package into one line that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "batchnorm":
            raise
        print(NEEDS_TOOLS.format(error.name), file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what a user can cause, a wrong path or Ctrl-C, into one line."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo("batchnorm: stopped", err=True)
        raise SystemExit(130) from None


def _check_writable(directory: Path) -> None:
    """Make the directory and a file in it, so that a wrong path is found before the work and not after."""
    import tempfile

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


if __name__ == "__main__":
    main()
