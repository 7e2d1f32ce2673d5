"""The command `batchnorm`. What a command needs is imported when it runs, so that --help comes at once."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

NEEDS_TOOLS = "batchnorm: {} is missing; the command needs the tools: pip install 'batchnorm[tools]'"

try:
    import click

    from batchnorm.commands.errors import one_line
    from batchnorm.reports.files import target
except ModuleNotFoundError as error:
    print(NEEDS_TOOLS.format(error.name), file=sys.stderr)
    raise SystemExit(2) from None
except KeyboardInterrupt:
    print("batchnorm: stopped", file=sys.stderr)
    raise SystemExit(130) from None


DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="batchnorm")
def main() -> None:
    """Batch normalization for PyTorch: compare, measure, diagnose; recalibrate and fold checkpoints."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # whose encoding may lack letters of the names of layers
        sys.stdout.reconfigure(errors="backslashreplace")


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("batchnorm-compare"),
    show_default=True,
    help="Directory for results.json and report.html.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), help="Runs of each arm for the verdict, at its best rate.  [default: 8]"
)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps of each run.  [default: 250]")
@click.option("--quick", is_flag=True, help="Take seconds, not minutes: too few runs for a verdict.")
@DEBUG
def compare(out: Path, seeds: int | None, steps: int | None, quick: bool, debug: bool) -> None:
    """Train a small CNN on handwritten digits with and without batch normalization, and report."""
    with one_line(debug):
        with _tools():
            from dataclasses import replace

            from rich.console import Console

            from batchnorm.reports.progress import progress
            from batchnorm.study.compare import compare as run
            from batchnorm.study.report import save, table
            from batchnorm.study.results import QUICK, Settings, judge

        default = QUICK if quick else Settings()
        seeds = seeds or default.seeds
        sweep_seeds = min(seeds, default.sweep_seeds)
        settings = replace(default, sweep_seeds=sweep_seeds, seeds=seeds, steps=steps or default.steps)
        console = Console()
        _check_writable(out, "results.json", "report.html")
        with progress(console, "runs") as advance:
            comparison = run(settings=settings, processes=1 if quick else None, progress=partial(advance, "training"))
        paths = save(comparison, out)
        console.print(table(comparison))
        console.print(judge(comparison).sentence, highlight=False)
        for path in paths:
            click.echo(path)


MODEL_HELP = "MODEL makes the network: package.module:factory or path/file.py:factory, called without arguments."


@main.command(epilog=MODEL_HELP)
@click.option("--model", help="Measure this model, layer by layer and as a whole.  [default: a few layers]")
@click.option("--input", "example", help="Example inputs, or a function that makes them: package.module:function.")
@click.option("--shape", help="Shape of an example input to draw, as in 8x3x224x224.  [default: a guess]")
@click.option("--quick", is_flag=True, help="Measure briefly, to see that all works.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="For how long each layer is repeated.  [default: 0.15; quick: 0.02]",
)
@click.option("--json", "json_out", type=click.Path(path_type=Path), help="File for the figures, too.")
@DEBUG
def benchmark(
    model: str | None, example: str | None, shape: str | None, json_out: Path | None, debug: bool, **options: Any
) -> None:
    """Measure what a model would gain, or how layers fare against torch.nn's, once the results agree."""
    if model is None and (example or shape):
        raise click.UsageError("'--input' and '--shape' say what a '--model' is called with.")
    if example and shape:
        raise click.UsageError("'--input' and '--shape' exclude each other.")
    with one_line(debug):
        with _tools():
            from batchnorm.commands.benchmark import run

        if json_out is not None:
            _check_writable(json_out.parent, json_out.name)
        run(model, example, shape, json_out=json_out, **options)


def _for_checkpoints(command: Callable[..., None]) -> Callable[..., None]:
    """Add what the commands that read and write a checkpoint share."""
    shared = (
        click.argument("model"),
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            required=True,
            help="File to read: *.safetensors, or of torch.save.",
        ),
        click.option("--key", help="Under which key the checkpoint has the weights.  [default: found]"),
        click.option("--out", type=click.Path(path_type=Path), help="File to write: a new one."),
        click.option("--force", is_flag=True, help="Write over a file, but never over the checkpoint that is read."),
        click.option("--dry-run", is_flag=True, help="Do everything, but write nothing."),
        DEBUG,
    )
    for decorate in reversed(shared):
        command = decorate(command)
    return command


