"""What torch and others do around layers that run: saved tensors, transforms, fakes, devices, parallel runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from subjects import assert_close, assert_right, converted, frozen, fused, image, network, right
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import batchnorm
from batchnorm import kernels
from with_timm import timm

OURS = pytest.mark.parametrize("make", [converted, fused])
Make = Callable[[], nn.Module]


def step(model: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients and buffers after one step."""
    y = model(image() if x is None else x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**named, **dict(model.named_buffers())}


def assert_a_right_step(found: dict[str, Tensor]) -> None:
    exact = network().double()
    expected = step(exact, image().double())
    for name, t in expected.items():
        assert_close(found[name], t, name)


# --- tensors saved for the backward ---


def halves(t: Tensor) -> tuple[Tensor, torch.dtype]:
    """Nothing is lost: what cannot be told in bfloat16 goes into a second one, and a third."""
    if t.dtype != torch.float32:
        return t, t.dtype
    parts = []
    for _ in range(3):
        parts.append(t.bfloat16())
        t = t - parts[-1]
    return torch.stack(parts), torch.float32


HOOKS: dict[str, Any] = {
    "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(),
    "NumPy": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy),
    "compressed": lambda: torch.autograd.graph.saved_tensors_hooks(
        halves, lambda kept: kept[0].float().sum(0) if kept[0].dtype == torch.bfloat16 else kept[0]
    ),
    "another layout": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t, lambda t: t
    ),
}


@OURS
@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_saved_tensors_may_come_back_in_any_form(make: Make, hooks: Any, layout: torch.memory_format) -> None:
    model = make()
    with hooks():
        y = model(image().contiguous(memory_format=layout))
    assert kernels.ran().forward == "numba"
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert_a_right_step({**{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())})  # type: ignore[dict-item]


# --- checkpoints ---


@OURS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_activation_checkpointing_counts_once(make: Make, reentrant: bool) -> None:
    model: Any = make()
    x = image().requires_grad_()
    y = checkpoint(model, x, use_reentrant=reentrant)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert_a_right_step({**{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())})


