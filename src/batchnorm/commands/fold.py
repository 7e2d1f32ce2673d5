"""`batchnorm fold`: the weights of a folded model, or the folded model as an exported program."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.commands import checkpoints, named
from batchnorm.reports.files import replacing
from batchnorm.surgery.folding.fold import Folded, fold
from batchnorm.surgery.inspect.batches import inputs
from batchnorm.surgery.inspect.example import in_mode

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
    made = in_mode(named.model(model), False)
    checkpoints.fit(made, read)
    net, prefix = unwrapped(made)
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
                whole, metadata = _wrapped(folded.model, prefix), dict(read.metadata or {}) or None
                safetensors.torch.save_model(whole, str(partial), metadata=metadata)
            else:
                checkpoints.save(_wrapped(folded.model, prefix).state_dict(), partial)
    return folded


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model within what makes it parallel or compiles it, and what the names of a folded one begin with.

    What `batchnorm.fold` makes of a parallel model is parallel, too; a compiled one is folded before it is compiled.
    """
    prefix = ""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model, prefix = model.module, f"{prefix}module."
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model, prefix


def _wrapped(model: nn.Module, prefix: str) -> nn.Module:
    """A module whose weights have the model's names behind a prefix."""
    for name in prefix.split(".")[:-1]:
        around = nn.Module()
        around.add_module(name, model)
        model = around
    return model


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
    sizes: Any = torch.export.ShapesCollection()
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.dim():
            sizes[tensor] = {0: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=sizes)
    written = io.BytesIO()
    torch.export.save(exported, written)
    return written.getvalue()
