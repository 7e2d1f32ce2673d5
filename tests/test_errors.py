"""Wrong input: torch's type of error and first words, the sizes and the remedy, and nothing changed before it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.functional import batch_norm
from waiting import HANGS_AFTER

Bits = dict[str, bytes]


def bits(layer: nn.Module) -> Bits:
    return {
        name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in layer.state_dict().items()
    }


def raised(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


class Wrong(NamedTuple):
    """What is built and fed; `words`: what torch's message and ours begin with; `says`: what ours must name."""

    kind: str
    options: dict[str, Any]
    x: Callable[[], Tensor]
    words: str
    says: tuple[str, ...] = ()
    training: bool = True
    prepare: Callable[[nn.Module], Any] = lambda layer: None


def drop_statistics(layer: Any) -> None:
    layer.running_mean = None


MIXED = "mixed dtype"
WRONG = {
    "3-D into 2d": Wrong("BatchNorm2d", {}, lambda: torch.randn(2, 3, 5), "expected 4D input (got 3D input)"),
    "1-D into 1d": Wrong("BatchNorm1d", {}, lambda: torch.randn(3), "expected 2D or 3D input (got 1D input)"),
    "4-D into 1d": Wrong("BatchNorm1d", {}, lambda: torch.randn(2, 3, 5, 5), "expected 2D or 3D input (got 4D input)"),
    "4-D into 3d": Wrong("BatchNorm3d", {}, lambda: torch.randn(2, 3, 5, 5), "expected 5D input (got 4D input)"),
    "6-D into 3d": Wrong("BatchNorm3d", {}, lambda: torch.randn(2, 3, 2, 2, 2, 2), "expected 5D input (got 6D input)"),
    "one value": Wrong(
        "BatchNorm1d",
        {},
        lambda: torch.randn(1, 3),
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3])",
        ("larger batch", "eval()"),
    ),
    "one value, untracked, evaluated": Wrong(
        "BatchNorm2d",
        {"track_running_stats": False},
        lambda: torch.randn(1, 3, 1, 1),
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1])",
        training=False,
    ),
    "channels": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.randn(2, 4, 5, 5),
        "running_mean should contain 4 elements not 3",
        ("(2, 4, 5, 5)",),
    ),
    "channels, evaluated": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.randn(2, 4, 5, 5),
        "running_mean should contain 4 elements not 3",
        ("(2, 4, 5, 5)",),
        False,
    ),
    "channels, untracked": Wrong(
        "BatchNorm2d",
        {"track_running_stats": False},
        lambda: torch.randn(2, 4, 5, 5),
        "weight should contain 4 elements not 3",
    ),
    "long": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.ones(2, 3, 5, 5).long(),
        "\"batch_norm\" not implemented for 'Long'",
        ("float",),
    ),
    "int": Wrong(
        "BatchNorm2d", {}, lambda: torch.ones(2, 3, 5, 5).int(), "\"batch_norm\" not implemented for 'Int'", ("float",)
    ),
    "bool": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.ones(2, 3, 5, 5).bool(),
        "\"batch_norm\" not implemented for 'Bool'",
        ("float",),
    ),
    "byte, evaluated": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.ones(2, 3, 5, 5).byte(),
        "\"batch_norm\" not implemented for 'Byte'",
        ("float",),
        False,
    ),
    "complex": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.ones(2, 3, 5, 5) * 1j,
        "\"batch_norm\" not implemented for 'ComplexFloat'",
        ("float",),
    ),
    "double beside float": Wrong(
        "BatchNorm2d", {}, lambda: torch.randn(2, 3, 5, 5).double(), MIXED, ("float32", "float64")
    ),
    "float beside double": Wrong(
        "BatchNorm2d", {"dtype": torch.float64}, lambda: torch.randn(2, 3, 5, 5), MIXED, ("float32", "float64")
    ),
    "float beside bfloat16": Wrong(
        "BatchNorm2d", {"dtype": torch.bfloat16}, lambda: torch.randn(2, 3, 5, 5), MIXED, ("float32", "bfloat16")
    ),
    "half beside bfloat16": Wrong(
        "BatchNorm2d", {"dtype": torch.bfloat16}, lambda: torch.randn(2, 3, 5, 5).half(), MIXED, ("float16", "bfloat16")
    ),
    "eps 0": Wrong(
        "BatchNorm2d",
        {"eps": 0},
        lambda: torch.randn(2, 3, 5, 5),
        "batch_norm eps must be positive during training, but got 0",
    ),
    "eps below 0": Wrong(
        "BatchNorm2d",
        {"eps": -1},
        lambda: torch.randn(2, 3, 5, 5),
        "batch_norm eps must be non-negative, but got -1",
        training=False,
    ),
    "no running mean": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.randn(2, 3, 5, 5),
        "running_mean must be defined in evaluation mode",
        (),
        False,
        drop_statistics,
    ),
    "sparse": Wrong(
        "BatchNorm2d", {}, lambda: torch.randn(2, 3, 5, 5).to_sparse(), "Could not run 'aten::native_batch_norm'"
    ),
    "meta": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.empty(2, 3, 5, 5, device="meta"),
        "Tensor on device cpu is not on the expected device",
    ),
    "a matrix of weights": Wrong(
        "BatchNorm2d",
        {},
        lambda: torch.randn(2, 3, 5, 5),
        "",
        (),
        True,
        lambda layer: setattr(layer, "running_mean", torch.zeros(1, 3)),
    ),
    "no tensor": Wrong("BatchNorm2d", {}, lambda: [1.0], "'list' object has no attribute"),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_torchs_says_more_and_changes_nothing(name: str) -> None:
    wrong = WRONG[name]
    errors = []
    for package in (nn, batchnorm):
        layer = getattr(package, wrong.kind)(3, **wrong.options).train(wrong.training)
        wrong.prepare(layer)
        on_the_cpu = not any(t.is_meta for t in layer.state_dict().values())
        before = bits(layer) if on_the_cpu else None
        errors.append(raised(lambda layer=layer: layer(wrong.x())))
        assert layer.num_batches_tracked is None or layer.num_batches_tracked == 0 or package is nn
        if package is batchnorm and on_the_cpu:
            assert bits(layer) == before
    torchs, ours = errors
    assert type(ours) is type(torchs)
    assert str(torchs).startswith(wrong.words)
    assert str(ours).startswith(wrong.words)
    for word in wrong.says:
        assert word in str(ours)


