"""What every loop does with its slots: who does which share of the work, which stage, which set of samples."""

from __future__ import annotations

import numba
from numba import types

from batchnorm.kernels.loops.table import *
from batchnorm.kernels.pipeline import Pipeline
from batchnorm.kernels.simd import call_int, call_void, convert, load, pointer, reinterpret, splat, total

f32, f64 = types.float32, types.float64
i64, u8 = types.int64, types.uint8

_bare = {  # nobody calls them from Python
    "pipeline_class": Pipeline, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
loop = numba.njit(forceinline=True, **_bare)  # no fast-math: NaN must stay NaN, and sums keep their order
body = numba.njit(**_bare)


@loop
def share(count, thread, threads):
    """The contiguous part of range(count) that belongs to this thread."""
    return count * thread // threads, count * (thread + 1) // threads


@loop
def thread_id(a):
    """(number of this thread, number of threads); where OpenMP made the team, OpenMP is asked."""
    if a[THREAD] >= 0:
        return a[THREAD], a[THREADS]
    return call_int(a[THREAD_NUMBER]), call_int(a[NUMBER_OF_THREADS])


@loop
def stage_enabled(a, stage):
    """Whether this call is to do that stage: STAGES has a bit for each."""
    return (a[STAGES] >> stage) & 1 != 0


@loop
def barrier(a):
    """Wait for the other threads to come here: the next stage reads what all of them wrote."""
    if a[BARRIER] != 0:
        call_void(a[BARRIER])


@loop
def as_float(a, slot):
    """A slot that holds a float64."""
    return reinterpret(a, f64)[slot]


@loop
def select(whole, a, index):
    """Fill `a` with the slots of one of the sets of samples that moments are taken over: a batch of its own.

    Samples are the outermost dimension of whatever the loops read, so a set is a stretch of memory.
    """
    for slot in range(ALL_SLOTS):
        a[slot] = whole[slot]
    start, own = index * whole[SET_SIZE], 8 if whole[ITEM] == 8 else 4  # bytes of a statistic
    if whole[SETS] > 1:
        channels, space = whole[CHANNELS], whole[SPACE]
        a[BATCH] = min(whole[SET_SIZE], whole[BATCH] - start)
        if whole[PARTS] != 0 and whole[X_CHANNEL] == 1:  # the last set may have fewer rows
            a[PARTS] = (a[BATCH] * space + whole[BLOCK] - 1) // whole[BLOCK]
        for slot in (X, OUT, RESIDUAL, GRAD_RESIDUAL):
            move(a, slot, start * channels * space * whole[ITEM])
        move(a, DY, start * whole[DY_BATCH] * whole[ITEM])
        move(a, SLOPE_BITS, start * whole[BITS_SAMPLE])
        move(a, WEIGHTS, start * space * own)
        move(a, MOMENTS, index * whole[MOMENT_ROWS] * channels * 8)
    a[INDEX] = index
    count = f64(a[BATCH] * a[SPACE])
    if whole[WEIGHTS] != 0:
        n = a[BATCH] * a[SPACE]
        if own == 8:
            weights = pointer(a[WEIGHTS], f64)
            a[FIRST] = first_counted(weights, n)
            count = pointer(whole[COUNTS], f64)[index] if whole[COUNTS] != 0 else summed(weights, n)
        else:
            narrow = pointer(a[WEIGHTS], f32)
            a[FIRST] = first_counted(narrow, n)
            count = pointer(whole[COUNTS], f64)[index] if whole[COUNTS] != 0 else summed(narrow, n)
    reals = reinterpret(a, f64)
    reals[COUNT] = count
    if reals[SHARE] != 0.0 and (whole[SETS] > 1 or whole[WEIGHTS] != 0):
        reals[SHARE] = 1.0 / count if count > 0.0 else 0.0


@loop
def first_counted(weights, n):
    """The first of n positions whose weight is not 0; −1 if there is none."""
    for i in range(n):
        if weights[i] > 0.0:
            return i
    return -1


@loop
def summed(weights, n):
    """The sum of n weights."""
    lanes, i = splat(0.0, 8), 0
    while i + 8 <= n:
        lanes = lanes + convert(load(weights, i, 8), f64)
        i += 8
    s = total(lanes)
    while i < n:
        s += f64(weights[i])
        i += 1
    return s


@loop
def move(a, slot, distance):
    if a[slot] != 0:
        a[slot] += distance
