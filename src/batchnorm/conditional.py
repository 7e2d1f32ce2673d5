"""Conditional batch normalization: every sample has the scale and the shift that its class, or a vector, asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.activations import activation_of
from batchnorm.any_rank import BatchNormAnyRank, recorded
from batchnorm.arguments import check_residual
from batchnorm.estimation import positions
from batchnorm.kernels.epilogue import Epilogue

__all__ = ["ConditionalBatchNorm"]


class ConditionalBatchNorm(nn.Module):
    """Batch normalization of ``(N, C, *space)``, 2 to 5 dimensions, then a scale and a shift for every sample.

    The moments are the whole batch's, or the running ones, as always. The layer starts as plain batch normalization.

    Args:
        num_features: C.
        classes: how many classes there are: each has a weight and a bias, in two ``nn.Embedding`` that start with 1
            and 0.
        condition_features: D, the length of a vector per sample: its linear maps (without a bias, and starting with 0)
            are added to a learned weight and bias, ``weight + delta_weight(c)`` and ``bias + delta_bias(c)``. De Vries
            et al. use a small network there: let one end in the vector.
        activation: what follows; see ``batchnorm.BatchNorm1d``.
        device, dtype: of the parameters.
        options: what ``batchnorm.BatchNorm1d`` takes about moments: eps, momentum, track_running_stats.

    With neither ``classes`` nor ``condition_features``, weight and bias are given in each call.

    Raises:
        ValueError: both kinds of condition, or a number that is not positive; in calls: nothing that says weight and
            bias, or two things that do.
        RuntimeError: in calls: a condition, weight or bias of another size or kind.
        IndexError: in calls: a class that does not exist. Nothing has moved after any of these.

    Example:
        >>> layer = ConditionalBatchNorm(16, classes=10)
        >>> y = layer(torch.randn(8, 16, 14, 14), torch.randint(10, (8,)))

    Source: de Vries et al. 2017, "Modulating early visual processing by language", arXiv 1707.00683; with classes,
    Dumoulin, Shlens, Kudlur 2017, "A learned representation for artistic style", arXiv 1610.07629.
    """

    def __init__(
        self,
        num_features: int,
        *,
        classes: int | None = None,
        condition_features: int | None = None,
        activation: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        if classes is not None and condition_features is not None:
            raise ValueError(
                f"a condition is a class or a vector, but got classes={classes} and "
                f"condition_features={condition_features}: embed the class in the vector"
            )
        for name, count in (("classes", classes), ("condition_features", condition_features)):
            if count is not None and count <= 0:
                raise ValueError(f"{name} must be at least 1, got {count}")
        super().__init__()
        of: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_features, self.classes, self.condition_features = num_features, classes, condition_features
        self.activation = activation_of(activation)
        self.norm = BatchNormAnyRank(num_features, affine=False, **of, **options)
        if classes is not None:
            self.class_weight = nn.Embedding(classes, num_features, **of)
            self.class_bias = nn.Embedding(classes, num_features, **of)
        elif condition_features is not None:
            self.weight = nn.Parameter(torch.empty(num_features, **of))
            self.bias = nn.Parameter(torch.empty(num_features, **of))
            self.delta_weight = nn.Linear(condition_features, num_features, bias=False, **of)
            self.delta_bias = nn.Linear(condition_features, num_features, bias=False, **of)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it plain batch normalization that has seen nothing: weights 1, biases 0, whatever the condition."""
        self.norm.reset_parameters()
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1.0 if name in ("weight", "class_weight.weight") else 0.0)

    def forward(
        self,
        input: Tensor,
        condition: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Normalize, scale and shift each sample, add the residual, apply the activation.

        Args:
            input: ``(N, C, *space)``.
            condition: ``(N,)`` of whole numbers below ``classes``, or ``(N, D)``.
            residual: of the input's shape and dtype.
            mask: the positions that count, ``(N, *space)``; see ``batchnorm.BatchNorm1d``.
            weight, bias: instead of a condition, ``(N, C)`` or ``(C,)``; one of them may be left out.

        Returns:
            The input's shape and dtype.
        """
        if isinstance(input, Proxy):
            given = {"condition": condition, "residual": residual, "mask": mask, "weight": weight, "bias": bias}
            return recorded(self, input, **given)
        self.norm._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise RuntimeError(
                f"expected {self.num_features} channels, got input size {tuple(input.shape)}: "
                "dimension 1 counts the channels"
            )
        if residual is not None:
            check_residual(residual, input)
        weight, bias = self._affine(input, condition, weight, bias)
        y = _scaled(self.norm(input, mask=mask), weight, bias).to(input.dtype)
        return Epilogue(self.activation, residual).applied(y, None if mask is None else positions(mask, input))

    def extra_repr(self) -> str:
        """Say what the condition is."""
        given = {"classes": self.classes, "condition_features": self.condition_features}
        said = [str(self.num_features), *(f"{name}={count}" for name, count in given.items() if count is not None)]
        return ", ".join(said + ([] if self.activation is None else [f"activation={self.activation.name}"]))

    def _affine(
        self, input: Tensor, condition: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        given = weight is not None or bias is not None
        if given == (condition is not None):
            what = "two things say what weight and bias are" if given else "nothing says what weight and bias are"
            raise ValueError(f"{what}: give {self._wanted()}, or weight= and bias=")
        if condition is None:
            sizes = ((len(input), self.num_features), (self.num_features,))
            for name, t in (("weight", weight), ("bias", bias)):
                if t is not None and tuple(t.shape) not in sizes:
                    raise RuntimeError(
                        f"{name} should have size {sizes[0]} or {sizes[1]} for an input of size {tuple(input.shape)}, "
                        f"got {tuple(t.shape)}"
                    )
            return weight, bias
        if self.classes is not None:
            return self._of_class(input, condition)
        if self.condition_features is None:
            raise ValueError("the layer has no classes= and no condition_features=: give weight= and bias=")
        if condition.shape != (len(input), self.condition_features) or not condition.is_floating_point():
            raise RuntimeError(_misfit(condition, input, self._wanted()))
        return self.weight + self.delta_weight(condition), self.bias + self.delta_bias(condition)

    def _of_class(self, input: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        if condition.shape != (len(input),) or condition.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(_misfit(condition, input, self._wanted()))
        try:
            return self.class_weight(condition), self.class_bias(condition)
        except IndexError as error:  # on CPUs; a GPU says so later
            lowest, highest = condition.min().item(), condition.max().item()
            raise IndexError(
                f"index out of range: classes {lowest} to {highest} were asked for, and the layer has 0 to "
                f"{self.classes - 1}"  # type: ignore[operator]
            ) from error

    def _wanted(self) -> str:
        if self.classes is not None:
            return "a condition of size (N,), int64, with each sample's class"
        if self.condition_features is not None:
            return f"a condition of size (N, {self.condition_features}), floating"
        return "no condition, which this layer has no parameters for"


def _misfit(condition: Tensor, input: Tensor, wanted: str) -> str:
    return (
        f"expected {wanted}, got size {tuple(condition.shape)} and {condition.dtype} "
        f"with an input of size {tuple(input.shape)}"
    )


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    # torch (2.13) makes no view of a dual tensor whose primal alone has the negative bit.
    weight, bias = (None if t is None else t.resolve_neg()[(..., *(None,) * (y.dim() - 2))] for t in (weight, bias))
    if weight is None:
        return y if bias is None else y + bias
    return y * weight if bias is None else torch.addcmul(bias, y, weight)
