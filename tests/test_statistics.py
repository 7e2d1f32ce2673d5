"""Policies as values, and layers that have one: copies, checkpoints, lazy forms, conversion, tracers, the compiler."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import Accumulated, Batch, Ghost, Moments, Renorm, Sync, Warmup, kernels
from batchnorm.functional import batch_norm
from batchnorm.statistics import Policy, resolve
from expected import laid

POLICIES: list[Policy] = [
    Ghost(3), Renorm(2.0, 1.0, Warmup(1, 3, 4)), Renorm(schedule=None), Accumulated(2), Accumulated(2, over=Ghost(3)),
]  # fmt: skip
SHAPE = (7, 9, 6, 7)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def used(policy: Policy | None, batches: int = 1, **options: Any) -> Any:
    layer = batchnorm.BatchNorm2d(9, statistics=policy, **options)
    for seed in range(batches):
        layer(laid(SHAPE, seed, next(layer.parameters()).dtype))
    return layer


def same_next_step(a: Any, b: Any) -> None:
    """Both do the same with one more batch, and remember the same of it."""
    x = laid(SHAPE, 9, torch.float32)
    assert torch.equal(a(x), b(x))
    assert [name for name, _ in a.named_buffers()] == [name for name, _ in b.named_buffers()]
    assert all(torch.equal(one, other) for one, other in zip(a.buffers(), b.buffers(), strict=True))


# --- values ---


@pytest.mark.parametrize("policy", [*POLICIES, Batch(), Sync(), Renorm(over=Sync())], ids=str)
def test_a_policy_is_a_value(policy: Policy) -> None:
    for twin in (copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin == policy
        assert hash(twin) == hash(policy)
        assert repr(twin) == repr(policy)
    with pytest.raises(AttributeError):
        policy.size = 5  # type: ignore[attr-defined]
    assert policy != Ghost(99)


def test_what_policies_say_of_themselves() -> None:
    assert repr(Ghost(16)) == "Ghost(size=16)"
    assert repr(Accumulated(4, over=Ghost(2))) == "Accumulated(steps=4, over=Ghost(size=2))"
    assert repr(batchnorm.BatchNorm2d(3, statistics=Ghost(16))).endswith(", statistics=Ghost(size=16))")
    assert repr(batchnorm.BatchNorm2d(3, statistics=Batch())) == repr(nn.BatchNorm2d(3))
    assert "statistics" not in repr(batchnorm.BatchNorm2d(3))


def test_parts_of_policies() -> None:
    assert resolve(Accumulated(2, over=Ghost(3))).ghost == Ghost(3)
    assert resolve(Renorm(over=Sync())).sync == Sync()
    assert resolve(Renorm()).ghost is None
    assert resolve(None).ghost is None


def test_a_ghost_over_all_processes_cannot_be() -> None:
    with pytest.raises(ValueError, match="Ghost cannot be over Sync"):
        Ghost(2, over=Sync())


def test_names_at_the_top() -> None:
    for name in ("Accumulated", "Batch", "Ghost", "Renorm", "Sync", "Warmup"):
        assert getattr(batchnorm, name) is getattr(batchnorm.statistics, name)
        assert name in dir(batchnorm)
    assert batchnorm.mask_from_lengths(torch.tensor([1])).all()


# --- layers ---


def test_setting_a_policy_replaces_what_is_remembered() -> None:
    layer = batchnorm.BatchNorm2d(9)
    assert layer.statistics == Batch()
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    for policy, more in ((Renorm(), ["renorm_batches"]), (Accumulated(2), ["accumulated"]), (Ghost(3), []), (None, [])):
        layer.statistics = policy
        assert layer.statistics == (policy or Batch())
        assert [name for name, _ in layer.named_buffers()] == buffers + more
        kept = ["weight", "bias", *buffers, *(name for name in more if name == "renorm_batches")]
        assert list(layer.state_dict()) == kept
    layer.statistics = Renorm(schedule=None)
    layer(laid(SHAPE, 0, torch.float32))
    layer.statistics = Renorm()
    assert layer.renorm_batches == 0


@pytest.mark.parametrize("policy", ["Ghost", Ghost, 16])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(TypeError, match="statistics must be a policy"):
        batchnorm.BatchNorm2d(9, statistics=policy)
    layer = used(Renorm())
    with pytest.raises(TypeError, match="statistics must be a policy"):
        layer.statistics = policy
    assert layer.renorm_batches == 1
    model = nn.Sequential(nn.BatchNorm2d(9), nn.BatchNorm2d(9))
    with pytest.raises(TypeError, match="statistics must be a policy"):
        batchnorm.convert(model, statistics=policy)
    assert all(type(layer) is nn.BatchNorm2d for layer in model)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_copies_and_checkpoints(policy: Policy) -> None:
    layer = used(policy)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.statistics == policy
        same_next_step(twin, copy.deepcopy(layer))
    fresh = batchnorm.BatchNorm2d(9, statistics=policy)
    assert list(fresh.state_dict()) == list(layer.state_dict())
    fresh.load_state_dict(layer.state_dict())
    if not policy.persistent and policy.buffer is not None:
        layer.accumulated.zero_()  # which is not kept
    same_next_step(fresh, layer)


@pytest.mark.parametrize("given", ["nothing", "residual", "mask", "both"])
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=str)
def test_lazy_layers(policy: Policy | None, given: str) -> None:
    lazy, eager = batchnorm.LazyBatchNorm2d(statistics=policy), batchnorm.BatchNorm2d(9, statistics=policy)
    assert ("statistics" in repr(lazy)) == (policy is not None)
    x, residual = (laid(SHAPE, seed, torch.float32) for seed in range(2))
    arguments = (x, residual) if given in ("residual", "both") else (x,)
    more = {"mask": torch.rand(7, 6, 7) < 0.6} if given in ("mask", "both") else {}
    assert torch.equal(lazy(*arguments, **more), eager(*arguments, **more))
    assert type(lazy) is batchnorm.BatchNorm2d
    assert repr(lazy) == repr(eager)
    same_next_step(lazy, eager)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_lazy_layer_that_loads_a_checkpoint_first(policy: Policy) -> None:
    trained = used(policy, 2)  # whole batches, where they are accumulated
    lazy = batchnorm.LazyBatchNorm2d(statistics=policy)
    lazy.load_state_dict(trained.state_dict())
    same_next_step(lazy, trained)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_conversion_there_and_back(policy: Policy) -> None:
    model = nn.Sequential(
        nn.Conv2d(9, 9, 1), nn.BatchNorm2d(9), nn.ReLU(), batchnorm.BatchNorm2d(9), nn.LazyBatchNorm2d()
    )
    names = list(model.state_dict())
    report = batchnorm.convert(model, statistics=policy)
    assert report.converted == {
        "1": f"BatchNorm2d, {policy}", "3": f"BatchNorm2d, {policy}", "4": f"LazyBatchNorm2d, {policy}",
    }  # fmt: skip
    assert [model[i].statistics for i in (1, 3, 4)] == [policy] * 3
    x = laid(SHAPE, 0, torch.float32)
    model(x)
    assert batchnorm.convert(model).converted == {}
    assert model[1].statistics == policy
    assert batchnorm.revert(model).skipped == {}
    assert type(model[1]) is type(model[3]) is type(model[4]) is nn.BatchNorm2d
    assert list(model.state_dict()) == names
    assert "statistics" not in repr(model)
    model(x)
    assert model[1].num_batches_tracked > 1 or isinstance(policy, Accumulated)
    assert b"batchnorm.layers" not in pickle.dumps(model)


def test_fused_layers_keep_their_policy() -> None:
    model = nn.Sequential(nn.Conv2d(9, 9, 1), batchnorm.BatchNorm2d(9, statistics=Ghost(3)), nn.ReLU())
    x = laid(SHAPE, 0, torch.float32)
    right = copy.deepcopy(model)(x)
    fused = batchnorm.fuse(model).model
    assert "activation=relu, statistics=Ghost(size=3)" in repr(fused)
    torch.testing.assert_close(fused(x), right)
    assert fused[1].num_batches_tracked == 3


class Padded(nn.Module):
    """A layer, and what is known of the padding of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.sin(self.layer(torch.cos(x), mask=mask))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_symbolic_tracing_sees_one_call_with_its_mask(residual: bool) -> None:
    class Block(Padded):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x, x, mask) if residual else self.layer(x, mask=mask)

    layer = batchnorm.BatchNorm2d(9, statistics=Ghost(3))
    traced = torch.fx.symbolic_trace(Block(layer))
    x, mask = laid(SHAPE, 0, torch.float32), torch.rand(7, 6, 7) < 0.6
    assert [node.target for node in traced.graph.nodes if node.op in ("call_module", "get_attr")] == ["layer"]
    right = copy.deepcopy(layer)(x, x if residual else None, mask)
    assert torch.equal(traced(x, mask), right)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_traced_by_torchscript(training: bool) -> None:
    layer = used(Ghost(3)).train(training)
    x, mask = laid(SHAPE, 0, torch.float32), torch.rand(7, 6, 7) < 0.6
    right = Padded(copy.deepcopy(layer))(x, mask)
    traced = torch.jit.trace(Padded(layer), (x, mask), check_trace=False)
    torch.testing.assert_close(traced(x, mask), right, rtol=1e-5, atol=1e-5)


