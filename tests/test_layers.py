"""The layers take torch.nn's place: signatures, repr, state, checkpoints, conversions, copies, tracers, lazy forms."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels

KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
LAZY = [f"Lazy{kind}" for kind in KINDS]
OPTIONS: list[dict[str, Any]] = [
    {}, {"eps": 1e-3}, {"momentum": None}, {"momentum": 0.3}, {"affine": False}, {"track_running_stats": False},
    {"affine": False, "track_running_stats": False}, {"dtype": torch.float64},
]  # fmt: skip
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
    OPTIONS.append({"bias": False})
BF16 = torch.bfloat16
PAIRS = [(nn, batchnorm), (batchnorm, nn)]


def shape(kind: str, channels: int = 3) -> tuple[int, ...]:
    return (5, channels, *(2, 3, 2)[: int(kind[-2])])


def used(layer: Any, kind: str, batches: int = 2) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(batches):
        layer(torch.randn(shape(kind), generator=generator, dtype=next(layer.parameters(), torch.zeros(())).dtype))
    return layer


def defaults(kind: Any) -> list[tuple[str, Any]]:
    return [
        (name, p.default)
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD,)
    ]


@pytest.mark.parametrize("kind", KINDS + LAZY)
def test_positional_arguments_and_defaults(kind: str) -> None:
    torchs = [item for item in defaults(getattr(nn, kind)) if item[0] != "bias"]
    assert defaults(getattr(batchnorm, kind)) == torchs


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_may_be_positional(kind: str) -> None:
    given = (3, 1e-3, 0.3, False, False, torch.device("cpu"), torch.float64)
    ours, torchs = getattr(batchnorm, kind)(*given), getattr(nn, kind)(*given)
    assert repr(ours) == repr(torchs)
    with pytest.raises(TypeError):
        getattr(batchnorm, kind)(3, unknown=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_repr_state_and_attributes(kind: str, options: dict[str, Any]) -> None:
    ours, torchs = getattr(batchnorm, kind)(3, **options), getattr(nn, kind)(3, **options)
    assert repr(ours) == repr(torchs)
    assert isinstance(ours, getattr(nn, kind))
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    state, expected = ours.state_dict(), torchs.state_dict()
    assert list(state) == list(expected)
    assert state._metadata == expected._metadata
    assert ours._version == torchs._version == 2
    assert all(torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in state)
    public = {name for name in vars(torchs) if not name.startswith("_")}
    assert public <= set(vars(ours))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=["from torch", "to torch"])
def test_checkpoints_load_both_ways(source: Any, target: Any, kind: str, options: dict[str, Any]) -> None:
    trained = used(getattr(source, kind)(3, **options), kind)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = getattr(target, kind)(3, **options)
    assert fresh.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in fresh.state_dict().items())
    x = torch.randn(shape(kind), dtype=options.get("dtype", torch.float32))
    torch.testing.assert_close(fresh.eval()(x), trained.eval()(x))


def test_old_and_incomplete_checkpoints() -> None:
    for package in (nn, batchnorm):
        layer = package.BatchNorm2d(3)
        state = layer.state_dict()
        del state["num_batches_tracked"]
        del state._metadata  # as in version 1
        layer.load_state_dict(state)
        assert layer.num_batches_tracked == 0
        state = package.BatchNorm2d(3).state_dict()
        del state["num_batches_tracked"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "num_batches_tracked"'):
            package.BatchNorm2d(3).load_state_dict(state)
        with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
            package.BatchNorm2d(4).load_state_dict(package.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str) -> None:
    layer = used(getattr(batchnorm, kind)(3, momentum=None), kind)
    layer.own = "kept"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(twin) is type(layer)
        assert twin.own == "kept"
        used(twin, kind, 1)
        assert kernels.ran().forward == "numba"
        assert twin.num_batches_tracked == 3
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("convert", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float16),
    lambda m: m.to(torch.ones(1, dtype=torch.bfloat16)), lambda m: m.bfloat16().half().bfloat16(),
    lambda m: nn.Sequential(nn.Sequential(m)).bfloat16()[0][0],
], ids=["half", "bfloat16", "to", "to_half", "to_tensor", "repeated", "nested"])  # fmt: skip
def test_narrow_layers_keep_wide_statistics_unrounded(convert: Any) -> None:
    layer = used(batchnorm.BatchNorm2d(3), "BatchNorm2d")
    before = [layer.running_mean.clone(), layer.running_var.clone()]
    narrow = convert(layer)
    assert narrow.weight.dtype in (torch.float16, torch.bfloat16)
    assert narrow.num_batches_tracked.dtype == torch.int64
    for found, value in zip((narrow.running_mean, narrow.running_var), before, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, value)
    x = torch.randn(5, 3, 2, 3, dtype=narrow.weight.dtype)
    for training in (True, False):
        assert narrow.train(training)(x).dtype == x.dtype


def test_wide_conversions_and_constructors() -> None:
    layer = used(batchnorm.BatchNorm2d(3), "BatchNorm2d")
    mean = layer.running_mean.double()
    assert torch.equal(layer.double().running_mean, mean)
    assert layer.running_mean.dtype == torch.float64
    assert layer.float().running_var.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        assert batchnorm.BatchNorm2d(3, dtype=dtype).running_mean.dtype == torch.float32
    wide = batchnorm.BatchNorm2d(3, dtype=torch.bfloat16)
    wide.load_state_dict(nn.BatchNorm2d(3, dtype=torch.bfloat16).state_dict())
    assert wide.running_var.dtype == torch.float32


def test_meta_and_to_empty() -> None:
    layer = batchnorm.BatchNorm2d(3, device="meta", dtype=torch.bfloat16)
    assert layer.running_mean.is_meta
    assert layer.running_mean.dtype == torch.float32
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert not layer.running_mean.is_meta
    assert layer(torch.randn(5, 3, 2, 3).bfloat16()).isfinite().all()
    layer.load_state_dict(batchnorm.BatchNorm2d(3).state_dict(), assign=True)
    with torch.device("meta"):
        assert batchnorm.BatchNorm1d(3).bfloat16().running_var.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [lambda m: m, lambda m: m.half(), lambda m: m.to(BF16), lambda m: m.double()
                                    ],
                         ids=["float", "half", "bfloat16", "double"])  # fmt: skip
def test_lazy_layers(kind: str, before: Any) -> None:
    ours, torchs = before(getattr(batchnorm, f"Lazy{kind}")()), before(getattr(nn, f"Lazy{kind}")())
    assert repr(ours) == repr(torchs)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    x = torch.randn(shape(kind)).to(ours.weight.dtype)
    y, right = ours(x), torchs(x)
    assert kernels.ran().forward == ("aten" if x.dtype == torch.float16 else "numba")
    assert type(ours) is getattr(batchnorm, kind)
    assert repr(ours) == repr(torchs)
    assert ours.running_mean.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(y, right, rtol=1e-2 if x.dtype.itemsize == 2 else 1e-5,
                               atol=1e-2 if x.dtype.itemsize == 2 else 1e-5)  # fmt: skip
    assert ours.num_batches_tracked == 1
    loaded = before(getattr(batchnorm, f"Lazy{kind}")())
    loaded.load_state_dict(ours.state_dict())
    assert loaded.weight.shape == (3,)


def test_statistics_switched_off_and_on_later_behave_as_torchs() -> None:
    x = torch.randn(3, 5, 3, 2, 3)
    found = []
    for package in (nn, batchnorm):
        layer, outputs = package.BatchNorm2d(3), []
        for switch, training, batch in (
            (True, True, 0),
            (False, True, 1),
            (False, False, 2),
            (True, False, 1),
            (True, True, 2),
        ):
            layer.track_running_stats = switch
            outputs.append(layer.train(training)(x[batch]))
        late = package.BatchNorm2d(3, track_running_stats=False)
        late.track_running_stats = True
        outputs += [late(x[0]), late.eval()(x[1]), layer.running_mean, layer.running_var, layer.num_batches_tracked]
        layer.reset_running_stats()
        found.append([*outputs, layer.running_mean, layer.num_batches_tracked])
    for ours, torchs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_script_and_trace(training: bool) -> None:
    x = torch.randn(5, 3, 2, 3)
    for make in (torch.jit.script, lambda m: torch.jit.trace(m, x, check_trace=False)):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), batchnorm.BatchNorm2d(3)).train(training)
        made = make(copy.deepcopy(model))
        fresh = copy.deepcopy(model)
        right = fresh(x)
        file = io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(x), right)
        assert type(model[1]) is batchnorm.BatchNorm2d


def test_symbolic_tracing_keeps_the_layer_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), batchnorm.BatchNorm2d(3), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(5, 3, 2, 3)
    torch.testing.assert_close(traced(x), model(x))
    assert kernels.ran().forward == "numba"


def network(package: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), package.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 5))


def losses(model: nn.Module) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(90, 20, generator=generator), torch.randint(5, (90,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history = []
    for step in range(50):
        batch = slice(step % 3 * 30, step % 3 * 30 + 30)
        loss = nn.functional.cross_entropy(model(x[batch]), target[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    history.append(nn.functional.cross_entropy(model.eval()(x), target).item())
    return history


def test_the_textbook_network_with_only_the_import_changed_trains_the_same() -> None:
    ours, torchs = losses(network(batchnorm)), losses(network(nn))
    assert ours == pytest.approx(torchs, abs=1e-5)
    assert torchs[-2] < 0.5 * torchs[0]


def test_hooks_and_subclasses_work() -> None:
    class Named(batchnorm.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    layer, seen = Named(3), []
    layer.register_forward_hook(lambda m, args, out: seen.append(out))
    y = layer(torch.randn(5, 3, 2, 3))
    assert seen[0] is y
    torch.testing.assert_close(y.mean(), torch.tensor(1.0))


def narrowed(state: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint whose every tensor is in half precision, counters included."""
    return {name: t.to(dtype) for name, t in state.items()}


