"""Gradients of any layout, expanded ones included, that are not always wanted: results equal the plain case."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.kernels import cpu
from expected import LAYOUTS, OURS, channels_last, laid, step
from waiting import HANGS_AFTER

# One shape for each way through the loops, by kind and fused; the backward has the same ways as the forward.
SHAPES = {
    "planes": ((3, 37, 9, 11), "contiguous"),
    "planes_split": ((3, 3, 123, 125), "contiguous"),
    "one_channel": ((5, 1, 9, 11), "contiguous"),
    "small": ((7, 5, 5, 5), "contiguous"),
    "rows": ((3, 5, 9, 11), "channels_last"),
    "rows_split": ((5, 9, 70, 71), "channels_last"),
    "matrix": ((17, 5), "contiguous"),
    "matrix_split": ((601, 701), "contiguous"),
    "signal": ((5, 9, 67), "contiguous"),
    "volume": ((3, 11, 3, 5, 7), "channels_last"),
    "one_sample": ((1, 13, 7, 7), "contiguous"),
}


def sliced_along_the_batch(grad: Tensor) -> Tensor:
    wide = torch.full((2 * grad.shape[0], *grad.shape[1:]), float("nan"), dtype=grad.dtype)
    wide[::2] = grad
    return wide[::2]


def sliced_along_the_channels(grad: Tensor) -> Tensor:
    wide = torch.full((grad.shape[0], grad.shape[1] + 3, *grad.shape[2:]), float("nan"), dtype=grad.dtype)
    wide[:, 2:-1] = grad
    return wide[:, 2:-1]


def off_alignment(grad: Tensor) -> Tensor:
    memory = torch.empty(grad.numel() + 1, dtype=grad.dtype)
    memory[1:] = grad.flatten()
    return memory[1:].view(grad.shape)


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "sliced_along_the_batch": sliced_along_the_batch,
    "sliced_along_the_channels": sliced_along_the_channels,
    "sliced_channels_last": lambda g: channels_last(sliced_along_the_channels(g)),
    "off_alignment": off_alignment,
    "scalar": lambda g: g.flatten()[0].expand(g.shape),
    "per_sample": lambda g: g.flatten(1)[:, :1].reshape(-1, *(1,) * (g.dim() - 1)).expand(g.shape),
    "per_channel": lambda g: g[0].reshape(g.shape[1], -1)[:, 0].reshape(1, -1, *(1,) * (g.dim() - 2)).expand(g.shape),
    "over_space": lambda g: (
        g.reshape(*g.shape[:2], -1)[..., 0].reshape(*g.shape[:2], *(1,) * (g.dim() - 2)).expand(g.shape)
    ),
    # One value a row, densely stored: strides 1 and 0 within the space, which no single step walks through.
    "over_rows_densely": lambda g: g[..., :1].contiguous().expand(g.shape),
    "over_the_last_dimension": lambda g: g[..., :1].expand(g.shape),
    "over_the_batch": lambda g: g[:1].expand(g.shape),
    "over_the_channels": lambda g: g[:, :1].expand(g.shape),
    "reversed_dimensions": lambda g: (
        g.permute(*reversed(range(g.dim()))).contiguous().permute(*reversed(range(g.dim())))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", GRADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_any_layout(shape: str, given: str, dtype: torch.dtype) -> None:
    sizes, layout = SHAPES[shape]
    layer = OURS[len(sizes)](sizes[1], dtype=dtype)
    x, grad = laid(sizes, 0, dtype, layout), GRADS[given](laid(sizes, 1, dtype))
    found = step(layer, x, grad)
    plain = LAYOUTS[layout](grad.clone(memory_format=torch.contiguous_format))
    assert plain.stride() == x.stride()
    right = step(layer, x, plain)
    assert kernels.ran() == ("numba", "numba")
    # The order of sums may differ; one unit in the last place of the largest value is what that can cost.
    relative, of_largest = (1e-6, 1e-6) if dtype == torch.float32 else (2**-8, 2**-8)
    for ours, same in zip(found[1:4], right[1:4], strict=True):
        assert ours is not None
        assert same is not None
        absolute = of_largest * max(same.abs().max().item(), grad.abs().max().item() * (x.numel() / sizes[1]) ** 0.5)
        if ours is found.x_grad:
            absolute = 4 * of_largest * max(same.abs().max().item(), grad.abs().max().item())
        torch.testing.assert_close(ours, same, rtol=relative, atol=absolute)
    assert found.x_grad is not None
    assert found.x_grad.shape == x.shape


def test_a_global_mean_and_a_sum_send_expanded_gradients_through_the_loops() -> None:
    for reduce in (torch.sum, lambda y: y.mean((2, 3)).square().sum()):
        layer, x = OURS[4](5), laid((3, 5, 9, 11), 0, torch.float32).requires_grad_()
        twin, wide = torch.nn.BatchNorm2d(5).double(), x.detach().double().requires_grad_()
        reduce(layer(x)).backward()
        assert kernels.ran().backward == "numba"
        reduce(twin(wide)).backward()
        for ours, right in (
            (x.grad, wide.grad),
            (layer.weight.grad, twin.weight.grad),
            (layer.bias.grad, twin.bias.grad),
        ):
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=3e-5)


MISALIGNED = """
import torch, batchnorm
from batchnorm.kernels import cpu, plans
plans._beyond_cache = lambda: 0
plans.plan.cache_clear()
for shape in ((7, 2, 6, 6), (7, 3, 6, 8), (11, 12, 2, 2), (5, 8, 3, 3), (3, 4, 50), (3, 8, 7, 7), (3, 8, 9)):
    turned = torch.randn(shape).movedim(0, -1).contiguous().movedim(-1, 0)
    for grad in (torch.ones(()).expand(shape), torch.randn(*shape[:-1], 1).expand(shape), turned):
        x = torch.randn(shape, requires_grad=True)
        layer = (batchnorm.BatchNorm2d if len(shape) == 4 else batchnorm.BatchNorm1d)(shape[1])
        layer(x).backward(grad)
        twin, right = getattr(torch.nn, type(layer).__name__)(shape[1]).double(), x.detach().double().requires_grad_()
        twin(right).backward(grad.double())
        torch.testing.assert_close(x.grad.double(), right.grad, rtol=1e-4, atol=1e-5)