@OURS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_a_checkpointed_segment_may_end_between_a_layer_and_its_activation(make: Make, reentrant: bool) -> None:
    model: Any = make()
    tail: Any = nn.Sequential(model.block, model.sums, model.act, model.head)
    x = checkpoint_sequential(model.stem, 3, image().requires_grad_(), use_reentrant=reentrant)
    y = tail(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert_a_right_step({**{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())})


# --- torch.func ---


@OURS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call_and_transforms(make: Make, training: bool) -> None:
    model, exact = make().train(training), network().double().train(training)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    wide = {name: p.detach() for name, p in exact.named_parameters()}

    def of(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            scratch = {name: b.clone() for name, b in model.named_buffers()}
            return functional_call(model, (parameters, scratch), (x,)).square().mean()

        return loss

    for transform in (grad, jacrev):
        found, expected = transform(of(model, image()))(parameters), transform(of(exact, image().double()))(wide)
        for name, value in expected.items():
            assert_close(found[name], value, name)
    tangents = [{name: torch.ones_like(p) for name, p in given.items()} for given in (parameters, wide)]
    found = jvp(of(model, image()), (parameters,), (tangents[0],))
    expected = jvp(of(exact, image().double()), (wide,), (tangents[1],))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@OURS
def test_an_ensemble_by_vmap(make: Make) -> None:
    models = [make().eval() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.5)
    parameters, buffers = stack_module_state(models)
    x = image()
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    for one, model in zip(found, models, strict=True):
        assert_close(one, copy.deepcopy(model).double()(image().double()))


@OURS
def test_gradients_in_batches(make: Make) -> None:
    model, exact = make(), network().double()
    x = image().requires_grad_()
    y, wide = model(x), x.detach().double().requires_grad_()
    expected = exact(wide)
    directions = torch.randn(5, *y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(y, x, directions, is_grads_batched=True)[0]
    rows = [torch.autograd.grad(expected, wide, d.double(), retain_graph=True)[0] for d in directions]
    assert_close(found, torch.stack(rows))


# --- tensors without values, and other devices ---


@OURS
def test_shapes_without_values(make: Make) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(image()))
    assert tuple(y.shape) == (4, 2, 4, 4)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    meta = copy.deepcopy(model).to("meta")
    assert tuple(meta(image().to("meta")).shape) == (4, 2, 4, 4)
    with torch.device("meta"):
        layer = batchnorm.BatchNorm2d(3, activation="relu")
        assert layer(torch.randn(2, 3, 4, 4)).is_meta


def test_whole_model_functions_under_fake_tensors() -> None:
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        batchnorm.convert(model)
        assert type(model[1]) is batchnorm.BatchNorm2d
        assert tuple(model(torch.randn(2, 3, 4, 4)).shape) == (2, 4, 4, 4)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@OURS
def test_a_default_device_moves_nothing_of_a_model(make: Make) -> None:
    model, data, x = make(), [image(seed) for seed in range(3)], image()
    exact = network()
    with default_device("meta"):
        y = model(x)
        y.backward(torch.linspace(-1, 1, y.numel(), device="cpu").view_as(y))
        found = {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
    assert_a_right_step(found)
    batchnorm.recalibrate(exact, data)
    model = make()
    with default_device("meta"):
        batchnorm.recalibrate(model, data)
    for name, buffer in exact.named_buffers():
        assert_close(dict(model.named_buffers())[name], buffer, name)


# --- averages, files, accelerate ---


@OURS
def test_averaged_models(make: Make) -> None:
    model = make()
    averages = [
        torch.optim.swa_utils.AveragedModel(model, use_buffers=True),
        timm.utils.ModelEmaV3(model, decay=0.0, update_after_step=0),
        timm.utils.ModelEmaV2(model, decay=0.0),
    ]
    assert_right(averages[0].module)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    expected = copy.deepcopy(model).eval().double()(image().double())
    for average in averages:
        if isinstance(average, timm.utils.ModelEmaV2):
            average.update(model)
        elif isinstance(average, timm.utils.ModelEmaV3):
            average.update(model, step=2)
        else:
            average.n_averaged.zero_()
            average.update_parameters(model)
        assert_close(average.module.eval()(image()), expected)


@OURS
def test_checkpoints_load_with_weights_only(make: Make, tmp_path: Path) -> None:
    model = make()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    plain = network()
    for p in plain.parameters():
        p.data.zero_()
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_close(plain.eval()(image()), right(image()))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_right(loaded, training=True)


@OURS
def test_accelerates_offloading(make: Make) -> None:
    model = make().eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert_close(model(image()), right(image()))


# --- several processes ---


PARALLEL = [f"{kind} {way}" for kind in ("converted", "fused") for way in ("DDP", "FSDP")]


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for name in PARALLEL:
            model: Any = {"converted": converted, "fused": fused}[name.split()[0]]()
            if name.endswith("DDP"):
                model = nn.parallel.DistributedDataParallel(model)
            else:
                mesh = torch.distributed.init_device_mesh("cpu", (2,))
                for part in (model.stem, model.block, model.sums, model):
                    fully_shard(part, mesh=mesh)
            y = model(image())
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            gradients = {n: p.grad.full_tensor() if "FSDP" in name else p.grad for n, p in model.named_parameters()}
            found = {n.removeprefix("module."): t for n, t in (gradients | dict(model.named_buffers())).items()}
            torch.save(found, f"{folder}/{name}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel(tmp_path: Path) -> None:
    """Both processes see the same batch, so that their average is the step of one."""
    torch.multiprocessing.spawn(train, args=(str(tmp_path),), nprocs=2)
    for name in PARALLEL:
        for rank in range(2):
            assert_a_right_step(torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True))


def test_data_parallel_of_frozen_layers_learns_what_is_left() -> None:
    model = frozen()
    assert all(not p.requires_grad for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    found = step(model.train())
    exact = network().double().eval()
    for layer in exact.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    for key, t in step(exact, image().double()).items():
        assert_close(found[key], t, key)
