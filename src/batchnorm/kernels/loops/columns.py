"""Columns: rows of channels, whose scales and shifts are vectors.

A block of columns keeps its sums or coefficients in first-level cache while rows stream past, several at a time.
"""

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
    COLUMNS,
    DY,
    DY_BATCH,
    DY_SPACE,
    FOUR_COLUMNS,
    MOMENTS,
    OUT,
    PARTIALS,
    PARTS,
    SPACE,
    STREAM,
    STRETCH,
    X_CHANNEL,
    X,
    body,
    due,
    f64,
    lanewise,
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
    offset,
    pointer,
    prefetch,
    splat,
    store,
    stream,
    total,
)


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
            write_moments(a, c, f64(shift[j]), sum_of(s, j, span), sum_of(q, j, span))
            mean, scale, bias = forward_coefficients(a, c, param, acc)
            fill(k, j, span, mean)
            fill(k, COLUMNS + j, span, scale)
            fill(k, 2 * COLUMNS + j, span, bias)
        block_apply(offset(x, start), offset(y, start), rows, columns, width, k, COLUMNS, streaming)
    if streaming:
        fence()


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
            _, ca, cb, cc = backward_coefficients(a, c, param, acc, sums, products)
            fill(k, COLUMNS + j, span, ca)
            fill(k, 2 * COLUMNS + j, span, cb)
            fill(k, 3 * COLUMNS + j, span, cc)
        if a[OUT] != 0:
            block_backward_apply(
                a,
                offset(x, start),
                offset(dy, start),
                offset(dx, start),
                0,
                rows,
                columns,
                width,
                k,
                COLUMNS,
                streaming,
            )
    if streaming:
        fence()


@body
def rows_forward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        columns_forward(a, thread, threads, stored, param, acc, True)
    finish(a, 1, thread, threads, stored, param, acc)


@body
def rows_backward(a, thread, threads, stored, param, acc):
    columns_backward(a, thread, threads, stored, param, acc, True)


@body
def small_forward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        columns_forward(a, thread, threads, stored, param, acc, False)
    finish(a, 1, thread, threads, stored, param, acc)


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


# The second pass takes the rows a stretch at a time, the last stretch first: it is still in cache. (Row by row
# backwards would defeat the processor's prefetching.)


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


# One launch for two separate passes and what lies between them.


@body
def rows_split_forward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        rows_reduce(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 1):
        combine(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 2):
        rows_apply(a, thread, threads, stored, param, acc)
    finish(a, 2, thread, threads, stored, param, acc)


@body
def rows_split_backward(a, thread, threads, stored, param, acc):
    if due(a, 0):
        rows_backward_reduce(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 1):
        backward_combine(a, thread, threads, stored, param, acc)
    meet(a)
    if due(a, 2) and a[OUT] != 0:
        rows_backward_apply(a, thread, threads, stored, param, acc)
