"""Policies: over which set of values a layer takes its mean and variance, and when its running statistics move.

``BatchNorm2d(64, statistics=Ghost(16))`` normalizes each sixteen samples on their own. A policy is a value: it can be
compared, copied, pickled and shared by any number of layers. What a layer must remember for it is one more buffer of
the layer, and of its ``state_dict`` where that is said below.

A policy's ``over`` says which set it works on, where that is not the batch: ``Renorm(over=Sync())``. In evaluation
running statistics normalize, whatever the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["Accumulated", "Batch", "Ghost", "Policy", "Renorm", "Sync", "Warmup", "bind", "check_policy", "resolve"]

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Policy:
    """Where the moments come from; what all policies share."""

    buffer: ClassVar[str | None] = None  # the name of the layer's buffer for what it remembers
    persistent: ClassVar[bool] = False  # whether that buffer is in the state_dict

    def state(self, channels: int, device: torch.device | None = None) -> Tensor | None:
        """Make what a layer of so many channels must remember, as it is before the first batch."""
        return None

    def resolved(self) -> Resolved:
        """Say what it consists of, itself and what it is over."""
        return Resolved(self)


class Resolved(NamedTuple):
    """A policy, and of each kind the one that it is or is over."""

    policy: Policy | None = None
    ghost: Ghost | None = None
    renorm: Renorm | None = None
    sync: Sync | None = None
    accumulated: Accumulated | None = None


PLAIN = Resolved()  # the batch


def resolve(policy: Policy | None) -> Resolved:
    """Say once what a policy consists of; the rest of a call asks no more.

    Raises:
        TypeError: for what is neither a policy nor None.
    """
    check_policy(policy)
    return PLAIN if policy is None or type(policy) is Batch else policy.resolved()


@dataclass(frozen=True)
class Batch(Policy):
    """The whole batch, as in Ioffe & Szegedy 2015: what layers do that are given no policy."""


@dataclass(frozen=True)
class Ghost(Policy):
    """Parts of the batch: each ``size`` samples, in order, are normalized as a batch of their own.

    Outputs, gradients, running statistics and the count of batches are what the layer would give if it were called on
    each part in turn. The last part may be smaller, but not of one value a channel.

    Args:
        size: samples in a part.

    Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better", arXiv 1705.08741, Algorithm 1.
    """

    size: int
    over: Policy = field(default=Batch(), repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int):
            raise TypeError(f"Ghost's size counts samples and must be an int, got {self.size!r}")
        if self.size < 1:
            raise ValueError(f"Ghost's size counts samples and must be at least 1, got {self.size}")
        if not isinstance(self.over, Batch):
            raise ValueError(
                f"Ghost cannot be over {self.over}: it makes sets smaller than the batch on one device, for the noise "
                "that they bring, and Sync makes them larger than that. Choose one; with many devices, Ghost alone "
                "already takes its parts within each device's batch"
            )

    def resolved(self) -> Resolved:
        return Resolved(self, ghost=self)


@dataclass(frozen=True)
class Sync(Policy):
    """The batches of all processes of a group, merged exactly: they may differ in size, and some may be empty.

    Forward and backward each need one message of every process to all others, so that all must run the same number of
    steps. Where one has fewer, the others' wait ends with the group's timeout in an error that names the layer; see
    ``torch.distributed.algorithms.Join`` for data that cannot be divided evenly.

    Args:
        process_group: of ``torch.distributed``; None for the default one. A layer with another group can be copied
            but not pickled.
        name: the layer's, for errors; ``batchnorm.convert`` gives each layer its own.
    """

    process_group: Any = None
    name: str | None = field(default=None, repr=False, compare=False)
    # What all have agreed on, if anything: channels, and bytes of a number.
    agreed: list[tuple[int, int]] = field(default_factory=list, repr=False, compare=False)

    def __deepcopy__(self, memo: Any) -> Sync:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without what was agreed on: it may be loaded beside processes that have not met yet."""
        return {**vars(self), "agreed": []}

    def resolved(self) -> Resolved:
        return Resolved(self, sync=self)


@dataclass(frozen=True)
class Warmup:
    """How far renormalization may correct, by batches seen: first not at all, then linearly more, up to its limits.

    Args:
        plain: batches without any correction: plain batch normalization.
        r_until, d_until: when ``r_max`` and ``d_max`` are reached.

    The defaults are the paper's, section 3.
    """

    plain: int = 5_000
    r_until: int = 40_000
    d_until: int = 25_000

    def __post_init__(self) -> None:
        if not 0 <= self.plain <= min(self.r_until, self.d_until):
            raise ValueError(f"a warm-up begins before it ends, got {self}")