@main.command(epilog=MODEL_HELP)
@_for_checkpoints
@click.option("--data", required=True, help="Batches, or a function that makes them: package.module:loader.")
@click.option("--batches", type=click.IntRange(min=1), help="Use at most so many batches.  [default: all]")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop when the statistics are known to within this, in standard deviations.",
)
@click.option("--method", type=click.Choice(["batch", "layerwise"]), default="batch", show_default=True)
@click.option("--metric", help="Function of the model, called before and after: package.module:function.")
@click.option("--json", "json_out", type=click.Path(path_type=Path), help="File for the report, too.")
def recalibrate(model: str, checkpoint: Path, out: Path | None, dry_run: bool, debug: bool, **options: Any) -> None:
    """Give a checkpoint the statistics of its data: a pass over it instead of running averages."""
    _check_has_out(out, dry_run)
    with one_line(debug):
        with _tools():
            from batchnorm.commands.recalibrate import run
            from batchnorm.reports.progress import progress

        with progress(unit="batches") as advance:
            moved = partial(advance, "recalibrating")
            report, changed = run(model, checkpoint, out=out, dry_run=dry_run, progress=moved, **options)
        click.echo(report)
        click.echo(_written(out, dry_run, f"{changed} values changed"))


@main.command(epilog=MODEL_HELP)
@_for_checkpoints
@click.option("--example", help="Example inputs, or a function that makes them: package.module:function.")
@click.option("--data", help="Batches, or a function that makes them; the first has the example inputs.")
def fold(model: str, checkpoint: Path, out: Path | None, dry_run: bool, debug: bool, **options: Any) -> None:
    """Fold batch normalization into the convolutions and linear layers of a checkpoint, for inference.

    With --out *.pt2 the result is a program that torch.export.load reads; it needs example inputs. Otherwise it is
    the state_dict of the folded model, for batchnorm.fold(factory()).model.
    """
    _check_has_out(out, dry_run)
    with one_line(debug):
        with _tools():
            from batchnorm.commands.fold import run

        folded = run(model, checkpoint, out, dry_run=dry_run, **options)
        click.echo(folded)
        click.echo(_written(out, dry_run, "the folded model"))


@main.command()
@click.argument("target")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights for TARGET, if that makes a model.")
@click.option("--key", help="Under which key the checkpoint has the weights.  [default: found]")
@click.option("--data", help="Batches to run a model on, or a function that makes them: package.module:loader.")
@click.option("--metric", help="Function of the model: package.module:function.")
@click.option("--batches", type=click.IntRange(min=1), help="Use at most so many batches.  [default: all]")
@click.option("--format", "kind", type=click.Choice(["text", "json", "github"]), default="text", show_default=True)
@click.option("--select", default="", help="Look for these rules alone: BN102,BN2.")
@click.option("--ignore", default="", help="Leave these rules out.")
@click.option("--advice", is_flag=True, help="Show advice, too.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "advice", "never"]),
    default="warning",
    show_default=True,
    help="Exit with 1 if something as bad as that was found.",
)
@DEBUG
def diagnose(target: str, kind: str, advice: bool, fail_on: Any, debug: bool, **options: Any) -> None:
    """Say what is wrong with the batch normalization of a checkpoint or a model.

    TARGET is a file (*.safetensors, or of torch.save, from which no code is run), or makes the network:
    package.module:factory or path/file.py:factory. Exit codes: 0 clean, 1 something was found, 2 it could not be
    looked at.
    """
    with one_line(debug, failed=2):
        with _tools():
            from batchnorm.commands.diagnose import in_format, run
            from batchnorm.diagnosis.report import at_least

        report = run(target, **options)
        text = in_format(report, kind, advice)
        if text:
            click.echo(text)
        if fail_on != "never" and report.of(at_least(fail_on)):
            raise click.exceptions.Exit(1)


@main.command()
@click.argument("code")
def rule(code: str) -> None:
    """Explain a rule of `batchnorm diagnose`: what it looks for, why, what to do, and when it is wrong."""
    with one_line(failed=2):
        from batchnorm.commands.diagnose import rule as found

        click.echo(found(code))


def _check_has_out(out: Path | None, dry_run: bool) -> None:
    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out' (or '--dry-run', which writes nothing).")


def _written(out: Path | None, dry_run: bool, what: str) -> str:
    """Say what has been written, or would be."""
    return f"{out}: {what}" if not dry_run else f"{out or 'nothing'}: would be written, {what}"


@contextmanager
def _tools() -> Iterator[None]:
    """Turn the lack of a package into one line that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "batchnorm":
            raise
        print(NEEDS_TOOLS.format(error.name), file=sys.stderr)
        raise click.exceptions.Exit(2) from None


def _check_writable(directory: Path, *names: str) -> None:
    """Make the directory and a file in it, so that a wrong path is found before the work and not after."""
    import tempfile

    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        target(directory / name)
    with tempfile.TemporaryFile(dir=directory):
        pass


if __name__ == "__main__":
    main()
