"""Learn weight and bias of batch normalization from the entropy of predictions, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.surgery.adaptation.predictions import entropy, scores
from batchnorm.surgery.inspect.batches import Forward, call, moved
from batchnorm.surgery.inspect.preserve import preserved
from batchnorm.surgery.measuring.recorder import normalize_with_the_batch

__all__ = ["affine_of", "learn"]


def affine_of(layer: Any) -> dict[str, nn.Parameter]:
    """Find a layer's own weight and bias, those that it has."""
    own = dict(layer.named_parameters(recurse=False))
    return {name: own[name] for name in ("weight", "bias") if name in own}


def learn(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[nn.Module],
    steps: int,
    lr: float,
    forward: Forward | None,
) -> None:
    """Minimise the mean entropy of the predictions over the layers' weights and biases, batch after batch, with Adam.

    The layers normalize with their batch, everything else is in evaluation. Of a model in evaluation nothing else
    changes, nor do weights and biases come back.

    Raises:
        ValueError: an entropy that is not finite, or that depends on none of the parameters.
        TypeError: a model that returns no class scores.

    Source: Wang et al. 2021, "Tent: Fully Test-Time Adaptation by Entropy Minimization", arXiv 2006.10726.
    """
    learned = list({p: None for layer in layers for p in affine_of(layer).values()})
    optimizer = torch.optim.Adam(learned, lr=lr)
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_()
        for layer in layers:
            normalize_with_the_batch(layer)
        for number, batch in enumerate(batches, 1):
            batch = moved(batch, model)
            for step in range(1, steps + 1):
                loss = entropy(_scores(call(model, batch, forward)))
                _descend(optimizer, learned, loss, f"step {step} of batch {number}")


def _descend(optimizer: torch.optim.Optimizer, learned: Sequence[Tensor], loss: Tensor, where: str) -> None:
    if not torch.isfinite(loss):
        raise ValueError(
            f"the entropy is {loss.item()} at {where}, and nothing can be learned from it: look for nan or infinity in "
            "the data, or use a smaller lr; the model is as it was"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the model's output depends on no weight or bias of batch normalization, as if it were computed under "
            "no_grad, and tent learns nothing else"
        )
    gradients = torch.autograd.grad(loss, learned, allow_unused=True)  # of a domain that was not called: none
    for parameter, gradient in zip(learned, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _scores(output: Any) -> Tensor:
    found = scores(output)
    if found is None:
        size = f" of size {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise TypeError(
            "tent needs class scores, (N, classes), as a tensor or as the attribute logits of what the model returns, "
            f"and got {type(output).__name__}{size}: give forward=lambda model, batch: …, which returns them"
        )
    return found
