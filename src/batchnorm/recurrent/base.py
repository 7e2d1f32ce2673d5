"""What LSTM and GRU share: parameters, layers and directions, packed sequences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.arguments import check_momentum
from batchnorm.recurrent.steps import Norm, rows_of, update_steps

__all__ = ["Recurrent", "Sequence", "State"]

Sequence = TypeVar("Sequence", Tensor, PackedSequence)
State = tuple[Tensor, ...]  # (h, c) or (h,)
_GAMMA = 0.1  # the paper's: at 1 tanh saturates, and gradients vanish through time
_USUAL = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}


class Recurrent(nn.Module):
    """A recurrent network with a cell that a subclass defines."""

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
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.max_steps, self.eps, self.momentum = max_steps, eps, momentum
        self._check_arguments(proj_size)
        for layer in range(num_layers):
            features = input_size if layer == 0 else hidden_size * self._directions
            for suffix in self._suffixes(layer):
                self._add(suffix, features, device, dtype)
        self.reset_parameters()

    def _check_arguments(self, proj_size: int) -> None:
        if proj_size != 0:
            raise ValueError(f"proj_size={proj_size} is not supported: project the output with a Linear layer")
        for name in ("input_size", "hidden_size", "num_layers", "max_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than zero, got {getattr(self, name)}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {self.dropout}: it is a probability")
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(f"dropout={self.dropout} acts between layers: one layer has none", stacklevel=4)
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {self.eps}: a first hidden state of zeros has no variance")
        check_momentum(self.momentum)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        return (f"_l{layer}", f"_l{layer}_reverse")[: self._directions]

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
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for what, width in self._widths.items():
            for name in ("running_mean", "running_var"):
                rows = torch.empty(self.max_steps, width * H, device=device, dtype=wide)
                self.register_buffer(f"{name}_{what}{suffix}", rows)
        counts = torch.zeros(self.max_steps, dtype=torch.int64, device=device)
        self.register_buffer(f"num_batches_tracked{suffix}", counts)

    def normalized(self) -> dict[str, tuple[str, ...]]:
        """Name what is normalized ("ih", "hh", "c") in each layer and direction ("_l0", "_l0_reverse", …)."""
        suffixes = [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]
        return dict.fromkeys(suffixes, tuple(self._widths))

    def reset_running_stats(self) -> None:
        """Forget the running statistics of all steps: mean 0, variance 1, no batches."""
        for name, buffer in self.named_buffers():
            buffer.fill_(1 if name.startswith("running_var") else 0)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, as the class says, and forget the running statistics."""
        self.reset_running_stats()
        bound = 1 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters():
            if name.startswith("weight_ih"):
                nn.init.uniform_(parameter, -bound, bound)
            elif name.startswith("weight_hh"):
                for gate in parameter.split(self.hidden_size):
                    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))  # QR has no half precision
                    gate.copy_(nn.init.orthogonal_(wide))
            else:
                nn.init.constant_(parameter, _GAMMA if name.startswith("gamma") else 0.0)

    def extra_repr(self) -> str:
        """Say what torch's layer says, and how statistics are kept."""
        given = [f"{name}={getattr(self, name)}" for name, value in _USUAL.items() if getattr(self, name) != value]
        own = [f"max_steps={self.max_steps}", f"eps={self.eps}", f"momentum={self.momentum}"]
        return ", ".join([str(self.input_size), str(self.hidden_size), *given, *own])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Convert everything as asked, but keep running statistics in float32 or wider, unrounded."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = (new if old.is_meta else old).to(device=new.device, dtype=torch.float32)
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        """Load as torch does; of a checkpoint in half precision, assign=True takes nothing but the parameters so."""
        super()._load_from_state_dict(*given)
        for name, t in self._buffers.items():
            if t is not None and t.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = t.long() if name.startswith("num_batches") else t.float()

    # --- input and output, as torch.nn has them ---

    def _run(self, input: Sequence, hx: State | None) -> tuple[Sequence, State]:
        if not isinstance(input, PackedSequence):
            return self._run_dense(input, hx)
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

    def _run_dense(self, input: Tensor, hx: State | None) -> tuple[Tensor, State]:
        if input.dim() not in (2, 3):
            expected = "(N, T, features)" if self.batch_first else "(T, N, features)"
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead: "
                f"{expected} or, for one sequence, (T, features)"
            )
        if input.dim() == 2:
            y, state = self._sequences(input.unsqueeze(1), None if hx is None else tuple(s.unsqueeze(1) for s in hx))
            return y.squeeze(1), tuple(s.squeeze(1) for s in state)
        if self.batch_first:
            y, state = self._sequences(input.transpose(0, 1), hx)
            return y.transpose(0, 1), state
        return self._sequences(input, hx)

    def _sequences(self, x: Tensor, hx: State | None) -> tuple[Tensor, State]:
        T, N = x.shape[:2]
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN: the input has no steps")
        state = self._initial(x, N, hx)
        y, state = self._layers(x.flatten(0, 1), [N] * T, state)
        return y.view(T, N, self.hidden_size * self._directions), state

    def _initial(self, x: Tensor, N: int, hx: State | None) -> State:
        """Check the input and the state against the layer; give the state that it begins with."""
        dtype = self.weight_ih_l0.dtype
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({x.dtype})"
            )
        if self.training and N == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got one sequence of size "
                f"{(len(x), self.input_size)}: a step is normalized over the batch; use a larger one, or eval()"
            )
        size = (self.num_layers * self._directions, N, self.hidden_size)
        if hx is None:
            return tuple(x.new_zeros(size) for _ in range(self._states))
        for index, s in enumerate(hx):
            if s.shape != size:
                name = "hidden size" if self._states == 1 else f"hidden[{index}] size"
                raise RuntimeError(f"Expected {name} {size}, got {list(s.shape)}: layers · directions, N, hidden_size")
        return hx

    # --- the recurrence ---

    def _layers(self, data: Tensor, sizes: list[int], states: State) -> tuple[Tensor, State]:
        """Run all layers over packed data: the rows of step t, ``sizes[t]`` of them, follow those of step t - 1."""
        around = _reversal(sizes, data.device)
        ends: list[State] = []
        for layer in range(self.num_layers):
            if layer > 0:
                data = F.dropout(data, self.dropout, self.training)
            forward, *reverse = self._suffixes(layer)
            y, end = self._one_way(forward, data, sizes, tuple(s[len(ends)] for s in states))
            ends.append(end)
            for suffix in reverse:
                state = tuple(s[len(ends)] for s in states)
                back, end = self._one_way(suffix, data.index_select(0, around), sizes, state)
                ends.append(end)
                y = torch.cat((y, back.index_select(0, around)), -1)
            data = y
        return data, tuple(torch.stack(s) for s in zip(*ends, strict=True))

    def _one_way(self, suffix: str, data: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """Run one layer in one direction, in which all sequences begin at step 0 and the longest come first."""
        norms = self._norms(suffix, len(sizes))
        recurrent = getattr(self, "weight_hh" + suffix)
        outputs, ended = [], []
        for t, x in enumerate(self._inputs(suffix, data, sizes, norms["ih"])):
            if len(x) < len(state[0]):
                ended.append(tuple(s[len(x) :] for s in state))
                state = tuple(s[: len(x)] for s in state)
            state = self._step(t, x, state, recurrent, norms)
            outputs.append(state[0])
        if self.training:
            self._update_running(suffix, norms, [size for size in sizes if size > 1])
        ends = [state, *reversed(ended)]
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*ends, strict=True))

    def _update_running(self, suffix: str, norms: dict[str, Norm], sizes: list[int]) -> None:
        """Move the running statistics by what a forward has seen; the first steps had ``sizes`` sequences."""
        running = [self._running(what, suffix) for what in norms]
        update_steps(list(norms.values()), running, getattr(self, "num_batches_tracked" + suffix), sizes, self.momentum)

    def _inputs(self, suffix: str, data: Tensor, sizes: list[int], norm: Norm) -> tuple[Tensor, ...]:
        """Give the normalized product of the input at each step: one product and, if it can be, one normalization."""
        weight = getattr(self, "weight_ih" + suffix)
        if sizes[-1] == sizes[0]:
            x = data.view(len(sizes), sizes[0], data.shape[-1]).transpose(0, 1)
            return norm.throughout(F.linear(x, weight)).unbind(1)
        return tuple(norm.at(t, x) for t, x in enumerate(F.linear(data, weight).split(sizes)))

    def _step(self, t: int, x: Tensor, state: State, recurrent: Tensor, norms: dict[str, Norm]) -> State:
        """Give the state after step t, from the normalized input and the state before."""
        raise NotImplementedError

    def _norms(self, suffix: str, steps: int) -> dict[str, Norm]:
        """Make the normalizations of one layer and direction for this forward."""
        rows = rows_of(getattr(self, "num_batches_tracked" + suffix), steps)
        norms = {}
        for what in self._widths:
            mean, var = self._running(what, suffix)
            bias = "beta_c" if what == "c" else f"bias_{what}"
            norms[what] = Norm(
                mean[rows], var[rows], getattr(self, f"gamma_{what}{suffix}"), getattr(self, bias + suffix, None),
                self.training, self.eps,
            )  # fmt: skip
        return norms

    def _running(self, what: str, suffix: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"running_mean_{what}{suffix}"), getattr(self, f"running_var_{what}{suffix}")


def _reversal(sizes: list[int], device: torch.device) -> Tensor:
    """Give the index that turns every sequence of packed data around; it is its own inverse."""
    T, N = len(sizes), sizes[0]
    if sizes[-1] == N:
        return torch.arange(T * N, device=device).view(T, N).flip(0).flatten()
    rows = torch.tensor(sizes, device="cpu")
    steps, columns = torch.arange(T, device="cpu").unsqueeze(1), torch.arange(N, device="cpu")
    valid = columns < rows.unsqueeze(1)
    begin = rows.cumsum(0) - rows
    mirrored = (valid.sum(0) - 1 - steps).clamp(min=0)
    return (begin[mirrored] + columns)[valid].to(device)
