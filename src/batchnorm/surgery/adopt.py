"""Subclasses of torch.nn's layers that do what ours do, as subclasses of ours: with their own class's everything else.

timm's ``BatchNormAct2d`` becomes a ``BatchNorm2d`` of ours whose activation is the layer's own, and stays an instance
of ``BatchNormAct2d``: other people's code that asks for that class, or for the layer's ``act``, still finds it.
"""

from __future__ import annotations

import copy
import copyreg
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.activations import Activation
from batchnorm.any_rank import SyncBatchNorm
from batchnorm.layers import OWN, widen_statistics
from batchnorm.surgery.inspect.elementwise import activation_in
from batchnorm.surgery.inspect.find import FROZEN, NO_FORWARD, OURS, TORCHS, is_frozen, is_uninitialized
from batchnorm.surgery.inspect.reading import Reading, inputs_for, read
from batchnorm.surgery.inspect.trial import aside, close, once, twin_of
from batchnorm.surgery.report import summary

__all__ = ["SYNCED", "adopted_activation", "give_back", "obstacle", "settle", "take_over"]

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOLERANCE = 1e-9
SYNCED = "SyncBatchNorm: its statistics are over all processes"
_made: dict[type[nn.Module], type[nn.Module]] = {}
_tried: dict[Any, str | None] = {}


def obstacle(layer: Any) -> str | None:
    """Why a batch normalization layer cannot become ours; None if it can, or is."""
    if is_frozen(layer):
        return FROZEN
    if "forward" in vars(layer):
        return NO_FORWARD
    momentum, eps = getattr(layer, "momentum", None), getattr(layer, "eps", 1)
    if momentum is not None and not 0 <= momentum <= 1:
        return f"momentum {momentum:g} is not between 0 and 1"
    if eps <= 0:
        return f"eps {eps:g} is not above 0"
    kind = type(layer)
    return None if kind in OURS or kind in TORCHS else _obstacle_to_adopting(layer)


def take_over(layer: nn.Module) -> None:
    """Make a layer ours that has no obstacle to it, or none but to be synchronized."""
    if type(layer) in OURS:
        layer.__class__ = OURS[type(layer)]
    elif type(layer) is nn.SyncBatchNorm:
        layer.__class__ = SyncBatchNorm  # type: ignore[assignment]
    elif type(layer) not in TORCHS:
        _adopt(layer, read(layer))
    widen_statistics(layer)


def give_back(layer: nn.Module) -> None:
    """Make a layer of ours what it was: one of torch.nn's, or of another package's class."""
    layer.__class__ = TORCHS[type(layer)]
    origin = layer.__dict__.pop("_adopted", None)
    for name in OWN:
        layer.__dict__.pop(name, None)
    if origin is not None:
        layer.__dict__.update(origin.kept)


def settle(layer: nn.Module) -> None:
    """Make a layer plainly ours, without anything of another package's class, before it becomes something else."""
    take_over(layer)
    adopted = layer.__dict__.pop("_adopted", None)
    if adopted is not None:
        for part in adopted.parts:
            layer._modules.pop(part, None)
        layer.__class__ = _ours_for(type(layer))


def adopted_activation(layer: nn.Module) -> Activation | None:
    """The activation that a layer's own class applies, where that class is another package's."""
    return vars(layer)["_adopted"].activation if isinstance(layer, _Adopted) else None


# --- which can be adopted ---


def _obstacle_to_adopting(layer: Any) -> str | None:
    kind = type(layer)
    if kind is nn.SyncBatchNorm:
        return SYNCED
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return f"{kind.__name__} is not torch.nn's batch normalization"
    reason = _unfit(layer)
    return None if reason is None else f"{kind.__name__} is a subclass, which may compute something else: {reason}"


def _unfit(layer: Any) -> str | None:
    if isinstance(layer, tuple(TORCHS)):
        return "it is a subclass of ours"
    if isinstance(layer, nn.SyncBatchNorm):
        return "its statistics are over all processes"
    if not isinstance(layer, _KINDS):
        return "its input has no fixed number of dimensions"
    if nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized, which is a class of its own: remove the parametrizations"
    if is_uninitialized(layer):
        return "it has seen no input"
    found = read(layer)
    if isinstance(found, str):
        return found
    return found.unfit or _trial(layer, found)


def _trial(layer: nn.Module, found: Reading) -> str | None:
    """Run a layer and what would be made of it on the same numbers, in training and in evaluation."""
    return once(layer, _tried, lambda one: _differs(one, found))


