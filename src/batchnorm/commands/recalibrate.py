"""`batchnorm recalibrate`: a checkpoint with population statistics instead of running averages."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from batchnorm.commands import checkpoints, named
from batchnorm.reports.files import replacing
from batchnorm.surgery.recalibrate import Recalibrated, recalibrate

__all__ = ["run"]


def run(
    model: str,
    checkpoint: Path,
    data: str,
    *,
    out: Path | None = None,
    key: str | None = None,
    metric: str | None = None,
    json_out: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> tuple[Recalibrated, int]:
    """Recalibrate the model of a checkpoint, and write the checkpoint again with the new statistics.

    Args:
        model, data, metric: names of a factory, a loader and a function of the model.
        checkpoint, key: the file that is read, and where its weights are.
        out: the new file.
        json_out: where the report goes, too.
        force: write over other files than the input.
        dry_run: do everything but write.
        options: of :func:`batchnorm.recalibrate`.

    Returns:
        The report, and how many values of the checkpoint change.
    """
    checkpoints.check_outs((out, json_out), checkpoint, force)
    if out is not None and checkpoints.is_safetensors(out) != checkpoints.is_safetensors(checkpoint):
        raise ValueError(f"{out} would have another format than {checkpoint}: the new checkpoint keeps the old one's")
    read = checkpoints.read(checkpoint, key)
    net = named.model(model)
    names = checkpoints.fit(net, read)
    measure: Callable[[nn.Module], float] | None = None if metric is None else named.function(metric)
    before = {id(b): b.clone() for b in net.buffers()}
    report = recalibrate(net, named.data(data), metric=measure, **options)
    changed = {
        names[name]: value
        for name, value in net.state_dict(keep_vars=True).items()
        if name in names and id(value) in before and not value.allclose(before[id(value)], 0, 0, equal_nan=True)
    }
    if not dry_run:
        with ExitStack() as files:  # all whole before the first takes its place
            if json_out is not None:
                text = json.dumps(report.as_dict(), indent=1) + "\n"
                files.enter_context(replacing(json_out)).write_text(text, encoding="utf-8")
            if out is not None:
                checkpoints.write(files.enter_context(replacing(out)), read, changed)
    return report, len(changed)
