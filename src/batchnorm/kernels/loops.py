"""The CPU kernels' loops: what one thread does with its share of a tensor. Compiled by Numba, launched by `cpu.py`.

Two views of the input cover every layout (README.md draws them):

* *planes*: (batch, channels, space) with space innermost. A channel is `batch` runs of `space` neighbours; its scale and shift are
  scalars. One thread takes a whole channel through both passes, so that its values are still in cache for the second.
* *columns*: rows × columns with the columns' scales and shifts in vectors. Channels-last tensors and [N, C] are rows of channels;
  contiguous tensors with a small space (7×7) are rows of channels·space columns, `space` of them to a channel.

Sums start as float32 over a few values (8 lanes at a time) and go on in float64. Moments are sums of d and d² with d = x − shift,
the shift being the mean of the first values of a block, so that float32 loses nothing to a large mean: a shift that is itself
the mean of b of the block's n values lies at most √(n/b) deviations from the block's mean. Blocks meet in float64, around one
origin for each channel: its first value.

Every partial sum belongs to a piece of the tensor that depends on its shape only, never on the number of threads.
"""

from __future__ import annotations

import math

import numba
from numba import types

from batchnorm.kernels.simd import alloca, call_int, convert, fence, fma, load, offset, pointer, prefetch, reinterpret, splat, store, stream, total

f32, f64 = types.float32, types.float64
i64 = types.int64

# The one argument of every entry: a block of 8-byte slots, in this order (`cpu.py` packs it).
(
    X, DY, OUT, WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, COUNTER, MOMENTS, COEFFICIENTS, PARTIALS, GRAD_WEIGHT, GRAD_BIAS,
    BATCH, CHANNELS, SPACE, X_CHANNEL, PARTS, BLOCK, DY_BATCH, DY_CHANNEL, DY_SPACE, STREAM, EPS, FACTOR,
    THREAD, THREADS, THREAD_NUMBER, NUMBER_OF_THREADS,
) = range(29)  # fmt: skip

COLUMNS = 512  # the widest block of columns, whose sums and coefficients live on the stack
FOUR_COLUMNS = 4 * COLUMNS
GROUP = 16  # the most channels whose short runs are read together
THREE_GROUPS, FOUR_GROUPS = 3 * GROUP, 4 * GROUP
STRETCH = 32768  # values that are read forwards in a pass that goes backwards
VALUES = 2048  # that many values of a channel share a shift and sum up in float32

loop = numba.njit(error_model="numpy", forceinline=True)  # no fast-math: NaN must stay NaN, and sums keep their order
body = numba.njit(error_model="numpy")
lanewise = numba.njit(error_model="numpy", inline="always")  # inlined before typing, so that `lanes` is known there


# --- shared by both views --------------------------------------------------------------------------------------------------------


@loop
def share(count, thread, threads):
    """The contiguous part of range(count) that belongs to this thread."""
    return count * thread // threads, count * (thread + 1) // threads


@loop
def who(a):
    """(number of this thread, number of threads); where OpenMP made the team, OpenMP is asked."""
    if a[THREAD] >= 0:
        return a[THREAD], a[THREADS]
    return call_int(a[THREAD_NUMBER]), call_int(a[NUMBER_OF_THREADS])


@loop
def real(a, slot):
    """A slot that holds a float64."""
    return reinterpret(a, f64)[slot]


@loop
def optional(address, index, dtype, default):
    return f64(pointer(address, dtype)[index]) if address != 0 else default


@loop
def write_moments(a, c, shift, s, q, count):
    """Mean and biased variance of channel c, from the sums of d and d² around the shift."""
    moments = pointer(a[MOMENTS], f64)
    m = s / count
    var = q / count - m * m
    moments[c] = shift + m
    moments[a[CHANNELS] + c] = 0.0 if var < 0.0 else var


@loop
def forward_coefficients(a, c, param, acc):
    """(mean, scale, shift) so that y = (x − mean)·scale + shift, in the precision of the arithmetic.

    The mean is rounded and what the rounding lost goes into the shift: x − mean is then exact where it matters, for x near the mean.
    """
    moments = pointer(a[MOMENTS], f64)
    mean, var = moments[c], moments[a[CHANNELS] + c]
    scale = optional(a[WEIGHT], c, param, 1.0) / math.sqrt(var + real(a, EPS))
    rounded = acc(mean)
    return rounded, acc(scale), acc(optional(a[BIAS], c, param, 0.0) - (mean - f64(rounded)) * scale)


