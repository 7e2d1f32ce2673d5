"""Planes: runs of neighbours that share a channel, whose scale and shift are scalars."""

from __future__ import annotations

from batchnorm.kernels.loops.channels import (
    backward_coefficients,
    backward_combine,
    backward_prepare,
    combine,
    forward_coefficients,
    prepare,
    sums_wanted,
    unpacking,
    weighted_shift,
    write_moments,
)
from batchnorm.kernels.loops.forms import (
    activated,
    counted,
    gradient_at,
    gradient_pair,
    input_gradient,
    put,
    put_pair,
    residual_at,
    residual_pair,
    weighed,
    weight_at,
    weight_pair,
)
from batchnorm.kernels.loops.slots import (
    as_float,
    barrier,
    body,
    f64,
    loop,
    share,
    stage_enabled,
    u8,
)
from batchnorm.kernels.loops.table import *
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
def weighted_run_sums(x, w, n, shift, acc, form):
    """Σw·d and Σw·d² over n neighbours, in float64."""
    s0, s1, q0, q1, s, q = no_sums(acc)
    i = 0
    while i + 16 <= n:
        a, b = load_pair(x, i)
        wa, wb = weight_pair(w, i, x, a, form)
        a, b = counted(a - shift, wa, form), counted(b - shift, wb, form)
        da, db = a * wa, b * wb
        s0, q0 = s0 + da, fma(da, a, q0)
        s1, q1 = s1 + db, fma(db, b, q1)
        i += 16
    if i + 8 <= n:
        a = load(x, i, 8)
        wa = weight_at(w, i, a, form, 8)
        a = counted(a - shift, wa, form)
        da = a * wa
        s0, q0 = s0 + da, fma(da, a, q0)
        i += 8
    while i < n:
        u = load(x, i, 1)
        wu = weight_at(w, i, u, form, 1)
        u = counted(u - shift, wu, form)
        du = u * wu
        s, q = s + du, fma(du, u, q)
        i += 1
    return run_totals((s0, s1, q0, q1, s, q))


@loop
def weighted_group_sums(a, x, first, width, start, length, origin, shift, s, q, acc, form):
    """Σw·d and Σw·d² of `width` neighbouring channels, over `length` neighbours in every sample."""
    channels, space, weights = a[CHANNELS], a[SPACE], pointer(a[WEIGHTS], acc)
    for j in range(width):
        shift[j] = weighted_shift(a, x, first + j, weights, acc)
        origin[j], s[j], q[j] = f64(shift[j]), 0.0, 0.0
    for n in range(a[BATCH]):
        for j in range(width):
            for i in range(start, start + length, VALUES):
                run, w = offset(x, (n * channels + first + j) * space + i), offset(weights, n * space + i)
                ds, dq = weighted_run_sums(run, w, min(VALUES, start + length - i), shift[j], acc, form)
                s[j] += ds
                q[j] += dq


@loop
def run_apply(a, at, place, bit, n, mean, scale, shift, stored, acc, form):
    """Normalize n neighbours from `at` on, add the residual, apply the activation; their weights begin at `place`."""
    x, y, streaming = offset(pointer(a[X], stored), at), offset(pointer(a[OUT], stored), at), a[STREAM] != 0
    r, bits, p = offset(pointer(a[RESIDUAL], stored), at), pointer(a[SLOPE_BITS], u8), acc(as_float(a, PARAMETER))
    weights = offset(pointer(a[WEIGHTS], acc), place)
    i = 0
    while i + 16 <= n:
        v, w = load_pair(x, i)
        rv, rw = residual_pair(r, i, v, form)
        wv, ww = weight_pair(weights, i, x, v, form)
        v = counted(activated(v, rv, mean, scale, shift, bits, bit + i, p, form), wv, form)
        w = counted(activated(w, rw, mean, scale, shift, bits, bit + i + 8, p, form), ww, form)
        put_pair(y, i, v, w, streaming)
        i += 16
    if i + 8 <= n:
        v = load(x, i, 8)
        rv, wv = residual_at(r, i, v, form, 8), weight_at(weights, i, v, form, 8)
        put(y, i, counted(activated(v, rv, mean, scale, shift, bits, bit + i, p, form), wv, form), streaming)
        i += 8
    while i < n:
        u = load(x, i, 1)
        ru, wu = residual_at(r, i, u, form, 1), weight_at(weights, i, u, form, 1)
        store(y, i, counted(activated(u, ru, mean, scale, shift, bits, bit + i, p, form), wu, form))
        i += 1


