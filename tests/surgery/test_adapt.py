"""Adapting to other data: the papers' formulas, everything else untouched, and a way back to the last bit."""

from __future__ import annotations

import copy
import json
import random
import signal
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ResNet, Undecided, randomized
from torch import Tensor, nn

import batchnorm
from batchnorm.study.arms import Arm, batch_normalized, build
from batchnorm.study.data import digits
from batchnorm.study.results import Settings
from batchnorm.study.train import accuracy, descend
from batchnorm.surgery.adaptation import adapt as adapt_module

# Networks of random weights name few classes. What is warned of has its own tests, with a trained one.
pytestmark = pytest.mark.filterwarnings("ignore:before adapting:UserWarning")
METHODS: list[dict[str, Any]] = [
    {}, {"prior": 5}, {"method": "alpha", "alpha": 0.3}, {"method": "tent", "lr": 0.1, "steps": 2},
]  # fmt: skip
IDS = ["moments", "prior", "alpha", "tent"]


def image(samples: int = 20, seed: int = 1, **options: Any) -> Tensor:
    return (2 * torch.randn(samples, 2, 3, 5, generator=torch.Generator().manual_seed(seed)) + 1).to(**options)


def network(make: Callable[..., nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 1), make(3, **options), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 4, 1), make(4)]
    return randomized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(60, 5))).eval()


