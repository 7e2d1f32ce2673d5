"""Checkpoint files: read without running code from them, fitted into a model, written as new files.

A file `*.safetensors` is read by safetensors, any other by `torch.load(weights_only=True)`. In the latter the weights
are the whole content, or what is under one of the keys in `KEYS`, or under a key that is named.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.reports.files import target

__all__ = ["KEYS", "Checkpoint", "check_outs", "fit", "is_safetensors", "read", "save", "write"]

_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod)\.)*")
KEYS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: the weights by name, and whatever else, which is kept as it is.

    Attributes:
        path: the file.
        state: the weights, on the CPU.
        content: for torch's format, all that the file holds; `state` itself if that is all.
        key: under which key of `content` the state is.
        metadata: for safetensors, the texts in the header.
    """

    path: Path
    state: Mapping[str, Tensor]
    content: Any = None
    key: str | None = None
    metadata: Mapping[str, str] | None = None


def read(path: Path, key: str | None = None) -> Checkpoint:
    """Read a checkpoint; code in it is refused.

    Args:
        path: `*.safetensors`, or a file of torch.save.
        key: where in the latter the weights are. Default: one of `KEYS`, or the whole content is the weights.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not such a file, needs code to be run, or has no weights there.
    """
    with path.open("rb"):  # a missing file is the same error for both formats
        pass
    if is_safetensors(path):
        return _read_safetensors(path, key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no pickle, anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(f"{path} is not a file of torch.save, or is damaged") from None
        raise ValueError(
            f"{path} holds objects ({code[1]}) that only running code from the file could make, which is refused: "
            "save model.state_dict() alone"
        ) from None
    return _inside(path, content, key)


def _read_safetensors(path: Path, key: str | None) -> Checkpoint:
    if key is not None:
        raise ValueError(f"{path} is a safetensors file, which has no keys such as {key!r} around its weights")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            return Checkpoint(path, {name: file.get_tensor(name) for name in file.keys()}, metadata=metadata)  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from None


def _inside(path: Path, content: Any, key: str | None) -> Checkpoint:
    """Find the weights in what torch.save has written."""
    if key is None and _is_state(content):
        return Checkpoint(path, content, content)
    found = [k for k in (KEYS if key is None else (key,)) if isinstance(content, Mapping) and _is_state(content.get(k))]
    if len(found) == 1:
        return Checkpoint(path, content[found[0]], content, found[0])
    if found:
        raise ValueError(f"{path} has weights under {_list(map(repr, found))}: say --key which")
    there = f"has the keys {_list(map(repr, content))}" if isinstance(content, Mapping) else f"is a {_kind(content)}"
    wanted = f"under {key!r}" if key else f"by themselves or under {_list(map(repr, KEYS))}; name another with --key"
    raise ValueError(f"{path} {there}, and no weights {wanted}")


def _kind(value: Any) -> str:
    return type(value).__name__


def _is_state(value: Any) -> bool:
    """Whether something is weights by name; extra state, which is not tensors, may be among them."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(v, Tensor) for v in value.values())
        and all(isinstance(k, str) and (isinstance(v, Tensor) or k.endswith("_extra_state")) for k, v in value.items())
    )


def fit(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Load a checkpoint's weights into a model made for them, all of them.

    Names may begin with what a parallel or compiled model's begin with, in the file and in the model or in one of them.

    Returns:
        For each name in the model, that of the same weights in the file.

    Raises:
        ValueError: naming the first weights that are missing, unexpected or of another shape. Missing may be another
            name of a tied weight that is there, and counters of layers saved before there were any. Or those, here or
            there, that are sparse or have no values.
    """
    own = model.state_dict(keep_vars=True)
    for what, weights in ((str(checkpoint.path), checkpoint.state), (type(model).__name__, own)):
        for name, value in weights.items():
            reason = _unusable(value)
            if reason is not None:
                raise ValueError(f"{name} of {what} {reason}")
    prefixes = _prefix(checkpoint.state), _prefix(own)
    state = _renamed(checkpoint.state, *prefixes)
    other = [
        f"{name} ({list(value.shape)}; in the model {list(own[name].shape)})"
        for name, value in state.items()
        if name in own and _differ(own[name], value)
    ]
    keys = None if other else model.load_state_dict(state, strict=False)
    there = {id(own[name]) for name in state if name in own}
    names = own if keys is None else keys.missing_keys
    missing = [name for name in names if name not in state and id(own.get(name)) not in there]
    unexpected = [name for name in state if name not in own] if keys is None else keys.unexpected_keys
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    if missing or unexpected or other:
        said = "; ".join(f"{len(these)} {what}: {_list(these)}" for what, these in problems.items() if these)
        raise ValueError(f"{checkpoint.path} does not fit {type(model).__name__}: {said}")
    return dict(zip(state, checkpoint.state, strict=True))


def _prefix(names: Iterable[str]) -> str:
    """What all names begin with, of what wrappers around a whole model add to them."""
    found = (_WRAPPERS.match(name) for name in names)
    return min((match[0] for match in found if match is not None), key=len, default="")


def _renamed(state: Any, old: str, new: str) -> Any:
    """The same with another prefix; also in the versions of layers that torch keeps beside the weights."""
    if old == new:
        return state
    made: Any = OrderedDict((new + name.removeprefix(old), value) for name, value in state.items())
    versions: Any = getattr(state, "_metadata", None)
    if versions is not None:
        kept = {f"{name}."[len(old) :]: value for name, value in versions.items() if f"{name}.".startswith(old)}
        made._metadata = OrderedDict(((new + name).removesuffix("."), value) for name, value in kept.items())
    return made


def _unusable(value: Any) -> str | None:
    if not isinstance(value, Tensor) or is_lazy(value):
        return None
    if value.is_meta:
        return "is on the meta device, and has no values: make it on the CPU"
    if value.layout is not torch.strided:
        return f"is sparse ({value.layout}), which no layer of these is: make it dense, with to_dense()"
    return None


def _differ(own: Any, value: Any) -> bool:
    tensors = isinstance(own, Tensor) and isinstance(value, Tensor)
    return tensors and not is_lazy(own) and own.shape != value.shape


def _list(names: Iterable[str], most: int = 3) -> str:
    every = list(names)
    return ", ".join(every[:most]) + (", …" if len(every) > most else "")


def check_outs(outs: Iterable[Path | None], source: Path, force: bool) -> None:
    """Find out before the work whether new files can be written there.

    Raises:
        ValueError: if one is the input, or another one, by whatever name; or if there is a file, and no `force`.
        OSError: if one is no file, if there is no such directory, or nothing can be written into it.
    """
    seen: dict[Path, Path] = {}
    for out in outs:
        if out is None:
            continue
        place = target(out)
        if place in seen:
            raise ValueError(f"{out} and {seen[place]} are one file, and two are to be written: name another")
        seen[place] = out
        if place.exists():
            if source.exists() and place.samefile(source):
                raise ValueError(
                    f"{out} is the checkpoint that is read, which is never written over: name another file"
                )
            if not force:
                raise ValueError(f"{out} exists: name another file, or write over it with --force")
        with tempfile.TemporaryFile(dir=place.parent):
            pass


def write(out: Path, checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> None:
    """Write a checkpoint again with some values changed; each keeps the dtype that it has in the file.

    Args:
        out: the new file, in the same format; half of it may be there after an error.
        checkpoint: what was read.
        changed: new values by name; all else stays as it was.
    """
    state: Any = copy.copy(checkpoint.state)  # of an OrderedDict with torch's versions of layers, these too
    for name, value in changed.items():
        state[name] = value.detach().to("cpu", checkpoint.state[name].dtype).contiguous()
    if is_safetensors(checkpoint.path):
        safetensors.torch.save_file(state, out, metadata=dict(checkpoint.metadata or {}) or None)
    elif checkpoint.key is None:
        save(state, out)
    else:
        content = copy.copy(checkpoint.content)
        content[checkpoint.key] = state
        save(content, out)


def save(value: Any, path: Path) -> None:
    """Do what torch.save does, which hides the reason for which a file could not be written.

    Raises:
        OSError: that reason, such as a full disk.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        reason = error.__context__
        raise reason if isinstance(reason, OSError) else error from None


def is_safetensors(path: Path) -> bool:
    """Whether a file's name says that it is in the format of safetensors."""
    return path.suffix == ".safetensors"
