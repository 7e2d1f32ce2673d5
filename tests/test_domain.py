"""Domain-specific batch normalization: each domain is a layer of torch.nn's in float64, and the others stay put."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import DomainBatchNorm, kernels
from expected import TORCH, values

F64 = torch.float64
SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 2), (6, 3, 2, 2, 3)]


@pytest.fixture(autouse=True)
def torchs_operators() -> Iterator[None]:
    """The layers choose among layers; that these reach the loops, which take seconds to compile, one test shows."""
    with kernels.using("aten"):
        yield


def made(shared: bool = False, domains: Any = ("a", "b"), **options: Any) -> DomainBatchNorm:
    layer = DomainBatchNorm(3, domains, shared_affine=shared, dtype=F64, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.rand(3, generator=generator, dtype=F64) + 0.5
    layer._tie()
    return layer


def twin(layer: DomainBatchNorm, name: str, rank: int) -> Any:
    """torch.nn's layer with the state of one domain."""
    right = TORCH[rank](3, dtype=F64)
    right.load_state_dict(layer.of(name).state_dict())
    return right.train(layer.training)


def assert_state(layer: Any, right: Any) -> None:
    for (key, found), expected in zip(layer.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def assert_unmoved(layer: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


# --- values ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own affine", "shared affine"])
def test_each_domain_is_a_layer_of_its_own(shared: bool, shape: tuple[int, ...]) -> None:
    layer = made(shared)
    rights = {name: twin(layer, name, len(shape)) for name in "ab"}
    for step, name in enumerate("abb"):
        x = values(shape, step).clone().requires_grad_()
        again = x.detach().clone().requires_grad_()
        grad = values(shape, 10 + step)
        layer.zero_grad()
        rights[name].zero_grad()
        y, right = layer(x, domain=name), rights[name](again)
        y.backward(grad)
        right.backward(grad)
        torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-9, atol=1e-9)
        one = layer.of(name)
        torch.testing.assert_close(one.weight.grad, rights[name].weight.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(one.bias.grad, rights[name].bias.grad, rtol=1e-9, atol=1e-9)
        other = layer.of("b" if name == "a" else "a")
        assert (other.weight is one.weight) == shared
        assert shared or other.weight.grad is None
    for name, right in rights.items():
        assert_state(layer.of(name), right)
        layer.eval()
        x = values(shape, 7)
        torch.testing.assert_close(layer(x, domain=name), right.eval()(x), rtol=1e-10, atol=1e-10)
    assert layer.of("a").num_batches_tracked == 1
    assert layer.of("b").num_batches_tracked == 2


def test_the_loops_serve_it() -> None:
    layer, x = DomainBatchNorm(3, ("a", "b")), values(SHAPES[1], 0).float()
    with kernels.using("numba"):
        y = layer(x, domain="b")
    assert kernels.ran().forward == "numba"
    torch.testing.assert_close(y, nn.BatchNorm1d(3)(x), rtol=1e-5, atol=1e-5)


def test_residual_and_activation() -> None:
    layer = made(activation="silu")
    x, skip = values(SHAPES[2], 0), values(SHAPES[2], 1)
    torch.testing.assert_close(layer(x, skip, domain="b"), F.silu(twin(made(), "b", 4)(x) + skip))


@pytest.mark.parametrize("names", [list("abacbacc"), torch.tensor([5, 7, 5, 9, 7, 5, 9, 9])], ids=["list", "tensor"])
def test_a_batch_of_several_domains_is_each_by_itself(names: Any) -> None:
    listed = names if isinstance(names, list) else names.tolist()
    layer = made(domains=sorted(set(listed)), activation="relu")
    apart = copy.deepcopy(layer)
    x = values((8, 3, 4, 2), 0).to(memory_format=torch.channels_last).requires_grad_()
    skip, grad = values((8, 3, 4, 2), 1), values((8, 3, 4, 2), 2)
    y = layer(x, skip, domain=names)
    assert y.stride() == x.stride()
    (found,) = torch.autograd.grad(y, x, grad)
    for name in set(listed):
        rows = [row for row, other in enumerate(listed) if other == name]
        part = x.detach()[rows].clone().requires_grad_()
        right = apart(part, skip[rows], domain=name)
        torch.testing.assert_close(y[rows], right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[rows], *torch.autograd.grad(right, part, grad[rows]), rtol=1e-10, atol=1e-10)
    assert_state(layer, apart)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_any_mixture_equals_its_parts(names: list[str]) -> None:
    layer = made(domains="abc")
    apart, x = copy.deepcopy(layer), values((9, 3, 2), 0)[: len(names)]
    y = layer(x, domain=names)
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        torch.testing.assert_close(y[rows], apart(x[rows], domain=name), rtol=1e-12, atol=1e-12)
    assert_state(layer, apart)


@pytest.mark.parametrize("domain", ["b", ["a", "b", "b", "a", "a"]], ids=["one", "mixed"])
def test_gradients(domain: Any) -> None:
    layer = made(True)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        state = {"domain_a.weight": weight, "domain_b.weight": weight}
        return torch.func.functional_call(layer, state, (x,), {"domain": domain})

    leaves = values((5, 3), 0).clone().requires_grad_(), torch.rand(3, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


# --- which domain ---


def test_the_context_reaches_deep_layers_and_the_argument_wins() -> None:
    layer = made()
    model = nn.Sequential(nn.Sequential(layer), nn.ReLU())
    with batchnorm.domain("a"):
        model(values((6, 3), 0))
        with batchnorm.domain("b"):
            model(values((6, 3), 0))
            layer(values((6, 3), 0), domain="a")
        model(values((6, 3), 0))
    assert [layer.of(name).num_batches_tracked.item() for name in "ab"] == [3, 1]
    with pytest.raises(ZeroDivisionError), batchnorm.domain("a"):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match=r"which domain\?.*the domains are 'a', 'b'"):
        model(values((6, 3), 0))


def test_the_context_is_a_threads_own() -> None:
    layer, errors = made(), []

    def elsewhere() -> None:
        try:
            layer(values((6, 3), 0))
        except RuntimeError as error:
            errors.append(str(error))

    with batchnorm.domain("a"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "which domain?" in errors[0]


def test_whole_numbers_stand_for_their_digits() -> None:
    layer = made(domains=(0, 1))
    assert layer.domains == ("0", "1")
    assert layer.of(1) is layer.of("1")
    layer(values((6, 3), 0), domain=0)
    assert layer.of(0).num_batches_tracked == 1


@pytest.mark.parametrize("name", ["train", "half", "keys", "a domain", "forward", "domain_"])
def test_any_name_goes(name: str) -> None:
    layer = made(domains=(name, "other"))
    layer(values((6, 3), 0), domain=name)
    assert layer.of(name).num_batches_tracked == 1
    assert layer.domains == (name, "other")
    assert f"domain_{name}.running_mean" in layer.state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"domain": "c"}, r"unknown domain 'c': the domains are 'a', 'b'"),
        ({"domain": ["a"] * 5 + ["c"]}, r"unknown domain 'c'"),
        ({"domain": ["a", "b"]}, r"2 domains for the 6 samples of an input of size \(6, 3\)"),
        ({"domain": torch.tensor(1)}, r"a scalar tensor instead of domains for the 6 samples"),
        ({"domain": ["a"] * 5 + ["b"]}, r"more than 1 value per channel.*1 sample of domain 'b'.*\(6, 3\)"),
    ],
)
def test_errors_leave_everything_as_it_was(call: Any, message: str) -> None:
    layer = made()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=message):
        layer(values((6, 3), 0), **call)
    assert_unmoved(layer, before)


