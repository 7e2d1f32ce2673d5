"""What happens once a channel: from sums to moments, coefficients, gradients of the parameters, running statistics."""

from __future__ import annotations

import math

from batchnorm.kernels.loops.slots import as_float, barrier, body, f64, i64, loop, select, share, stage_enabled
from batchnorm.kernels.loops.table import *
from batchnorm.kernels.simd import load, offset, pointer, store


@loop
def optional(address, index, dtype, default):
    return f64(pointer(address, dtype)[index]) if address != 0 else default


@loop
def write_moments(a, c, shift, s, q, param):
    """Mean and biased variance of channel c, from the sums of d and d² around the shift."""
    moments = pointer(a[MOMENTS], f64)
    m = s * as_float(a, SHARE)
    var = q * as_float(a, SHARE) - m * m
    mean, var = shift + m, 0.0 if var < 0.0 else var
    channels = a[CHANNELS]
    moments[c], moments[channels + c] = mean, var
    if as_float(a, R_MAX) != 0.0:
        moments[2 * channels + c], moments[3 * channels + c] = renormed(a, c, mean, var, param)


@loop
def renormed(a, c, mean, var, param):
    """(r, d) that take the batch's moments to the running ones: Ioffe 2017, arXiv 1702.03275, Algorithm 1."""
    sigma = math.sqrt(f64(pointer(a[RUNNING_VAR], param)[c]) + as_float(a, EPS))
    r, d = math.sqrt(var + as_float(a, EPS)) / sigma, (mean - f64(pointer(a[RUNNING_MEAN], param)[c])) / sigma
    r_max, d_max = as_float(a, R_MAX), as_float(a, D_MAX)
    return min(max(r, 1.0 / r_max), r_max), min(max(d, -d_max), d_max)


@loop
def renorm_of(a, c):
    """(r, d) as the forward found them; without renormalization they change nothing."""
    if a[MOMENT_ROWS] != 4:
        return 1.0, 0.0
    moments, channels = pointer(a[MOMENTS], f64), a[CHANNELS]
    return moments[2 * channels + c], moments[3 * channels + c]


@loop
def forward_coefficients(a, c, param, acc):
    """(mean, scale, shift) so that y = (x − mean)·scale + shift, in the precision of the arithmetic.

    The mean is rounded and what the rounding lost goes into the shift: x − mean is then exact where it matters, for x
    near the mean.
    """
    moments = pointer(a[MOMENTS], f64)
    mean, var = moments[c], moments[a[CHANNELS] + c]
    r, d = renorm_of(a, c)
    weight = optional(a[WEIGHT], c, param, 1.0)
    scale = weight * r * (1.0 / math.sqrt(var + as_float(a, EPS)))
    rounded = acc(mean)
    shift = optional(a[BIAS], c, param, 0.0) + weight * d
    return rounded, acc(scale), acc(shift - (mean - f64(rounded)) * scale)


@loop
def backward_coefficients(a, c, param, acc, s, t):
    """(A, B, C) so that dx = A·(dz + B·(x − mean) + C), and the gradients of weight and bias.

    s = Σdz and t = Σdz·(x − mean); Ioffe & Szegedy 2015, section 3, with x̂ written out. A share of 0 says that the
    moments are fixed: x does not move them.
    """
    moments = pointer(a[MOMENTS], f64)
    mean, var = moments[c], moments[a[CHANNELS] + c]
    inverse = 1.0 / math.sqrt(var + as_float(a, EPS))
    r, d = renorm_of(a, c)  # constants
    add_up(a, GRAD_WEIGHT, c, param, t * inverse * r + s * d)
    add_up(a, GRAD_BIAS, c, param, s)
    scale = optional(a[WEIGHT], c, param, 1.0) * r * inverse
    if as_float(a, SHARE) == 0.0:
        return acc(scale), acc(0.0), acc(0.0)
    slope = -inverse * inverse * t * as_float(a, SHARE)
    return acc(scale), acc(slope), acc(-s * as_float(a, SHARE) - slope * (mean - f64(acc(mean))))


@loop
def add_up(a, slot, c, param, value):
    """Add a set's gradient to those of the sets before it, which this same thread has written."""
    if a[slot] != 0:
        gradient = pointer(a[slot], param)
        gradient[c] = param(value if a[INDEX] == 0 else f64(gradient[c]) + value)


@loop
def unpacking(a, c, param, acc, form):
    """(k, scale, shift) from which `forms.unpacked` finds dz and x − mean: k is the mean, or 1/scale to undo y."""
    if not form.FROM_Z:
        return acc(pointer(a[MOMENTS], f64)[c]), acc(0.0), acc(0.0)
    mean, scale, shift = forward_coefficients(a, c, param, acc)
    return (acc(1.0 / f64(scale)) if form.INPLACE else mean), scale, shift


