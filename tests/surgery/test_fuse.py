"""Fused models compute the same with fewer passes, and everything that was left has its reason."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from networks import BasicBlock, Bottleneck, DenseNet, InvertedResidual, ResNet, Tail, Undecided, image, randomized
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.surgery.fusing import traced


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients, buffers; with the kernels that people get."""
    model = copy.deepcopy(model)
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return found | {"y": y.detach(), "x": x.grad}


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    largest = max(t.abs().max().item() for name, t in right.items() if name.endswith(("weight", "bias")))
    for name, t in right.items():
        torch.testing.assert_close(found[name], t, rtol=1e-4, atol=2e-5 * max(largest, 1), msg=lambda m, n=name: n + m)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], dict[str, str]]] = {
    "sequential": (sequence, {"1": "relu"}, {}),
    "resnet": (
        ResNet,
        {
            "bn1": "relu",
            "layer1.0.bn1": "relu", "layer1.0.bn2": "add + relu",
            "layer1.1.bn1": "relu", "layer1.1.downsample.1": "add + relu",
            "layer2.0.bn1": "relu", "layer2.0.bn2": "relu", "layer2.0.bn3": "add + relu",
        },
        {"layer1.1.bn2": "it is the residual of layer1.1.downsample.1"},
    ),
    "mobilenet": (
        lambda: nn.Sequential(InvertedResidual(2), InvertedResidual(2)),
        {f"{i}.conv.{n}": what for i in (0, 1) for n, what in (("0.1", "relu6"), ("1.1", "relu6"), ("3", "add"))},
        {},
    ),
    "densenet": (DenseNet, {"norms.0": "relu", "norms.1": "relu", "norm": "relu"}, {}),
    "undecided": (
        lambda: Undecided(nn.SiLU()),
        {"norm": "silu"},
        {"second": "the model cannot be traced: TraceError: symbolically traced variables cannot be used as inputs "
                   "to control flow; observed: followed by mean"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "fused", "skipped"), MODELS.values(), ids=MODELS.keys())
def test_networks_as_people_write_them(
    make: Callable[[], nn.Module], fused: dict[str, str], skipped: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = randomized(make())
    before, flags = copy.deepcopy(model.state_dict()), [(type(m), m.training) for m in model.modules()]
    generator = torch.get_rng_state(), random.getstate()
    result = batchnorm.fuse(model, image())
    assert result.fused == fused
    assert result.skipped == skipped
    assert result.max_error < 1e-5
    assert result.max_gradient_error < 1e-5
    # The original is as it was, and so is the world.
    assert flags == [(type(m), m.training) for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(generator[0], torch.get_rng_state())
    assert generator[1] == random.getstate()
    # The copy has the same state, and computes the same: one network by the loops, which take long to compile.
    state = result.model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], t) for name, t in before.items())
    for training in (True, False):
        right = step(model.train(training), image())
        with nullcontext() if make is ResNet else kernels.using("aten"):
            assert_same(step(result.model.train(training), image()), right)
            assert kernels.ran().forward == ("numba" if make is ResNet and training else "aten")
    model.load_state_dict(result.model.state_dict())
    result.model.load_state_dict(model.state_dict())


def test_what_changed_and_what_did_not() -> None:
    model = ResNet()
    model.layer1.register_forward_hook(lambda *_: None)
    result = batchnorm.fuse(model, image())
    fused = result.model
    assert type(fused) is ResNet  # its own ReLU made room
    assert fused.about == {"name": "resnet"}
    assert repr(fused.relu) == "Absorbed(ReLU(inplace=True))"
    assert len(fused.layer1._forward_hooks) == 1
    assert result.rewritten == ("layer1.0", "layer1.1", "layer2.0")
    assert isinstance(fused.layer1[0], BasicBlock)
    assert type(fused.layer1[0]).__name__ == "BasicBlock"
    assert result.method["bn1"] == "module replaced"
    assert result.method["layer1.0.bn1"] == "forward rewritten"
    text = str(result)
    assert text.startswith("8 fused, 1 skipped\n  bn1: relu (module replaced)\n")
    assert "  layer1.1.bn2: skipped, it is the residual of layer1.1.downsample.1" in text
    assert "verified: outputs within" in text
    again = batchnorm.fuse(fused, image())
    assert again.fused == {}
    assert again.skipped["bn1"] == "it has the activation relu already"