# --- the compiler ---

COMPILING = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


def marked(test: Any) -> Any:
    for mark in COMPILING:
        test = mark(test)
    return test


def assert_equal_steps(eager: Any, compiled: Any, owner: Any, masks: list[Tensor | None]) -> None:
    """Outputs, gradients and buffers of a few steps, the third of which is of another size."""
    for seed, (shape, mask) in enumerate(zip((SHAPE, SHAPE, (5, *SHAPE[1:]), SHAPE), masks, strict=False)):
        results = []
        for call, module in ((eager, eager), (compiled, owner)):
            x = laid(shape, seed, torch.float32).clone().requires_grad_()
            module.zero_grad()
            y = call(x) if mask is None else call(x, mask=mask)
            y.square().sum().backward()
            grads = [x.grad, *(p.grad for p in module.parameters())]
            results.append([y.detach(), *grads, *(b.clone() for b in module.buffers())])
        for found, right in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@marked
@pytest.mark.parametrize(
    ("policy", "masked"), [(Ghost(3), False), (POLICIES[1], False), (POLICIES[-1], False), (None, True)], ids=str
)
def test_compiled_whole_equals_eager(policy: Policy | None, masked: bool) -> None:
    eager = batchnorm.BatchNorm2d(9, statistics=policy, activation="relu")
    owner = copy.deepcopy(eager)
    compiled = torch.compile(owner, fullgraph=True, backend="aot_eager")
    sizes = (7, 7, 5, 7)
    masks = [torch.rand(n, 6, 7, generator=torch.Generator().manual_seed(n)) < 0.6 if masked else None for n in sizes]
    assert_equal_steps(eager, compiled, owner, masks)
    assert_equal_steps(eager.eval(), compiled, owner.eval(), masks[:1])