def everything(model: nn.Module) -> list[Any]:
    """All that must come back, or stay: values, gradients, modes, flags, hooks."""
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    modules = [(type(m), m.training, dict(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return [tensors, gradients, flags, modules]


def assert_same(found: list[Any], right: list[Any]) -> None:
    for ours, expected in zip(found[0] + found[1], right[0] + right[1], strict=True):
        assert (ours is None) == (expected is None)
        assert ours is None or torch.equal(ours.nan_to_num(7), expected.nan_to_num(7))
    assert found[2:] == right[2:]


def stats(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.running_mean.double(), layer.running_var.double()


def mixture(layer: Any, x: Tensor, source: float) -> tuple[Tensor, Tensor]:
    """The papers' rule, in float64."""
    x = x.double()
    dims = (0, 2, 3)
    mean, var = stats(layer)
    return source * mean + (1 - source) * x.mean(dims), source * var + (1 - source) * x.var(dims)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, nn.SyncBatchNorm, batchnorm.BatchNorm2d])
@pytest.mark.parametrize(
    ("options", "source"), [({}, 0.0), ({"prior": 5}, 0.2), ({"method": "alpha", "alpha": 0.3}, 0.3)], ids=IDS[:3]
)
def test_one_batch_follows_the_formula_layer_by_layer(
    make: Callable[..., nn.Module], options: dict[str, Any], source: float
) -> None:
    model, x = network(make), image()
    right: Any = copy.deepcopy(model).double()
    with torch.no_grad():
        h = right[0](x.double())
        mean, var = mixture(right[1], h, source)
        h = F.batch_norm(h, mean, var, right[1].weight, right[1].bias)
        last = mixture(right[5], right[4](h.relu()), source)
    adapted = batchnorm.adapt(model, x, **options)
    for layer, expected in ((model[1], (mean, var)), (model[5], last)):
        for found, wanted in zip(stats(layer), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert layer.num_batches_tracked == 0
    assert adapted.source_share == source
    assert (adapted.batches, adapted.samples, adapted.skipped_batches) == (1, 20, 0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 50))
def test_batches_of_any_sizes_are_merged_by_count(sizes: list[int], prior: float) -> None:
    model, x = network(), image(sum(sizes))
    share = prior / (prior + len(x))
    right = mixture(model[1], model[0](x).detach(), share)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few samples, here
        adapted = batchnorm.adapt(model, [(part, torch.zeros(len(part))) for part in x.split(sizes)], prior=prior)
    for found, wanted in zip(stats(model[1]), right, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (adapted.batches, adapted.samples) == (len(sizes), len(x))
    assert adapted.source_share == pytest.approx(share)
    assert adapted.layers["1"].count == 15 * len(x)


@pytest.mark.parametrize(
    "data", [lambda x: x.split(10), lambda x: iter([x[:10], x[10:]]), lambda x: [{"input": x[:10]}, {"input": x[10:]}]]
)
@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_what_data_may_be(data: Callable[[Tensor], Any], options: dict[str, Any]) -> None:
    model, other, x = network(), network(), image()
    adapted = batchnorm.adapt(model, data(x), **options)
    assert (adapted.batches, adapted.samples) == (2, 20)
    batchnorm.adapt(other, [x[:10], x[10:]], **options)
    assert_same(everything(model), everything(other))
    with batchnorm.adapt(model, {"input": x, "label": 3}, **options) as adapted:
        assert (adapted.batches, adapted.samples) == (1, 20)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_undone_to_the_last_bit_and_nothing_else_moves(options: dict[str, Any], training: bool) -> None:
    model, x = network(batchnorm.BatchNorm2d), image()
    model.train(training)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].weight.requires_grad_(False)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    before = everything(model)
    adapted = batchnorm.adapt(model, x, **options)
    after = everything(model)
    assert after[2:] == before[2:]
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    changed = {name for name, new, old in zip(names, after[0], before[0], strict=True) if not torch.equal(new, old)}
    statistics = {f"{i}.running_{what}" for i in (1, 5) for what in ("mean", "var")}
    learned = {f"{i}.{what}" for i in (1, 5) for what in ("weight", "bias")}
    assert changed == (statistics | learned if options.get("method") == "tent" else statistics)
    adapted.undo()
    assert_same(everything(model), before)
    model[1].running_mean.add_(1)
    adapted.undo()  # a second time: nothing
    assert torch.equal(model[1].running_mean, before[0][names.index("1.running_mean")] + 1)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


class StopError(Exception):
    pass


@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_with_blocks_end_it_also_by_an_exception(options: dict[str, Any]) -> None:
    model = network()
    before = everything(model)

    def fail() -> None:
        with batchnorm.adapt(model, image(), **options) as adapted:
            assert not torch.equal(model[1].running_mean, before[0][8])
            assert "1" in adapted.layers
            raise StopError

    with pytest.raises(StopError):
        fail()
    assert_same(everything(model), before)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_an_exception_anywhere_leaves_the_model_as_it_was(options: dict[str, Any], place: int) -> None:
    model = network().train()
    calls = 0

    def fail(module: nn.Module, given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    model[place].register_forward_pre_hook(fail)
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.adapt(model, [image(), image(16, 2), image(16, 3)], **options)
    assert_same(everything(model), before)


def test_tent_takes_adam_s_step_along_the_entropy() -> None:
    model, x = network(batchnorm.BatchNorm2d), image()
    batches = [x, image(seed=2)]
    right: Any = copy.deepcopy(model).double()
    right.requires_grad_(False)
    learned = [p.requires_grad_() for i in (1, 5) for p in (right[i].weight, right[i].bias)]
    optimizer = torch.optim.Adam(learned, lr=0.05)

    def run(x: Tensor) -> Tensor:
        for i, layer in enumerate(right):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, True) if i in (1, 5) else layer(x)
        return x

    entropies = []
    for batch in batches:
        for _ in range(3):
            logits = run(batch.double())
            loss = torch.distributions.Categorical(logits=logits).entropy().mean()
            entropies.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    adapted = batchnorm.adapt(model, batches, method="tent", steps=3, lr=0.05)
    for found, wanted in zip([p for i in (1, 5) for p in (model[i].weight, model[i].bias)], learned, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)  # Adam divides by small gradients
    assert entropies[2] < entropies[0]
    assert adapted.layers["1"].learned == "weight and bias"
    # The statistics are those of the data under the new weights.
    twin = copy.deepcopy(model)
    batchnorm.adapt(twin, batches)
    for found, wanted in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_shifts_are_in_deviations_of_the_source() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, eps=0.5)).eval()
    x = torch.randn(50, 2, 4, 4, dtype=torch.float64)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    x[:, 1] = 2 * x[:, 1] + 3
    found = batchnorm.adapt(model.double(), x).layers["0"]
    assert found.mean == pytest.approx((3**2 / 1.5 / 2) ** 0.5)
    assert found.scale == pytest.approx(((4.5 / 1.5) ** 0.5 - 1) / 2**0.5)
    assert found.count == 800


def test_reports() -> None:
    model = network()
    batchnorm.freeze(model[5])
    adapted = batchnorm.adapt(model, image())
    lines = str(adapted).splitlines()
    assert lines[0] == ("1 layers adapted by 'moments' to 20 samples in 1 batch, 1 skipped; the source's share is 0%")
    assert lines[1].startswith("  1  mean off by ")
    assert lines[2] == "  5: skipped, it is frozen: batchnorm.unfreeze(model) before, to change it"
    told = json.loads(json.dumps(adapted.as_dict(), allow_nan=False))
    assert told["layers"]["1"]["count"] == 300
    assert told["entropy"][0] > 0