def test_without_example_inputs_additions_wait() -> None:
    result = batchnorm.fuse(ResNet())
    assert set(result.fused.values()) == {"relu"}
    assert result.skipped["layer1.0.bn2"] == "an addition needs example_inputs, which tell the shapes"
    assert result.max_error is result.max_gradient_error is None
    assert str(result).endswith("not verified: give example_inputs")
    undecided = batchnorm.fuse(Undecided(nn.ReLU()))
    assert undecided.fused == {}
    assert undecided.skipped["norm"].endswith("; example_inputs would allow to observe it")


def test_models_pickled_by_earlier_versions_find_their_classes() -> None:
    torch.manual_seed(0)
    fused = batchnorm.fuse(randomized(ResNet()), image()).model
    pickled = pickle.dumps(fused, protocol=2)
    before = pickled.replace(b"cbatchnorm.surgery.fused\n", b"cbatchnorm.surgery.fusing.rewrite\n")
    assert {name for name in (b"Absorbed", b"_blank") if b"fusing.rewrite\n" + name in before} == {
        b"Absorbed",
        b"_blank",
    }
    assert_same(step(pickle.loads(before), image()), step(fused, image()))


def test_copies_and_pickles_of_a_fused_model() -> None:
    torch.manual_seed(0)
    fused = batchnorm.fuse(randomized(ResNet()), image()).model
    right = step(fused, image())
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), batchnorm.fuse(fused).model):
        assert list(twin.state_dict()) == list(fused.state_dict())
        assert_same(step(twin, image()), right)
        with torch.no_grad():
            twin.layer1[0].conv1.weight.zero_()
    assert_same(step(fused, image()), right)
    assert_same(step(pickle.loads(pickle.dumps(copy.deepcopy(fused))), image()), right)


def test_a_fused_model_can_be_traced_compiled_and_trained() -> None:
    torch.manual_seed(0)
    fused = batchnorm.fuse(randomized(nn.Sequential(BasicBlock(2, 2))), image()).model
    right = fused(image())
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(image()), right)
    torch.testing.assert_close(torch.compile(fused, backend="eager", fullgraph=True)(image()), right)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (fused(image()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", [entry[0] for entry in MODELS.values()], ids=MODELS.keys())
def test_revert_undoes_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomized(make())
    fused = batchnorm.fuse(model, image()).model
    report = batchnorm.revert(fused)
    assert report.skipped == {}
    assert repr(fused) == repr(model)
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(fused.modules(), model.modules(), strict=True))
    assert_same(step(fused, image()), step(model, image()))


@kernels.using("aten")  # compiles nothing
def test_a_part_of_a_fused_model_is_reverted_only_if_it_stands_alone() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.relu = InvertedResidual(2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.inner(x))

    torch.manual_seed(0)
    model = randomized(Outer())
    fused = batchnorm.fuse(model, image()).model
    right = step(model, image())
    assert fused.inner.conv[3].activation == ("relu", 0.0)
    assert_same(step(fused, image()), right)
    report = batchnorm.revert(fused.inner)
    assert report.skipped == {"conv.3": "it is fused with an activation outside: revert the whole model"}
    assert report.converted["conv.0.1"] == "BatchNorm2d"
    assert report.converted["conv.0.2"] == "ReLU6"
    assert_same(step(fused, image()), right)
    assert "0" in batchnorm.revert(nn.Sequential(fused.relu)).skipped
    assert batchnorm.revert(fused).skipped == {}
    assert_same(step(fused, image()), right)


def test_activations_that_work_in_place_are_observed_too() -> None:
    model = randomized(Undecided(nn.ReLU(inplace=True)))
    result = batchnorm.fuse(model, image())
    assert result.fused == {"norm": "relu"}
    assert result.method == {"norm": "observed"}
    assert_same(step(result.model, image()), step(model, image()))


def test_hooks_of_a_rewritten_module_stay() -> None:
    model, seen = BasicBlock(2, 2), []
    model.register_forward_hook(lambda module, given, y: seen.append(type(module).__name__))
    fused = batchnorm.fuse(model, image()).model
    assert batchnorm.fuse(model).rewritten == ("",)
    seen.clear()
    fused(image())
    assert seen == ["BasicBlock"]


def test_torchscript_takes_replaced_modules_and_refuses_rewritten_forwards() -> None:
    torch.manual_seed(0)
    fused = batchnorm.fuse(randomized(sequence())).model.eval()
    right = fused(image())
    torch.testing.assert_close(torch.jit.script(fused)(image()), right)
    fused = batchnorm.fuse(nn.Sequential(BasicBlock(2, 2)), image()).model
    with pytest.raises(RuntimeError, match=r"forward of BasicBlock: call batchnorm.revert before torch.jit.script"):
        torch.jit.script(copy.deepcopy(fused))
    batchnorm.revert(fused)
    torch.jit.script(fused)


def test_export_takes_a_fused_model() -> None:
    torch.manual_seed(0)
    fused = batchnorm.fuse(randomized(nn.Sequential(BasicBlock(2, 2))), image()).model.eval()
    right = fused(image())
    torch.testing.assert_close(torch.export.export(fused, (image(),)).module()(image()), right)


def test_a_sequence_that_is_not_run_as_one_is_left() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())

        def forward(self, x: Tensor) -> list[Tensor]:
            kept = []
            for layer in self.layers:
                x = layer(x)
                kept.append(x)
            return kept

    for inputs in (None, image()):
        result = batchnorm.fuse(Features(), inputs)
        assert result.skipped == {"layers.0": "its output is read by layers.1 (ReLU) and output"}