@loop
def run_backward_sums(a, at, place, g, bit, n, k, scale, shift, stored, acc, form):
    """Σdz and Σdz·(x − mean) in float64 over n neighbours; dy begins at g, weights at `place`."""
    x, dy = offset(pointer(a[X], stored), at), offset(pointer(a[DY], stored), g)
    r = offset(pointer(a[RESIDUAL], stored), at)
    step, bits, p = a[DY_SPACE], pointer(a[SLOPE_BITS], u8), acc(as_float(a, PARAMETER))
    weights = offset(pointer(a[WEIGHTS], acc), place)
    s_all, t_all = splat(0.0, 8), splat(0.0, 8)
    s, t = 0.0, 0.0
    i = 0
    while i + 32 <= n:
        v, w = load_pair(x, i)
        rv, rw = residual_pair(r, i, v, form)
        gv, gw = gradient_pair(dy, i, step)
        wv, ww = weight_pair(weights, i, x, v, form)
        gv, v = weighed(gv, v, rv, k, scale, shift, bits, bit + i, p, wv, form)
        gw, w = weighed(gw, w, rw, k, scale, shift, bits, bit + i + 8, p, ww, form)
        s0, t0 = gv + gw, fma(w, gw, v * gv)
        v, w = load_pair(x, i + 16)
        rv, rw = residual_pair(r, i + 16, v, form)
        gv, gw = gradient_pair(dy, i + 16, step)
        wv, ww = weight_pair(weights, i + 16, x, v, form)
        gv, v = weighed(gv, v, rv, k, scale, shift, bits, bit + i + 16, p, wv, form)
        gw, w = weighed(gw, w, rw, k, scale, shift, bits, bit + i + 24, p, ww, form)
        s_all = s_all + convert(s0 + (gv + gw), f64)
        t_all = t_all + convert(t0 + fma(w, gw, v * gv), f64)
        i += 32
    if i + 16 <= n:  # a pair again, since only pairs know where their lanes' bits are
        v, w = load_pair(x, i)
        rv, rw = residual_pair(r, i, v, form)
        gv, gw = gradient_pair(dy, i, step)
        wv, ww = weight_pair(weights, i, x, v, form)
        gv, v = weighed(gv, v, rv, k, scale, shift, bits, bit + i, p, wv, form)
        gw, w = weighed(gw, w, rw, k, scale, shift, bits, bit + i + 8, p, ww, form)
        s_all = s_all + convert(gv + gw, f64)
        t_all = t_all + convert(fma(w, gw, v * gv), f64)
        i += 16
    if i + 8 <= n:
        v = load(x, i, 8)
        rv, gv, wv = residual_at(r, i, v, form, 8), gradient_at(dy, i, step, 8), weight_at(weights, i, v, form, 8)
        gv, v = weighed(gv, v, rv, k, scale, shift, bits, bit + i, p, wv, form)
        s_all, t_all = s_all + convert(gv, f64), t_all + convert(v * gv, f64)
        i += 8
    while i < n:
        u = load(x, i, 1)
        ru, gu, wu = residual_at(r, i, u, form, 1), gradient_at(dy, i, step, 1), weight_at(weights, i, u, form, 1)
        gu, u = weighed(gu, u, ru, k, scale, shift, bits, bit + i, p, wu, form)
        s, t = s + f64(gu), t + f64(gu) * f64(u)
        i += 1
    return s + total(s_all), t + total(t_all)


