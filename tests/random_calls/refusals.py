"""Arguments that do not fit: the error is of torch's type, and nothing has changed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.functional import batch_norm
from batchnorm.statistics import Accumulated, Ghost, Renorm

from .cases import Case

# Where torch has no such argument, or takes in silence what is a mistake.
_OURS: dict[str, type[Exception]] = {
    "x_rank": ValueError,
    "x_channels": ValueError,
    "momentum": ValueError,
    "momentum_none": ValueError,
    "one_statistic": ValueError,
    "weight_rank": RuntimeError,
    "weight_device": RuntimeError,
    "running_mean_device": RuntimeError,
    "residual_size": RuntimeError,
    "residual_dtype": RuntimeError,
    "residual_device": RuntimeError,
    "mask_size": RuntimeError,
    "mask_dtype": TypeError,
    "mask_negative": ValueError,
    "mask_nan": ValueError,
    "mask_grad": ValueError,
    "activation_name": ValueError,
    "activation_type": TypeError,
    "policy_type": TypeError,
    "state_size": RuntimeError,
    "state_missing": ValueError,
    "inplace_leaf": RuntimeError,
    "inplace_relu": ValueError,
    "inplace_expanded": RuntimeError,
    "inplace_weight": RuntimeError,
    "renorm_statistics": ValueError,
    "ghost_rest": ValueError,
}


def refusal(case: Case, subject: Any) -> list[str]:
    """Complaints about one call that must be refused."""
    arguments = _arguments(case, subject)
    expected = _OURS.get(case.bad) or _torchs(arguments)
    kept = {name: t.detach().clone() for name, t in arguments.items() if isinstance(t, Tensor) and not t.is_meta}
    try:
        batch_norm(**arguments)
    except Exception as error:
        faults = (
            [] if isinstance(error, expected) else [f"{case.bad}: {type(error).__name__}: {error}; torch: {expected}"]
        )
    else:
        faults = [f"{case.bad}: accepted, where {expected.__name__} was expected"]
    for name, before in kept.items():
        if not torch.equal(torch.nan_to_num(before.to_dense()), torch.nan_to_num(arguments[name].detach().to_dense())):
            faults.append(f"{case.bad}: {name} has changed")
    return faults


def _torchs(arguments: dict[str, Any]) -> type[Exception]:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    own = {name: t.clone() if isinstance(t, Tensor) else t for name, t in arguments.items() if name in names}
    try:
        F.batch_norm(**own)
    except Exception as error:
        return type(error)
    raise AssertionError("torch accepts this")


def _arguments(case: Case, subject: Any) -> dict[str, Any]:
    C, bad = case.channels, case.bad
    x = subject.values().to(subject.dtype)
    other = torch.float64 if subject.dtype != torch.float64 else torch.float32
    positions = torch.ones(case.shape[0], *case.shape[2:])
    own = {
        "input": x, "running_mean": subject.running[0], "running_var": subject.running[1],
        "weight": torch.ones(C).to(x),
        "bias": torch.zeros(C).to(x), "training": case.training, "momentum": 0.1, "eps": 1e-5,
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }  # fmt: skip
    if subject.dtype in (torch.float16, torch.bfloat16):
        own.update(weight=torch.ones(C), bias=torch.zeros(C))
    if bad.endswith("_size") and bad.removesuffix("_size") in own:
        own[bad.removesuffix("_size")] = torch.ones(C + 1, dtype=own["weight"].dtype)
    elif bad in ("weight_dtype", "bias_dtype"):
        own[bad.removesuffix("_dtype")] = torch.ones(C, dtype=other)
    elif bad in ("weight_device", "running_mean_device"):
        name = bad.removesuffix("_device")
        own[name] = own[name].to("meta")
    changes: dict[str, dict[str, Any]] = {
        "weight_rank": {"weight": own["weight"][None], "training": True},
        "x_int": {"input": x.long(), "weight": None, "bias": None},
        "x_complex": {"input": x.to(torch.complex64), "weight": None, "bias": None},
        "x_rank": {"input": x.flatten()[:C]},
        "x_channels": {"input": x[:, :0], "training": True},
        "x_sparse": {"input": x.to_sparse()},
        "one_value": {"input": x.flatten(2).mean(-1)[:1] if x.dim() > 2 else x[:1], "training": True},
        "eps_zero": {"eps": 0.0, "training": True},
        "eps_negative": {"eps": -1.0},
        "momentum": {"momentum": 2.0, "training": True},
        "momentum_none": {"momentum": None, "num_batches_tracked": None, "training": True},
        "statistics_missing": {"running_mean": None, "running_var": None, "training": False},
        "one_statistic": {"running_mean": None, "training": True},
        "residual_size": {"residual": x[:, :1]},
        "residual_dtype": {"residual": x.to(other)},
        "residual_device": {"residual": x.to("meta")},
        "mask_size": {"mask": torch.ones(case.shape[0] + 1, *case.shape[2:], dtype=torch.bool)},
        "mask_dtype": {"mask": positions.long()},
        "mask_negative": {"mask": -positions},
        "mask_nan": {"mask": positions * float("nan")},
        "mask_grad": {"mask": positions.requires_grad_()},
        "activation_name": {"activation": "rely"},
        "activation_type": {"activation": 3},
        "policy_type": {"statistics": "ghost", "training": True},
        "state_size": {"statistics": Accumulated(2), "state": torch.zeros(3, dtype=torch.float64), "training": True},
        "state_missing": {"statistics": Accumulated(2), "training": True},
        "inplace_leaf": {"input": x.requires_grad_(), "inplace": True} if bad == "inplace_leaf" else {},
        "inplace_relu": {"inplace": True, "activation": "relu"},
        "inplace_expanded": {"input": x[:1].expand(x.shape), "inplace": True},
        "inplace_weight": {"inplace": True, "weight": torch.zeros_like(own["weight"])},
        "renorm_statistics": {
            "statistics": Renorm(schedule=None), "running_mean": None, "running_var": None, "training": True,
        },
        "ghost_rest": {"input": torch.ones(3, C).to(x), "statistics": Ghost(2), "training": True},
    }  # fmt: skip
    return {**own, **changes.get(bad, {})}
