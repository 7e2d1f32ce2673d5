"""The one argument of every loop, a block of 8-byte slots: its indices, the formats that pack it, and limits."""

from __future__ import annotations

import struct

(
    # Where tensors are; 0 for none.
    X, DY, OUT, WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, COUNTER, MOMENTS, COEFFICIENTS, PARTIALS,
    GRAD_WEIGHT, GRAD_BIAS, RESIDUAL, GRAD_RESIDUAL, SLOPE_BITS,
    # Sizes and steps; whether to write around the caches.
    BITS_ROW, BATCH, CHANNELS, SPACE, X_CHANNEL, PARTS, BLOCK, DY_BATCH, DY_CHANNEL, DY_SPACE, STREAM,
    # Floats.
    EPS, FACTOR, SHARE, PARAMETER,
    # The sets that moments are taken over; INDEX, FIRST and COUNT are found for each.
    SETS, SET_SIZE, BITS_SAMPLE, MOMENT_ROWS, ITEM, WEIGHTS, COUNTS, INDEX, FIRST,
    # Floats again.
    COUNT, R_MAX, D_MAX,
    # The team: this thread and how many there are, or the functions that know; which stages to do.
    THREAD, THREADS, THREAD_NUMBER, NUMBER_OF_THREADS, BARRIER, STAGES,
) = range(49)  # fmt: skip
ALL_SLOTS = 49

LAST = 8  # the stage that moves the running statistics, once all moments are there
ONLY_LAST = 1 << LAST

COLUMNS = 512  # the widest block of columns, whose sums and coefficients live on the stack
FIVE_COLUMNS = 5 * COLUMNS
GROUP = 16  # the most channels whose short runs are read together
FIVE_GROUPS = 5 * GROUP
STRETCH = 32768  # values that are read forwards in a pass that goes backwards
VALUES = 2048  # that many values of a channel share a shift and sum up in float32

# A launch's argument is these three, one behind the other.
CALL = struct.Struct(f"={EPS}q{SETS - EPS}d")
SAMPLE_SETS = struct.Struct(f"={COUNT - SETS}q{THREAD - COUNT}d")
TEAM = struct.Struct(f"={ALL_SLOTS - THREAD}q")


def packed_call(**slots: float) -> bytes:
    """Pack a launch's own slots by name; those not named are 0. For where a microsecond does not matter."""
    return CALL.pack(*_in_order(slots, X, SETS))


def packed_sets(**slots: float) -> bytes:
    """Pack what a launch must know of sets, by name: one set and plain moments where nothing is said."""
    return SAMPLE_SETS.pack(*_in_order({"SETS": 1, "MOMENT_ROWS": 2, **slots}, SETS, THREAD))


def _in_order(slots: dict[str, float], first: int, end: int) -> list[float]:
    values: list[float] = [0] * (end - first)
    for name, value in slots.items():
        values[globals()[name] - first] = value
    return values
