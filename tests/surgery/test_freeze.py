"""Frozen layers normalize with their running statistics, keep no input, and become what they were."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import levit, resnet
from networks import BasicBlock, randomized
from torch import Tensor, nn

import batchnorm

MAKERS: dict[str, Callable[..., nn.Module]] = {
    "torch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "ours": batchnorm.BatchNorm2d,
    "fused": lambda c, **options: batchnorm.BatchNorm2d(c, activation="relu", **options),
}


def image(channels: int = 2, **options: Any) -> Tensor:
    return torch.randn(4, channels, 3, 5, generator=torch.Generator().manual_seed(1)).to(**options)


def network(make: Callable[..., nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return randomized(nn.Sequential(nn.Conv2d(2, 3, 1), make(3, **options), nn.ReLU(), nn.Conv2d(3, 2, 1), make(2)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(found) == list(right)
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in right.items())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, dx and the gradients of what learns."""
    x = x.clone().requires_grad_()
    y = model(x)
    learning = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *learning])
    return [y.detach(), *found]


def saved(layer: nn.Module, *given: Tensor) -> list[Tensor]:
    """What is kept for the backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(*given)
    return kept


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_frozen_model_trains_as_in_evaluation_and_comes_back(make: Callable[..., nn.Module]) -> None:
    model = network(make, momentum=None)
    right = copy.deepcopy(model).eval()
    for layer in (right[1], right[4]):
        layer.requires_grad_(False)
    kinds, tensors = [type(m) for m in model], state(model)
    report = batchnorm.freeze(model)
    name = kinds[1].__name__
    assert report.frozen == {"1": name, "4": name}
    assert str(report) == f"2 frozen, 0 skipped\n  1: {name}\n  4: {name}"
    assert model.train() is model
    assert [m.training for m in model] == [True, False, True, True, False]
    for found, expected in zip(gradients(model, image()), gradients(right, image()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_equal(state(model), tensors)
    assert batchnorm.unfreeze(model) == ("1", "4")
    assert [type(m) for m in model] == kinds
    assert all(m.training and "_frozen" not in vars(m) for m in model)
    assert all(p.requires_grad for p in model.parameters())
    model[:2](image())
    assert model[1].num_batches_tracked == 1
    assert batchnorm.unfreeze(model) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [nn.BatchNorm2d, batchnorm.BatchNorm2d], ids=["torch", "ours"])
def test_no_input_is_saved_where_the_weight_does_not_learn(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    layer = randomized(make(2))
    x = image(dtype=dtype).requires_grad_()
    assert any(t.data_ptr() == x.data_ptr() for t in saved(layer.eval(), x))
    batchnorm.freeze(layer)
    assert all(t.numel() < x.numel() for t in saved(layer, x))
    assert batchnorm.kernels.ran().forward == "aten"
    assert layer(x).dtype == dtype
    batchnorm.freeze(layer.requires_grad_(True), affine=False)
    assert any(t.data_ptr() == x.data_ptr() for t in saved(layer, x))


def test_behind_the_layer_only_the_activation_keeps_something() -> None:
    layer = batchnorm.BatchNorm2d(2, activation="relu")
    x, skip = image().requires_grad_(), image(2)
    batchnorm.freeze(layer)
    kept = [t for t in saved(layer, x, skip) if t.numel() == x.numel()]
    assert len(kept) == 1  # relu's output, which the next convolution keeps as well
    assert torch.equal(kept[0], layer(x, skip))


def test_large_tensors_go_through_the_loops_and_keep_no_input_either() -> None:
    layer = batchnorm.BatchNorm2d(2, activation="relu")
    batchnorm.freeze(layer)
    x = torch.randn(2, 2, 400, 400).requires_grad_()
    kept = saved(layer, x)
    assert batchnorm.kernels.ran().forward == "numba"
    assert sum(t.numel() * t.element_size() for t in kept) < x.numel()  # a bit an element


def test_derivatives_against_float64_differences() -> None:
    layer = randomized(batchnorm.BatchNorm1d(3, dtype=torch.float64, activation="silu"))
    batchnorm.freeze(layer)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x, x.detach() + 1))
    assert torch.autograd.gradgradcheck(layer, (x,))
    right = F.silu(F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), right)


def test_channels_last_stays() -> None:
    layer = nn.BatchNorm2d(2)
    batchnorm.freeze(layer)
    x = image().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_errors_are_those_of_the_layer() -> None:
    model = network()
    batchnorm.freeze(model)
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        model[1](image(4).requires_grad_())
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        model[1](torch.randn(3, 3, 5).requires_grad_())
    with pytest.raises(RuntimeError, match="mixed dtype"):
        model[1](image(3, dtype=torch.float64).requires_grad_())
    with pytest.raises(RuntimeError, match="residual should have the input's size"):
        model[1](image(3).requires_grad_(), image(3)[:1])


def test_affine_may_go_on_learning_and_can_be_fixed_later() -> None:
    model = network()
    model[1].bias.requires_grad_(False)
    report = batchnorm.freeze(model, affine=False)
    assert report.frozen == {"1": "BatchNorm2d; weight may learn", "4": "BatchNorm2d; weight and bias may learn"}
    model(image()).pow(2).sum().backward()
    assert model[4].weight.grad is not None
    assert batchnorm.freeze(model).frozen == {"1": "BatchNorm2d", "4": "BatchNorm2d"}
    assert model[4].weight.grad is None
    assert batchnorm.freeze(model, affine=False).frozen == {"1": "BatchNorm2d", "4": "BatchNorm2d"}
    batchnorm.unfreeze(model)
    assert [p.requires_grad for p in (*model[1].parameters(), *model[4].parameters())] == [True, False, True, True]


def test_an_optimizer_leaves_what_is_frozen() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model(image()).pow(2).sum().backward()
        optimizer.step()
    batchnorm.freeze(model)
    before = state(model[1])
    model(image()).pow(2).sum().backward()
    optimizer.step()
    assert_equal(state(model[1]), before)


def test_modes_after_unfreezing_are_the_model_s() -> None:
    model = network().eval()
    model[4].train()
    batchnorm.freeze(model)
    batchnorm.unfreeze(model)
    assert [m.training for m in model] == [False, False, False, False, True]
    batchnorm.freeze(model)
    model.train()
    model[4].eval()
    batchnorm.unfreeze(model)
    assert [m.training for m in model] == [True, True, True, True, False]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_copies_and_pickles_are_frozen_too(make: Callable[..., nn.Module]) -> None:
    model = network(make)
    batchnorm.freeze(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.train()(image()), model(image()))
        batchnorm.unfreeze(twin)
        assert type(twin[1]) is type(network(make)[1])
        assert twin[1].weight.requires_grad
        assert not model[1].weight.requires_grad
    assert type(pickle.loads(pickle.dumps(model))[1]) is type(model[1])


def test_checkpoints_load_into_a_frozen_model_and_hooks_stay() -> None:
    model, other = network(), network()
    other(image())
    seen: list[nn.Module] = []
    handle = model[1].register_forward_hook(lambda module, given, y: seen.append(module))
    batchnorm.freeze(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.train()(image()), other.eval()(image()))
    assert seen == [model[1]]
    handle.remove()
    model(image())
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["compile", "export", "fx", "script", "trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_other_readers_of_a_model_see_it_frozen(backend: str) -> None:
    model = network(MAKERS["fused"])
    model[4] = randomized(nn.BatchNorm2d(2))
    batchnorm.freeze(model)
    model.train()
    x = image().requires_grad_()
    right = model(x)
    if backend == "compile":
        made = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif backend == "export":
        made = torch.export.export(model, (image(),)).module()
    elif backend == "fx":
        made = torch.fx.symbolic_trace(model)
        called = [n.target for n in made.graph.nodes if n.op in ("call_module", "get_attr")]
        assert called == ["0", "1", "2", "3", "4"]
    else:
        made = torch.jit.script(model) if backend == "script" else torch.jit.trace(model, x)
    before = state(model)
    torch.testing.assert_close(made(x), right)
    assert_equal(state(model), before)


def test_half_precision_statistics_of_torch_stay_half() -> None:
    model = network().to(torch.bfloat16)
    before = state(model)
    batchnorm.freeze(model)
    x = image(dtype=torch.bfloat16).requires_grad_()
    torch.testing.assert_close(model(x).float(), network().to(torch.bfloat16).eval()(x).float(), atol=0.05, rtol=0.05)
    assert_equal(state(model), before)


def test_parts_and_shared_layers() -> None:
    shared = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"backbone": nn.Sequential(shared, nn.Sequential(shared)), "head": nn.BatchNorm2d(2)})
    assert list(batchnorm.freeze(model["backbone"]).frozen) == ["0"]
    model.train()
    assert not shared.training
    assert model["head"].training
    assert model["backbone"][1][0] is shared
    assert batchnorm.freeze(shared).frozen == {"": "BatchNorm2d"}  # the model may be the layer
    assert batchnorm.unfreeze(model) == ("backbone.0",)
    assert shared.training


class Doubled(nn.BatchNorm2d):
    """Somebody's, with something inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ForeignBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def test_layers_of_others_stay_in_evaluation() -> None:
    model = nn.Sequential(Doubled(2), ForeignBatchNorm())
    right, before = copy.deepcopy(model).eval(), state(model)
    report = batchnorm.freeze(model)
    assert report.frozen == {
        "0": "Doubled, kept in evaluation mode",
        "1": "ForeignBatchNorm, kept in evaluation mode",
    }
    assert not model.eval()[0].drop.training
    assert model.train()[0].drop.training
    torch.testing.assert_close(model(image()), right(image()))
    assert_equal(state(model), before)
    assert isinstance(pickle.loads(pickle.dumps(model))[0], Doubled)
    batchnorm.unfreeze(model)
    assert [type(m) for m in model] == [Doubled, ForeignBatchNorm]
    assert model[0].training


