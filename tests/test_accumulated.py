"""Accumulated: after all micro-batches the statistics are those of one plain call on the whole batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import Accumulated, Ghost, Renorm, kernels
from batchnorm.functional import batch_norm
from expected import laid, step

SHAPE = (11, 9, 6, 7)
MICRO = (4, 4, 3)  # samples


def made(steps: int = 3, **options: Any) -> Any:
    return batchnorm.BatchNorm2d(9, statistics=Accumulated(steps), **options)


def whole(batches: list[Tensor], **options: Any) -> Any:
    """A plain layer in float64 that has seen those batches."""
    layer = batchnorm.BatchNorm2d(9, dtype=torch.float64, **options)
    for x in batches:
        layer(x.double())
    return layer


def assert_same_statistics(layer: Any, right: Any, tolerance: float = 1e-6) -> None:
    assert layer.num_batches_tracked == right.num_batches_tracked
    for name in ("running_mean", "running_var"):
        ours, plain = getattr(layer, name).double(), getattr(right, name)
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", ["numba", "reference"])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_the_whole_batchs_statistics(momentum: float | None, kernel: Any) -> None:
    layer, seen = made(momentum=momentum, dtype=torch.float64), []
    for seed in range(3):
        batch = laid(SHAPE, seed, torch.float64)
        for i, x in enumerate(batch.split(MICRO)):
            assert_same_statistics(layer, whole(seen, momentum=momentum), 1e-13)  # they wait for the last one
            assert layer.accumulated[0] == i
            with kernels.using(kernel):
                layer(x)
            assert kernels.ran().forward == kernel
        seen.append(batch)
        assert_same_statistics(layer, whole(seen, momentum=momentum), 1e-13)
        assert not layer.accumulated.any()


def test_each_micro_batch_is_normalized_by_its_own_moments() -> None:
    layer, plain = made(), batchnorm.BatchNorm2d(9)
    x, grad = (laid(SHAPE, seed, torch.float32) for seed in range(2))
    for ours, theirs in zip(step(layer, x, grad)[:4], step(plain, x, grad)[:4], strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert kernels.ran() == ("numba", "numba")
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_over_ghosts(kernel: Any) -> None:
    layer, ghosts = made(), batchnorm.BatchNorm2d(9, statistics=Ghost(2))
    layer.statistics = Accumulated(3, over=Ghost(2))
    batch = laid(SHAPE, 0, torch.float32)
    for x in batch.split(MICRO):
        with kernels.using(kernel):
            assert torch.equal(layer(x), ghosts(x)) or kernel == "reference"
    assert_same_statistics(layer, whole([batch]))


def test_a_mean_far_from_0_costs_no_digits() -> None:
    layer = made(momentum=1.0, dtype=torch.float64)
    batch = laid(SHAPE, 0, torch.float64) + 1e6
    for x in batch.split(MICRO):
        layer(x)
    assert_same_statistics(layer, whole([batch], momentum=1.0), 1e-9)


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_a_bad_micro_batch_is_left_out(kernel: Any) -> None:
    layer, batch = made(), laid(SHAPE, 0, torch.float32)
    for i, x in enumerate(batch.split(MICRO)):
        bad = x.clone()
        bad[1, 2, 0, 0] = float("nan") if i == 1 else bad[1, 2, 0, 0]
        with kernels.using(kernel):
            layer(bad)
    assert_same_statistics(layer, whole([torch.cat((batch[:4], batch[8:]))]))


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_a_bad_part_of_a_micro_batch_is_left_out(kernel: Any) -> None:
    layer, batch = made(), laid(SHAPE, 0, torch.float32)
    layer.statistics = Accumulated(3, over=Ghost(2))
    for i, x in enumerate(batch.split(MICRO)):
        bad = x.clone()
        bad[1, 2, 0, 0] = float("inf") if i == 1 else bad[1, 2, 0, 0]
        with kernels.using(kernel):
            layer(bad)
    assert_same_statistics(layer, whole([torch.cat((batch[:4], batch[6:]))]))


def test_nothing_but_bad_micro_batches() -> None:
    layer = made(2)
    for _ in range(2):
        layer(torch.full((2, 9, 3, 3), float("nan")))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(9))
    assert not layer.accumulated.any()


def test_one_step_is_a_plain_layer() -> None:
    layer, batches = made(1), [laid(SHAPE, seed, torch.float32) for seed in range(3)]
    for x in batches:
        layer(x)
    assert_same_statistics(layer, whole(batches))


def test_a_recomputed_micro_batch_counts_once() -> None:
    layer = made(2)
    x = laid(SHAPE, 0, torch.float32).clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.accumulated[0] == 1
    assert layer.num_batches_tracked == 0


def test_masks_too() -> None:
    """Positions that do not count are in no micro-batch's moments; one may have none that counts."""
    layer, batch = made(3), laid(SHAPE, 0, torch.float32)
    mask = torch.rand(11, 6, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[4:8] = False
    for x, valid in zip(batch.split(MICRO), mask.split(MICRO), strict=True):
        layer(x, mask=valid)
    values = batch.movedim(1, -1)[mask].double()
    right = batchnorm.BatchNorm1d(9, dtype=torch.float64)
    right(values)
    assert_same_statistics(layer, right)


def test_what_is_gathered_is_not_in_the_state_dict() -> None:
    layer = made()
    layer(laid(SHAPE, 0, torch.float32))
    assert list(layer.state_dict()) == list(batchnorm.BatchNorm2d(9).state_dict())
    gathered = layer.accumulated.clone()
    layer.load_state_dict(batchnorm.BatchNorm2d(9).state_dict())
    assert torch.equal(layer.accumulated, gathered)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).accumulated, gathered)
    assert torch.equal(copy.deepcopy(layer).accumulated, gathered)
    layer.reset_running_stats()
    assert not layer.accumulated.any()


