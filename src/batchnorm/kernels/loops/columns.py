"""Columns: rows of channels, whose scales and shifts are vectors.

A block of columns keeps its sums or coefficients in first-level cache while rows stream past, several at a time.
"""

from __future__ import annotations

from batchnorm.kernels.elementary import like
from batchnorm.kernels.loops.channels import (
    backward_coefficients,
    evaluating,
    forward_coefficients,
    origin_of,
    split_backward,
    split_forward,
    unpacking,
    write_moments,
)
from batchnorm.kernels.loops.forms import activated, counted, input_gradient, put, residual_at, weighed
from batchnorm.kernels.loops.slots import (
    as_float,
    body,
    f64,
    loop,
    share,
    u8,
)
from batchnorm.kernels.loops.table import *
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


@loop
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


@loop
def weighted_column_shifts(x, w, first, rows, stride, width, shift, acc):
    """The mean of each column's first eight values that count, of rows first..rows; 0 if none counts (first < 0)."""
    fill(shift, 0, width, acc(0.0))
    found, r = 0, first if first >= 0 else rows
    while r < rows and found < 8:
        if w[r] > acc(0.0):
            found += 1
            for j in range(width):
                shift[j] += load(x, r * stride + j, 1)
        r += 1
    if found > 0:
        for j in range(width):
            shift[j] /= acc(found)


@loop
def row_weight(w, row, form):
    """The weight of a row."""
    return f64(w[row]) if form.WEIGHTED else 1.0


@loop
def weighted_deviation(v, k, weight, form):
    """(d, w·d) of a value v; nothing where it does not count."""
    d = counted(v - k, like(v, weight), form)
    return d, (d * like(v, weight) if form.WEIGHTED else d)


@loop
def eight_rows(x, w, stride, j, shift, s, q, form, lanes):
    k = load(shift, j, lanes)
    d, sums = weighted_deviation(load(x, j, lanes), k, row_weight(w, 0, form), form)
    squares = d * sums
    if lanes == 8:  # rows are short stretches of memory, which the processor's own prefetching serves badly
        for r in range(8, 16):
            prefetch(x, r * stride + j)
    for r in range(1, 8):
        d, e = weighted_deviation(load(x, r * stride + j, lanes), k, row_weight(w, r, form), form)
        sums, squares = sums + e, fma(d, e, squares)
    store(s, j, load(s, j, lanes) + convert(sums, f64))
    store(q, j, load(q, j, lanes) + convert(squares, f64))


@loop
def one_row(x, w, j, shift, s, q, form, lanes):
    d, e = weighted_deviation(load(x, j, lanes), load(shift, j, lanes), row_weight(w, 0, form), form)
    store(s, j, load(s, j, lanes) + convert(e, f64))
    store(q, j, load(q, j, lanes) + convert(d * e, f64))


@loop
def block_sums(x, w, rows, stride, width, shift, s, q, form):
    """Add Σd and Σd² of each column over the rows, whose weights are in w, to s and q."""
    r = 0
    while r + 8 <= rows:
        j = 0
        while j + 8 <= width:
            eight_rows(offset(x, r * stride), offset(w, r), stride, j, shift, s, q, form, 8)
            j += 8
        while j < width:
            eight_rows(offset(x, r * stride), offset(w, r), stride, j, shift, s, q, form, 1)
            j += 1
        r += 8
    while r < rows:
        j = 0
        while j + 8 <= width:
            one_row(offset(x, r * stride), offset(w, r), j, shift, s, q, form, 8)
            j += 8
        while j < width:
            one_row(offset(x, r * stride), offset(w, r), j, shift, s, q, form, 1)
            j += 1
        r += 1


