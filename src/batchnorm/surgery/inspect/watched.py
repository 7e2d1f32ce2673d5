"""Which attributes of layers a forward reads besides calling the layers: what is taken away must not be missed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

__all__ = ["missed", "read_besides_calls"]

if TYPE_CHECKING:
    _Base = nn.Module  # what it is mixed into
else:
    _Base = object

_EVERY_MODULE = frozenset(dir(nn.Identity())) | {"training"}


class _Watched(_Base):
    """Notes what others ask a layer for. Each layer gets a class of its own, which its copies share."""

    _asked: ClassVar[set[str]]
    _running: ClassVar[list[None]]  # as long as the layer is called within itself

    def __getattribute__(self, name: str) -> Any:
        kind = type(self)
        if not kind._running and name not in _EVERY_MODULE and not name.startswith("_"):
            kind._asked.add(name)
        return super().__getattribute__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = type(self)._running
        running.append(None)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            running.pop()


@contextmanager
def read_besides_calls(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, set[str]]]:
    """Note which attributes of layers, or of copies made in the block, are read in the block from outside their calls.

    What every module has (its mode, its methods, hooks) does not count.

    Args:
        layers: they change their class for the duration of the block.

    Returns:
        For each layer the names, complete at the end of the block.
    """
    kinds = {layer: type(layer) for layer in layers}
    asked: dict[nn.Module, set[str]] = {layer: set() for layer in kinds}
    try:
        for layer, kind in kinds.items():
            own = {"_asked": asked[layer], "_running": [], "__module__": kind.__module__}
            layer.__class__ = type(kind.__name__, (_Watched, kind), own)
        yield asked
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind


def missed(asked: Collection[str], kept: Collection[str] = ()) -> str | None:
    """Why a layer cannot go of which forwards read these attributes; None if what takes its place keeps them all."""
    gone = sorted(set(asked) - set(kept))
    return f"a forward reads its {', '.join(gone)}, which nothing in its place would have" if gone else None