@dataclass(frozen=True)
class Renorm(Policy):
    """The batch, corrected towards the running statistics: x̂ = (x − μ_B) / σ_B · r + d, with constants r and d.

    ``r = σ_B / σ`` and ``d = (μ_B − μ) / σ`` within limits, from the running statistics before they move. So training
    normalizes nearly as evaluation does, and small batches, or ones that are not drawn at random, do less harm.

    A moving average is taken of the deviation, as in the paper: ``running_var`` holds its square less eps, so that
    evaluation uses the paper's σ. It is not corrected for the degrees of freedom, which matters where a batch has few
    values a channel. The layer counts its batches for the schedule in ``renorm_batches``, a buffer in its state_dict.
    Under activation checkpointing, the recomputation finds running statistics that have moved once, and so slightly
    other r and d.

    Args:
        r_max: r stays within 1 / r_max and r_max.
        d_max: d stays within −d_max and d_max.
        schedule: how the limits are approached; None to allow them at once, for a network that is already trained.
        over: ``Batch()``, or ``Sync()`` for the batches of all processes.

    Source: Ioffe 2017, "Batch Renormalization", arXiv 1702.03275, Algorithm 1.
    """

    buffer: ClassVar[str] = "renorm_batches"
    persistent: ClassVar[bool] = True

    r_max: float = 3.0
    d_max: float = 5.0
    schedule: Warmup | None = field(default_factory=Warmup)
    over: Policy = field(default=Batch())

    def __post_init__(self) -> None:
        if not self.r_max >= 1:
            raise ValueError(f"r_max must be at least 1, where r is always 1, got {self.r_max}")
        if not self.d_max >= 0:
            raise ValueError(f"d_max must be at least 0, where d is always 0, got {self.d_max}")
        if self.schedule is not None and math.inf in (self.r_max, self.d_max):
            raise ValueError(f"a warm-up never reaches r_max={self.r_max}, d_max={self.d_max}: use schedule=None")
        if not isinstance(self.over, (Batch, Sync)):
            raise ValueError(
                f"Renorm cannot be over {self.over}: it corrects what small sets do to a batch's moments, and that is "
                "what the others bring about or rely on. Use Renorm() or Renorm(over=Sync())"
            )

    def resolved(self) -> Resolved:
        return Resolved(self, renorm=self, sync=self.over.resolved().sync)

    def state(self, channels: int, device: torch.device | None = None) -> Tensor:
        """Make the count of batches."""
        return torch.zeros((), dtype=torch.int64, device=device)

    def limits(self, batches: Number) -> tuple[Number, Number]:
        """(r_max, d_max) after so many batches: numbers for a number, tensors for a tensor."""
        if self.schedule is None:
            return self.r_max + 0 * batches, self.d_max + 0 * batches
        plain, r_until, d_until = self.schedule.plain, self.schedule.r_until, self.schedule.d_until
        r, d = _ramp(batches, plain, r_until), _ramp(batches, plain, d_until)
        return 1 + (self.r_max - 1) * r, self.d_max * d


@dataclass(frozen=True)
class Accumulated(Policy):
    """The batch; but running statistics move only once every ``steps`` batches, by the moments of all of them.

    For gradients accumulated over micro-batches: running statistics then are those of training on the whole batch,
    and so is their count. Each micro-batch is still normalized by its own moments. What has been gathered so far is
    in the layer's buffer ``accumulated``, which is not in the state_dict: save between whole batches.

    Args:
        steps: micro-batches in a batch.
        over: ``Batch()``, ``Ghost(size)`` or ``Sync()``: the sets that normalize.
    """

    buffer: ClassVar[str] = "accumulated"

    steps: int
    over: Policy = field(default=Batch())

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"Accumulated's steps counts micro-batches and must be an int, got {self.steps!r}")
        if self.steps < 1:
            raise ValueError(f"Accumulated's steps counts micro-batches and must be at least 1, got {self.steps}")
        if not isinstance(self.over, (Batch, Ghost, Sync)):
            raise ValueError(
                f"Accumulated cannot be over {self.over}: Renorm corrects each batch by running statistics that follow "
                "closely, and here they wait. Use one of the two"
            )

    def resolved(self) -> Resolved:
        return self.over.resolved()._replace(policy=self, accumulated=self)

    def state(self, channels: int, device: torch.device | None = None) -> Tensor:
        """Make (micro-batches, values a channel, C means, C summed squared deviations), all 0."""
        return torch.zeros(2 + 2 * channels, dtype=torch.float64, device=device)


def bind(policy: Policy, name: str | None = None) -> Policy:
    """Give a layer a policy of its own where it talks to other processes: a name to complain under, a first meeting."""
    return _with_sync(policy, lambda sync: replace(sync, name=sync.name or name, agreed=[]))


def alone(policy: Policy) -> Policy:
    """Give the policy without what needs other processes."""
    return _with_sync(policy, lambda sync: Batch())


def over_group(policy: Policy, process_group: Any) -> Policy:
    """Give the policy with that process group, where it takes moments over processes and names no group."""
    return _with_sync(policy, lambda s: s if s.process_group is not None else replace(s, process_group=process_group))


def _with_sync(policy: Policy, change: Callable[[Sync], Policy]) -> Policy:
    """Give the policy with its Sync changed, wherever that is in it; the policy itself if it has none."""
    if isinstance(policy, Sync):
        return change(policy)
    over = getattr(policy, "over", None)
    changed = over if over is None else _with_sync(over, change)
    return policy if changed is over else replace(policy, over=changed)  # type: ignore[call-arg]


def check_policy(policy: Policy | None) -> None:
    """Raise TypeError for what is neither a policy nor None."""
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"statistics must be a policy, such as Ghost(16) or Sync(), got {policy!r}")


def _ramp(batches: Number, start: int, end: int) -> Number:
    """0 until `start`, 1 from `end` on, linear between."""
    share = (batches - start) / max(end - start, 1)
    if isinstance(share, Tensor):
        return share.clamp(0, 1)
    return min(max(share, 0.0), 1.0)