def test_a_single_sample_of_a_domain_is_enough_where_it_has_space_or_in_evaluation() -> None:
    layer, names = made(), ["a"] * 5 + ["b"]
    assert layer(values((6, 3, 5), 0), domain=names).isfinite().all()
    assert layer.eval()(values((6, 3), 0), domain=names).isfinite().all()


@pytest.mark.parametrize("domains", [(), ("a", "a"), (1, "1"), ("a.b",), ("",), (None,), (True,)], ids=str)
def test_unusable_names(domains: Any) -> None:
    for make in (lambda: DomainBatchNorm(3, domains), lambda: batchnorm.split_domains(nn.BatchNorm1d(3), domains)):
        with pytest.raises(ValueError, match="domain"):
            make()


def test_input_of_a_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"expected 2D to 5D input \(got 1D input of size \(3,\)\)"):
        made()(torch.randn(3, dtype=F64), domain="a")
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
        made()(torch.randn(5, 4, dtype=F64), domain="a")


# --- new domains ---


@pytest.mark.parametrize("shared", [False, True], ids=["own affine", "shared affine"])
def test_a_new_domain_starts_as_a_copy_and_goes_its_own_way(shared: bool) -> None:
    layer = made(shared)
    layer(values((6, 3), 0), domain="b")
    layer.eval()
    layer.add_domain("c", like="b")
    assert layer.domains == ("a", "b", "c")
    x = values((6, 3), 1)
    assert torch.equal(layer(x, domain="c"), layer(x, domain="b"))
    before = snapshot(layer.of("b"))
    layer.train()(x, domain="c")
    assert_unmoved(layer.of("b"), before)
    assert layer.of("c").num_batches_tracked == 2
    assert len(list(layer.parameters())) == (2 if shared else 6)
    for name, like, message in (("c", "a", "there already"), ("d", "e", "unknown domain 'e'")):
        with pytest.raises(ValueError, match=message):
            layer.add_domain(name, like)
    assert layer.domains == ("a", "b", "c")


