"""LSTM and GRU with batch normalization inside the recurrence, and statistics of their own for every time step.

At the first steps the hidden state is only beginning to fill, so that its moments are not those of later steps: one
set of running statistics for all steps would fit none of them (the paper's section 3). The scales are shared over time.

Source: Cooijmans, Ballas, Laurent, Gülçehre & Courville 2017, "Recurrent Batch Normalization", arXiv 1603.09025.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.functional import batch_norm
from batchnorm.moments import Moments

__all__ = ["GRU", "LSTM"]

_Sequence = TypeVar("_Sequence", Tensor, PackedSequence)
_State = tuple[Tensor, ...]  # (h, c) or (h,)
_GAMMA = 0.1  # at 1, tanh saturates and gradients vanish: the paper's section 4


class _Norm:
    """One normalization of one layer during one forward: what scales and shifts it, and statistics, a row a step.

    The rows begin as copies of the running statistics. In training a step's row becomes the batch's own moments (a
    momentum of 1 writes them); a step with fewer than two values, which have no variance, is normalized by its row.
    """

    def __init__(
        self, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, training: bool, eps: float
    ) -> None:
        self.mean, self.var, self.weight, self.bias = mean, var, weight, bias
        self.training, self.eps = training, eps
        self.calls, self.good = 0, torch.zeros((), dtype=torch.int64, device=mean.device)

    def at(self, step: int, x: Tensor) -> Tensor:
        """Normalize the ``(rows, C)`` of one step."""
        return self._normalize(x, self.mean[step], self.var[step], self.weight, self.bias)

    def throughout(self, x: Tensor) -> Tensor:
        """Normalize all steps of ``(N, T, C)`` at once: each step's C are channels of their own."""
        N, T, C = x.shape
        bias = None if self.bias is None else self.bias.repeat(T)
        y = self._normalize(x.reshape(N, T * C), self.mean.view(-1), self.var.view(-1), self.weight.repeat(T), bias)
        return y.view(N, T, C)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training or len(x) < 2:
            return batch_norm(x, mean, var, weight, bias, False, eps=self.eps)
        self.calls += 1  # and `good` counts those whose moments are finite, and that are not recomputed
        return batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps, num_batches_tracked=self.good)


