"""`batchnorm fold`: the weights of a folded model, or the folded model as an exported program."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.commands import checkpoints, named
from batchnorm.files import replacing
from batchnorm.surgery.batches import inputs
from batchnorm.surgery.example import in_mode
from batchnorm.surgery.folding.fold import Folded, fold

__all__ = ["run"]


def run(
    model: str,
    checkpoint: Path,
    out: Path | None,
    *,
    key: str | None = None,
    example: str | None = None,
    data: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Folded:
    """Fold the model of a checkpoint, and write it.

    Args:
        model: name of a factory.
        checkpoint, key: the file that is read, and where its weights are.
        out: the new file. "*.pt2" is the folded model as a program of torch.export, whose batches
            may have any size if the model allows it; "*.safetensors" and anything else are its `state_dict`.
        example: name of a function that makes example inputs.
        data: name of a loader, whose first batch has the example inputs.
        force: write over other files than the input.
        dry_run: do everything but write.
    """
    program = out is not None and out.suffix == ".pt2"
    if program and example is None and data is None:
        raise ValueError(f"{out} is to be a program of torch.export, which needs example inputs: say --example")
    checkpoints.check_outs([out], checkpoint, force)
    read = checkpoints.read(checkpoint, key)
    net = in_mode(named.model(model), False)
    checkpoints.fit(net, read)
    given = _example(net, example, data)
    folded = fold(net, given)
    if not folded.folded:
        raise ValueError(f"no layer of {model} could be folded: {_reasons(folded)}")
    content = _program(folded.model, given) if program else None
    if out is not None and not dry_run:
        with replacing(out) as partial:
            if content is not None:
                partial.write_bytes(content)
            elif checkpoints.is_safetensors(out):
                safetensors.torch.save_model(folded.model, str(partial), metadata=dict(read.metadata or {}) or None)
            else:
                checkpoints.save(folded.model.state_dict(), partial)
    return folded


def _reasons(folded: Folded) -> str:
    found = [f"{name or '(the model)'}: {reason}" for name, reason in folded.skipped.items()]
    return "; ".join(found[:3]) + ("; …" if len(found) > 3 else "") if found else "it has no batch normalization"


def _example(model: nn.Module, example: str | None, data: str | None) -> Any:
    if example is not None:
        return named.given(example)
    if data is None:
        return None
    for batch in named.data(data):
        return inputs(model, batch)
    raise ValueError(f"{data} gives no batch")


def _program(model: nn.Module, given: Any) -> bytes:
    """Export a model; the first dimension of every tensor may be of any size, if the model allows it."""
    args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (given, {})
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    sizes = tree_map(_any_batch, kwargs or args)
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=sizes)
    written = io.BytesIO()
    torch.export.save(exported, written)
    return written.getvalue()


def _any_batch(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None