def _differs(layer: nn.Module, found: Reading) -> str | None:
    try:
        with aside():
            for x in inputs_for(layer):
                right, ours = twin_of(layer), twin_of(layer)
                _adopt(ours, found)
                for training in (True, True, False):
                    for name, (a, b) in _steps(right, ours, x, training).items():
                        if (a is None) is not (b is None) or (a is not None and not close(a, b, _TOLERANCE)):  # type: ignore[arg-type]
                            return f"on trial its {name} is not what ours gives"
    except Exception as error:  # whatever a layer does on trial
        return f"it fails on trial: {summary(error)}"
    return None


def _steps(right: Any, ours: Any, x: Tensor, training: bool) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """A step of both: what they give, what they learn and what they remember, by name."""
    found: list[dict[str, Tensor | None]] = []
    for layer in (right, ours):
        layer.train(training)
        given = x.clone().requires_grad_()
        y = layer(given.clone())  # which it may overwrite
        weights = torch.linspace(0.5, 2, y.numel(), dtype=y.dtype, device="cpu").view(y.shape)
        learning = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad((y * weights).sum(), [given, *learning.values()])
        named = dict(zip(("gradient", *(f"gradient of {name}" for name in learning)), gradients, strict=True))
        found.append({"output": y.detach(), **named, **{name: b.clone() for name, b in layer.named_buffers()}})
    if found[0].keys() != found[1].keys():
        raise RuntimeError(f"tensors {sorted(found[0].keys() ^ found[1].keys())} are not in both")
    return {name: (a, found[1][name]) for name, a in found[0].items()}


# --- what they become ---


@dataclass(frozen=True)
class _Origin:
    """What an adopted layer does beside normalizing, and what it had under names that ours use.

    Attributes:
        activation: what its own class applies.
        parts: the names of the submodules that apply it.
        kept: its attributes of the same names as ours.
    """

    activation: Activation | None
    parts: tuple[str, ...]
    kept: dict[str, Any]


class _Kind(type):
    """The class of adopted classes, which are not found by their names; so they pickle as what they were made of."""


class _Adopted(nn.Module):
    """Mixed into the class of a layer of ours that is an instance of another package's class as well."""

    _adopted: _Origin

    def __setattr__(self, name: str, value: Any) -> None:
        """Let a new part behind normalization, such as ``layer.act``, be the activation, as in its own class."""
        adopted = self.__dict__.get("_adopted")
        if adopted is not None and name in adopted.parts:
            self._follow({**{part: self._modules.get(part) for part in adopted.parts}, name: value})
        super().__setattr__(name, value)

    def _follow(self, parts: dict[str, Any]) -> None:
        """Take over the activation that new parts are."""
        active = {name: part for name, part in parts.items() if type(part) is not nn.Identity}
        known = [activation_in(part) if isinstance(part, nn.Module) else None for part in active.values()]
        before: Any = self._adopted
        layer: Any = self
        if len(known) > 1 or None in known or layer.activation != before.activation:
            raise TypeError(
                f"{' and '.join(active)} of this {type(self).__name__}, which batchnorm.convert made a layer of ours, "
                "cannot become that: call batchnorm.revert before"
            )
        activation = known[0] if known else None
        self.__dict__.update(_adopted=replace(before, activation=activation), activation=activation)

    def _obstacle_to_takeover(self, by: str) -> str | None:
        """Let the package that its class is of make what it likes of it; others know nothing of its activation."""
        adopted: _Origin = self._adopted
        if adopted.activation is None or by == type(self).__module__:
            return None
        return (
            f"without its activation {adopted.activation.name}: take {type(self).__module__}'s own function, if it has "
            "one; or convert(model, statistics=Sync()) instead"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """Give TorchScript a layer of the class that it was."""
        if self.__dict__.get("_statistics") is not None and self.training:
            refused: nn.Module = super().__prepare_scriptable__()  # type: ignore[misc]
            return refused
        twin: nn.Module = copy.copy(self)
        give_back(twin)
        # TorchScript remembers by id which layers it has seen: an id must not come back while it works.
        twin.__dict__["_stands_for"] = (self,)
        return twin


def _adopt(layer: nn.Module, found: Any) -> None:
    layer.__class__ = _class_for(type(layer))
    kept = {name: layer.__dict__.pop(name) for name in OWN if name in layer.__dict__}
    layer.__dict__.update(_adopted=_Origin(found.activation, found.parts, kept), activation=found.activation)


def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _made:
        ours = _ours_for(kind)
        body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        made: Any = _Kind(kind.__name__, (_Adopted, ours, kind), body)
        _made[kind], TORCHS[made] = made, kind
    return _made[kind]


def _ours_for(kind: type[nn.Module]) -> type[nn.Module]:
    return OURS[next(base for base in _KINDS if issubclass(kind, base))]


def _reduced(made: Any) -> Any:
    return _class_for, (TORCHS[made],)


copyreg.pickle(_Kind, _reduced)