@body
def update_running(a, param):
    """Move the running statistics towards a set's moments and count the batch.

    Not at all if any of them would be stored as something not finite: one bad batch must not poison inference for good.
    Nor if it has one value or none, and so no variance.
    """
    moments, channels, count = pointer(a[MOMENTS], f64), a[CHANNELS], as_float(a, COUNT)
    if count <= 1.0:
        return
    unbiased = count / (count - 1.0)
    for c in range(channels):
        if not (math.isfinite(param(moments[c])) and math.isfinite(param(moments[channels + c] * unbiased))):
            return
    factor = as_float(a, FACTOR)
    if a[COUNTER] != 0:
        counter = pointer(a[COUNTER], i64)
        counter[0] += 1
        if factor < 0.0:  # momentum=None: the plain average over batches
            factor = 1.0 / f64(counter[0])
    if a[RUNNING_MEAN] == 0 or factor == 0.0:
        return
    mean, var = pointer(a[RUNNING_MEAN], param), pointer(a[RUNNING_VAR], param)
    eps = as_float(a, EPS)
    for c in range(channels):
        mean[c] = param((1.0 - factor) * f64(mean[c]) + factor * moments[c])
        if a[MOMENT_ROWS] == 4:  # renormalization averages the deviation, with eps in it, instead of the variance
            sigma = (1.0 - factor) * math.sqrt(f64(var[c]) + eps) + factor * math.sqrt(moments[channels + c] + eps)
            var[c] = param(max(sigma * sigma - eps, 0.0))
        else:
            var[c] = param((1.0 - factor) * f64(var[c]) + factor * moments[channels + c] * unbiased)


@loop
def finish(whole, a, thread, param):
    """The last stage of a forward: one thread moves the running statistics by each set in order."""
    if whole[RUNNING_MEAN] != 0 or whole[COUNTER] != 0:
        barrier(whole)
        if stage_enabled(whole, LAST) and thread == 0:
            for index in range(whole[SETS]):
                select(whole, a, index)
                update_running(a, param)


# --- between two separate passes


@loop
def parts_added(a, first, last):
    """The two sums of channels first..last, over all parts: added up, in order, into the first part's memory."""
    sums, channels = pointer(a[PARTIALS], f64), a[CHANNELS]
    for p in range(1, a[PARTS]):
        for which in range(2):
            into, part = offset(sums, which * channels), offset(sums, (2 * p + which) * channels)
            i = first
            while i + 8 <= last:
                store(into, i, load(into, i, 8) + load(part, i, 8))
                i += 8
            while i < last:
                into[i] += part[i]
                i += 1
    return sums


@loop
def combine(a, thread, threads, stored, param, acc, form):
    """Add the parts' sums of this thread's channels up into moments and forward coefficients."""
    channels = a[CHANNELS]
    first, last = share(channels, thread, threads)
    sums = parts_added(a, first, last)
    for c in range(first, last):
        write_moments(a, c, f64(origin_of(a, c, stored, acc, form)), sums[c], sums[channels + c], param)
    prepare(a, thread, threads, param, acc)


@loop
def origin_of(a, c, stored, acc, form):
    """What the sums of all parts of channel c are taken around: a value near it."""
    x, index = pointer(a[X], stored), a[FIRST]
    if not form.WEIGHTED:
        return load(x, c * a[X_CHANNEL], 1)
    if a[X_CHANNEL] != 1:
        return weighted_shift(a, x, c, pointer(a[WEIGHTS], acc), acc)
    return load(x, index * a[CHANNELS] + c, 1) if index >= 0 else acc(0.0)


@loop
def weighted_shift(a, x, c, weights, acc):
    """The mean of channel c's first values that count: 32 at most, from one sample; 0 if none counts."""
    space, index = a[SPACE], a[FIRST]
    if index < 0:
        return acc(0.0)
    run, w = offset(x, (index // space * a[CHANNELS] + c) * space), offset(weights, index // space * space)
    s, found = acc(0.0), 0
    for i in range(index % space, space):
        if w[i] > acc(0.0):
            s, found = s + load(run, i, 1), found + 1
            if found == 32:
                break
    return s / acc(found)


@loop
def prepare(a, thread, threads, param, acc):
    """Forward coefficients of this thread's channels, from their moments."""
    k, channels = pointer(a[COEFFICIENTS], acc), a[CHANNELS]
    first, last = share(channels, thread, threads)
    for c in range(first, last):
        k[c], k[channels + c], k[2 * channels + c] = forward_coefficients(a, c, param, acc)


@loop
def backward_prepare(a, thread, threads, param, acc, form):
    """What unpacks this thread's channels in the backward."""
    k, channels = pointer(a[COEFFICIENTS], acc), a[CHANNELS]
    first, last = share(channels, thread, threads)
    for c in range(first, last):
        k[c], k[channels + c], k[4 * channels + c] = unpacking(a, c, param, acc, form)


@loop
def backward_combine(a, thread, threads, param, acc):
    """Add the parts' sums of this thread's channels up into gradients of weight and bias and backward coefficients."""
    k, channels = pointer(a[COEFFICIENTS], acc), a[CHANNELS]
    first, last = share(channels, thread, threads)
    if sums_wanted(a):
        sums = parts_added(a, first, last)
        for c in range(first, last):
            ca, cb, cc = backward_coefficients(a, c, param, acc, sums[c], sums[channels + c])
            k[channels + c], k[2 * channels + c], k[3 * channels + c] = ca, cb, cc
    else:
        for c in range(first, last):
            ca, cb, cc = backward_coefficients(a, c, param, acc, 0.0, 0.0)
            k[channels + c], k[2 * channels + c], k[3 * channels + c] = ca, cb, cc


@loop
def sums_wanted(a):
    """Whether anything depends on the sums over a channel: only fixed moments with constant parameters do without."""
    return as_float(a, SHARE) != 0.0 or a[GRAD_WEIGHT] != 0 or a[GRAD_BIAS] != 0
