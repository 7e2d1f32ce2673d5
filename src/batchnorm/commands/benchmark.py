"""`batchnorm benchmark`: what a model would gain, or how a few layers fare."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from batchnorm.benchmark import grid
from batchnorm.benchmark.gain import gain
from batchnorm.benchmark.report import Table, draw
from batchnorm.commands import named
from batchnorm.commands.fold import unwrapped
from batchnorm.reports.files import write_text
from batchnorm.reports.progress import Advance, progress
from batchnorm.surgery.inspect.example import forward, in_mode, seeded
from batchnorm.surgery.inspect.tensors import copied

__all__ = ["run"]

SCHEMA, VERSION = "batchnorm.benchmark", 3
_SECONDS, _QUICK_SECONDS = 0.15, 0.02
# Of the first layer that says what it takes: its attribute, and what comes before and after so many channels.
_INPUTS: dict[type[nn.Module], tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    nn.Conv1d: ("in_channels", (8,), (256,)),
    nn.Conv2d: ("in_channels", (8,), (224, 224)),
    nn.Conv3d: ("in_channels", (2,), (16, 64, 64)),
    nn.Linear: ("in_features", (64,), ()),
}


def run(
    model: str | None = None,
    example: str | None = None,
    shape: str | None = None,
    seconds: float | None = None,
    quick: bool = False,
    json_out: Path | None = None,
) -> None:
    """Measure, print, and write a file.

    Args:
        model: name of a factory; None to measure a few layers.
        example: name of example inputs, or of a function that makes them.
        shape: of an example input that is drawn, "8x3x224x224". Without either, one is guessed from the first layer.
        seconds: for how long each layer is repeated.
        quick: short, to see that all works; the figures judge nothing.
        json_out: where everything goes as JSON.
    """
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)  # a file is as wide as the tables
    seconds = seconds or (_QUICK_SECONDS if quick else _SECONDS)
    with progress() as advance:
        if model is None:
            tables, values = _layers(quick, seconds, advance)
        else:
            tables, values = _gain(model, example, shape, seconds, advance)
    for title, table in tables.items():
        console.print(title, style="bold")
        draw(table, console)
    threads = torch.get_num_threads()
    if "sentence" in values:
        console.print(f"{values['sentence']} Measured on {values['inputs']}, with {threads} threads.")
    if quick:
        console.print("This was a quick run: it shows that everything works, and its figures judge nothing.")
    if json_out is not None:
        about = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": quick,
            "torch": torch.__version__,
            "threads": threads,
            "vectors": torch.backends.cpu.get_cpu_capability(),
        }
        data = {"schema": SCHEMA, "version": VERSION, **about, **values}
        write_text(json_out, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        console.print(str(json_out))


def _layers(quick: bool, seconds: float, advance: Advance) -> tuple[dict[str, Table], dict[str, Any]]:
    rows = grid.measure(quick, seconds, advance)
    return grid.tables(rows), {"layers": [asdict(row) for row in rows]}


def _gain(
    model: str, example: str | None, shape: str | None, seconds: float, advance: Advance
) -> tuple[dict[str, Table], dict[str, Any]]:
    network, _ = unwrapped(named.model(model))
    inputs, what = _inputs(network, model, example, shape)
    found = gain(network, inputs, seconds, advance)
    return found.tables(), {"model": model, "inputs": what, "sentence": found.sentence, **asdict(found)}


def _inputs(network: nn.Module, model: str, example: str | None, shape: str | None) -> tuple[Any, str]:
    """The example inputs, and what they are."""
    if example is not None:
        return named.given(example), example
    if shape is not None:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
            raise ValueError(f"{shape!r} is no shape: write it as 8x3x224x224")
        return _drawn(network, tuple(map(int, shape.split("x")))), shape
    layers = [layer for layer in network.modules() if type(layer) in _INPUTS]
    if not layers:
        raise ValueError(f"what {model} takes cannot be guessed: say --shape, as in 8x3x224x224, or --input")
    attribute, before, after = _INPUTS[type(layers[0])]
    sizes = (*before, getattr(layers[0], attribute), *after)
    inputs, what = _drawn(network, sizes), f"a guessed input of {'×'.join(map(str, sizes))}"
    try:
        with seeded(network), torch.no_grad():
            forward(in_mode(copied(network), False), inputs)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{model} does not take {what}, say --shape or --input: {why}") from None
    return inputs, what


def _drawn(network: nn.Module, sizes: tuple[int, ...]) -> torch.Tensor:
    """Draw an input of the dtype of the network's weights."""
    dtypes = [p.dtype for p in network.parameters() if p.is_floating_point()]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtypes[0] if dtypes else torch.float32)
