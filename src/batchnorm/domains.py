"""Domain-specific batch normalization: one network, and for each domain of its data its own statistics."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.any_rank import BatchNormAnyRank, recorded
from batchnorm.arguments import check_mask
from batchnorm.layers import widen_statistics

__all__ = ["DomainBatchNorm", "domain"]

_PREFIX = "domain_"  # so that a domain may be called "train" or "half", as methods of a module are


class _Current(threading.local):
    """A thread's own rather than a context variable, which torch.compile cannot read."""

    domain: Any = None


_current = _Current()


@contextmanager
def domain(name: str | int | Sequence[str | int] | Tensor) -> Iterator[None]:
    """Say which domain the data is from, to every ``DomainBatchNorm`` that is called inside and not told otherwise.

    It holds for this thread. ``torch.compile`` compiles once for each domain. Activation checkpointing runs a forward
    again during the backward, which then must be inside, too.

    Args:
        name: one domain, or one for each sample; see ``DomainBatchNorm``.

    Example:
        >>> with batchnorm.domain("target"):
        ...     y = model(x)
    """
    before, _current.domain = _current.domain, name
    try:
        yield
    finally:
        _current.domain = before


class DomainBatchNorm(nn.Module):
    """Batch normalization of ``(N, C, *space)``, 2 to 5 dimensions, by the statistics of the domain that x is from.

    Each domain has a layer of its own, ``layer.of("source")``, under that name in the ``state_dict``
    (``domain_source.running_mean``). A domain that is not called is not touched: its parameters get no gradient, so
    ``DistributedDataParallel`` needs ``find_unused_parameters=True`` unless ``shared_affine`` is set.

    Args:
        num_features: C.
        domains: their names, different strings without a dot; a whole number stands for its digits.
        shared_affine: one weight and one bias for all domains, rather than one of each per domain.
        options: what ``batchnorm.BatchNorm1d`` takes: eps, momentum, affine, activation, dtype …

    Raises:
        ValueError: no domains, equal or unusable names, and in calls: a domain that is not known, or a number of
            domains that is not N. Nothing has moved then.
        RuntimeError: a call that does not say which domain.

    Example:
        >>> layer = DomainBatchNorm(16, domains=("source", "target"))
        >>> y = layer(torch.randn(8, 16, 14, 14), domain="target")

    Source: Chang, You, Seo, Kwak, Han 2019, "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation",
    arXiv 1906.03950; ``shared_affine`` is not in the paper.
    """

    def __init__(
        self, num_features: int, domains: Iterable[str | int], *, shared_affine: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self._start(BatchNormAnyRank(num_features, **options), domains, shared_affine)

    @classmethod
    def from_layer(
        cls, layer: nn.Module, domains: Iterable[str | int], *, shared_affine: bool = False
    ) -> DomainBatchNorm:
        """Let every domain start from one trained layer, of ``torch.nn`` or of ours.

        The first domain takes the layer's own parameters and buffers, the others get copies. Hooks stay behind.

        Raises:
            TypeError: another kind of layer, such as ``SyncBatchNorm``, whose statistics are over all processes.

        Example:
            >>> model.bn1 = DomainBatchNorm.from_layer(model.bn1, ("source", "target"))
        """
        if not isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAnyRank)):
            raise TypeError(f"domains can start from BatchNorm1d, 2d or 3d, not from {type(layer).__name__}")
        first = BatchNormAnyRank.__new__(BatchNormAnyRank)
        nn.Module.__init__(first)
        first.__dict__.update({key: value for key, value in vars(layer).items() if "hook" not in key})
        first._parameters, first._buffers = dict(layer._parameters), dict(layer._buffers)
        widen_statistics(first)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._start(first, domains, shared_affine)
        made.training = layer.training
        return made

    def _start(self, first: nn.Module, domains: Iterable[str | int], shared_affine: bool) -> None:
        names = [_checked(name) for name in domains]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"domains must be different names, at least one, but got {names}")
        self.shared_affine = shared_affine
        self.add_module(_PREFIX + names[0], first)
        self.register_load_state_dict_post_hook(_tie_again)
        for name in names[1:]:
            self.add_domain(name, like=names[0])

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains, in the order in which they came."""
        return tuple(name.removeprefix(_PREFIX) for name in self._modules)

    def of(self, name: str | int) -> Any:
        """Give the layer of one domain."""
        layer = self._modules.get(f"{_PREFIX}{name}")
        if layer is None:
            raise ValueError(f"unknown domain {name!r}: {self._known()}, or make it with add_domain({name!r}, like=…)")
        return layer

    def add_domain(self, name: str | int, like: str | int) -> None:
        """Make a domain that starts with a copy of another one's statistics, weight and bias.

        An optimizer must be told of the new parameters, unless they are shared.
        """
        layer = self.of(like)
        key = _PREFIX + _checked(name)
        if key in self._modules:
            raise ValueError(f"the domain {name!r} is there already: {self._known()}")
        self.add_module(key, copy.deepcopy(layer))
        self._tie()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        domain: str | int | Sequence[str | int] | Tensor | None = None,
    ) -> Tensor:
        """Normalize as the domain's own layer does.

        Args:
            input: ``(N, C, *space)``.
            residual: added before the activation; of the input's shape.
            mask: the positions that count, ``(N, *space)``; see ``batchnorm.BatchNorm1d``.
            domain: a name; or N of them, as a list or as a tensor of whole numbers, for samples of different domains:
                those of each domain are normalized by themselves. None for the one that ``with batchnorm.domain(…)``
                names.
        """
        chosen = _current.domain if domain is None else domain
        if isinstance(input, Proxy):
            return recorded(self, input, residual=residual, mask=mask, domain=chosen)
        if chosen is None:
            raise RuntimeError(
                f"which domain? Call layer(x, domain=…), or the model inside `with batchnorm.domain(…):` "
                f"(activation checkpointing: the backward, too); {self._known()}"
            )
        if isinstance(chosen, (str, int)):
            return _called(self.of(chosen), input, residual, mask)
        return self._mixed(input, residual, mask, chosen)

    def _mixed(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, chosen: Sequence[str | int] | Tensor
    ) -> Tensor:
        names = chosen.tolist() if isinstance(chosen, Tensor) else list(chosen)
        if not isinstance(names, list) or len(names) != len(input):
            raise ValueError(
                f"{len(names) if isinstance(names, list) else 'a scalar tensor instead of'} domains for the "
                f"{len(input)} samples of an input of size {tuple(input.shape)}: give one for each, or one name for all"
            )
        samples: dict[str, list[int]] = {}
        for sample, name in enumerate(names):
            samples.setdefault(str(name), []).append(sample)
        for name, rows in samples.items():  # before anything moves
            if self.of(name).training and len(rows) == 1 and input[0].numel() == input.shape[1]:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got 1 sample of domain {name!r} in an "
                    f"input of size {tuple(input.shape)}: give each domain of a batch more samples, or eval()"
                )
        if mask is not None:
            check_mask(mask, input)
            mask = mask.expand(*input.shape[:1], *input.shape[2:])
        y = torch.empty_like(input)
        for name, rows in samples.items():
            index = torch.tensor(rows, device=input.device)
            own = (None if t is None else t[index] for t in (residual, mask))
            y.index_copy_(0, index, _called(self.of(name), input[index], *own))
        return y

    def extra_repr(self) -> str:
        """Say what the domains share."""
        return "shared_affine=True" if self.shared_affine else ""

    def _known(self) -> str:
        return f"the domains are {', '.join(map(repr, self.domains))}"

    def _tie(self) -> None:
        """Let every domain have the first one's weight and bias, where they are shared."""
        if self.shared_affine:
            first, *others = self._modules.values()
            for other in others:
                other._parameters.update(first._parameters)  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert everything as asked; what was shared stays so, even where torch makes new parameters."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        start = prefix + _PREFIX
        stored = list(dict.fromkeys(k[len(start) :].split(".")[0] for k in state_dict if k.startswith(start)))
        where = f"{prefix.removesuffix('.') or 'DomainBatchNorm'}: "
        plain = any(prefix + name in state_dict for name in ("weight", "bias", "running_mean"))
        if strict and not stored and plain:
            errors.append(where + "the checkpoint has no domains: load it first, then split_domains(model, …).")
        elif strict and set(stored) != set(self.domains):
            remedy = "add_domain first" if set(stored) > set(self.domains) else "load it before other domains are made"
            errors.append(where + f"the checkpoint has the domains {stored}, but here {self._known()}: {remedy}.")
        if self.shared_affine:
            for name in ("weight", "bias"):
                values = [state_dict[k] for d in stored if (k := f"{start}{d}.{name}") in state_dict]
                if any(not torch.equal(value, values[0]) for value in values):
                    errors.append(where + f"each domain of the checkpoint has its own {name}: use shared_affine=False.")


def _tie_again(layer: Any, incompatible: Any) -> None:
    layer._tie()  # load_state_dict(assign=True) made parameters of its own for each domain


def _called(layer: Any, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    # Something else may have taken a domain's layer's place, such as torch's SyncBatchNorm, which takes one argument.
    given = {"residual": residual, "mask": mask}
    y: Tensor = layer(x, **{name: t for name, t in given.items() if t is not None})
    return y


def _checked(name: str | int) -> str:
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "" or "." in str(name):
        raise ValueError(f"a domain's name must be a string without a dot, or a whole number, but got {name!r}")
    return str(name)