@loop
def group_backward_sums(a, first, width, start, length, k, s, t, stored, acc, form):
    """Σdz and Σdz·(x − mean) of `width` neighbouring channels, over `length` neighbours in every sample.

    k has the channels' coefficients: GROUP means, GROUP scales … of which the last are shifts.
    """
    channels, space, exact = a[CHANNELS], a[SPACE], pointer(a[MOMENTS], f64)
    for j in range(width):
        s[j], t[j] = 0.0, 0.0
    for n in range(a[BATCH]):
        for j in range(width):
            c = first + j
            run = n * channels + c
            g = n * a[DY_BATCH] + c * a[DY_CHANNEL] + start * a[DY_SPACE]
            at, place, bit = run * space + start, n * space + start, run * a[BITS_ROW] + start
            mean, scale, shift = k[j], k[GROUP + j], k[4 * GROUP + j]
            ds, dt = run_backward_sums(a, at, place, g, bit, length, mean, scale, shift, stored, acc, form)
            s[j] += ds
            t[j] += dt
    for j in range(width):  # what rounding the mean lost
        t[j] += (f64(acc(exact[first + j])) - exact[first + j]) * s[j]


@loop
def run_backward_apply(a, at, place, g, bit, n, k, ca, cb, cc, shift, stored, acc, form):
    """dx = A·(dz + weight·(B·(x − mean) + C)), and dz itself for the residual; dy begins at g, weights at `place`."""
    x, dy = offset(pointer(a[X], stored), at), offset(pointer(a[DY], stored), g)
    r = offset(pointer(a[RESIDUAL], stored), at)
    dx, dz = offset(pointer(a[OUT], stored), at), offset(pointer(a[GRAD_RESIDUAL], stored), at)
    gives, weights = a[GRAD_RESIDUAL] != 0, offset(pointer(a[WEIGHTS], acc), place)
    step, bits, p, streaming = a[DY_SPACE], pointer(a[SLOPE_BITS], u8), acc(as_float(a, PARAMETER)), a[STREAM] != 0
    i = 0
    while i + 16 <= n:
        v, w = load_pair(x, i)
        rv, rw = residual_pair(r, i, v, form)
        gv, gw = gradient_pair(dy, i, step)
        wv, ww = weight_pair(weights, i, x, v, form)
        gv, v = weighed(gv, v, rv, k, ca, shift, bits, bit + i, p, wv, form)
        gw, w = weighed(gw, w, rw, k, ca, shift, bits, bit + i + 8, p, ww, form)
        v, w = input_gradient(gv, v, wv, ca, cb, cc, form), input_gradient(gw, w, ww, ca, cb, cc, form)
        put_pair(dx, i, v, w, streaming)
        if gives:
            put_pair(dz, i, gv, gw, streaming)
        i += 16
    if i + 8 <= n:
        v = load(x, i, 8)
        rv, gv, wv = residual_at(r, i, v, form, 8), gradient_at(dy, i, step, 8), weight_at(weights, i, v, form, 8)
        gv, v = weighed(gv, v, rv, k, ca, shift, bits, bit + i, p, wv, form)
        put(dx, i, input_gradient(gv, v, wv, ca, cb, cc, form), streaming)
        if gives:
            put(dz, i, gv, streaming)
        i += 8
    while i < n:
        u = load(x, i, 1)
        ru, gu, wu = residual_at(r, i, u, form, 1), gradient_at(dy, i, step, 1), weight_at(weights, i, u, form, 1)
        gu, u = weighed(gu, u, ru, k, ca, shift, bits, bit + i, p, wu, form)
        store(dx, i, input_gradient(gu, u, wu, ca, cb, cc, form))
        if gives:
            store(dz, i, gu)
        i += 1


