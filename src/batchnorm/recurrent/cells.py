"""The two cells: which products are normalized, and where."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.recurrent.base import Recurrent, Sequence, State
from batchnorm.recurrent.steps import Norm

__all__ = ["GRU", "LSTM"]


class LSTM(Recurrent):
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

    Running statistics lag behind the weights, and over many steps the errors add up. The paper takes them over the
    training data once training is done, as ``batchnorm.recalibrate`` does. A hidden state of zeros has no variance at
    the first step, and a layer trained only so has none to normalize another one with: train with states like those of
    evaluation. Where all sequences begin alike, as images do that are read from a blank margin on, the paper's code can
    begin with noise: give it as ``hx``.

    Raises:
        ValueError: one sequence in training (an unbatched one, too), another dtype than the weights'.
        RuntimeError: input or state of another size.

    Example:
        >>> layer = LSTM(10, 20, max_steps=5)
        >>> output, (h, c) = layer(torch.randn(5, 3, 10))
        >>> output.shape, h.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))

    Source: Cooijmans et al. 2017, arXiv 1603.09025.
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
        self, input: Sequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Sequence, tuple[Tensor, Tensor]]:
        """Run ``(T, N, features)`` (or ``(N, T, features)``, ``(T, features)``, packed) from ``hx``, or from zeros."""
        output, (h, c) = self._run(input, hx)
        return output, (h, c)

    def _step(self, t: int, x: Tensor, state: State, recurrent: Tensor, norms: dict[str, Norm]) -> State:
        h, c = state
        i, f, g, o = (x + norms["hh"].at(t, F.linear(h, recurrent))).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * norms["c"].at(t, c).tanh(), c


class GRU(Recurrent):
    """A GRU whose products are batch-normalized, step by step; called as ``torch.nn.GRU`` is.

    ::

        r, z = σ(BN(W_ih x; γ_ih, b_ih) + BN(W_hh h; γ_hh, b_hh))           the first two thirds
        n = tanh(BN(W_in x; γ_in, b_in) + r · BN(W_hn h; γ_hn, b_hn))       the last third
        h' = (1 − z) · n + z · h

    The paper treats the LSTM. Here a GRU's two products are normalized likewise, and as in ``torch.nn.GRU`` the reset
    gate multiplies the product, not its input: all of ``W_hh h`` is then one product and one normalization, and
    ``torch.nn``'s weights mean the same. The state is a mixture of bounded values and is not normalized.

    Arguments, statistics, keys (3H in place of 4H, and none of ``c``) and errors are as in ``LSTM``; biases begin at 0.

    Example:
        >>> layer = GRU(10, 20, max_steps=5)
        >>> output, h = layer(torch.randn(5, 3, 10))

    Source: after Cooijmans et al. 2017, arXiv 1603.09025; the cell is Cho et al. 2014, arXiv 1406.1078.
    """

    _widths: ClassVar[dict[str, int]] = {"ih": 3, "hh": 3}
    _states = 1

    def forward(self, input: Sequence, hx: Tensor | None = None) -> tuple[Sequence, Tensor]:
        """Run ``(T, N, features)`` (or ``(N, T, features)``, ``(T, features)``, packed) from ``hx``, or from zeros."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h

    def _step(self, t: int, x: Tensor, state: State, recurrent: Tensor, norms: dict[str, Norm]) -> State:
        (h,) = state
        a = norms["hh"].at(t, F.linear(h, recurrent))
        (r, z, n), (ar, az, an) = x.chunk(3, 1), a.chunk(3, 1)
        z = (z + az).sigmoid()
        n = (n + (r + ar).sigmoid() * an).tanh()
        return (n + z * (h - n),)
