"""Every kernel, dtype, layout and shape against torch.nn in float64: values, gradients and buffers, several steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from batchnorm import Ghost, kernels
from batchnorm.kernels import plans
from expected import OURS, Result, assert_right, every_other, in_float64, laid, step

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BATCHES = 3
ATEN_SLACK = {torch.float64: 1.0, torch.float32: 20.0, torch.bfloat16: 500.0, torch.float16: 500.0}


class Case(NamedTuple):
    """A shape and layout, and the way through the loops that it takes in every dtype."""

    shape: tuple[int, ...]
    layout: str
    kind: str
    fused: bool

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.layout}"


# No size is a power of two but 1, so that every loop has a tail.
CASES = [
    Case((3, 5, 9, 11), "contiguous", "planes", True),  # few channels, small
    Case((5, 9, 12, 15), "contiguous", "planes", True),
    Case((3, 37, 9, 11), "contiguous", "planes", True),  # groups of two channels and one left
    Case((2, 307, 67), "contiguous", "planes", True),  # groups of sixteen
    Case((2, 9, 50, 51), "contiguous", "planes", True),  # a run that is longer than one float32 sum
    Case((1, 11, 3, 5, 7), "contiguous", "planes", True),  # one sample
    Case((5, 1, 7, 3), "contiguous", "planes", True),  # one channel is one long run
    Case((3, 3, 123, 125), "contiguous", "planes", False),
    Case((2, 3, 150, 151), "contiguous", "planes", False),  # runs in two parts
    Case((5, 1, 163, 165), "contiguous", "planes", False),
    Case((1, 1, 20011, 7), "contiguous", "planes", False),
    Case((7, 5, 7, 7), "contiguous", "planes", True),
    Case((7, 5, 5, 5), "contiguous", "small", True),
    Case((11, 3, 3, 3), "contiguous", "small", True),
    Case((1, 3, 2, 3), "contiguous", "small", True),  # one sample
    Case((9, 23, 5, 5), "contiguous", "small", True),  # more columns than a block holds
    Case((3, 701, 3), "contiguous", "small", True),
    Case((6, 5, 3, 3, 2), "contiguous", "small", True),
    Case((17, 5), "contiguous", "rows", True),
    Case((3, 1), "contiguous", "rows", True),
    Case((35, 701), "contiguous", "rows", True),  # two blocks of columns
    Case((5, 3, 1, 1), "contiguous", "rows", True),
    Case((601, 701), "contiguous", "rows", False),
    Case((3, 5, 9, 11), "channels_last", "rows", True),
    Case((1, 13, 7, 7), "channels_last", "rows", True),
    Case((3, 11, 3, 5, 7), "channels_last", "rows", True),
    Case((5, 9, 70, 71), "channels_last", "rows", False),
    Case((3, 523, 13, 23), "channels_last", "rows", False),
    # Other strides are copied first, [N, L, C] transposed among them, of which torch's output is contiguous.
    Case((5, 9, 67), "channels_last", "planes", True),
    Case((3, 5, 9, 11), "gaps", "planes", True),
    Case((7, 5), "gaps", "rows", True),
    Case((3, 5, 9, 11), "batch_last", "planes", True),
    Case((7, 5, 3), "batch_last", "small", True),
]

# Sizes whose output can be written around the caches: whole vectors, in blocks of whole vectors.
STREAMED = [
    Case((5, 9, 12, 12), "contiguous", "planes", True),
    Case((3, 37, 6, 24), "contiguous", "planes", True),
    Case((3, 3, 120, 126), "contiguous", "planes", False),
    Case((2, 3, 152, 150), "contiguous", "planes", False),
    Case((11, 12, 2, 2), "contiguous", "small", True),
    Case((7, 22, 2, 4), "contiguous", "small", True),
    Case((19, 48), "contiguous", "rows", True),
    Case((35, 720), "contiguous", "rows", True),
    Case((601, 720), "contiguous", "rows", False),
    Case((3, 48, 9, 11), "channels_last", "rows", True),
    Case((5, 48, 70, 71), "channels_last", "rows", False),
]


def compare_steps(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, training: bool, kernel: Any, **options: Any
) -> None:
    layer = OURS[len(shape)](shape[1], dtype=dtype, **options)
    with torch.no_grad():
        for parameter, low in ((layer.weight, 0.5), (layer.bias, -0.5)):
            if parameter is not None:
                parameter.copy_(torch.linspace(low, low + 1.3, shape[1]))
        if layer.running_mean is not None and not training:
            layer.running_mean.copy_(torch.linspace(-1, 1, shape[1]))
            layer.running_var.copy_(torch.linspace(0.3, 2, shape[1]))
    layer.train(training)
    oracle = in_float64(layer)
    for batch in range(BATCHES):
        x, grad = (laid(shape, 2 * batch + i, dtype, layout) for i in range(2))
        with kernels.using(kernel):
            found = step(layer, x, grad)
        slack = ATEN_SLACK[dtype] if kernel == "aten" else 1.0
        assert_right(found, step(oracle, x.double(), grad.double()), dtype, slack)
        assert kernels.ran().forward == kernel


def assert_planned(case: Case, dtype: torch.dtype) -> plans.Plan:
    planned = plans.laid_out(laid(case.shape, 0, dtype, case.layout))[1]
    assert (planned.kind, planned.fused) == (case.kind, case.fused)
    return planned


def test_fresh_memory_is_poisoned() -> None:
    for dtype in DTYPES:
        assert all(t.isnan().all() for t in (torch.empty(3, dtype=dtype), torch.empty_like(torch.ones(3, dtype=dtype))))


def test_the_cases_take_every_way_through_the_loops() -> None:
    for cases in (CASES, STREAMED):
        taken = {(case.kind, case.fused) for case in cases}
        assert taken == {("planes", True), ("planes", False), ("small", True), ("rows", True), ("rows", False)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loops(case: Case, dtype: torch.dtype, training: bool) -> None:
    assert_planned(case, dtype)
    compare_steps(case.shape, case.layout, dtype, training, "numba")
    assert kernels.ran().backward == "numba"


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_loops_that_write_around_the_caches(case: Case, dtype: torch.dtype) -> None:
    assert assert_planned(case, dtype).streams
    compare_steps(case.shape, case.layout, dtype, True, "numba")
    compare_steps(case.shape, case.layout, dtype, False, "numba")


@pytest.mark.usefixtures("streaming")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_odd_sizes_are_not_written_around_the_caches_where_vectors_would_not_be_aligned(case: Case) -> None:
    for dtype in DTYPES:
        compare_steps(case.shape, case.layout, dtype, True, "numba")


def test_an_output_off_the_vectors_alignment_is_right(streaming: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch aligns what it allocates; memory from elsewhere need not be."""
    shape, empty_like = (3, 9, 12, 12), torch.empty_like

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)

    assert plans.laid_out(laid(shape, 0, torch.float32))[1].streams
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty_like(x, **options) if options else shifted(x))
    compare_steps(shape, "contiguous", torch.float32, True, "numba")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if math.prod(case.shape) < 5000], ids=str)
