"""What happens once a channel: from sums to moments, coefficients, gradients of the parameters, running statistics."""

from __future__ import annotations

import math

from batchnorm.kernels.loops.slots import (
    BATCH,
    BIAS,
    CHANNELS,
    COEFFICIENTS,
    COUNTER,
    EPS,
    FACTOR,
    GRAD_BIAS,
    GRAD_WEIGHT,
    MOMENTS,
    PARTIALS,
    PARTS,
    RUNNING_MEAN,
    RUNNING_VAR,
    SHARE,
    SPACE,
    WEIGHT,
    X_CHANNEL,
    X,
    body,
    due,
    f64,
    i64,
    loop,
    meet,
    real,
    share,
)
from batchnorm.kernels.simd import load, offset, pointer, store


@loop
def optional(address, index, dtype, default):
    return f64(pointer(address, dtype)[index]) if address != 0 else default


@loop
def write_moments(a, c, shift, s, q):
    """Mean and biased variance of channel c, from the sums of d and d² around the shift."""
    moments = pointer(a[MOMENTS], f64)
    m = s * real(a, SHARE)
    var = q * real(a, SHARE) - m * m
    moments[c] = shift + m
    moments[a[CHANNELS] + c] = 0.0 if var < 0.0 else var


@loop
def forward_coefficients(a, c, param, acc):
    """(mean, scale, shift) so that y = (x − mean)·scale + shift, in the precision of the arithmetic.

    The mean is rounded and what the rounding lost goes into the shift: x − mean is then exact where it matters, for x
    near the mean.
    """
    moments = pointer(a[MOMENTS], f64)
    mean, var = moments[c], moments[a[CHANNELS] + c]
    scale = optional(a[WEIGHT], c, param, 1.0) * (1.0 / math.sqrt(var + real(a, EPS)))
    rounded = acc(mean)
    return rounded, acc(scale), acc(optional(a[BIAS], c, param, 0.0) - (mean - f64(rounded)) * scale)


@loop
def backward_coefficients(a, c, param, acc, s, t):
    """(A, B, C) so that dx = A·dz + B·(x − mean) + C, and the gradients of weight and bias.

    s = Σdz and t = Σdz·(x − mean); Ioffe & Szegedy 2015, section 3, with x̂ written out. A share of 0 says that the
    moments were given, so that x does not move them.
    """
    moments = pointer(a[MOMENTS], f64)
    mean, var = moments[c], moments[a[CHANNELS] + c]
    inverse = 1.0 / math.sqrt(var + real(a, EPS))
    if a[GRAD_WEIGHT] != 0:
        pointer(a[GRAD_WEIGHT], param)[c] = param(t * inverse)
    if a[GRAD_BIAS] != 0:
        pointer(a[GRAD_BIAS], param)[c] = param(s)
    scale = optional(a[WEIGHT], c, param, 1.0) * inverse
    if real(a, SHARE) == 0.0:
        return acc(scale), acc(0.0), acc(0.0)
    slope = -scale * inverse * inverse * t * real(a, SHARE)
    return acc(scale), acc(slope), acc(-scale * s * real(a, SHARE) - slope * (mean - f64(acc(mean))))


@loop
def unpacking(a, c, param, acc, form):
    """(k, scale, shift) from which `forms.unpacked` finds dz and x − mean: k is the mean, or 1/scale to undo y."""
    if not form.FROM_Z:
        return acc(pointer(a[MOMENTS], f64)[c]), acc(0.0), acc(0.0)
    mean, scale, shift = forward_coefficients(a, c, param, acc)
    return (acc(1.0 / f64(scale)) if form.INPLACE else mean), scale, shift


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


@loop
def finish(a, stage, thread, threads, stored, param, acc):
    """The last stage of a forward: one thread moves the running statistics, once all moments are there."""
    if a[RUNNING_MEAN] != 0 or a[COUNTER] != 0:
        meet(a)
        if due(a, stage) and thread == 0:
            update_running(a, thread, threads, stored, param, acc)


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
def combine(a, thread, threads, stored, param, acc):
    """Add the parts' sums of this thread's channels up into moments and forward coefficients."""
    x, channels = pointer(a[X], stored), a[CHANNELS]
    first, last = share(channels, thread, threads)
    sums = parts_added(a, first, last)
    for c in range(first, last):
        write_moments(a, c, f64(load(x, c * a[X_CHANNEL], 1)), sums[c], sums[channels + c])
    prepare(a, thread, threads, param, acc)


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
    """Whether anything depends on the sums over a channel: only given moments with constant parameters do without."""
    return real(a, SHARE) != 0.0 or a[GRAD_WEIGHT] != 0 or a[GRAD_BIAS] != 0