def test_ctrl_c_in_the_last_moment_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = everything(model)
    write = adapt_module._write

    def interrupted(values: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        write(values)
        monkeypatch.setattr(adapt_module, "_write", write)

    monkeypatch.setattr(adapt_module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.adapt(model, image())
    assert adapt_module._write is write
    assert_same(everything(model), before)


# --- what is left, and what is special ---


def test_frozen_layers_stay_and_learn_nothing() -> None:
    model = network()
    batchnorm.freeze(model[:4])
    before = copy.deepcopy(model.state_dict())
    adapted = batchnorm.adapt(model, image(), method="tent")
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"5.running_mean", "5.running_var", "5.weight", "5.bias"}
    assert list(adapted.skipped) == ["1"]


def test_layers_without_statistics_learn_in_tent_alone() -> None:
    model = network(track_running_stats=False)
    weight = model[1].weight.detach().clone()
    adapted = batchnorm.adapt(model, image())
    assert list(adapted.layers) == ["5"]
    assert torch.equal(model[1].weight, weight)
    with batchnorm.adapt(model, image(), method="tent", lr=0.1) as adapted:
        assert not torch.equal(model[1].weight, weight)
        assert adapted.skipped["1"].endswith("in evaluation, too; its weight and bias learned")
    assert torch.equal(model[1].weight, weight)


def test_layers_without_weights_get_statistics_from_tent() -> None:
    model = network(affine=False)
    before = model[1].running_mean.clone()
    adapted = batchnorm.adapt(model, image(), method="tent")
    assert not torch.equal(model[1].running_mean, before)
    assert (adapted.layers["1"].learned, adapted.layers["5"].learned) == ("", "weight and bias")
    with pytest.raises(ValueError, match="1 layers have none: use method='moments'"):
        batchnorm.adapt(nn.Sequential(nn.BatchNorm2d(2, affine=False)), image(), method="tent")


@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_only_the_domain_that_is_called(options: dict[str, Any]) -> None:
    model = network()
    batchnorm.split_domains(model, ("source", "target"))
    before = copy.deepcopy(model.state_dict())
    with batchnorm.domain("target"):
        adapted = batchnorm.adapt(model, image(), **options)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed
    assert all("domain_target" in name for name in changed)
    assert list(adapted.layers) == ["1.domain_target", "5.domain_target"]
    assert adapted.skipped == dict.fromkeys(("1.domain_source", "5.domain_source"), "the data gave it no values")


def test_a_layer_that_is_called_twice_gets_the_moments_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x)

    model, x = Twice(), image()
    batchnorm.adapt(model, x)
    right = torch.cat([x, 3 * x])
    torch.testing.assert_close(model.norm.running_mean, right.mean((0, 2, 3)))
    torch.testing.assert_close(model.norm.running_var, right.var((0, 2, 3)))


def test_masked_positions_do_not_count_and_renorm_keeps_the_biased_variance() -> None:
    x = image()
    mask = torch.rand(20, 3, 5) > 0.5
    for policy in (None, batchnorm.Renorm()):
        model = nn.ModuleList([batchnorm.BatchNorm2d(2, statistics=policy)]).eval()
        batchnorm.adapt(model, x, forward=lambda model, batch: model[0](batch, mask=mask))
        values = x.movedim(1, 0)[:, mask]
        torch.testing.assert_close(model[0].running_mean, values.mean(1))
        torch.testing.assert_close(model[0].running_var, values.var(1, correction=0 if policy else 1))


def test_poisoned_statistics_are_replaced() -> None:
    model = network()
    model[1].running_var[0] = torch.nan
    adapted = batchnorm.adapt(model, image())
    assert model(image()).isfinite().all()
    assert adapted.as_dict()["layers"]["1"]["scale"] is None
    adapted.undo()
    assert model[1].running_var[0].isnan()


def test_half_precision_keeps_wide_statistics() -> None:
    model = network(batchnorm.BatchNorm2d).to(torch.bfloat16)
    x = image(dtype=torch.bfloat16)
    h = model[0](x)
    batchnorm.adapt(model, x)
    assert model[1].running_mean.dtype == torch.float32
    torch.testing.assert_close(model[1].running_mean, h.float().mean((0, 2, 3)))


def test_batches_that_are_not_finite_are_left_out() -> None:
    model, other = network(), network()
    bad = image()
    bad[3, 0, 0, 0] = torch.inf
    adapted = batchnorm.adapt(model, [bad, image(), bad])
    assert (adapted.batches, adapted.samples, adapted.skipped_batches) == (1, 20, 2)
    assert "2 batches skipped" in str(adapted)
    batchnorm.adapt(other, image())
    assert_same(everything(model), everything(other))