@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_other_kernels(kernel: str, case: Case, dtype: torch.dtype, training: bool) -> None:
    compare_steps(case.shape, case.layout, dtype, training, kernel)


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_six_dimensions_are_served_by_the_other_kernels(kernel: Any) -> None:
    from batchnorm.functional import batch_norm

    x = torch.randn(3, 5, 2, 3, 1, 2)
    with kernels.using(kernel):
        y = batch_norm(x, None, None, training=True)
    flat = torch.nn.functional.batch_norm(x.double().flatten(2), None, None, training=True)
    torch.testing.assert_close(y.double(), flat.view(x.shape), rtol=1e-6, atol=1e-6)


BIASLESS = {"bias": False} if "bias" in torch.nn.BatchNorm2d.__init__.__code__.co_varnames else {"affine": False}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("tracking", [True, False], ids=["tracking", "untracked"])
@pytest.mark.parametrize("affine", [{}, {"affine": False}, BIASLESS], ids=["affine", "plain", "biasless"])
@pytest.mark.parametrize("kernel", ["numba", "aten", "reference"])
def test_options(kernel: str, affine: dict[str, bool], tracking: bool, momentum: float | None, training: bool) -> None:
    options = {**affine, "track_running_stats": tracking, "momentum": momentum}
    for dtype in DTYPES:
        # One shape for each place where the loops move the running statistics; 12 values wake no second thread.
        for shape in ((2, 3, 2), (35, 701), (5, 9, 12, 15), (2, 3, 150, 151)) if kernel == "numba" else ((5, 9, 3, 3),):
            compare_steps(shape, "contiguous", dtype, training, kernel, **options)