@loop
def block_bits(a, block, columns):
    """Where the bits of a block begin in a row's: each block of BLOCK columns has whole bytes."""
    return block * ((min(a[BLOCK], columns) + 7) // 8 * 8)


@loop
def apply_at(x, y, r, i, j, k, gap, bits, bit, p, weight, streaming, form, lanes):
    v = load(x, i, lanes)
    mean, scale, shift = load(k, j, lanes), load(k, gap + j, lanes), load(k, 2 * gap + j, lanes)
    v = activated(v, residual_at(r, i, v, form, lanes), mean, scale, shift, bits, bit, p, form)
    put(y, i, counted(v, like(v, weight), form), streaming)


@loop
def row_apply(a, row, stride, start, bit, width, k, gap, stored, acc, form):
    """Normalize `width` neighbours of a row with column vectors k, k + gap, k + 2·gap; residual; activation."""
    x, y, r = pointer(a[X], stored), pointer(a[OUT], stored), pointer(a[RESIDUAL], stored)
    bits, p, streaming, j = pointer(a[SLOPE_BITS], u8), acc(as_float(a, PARAMETER)), a[STREAM] != 0, 0
    at, weight = row * stride + start, row_weight(pointer(a[WEIGHTS], acc), row, form)
    while j + 8 <= width:
        apply_at(x, y, r, at + j, j, k, gap, bits, bit + j, p, weight, streaming, form, 8)
        j += 8
    while j < width:
        apply_at(x, y, r, at + j, j, k, gap, bits, bit + j, p, weight, streaming, form, 1)
        j += 1


@loop
def dy_row(a, r):
    """Where row r of dy starts: its strides may differ from x's, zero included."""
    if a[X_CHANNEL] != 1:  # rows are samples
        return r * a[DY_BATCH]
    if a[DY_BATCH] == a[SPACE] * a[DY_SPACE]:
        return r * a[DY_SPACE]
    return r // a[SPACE] * a[DY_BATCH] + r % a[SPACE] * a[DY_SPACE]


@loop
def unpacked_at(x, dy, r, i, g, j, k, gap, bits, bit, p, weight, form, lanes):
    """(dz, x − mean) at i, column j, of a row of that weight; dy is at g + j."""
    v, gv = load(x, i, lanes), load(dy, g + j, lanes)
    mean, scale, shift = load(k, j, lanes), load(k, gap + j, lanes), load(k, 4 * gap + j, lanes)
    residual = residual_at(r, i, v, form, lanes)
    return weighed(gv, v, residual, mean, scale, shift, bits, bit, p, like(v, weight), form)


@loop
def four_rows_backward(x, w, dy, r, at, stride, g0, g1, g2, g3, j, k, gap, s, t, bits, bit, line, p, form):
    for row in range(4, 8):  # rows are short stretches of memory, which the processor's own prefetching serves badly
        prefetch(x, at + row * stride + j)
        prefetch(dy, g0 + row * (g1 - g0) + j)
    w0, w1, w2, w3 = row_weight(w, 0, form), row_weight(w, 1, form), row_weight(w, 2, form), row_weight(w, 3, form)
    a, v = unpacked_at(x, dy, r, at + j, g0, j, k, gap, bits, bit + j, p, w0, form, 8)
    b, u = unpacked_at(x, dy, r, at + stride + j, g1, j, k, gap, bits, bit + line + j, p, w1, form, 8)
    sums, products = a + b, fma(u, b, v * a)
    a, v = unpacked_at(x, dy, r, at + 2 * stride + j, g2, j, k, gap, bits, bit + 2 * line + j, p, w2, form, 8)
    b, u = unpacked_at(x, dy, r, at + 3 * stride + j, g3, j, k, gap, bits, bit + 3 * line + j, p, w3, form, 8)
    store(s, j, load(s, j, 8) + convert(sums + (a + b), f64))
    store(t, j, load(t, j, 8) + convert(products + fma(u, b, v * a), f64))


@loop
def one_row_backward(x, dy, r, i, g, j, k, gap, s, t, bits, bit, p, weight, form, lanes):
    a, v = unpacked_at(x, dy, r, i, g, j, k, gap, bits, bit, p, weight, form, lanes)
    store(s, j, load(s, j, lanes) + convert(a, f64))
    store(t, j, load(t, j, lanes) + convert(v * a, f64))


@loop
def block_backward_sums(a, first, last, start, stride, width, base, k, gap, s, t, stored, acc, form):
    """Add Σdz and Σdz·(x − mean) of `width` columns from `start` on, over rows first..last, to s and t."""
    x, r, p = pointer(a[X], stored), pointer(a[RESIDUAL], stored), acc(as_float(a, PARAMETER))
    dy, bits, w, row = (
        offset(pointer(a[DY], stored), start),
        pointer(a[SLOPE_BITS], u8),
        pointer(a[WEIGHTS], acc),
        first,
    )
    while row + 4 <= last:
        at, bit, line, here = row * stride + start, row * a[BITS_ROW] + base, a[BITS_ROW], offset(w, row)
        g0, g1, g2, g3 = dy_row(a, row), dy_row(a, row + 1), dy_row(a, row + 2), dy_row(a, row + 3)
        j = 0
        while j + 8 <= width:
            four_rows_backward(x, here, dy, r, at, stride, g0, g1, g2, g3, j, k, gap, s, t, bits, bit, line, p, form)
            j += 8
        while j < width:
            for i in range(row, row + 4):
                at, bit, g, weight = i * stride + start, i * a[BITS_ROW] + base, dy_row(a, i), row_weight(w, i, form)
                one_row_backward(x, dy, r, at + j, g, j, k, gap, s, t, bits, bit + j, p, weight, form, 1)
            j += 1
        row += 4
    while row < last:
        at, bit, g0, j = row * stride + start, row * a[BITS_ROW] + base, dy_row(a, row), 0
        weight = row_weight(w, row, form)
        while j + 8 <= width:
            one_row_backward(x, dy, r, at + j, g0, j, k, gap, s, t, bits, bit + j, p, weight, form, 8)
            j += 8
        while j < width:
            one_row_backward(x, dy, r, at + j, g0, j, k, gap, s, t, bits, bit + j, p, weight, form, 1)
            j += 1
        row += 1


@loop
def backward_apply_at(x, dy, r, dx, dz, gives, i, g, j, k, gap, bits, bit, p, weight, streaming, form, lanes):
    gv, v = unpacked_at(x, dy, r, i, g, j, k, gap, bits, bit, p, weight, form, lanes)
    ca, cb, cc = load(k, gap + j, lanes), load(k, 2 * gap + j, lanes), load(k, 3 * gap + j, lanes)
    v = input_gradient(gv, v, like(v, weight), ca, cb, cc, form)
    put(dx, i, v, streaming)
    if gives:
        put(dz, i, gv, streaming)


@loop
def row_backward_apply(a, row, start, stride, width, base, k, gap, stored, acc, form):
    """dx = A·(dz + weight·(B·(x − mean) + C)) with column vectors k (mean), k + gap (A) … k + 3·gap (C); dz itself."""
    x, dy, r = pointer(a[X], stored), offset(pointer(a[DY], stored), start), pointer(a[RESIDUAL], stored)
    dx, dz, gives = pointer(a[OUT], stored), pointer(a[GRAD_RESIDUAL], stored), a[GRAD_RESIDUAL] != 0
    bits, p, streaming = pointer(a[SLOPE_BITS], u8), acc(as_float(a, PARAMETER)), a[STREAM] != 0
    at, g, bit, j = row * stride + start, dy_row(a, row), row * a[BITS_ROW] + base, 0
    weight = row_weight(pointer(a[WEIGHTS], acc), row, form)
    while j + 8 <= width:
        backward_apply_at(x, dy, r, dx, dz, gives, at + j, g, j, k, gap, bits, bit + j, p, weight, streaming, form, 8)
        j += 8
    while j < width:
        backward_apply_at(x, dy, r, dx, dz, gives, at + j, g, j, k, gap, bits, bit + j, p, weight, streaming, form, 1)
        j += 1


@loop
def layout(a, rows_of_channels):
    """(rows, columns, columns to a channel) of the tensor seen as columns."""
    if rows_of_channels:
        return a[BATCH] * a[SPACE], a[CHANNELS], 1
    return a[BATCH], a[CHANNELS] * a[SPACE], a[SPACE]


@loop
def columns_forward(a, thread, threads, stored, param, acc, form, rows_of_channels):
    """Both passes over each of this thread's blocks of BLOCK columns (whole channels), all rows."""
    rows, columns, span = layout(a, rows_of_channels)
    s, q, shift, k = alloca(COLUMNS, f64), alloca(COLUMNS, f64), alloca(COLUMNS, acc), alloca(FIVE_COLUMNS, acc)
    first, last = share((columns + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for block in range(first, last):
        start = block * a[BLOCK]
        width = min(a[BLOCK], columns - start)
        x, w = offset(pointer(a[X], stored), start), pointer(a[WEIGHTS], acc)
        fill(s, 0, width, 0.0)
        fill(q, 0, width, 0.0)
        if form.WEIGHTED:  # rows are positions, since there is no "small" plan with weights
            weighted_column_shifts(x, w, a[FIRST], rows, columns, width, shift, acc)
        else:
            column_shifts(x, rows, columns, width, shift, acc)
        if span > 1:  # a channel's columns share the first one's shift
            for j in range(0, width, span):
                fill(shift, j, span, shift[j])
        block_sums(x, w, rows, columns, width, shift, s, q, form)
        for j in range(0, width, span):
            c = (start + j) // span
            write_moments(a, c, f64(shift[j]), sum_of(s, j, span), sum_of(q, j, span), param)
            mean, scale, bias = forward_coefficients(a, c, param, acc)
            fill(k, j, span, mean)
            fill(k, COLUMNS + j, span, scale)
            fill(k, 2 * COLUMNS + j, span, bias)
        for row in range(rows):
            bit = row * a[BITS_ROW] + block_bits(a, block, columns)
            row_apply(a, row, columns, start, bit, width, k, COLUMNS, stored, acc, form)
    if a[STREAM] != 0:
        fence()


@loop
def columns_backward(a, thread, threads, stored, param, acc, form, rows_of_channels):
    """Both passes of the backward over each of this thread's blocks of columns, all rows."""
    rows, columns, span = layout(a, rows_of_channels)
    s, t, k, exact = alloca(COLUMNS, f64), alloca(COLUMNS, f64), alloca(FIVE_COLUMNS, acc), pointer(a[MOMENTS], f64)
    first, last = share((columns + a[BLOCK] - 1) // a[BLOCK], thread, threads)
    for block in range(first, last):
        start = block * a[BLOCK]
        width = min(a[BLOCK], columns - start)
        fill(s, 0, width, 0.0)
        fill(t, 0, width, 0.0)
        for j in range(0, width, span):
            mean, scale, shift = unpacking(a, (start + j) // span, param, acc, form)
            fill(k, j, span, mean)
            fill(k, COLUMNS + j, span, scale)
            fill(k, 4 * COLUMNS + j, span, shift)
        base = block_bits(a, block, columns)
        block_backward_sums(a, 0, rows, start, columns, width, base, k, COLUMNS, s, t, stored, acc, form)
        for j in range(0, width, span):
            c = (start + j) // span
            sums = sum_of(s, j, span)
            products = sum_of(t, j, span) + (f64(acc(exact[c])) - exact[c]) * sums
            ca, cb, cc = backward_coefficients(a, c, param, acc, sums, products)
            fill(k, COLUMNS + j, span, ca)
            fill(k, 2 * COLUMNS + j, span, cb)
            fill(k, 3 * COLUMNS + j, span, cc)
        if a[OUT] != 0:
            for row in range(rows):
                row_backward_apply(a, row, start, columns, width, base, k, COLUMNS, stored, acc, form)
    if a[STREAM] != 0:
        fence()


@body
def rows_forward(a, thread, threads, stored, param, acc, form):
    columns_forward(a, thread, threads, stored, param, acc, form, True)


@body
def rows_backward(a, thread, threads, stored, param, acc, form):
    columns_backward(a, thread, threads, stored, param, acc, form, True)


@body
def small_forward(a, thread, threads, stored, param, acc, form):
    columns_forward(a, thread, threads, stored, param, acc, form, False)


@body
def small_backward(a, thread, threads, stored, param, acc, form):
    columns_backward(a, thread, threads, stored, param, acc, form, False)


@loop
def rows_reduce(a, thread, threads, stored, acc, form):
    """Partial sums of many rows: one part is BLOCK rows of all channels."""
    x, w, rows, columns = pointer(a[X], stored), pointer(a[WEIGHTS], acc), a[BATCH] * a[SPACE], a[CHANNELS]
    shift = alloca(COLUMNS, acc)
    first, last = share(a[PARTS], thread, threads)
    for p in range(first, last):
        row, partials = p * a[BLOCK], offset(pointer(a[PARTIALS], f64), 2 * p * columns)
        length = min(a[BLOCK], rows - row)
        fill(partials, 0, 2 * columns, 0.0)
        for start in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - start)
            block, s, q = offset(x, row * columns + start), offset(partials, start), offset(partials, columns + start)
            if form.WEIGHTED:
                weighted_column_shifts(block, offset(w, row), 0, length, columns, width, shift, acc)
            else:
                column_shifts(block, length, columns, width, shift, acc)
            block_sums(block, offset(w, row), length, columns, width, shift, s, q, form)
            count = weight_of_rows(w, row, length, form)
            for j in range(width):  # from this part's shift to that of all
                delta = f64(shift[j]) - f64(origin_of(a, start + j, stored, acc, form))
                moved = s[j] + count * delta
                s[j], q[j] = moved, q[j] + delta * (s[j] + moved)


@loop
def weight_of_rows(w, row, length, form):
    """The sum of the weights of `length` rows."""
    if not form.WEIGHTED:
        return f64(length)
    count = 0.0
    for r in range(row, row + length):
        count += f64(w[r])
    return count


@loop
def rows_backward_reduce(a, thread, threads, stored, acc, form):
    rows, columns, exact, k = a[BATCH] * a[SPACE], a[CHANNELS], pointer(a[MOMENTS], f64), pointer(a[COEFFICIENTS], acc)
    first, last = share(a[PARTS], thread, threads)
    for p in range(first, last):
        row, partials = p * a[BLOCK], offset(pointer(a[PARTIALS], f64), 2 * p * columns)
        end = min(row + a[BLOCK], rows)
        fill(partials, 0, 2 * columns, 0.0)
        for start in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - start)
            s, t, here = offset(partials, start), offset(partials, columns + start), offset(k, start)
            block_backward_sums(a, row, end, start, columns, width, start, here, columns, s, t, stored, acc, form)
            for j in range(start, start + width):
                partials[columns + j] += (f64(acc(exact[j])) - exact[j]) * partials[j]


# The second pass takes the rows a stretch at a time, the last stretch first: it is still in cache. (Row by row
# backwards would defeat the processor's prefetching.)


@loop
def rows_apply(a, thread, threads, stored, acc, form):
    """Normalize with given coefficients."""
    k, columns = pointer(a[COEFFICIENTS], acc), a[CHANNELS]
    first, end = share(a[BATCH] * a[SPACE], thread, threads)
    stretch = max(STRETCH // columns, 1)
    while end > first:
        start = max(end - stretch, first)
        for row in range(start, end):
            row_apply(a, row, columns, 0, row * a[BITS_ROW], columns, k, columns, stored, acc, form)
        end = start
    if a[STREAM] != 0:
        fence()


@loop
def rows_backward_apply(a, thread, threads, stored, acc, form):
    k, columns = pointer(a[COEFFICIENTS], acc), a[CHANNELS]
    first, end = share(a[BATCH] * a[SPACE], thread, threads)
    stretch = max(STRETCH // columns, 1)
    while end > first:
        start = max(end - stretch, first)
        for row in range(start, end):
            row_backward_apply(a, row, 0, columns, columns, 0, k, columns, stored, acc, form)
        end = start
    if a[STREAM] != 0:
        fence()


rows_split_forward = split_forward(rows_reduce, rows_apply)
rows_split_backward = split_backward(rows_backward_reduce, rows_backward_apply)
rows_evaluate = evaluating(rows_apply)