ELSEWHERE = """
import torch, batchnorm
for name in ("weight", "bias", "running_mean", "running_var"):
    words = []
    for package in (torch.nn, batchnorm):
        layer = package.BatchNorm2d(3)
        empty = torch.empty(3, device="meta")
        setattr(layer, name, torch.nn.Parameter(empty) if name in ("weight", "bias") else empty)
        try:
            layer(torch.randn(2, 3, 5, 5))
        except RuntimeError as error:
            words.append(str(error)[:60])
        if package is batchnorm:
            assert layer.num_batches_tracked == 0, name
    assert len(words) == 2 and words[1].startswith(words[0]), (name, words)
print("done")
"""


def test_parameters_and_statistics_on_another_device() -> None:
    """In a process of its own: their addresses mean nothing here, and reading them ends it."""
    ended = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


DEFAULT_DEVICE = """
import torch, batchnorm
x = torch.randn(5, 9, 12, 15, requires_grad=True)
layer = batchnorm.BatchNorm2d(9)
with torch.device("meta"):
    y = layer(x)
y.sum().backward()
layer(x)
assert batchnorm.kernels.ran() == ("numba", "numba")
right = torch.nn.functional.batch_norm(x.detach().double(), None, None, training=True)
assert torch.allclose(y.double(), right, rtol=1e-5, atol=1e-5)
print("done")
"""


