"""Opacus trains with differential privacy, which batch normalization cannot have: what notices, and what does not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import batchnorm

opacus = pytest.importorskip("opacus", reason="opacus is in the group 'opacus'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator


def network(**options: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def test_the_validator_knows_torchs_classes_alone() -> None:
    model = network()
    assert not ModuleValidator.is_valid(model)
    batchnorm.convert(model)
    assert ModuleValidator.is_valid(model)  # which says nothing
    batchnorm.revert(model)
    assert not ModuleValidator.is_valid(model)
    assert isinstance(ModuleValidator.fix(model)[1], nn.GroupNorm)


def test_what_makes_a_model_private_refuses_running_statistics() -> None:
    model = network()
    fused = batchnorm.fuse(model).model
    batchnorm.convert(model)
    for ours in (model, fused):
        with pytest.raises(NotImplementedError, match=r"layer with buffers.*BatchNorm2d"):
            GradSampleModule(ours)


def test_limit_without_running_statistics_nothing_refuses() -> None:
    model = network(track_running_stats=False)
    assert not ModuleValidator.is_valid(model)
    batchnorm.convert(model)
    GradSampleModule(model)
    assert ModuleValidator.is_valid(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Full backward hook is firing:UserWarning")
def test_group_normalization_in_its_place_trains_with_gradients_of_samples() -> None:
    model = network()
    batchnorm.convert(model)
    batchnorm.replace(model, "group")
    private = GradSampleModule(model)
    private(torch.randn(5, 3, 6, 6)).sum().backward()
    assert all(p.grad_sample.shape == (5, *p.shape) for p in private.parameters())
    assert ModuleValidator.is_valid(model)