@loop
def backward_coefficients(a, c, param, acc, s, t, count):
    """(mean, A, B, C) so that dx = A·dy + B·(x − mean) + C, and the gradients of weight and bias.

    s = Σdy and t = Σdy·(x − mean); Ioffe & Szegedy 2015, section 3, with x̂ written out.
    """
    moments = pointer(a[MOMENTS], f64)
    mean, var = moments[c], moments[a[CHANNELS] + c]
    inverse = 1.0 / math.sqrt(var + real(a, EPS))
    if a[GRAD_WEIGHT] != 0:
        pointer(a[GRAD_WEIGHT], param)[c] = param(t * inverse)
    if a[GRAD_BIAS] != 0:
        pointer(a[GRAD_BIAS], param)[c] = param(s)
    scale = optional(a[WEIGHT], c, param, 1.0) * inverse
    slope = -scale * inverse * inverse * t / count
    rounded = acc(mean)
    return rounded, acc(scale), acc(slope), acc(-scale * s / count - slope * (mean - f64(rounded)))


@body
def update_running(a, thread, threads, stored, param, acc):
    """Move the running statistics towards the batch's moments and count the batch.

    Not at all if any of them would be stored as something not finite: one bad batch must not poison inference for good.
    """
    if a[RUNNING_MEAN] == 0 and a[COUNTER] == 0:
        return
    moments, channels = pointer(a[MOMENTS], f64), a[CHANNELS]
    count = f64(a[BATCH] * a[SPACE])
    unbiased = count / (count - 1.0)
    for c in range(channels):
        if not (math.isfinite(param(moments[c])) and math.isfinite(param(moments[channels + c] * unbiased))):
            return
    factor = real(a, FACTOR)
    if a[COUNTER] != 0:
        counter = pointer(a[COUNTER], i64)
        counter[0] += 1
        if factor < 0.0:  # momentum=None: the plain average over batches
            factor = 1.0 / f64(counter[0])
    if a[RUNNING_MEAN] == 0:
        return
    mean, var = pointer(a[RUNNING_MEAN], param), pointer(a[RUNNING_VAR], param)
    for c in range(channels):
        mean[c] = param((1.0 - factor) * f64(mean[c]) + factor * moments[c])
        var[c] = param((1.0 - factor) * f64(var[c]) + factor * moments[channels + c] * unbiased)


# --- planes: runs of neighbours that share a channel -------------------------------------------------------------------------------


@loop
def first_mean(x, n, acc):
    """The mean of the first values, 32 at most."""
    if n >= 32:
        return total((load(x, 0, 8) + load(x, 8, 8)) + (load(x, 16, 8) + load(x, 24, 8))) * acc(1.0 / 32.0)
    s = load(x, 0, 1)
    for i in range(1, n):
        s += load(x, i, 1)
    return s / acc(n)


@loop
def run_sums(x, n, shift, sums):
    """Add Σd and Σd² over n neighbours to the sums in progress: two vectors of each, and a scalar of each for the last few."""
    s0, s1, q0, q1, s, q = sums
    i = 0
    while i + 16 <= n:
        d = load(x, i, 8) - shift
        s0, q0 = s0 + d, fma(d, d, q0)
        d = load(x, i + 8, 8) - shift
        s1, q1 = s1 + d, fma(d, d, q1)
        i += 16
    if i + 8 <= n:
        d = load(x, i, 8) - shift
        s0, q0 = s0 + d, fma(d, d, q0)
        i += 8
    while i < n:
        d = load(x, i, 1) - shift
        s, q = s + d, fma(d, d, q)
        i += 1
    return s0, s1, q0, q1, s, q


@loop
def no_sums(acc):
    zero = splat(acc(0.0), 8)
    return zero, zero, zero, zero, acc(0.0), acc(0.0)


@loop
def run_totals(sums):
    s0, s1, q0, q1, s, q = sums
    return f64(total(s0 + s1)) + f64(s), f64(total(q0 + q1)) + f64(q)


@loop
def around_origin(sums, count, shift, origin):
    """Σ(x − origin) and Σ(x − origin)² in float64 from the sums of d = x − shift over count values."""
    first, second = run_totals(sums)
    delta = f64(shift) - origin
    moved = first + count * delta
    return moved, second + delta * (first + moved)


@loop
def channel_sums(a, x, c, start, length, acc):
    """Σd and Σd² of channel c around its first value, over `length` neighbours from `start` on in every sample.

    About VALUES values share a shift and stay in float32: several short runs, or a part of a long one.
    """
    channels, space = a[CHANNELS], a[SPACE]
    origin = f64(load(x, c * space, 1))
    s, q, counted = 0.0, 0.0, 0
    shift, sums = acc(0.0), no_sums(acc)
    for n in range(a[BATCH]):
        run = offset(x, (n * channels + c) * space + start)
        for i in range(0, length, VALUES):
            block = min(VALUES, length - i)
            if counted == 0:
                shift = first_mean(offset(run, i), block, acc)
            sums = run_sums(offset(run, i), block, shift, sums)
            counted += block
            if counted >= VALUES:
                ds, dq = around_origin(sums, f64(counted), shift, origin)
                s, q, counted, sums = s + ds, q + dq, 0, no_sums(acc)
    ds, dq = around_origin(sums, f64(counted), shift, origin)
    return origin, s + ds, q + dq