@pytest.mark.parametrize("convert", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.float(), lambda m: m.double()
], ids=["half", "bfloat16", "to", "float", "double"])  # fmt: skip
def test_conversions_do_not_round_what_is_gathered(convert: Any) -> None:
    layer = made()
    layer(laid(SHAPE, 0, torch.float32))
    gathered = layer.accumulated.clone()
    convert(layer)
    assert layer.accumulated.dtype == torch.float64
    assert torch.equal(layer.accumulated, gathered)
    layer(laid(SHAPE, 0, layer.weight.dtype))


def test_meta_and_to_empty() -> None:
    layer = made(device="meta", dtype=torch.bfloat16)
    assert layer.accumulated.is_meta
    assert layer.accumulated.dtype == torch.float64
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer(laid(SHAPE, 0, torch.bfloat16))
    assert layer.accumulated[0] == 1
    assert layer.to("meta").accumulated.is_meta


def test_without_running_statistics() -> None:
    layer, plain = made(2, track_running_stats=False), batchnorm.BatchNorm2d(9, track_running_stats=False)
    for seed in range(3):
        x = laid(SHAPE, seed, torch.float32)
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("steps", [True, 2.0, None])
def test_steps_that_are_no_number(steps: Any) -> None:
    with pytest.raises(TypeError, match="must be an int, got"):
        Accumulated(steps)


@pytest.mark.parametrize(("arguments", "words"), [
    ((0,), "at least 1, got 0"), ((2, Renorm()), "Accumulated cannot be over Renorm"),
    ((2, Accumulated(2)), "Accumulated cannot be over Accumulated"),
])  # fmt: skip
def test_policies_that_cannot_be(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Accumulated(*arguments)


@pytest.mark.parametrize("state", [torch.zeros(8), torch.zeros(7, dtype=torch.float64), None], ids=str)
def test_a_wrong_state(state: Tensor | None) -> None:
    mean, var, batches = torch.zeros(3), torch.ones(3), torch.tensor(0)
    error = ValueError if state is None else RuntimeError
    with pytest.raises(error, match=r"statistics.state\(3\)" if state is None else r"size \(8,\) and torch.float64"):
        batch_norm(
            torch.randn(5, 3), mean, var, training=True, num_batches_tracked=batches, statistics=Accumulated(2),
            state=state,
        )  # fmt: skip
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(var, torch.ones(3))
    assert batches == 0
