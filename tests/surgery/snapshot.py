"""Everything that a model holds, taken down independently of the library, to be compared with later."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Snapshot:
    """What a model and the random generators were."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, _described(model)

    def assert_unchanged(self) -> None:
        now = _described(self._model)
        assert now.keys() == self._before.keys()
        for what, value in now.items():
            assert value == self._before[what], what

    def unchanged(self) -> bool:
        return _described(self._model) == self._before


def _described(model: nn.Module) -> dict[str, Any]:
    """Names and comparable values: identities of objects, and bytes of tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = _value(value)
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), _bytes(p.grad))
        found[f"{name}: learning"] = p.requires_grad, grad
    found["torch"] = torch.get_rng_state().numpy().tobytes()
    found["python"] = random.getstate()
    found["numpy"] = repr(np.random.get_state())
    return found


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.shape, _bytes(value)
    if isinstance(value, dict):
        return id(value), [(key, _value(item)) for key, item in value.items()]
    if isinstance(value, (list, set)):
        return id(value), [id(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def _bytes(t: Tensor) -> bytes:
    return t.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""