def test_parameters_and_arguments_of_activations() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(9))
            self.leaky, self.elu, self.gelu = nn.LeakyReLU(0.3), nn.ELU(0.7), nn.GELU("tanh")

        def forward(self, x: Tensor) -> Tensor:
            n = self.norms
            x = F.leaky_relu(n[0](x), 0.2)
            x = F.elu(n[1](x), alpha=0.5)
            x = F.gelu(n[2](x), approximate="tanh")
            x = F.gelu(n[3](x))
            x = F.hardswish(n[4](x))
            x = F.leaky_relu_(n[5](x), 0.1)
            return self.gelu(n[8](self.elu(n[7](self.leaky(n[6](x))))))

    result = batchnorm.fuse(Many())
    found = [norm.activation for norm in result.model.norms]
    assert found == [
        ("leaky_relu", 0.2), ("elu", 0.5), ("gelu_tanh", 0.0), ("gelu", 0.0), ("hardswish", 0.0), ("leaky_relu", 0.1),
        ("leaky_relu", 0.3), ("elu", 0.7), ("gelu_tanh", 0.0),
    ]  # fmt: skip


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sequence()
    for wrong in ("silu", "relu6"):
        monkeypatch.setattr(
            traced,
            "absorb",
            lambda m, layer, name, known, wrong=wrong: setattr(m.get_submodule(layer), "activation", (wrong, 0.0)),
        )
        with pytest.raises(RuntimeError, match=r"the fused model's outputs differ by .* the model is unchanged"):
            batchnorm.fuse(model, 10 * image())
    assert type(model[1]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="returned no floating-point tensor"):
        batchnorm.fuse(Tail(lambda m, x, y: y.argmax()), image())


def test_inputs_by_name_and_in_tuples_and_half_precision() -> None:
    model = Tail(lambda m, x, y: m.relu(y + x))
    for inputs in ({"x": image()}, (image(),), [image()]):
        assert batchnorm.fuse(model, inputs).fused == {"bn": "add + relu"}
    narrow = model.to(torch.bfloat16)
    x = image(dtype=torch.bfloat16)
    result = batchnorm.fuse(narrow, x)
    assert result.fused == {"bn": "add + relu"}
    assert result.model.bn.running_var.dtype == torch.float32
    assert narrow.bn.running_var.dtype == torch.bfloat16


def test_blocks_that_are_used_twice() -> None:
    torch.manual_seed(0)
    block = Bottleneck(2)
    model = randomized(nn.Sequential(block, nn.Conv2d(2, 2, 1), block))
    result = batchnorm.fuse(model, image())
    assert "it is shared, by 0.bn1 and 2.bn1" in result.skipped.values()
    again = randomized(Tail(lambda m, x, y: m.block(m.block(y)), block=Bottleneck(2)))
    result = batchnorm.fuse(again, image())
    assert set(result.fused) == {"block.bn1", "block.bn2", "block.bn3"}
    assert_same(step(result.model, image()), step(again, image()))


def test_lazy_layers_must_know_their_size() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    with pytest.raises(ValueError, match="Call `forward` with a dummy batch"):
        batchnorm.fuse(model)
    model(image())
    assert batchnorm.fuse(model).fused == {"0": "relu"}
