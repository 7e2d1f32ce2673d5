"""Planes: runs of neighbours that share a channel, whose scale and shift are scalars."""

from __future__ import annotations

from batchnorm.kernels.loops.channels import (
    backward_coefficients,
    backward_combine,
    combine,
    finish,
    forward_coefficients,
    write_moments,
)
from batchnorm.kernels.loops.slots import (
    BATCH,
    BLOCK,
    CHANNELS,
    COEFFICIENTS,
    DY,
    DY_BATCH,
    DY_CHANNEL,
    DY_SPACE,
    FOUR_GROUPS,
    GROUP,
    MOMENTS,
    OUT,
    PARTIALS,
    PARTS,
    SPACE,
    STREAM,
    THREE_GROUPS,
    VALUES,
    X,
    body,
    due,
    f64,
    loop,
    meet,
    share,
)
from batchnorm.kernels.simd import (
    alloca,
    convert,
    fence,
    fma,
    load,
    load_pair,
    offset,
    pointer,
    splat,
    store,
    store_pair,
    stream_pair,
    total,
)


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
    """Add Σd and Σd² over n neighbours to the sums in progress: two vectors and one scalar of each."""
    s0, s1, q0, q1, s, q = sums
    i = 0
    while i + 16 <= n:
        a, b = load_pair(x, i)
        d, e = a - shift, b - shift
        s0, q0 = s0 + d, fma(d, d, q0)
        s1, q1 = s1 + e, fma(e, e, q1)
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
    """Σd and Σd² of `width` neighbouring channels of short runs, so that memory is read in long stretches."""
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
            a, b = load_pair(x, i)
            stream_pair(y, i, fma(a - mean, scale, shift), fma(b - mean, scale, shift))
            i += 16
    while i + 16 <= n:
        a, b = load_pair(x, i)
        store_pair(y, i, fma(a - mean, scale, shift), fma(b - mean, scale, shift))
        i += 16
    if i + 8 <= n:
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
            a, b = load_pair(x, i)
            t_all = t_all + convert((a - mean) + (b - mean), f64)
            i += 16
        while i < n:
            t += f64(load(x, i, 1) - mean)
            i += 1
        g = f64(load(dy, 0, 1))
        return g * n, g * (t + total(t_all))
    while i + 32 <= n:
        g0, g1 = load_pair(dy, i)
        g2, g3 = load_pair(dy, i + 16)
        x0, x1 = load_pair(x, i)
        x2, x3 = load_pair(x, i + 16)
        t0 = fma(x1 - mean, g1, (x0 - mean) * g0)
        t1 = fma(x3 - mean, g3, (x2 - mean) * g2)
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
    """Σdy and Σdy·(x − mean) of `width` neighbouring channels, over `length` neighbours in every sample."""
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
            g0, g1 = load_pair(dy, i)
            x0, x1 = load_pair(x, i)
            stream_pair(dx, i, fma(g0, a, fma(x0 - mean, b, c)), fma(g1, a, fma(x1 - mean, b, c)))
            i += 16
    while i + 16 <= n:
        g0, g1 = load_pair(dy, i)
        x0, x1 = load_pair(x, i)
        store_pair(dx, i, fma(g0, a, fma(x0 - mean, b, c)), fma(g1, a, fma(x1 - mean, b, c)))
        i += 16
    if i + 8 <= n:
        store(dx, i, fma(load(dy, i, 8), a, fma(load(x, i, 8) - mean, b, c)))
        i += 8
    while i < n:
        store(dx, i, fma(load(dy, i, 1), a, fma(load(x, i, 1) - mean, b, c)))
        i += 1


@body
def planes_forward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        both_passes(a, thread, threads, stored, param, acc)
    finish(a, 1, thread, threads, stored, param, acc)


@loop
def both_passes(a, thread, threads, stored, param, acc):
    """Both passes over this thread's groups of BLOCK channels; the second backwards, from the warm end of the cache."""
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
            write_moments(a, c + j, origin[j], s[j], q[j])
            k[j], k[GROUP + j], k[2 * GROUP + j] = forward_coefficients(a, c + j, param, acc)
        for n in range(batch - 1, -1, -1):
            for j in range(width):
                at = (n * channels + c + j) * space
                run_apply(offset(x, at), offset(y, at), space, k[j], k[GROUP + j], k[2 * GROUP + j], streaming)
    if streaming:
        fence()


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
            coefficients = backward_coefficients(a, c + j, param, acc, s[j], t[j])
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


# One launch for two separate passes and what lies between them.


@body
def planes_split_forward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        planes_reduce(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 1):
        combine(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 2):
        planes_apply(a, thread, threads, stored, param, acc)
    finish(a, 2, thread, threads, stored, param, acc)


@body
def planes_split_backward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        planes_backward_reduce(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 1):
        backward_combine(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 2) and a[OUT] != 0:
        planes_backward_apply(a, thread, threads, stored, param, acc)
