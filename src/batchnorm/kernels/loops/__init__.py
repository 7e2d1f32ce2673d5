"""The CPU kernels' loops: what one thread does with its share of a tensor. Compiled by Numba, launched by `cpu.py`.

Two views of the input cover every layout (../README.md draws them):

* *planes*: (batch, channels, space) with space innermost. A channel is `batch` runs of `space` neighbours; its scale
  and shift are scalars. One thread takes a whole channel through both passes, so that its values are still in cache
  for the second.
* *columns*: rows × columns with the columns' scales and shifts in vectors. Channels-last tensors and [N, C] are rows
  of channels; contiguous tensors with a small space (7×7) are rows of channels·space columns, `space` of them to a
  channel.

Sums start as float32 over a few values (8 lanes at a time) and go on in float64. Moments are sums of d and d² with d
= x − shift, the shift being the mean of the first values of a block, so that float32 loses nothing to a large mean: a
shift that is itself the mean of b of the block's n values lies at most √(n/b) deviations from the block's mean.
Blocks meet in float64, around one origin for each channel: its first value.

The letters in the loops:

    a           the slots of a launch, for one set of samples
    x, y        input and output; dy, dx, dz: the gradients of y, x and z, where z is what the activation gets
    r, w        the residual; the weights of positions
    bits, bit   the slope bits, and the index of the first one meant
    k, gap      coefficients of channels or columns: k, k + gap, k + 2·gap … hold one coefficient of each
    s, q        sums of d and d², where d = x − shift;  s, t: of dz and dz·(x − mean)
    p           the parameter of the activation; in sums of parts, the index of a part
    u, v        one value of x, a vector of it
    form        what the loop is compiled for (`key.py`); stored, param, acc: dtypes in memory, of parameters, of sums

Every partial sum belongs to a piece of the tensor that depends on its shape only, never on the number of threads.
"""