@marked
def test_compiled_by_inductor() -> None:
    """Whose backward finds again what it can from the inputs: not r and d, whose running statistics have moved."""
    eager = batchnorm.BatchNorm2d(9, statistics=Renorm(schedule=None), momentum=None)
    owner = copy.deepcopy(eager)
    weights: list[Tensor | None] = [torch.rand(7, 6, 7).round(decimals=1) for _ in range(2)]
    assert_equal_steps(eager, torch.compile(owner, fullgraph=True), owner, weights)


@marked
def test_exported_with_a_mask() -> None:
    model = Padded(used(Ghost(3))).eval()
    x, mask = laid(SHAPE, 0, torch.float32), torch.rand(7, 6, 7) < 0.6
    right = model(x, mask)
    program = torch.export.export(model, (x, mask))
    torch.testing.assert_close(program.module()(x, mask), right)
    training = Padded(used(Renorm(schedule=None)))
    exported = torch.export.export(copy.deepcopy(training), (x, mask)).module()
    torch.testing.assert_close(exported(x, mask), training(x, mask), rtol=1e-5, atol=1e-5)
    assert exported.layer.num_batches_tracked == training.layer.num_batches_tracked == 2


@marked
def test_exported_to_onnx_with_a_mask() -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = Padded(used(Ghost(3))).eval()
    x, mask = laid(SHAPE, 0, torch.float32), torch.rand(7, 6, 7) < 0.6
    program = torch.onnx.export(model, (x, mask), dynamo=True, verbose=False)
    assert program is not None
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    hidden = np.where(mask.numpy()[:, None], x.numpy(), np.nan)  # to the runtime, too, padding is nothing
    (y,) = session.run(None, dict(zip(names, (hidden, mask.numpy()), strict=True)))
    torch.testing.assert_close(torch.from_numpy(y), model(x, mask).detach(), rtol=1e-5, atol=1e-5)


