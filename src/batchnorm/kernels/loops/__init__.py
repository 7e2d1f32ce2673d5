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

Every partial sum belongs to a piece of the tensor that depends on its shape only, never on the number of threads.
"""
