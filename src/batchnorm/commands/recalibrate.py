"""`batchnorm recalibrate`: a checkpoint with population statistics instead of running averages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from batchnorm.commands import checkpoints, named
from batchnorm.files import write_text
from batchnorm.surgery.recalibrate import Recalibrated, recalibrate

__all__ = ["run", "statistics_of"]


def run(
    model: str,
    checkpoint: Path,
    data: str,
    out: Path | None,
    *,
    key: str | None = None,
    metric: str | None = None,
    json_out: Path | None = None,
    force: bool = False,
    **options: Any,
) -> tuple[Recalibrated, int]:
    """Recalibrate the model of a checkpoint, and write the checkpoint again with the new statistics.

    Args:
        model, data, metric: names of a factory, a loader and a function of the model.
        checkpoint, key: the file that is read, and where its weights are.
        out: the new file; None writes nothing.
        json_out: where the report goes, too.
        force: write over other files than the input.
        options: of :func:`batchnorm.recalibrate`.

    Returns:
        The report, and how many values of the checkpoint change.
    """
    for file in (out, json_out):
        if file is not None:
            checkpoints.check_out(file, checkpoint, force)
    if out is not None and checkpoints.is_safetensors(out) != checkpoints.is_safetensors(checkpoint):
        raise ValueError(f"{out} would have another format than {checkpoint}: the new checkpoint keeps the old one's")
    read = checkpoints.read(checkpoint, key)
    net = named.model(model)
    checkpoints.fit(net, read)
    measure: Callable[[nn.Module], float] | None = None if metric is None else named.function(metric)
    report = recalibrate(net, named.data(data), metric=measure, **options)
    changed = {name: value for name, value in statistics_of(net, report.layers).items() if name in read.state}
    if out is not None:
        checkpoints.write(out, read, changed)
    if json_out is not None:
        write_text(json_out, json.dumps(report.as_dict(), indent=1) + "\n")
    return report, len(changed)


def statistics_of(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the running statistics of layers by all the names that they have in the model's `state_dict`."""
    buffers = {id(b) for name in layers for b in model.get_submodule(name).buffers(recurse=False)}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if id(value) in buffers}