@loop
def group_sums(a, x, first, width, origin, shift, s, q, acc):
    """Σd and Σd² of `width` neighbouring channels of short runs, sample by sample, so that memory is read in long stretches."""
    channels, space = a[CHANNELS], a[SPACE]
    for j in range(width):
        shift[j] = first_mean(offset(x, (first + j) * space), space, acc)
        origin[j], s[j], q[j] = f64(shift[j]), 0.0, 0.0
    for n in range(a[BATCH]):
        for j in range(width):
            at = (n * channels + first + j) * space
            ds, dq = run_totals(run_sums(offset(x, at), space, shift[j], no_sums(acc)))
            s[j] += ds
            q[j] += dq


@loop
def run_apply(x, y, n, mean, scale, shift, streaming):
    """y = (x − mean)·scale + shift."""
    i = 0
    if streaming:
        while i + 16 <= n:
            stream(y, i, fma(load(x, i, 8) - mean, scale, shift))
            stream(y, i + 8, fma(load(x, i + 8, 8) - mean, scale, shift))
            i += 16
    while i + 8 <= n:
        store(y, i, fma(load(x, i, 8) - mean, scale, shift))
        i += 8
    while i < n:
        store(y, i, fma(load(x, i, 1) - mean, scale, shift))
        i += 1


@loop
def run_backward_sums(x, dy, step, n, mean):
    """Σdy and Σdy·(x − mean) in float64; step 0 reads one dy for the whole run (an expanded gradient)."""
    s_all, t_all = splat(0.0, 8), splat(0.0, 8)
    s, t = 0.0, 0.0
    i = 0
    if step == 0:
        while i + 16 <= n:
            t_all = t_all + convert((load(x, i, 8) - mean) + (load(x, i + 8, 8) - mean), f64)
            i += 16
        while i < n:
            t += f64(load(x, i, 1) - mean)
            i += 1
        g = f64(load(dy, 0, 1))
        return g * n, g * (t + total(t_all))
    while i + 32 <= n:
        g0, g1, g2, g3 = load(dy, i, 8), load(dy, i + 8, 8), load(dy, i + 16, 8), load(dy, i + 24, 8)
        t0 = fma(load(x, i + 8, 8) - mean, g1, (load(x, i, 8) - mean) * g0)
        t1 = fma(load(x, i + 24, 8) - mean, g3, (load(x, i + 16, 8) - mean) * g2)
        s_all = s_all + convert((g0 + g1) + (g2 + g3), f64)
        t_all = t_all + convert(t0 + t1, f64)
        i += 32
    while i + 8 <= n:
        g0 = load(dy, i, 8)
        s_all = s_all + convert(g0, f64)
        t_all = t_all + convert((load(x, i, 8) - mean) * g0, f64)
        i += 8
    while i < n:
        g = load(dy, i, 1)
        s, t = s + f64(g), t + f64(g) * f64(load(x, i, 1) - mean)
        i += 1
    return s + total(s_all), t + total(t_all)


@loop
def group_backward_sums(a, x, dy, first, width, start, length, s, t, acc):
    """Σdy and Σdy·(x − mean) of `width` neighbouring channels over `length` neighbours from `start` on in every sample."""
    channels, space, step, exact = a[CHANNELS], a[SPACE], a[DY_SPACE], pointer(a[MOMENTS], f64)
    for j in range(width):
        s[j], t[j] = 0.0, 0.0
    for n in range(a[BATCH]):
        for j in range(width):
            c = first + j
            at, g = (n * channels + c) * space + start, n * a[DY_BATCH] + c * a[DY_CHANNEL] + start * step
            ds, dt = run_backward_sums(offset(x, at), offset(dy, g), step, length, acc(exact[c]))
            s[j] += ds
            t[j] += dt
    for j in range(width):  # what rounding the mean lost
        t[j] += (f64(acc(exact[first + j])) - exact[first + j]) * s[j]


@loop
def run_backward_apply(x, dy, step, dx, n, mean, a, b, c, streaming):
    """dx = a·dy + b·(x − mean) + c."""
    i = 0
    if step == 0:  # one dy for the whole run: dx is affine in x alone
        constant = fma(load(dy, 0, 1), a, c)
        run_apply(x, dx, n, mean, b, constant, streaming)
        return
    if streaming:
        while i + 16 <= n:
            stream(dx, i, fma(load(dy, i, 8), a, fma(load(x, i, 8) - mean, b, c)))
            stream(dx, i + 8, fma(load(dy, i + 8, 8), a, fma(load(x, i + 8, 8) - mean, b, c)))
            i += 16
    while i + 8 <= n:
        store(dx, i, fma(load(dy, i, 8), a, fma(load(x, i, 8) - mean, b, c)))
        i += 8
    while i < n:
        store(dx, i, fma(load(dy, i, 1), a, fma(load(x, i, 1) - mean, b, c)))
        i += 1


