"""LSTM and GRU with batch normalization, against torch's cells where it is the identity and a plain loop elsewhere."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, unpack_sequence
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import kernels
from batchnorm.recurrent import GRU, LSTM

DOCS = Path(__file__).parents[1] / "docs"
CELLS = [(LSTM, nn.LSTM), (GRU, nn.GRU)]
cells = pytest.mark.parametrize(("ours", "theirs"), CELLS, ids=["LSTM", "GRU"])
each = pytest.mark.parametrize("kind", [LSTM, GRU])


def identity(layer: Any) -> Any:
    """Evaluation that leaves everything as it is: mean 0, variance 1 - eps, γ 1, β 0."""
    with torch.no_grad():
        for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if name.startswith(("gamma", "running_var")):
                tensor.fill_(1.0 if name.startswith("gamma") else 1.0 - layer.eps)
    return layer.eval()


def states(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


def made(kind: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A layer in float64 whose parameters and statistics are all far from where they begin."""
    torch.manual_seed(seed)
    layer = kind(*args, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("weight"):
                parameter.uniform_(0.5, 1.5)
        for name, buffer in layer.named_buffers():
            if name.startswith("running"):
                buffer.uniform_(0.5, 1.5)
    return layer


# --- torch.nn, where normalization is the identity ---


@cells
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_identity_is_torch(
    ours: Any, theirs: Any, layers: int, bidirectional: bool, batch_first: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    arguments = (3, 5, layers, bias, batch_first, 0.0, bidirectional)
    right = theirs(*arguments, dtype=torch.float64)
    layer = ours(*arguments, dtype=torch.float64, max_steps=2)
    assert layer.load_state_dict(right.state_dict(), strict=False).unexpected_keys == []
    identity(layer)
    size = layers * (2 if bidirectional else 1), 4, 5
    hx = tuple(torch.randn(size, dtype=torch.float64) for _ in range(2 if ours is LSTM else 1))
    dense = torch.randn((4, 6, 3) if batch_first else (6, 4, 3), dtype=torch.float64)
    lengths = torch.tensor([3, 6, 1, 4])
    inputs = [dense, pack_padded_sequence(dense, lengths, batch_first, enforce_sorted=False)]
    inputs.append(pack_padded_sequence(dense, lengths.sort(descending=True).values, batch_first))
    for x, state in itertools.product(inputs, [None, hx if ours is LSTM else hx[0]]):
        (y, end), (want, want_end) = layer(x, state), right(x, state)
        if isinstance(want, PackedSequence):
            assert isinstance(y, PackedSequence)
            for a, b in zip(y[1:], want[1:], strict=True):
                assert a is b or torch.equal(a, b)
            y, want = y.data, want.data
        assert y.is_contiguous() == want.is_contiguous()
        for a, b in zip((y, *states(end)), (want, *states(want_end)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        loss, right_loss = (y.sin().sum() + states(end)[0].sum() for y, end in ((y, end), (want, want_end)))
        gradients = torch.autograd.grad(loss, [getattr(layer, name) for name, _ in right.named_parameters()])
        for a, b in zip(gradients, torch.autograd.grad(right_loss, list(right.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@cells
@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_and_none_in_evaluation(ours: Any, theirs: Any, batch_first: bool) -> None:
    right = theirs(3, 5, 2, batch_first=batch_first, bidirectional=True)
    layer = ours(3, 5, 2, batch_first=batch_first, bidirectional=True)
    layer.load_state_dict(right.state_dict(), strict=False)
    identity(layer)
    hx = tuple(torch.randn(4, 5) for _ in range(2 if ours is LSTM else 1))
    for x, state in ((torch.randn(6, 3), None), (torch.randn(6, 3), hx if ours is LSTM else hx[0])):
        (y, end), (want, want_end) = layer(x, state), right(x, state)
        for a, b in zip((y, *states(end)), (want, *states(want_end)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    nobody = torch.zeros((0, 6, 3) if batch_first else (6, 0, 3))
    for mode in (True, False):
        y, end = layer.train(mode)(nobody)
        assert y.shape == (*nobody.shape[:2], 10)
        assert all(s.shape == (4, 0, 5) for s in states(end))
    assert layer.num_batches_tracked_l0.sum() == 0


# --- a plain loop, where it is not ---


class Loop:
    """Recurrent batch normalization of a list of sequences, one step and one sequence after the other."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.state = layer, {k: v.clone() for k, v in layer.named_buffers()}
        self.values: dict[str, Tensor] = {}

    def normalize(self, x: Tensor, what: str, suffix: str, t: int) -> Tensor:
        layer = self.layer
        weight = getattr(layer, f"gamma_{what}{suffix}")
        bias = getattr(layer, f"beta_c{suffix}" if what == "c" else f"bias_{what}{suffix}")
        if layer.training and len(x) > 1:
            self.values[f"{what}{suffix} {t}"] = x.detach()
            mean, var = x.mean(0), (x - x.mean(0)).square().mean(0)
        else:
            row = min(t, int(self.state["num_batches_tracked" + suffix].nonzero().max()))
            mean, var = self.state[f"running_mean_{what}{suffix}"][row], self.state[f"running_var_{what}{suffix}"][row]
        return (x - mean) / (var + layer.eps).sqrt() * weight + bias

    def way(self, sequences: list[Tensor], suffix: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        layer, H = self.layer, self.layer.hidden_size
        h = [sequences[0].new_zeros(H) for _ in sequences]
        c = list(h)
        outputs: list[list[Tensor]] = [[] for _ in sequences]
        for t in range(max(map(len, sequences))):
            alive = [i for i, s in enumerate(sequences) if len(s) > t]
            x = torch.stack([sequences[i][t] for i in alive]) @ getattr(layer, "weight_ih" + suffix).T
            a = torch.stack([h[i] for i in alive]) @ getattr(layer, "weight_hh" + suffix).T
            x, a = self.normalize(x, "ih", suffix, t), self.normalize(a, "hh", suffix, t)
            old_h, old_c = torch.stack([h[i] for i in alive]), torch.stack([c[i] for i in alive])
            if isinstance(layer, LSTM):
                i, f, g, o = (x + a).split(H, 1)
                new_c = torch.sigmoid(f) * old_c + torch.sigmoid(i) * torch.tanh(g)
                new_h = torch.sigmoid(o) * torch.tanh(self.normalize(new_c, "c", suffix, t))
            else:
                (r, z, n), (ar, az, an) = x.split(H, 1), a.split(H, 1)
                z = torch.sigmoid(z + az)
                new_c, new_h = old_c, (1 - z) * torch.tanh(n + torch.sigmoid(r + ar) * an) + z * old_h
            for row, i in enumerate(alive):
                h[i], c[i] = new_h[row], new_c[row]
                outputs[i].append(new_h[row])
        self.track(suffix)
        return [torch.stack(o) for o in outputs], (torch.stack(h), torch.stack(c))[: len(layer._states * "x")]

    def track(self, suffix: str) -> None:
        layer = self.layer
        steps = [int(key.split()[1]) for key in self.values if key.startswith(f"ih{suffix} ")]
        for row in range(min(len(steps), layer.max_steps)):
            last = row == layer.max_steps - 1
            for what in ["ih", "hh", "c"][: 3 if isinstance(layer, LSTM) else 2]:
                shared = [t for t in steps if t == row or (last and t > row)]
                seen = torch.cat([self.values[f"{what}{suffix} {t}"] for t in shared])
                # Rows of steps are pooled as they are: their own means differ, and that is part of the variance.
                deviations = sum((self.values[f"{what}{suffix} {t}"] - seen.mean(0)).square().sum(0) for t in shared)
                for name, value in (("mean", seen.mean(0)), ("var", deviations / (len(seen) - 1))):
                    buffer = self.state[f"running_{name}_{what}{suffix}"]
                    buffer[row] = (1 - layer.momentum) * buffer[row] + layer.momentum * value
            self.state["num_batches_tracked" + suffix][row] += 1

    def __call__(self, sequences: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        ends = []
        self.values = {}
        for index in range(self.layer.num_layers):
            y, end = self.way(sequences, f"_l{index}")
            ends.append(end)
            if self.layer.bidirectional:
                back, end = self.way([s.flip(0) for s in sequences], f"_l{index}_reverse")
                ends.append(end)
                y = [torch.cat((a, b.flip(0)), 1) for a, b in zip(y, back, strict=True)]
            sequences = y
        return sequences, tuple(torch.stack(s) for s in zip(*ends, strict=True))


@each
@pytest.mark.parametrize("max_steps", [1, 3, 9])
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [2, 5, 5, 3], [4, 2, 7, 1]], ids=["equal", "packed", "alone"])
def test_training_is_the_plain_loop(kind: Any, lengths: list[int], max_steps: int) -> None:
    layer = made(kind, 3, 4, 2, bidirectional=True, max_steps=max_steps, momentum=0.3)
    for name, buffer in layer.named_buffers():
        if name.startswith("num"):
            buffer[:2] = 1  # the later rows are still to be trained
    loop = Loop(layer)
    for _ in range(2):
        sequences = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in lengths]
        if len(set(lengths)) == 1:
            got, end = layer(torch.stack(sequences, 1))
            y = list(got.unbind(1))
        else:
            packed, end = layer(pack_sequence(sequences, enforce_sorted=False))
            y = unpack_sequence(packed)
        want, want_end = loop(sequences)
        for a, b in zip((*y, *states(end)), (*want, *want_end), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        wanted = [*sequences, *layer.parameters()]
        gradients = torch.autograd.grad(sum(s.sin().sum() for s in y) + states(end)[-1].cos().sum(), wanted)
        right = torch.autograd.grad(sum(s.sin().sum() for s in want) + want_end[-1].cos().sum(), wanted)
        for a, b in zip(gradients, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        for name, buffer in layer.named_buffers():
            torch.testing.assert_close(buffer, loop.state[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert layer.num_batches_tracked_l0[0] == 3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans(), st.sampled_from([LSTM, GRU]))
def test_evaluation_of_a_packed_batch_is_that_of_its_sequences(
    lengths: list[int], bidirectional: bool, kind: Any
) -> None:
    layer = made(kind, 2, 3, 2, bidirectional=bidirectional, max_steps=4).eval()
    sequences = [torch.randn(n, 2, dtype=torch.float64) for n in lengths]
    y, end = layer(pack_sequence(sequences, enforce_sorted=False))
    for index, (sequence, got) in enumerate(zip(sequences, unpack_sequence(y), strict=True)):
        alone, alone_end = layer(sequence)
        torch.testing.assert_close(got, alone)
        for a, b in zip(states(end), states(alone_end), strict=True):
            torch.testing.assert_close(a[:, index], b)


def test_padding_does_not_count() -> None:
    layer = made(LSTM, 3, 4, max_steps=6)
    other = copy.deepcopy(layer)
    padded = torch.randn(6, 3, 3, dtype=torch.float64)
    spoilt = padded.clone()
    lengths = [6, 4, 2]
    for row, n in enumerate(lengths):
        spoilt[n:, row] = 1e6
    a, b = (model(pack_padded_sequence(x, lengths)) for model, x in ((layer, padded), (other, spoilt)))
    assert torch.equal(pad_packed_sequence(a[0])[0], pad_packed_sequence(b[0])[0])
    for mine, theirs in zip(layer.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_input_is_normalized_at_all_steps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.recurrent import steps

    sizes: list[tuple[int, ...]] = []
    original = steps.batch_norm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(steps, "batch_norm", counted)
    layer = LSTM(3, 4, max_steps=7)
    layer(torch.randn(7, 5, 3))
    assert sizes.count((5, 7 * 16)) == 1
    assert len(sizes) == 1 + 2 * 7
    assert kernels.ran().forward == "numba"


# --- statistics ---


@each
def test_later_steps_use_the_last_that_was_trained(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, max_steps=6, momentum=1.0)
    layer(torch.randn(4, 50, 3))
    assert layer.num_batches_tracked_l0.tolist() == [1, 1, 1, 1, 0, 0]
    told = copy.deepcopy(layer)
    for name, buffer in told.named_buffers():
        if name.startswith("running"):
            buffer[4:] = buffer[3]
        else:
            buffer.fill_(1)
    x = torch.randn(9, 5, 3)
    torch.testing.assert_close(layer.eval()(x)[0], told.eval()(x)[0], rtol=0, atol=0)
    for name, buffer in told.named_buffers():
        if name.startswith("running_mean"):
            buffer[4:] += 1.0
    assert not torch.equal(layer(x)[0][4:], told(x)[0][4:])


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_moves_nothing(kind: Any, value: float, momentum: float | None) -> None:
    layer = kind(3, 4, bidirectional=True, max_steps=5, momentum=momentum)
    layer(torch.randn(5, 6, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 6, 3)
    x[3, 2, 1] = value
    layer(x)
    layer(pack_padded_sequence(x, [5, 5, 5, 4, 2, 1]))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    layer(torch.randn(5, 6, 3))
    assert layer.num_batches_tracked_l0.tolist() == [2] * 5
    assert all(buffer.isfinite().all() for buffer in layer.buffers())


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_batch_counts_once(kind: Any, reentrant: bool) -> None:
    plain = made(kind, 3, 4, max_steps=4)
    saved = copy.deepcopy(plain)
    x = torch.randn(5, 6, 3, dtype=torch.float64, requires_grad=True)
    plain(x)[0].square().sum().backward()
    want, x.grad = x.grad, None
    checkpoint(saved, x, use_reentrant=reentrant)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, want)
    assert saved.num_batches_tracked_l0.tolist() == [1] * 4
    for mine, theirs in zip(saved.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_momentum_statistics_are_averages() -> None:
    layer = made(LSTM, 3, 4, max_steps=5, momentum=None)
    layer.reset_running_stats()
    single = copy.deepcopy(layer)
    single.momentum = 1.0
    batches = [torch.randn(T, 6, 3, dtype=torch.float64) for T in (5, 3, 5)]
    seen = []
    for x in batches:
        single.reset_running_stats()
        single(x)
        layer(x)
        seen.append(single.running_var_c_l0.clone())
    want = torch.stack(
        [torch.stack([s[t] for s, x in zip(seen, batches, strict=True) if t < len(x)]).mean(0) for t in range(5)]
    )
    torch.testing.assert_close(layer.running_var_c_l0, want)
    assert layer.num_batches_tracked_l0.tolist() == [3, 3, 3, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_stay_wide(dtype: torch.dtype) -> None:
    layer = LSTM(3, 4, max_steps=5)
    layer(torch.randn(5, 64, 3))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(dtype)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.dtype == (torch.int64 if name.startswith("num") else torch.float32)
    assert layer.weight_ih_l0.dtype == dtype
    with kernels.using("aten"):
        y, _ = layer(torch.randn(5, 64, 3, dtype=dtype))
        y.sum().backward()
    assert y.dtype == dtype
    assert layer.gamma_c_l0.grad.dtype == dtype
    assert layer.num_batches_tracked_l0.tolist() == [2] * 5
    made_narrow = GRU(3, 4, dtype=dtype)
    assert made_narrow.running_var_ih_l0.dtype == torch.float32
    assert GRU(3, 4, dtype=torch.float64).running_var_ih_l0.dtype == torch.float64
    assert GRU(3, 4).double().running_var_ih_l0.dtype == torch.float64


def test_autocast() -> None:
    layer = LSTM(3, 4, max_steps=5)
    with torch.autocast("cpu", torch.bfloat16), kernels.using("aten"):
        y, _ = layer(torch.randn(5, 8, 3))
    y.float().sum().backward()
    assert y.isfinite().all()
    assert layer.running_mean_c_l0.dtype == torch.float32
    assert layer.num_batches_tracked_l0.tolist() == [1] * 5


# --- derivatives, copies, compiler ---


@each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gradcheck(kind: Any, training: bool, packed: bool) -> None:
    layer = made(kind, 2, 2, eps=0.1).train(training)
    names = [name for name, _ in layer.named_parameters()]

    def run(data: Tensor, h: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        hx = (h, h.cos()) if kind is LSTM else h
        x: Any = PackedSequence(data, torch.tensor([4, 4, 2, 1])) if packed else data[:8].view(2, 4, 2)
        fresh = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        y, end = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)) | fresh, (x, hx))
        return (y.data if packed else y, *states(end))

    x = torch.randn(11, 2, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, h, *layer.parameters()))


@each
def test_copies(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4, 2, bidirectional=True, max_steps=3)
    layer(torch.randn(5, 6, 3))
    loaded = kind(3, 4, 2, bidirectional=True, max_steps=3)
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(layer.train()(x)[0], other.train()(x)[0])
        for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(layer.eval()(x)[0], other.eval()(x)[0])
        layer.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize(("kind", "training"), [(LSTM, True), (GRU, False)])
def test_compiles(kind: Any, training: bool) -> None:
    layer = made(kind, 3, 4, bidirectional=not training, max_steps=1).train(training)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager" if training else "eager")
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    for _ in range(2):
        y, z = layer(x)[0], compiled(x)[0]
        torch.testing.assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_where_parameters_begin() -> None:
    torch.manual_seed(0)
    layer = LSTM(3, 8)
    for gate in layer.weight_hh_l0.split(8):
        torch.testing.assert_close(gate @ gate.T, torch.eye(8))
    assert (layer.gamma_ih_l0 == 0.1).all()
    assert (layer.gamma_c_l0 == 0.1).all()
    assert layer.bias_ih_l0.tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
    assert not layer.beta_c_l0.any()
    assert not layer.bias_hh_l0.any()
    assert layer.weight_ih_l0.abs().max() <= 8**-0.5
    assert {name for name, _ in LSTM(3, 8, bias=False).named_parameters()} == {
        "weight_ih_l0", "weight_hh_l0", "gamma_ih_l0", "gamma_hh_l0", "gamma_c_l0", "beta_c_l0",
    }  # fmt: skip
    assert repr(GRU(3, 8, 2, batch_first=True, max_steps=7)) == (
        "GRU(3, 8, num_layers=2, batch_first=True, max_steps=7, eps=1e-05, momentum=0.1)"
    )


@each
def test_dropout_between_layers(kind: Any) -> None:
    layer = made(kind, 3, 4, 2, dropout=1.0)
    alone = copy.deepcopy(layer)
    alone.dropout = 0.0
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    y, end = layer(x)
    with torch.no_grad():  # nothing of the first layer passes, so that all sequences give the same
        assert (y - y[:, :1]).abs().max() < 1e-12
        assert (states(end)[0][0] - states(alone(x)[1])[0][0]).abs().max() < 1e-12
        torch.testing.assert_close(layer.eval()(x)[0], copy.deepcopy(layer).requires_grad_(False)(x)[0])
    with pytest.warns(UserWarning, match=r"dropout=0\.5 acts between layers"):
        kind(3, 4, dropout=0.5)


def test_errors() -> None:
    def refuses(error: type[Exception], message: str, call: Any) -> None:
        with pytest.raises(error, match=message):
            call()

    layer, x = LSTM(3, 4), torch.randn(5, 6, 3)
    refuses(ValueError, "Expected more than 1 value per channel when training", lambda: layer(x[:, :1]))
    refuses(ValueError, "Expected more than 1 value per channel when training", lambda: layer(x[:, 0]))
    one = pack_sequence([torch.randn(4, 3)])
    refuses(ValueError, r"got one sequence of size \(4, 3\)", lambda: layer(one))
    refuses(ValueError, "Expected input to be 2D or 3D, got 4D", lambda: layer(x[None]))
    refuses(RuntimeError, r"must be equal to input_size\. Expected 3, got 2", lambda: layer(x[..., :2]))
    refuses(RuntimeError, "sequence length to be larger than 0", lambda: layer(x[:0]))
    refuses(ValueError, r"RNN input dtype \(torch.float64\) does not match", lambda: layer(x.double()))
    good, bad = torch.zeros(1, 6, 4), torch.zeros(1, 5, 4)
    refuses(RuntimeError, r"Expected hidden\[1\] size \(1, 6, 4\), got \[1, 5, 4\]", lambda: layer(x, (good, bad)))
    refuses(RuntimeError, r"Expected hidden size \(1, 6, 4\), got \[1, 5, 4\]", lambda: GRU(3, 4)(x, bad))
    deep = PackedSequence(torch.randn(6, 2, 3), torch.tensor([4, 2]))
    refuses(RuntimeError, "input must have 2 dimensions, got 3", lambda: layer(deep))
    refuses(ValueError, "proj_size=2 is not supported", lambda: LSTM(3, 4, proj_size=2))
    for name in ("input_size", "hidden_size", "num_layers", "max_steps"):
        arguments = {"input_size": 3, "hidden_size": 4} | {name: 0}
        refuses(ValueError, f"{name} must be greater than zero, got 0", lambda a=arguments: LSTM(**a))
    refuses(ValueError, "dropout should be a number in range", lambda: LSTM(3, 4, 2, dropout=2.0))
    refuses(ValueError, "eps must be positive", lambda: LSTM(3, 4, eps=0.0))
    refuses(ValueError, "momentum must be between 0 and 1", lambda: LSTM(3, 4, momentum=2.0))
    assert not layer.num_batches_tracked_l0.any()


# --- learning, and the page about it ---


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_learns_digits_row_by_row(name: str) -> None:
    page: Any = runpy.run_path(str(DOCS / "recurrent.py"))
    accuracy = page["train"](getattr(batchnorm.recurrent, name), page["TASKS"]["rows"], rate=0.01, seed=0, steps=150)
    assert accuracy.running > 0.9
    assert accuracy.recalibrated > 0.9


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", (DOCS / "recurrent.md").read_text(encoding="utf-8"), re.DOTALL)
)
def test_example(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "recurrent.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["output"].shape == (12, 3, 20)