print("done")
"""


def test_expanded_gradients_of_large_small_maps_do_not_write_vectors_off_their_alignment() -> None:
    """In a process of its own: a misaligned vector ends it."""
    ended = subprocess.run(
        [sys.executable, "-c", MISALIGNED], capture_output=True, text=True, timeout=HANGS_AFTER, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_only_wanted_gradients_are_computed(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, layout = SHAPES[shape]
    x, grad = (laid(sizes, seed, torch.float32, layout) for seed in range(2))
    full = step(OURS[len(sizes)](sizes[1]), x, grad)
    asked = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *args: asked.append(args[6]) or backward(*args))
    for wanted in (
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, True),
        (True, False, True),
    ):
        layer = OURS[len(sizes)](sizes[1])
        layer.weight.requires_grad_(wanted[1])
        layer.bias.requires_grad_(wanted[2])
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(wanted[0])
        layer(leaf).backward(grad)
        for found, right, want in zip((leaf.grad, layer.weight.grad, layer.bias.grad), full[1:4], wanted, strict=True):
            if want:
                assert found is not None
                assert torch.equal(found, right)
            else:
                assert found is None
        assert asked.pop() == (*wanted, False)


def test_nothing_is_recorded_where_nothing_is_wanted() -> None:
    layer = OURS[4](3).requires_grad_(False)
    assert not layer(torch.randn(2, 3, 5, 5)).requires_grad
    with torch.no_grad():
        assert not OURS[4](3)(torch.randn(2, 3, 5, 5, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert OURS[4](3)(torch.randn(2, 3, 5, 5)).is_inference()


@pytest.mark.parametrize("affine", [True, False])
def test_saved_for_backward_are_x_and_the_weight(affine: bool) -> None:
    layer = OURS[4](5, affine=affine)
    x = torch.randn(3, 5, 9, 11, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert kernels.ran().forward == "numba"
    own = [t.data_ptr() for t in (x, layer.weight) if t is not None]
    assert [t.data_ptr() for t in saved] == own


def test_evaluation_saves_x_only_if_the_weight_learns() -> None:
    for learns in (True, False):
        layer = OURS[4](5).eval()
        layer.weight.requires_grad_(learns)
        x = torch.randn(3, 5, 9, 11, requires_grad=True)
        saved: list[Tensor] = []
        with (
            kernels.using("numba"),
            torch.autograd.graph.saved_tensors_hooks(lambda t, keep=saved.append: keep(t) or t, lambda t: t),
        ):
            layer(x)
        sizes = sorted(t.numel() for t in saved)
        assert sizes == ([5, x.numel()] if learns else [5])  # the weight's