@body
def planes_forward(a, thread, threads, stored, param, acc, form):
    """Both passes over this thread's groups of BLOCK channels; the second backwards, from the warm end of the cache."""
    x, batch, channels, space = pointer(a[X], stored), a[BATCH], a[CHANNELS], a[SPACE]
    s, q, origin = alloca(GROUP, f64), alloca(GROUP, f64), alloca(GROUP, f64)
    shifts, k = alloca(GROUP, acc), alloca(FIVE_GROUPS, acc)
    first, last = share((channels + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for group in range(first, last):
        c = group * a[BLOCK]
        width = min(a[BLOCK], channels - c)
        if form.WEIGHTED:
            weighted_group_sums(a, x, c, width, 0, space, origin, shifts, s, q, acc, form)
        elif width == 1:
            origin[0], s[0], q[0] = channel_sums(a, x, c, 0, space, acc)
        else:
            group_sums(a, x, c, width, origin, shifts, s, q, acc)
        for j in range(width):
            write_moments(a, c + j, origin[j], s[j], q[j], param)
            k[j], k[GROUP + j], k[2 * GROUP + j] = forward_coefficients(a, c + j, param, acc)
        for n in range(batch - 1, -1, -1):
            for j in range(width):
                run = n * channels + c + j
                mean, scale, shift = k[j], k[GROUP + j], k[2 * GROUP + j]
                run_apply(a, run * space, n * space, run * a[BITS_ROW], space, mean, scale, shift, stored, acc, form)
    if a[STREAM] != 0:
        fence()


@body
def planes_backward(a, thread, threads, stored, param, acc, form):
    """Both passes of the backward over each of this thread's groups of BLOCK channels."""
    batch, channels, space = a[BATCH], a[CHANNELS], a[SPACE]
    s, t, k = alloca(GROUP, f64), alloca(GROUP, f64), alloca(FIVE_GROUPS, acc)
    first, last = share((channels + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for group in range(first, last):
        c = group * a[BLOCK]
        width = min(a[BLOCK], channels - c)
        for j in range(width):
            k[j], k[GROUP + j], k[4 * GROUP + j] = unpacking(a, c + j, param, acc, form)
        group_backward_sums(a, c, width, 0, space, k, s, t, stored, acc, form)
        for j in range(width):
            ca, cb, cc = backward_coefficients(a, c + j, param, acc, s[j], t[j])
            k[GROUP + j], k[2 * GROUP + j], k[3 * GROUP + j] = ca, cb, cc
        if a[OUT] != 0:
            for n in range(batch - 1, -1, -1):
                for j in range(width):
                    run = n * channels + c + j
                    at, bit, g = run * space, run * a[BITS_ROW], n * a[DY_BATCH] + (c + j) * a[DY_CHANNEL]
                    ca, cb, cc, shift = k[GROUP + j], k[2 * GROUP + j], k[3 * GROUP + j], k[4 * GROUP + j]
                    run_backward_apply(a, at, n * space, g, bit, space, k[j], ca, cb, cc, shift, stored, acc, form)
    if a[STREAM] != 0:
        fence()


@loop
def piece(a, index):
    """Where the index-th of PARTS pieces of a sample starts and how long it is, in units of BLOCK neighbours."""
    start = index * a[BLOCK]
    return start, min(a[BLOCK], a[SPACE] - start)


@loop
def planes_reduce(a, thread, threads, stored, acc, form):
    """Partial sums of few, long channels: one part is a block of neighbours in every sample."""
    x, partials, channels = pointer(a[X], stored), pointer(a[PARTIALS], f64), a[CHANNELS]
    origin, s, q, shift = alloca(1, f64), alloca(1, f64), alloca(1, f64), alloca(1, acc)
    first, last = share(a[PARTS] * channels, thread, threads)
    for unit in range(first, last):
        p, c = unit // channels, unit % channels
        start, length = piece(a, p)
        if form.WEIGHTED:
            weighted_group_sums(a, x, c, 1, start, length, origin, shift, s, q, acc, form)
        else:
            origin[0], s[0], q[0] = channel_sums(a, x, c, start, length, acc)
        partials[2 * p * channels + c], partials[(2 * p + 1) * channels + c] = s[0], q[0]


@loop
def planes_backward_reduce(a, thread, threads, stored, acc, form):
    partials, channels, all_k = pointer(a[PARTIALS], f64), a[CHANNELS], pointer(a[COEFFICIENTS], acc)
    k = alloca(FIVE_GROUPS, acc)
    first, last = share(a[PARTS] * channels, thread, threads)
    for unit in range(first, last):
        p, c = unit // channels, unit % channels
        start, length = piece(a, p)
        k[0], k[GROUP], k[4 * GROUP] = all_k[c], all_k[channels + c], all_k[4 * channels + c]
        s = offset(partials, 2 * p * channels + c)
        group_backward_sums(a, c, 1, start, length, k, s, offset(s, channels), stored, acc, form)


@loop
def planes_apply(a, thread, threads, stored, acc, form):
    """Normalize with given coefficients, in memory order."""
    k, channels, space, parts = pointer(a[COEFFICIENTS], acc), a[CHANNELS], a[SPACE], a[PARTS]
    first, last = share(a[BATCH] * channels * parts, thread, threads)
    for unit in range(first, last):
        run, c = unit // parts, unit // parts % channels
        start, length = piece(a, unit % parts)
        mean, scale, shift = k[c], k[channels + c], k[2 * channels + c]
        at, place, bit = run * space + start, run // channels * space + start, run * a[BITS_ROW] + start
        run_apply(a, at, place, bit, length, mean, scale, shift, stored, acc, form)
    if a[STREAM] != 0:
        fence()


@loop
def planes_backward_apply(a, thread, threads, stored, acc, form):
    k, channels, space, parts = pointer(a[COEFFICIENTS], acc), a[CHANNELS], a[SPACE], a[PARTS]
    first, last = share(a[BATCH] * channels * parts, thread, threads)
    for unit in range(first, last):
        run, c = unit // parts, unit // parts % channels
        start, length = piece(a, unit % parts)
        at, place, bit = run * space + start, run // channels * space + start, run * a[BITS_ROW] + start
        g = run // channels * a[DY_BATCH] + c * a[DY_CHANNEL] + start * a[DY_SPACE]
        ca, cb, cc, shift = k[channels + c], k[2 * channels + c], k[3 * channels + c], k[4 * channels + c]
        run_backward_apply(a, at, place, g, bit, length, k[c], ca, cb, cc, shift, stored, acc, form)
    if a[STREAM] != 0:
        fence()


# One launch for separate passes and what lies between them.


@body
def planes_split_forward(a, thread, threads, stored, param, acc, form):
    if stage_enabled(a, 0):
        planes_reduce(a, thread, threads, stored, acc, form)
    barrier(a)
    if stage_enabled(a, 1):
        combine(a, thread, threads, stored, param, acc, form)
    barrier(a)
    if stage_enabled(a, 2):
        planes_apply(a, thread, threads, stored, acc, form)


@body
def planes_split_backward(a, thread, threads, stored, param, acc, form):
    if stage_enabled(a, 0):
        backward_prepare(a, thread, threads, param, acc, form)
    barrier(a)
    if stage_enabled(a, 1) and sums_wanted(a):
        planes_backward_reduce(a, thread, threads, stored, acc, form)
    barrier(a)
    if stage_enabled(a, 2):
        backward_combine(a, thread, threads, param, acc)
    barrier(a)
    if stage_enabled(a, 3) and a[OUT] != 0:
        planes_backward_apply(a, thread, threads, stored, acc, form)


@body
def planes_evaluate(a, thread, threads, stored, param, acc, form):
    if stage_enabled(a, 0):
        prepare(a, thread, threads, param, acc)
    barrier(a)
    if stage_enabled(a, 1):
        planes_apply(a, thread, threads, stored, acc, form)