@pytest.mark.parametrize("kernel", ["numba", "aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_beside_float32_parameters(kernel: Any, dtype: torch.dtype) -> None:
    if kernel == "numba" and dtype == torch.float16:
        with pytest.raises(RuntimeError, match=r"asked for, but x is torch\.float16"), kernels.using(kernel):
            OURS[4](3)(torch.randn(2, 3, 5, 5, dtype=dtype))
        return
    for training in (True, False):
        layer = OURS[4](9)
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        oracle = in_float64(layer.train(training))
        x, grad = laid((5, 9, 12, 15), 0, dtype), laid((5, 9, 12, 15), 1, dtype)
        with kernels.using(kernel):
            found = step(layer, x, grad)
        assert found.weight_grad is not None
        assert found.weight_grad.dtype == torch.float32
        assert_right(found, step(oracle, x.double(), grad.double()), dtype)


def test_statistics_with_gaps_or_of_another_width_are_moved_too() -> None:
    from batchnorm.functional import batch_norm

    x = laid((5, 9, 12, 15), 0, torch.float32)
    right_mean, right_var = torch.zeros(9).double(), torch.ones(9).double()
    right = torch.nn.functional.batch_norm(x.double(), right_mean, right_var, training=True)
    for mean, var in (
        (every_other(torch.zeros(9)), every_other(torch.ones(9))),
        (torch.zeros(9).double(), torch.ones(9).double()),
    ):
        y = batch_norm(x, mean, var, training=True)
        assert kernels.ran().forward == "numba"
        none = (None, None, None)
        assert_right(
            Result(y, *none, mean, var, None), Result(right, *none, right_mean, right_var, None), torch.float32
        )


@pytest.mark.parametrize("options", [{}, {"statistics": Ghost(2)}], ids=["batch", "ghost"])
def test_a_bad_batch_leaves_wider_statistics_as_they_are_to_the_bit(options: dict[str, Any]) -> None:
    from batchnorm.functional import batch_norm

    mean, var = torch.full((9,), 0.1, dtype=torch.float64), torch.full((9,), 0.7, dtype=torch.float64)
    before = mean.clone(), var.clone()
    x = laid((5, 9, 12, 15), 0, torch.float32).clone()
    x[:, 0, 0, 0] = float("nan")
    batch_norm(x, mean, var, training=True, **options)
    assert kernels.ran().forward == "numba"
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


def test_evaluation_backward_uses_the_statistics_of_its_forward() -> None:
    layer = OURS[4](3).eval()
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with kernels.using("numba"):
        y = layer(x)
    layer.train()(torch.randn(2, 3, 5, 5) * 9)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 + layer.eps) ** -0.5))


def test_a_small_evaluation_goes_to_aten_and_a_large_one_to_the_loops() -> None:
    layer = OURS[4](3).eval()
    with torch.no_grad():
        layer(torch.randn(2, 3, 5, 5))
        assert kernels.ran().forward == "aten"
        x = torch.randn(3, 3, 901, 1001)
        assert kernels.which(x, False) == "numba"
        y = layer(x)
        assert kernels.ran().forward == "numba"
    torch.testing.assert_close(y, x * (1 + layer.eps) ** -0.5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_plans_for_other_shapes_of_as_many_channels_hold_no_more_memory(layout: str) -> None:
    """Thousands of plans are kept, one for each shape."""
    C, held = 8192, {}
    for dtype in (torch.float32, torch.bfloat16):
        for n in range(2, 18):
            x = torch.empty_like(laid((n, C, 1, 2), 0, dtype, layout), device="meta")
            for planned in (plans.plan, plans.inference_plan, lambda *a: plans.sets_plan(*a, 1, False)):
                found = planned(x.shape, x.stride(), dtype)
                assert found is not None
                assert (found.moments.shape, found.gradient.shape) == ((2, C), (C,))
                tensors = [value for value in found if isinstance(value, torch.Tensor)]
                held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(held.values()) <= (2 * 8 + 4) * C