def test_a_new_domain_for_a_whole_model_or_none() -> None:
    model = nn.Sequential(made(), nn.ReLU(), made())
    assert batchnorm.add_domain(model, "c", like="a") == ["0", "2"]
    model[2].add_domain("d", like="a")
    with pytest.raises(ValueError, match="layer '2'"):
        batchnorm.add_domain(model, "d", like="a")
    assert model[0].domains == ("a", "b", "c")
    with pytest.raises(ValueError, match="no DomainBatchNorm"):
        batchnorm.add_domain(nn.Linear(2, 2), "a", like="b")


# --- state ---


@pytest.mark.parametrize("shared", [False, True], ids=["own affine", "shared affine"])
def test_copies_and_checkpoints(shared: bool, tmp_path: Path) -> None:
    layer = made(shared)
    layer(values((6, 3), 0), domain="b")
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, assigned = (DomainBatchNorm(3, ("a", "b"), shared_affine=shared, dtype=F64) for _ in range(2))
    fresh.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    unborn = DomainBatchNorm(3, ("a", "b"), shared_affine=shared, dtype=F64, device="meta")
    empty = unborn.to_empty(device="cpu")  # for which torch makes new parameters
    assert (empty.of("a").weight is empty.of("b").weight) == shared
    empty.load_state_dict(state)
    x = values((6, 3), 1)
    for other in (fresh, assigned, empty, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_unmoved(other, state)
        assert (other.of("a").weight is other.of("b").weight) == shared
        torch.testing.assert_close(other.eval()(x, domain="b"), copy.deepcopy(layer).eval()(x, domain="b"))
    assert list(state)[-5:] == [
        f"domain_b.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


def test_checkpoints_that_do_not_fit_say_why() -> None:
    two, three = nn.Sequential(made()), nn.Sequential(made(domains=("a", "b", "c")))
    with pytest.raises(RuntimeError, match=r"0: the checkpoint has the domains \['a', 'b', 'c'\].*add_domain first"):
        two.load_state_dict(three.state_dict())
    with pytest.raises(RuntimeError, match="load it before other domains are made"):
        three.load_state_dict(two.state_dict())
    with pytest.raises(RuntimeError, match="the checkpoint has no domains: load it first, then split_domains"):
        two.load_state_dict(nn.Sequential(nn.BatchNorm1d(3)).state_dict())
    with pytest.raises(RuntimeError, match="each domain of the checkpoint has its own weight"):
        made(True).load_state_dict(made().state_dict())
    batchnorm.add_domain(two, "c", like="a")
    two.load_state_dict(three.state_dict())
    assert_unmoved(two, three.state_dict())


def test_half_keeps_statistics_wide() -> None:
    layer = DomainBatchNorm(3, ("a", "b"), shared_affine=True)
    layer(1000 + torch.randn(6, 3), domain="a")
    before = layer.of("a").running_mean.clone()
    layer.bfloat16()
    assert layer.of("a").weight.dtype == layer.of("b").weight.dtype == torch.bfloat16
    assert layer.of("a").weight is layer.of("b").weight
    assert torch.equal(layer.of("a").running_mean, before)
    assert layer(torch.randn(6, 3).bfloat16(), domain="a").dtype == torch.bfloat16


# --- whole models ---


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), batchnorm.BatchNorm2d(3)).double()
    for _ in range(2):
        model(values((6, 2, 3, 3), 0))
    return model


@pytest.mark.parametrize("shared", [False, True], ids=["own affine", "shared affine"])
def test_split_models_start_from_the_trained_values(shared: bool) -> None:
    model, x = trained(), values((6, 2, 3, 3), 1)
    plain, layers, first = copy.deepcopy(model), list(model), model[1].weight
    seen: list[nn.Module] = []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(module))
    report = batchnorm.split_domains(model, ("source", "target"), shared_affine=shared)
    assert report.converted == {"1": "DomainBatchNorm", "3": "DomainBatchNorm"}
    assert report.skipped == {}
    assert list(model) == layers
    assert model[1].of("source").weight is first
    for name in ("source", "target"):
        with batchnorm.domain(name):
            torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(model.train()(x), copy.deepcopy(plain).train()(x), rtol=1e-12, atol=1e-12)
    assert seen == [model[1]] * 4
    handle.remove()
    with batchnorm.domain("source"):
        model(x)
    assert len(seen) == 4
    again = batchnorm.split_domains(model, ("source", "target"))
    assert again.converted == {}
    assert again.skipped == dict.fromkeys(("1", "3"), "it has domains already: add_domain")
    assert model[1].of("target").num_batches_tracked == 3


