"""Any number of threads, torch's own or Python's, gives the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.functional import batch_norm
from batchnorm.kernels import launch
from expected import OURS, Result, laid, step

SHAPES = [
    ((2, 307, 67), "contiguous"),
    ((5, 9, 72, 75), "contiguous"),
    ((2, 3, 150, 151), "contiguous"),
    ((5, 1, 163, 165), "contiguous"),
    ((19, 230, 5, 5), "contiguous"),
    ((35, 1501), "contiguous"),
    ((601, 701), "contiguous"),
    ((3, 5, 60, 61), "channels_last"),
    ((5, 9, 70, 71), "channels_last"),
]
EVERY_WAY = pytest.mark.parametrize(
    ("shape", "layout"), SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v
)
Threads = Callable[[int], None]


def work(shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    layer = OURS[len(shape)](shape[1], dtype=dtype)
    results: list[Tensor] = []
    for batch in range(2):
        found = step(layer, *(laid(shape, seed + 2 * batch + i, dtype, layout) for i in range(2)))
        results += [t for t in Result(*found) if t is not None]
    assert kernels.ran() == ("numba", "numba")
    with torch.no_grad(), kernels.using("numba"):
        return [*results, layer.eval()(laid(shape, 9, dtype, layout))]


def assert_same(found: list[Tensor], right: list[Tensor]) -> None:
    assert [t.shape for t in found] == [t.shape for t in right]
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_results_are_the_same_for_any_number_of_threads(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()
    run = launch.Kernel.__call__
    monkeypatch.setattr(launch.Kernel, "__call__", lambda *args: asked.add(args[2]) or run(*args))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(work(shape, layout, dtype))
    assert {1, 2, 3} <= asked  # the shapes are large enough to be worth them
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@EVERY_WAY
def test_without_openmp_python_threads_do_the_same(
    shape: tuple[int, ...], layout: str, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(1)
    right = work(shape, layout)
    threads(3)
    monkeypatch.setattr(launch, "openmp", lambda: None)
    before = launch._python_threads()._work_queue.qsize(), threading.active_count()
    assert_same(work(shape, layout), right)
    assert any(t.name.startswith("batchnorm") for t in threading.enumerate()), before


def test_openmp_is_found_on_linux() -> None:
    assert launch.openmp() is not None


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "python"])
@pytest.mark.parametrize("team", [1, 2])
def test_four_python_threads_at_once(
    openmp: bool, team: int, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(team)
    if not openmp:
        monkeypatch.setattr(launch, "openmp", lambda: None)
    right = [work(shape, layout, seed=i) for i, (shape, layout) in enumerate(SHAPES)]
    found: dict[tuple[int, int], Any] = {}
    start = threading.Barrier(4)

    def caller(number: int) -> None:
        start.wait()
        for turn in range(len(SHAPES)):  # different shapes at the same time, and all threads all shapes
            i = (turn + number) % len(SHAPES)
            try:
                found[number, i] = work(*SHAPES[i], seed=i)
            except BaseException as error:
                found[number, i] = error
                raise

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(120)
        assert not thread.is_alive()
    assert len(found) == 4 * len(SHAPES)
    for (_, i), results in found.items():
        assert_same(results, right[i])


def test_which_kernel_ran_is_told_to_each_thread_apart() -> None:
    batch_norm(torch.randn(5, 3), None, None, training=True)
    said: list[kernels.Ran] = []

    def other() -> None:
        said.append(kernels.ran())
        batch_norm(torch.randn(5, 3).half(), None, None, training=True)
        said.append(kernels.ran())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said == [(None, None), ("aten", None)]
    assert kernels.ran().forward == "numba"


@pytest.mark.slow
def test_more_than_two_to_the_thirty_one_elements() -> None:
    """Indices past 32 bits, forward and in place of a gradient: 4.3 GB each of input and output, twice."""
    half = 2**30 + 24
    for shape in ((2, 1, half), (2 * half // 8, 8)):
        x = torch.zeros(shape, dtype=torch.bfloat16)
        x[-1] = 1.0
        x[0] = -1.0
        layer = OURS[3](shape[1], affine=False, momentum=1.0).bfloat16()
        with torch.no_grad():
            y = layer(x)
        assert kernels.ran().forward == "numba"
        mean = (x[-1].float().mean() + x[0].float().mean()).item() / (2 if shape[1] == 1 else shape[0])
        torch.testing.assert_close(layer.running_mean, torch.full((shape[1],), mean), rtol=1e-5, atol=1e-9)
        expected_var = 1.0 if shape[1] == 1 else 2.0 / shape[0]
        torch.testing.assert_close(layer.running_var, torch.full((shape[1],), expected_var), rtol=1e-5, atol=0)
        scale = (expected_var + 1e-5) ** -0.5
        for place, value in ((0, -1.0), (-1, 1.0)):
            torch.testing.assert_close(y[place].float().amin().item(), value * scale, rtol=2**-7, atol=0)
            torch.testing.assert_close(y[place].float().amax().item(), value * scale, rtol=2**-7, atol=0)
        del x, y