class _Recurrent(nn.Module):
    """What LSTM and GRU share: layers, directions, packed sequences, the bookkeeping of statistics."""

    _widths: ClassVar[dict[str, int]]  # what is normalized, and how many times hidden_size it is wide
    _states: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        max_steps: int = 100,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        if proj_size != 0:
            raise ValueError(f"proj_size={proj_size} is not supported: project the output with a Linear layer")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "max_steps": max_steps}
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"{name} must be greater than zero, got {value}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}: it is a probability")
        if dropout > 0 and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers, and num_layers is 1: it does nothing", stacklevel=2)
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}: a first hidden state of zeros has no variance")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum must be between 0 and 1 (the weight of the new value) or None, but got {momentum}"
            )
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.max_steps, self.eps, self.momentum = max_steps, eps, momentum
        for layer in range(num_layers):
            features = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
            for suffix in self._suffixes(layer):
                self._add(suffix, features, device, dtype)
        self.reset_parameters()

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        return (f"_l{layer}", f"_l{layer}_reverse") if self.bidirectional else (f"_l{layer}",)

    def _add(self, suffix: str, features: int, device: Any, dtype: Any) -> None:
        """Make the parameters and statistics of one layer and direction."""
        H, gates = self.hidden_size, self._widths["ih"] * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (gates, features), "weight_hh": (gates, H)}
        if self.bias:
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
        shapes |= {f"gamma_{what}": (width * H,) for what, width in self._widths.items()}
        if "c" in self._widths:
            shapes["beta_c"] = (H,)
        for name, shape in shapes.items():
            self.register_parameter(name + suffix, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        narrow = (dtype or torch.get_default_dtype()) != torch.float64
        wide = torch.float32 if narrow else torch.float64
        for what, width in self._widths.items():
            for name in ("running_mean", "running_var"):
                rows = torch.empty(self.max_steps, width * H, device=device, dtype=wide)
                self.register_buffer(f"{name}_{what}{suffix}", rows)
        counts = torch.zeros(self.max_steps, dtype=torch.int64, device=device)
        self.register_buffer(f"num_batches_tracked{suffix}", counts)

    def reset_running_stats(self) -> None:
        """Forget the running statistics of all steps: mean 0, variance 1, no batches."""
        for name, buffer in self.named_buffers():
            buffer.fill_(1 if name.startswith("running_var") else 0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew and forget the running statistics; the class says from what they are drawn."""
        self.reset_running_stats()
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("weight_ih"):
                nn.init.uniform_(parameter, -bound, bound)
            elif name.startswith("weight_hh"):
                for gate in parameter.split(self.hidden_size):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.constant_(parameter, _GAMMA if name.startswith("gamma") else 0.0)

    def extra_repr(self) -> str:
        """Say the sizes, and what is not as torch has it by default."""
        said = f"{self.input_size}, {self.hidden_size}"
        usual = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, value in usual.items():
            if getattr(self, name) != value:
                said += f", {name}={getattr(self, name)}"
        return said + f", max_steps={self.max_steps}, eps={self.eps}, momentum={self.momentum}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert everything as asked, but keep running statistics in float32 or wider, unrounded."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = (new if old.is_meta else old).to(device=new.device, dtype=torch.float32)
        return self

    # --- input and output, as torch.nn has them ---

    def _run(self, input: _Sequence, hx: _State | None) -> tuple[_Sequence, _State]:
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
            if data.dim() != 2:
                raise RuntimeError(f"input must have 2 dimensions, got {data.dim()}: packed data are (rows, features)")
            sizes: list[int] = batch_sizes.tolist()
            state = self._initial(data, sizes[0], hx)
            if hx is not None and order is not None:
                state = tuple(s.index_select(1, order) for s in state)
            data, state = self._layers(data, sizes, state)
            if back is not None:
                state = tuple(s.index_select(1, back) for s in state)
            return PackedSequence(data, batch_sizes, order, back), state
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead: "
                f"{'(N, T, features)' if self.batch_first else '(T, N, features)'} or, unbatched, (T, features)"
            )
        unbatched, swapped = input.dim() == 2, input.dim() == 3 and self.batch_first
        x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if swapped else input
        T, N = x.shape[:2]
        if T == 0:
            raise RuntimeError(f"Expected sequence length to be larger than 0 in RNN, got input {tuple(input.shape)}")
        if unbatched and hx is not None:
            hx = tuple(s.unsqueeze(1) for s in hx)
        y, state = self._layers(x.flatten(0, 1), [N] * T, self._initial(x, N, hx))
        y = y.view(T, N, y.shape[-1])
        if unbatched:
            return y.squeeze(1), tuple(s.squeeze(1) for s in state)
        return y.transpose(0, 1) if swapped else y, state

    def _initial(self, x: Tensor, N: int, hx: _State | None) -> _State:
        """Check the input against the layer, and give the state that it begins with: ``(layers, N, H)`` each."""
        weight = getattr(self, "weight_ih_l0")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if self.training and N == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got one sequence in an input of size "
                f"{tuple(x.shape)}: each step is normalized over the batch; use a larger batch, or eval()"
            )
        size = (self.num_layers * (2 if self.bidirectional else 1), N, self.hidden_size)
        if hx is None:
            return tuple(x.new_zeros(size) for _ in range(self._states))
        for index, s in enumerate(hx):
            if s.shape != size:
                name = "hidden" if self._states == 1 else f"hidden[{index}]"
                raise RuntimeError(
                    f"Expected {name} size {size}, got {list(s.shape)}: (layers · directions, N, hidden)"
                )
        return hx

    # --- the recurrence ---

    def _layers(self, data: Tensor, sizes: list[int], states: _State) -> tuple[Tensor, _State]:
        """Run all layers over packed data: the rows of step t, ``sizes[t]`` of them, follow those of step t - 1."""
        around = _reversal(sizes, data.device) if self.bidirectional else data.new_empty(0)
        ends: list[_State] = []
        for layer in range(self.num_layers):
            if layer > 0:
                data = F.dropout(data, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                reverse = suffix.endswith("_reverse")
                first = tuple(s[len(ends)] for s in states)
                y, end = self._one(suffix, data.index_select(0, around) if reverse else data, sizes, first)
                outputs.append(y.index_select(0, around) if reverse else y)
                ends.append(end)
            data = torch.cat(outputs, -1)
        return data, tuple(torch.stack(s) for s in zip(*ends, strict=True))

    def _one(self, suffix: str, data: Tensor, sizes: list[int], state: _State) -> tuple[Tensor, _State]:
        """Run one layer in one direction, all of whose sequences begin at step 0."""
        norms = self._norms(suffix, len(sizes))
        weight, recurrent = getattr(self, "weight_ih" + suffix), getattr(self, "weight_hh" + suffix)
        if sizes[-1] == sizes[0]:  # all equally long
            x = F.linear(data.view(len(sizes), sizes[0], data.shape[-1]).transpose(0, 1), weight)
            steps = norms["ih"].throughout(x).unbind(1)
        else:
            steps = tuple(norms["ih"].at(t, x) for t, x in enumerate(F.linear(data, weight).split(sizes)))
        outputs, ended = [], []
        for t, x in enumerate(steps):
            if len(x) < sizes[t - 1] and t > 0:  # the shortest sequences, which come last, are over
                ended.append(tuple(s[len(x) :] for s in state))
                state = tuple(s[: len(x)] for s in state)
            state = self._step(t, x, state, recurrent, norms)
            outputs.append(state[0])
        if self.training:
            self._track(suffix, norms, [size for size in sizes if size > 1])
        ends = [state, *reversed(ended)]
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*ends, strict=True))

    def _step(self, t: int, x: Tensor, state: _State, recurrent: Tensor, norms: dict[str, _Norm]) -> _State:
        """Give the state after step t, from the normalized input and the state before."""
        raise NotImplementedError

    # --- statistics ---

    def _norms(self, suffix: str, steps: int) -> dict[str, _Norm]:
        """Make the layer's normalizations, with the statistics that steps 0 to ``steps - 1`` are evaluated with."""
        trained = getattr(self, "num_batches_tracked" + suffix) > 0
        every = torch.arange(self.max_steps, device=trained.device)
        last = torch.where(trained.any(), (every * trained).amax(), self.max_steps - 1)
        row = torch.minimum(torch.arange(steps, device=trained.device), last)
        norms = {}
        for what in self._widths:
            mean, var = self._running(what, suffix)
            bias = "beta_c" if what == "c" else f"bias_{what}"
            shift = getattr(self, bias + suffix) if self.bias or what == "c" else None
            weight = getattr(self, f"gamma_{what}{suffix}")
            norms[what] = _Norm(mean[row], var[row], weight, shift, self.training, self.eps)
        return norms

    def _running(self, what: str, suffix: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"running_mean_{what}{suffix}"), getattr(self, f"running_var_{what}{suffix}")

    @torch.no_grad()
    def _track(self, suffix: str, norms: dict[str, _Norm], sizes: list[int]) -> None:
        """Move the running statistics of the steps that had ``sizes`` rows, if all that was seen is finite."""
        good = torch.stack([norm.good == norm.calls for norm in norms.values()]).all()
        rows = min(len(sizes), self.max_steps)
        batches = getattr(self, "num_batches_tracked" + suffix)[:rows]
        batches.add_(good)
        factor: Any = self.momentum
        if factor is None:
            factor = 1.0 / batches.clamp(min=1).to(norms["ih"].mean.dtype).unsqueeze(1)
        for what, norm in norms.items():
            moments = _shared(norm.mean[: len(sizes)], norm.var[: len(sizes)], sizes, self.max_steps)
            for running, new in zip(self._running(what, suffix), moments, strict=True):
                running, new = running[:rows], new.to(running.dtype)
                running.copy_(torch.where(good, (1 - factor) * running + factor * new, running))


def _shared(mean: Tensor, var: Tensor, sizes: list[int], rows: int) -> tuple[Tensor, Tensor]:
    """Merge the moments of the steps that share the last row."""
    if len(sizes) <= rows:
        return mean, var
    count = (
        torch.tensor(sizes[rows - 1 :], dtype=torch.float64, device=mean.device).unsqueeze(1).expand(-1, mean.shape[1])
    )
    tail = Moments(count, mean[rows - 1 :].double(), var[rows - 1 :].double() * (count - 1)).merged()
    return (
        torch.cat((mean[: rows - 1], tail.mean.to(mean.dtype).unsqueeze(0))),
        torch.cat((var[: rows - 1], tail.unbiased_variance.to(var.dtype).unsqueeze(0))),
    )


def _reversal(sizes: list[int], device: torch.device) -> Tensor:
    """Give the index that turns every sequence of packed data around; it is its own inverse."""
    T, N = len(sizes), sizes[0]
    if sizes[-1] == N:
        return torch.arange(T * N, device=device).view(T, N).flip(0).flatten()
    rows, steps = torch.tensor(sizes), torch.arange(T).unsqueeze(1)
    valid = torch.arange(N) < rows.unsqueeze(1)
    begin = rows.cumsum(0) - rows
    mirrored = (valid.sum(0) - 1 - steps).clamp(min=0)
    return (begin[mirrored] + torch.arange(N))[valid].to(device)


class LSTM(_Recurrent):
    """An LSTM whose products and cell are batch-normalized, step by step; called as ``torch.nn.LSTM`` is.

    With ``BN(x; γ, β) = β + γ · (x − mean) / √(var + eps)``, the moments taken over the sequences of the batch::

        i, f, g, o = BN(W_ih x; γ_ih, b_ih) + BN(W_hh h; γ_hh, b_hh)
        c' = σ(f) · c + σ(i) · tanh(g)
        h' = σ(o) · tanh(BN(c'; γ_c, β_c))

    The two shifts of the gates are torch's two biases, and only their sum matters, which is the paper's b. The cell
    itself is passed on as it is: only what the output sees of it is normalized.

    Every step has its own running statistics, up to ``max_steps``; the last row serves all later steps, whose moments
    are merged in it. In evaluation, steps later than any that was trained use those of the last one that was. In the
    reverse direction steps are counted from the end of each sequence, where that direction begins. Of a packed batch,
    the sequences that are not over count. A step that only one sequence reaches has no variance: even in training it is
    normalized by what evaluation would use, and moves nothing. A batch that is not finite at some step of a layer moves
    nothing there, and neither does recomputation under activation checkpointing.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in
            ``torch.nn.LSTM``; statistics stay float32 or wider whatever ``dtype`` says.
        proj_size: 0; projections are not supported.
        max_steps: how many steps have statistics of their own, commonly the length of the training sequences. They take
            72 · max_steps · hidden_size bytes a layer and direction.
        eps: added to the variance, in the unit of what is normalized squared.
        momentum: the weight of a new batch in the running statistics, 0 to 1; None for the plain average.

    Weights are drawn as torch draws them for the input, orthogonal for each gate's recurrent product; γ is 0.1 and
    biases are 0, but 1 for the forget gate, as in the paper's own code. ``state_dict`` has torch's keys, so that
    ``load_state_dict(torch_lstm.state_dict(), strict=False)`` takes its weights, and with each suffix (``_l0``,
    ``_l0_reverse``, …): ``gamma_ih``, ``gamma_hh``: ``(4H,)``; ``gamma_c``, ``beta_c``: ``(H,)``; ``running_mean_`` and
    ``running_var_`` of ``ih``, ``hh``: ``(max_steps, 4H)`` and ``c``: ``(max_steps, H)``; ``num_batches_tracked``:
    ``(max_steps,)``.

    A hidden state of zeros has no variance at the first step, and a layer trained only so has none to normalize another
    one with: train with states like those of evaluation. If inputs of many steps are equal in all sequences, the paper
    begins with noise: give it as ``hx``.

    Raises:
        ValueError: one sequence in training (an unbatched one, too), another dtype than the weights'.
        RuntimeError: input or state of another size.

    Example:
        >>> layer = LSTM(10, 20, max_steps=5)
        >>> output, (h, c) = layer(torch.randn(5, 3, 10))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))

    Source: Cooijmans et al. 2017, arXiv 1603.09025, section 3.
    """

    _widths: ClassVar[dict[str, int]] = {"ih": 4, "hh": 4, "c": 1}
    _states = 2

    def reset_parameters(self) -> None:
        """Draw the weights anew and forget the running statistics; the forget gate begins open."""
        super().reset_parameters()
        H = self.hidden_size
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("bias_ih"):
                    parameter[H : 2 * H] = 1.0

    def forward(
        self, input: _Sequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[_Sequence, tuple[Tensor, Tensor]]:
        """Run ``(T, N, features)`` (or ``(N, T, features)``, ``(T, features)``, packed) from ``hx``, or from zeros."""
        output, (h, c) = self._run(input, hx)
        return output, (h, c)

    def _step(self, t: int, x: Tensor, state: _State, recurrent: Tensor, norms: dict[str, _Norm]) -> _State:
        h, c = state
        i, f, g, o = (x + norms["hh"].at(t, F.linear(h, recurrent))).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * norms["c"].at(t, c).tanh(), c


class GRU(_Recurrent):
    """A GRU whose products are batch-normalized, step by step; called as ``torch.nn.GRU`` is.

    ::

        r, z = σ(BN(W_ih x; γ_ih, b_ih) + BN(W_hh h; γ_hh, b_hh))           the first two thirds
        n = tanh(BN(W_in x; γ_in, b_in) + r · BN(W_hn h; γ_hn, b_hn))       the last third
        h' = (1 − z) · n + z · h

    The paper treats the LSTM and leaves other cells to the reader. Here both products are normalized likewise, and as in
    ``torch.nn.GRU`` the reset gate multiplies the product, not its input: all of ``W_hh h`` is then one product and one
    normalization, the gate acts on normalized values, and ``torch.nn``'s weights mean the same. The state is a mixture
    of bounded values and is not normalized. All else, arguments, statistics, keys (without ``gamma_c``, ``beta_c`` and
    ``c``; 3H in place of 4H) and errors, is as in ``LSTM``; biases begin at 0.

    Example:
        >>> layer = GRU(10, 20, max_steps=5)
        >>> output, h = layer(torch.randn(5, 3, 10))

    Source: after Cooijmans et al. 2017, arXiv 1603.09025; the cell is Cho et al. 2014, arXiv 1406.1078.
    """

    _widths: ClassVar[dict[str, int]] = {"ih": 3, "hh": 3}
    _states = 1

    def forward(self, input: _Sequence, hx: Tensor | None = None) -> tuple[_Sequence, Tensor]:
        """Run ``(T, N, features)`` (or ``(N, T, features)``, ``(T, features)``, packed) from ``hx``, or from zeros."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h

    def _step(self, t: int, x: Tensor, state: _State, recurrent: Tensor, norms: dict[str, _Norm]) -> _State:
        (h,) = state
        a = norms["hh"].at(t, F.linear(h, recurrent))
        (r, z, n), (ar, az, an) = x.chunk(3, 1), a.chunk(3, 1)
        z = (z + az).sigmoid()
        n = (n + (r + ar).sigmoid() * an).tanh()
        return (n + z * (h - n),)