def test_one_layer_at_a_time() -> None:
    layer = nn.BatchNorm2d(3, momentum=0.5, dtype=F64)
    layer(values((6, 3, 2, 2), 0))
    right = copy.deepcopy(layer).eval()
    split = DomainBatchNorm.from_layer(layer.eval(), "ab")
    x = values((6, 3, 2, 2), 1)
    torch.testing.assert_close(split(x, domain="b"), right(x), rtol=1e-12, atol=1e-12)
    assert split.of("b").momentum == 0.5
    assert not split.training
    assert DomainBatchNorm.from_layer(nn.BatchNorm1d(3).half(), "a").of("a").running_var.dtype == torch.float32
    for other in (nn.SyncBatchNorm(3), nn.GroupNorm(1, 3)):
        with pytest.raises(TypeError, match=type(other).__name__):
            DomainBatchNorm.from_layer(other, "a")


def test_a_model_that_is_one_layer_and_a_shared_layer() -> None:
    alone, shared = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert batchnorm.split_domains(alone, ("a",)).converted == {"": "DomainBatchNorm"}
    assert isinstance(alone, DomainBatchNorm)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(batchnorm.split_domains(model, ("a", "b")).converted) == ["0"]
    with batchnorm.domain("b"):
        model(torch.randn(6, 3))
    assert shared.of("b").num_batches_tracked == 2


def test_what_cannot_be_split_is_left_with_the_reason() -> None:
    class Own(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.ModuleList([Own(3), nn.LazyBatchNorm1d(), nn.SyncBatchNorm(3), nn.BatchNorm1d(3)])
    prune.random_unstructured(model[3], "weight", amount=1)
    skipped = batchnorm.split_domains(model, ("a",)).skipped
    assert [type(module) for module in model] == [Own, nn.LazyBatchNorm1d, nn.SyncBatchNorm, nn.BatchNorm1d]
    for reason, part in zip(
        skipped.values(), ("subclass", "run the model once", "all processes", "pruned"), strict=True
    ):
        assert part in reason


def test_fused_models_are_refused_and_domains_are_not_fused() -> None:
    fused = batchnorm.fuse(trained()).model
    before = repr(fused)
    with pytest.raises(ValueError, match="revert"):
        batchnorm.split_domains(fused, ("a", "b"))
    assert repr(fused) == before
    model = trained()
    batchnorm.split_domains(model, ("a", "b"))
    with batchnorm.domain("a"):
        result = batchnorm.fuse(model, values((6, 2, 3, 3), 0))
    assert result.fused == {}
    assert isinstance(result.model[2], nn.ReLU)


def test_torch_fx_records_a_call_of_the_whole_layer() -> None:
    model = trained()
    batchnorm.split_domains(model, ("a", "b"))
    with batchnorm.domain("b"):
        traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    traced(values((6, 2, 3, 3), 0))
    assert model[1].of("b").num_batches_tracked == 3


# --- compilers, checkpointing, ranks ---


def test_compiled_in_one_graph_for_each_domain() -> None:
    layer = made()
    owner = copy.deepcopy(layer)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    for step, name in enumerate("abab"):
        x = values((6, 3, 5), step).clone().requires_grad_()
        with batchnorm.domain(name):
            y, again = layer(x), compiled(x)
        given = compiled(values((6, 3, 5), 9), domain=name)
        torch.testing.assert_close(given, layer(values((6, 3, 5), 9), domain=name))
        torch.testing.assert_close(again, y)
        for found, right in zip(*(torch.autograd.grad(out.square().sum(), x) for out in (again, y)), strict=True):
            torch.testing.assert_close(found, right)
    assert_state(owner, layer)
    with pytest.raises(Exception, match="which domain"):
        compiled(x)


def test_checkpointed_within_the_context() -> None:
    layer = made()
    plain = copy.deepcopy(layer)
    x, again = (values((6, 3), 0).clone().requires_grad_() for _ in range(2))
    plain(x, domain="b").square().sum().backward()
    with batchnorm.domain("b"):
        checkpoint(layer, again, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(again.grad, x.grad)
    assert_state(layer, plain)
    with batchnorm.domain("b"):
        y = checkpoint(layer, again, use_reentrant=False)
    with pytest.raises(RuntimeError, match="activation checkpointing: the backward, too"):
        y.sum().backward()


def train_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), DomainBatchNorm(3, ("a", "b")), nn.ReLU())
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for step, name in enumerate("aba"):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            optimizer.zero_grad()
            with kernels.using("aten"), batchnorm.domain(name):  # a process of its own, where no fixture is
                parallel(x).square().mean().backward()
            optimizer.step()
        torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow  # starts processes; test_training has the same for the other layers