def test_what_cannot_be_frozen_has_its_reason() -> None:
    model = nn.Sequential(
        nn.LazyBatchNorm2d(), nn.BatchNorm2d(2, track_running_stats=False), nn.InstanceNorm2d(2),
        nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(2), dim=None),
    )  # fmt: skip
    report = batchnorm.freeze(model)
    assert report.frozen == {}
    assert [reason.split(":")[0] for reason in report.skipped.values()] == [
        "it has seen no input, and has no statistics yet",
        "it has no running statistics",
        "it is parametrized, which would change its class",
    ]
    assert "  1: skipped, it has no running statistics" in str(report)
    assert all(m.training for m in model)


def test_a_layer_that_changed_meanwhile_is_not_broken() -> None:
    model = network()
    batchnorm.freeze(model)
    nn.utils.parametrizations.weight_norm(model[4], dim=None)
    with pytest.raises(RuntimeError, match="4 has become a ParametrizedFrozenBatchNorm2d since it was frozen"):
        batchnorm.unfreeze(model)
    assert batchnorm.freeze(model[1]).frozen == {"": "BatchNorm2d"}


def test_statistics_that_nothing_would_fill_are_not_reset() -> None:
    model = network()
    batchnorm.freeze(model)
    before = state(model)
    with pytest.raises(RuntimeError, match="this BatchNorm2d is frozen"):
        torch.optim.swa_utils.update_bn([image()], model)
    assert_equal(state(model), before)


