"""Find what is wrong with a model's batch normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchnorm.diagnosis.evidence import Evidence, of_model, of_state
from batchnorm.diagnosis.gap import measured
from batchnorm.diagnosis.report import Diagnosis, judged, missing
from batchnorm.diagnosis.rules import RULES
from batchnorm.surgery.inspect.batches import Forward

__all__ = ["diagnose", "judge"]


def diagnose(
    model: nn.Module | Mapping[str, Any],
    data: Iterable[Any] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    *,
    forward: Forward | None = None,
    batches: int | None = None,
    name: str | None = None,
) -> Diagnosis:
    """Look for what is wrong with the batch normalization of a model; it is bit-identical afterwards.

    Args:
        model: a model, of which settings, modes and running statistics are looked at; or the weights of one by name, of
            which the running statistics are.
        data: batches as for ``batchnorm.recalibrate``, which can be run through twice. With them, training and
            evaluation are compared.
        metric: called with the model, in evaluation by running, by batch and by recalibrated statistics.
        forward: how to call the model instead, ``forward(model, batch)``.
        batches: take no more than so many.
        name: what the report calls it. Default: the model's class.

    Returns:
        What was found, and which rules would need more to look at. It prints nothing by itself.

    Raises:
        TypeError: for another model; for data or a metric of weights by name, which cannot be run.
        ValueError: for data without a batch that could be used, or that ends after one pass.

    Example:
        >>> print(batchnorm.diagnose(torch.load("resnet18.pt", weights_only=True)))
        state_dict   20 batch-norm layers   1 error …
    """
    if isinstance(model, nn.Module):
        evidence = of_model(model)
        if data is None and metric is not None:
            raise TypeError("metric needs data, of which the statistics for comparison are taken")
        if data is not None and evidence.layers:
            gap = measured(model, data, metric, forward, batches)
            evidence = replace(evidence, gap=gap, sources=evidence.sources | {"data"})
    elif not isinstance(model, Mapping):
        raise TypeError(f"model must be a torch.nn.Module or a state_dict, got {type(model).__name__}")
    elif data is not None or metric is not None:
        raise TypeError("data and metric need a model that can be run, not its state_dict")
    else:
        evidence = of_state("state_dict", model)
    return judge(evidence, name)


@torch.no_grad()
def judge(evidence: Evidence, name: str | None = None) -> Diagnosis:
    """Let all rules look at evidence."""
    findings = [finding for rule in RULES.values() for finding in rule.findings(evidence)]
    not_run = missing(evidence.sources) if evidence.layers else {}
    return Diagnosis(name or evidence.name, tuple(layer.path for layer in evidence.layers), judged(findings), not_run)