def test_data_parallel_ranks_agree(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_a_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in first.items():
        if key.endswith(("weight", "bias")):
            assert torch.equal(value, second[key])
    assert [first[f"1.domain_{name}.num_batches_tracked"].item() for name in "ab"] == [2, 1]
    assert (first["1.domain_a.weight"] != 1).any()
    assert (first["1.domain_b.weight"] != 1).any()


# --- learning ---


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # here, since each rank above imports this module

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48))
    model.extend([nn.ReLU(), nn.Linear(48, 10)])
    batchnorm.convert(model)
    return model


def train(model: nn.Module, digits: tuple[Tensor, Tensor], views: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Batches of one domain after the other."""
    images, labels = digits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(2)
    for _ in range(120):
        rows = torch.randint(1200, (64,), generator=generator)
        for name, view in views.items():
            with batchnorm.domain(name):
                loss = F.cross_entropy(model(view(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def accuracy(model: nn.Module, digits: tuple[Tensor, Tensor], name: str, view: Callable[[Tensor], Tensor]) -> float:
    images, labels = digits[0][1200:], digits[1][1200:]
    with batchnorm.domain(name), torch.no_grad():
        return (model(view(images)).argmax(1) == labels).double().mean().item()


def test_two_domains_are_learned_by_one_network(digits: Any, threads: Callable[[int], None]) -> None:
    """Digits and inverted digits, in batches of their own: no one set of running statistics describes both."""
    threads(1)
    views: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda x: x, "inverted": lambda x: 1 - x}
    one, split = network(), network()
    batchnorm.split_domains(split, views)
    found = {}
    for name, model in (("one", one), ("split", split)):
        train(model, digits, views)
        found[name] = [accuracy(model, digits, *view) for view in views.items()]
    assert min(found["split"]) > 0.93, found
    assert sum(found["split"]) > sum(found["one"]) + 0.1, found


def test_statistics_alone_carry_a_network_to_a_new_domain(digits: Any, threads: Callable[[int], None]) -> None:
    """Images of less contrast and more light: the first layer's outputs are scaled and shifted, which moments undo."""
    threads(1)
    model = network()
    train(model, digits, {"source": lambda x: x})
    batchnorm.split_domains(model, ("source", "target"), shared_affine=True)

    def dim(x: Tensor) -> Tensor:
        return 0.5 * x + 1

    before = accuracy(model, digits, "target", dim)
    state = snapshot(model)
    model.train()
    with batchnorm.domain("target"), torch.no_grad():
        for start in range(0, 1200, 60):
            model(dim(digits[0][start : start + 60]))
    model.eval()
    assert before < 0.6
    assert accuracy(model, digits, "target", dim) > 0.9
    kept = [key for key in state if "target.running" not in key and "target.num" not in key]
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in kept)


# --- the page ---

PAGE = Path(__file__).parents[1] / "docs" / "domains.md"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_examples_of_the_page(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert names["loss"] > 0
    assert names["y"].isfinite().all()
    if "model" in names:
        layer = names["model"][1]
        assert layer.domains == ("source", "target", "clinic")
        assert [layer.of(name).num_batches_tracked.item() for name in layer.domains] == [3, 3, 3]
        assert (layer.of("target").running_var > layer.of("source").running_var).all()


def test_masks_reach_the_layer_of_each_domain() -> None:
    layer = DomainBatchNorm(3, ("a", "b"), dtype=torch.float64)
    alone = {name: copy.deepcopy(layer.of(name)) for name in layer.domains}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    names = ["a", "b", "b", "a", "b", "a"]
    with kernels.using("reference"):
        y = layer(x, mask=mask, domain=names)
        for name, own in alone.items():
            rows = torch.tensor([row for row, other in enumerate(names) if other == name])
            torch.testing.assert_close(y[rows], own(x[rows], mask=mask[rows]))
            assert torch.equal(layer.of(name).running_var, own.running_var)
        with pytest.raises(RuntimeError, match=r"mask should have size \(6, 5\)"):
            layer(x, mask=mask.T, domain=names)