def test_other_operations_say_that_a_layer_is_frozen() -> None:
    model = network(batchnorm.BatchNorm2d)
    batchnorm.freeze(model)
    reason = "it is frozen: call batchnorm.unfreeze(model) before"
    for report in (batchnorm.convert(model), batchnorm.revert(model), batchnorm.fuse(model)):
        assert report.skipped == {"1": reason, "4": reason}
    assert batchnorm.replace(model, "group").skipped == {"1": reason, "4": reason}


def test_a_fused_model_can_be_frozen_and_thawed_and_reverted() -> None:
    torch.manual_seed(0)
    model = randomized(nn.Sequential(BasicBlock(2, 4)))
    fused = batchnorm.fuse(model, image()).model
    batchnorm.freeze(fused)
    torch.testing.assert_close(fused.train()(image()), model.eval()(image()), rtol=1e-5, atol=1e-5)
    batchnorm.unfreeze(fused)
    assert batchnorm.revert(fused).skipped == {}
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("make", [resnet, levit])
def test_transformers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomized(make())
    x = torch.randn(2, 3, 32, 32)
    right = copy.deepcopy(model).eval()
    kinds, before = [type(m) for m in model.modules()], state(model)
    report = batchnorm.freeze(model)
    assert report.skipped == {}
    assert len(report.frozen) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    found, expected = model.train()(pixel_values=x), right(pixel_values=x)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    found.last_hidden_state.sum().backward()
    assert_equal(state(model), before)
    batchnorm.unfreeze(model)
    assert [type(m) for m in model.modules()] == kinds


# --- frozen_statistics ---


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("make", [*MAKERS.values(), Doubled], ids=[*MAKERS, "subclass"])
def test_passes_in_the_block_do_not_count(make: Callable[..., nn.Module], momentum: float | None) -> None:
    model = network(make)
    model[1].momentum = momentum
    right, before = copy.deepcopy(model), state(model)
    with batchnorm.frozen_statistics(model):
        found = gradients(model, image())
        with batchnorm.frozen_statistics(model):
            model(image())
        model(image())
    assert_equal(state(model), before)
    for ours, expected in zip(found, gradients(right, image()), strict=True):
        torch.testing.assert_close(ours, expected)
    model(image())
    assert model[1].num_batches_tracked == 1
    assert_equal(state(model), state(right))


def test_layers_that_look_at_no_flag_do_not_count_either() -> None:
    layer = ForeignBatchNorm()
    mean = layer.running_mean
    with batchnorm.frozen_statistics(layer):
        found = layer(image())
    assert layer.running_mean is mean
    assert torch.equal(mean, torch.ones(2))
    assert torch.equal(layer(image()), found)
    assert not torch.equal(mean, torch.ones(2))


def test_evaluation_in_the_block_and_what_an_exception_leaves() -> None:
    model = network()
    model[4].track_running_stats = False
    before = {m: dict(vars(m)) for m in model}
    right = copy.deepcopy(model).eval()(image())

    def fail() -> None:
        with batchnorm.frozen_statistics(model):
            model(image())
            torch.testing.assert_close(model.eval()(image()), right)
            model.train()
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert {m: vars(m) for m in model} == before


def test_lazy_layers_must_have_seen_an_input() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.LazyBatchNorm2d())
    with (
        pytest.raises(ValueError, match=r"1 \(LazyBatchNorm2d\) has seen no input"),
        batchnorm.frozen_statistics(model),
    ):
        pass
    model(image())
    with batchnorm.frozen_statistics(model):
        model(image())
    assert model[1].num_batches_tracked == 1