def test_one_value_a_channel_moves_no_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    before = everything(model)
    with pytest.raises(ValueError, match="no batch normalization layer was given more than one value"):
        batchnorm.adapt(model, torch.ones(1, 3))
    assert_same(everything(model), before)
    x = torch.randn(20, 3)
    batchnorm.adapt(model, x.split(1))
    torch.testing.assert_close(model[0].running_var, x.var(0))


def test_models_of_people() -> None:
    torch.manual_seed(0)
    for model in (randomized(ResNet()), randomized(Undecided(nn.ReLU()))):
        x = torch.randn(20, 2, 6, 6) * 3
        adapted = batchnorm.adapt(model, x)
        assert adapted.skipped == {}
        seen: list[Tensor] = []

        def note(layer: Any, given: Any, y: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append((y - layer.bias[:, None, None]) / layer.weight[:, None, None])

        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(note)
        model.eval()(x)
        assert len(seen) == len(adapted.layers)
        for y in seen:  # with the data's own statistics, every layer normalizes the data
            torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(y.shape[1]), atol=1e-4, rtol=0)
            torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(y.shape[1]), atol=1e-2, rtol=0)


def test_transformers_by_tent() -> None:
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not there")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = randomized(transformers.ResNetForImageClassification(config)).eval()
    before = everything(model)
    with batchnorm.adapt(model, {"pixel_values": torch.randn(20, 3, 32, 32)}, method="tent", steps=2) as adapted:
        assert adapted.skipped == {}
        assert len(adapted.layers) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert {shift.learned for shift in adapted.layers.values()} == {"weight and bias"}
    assert_same(everything(model), before)


def test_compiled_models() -> None:
    model, other = network(), network()
    compiled = torch.compile(model, backend="eager")
    compiled(image())
    batchnorm.adapt(compiled, image())
    batchnorm.adapt(other, image())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert not torch.equal(model[1].running_mean, network()[1].running_mean)


def test_inference_mode_and_no_grad() -> None:
    for mode in (torch.inference_mode, torch.no_grad):
        model, other = network(), network()
        x = image()
        with mode():
            batchnorm.adapt(model, x, method="tent")
        batchnorm.adapt(other, x, method="tent")
        assert_same(everything(model), everything(other))


# --- tent's demands ---


class Returns(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.what = nn.BatchNorm1d(4), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.norm(x))


def test_scores_may_be_called_logits() -> None:
    x = torch.randn(20, 4)
    plain, named = Returns(lambda y: y), Returns(lambda y: SimpleNamespace(logits=y))
    for model in (plain, named):
        assert batchnorm.adapt(model, x, method="tent").entropy is not None
    assert torch.equal(plain.norm.weight, named.norm.weight)
    assert not torch.equal(plain.norm.weight, torch.ones(4))


def test_without_scores_tent_is_an_error_and_moments_are_not() -> None:
    for what, said in ((lambda y: [y], "got list"), (lambda y: y.sum(1), r"got Tensor of size \(20,\)")):
        model = Returns(what)
        before = everything(model)
        with pytest.raises(TypeError, match=f"tent needs class scores, .*{said}"):
            batchnorm.adapt(model, torch.randn(20, 4), method="tent")
        assert_same(everything(model), before)
        adapted = batchnorm.adapt(model, torch.randn(20, 4))
        assert (adapted.spread, adapted.entropy) == (None, None)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda y: y * torch.inf, "the entropy is nan at step 1 of batch 1"),
        (lambda y: y.detach(), "depends on no weight"),
    ],
)
def test_entropies_that_teach_nothing(what: Callable[[Tensor], Tensor], said: str) -> None:
    model = Returns(what)
    before = everything(model)
    with pytest.raises(ValueError, match=said):
        batchnorm.adapt(model, torch.randn(20, 4), method="tent")
    assert_same(everything(model), before)