def assigned(layer: nn.Module, dtype: torch.dtype) -> Any:
    layer.load_state_dict(narrowed(layer.state_dict(), dtype), assign=True)
    return layer


def assigned_in_a_model(layer: nn.Module, dtype: torch.dtype) -> Any:
    model = nn.ModuleDict({"a": nn.ModuleList([layer])})
    with torch.device("meta"):
        model.to_empty(device="meta")
    state = {f"a.0.{name}": t for name, t in made(type(layer)).state_dict().items()}
    model.load_state_dict(narrowed(state, dtype), assign=True)
    return model["a"][0]


def loaded(layer: nn.Module, dtype: torch.dtype) -> Any:
    layer.load_state_dict(narrowed(layer.state_dict(), dtype))
    return layer


def swapped(layer: nn.Module, dtype: torch.dtype) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loaded(layer, dtype)
        return layer.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def by_default(layer: nn.Module, dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        return made(type(layer))
    finally:
        torch.set_default_dtype(torch.float32)


def emptied(layer: nn.Module, dtype: torch.dtype) -> Any:
    layer.to("meta").to(dtype).to_empty(device="cpu")
    layer.reset_parameters()  # type: ignore[operator]
    return layer


def set_by_name(layer: nn.Module, dtype: torch.dtype) -> Any:
    for owner in layer.modules():
        for name in ("running_mean", "running_var"):
            if name in owner._buffers:
                setattr(owner, name, getattr(owner, name).to(dtype))
    return layer


WAYS = {
    "to": lambda layer, dtype: layer.to(dtype),
    "apply": lambda layer, dtype: layer._apply(lambda t: t.to(dtype) if t.is_floating_point() else t),
    "assign": assigned,
    "assign in a model on meta": assigned_in_a_model,
    "load": loaded,
    "swap": swapped,
    "default dtype": by_default,
    "to_empty": emptied,
    "attribute": set_by_name,
    "deepcopy": lambda layer, dtype: copy.deepcopy(assigned(layer, dtype)),
    "pickle": lambda layer, dtype: pickle.loads(pickle.dumps(assigned(layer.to(dtype), dtype))),
    "converted": lambda layer, dtype: assigned(layer.to(dtype), dtype),
}
LAYERS: dict[str, Any] = {
    "BatchNorm2d": lambda: batchnorm.BatchNorm2d(3),
    "Renorm": lambda: batchnorm.BatchNorm2d(3, statistics=batchnorm.Renorm()),
    "Accumulated": lambda: batchnorm.BatchNorm2d(3, statistics=batchnorm.Accumulated(2)),
    "DomainBatchNorm": lambda: batchnorm.DomainBatchNorm(3, ("a", "b")),
    "ConditionalBatchNorm": lambda: batchnorm.ConditionalBatchNorm(3, classes=2),
    "LSTM": lambda: batchnorm.recurrent.LSTM(3, 4, max_steps=2),
    "GRU": lambda: batchnorm.recurrent.GRU(3, 4, max_steps=2),
}


def made(kind: Any) -> Any:
    return next(layer for layer in (make() for make in LAYERS.values()) if type(layer) is kind)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_running_statistics_stay_wide_whatever_narrows_a_layer(kind: str, way: str, dtype: torch.dtype) -> None:
    layer = LAYERS[kind]()
    if way == "to_empty" and not hasattr(layer, "reset_parameters"):
        layer.reset_parameters = lambda: [one.reset_parameters() for one in layer.children()]
    values = {name: b for name, b in layer.named_buffers() if "running" in name}
    for number, b in enumerate(values.values()):
        b.fill_(1 + number / 8)
    narrow = WAYS[way](layer, dtype)
    buffers = dict(narrow.named_buffers())
    assert buffers.keys() >= values.keys()
    for name, b in buffers.items():
        counts = name.split("_l0")[0].endswith("batches_tracked") or name.endswith("renorm_batches")
        assert b.dtype == (torch.int64 if counts else torch.float64 if name == "accumulated" else torch.float32), name
        if name in values and way in ("to", "apply", "assign", "load", "swap", "attribute", "deepcopy", "pickle"):
            torch.testing.assert_close(b, values[name], rtol=0, atol=0)


def test_a_half_precision_checkpoint_that_was_assigned_trains_on() -> None:
    """In half precision the statistics would not have moved: 0.001 of the difference is less than half a unit there."""
    layer = assigned(batchnorm.BatchNorm2d(3, momentum=1e-3), BF16)
    assert layer.weight.dtype == BF16
    x = torch.ones(2, 3, 3, 3, dtype=BF16)
    for _ in range(300):
        layer(x)
    assert kernels.ran().forward == "numba"
    torch.testing.assert_close(layer.running_mean, torch.full((3,), 1 - 0.999**300), rtol=1e-4, atol=0)
    assert layer.num_batches_tracked == 300


def test_wide_statistics_set_by_name_are_the_very_tensor() -> None:
    layer = batchnorm.BatchNorm2d(3)
    for dtype in (torch.float32, torch.float64):
        mean = torch.ones(3, dtype=dtype)
        layer.running_mean = mean
        assert layer.running_mean is mean
    layer.running_mean = None
    assert layer.running_mean is None