def test_memory_of_the_loops_is_on_the_cpu_whatever_the_default_device() -> None:
    """In a process of its own: an address on another device means nothing here."""
    ended = subprocess.run(
        [sys.executable, "-c", DEFAULT_DEVICE], capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_statistics_that_cannot_be_moved_leave_the_counter_alone() -> None:
    layer = batchnorm.BatchNorm2d(3)
    layer.running_var.requires_grad_()  # in-place changes of such a leaf are refused
    before = bits(layer)
    for kernel in ("numba", "aten"):
        try:
            with kernels.using(kernel):  # type: ignore[arg-type]
                layer(torch.randn(2, 3, 5, 5))
        except RuntimeError:
            assert bits(layer) == before
        else:
            assert layer.num_batches_tracked > 0  # served, then wholly


@pytest.mark.parametrize(("channels", "shape"), [(0, (2, 0, 3, 3)), (0, (2, 0))])
def test_no_channels(channels: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        batchnorm.BatchNorm2d(channels)
    with pytest.raises(ValueError, match=r"at least 1 channel, got input size torch.Size\(\[2, 0"):
        batch_norm(torch.randn(shape), torch.zeros(0), torch.ones(0), training=True)
    # Evaluation needs no variance: there, as in torch, nothing is normalized into nothing.
    assert batch_norm(torch.randn(shape), torch.zeros(0), torch.ones(0)).shape == shape


@pytest.mark.parametrize("momentum", [-0.1, 1.5, 2, float("nan")])
def test_momentum_out_of_range(momentum: float) -> None:
    for kind in (batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d):
        with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
            kind(3, momentum=momentum)
    for lazy in (batchnorm.LazyBatchNorm1d, batchnorm.LazyBatchNorm2d, batchnorm.LazyBatchNorm3d):
        with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
            lazy(momentum=momentum)
    layer = batchnorm.BatchNorm1d(3)
    layer.momentum = momentum
    before = bits(layer)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
        layer(torch.randn(5, 3))
    assert bits(layer) == before


def test_the_plain_average_needs_its_counter() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="needs num_batches_tracked"):
        batch_norm(torch.randn(5, 3), mean, var, training=True, momentum=None)
    assert torch.equal(mean, torch.zeros(3))


def test_one_statistic_without_the_other() -> None:
    for given in ((torch.zeros(3), None), (None, torch.ones(3))):
        with pytest.raises(ValueError, match="must either both be None or neither be None"):
            batch_norm(torch.randn(5, 3), *given, training=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 5), (2, 3, 0, 5), (0, 3, 0)], ids=str)
@pytest.mark.parametrize("tracking", [True, False], ids=["tracking", "untracked"])
def test_empty_input_is_as_in_torch(shape: tuple[int, ...], training: bool, tracking: bool) -> None:
    kind = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    results = []
    for package in (nn, batchnorm):
        layer = getattr(package, kind)(3, track_running_stats=tracking).train(training)
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert x.grad is not None
        found = (y.shape, x.grad.shape, layer.weight.grad, layer.bias.grad, bits(layer))
        results.append(found)
    ours, torchs = results[1], results[0]
    assert ours[:2] == torchs[:2]
    assert ours[4] == torchs[4]  # the counter counts it in both
    for mine, theirs in zip(ours[2:4], torchs[2:4], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_one_sample_with_space_and_one_evaluated_are_right() -> None:
    layer = batchnorm.BatchNorm2d(3)
    x = torch.randn(1, 3, 2, 1)
    torch.testing.assert_close(layer(x).mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    assert batchnorm.BatchNorm1d(3).eval()(torch.randn(1, 3)).isfinite().all()


class Own(Tensor):
    """A subclass may give operations another meaning; raw memory does not ask it."""


@pytest.mark.parametrize("x", [
    torch.randn(2, 3).half(), torch.randn(2, 3, 1, 1, 1, 2), torch.randn(0, 3), torch.randn(2, 3, device="meta"),
    torch.randn(2, 3).as_subclass(Own), torch._neg_view(torch.randn(2, 3)),
], ids=["half", "6-D", "empty", "meta", "subclass", "negated"])  # fmt: skip
def test_the_loops_refuse_what_they_cannot_serve_and_others_serve_it(x: Tensor) -> None:
    assert kernels.which(x) == "aten"
    with pytest.raises(RuntimeError, match="kernel 'numba' was asked for, but"), kernels.using("numba"):
        batch_norm(x, None, None, training=True)
    assert batch_norm(x, None, None, training=True).shape == x.shape
    assert kernels.ran().forward == "aten"


def test_an_unknown_kernel() -> None:
    with (
        pytest.raises(ValueError, match="unknown kernel 'gpu': choose from numba, aten, reference"),
        kernels.using("gpu"),
    ):  # type: ignore[arg-type]
        pass