# --- bad calls ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "bayes"}, "method must be one of 'moments', 'alpha', 'tent', got 'bayes'"),
        ({"alpha": 0.5}, "alpha is an option of method='alpha', and the method is 'moments'"),
        ({"method": "tent", "prior": 1}, "prior is an option of method='moments'"),
        ({"prior": -1}, "prior must be 0 or more, and finite, got -1"),
        ({"prior": float("nan")}, "prior must be 0 or more"),
        ({"method": "alpha", "alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"method": "tent", "lr": 0.0}, "lr must be above 0"),
        ({"method": "tent", "steps": 0}, "steps counts Adam's steps"),
        ({"method": "tent", "steps": 1.5}, "steps counts Adam's steps"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batchnorm.adapt(network(), image(), **options)


@pytest.mark.parametrize("options", METHODS, ids=IDS)
def test_data_that_is_none(options: dict[str, Any]) -> None:
    model = network()
    before = everything(model)
    nan = torch.full_like(image(), torch.nan)
    with pytest.raises(ValueError, match="the data has no batches"):
        batchnorm.adapt(model, [], **options)
    with pytest.raises(ValueError, match="none of the 2 batches has finite moments"):
        batchnorm.adapt(model, [nan, nan], **options)
    with pytest.raises(TypeError, match="data must be a tensor, a dict or an iterable of batches, got int"):
        batchnorm.adapt(model, 3, **options)
    with pytest.raises(RuntimeError, match="expected input"):
        batchnorm.adapt(model, [image(), torch.zeros(4, 9, 3, 5)], **options)
    assert_same(everything(model), before)


def test_models_that_have_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="no batch normalization layer"):
        batchnorm.adapt(nn.Linear(2, 2), torch.randn(20, 2))
    with pytest.raises(ValueError, match="it is recurrent"):
        batchnorm.adapt(batchnorm.recurrent.LSTM(2, 3, max_steps=2), torch.randn(2, 20, 2))


def test_batches_that_do_not_say_how_many_samples_they_have() -> None:
    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.x)

    model, other = network(), network()
    adapted = batchnorm.adapt(model, [Batch(image())] * 2, forward=forward, prior=5)
    assert (adapted.batches, adapted.samples) == (2, 2 * len(image()))
    assert adapted.source_share == 5 / (5 + 2 * len(image()))
    batchnorm.adapt(other, [image()] * 2, prior=5)
    assert_same(everything(model), everything(other))


# --- warnings ---


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """The network of the documentation, trained on digits; the forward is ATen's, which needs no compiling."""
    model = build(Arm("batch norm", batch_normalized), 0)
    batchnorm.revert(model)
    for _ in descend(model, digits().train, 0.1, 0, Settings(steps=120, batch=64, every=120)):
        pass
    assert accuracy(model.eval(), digits().test) > 0.9
    return model


def right(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == labels).float().mean().item()


def test_adapting_repairs_contrast(trained: nn.Module) -> None:
    test = digits().test
    x = 0.3 * test.images - 0.5
    before = right(trained, x, test.labels)
    for options in METHODS[:2]:
        with batchnorm.adapt(trained, x, **options) as adapted:  # warnings are errors here
            assert right(trained, x, test.labels) > before + 0.3
        assert adapted.warnings == ()
    assert right(trained, x, test.labels) == before


def test_few_samples_are_warned_of(trained: nn.Module) -> None:
    x = digits().test.images
    with pytest.warns(UserWarning, match=r"adapted to 15 samples, .* noisy as those of 15: below 16"):
        adapted = batchnorm.adapt(trained, x[:15])
    assert len(adapted.warnings) == 1
    adapted.undo()
    with pytest.warns(UserWarning, match="source's share of 50% leaves statistics as noisy as those of 8"):
        batchnorm.adapt(trained, x[:4], method="alpha").undo()
    with batchnorm.adapt(trained, x[:16]), batchnorm.adapt(trained, x[:4], prior=12):
        pass
    with batchnorm.adapt(trained, x[:64].split(4)) as adapted:  # together they are many
        assert adapted.warnings == ()


@pytest.mark.parametrize("options", [{}, {"method": "tent"}], ids=["moments", "tent"])
def test_data_of_one_class_are_warned_of_and_harm(trained: nn.Module, options: dict[str, Any]) -> None:
    test = digits().test
    chosen = (test.labels == 6).nonzero().flatten()[:32]
    x, labels = test.images[chosen], test.labels[chosen]
    before = right(trained, x, labels)
    with pytest.warns(UserWarning, match=r"of 32 predictions were class 6, .* less certain \(entropy 0\.\d\d before"):
        adapted = batchnorm.adapt(trained, x, **options)
    assert adapted.spread is not None
    assert adapted.spread < 0.5
    assert right(trained, x, labels) < before - 0.3
    adapted.undo()
    with batchnorm.adapt(trained, test.images[:32], **options) as adapted:  # of all classes: no warning
        assert right(trained, test.images[:32], test.labels[:32]) > 0.8


def test_a_warning_that_is_an_error_changes_nothing(trained: nn.Module) -> None:
    before = everything(trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="below 16"):
            batchnorm.adapt(trained, digits().test.images[:4])
    assert_same(everything(trained), before)
