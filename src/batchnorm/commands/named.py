"""Objects named on the command line, "package.module:name" or "path/file.py:name", and what they give."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["data", "function", "given", "model", "named"]


def named(text: str) -> Any:
    """Import what a text names.

    Args:
        text: "package.module:name", where the current directory is searched first, as by ``python -m``; or
            "path/file.py:name", where the file's directory is, as by ``python path/file.py``. A name may have dots.

    Raises:
        ValueError: if there is no such module, file or name.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise ValueError(f"{text!r} names no object: write package.module:name or path/file.py:name")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_path(place)
    try:
        return attrgetter(name)(module)
    except AttributeError:
        raise ValueError(f"{place} has no {name!r}") from None


def model(text: str) -> nn.Module:
    """Return the model that a named factory makes, or that has this name.

    Raises:
        ValueError: if it is no torch.nn.Module.
    """
    found = given(text) if not isinstance(thing := named(text), nn.Module) else thing
    if not isinstance(found, nn.Module):
        raise ValueError(f"{text} gives {_kind(found)}, not a torch.nn.Module")
    return found


def data(text: str) -> Iterable[Any]:
    """Return the batches that a named function makes, or that have this name.

    Raises:
        ValueError: if they cannot be iterated over.
    """
    found = given(text)
    if not hasattr(found, "__iter__") and not hasattr(found, "__getitem__"):
        raise ValueError(f"{text} gives {_kind(found)}, not something that gives batches in a loop")
    return found  # type: ignore[no-any-return]


def function(text: str) -> Callable[..., Any]:
    """Return the function of this name.

    Raises:
        ValueError: if it cannot be called.
    """
    found = named(text)
    if not callable(found):
        raise ValueError(f"{text} is {_kind(found)}, not a function")
    return found  # type: ignore[no-any-return]


def given(text: str) -> Any:
    """Return what the function or class of this name makes when it is called; anything else is returned itself."""
    found = named(text)
    ready = hasattr(found, "__iter__") and not isinstance(found, type)
    return found() if callable(found) and not ready else found


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _from_path(place: str) -> ModuleType:
    _searched(os.getcwd())
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"there is no module {error.name!r}, here or installed") from None
        raise  # it is there, and imports something that is not


def _from_file(path: Path) -> ModuleType:
    """Import a file under its own name, so that two options that name it get one module, and workers find it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    _searched(str(path.resolve().parent))
    module = import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise ValueError(f"{path} cannot be imported: the module {path.stem!r} is {module.__file__}; rename the file")
    return module


def _searched(directory: str) -> None:
    if directory not in sys.path:
        sys.path.insert(0, directory)