# --- the function ---


@pytest.mark.parametrize("kernel", ["numba", "reference"])
def test_the_function_takes_policies(kernel: Any) -> None:
    x = laid(SHAPE, 0, torch.float32)
    for policy in POLICIES:
        layer = batchnorm.BatchNorm2d(9, statistics=policy)
        mean, var, batches = torch.zeros(9), torch.ones(9), torch.tensor(0)
        state = policy.state(9)
        for _ in range(3):
            with kernels.using(kernel):
                y = batch_norm(
                    x, mean, var, None, None, True, num_batches_tracked=batches, statistics=policy, state=state
                )
                torch.testing.assert_close(y, layer(x).detach())
        for ours, buffer in zip((mean, var, batches, state), layer.buffers(), strict=False):
            assert torch.equal(ours, buffer)


def test_a_counter_of_another_kind_is_counted_too() -> None:
    for dtype in (torch.int32, torch.float32):
        neighbours = torch.zeros(4, dtype=dtype)
        mean, var = torch.zeros(9), torch.ones(9)
        x = laid(SHAPE, 0, torch.float32)
        batch_norm(x, mean, var, training=True, num_batches_tracked=neighbours[1], statistics=Ghost(3))
        assert neighbours.tolist() == [0, 3, 0, 0]


def test_statistics_of_another_dtype_or_layout_move() -> None:
    x = laid(SHAPE, 0, torch.float32)
    right = used(Ghost(3))
    for buffers in ((torch.zeros(9).double(), torch.ones(9).double()), (torch.zeros(18)[::2], torch.ones(18)[::2])):
        batch_norm(x, *buffers, training=True, statistics=Ghost(3))
        torch.testing.assert_close(buffers[0].float(), right.running_mean)
        torch.testing.assert_close(buffers[1].float(), right.running_var)


@pytest.mark.parametrize(("state", "words"), [
    (torch.zeros(2, dtype=torch.int64), r"state should have size \(\) and torch.int64 for Renorm.*got \(2,\)"),
    (torch.zeros(()), "got .* torch.float32"),
    (torch.zeros((), dtype=torch.int64, device="meta"), "state must be moved to the input's"),
])  # fmt: skip
def test_a_wrong_state(state: Tensor, words: str) -> None:
    mean, var, batches = torch.zeros(9), torch.ones(9), torch.tensor(0)
    with pytest.raises(RuntimeError, match=words):
        batch_norm(
            laid(SHAPE, 0, torch.float32), mean, var, training=True, num_batches_tracked=batches, statistics=Renorm(),
            state=state,
        )  # fmt: skip
    assert (mean == 0).all()
    assert (var == 1).all()
    assert batches == 0


def test_a_kernel_without_policies_asked_for_by_name() -> None:
    with (
        pytest.raises(RuntimeError, match="'aten' was asked for, but it has no masks and no policies"),
        kernels.using("aten"),
    ):
        used(Ghost(3))


def test_moments_of_sets_explain_a_ghost() -> None:
    """The one idea: the same moments, over other sets."""
    x = laid((6, 9, 6, 7), 0, torch.float64)
    sets = Moments.of(x.view(3, 2, 9, 42), (1, 3))
    y = batch_norm(x, None, None, training=True, statistics=Ghost(2), eps=1e-12)
    right = (x.view(3, 2, 9, 42) - sets.mean[:, None, :, None]) / sets.biased_variance.sqrt()[:, None, :, None]
    torch.testing.assert_close(y, right.view(x.shape))


def test_torchscript_takes_a_policy_in_evaluation_alone() -> None:
    layer = batchnorm.BatchNorm1d(3, statistics=Ghost(2))
    with pytest.raises(RuntimeError, match=r"TorchScript cannot train with Ghost\(size=2\)"):
        torch.jit.script(nn.Sequential(layer))
    x = torch.randn(4, 3)
    scripted = torch.jit.script(nn.Sequential(copy.deepcopy(layer)).eval())
    torch.testing.assert_close(scripted(x), layer.eval()(x))