@body
def planes_forward(a, thread, threads, stored, param, acc):
    """Both passes over each of this thread's groups of BLOCK channels; the second one backwards, where the cache is still warm."""
    x, y = pointer(a[X], stored), pointer(a[OUT], stored)
    batch, channels, space, streaming = a[BATCH], a[CHANNELS], a[SPACE], a[STREAM] != 0
    s, q, origin = alloca(GROUP, f64), alloca(GROUP, f64), alloca(GROUP, f64)
    shift, k = alloca(GROUP, acc), alloca(THREE_GROUPS, acc)
    first, last = share((channels + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for group in range(first, last):
        c = group * a[BLOCK]
        width = min(a[BLOCK], channels - c)
        if width == 1:
            origin[0], s[0], q[0] = channel_sums(a, x, c, 0, space, acc)
        else:
            group_sums(a, x, c, width, origin, shift, s, q, acc)
        for j in range(width):
            write_moments(a, c + j, origin[j], s[j], q[j], f64(batch * space))
            k[j], k[GROUP + j], k[2 * GROUP + j] = forward_coefficients(a, c + j, param, acc)
        for n in range(batch - 1, -1, -1):
            for j in range(width):
                at = (n * channels + c + j) * space
                run_apply(offset(x, at), offset(y, at), space, k[j], k[GROUP + j], k[2 * GROUP + j], streaming)
    if streaming:
        fence()
    if a[THREADS] == 1:  # saves a second call; with more threads the launcher waits for all of them first
        update_running(a, thread, threads, stored, param, acc)


@body
def planes_backward(a, thread, threads, stored, param, acc):
    """Both passes of the backward over each of this thread's groups of BLOCK channels."""
    x, dy, dx = pointer(a[X], stored), pointer(a[DY], stored), pointer(a[OUT], stored)
    batch, channels, space, streaming = a[BATCH], a[CHANNELS], a[SPACE], a[STREAM] != 0
    dy_batch, dy_channel, step = a[DY_BATCH], a[DY_CHANNEL], a[DY_SPACE]
    s, t, k = alloca(GROUP, f64), alloca(GROUP, f64), alloca(FOUR_GROUPS, acc)
    first, last = share((channels + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for group in range(first, last):
        c = group * a[BLOCK]
        width = min(a[BLOCK], channels - c)
        group_backward_sums(a, x, dy, c, width, 0, space, s, t, acc)
        for j in range(width):
            coefficients = backward_coefficients(a, c + j, param, acc, s[j], t[j], f64(batch * space))
            k[j], k[GROUP + j], k[2 * GROUP + j], k[3 * GROUP + j] = coefficients
        if a[OUT] != 0:
            for n in range(batch - 1, -1, -1):
                for j in range(width):
                    at, g = (n * channels + c + j) * space, offset(dy, n * dy_batch + (c + j) * dy_channel)
                    mean, ca, cb, cc = k[j], k[GROUP + j], k[2 * GROUP + j], k[3 * GROUP + j]
                    run_backward_apply(offset(x, at), g, step, offset(dx, at), space, mean, ca, cb, cc, streaming)
    if streaming:
        fence()


@loop
def piece(a, index):
    """Where the index-th of PARTS pieces of a sample starts and how long it is, in units of BLOCK neighbours."""
    start = index * a[BLOCK]
    return start, min(a[BLOCK], a[SPACE] - start)


@body
def planes_reduce(a, thread, threads, stored, param, acc):
    """Partial sums of few, long channels: one part is a block of neighbours in every sample."""
    x, partials, channels = pointer(a[X], stored), pointer(a[PARTIALS], f64), a[CHANNELS]
    first, last = share(a[PARTS] * channels, thread, threads)
    for unit in range(first, last):
        p, c = unit // channels, unit % channels
        start, length = piece(a, p)
        _, s, q = channel_sums(a, x, c, start, length, acc)
        partials[2 * p * channels + c], partials[(2 * p + 1) * channels + c] = s, q


@body
def planes_backward_reduce(a, thread, threads, stored, param, acc):
    x, dy, partials, channels = pointer(a[X], stored), pointer(a[DY], stored), pointer(a[PARTIALS], f64), a[CHANNELS]
    first, last = share(a[PARTS] * channels, thread, threads)
    for unit in range(first, last):
        p, c = unit // channels, unit % channels
        start, length = piece(a, p)
        at = 2 * p * channels + c
        group_backward_sums(a, x, dy, c, 1, start, length, offset(partials, at), offset(partials, at + channels), acc)


@body
def planes_apply(a, thread, threads, stored, param, acc):
    """Normalize with given coefficients, in memory order."""
    x, y, k = pointer(a[X], stored), pointer(a[OUT], stored), pointer(a[COEFFICIENTS], acc)
    channels, space, parts, streaming = a[CHANNELS], a[SPACE], a[PARTS], a[STREAM] != 0
    first, last = share(a[BATCH] * channels * parts, thread, threads)
    for unit in range(first, last):
        run, c = unit // parts, unit // parts % channels
        start, length = piece(a, unit % parts)
        at = run * space + start
        run_apply(offset(x, at), offset(y, at), length, k[c], k[channels + c], k[2 * channels + c], streaming)
    if streaming:
        fence()


@body
def planes_backward_apply(a, thread, threads, stored, param, acc):
    x, dy, dx, k = pointer(a[X], stored), pointer(a[DY], stored), pointer(a[OUT], stored), pointer(a[COEFFICIENTS], acc)
    channels, space, parts, streaming = a[CHANNELS], a[SPACE], a[PARTS], a[STREAM] != 0
    first, last = share(a[BATCH] * channels * parts, thread, threads)
    for unit in range(first, last):
        run, c = unit // parts, unit // parts % channels
        start, length = piece(a, unit % parts)
        at = run * space + start
        g = offset(dy, run // channels * a[DY_BATCH] + c * a[DY_CHANNEL] + start * a[DY_SPACE])
        mean, ca, cb, cc = k[c], k[channels + c], k[2 * channels + c], k[3 * channels + c]
        run_backward_apply(offset(x, at), g, a[DY_SPACE], offset(dx, at), length, mean, ca, cb, cc, streaming)
    if streaming:
        fence()


# --- columns: rows of channels -----------------------------------------------------------------------------------------------------
# A block of columns keeps its sums (or coefficients) in first-level cache while rows stream past, four at a time.


@loop
def fill(memory, start, count, value):
    for i in range(start, start + count):
        memory[i] = value


@loop
def sum_of(memory, start, count):
    """The sum of neighbours in memory."""
    lanes, i = splat(0.0, 8), 0
    while i + 8 <= count:
        lanes = lanes + load(memory, start + i, 8)
        i += 8
    s = total(lanes)
    while i < count:
        s += memory[start + i]
        i += 1
    return s


@lanewise
def eight_row_shift(x, stride, j, shift, acc, lanes):
    s = load(x, j, lanes)
    for r in range(1, 8):
        s = s + load(x, r * stride + j, lanes)
    store(shift, j, s * acc(0.125))


@loop
def column_shifts(x, rows, stride, width, shift, acc):
    """The mean of each column's first eight rows (of its first row where there are fewer)."""
    j = 0
    if rows >= 8:
        while j + 8 <= width:
            eight_row_shift(x, stride, j, shift, acc, 8)
            j += 8
        while j < width:
            eight_row_shift(x, stride, j, shift, acc, 1)
            j += 1
    while j < width:
        shift[j] = load(x, j, 1)
        j += 1


@lanewise
def eight_rows(x, stride, j, shift, s, q, lanes):
    k = load(shift, j, lanes)
    d = load(x, j, lanes) - k
    sums, squares = d, d * d
    if lanes == 8:  # rows are short stretches of memory, which the processor's own prefetching serves badly
        for r in range(8, 16):
            prefetch(x, r * stride + j)
    for r in range(1, 8):
        d = load(x, r * stride + j, lanes) - k
        sums, squares = sums + d, fma(d, d, squares)
    store(s, j, load(s, j, lanes) + convert(sums, f64))
    store(q, j, load(q, j, lanes) + convert(squares, f64))


@lanewise
def one_row(x, j, shift, s, q, lanes):
    d = load(x, j, lanes) - load(shift, j, lanes)
    store(s, j, load(s, j, lanes) + convert(d, f64))
    store(q, j, load(q, j, lanes) + convert(d * d, f64))


@loop
def block_sums(x, rows, stride, width, shift, s, q):
    """Add Σd and Σd² of each column over the rows to s and q."""
    r = 0
    while r + 8 <= rows:
        j = 0
        while j + 8 <= width:
            eight_rows(offset(x, r * stride), stride, j, shift, s, q, 8)
            j += 8
        while j < width:
            eight_rows(offset(x, r * stride), stride, j, shift, s, q, 1)
            j += 1
        r += 8
    while r < rows:
        j = 0
        while j + 8 <= width:
            one_row(offset(x, r * stride), j, shift, s, q, 8)
            j += 8
        while j < width:
            one_row(offset(x, r * stride), j, shift, s, q, 1)
            j += 1
        r += 1


@loop
def block_apply(x, y, rows, stride, width, k, gap, streaming):
    """y = (x − mean)·scale + shift with column vectors k, k + gap, k + 2·gap."""
    for r in range(rows):
        at = r * stride
        j = 0
        if streaming:
            while j + 8 <= width:
                v = load(x, at + j, 8) - load(k, j, 8)
                stream(y, at + j, fma(v, load(k, gap + j, 8), load(k, 2 * gap + j, 8)))
                j += 8
        while j + 8 <= width:
            v = load(x, at + j, 8) - load(k, j, 8)
            store(y, at + j, fma(v, load(k, gap + j, 8), load(k, 2 * gap + j, 8)))
            j += 8
        while j < width:
            v = load(x, at + j, 1) - load(k, j, 1)
            store(y, at + j, fma(v, load(k, gap + j, 1), load(k, 2 * gap + j, 1)))
            j += 1


@loop
def dy_row(a, r):
    """Where row r of dy starts: its strides may differ from x's, zero included."""
    if a[X_CHANNEL] != 1:  # rows are samples
        return r * a[DY_BATCH]
    if a[DY_BATCH] == a[SPACE] * a[DY_SPACE]:
        return r * a[DY_SPACE]
    return r // a[SPACE] * a[DY_BATCH] + r % a[SPACE] * a[DY_SPACE]


@lanewise
def four_rows_backward(x, dy, stride, g0, g1, g2, g3, j, mean, s, t, lanes):
    m = load(mean, j, lanes)
    a, b, c, d = load(dy, g0 + j, lanes), load(dy, g1 + j, lanes), load(dy, g2 + j, lanes), load(dy, g3 + j, lanes)
    if lanes == 8:  # rows are short stretches of memory, which the processor's own prefetching serves badly
        for r in range(4, 8):
            prefetch(x, r * stride + j)
            prefetch(dy, g0 + r * (g1 - g0) + j)
    products = fma(load(x, stride + j, lanes) - m, b, (load(x, j, lanes) - m) * a)
    products = products + fma(load(x, 3 * stride + j, lanes) - m, d, (load(x, 2 * stride + j, lanes) - m) * c)
    store(s, j, load(s, j, lanes) + convert((a + b) + (c + d), f64))
    store(t, j, load(t, j, lanes) + convert(products, f64))


@lanewise
def one_row_backward(x, dy, g, j, mean, s, t, lanes):
    a = load(dy, g + j, lanes)
    store(s, j, load(s, j, lanes) + convert(a, f64))
    store(t, j, load(t, j, lanes) + convert((load(x, j, lanes) - load(mean, j, lanes)) * a, f64))


@loop
def block_backward_sums(a, x, dy, first, last, stride, width, mean, s, t):
    """Add Σdy and Σdy·(x − mean) of each column over rows first..last to s and t."""
    r = first
    while r + 4 <= last:
        g0, g1, g2, g3 = dy_row(a, r), dy_row(a, r + 1), dy_row(a, r + 2), dy_row(a, r + 3)
        j = 0
        while j + 8 <= width:
            four_rows_backward(offset(x, r * stride), dy, stride, g0, g1, g2, g3, j, mean, s, t, 8)
            j += 8
        while j < width:
            four_rows_backward(offset(x, r * stride), dy, stride, g0, g1, g2, g3, j, mean, s, t, 1)
            j += 1
        r += 4
    while r < last:
        g0, j = dy_row(a, r), 0
        while j + 8 <= width:
            one_row_backward(offset(x, r * stride), dy, g0, j, mean, s, t, 8)
            j += 8
        while j < width:
            one_row_backward(offset(x, r * stride), dy, g0, j, mean, s, t, 1)
            j += 1
        r += 1


@loop
def block_backward_apply(a, x, dy, dx, first, last, stride, width, k, gap, streaming):
    """dx = A·dy + B·(x − mean) + C with column vectors k (mean), k + gap (A), k + 2·gap (B), k + 3·gap (C)."""
    for r in range(first, last):
        g, at = dy_row(a, r), r * stride
        j = 0
        if streaming:
            while j + 8 <= width:
                v = fma(load(x, at + j, 8) - load(k, j, 8), load(k, 2 * gap + j, 8), load(k, 3 * gap + j, 8))
                stream(dx, at + j, fma(load(dy, g + j, 8), load(k, gap + j, 8), v))
                j += 8
        while j + 8 <= width:
            v = fma(load(x, at + j, 8) - load(k, j, 8), load(k, 2 * gap + j, 8), load(k, 3 * gap + j, 8))
            store(dx, at + j, fma(load(dy, g + j, 8), load(k, gap + j, 8), v))
            j += 8
        while j < width:
            v = fma(load(x, at + j, 1) - load(k, j, 1), load(k, 2 * gap + j, 1), load(k, 3 * gap + j, 1))
            store(dx, at + j, fma(load(dy, g + j, 1), load(k, gap + j, 1), v))
            j += 1


@loop
def layout(a, rows_of_channels):
    """(rows, columns, columns to a channel) of the tensor seen as columns."""
    if rows_of_channels:
        return a[BATCH] * a[SPACE], a[CHANNELS], 1
    return a[BATCH], a[CHANNELS] * a[SPACE], a[SPACE]


@loop
def columns_forward(a, thread, threads, stored, param, acc, rows_of_channels):
    """Both passes over each of this thread's blocks of BLOCK columns (whole channels), all rows."""
    x, y, streaming = pointer(a[X], stored), pointer(a[OUT], stored), a[STREAM] != 0
    rows, columns, span = layout(a, rows_of_channels)
    s, q, shift, k = alloca(COLUMNS, f64), alloca(COLUMNS, f64), alloca(COLUMNS, acc), alloca(FOUR_COLUMNS, acc)
    first, last = share((columns + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for block in range(first, last):
        start = block * a[BLOCK]
        width = min(a[BLOCK], columns - start)
        fill(s, 0, width, 0.0)
        fill(q, 0, width, 0.0)
        column_shifts(offset(x, start), rows, columns, width, shift, acc)
        if span > 1:  # a channel's columns share the first one's shift
            for j in range(0, width, span):
                fill(shift, j, span, shift[j])
        block_sums(offset(x, start), rows, columns, width, shift, s, q)
        for j in range(0, width, span):
            c = (start + j) // span
            write_moments(a, c, f64(shift[j]), sum_of(s, j, span), sum_of(q, j, span), f64(rows * span))
            mean, scale, bias = forward_coefficients(a, c, param, acc)
            fill(k, j, span, mean)
            fill(k, COLUMNS + j, span, scale)
            fill(k, 2 * COLUMNS + j, span, bias)
        block_apply(offset(x, start), offset(y, start), rows, columns, width, k, COLUMNS, streaming)
    if streaming:
        fence()
    if a[THREADS] == 1:
        update_running(a, thread, threads, stored, param, acc)


@loop
def columns_backward(a, thread, threads, stored, param, acc, rows_of_channels):
    """Both passes of the backward over each of this thread's blocks of columns, all rows."""
    x, dy, dx, streaming = pointer(a[X], stored), pointer(a[DY], stored), pointer(a[OUT], stored), a[STREAM] != 0
    rows, columns, span = layout(a, rows_of_channels)
    s, t, k, exact = alloca(COLUMNS, f64), alloca(COLUMNS, f64), alloca(FOUR_COLUMNS, acc), pointer(a[MOMENTS], f64)
    first, last = share((columns + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for block in range(first, last):
        start = block * a[BLOCK]
        width = min(a[BLOCK], columns - start)
        fill(s, 0, width, 0.0)
        fill(t, 0, width, 0.0)
        for j in range(0, width, span):
            fill(k, j, span, acc(exact[(start + j) // span]))
        block_backward_sums(a, offset(x, start), offset(dy, start), 0, rows, columns, width, k, s, t)
        for j in range(0, width, span):
            c = (start + j) // span
            sums = sum_of(s, j, span)
            products = sum_of(t, j, span) + (f64(k[j]) - exact[c]) * sums
            _, ca, cb, cc = backward_coefficients(a, c, param, acc, sums, products, f64(rows * span))
            fill(k, COLUMNS + j, span, ca)
            fill(k, 2 * COLUMNS + j, span, cb)
            fill(k, 3 * COLUMNS + j, span, cc)
        if a[OUT] != 0:
            block_backward_apply(
                a, offset(x, start), offset(dy, start), offset(dx, start), 0, rows, columns, width, k, COLUMNS, streaming
            )
    if streaming:
        fence()


@body
def rows_forward(a, thread, threads, stored, param, acc):
    columns_forward(a, thread, threads, stored, param, acc, True)


@body
def rows_backward(a, thread, threads, stored, param, acc):
    columns_backward(a, thread, threads, stored, param, acc, True)


@body
def small_forward(a, thread, threads, stored, param, acc):
    columns_forward(a, thread, threads, stored, param, acc, False)


@body
def small_backward(a, thread, threads, stored, param, acc):
    columns_backward(a, thread, threads, stored, param, acc, False)


@body
def rows_reduce(a, thread, threads, stored, param, acc):
    """Partial sums of many rows: one part is BLOCK rows of all channels."""
    x, rows, columns = pointer(a[X], stored), a[BATCH] * a[SPACE], a[CHANNELS]
    shift = alloca(COLUMNS, acc)
    first, last = share(a[PARTS], thread, threads)
    for p in range(first, last):
        row, partials = p * a[BLOCK], offset(pointer(a[PARTIALS], f64), 2 * p * columns)
        length = min(a[BLOCK], rows - row)
        fill(partials, 0, 2 * columns, 0.0)
        for start in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - start)
            block, s, q = offset(x, row * columns + start), offset(partials, start), offset(partials, columns + start)
            column_shifts(block, length, columns, width, shift, acc)
            block_sums(block, length, columns, width, shift, s, q)
            for j in range(width):  # from this part's shift to the column's first value
                delta = f64(shift[j]) - f64(load(x, start + j, 1))
                moved = s[j] + f64(length) * delta
                s[j], q[j] = moved, q[j] + delta * (s[j] + moved)


@body
def rows_backward_reduce(a, thread, threads, stored, param, acc):
    x, dy = pointer(a[X], stored), pointer(a[DY], stored)
    rows, columns, exact = a[BATCH] * a[SPACE], a[CHANNELS], pointer(a[MOMENTS], f64)
    mean = alloca(COLUMNS, acc)
    first, last = share(a[PARTS], thread, threads)
    for p in range(first, last):
        row, partials = p * a[BLOCK], offset(pointer(a[PARTIALS], f64), 2 * p * columns)
        end = min(row + a[BLOCK], rows)
        fill(partials, 0, 2 * columns, 0.0)
        for start in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - start)
            for j in range(width):
                mean[j] = acc(exact[start + j])
            s, t = offset(partials, start), offset(partials, columns + start)
            block_backward_sums(a, offset(x, start), offset(dy, start), row, end, columns, width, mean, s, t)
            for j in range(width):
                t[j] += (f64(mean[j]) - exact[start + j]) * s[j]


# The second pass takes the rows a stretch at a time, the last stretch first: it is still in cache. (Row by row backwards would
# defeat the processor's prefetching.)


@body
def rows_apply(a, thread, threads, stored, param, acc):
    """Normalize with given coefficients."""
    x, y, k, streaming = pointer(a[X], stored), pointer(a[OUT], stored), pointer(a[COEFFICIENTS], acc), a[STREAM] != 0
    columns = a[CHANNELS]
    first, end = share(a[BATCH] * a[SPACE], thread, threads)
    stretch = max(STRETCH // columns, 1)
    while end > first:
        start = max(end - stretch, first)
        at = start * columns
        block_apply(offset(x, at), offset(y, at), end - start, columns, columns, k, columns, streaming)
        end = start
    if streaming:
        fence()


@body
def rows_backward_apply(a, thread, threads, stored, param, acc):
    x, dy, dx, k = pointer(a[X], stored), pointer(a[DY], stored), pointer(a[OUT], stored), pointer(a[COEFFICIENTS], acc)
    columns, streaming = a[CHANNELS], a[STREAM] != 0
    first, end = share(a[BATCH] * a[SPACE], thread, threads)
    stretch = max(STRETCH // columns, 1)
    while end > first:
        start = max(end - stretch, first)
        block_backward_apply(a, x, dy, dx, start, end, columns, columns, k, columns, streaming)
        end = start
    if streaming:
        fence()


# --- between the passes: one thread, channels only -----------------------------------------------------------------------------------


@loop
def parts_added(a):
    """The two sums of every channel, over all parts: added up, in order, into the first part's memory."""
    sums, size = pointer(a[PARTIALS], f64), 2 * a[CHANNELS]
    for p in range(1, a[PARTS]):
        part, i = offset(sums, p * size), 0
        while i + 8 <= size:
            store(sums, i, load(sums, i, 8) + load(part, i, 8))
            i += 8
        while i < size:
            sums[i] += part[i]
            i += 1
    return sums


@body
def combine(a, thread, threads, stored, param, acc):
    """Add the parts' sums up into moments and forward coefficients."""
    x, k, sums = pointer(a[X], stored), pointer(a[COEFFICIENTS], acc), parts_added(a)
    channels, count = a[CHANNELS], f64(a[BATCH] * a[SPACE])
    for c in range(channels):
        write_moments(a, c, f64(load(x, c * a[X_CHANNEL], 1)), sums[c], sums[channels + c], count)
        k[c], k[channels + c], k[2 * channels + c] = forward_coefficients(a, c, param, acc)
    update_running(a, thread, threads, stored, param, acc)


@body
def backward_combine(a, thread, threads, stored, param, acc):
    """Add the parts' sums up into the gradients of weight and bias and the backward coefficients."""
    k, sums = pointer(a[COEFFICIENTS], acc), parts_added(a)
    channels, count = a[CHANNELS], f64(a[BATCH] * a[SPACE])
    for c in range(channels):
        mean, ca, cb, cc = backward_coefficients(a, c, param, acc, sums[c], sums[channels + c], count)
        k[c], k[channels + c], k[2 * channels + c], k[3 * channels + c] = mean, ca, cb, cc


@body
def prepare(a, thread, threads, stored, param, acc):
    """Forward coefficients from given moments (evaluation)."""
    k, channels = pointer(a[COEFFICIENTS], acc), a[CHANNELS]
    for c in range(channels):
        k[c], k[channels + c], k[2 * channels + c] = forward_coefficients(a, c, param, acc)
