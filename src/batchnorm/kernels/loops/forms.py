"""From memory to z and back, for one vector or scalar: where normalization, residual and activation meet.

The same few lines serve planes, where a channel's coefficients are scalars, and columns, where they are vectors; and
the backward finds z with the same operations as the forward did, so that both see the same bits.
"""

from __future__ import annotations

from batchnorm.kernels.elementary import choose, like, where_less, write_bits
from batchnorm.kernels.loops.slots import loop
from batchnorm.kernels.simd import fma, load, load_pair, load_pair_as, splat, store, store_pair, stream, stream_pair


@loop
def residual_at(r, i, v, form, lanes):
    """The residual beside a value v of x; nothing (−0, which any compiler knows how to add) where there is none."""
    return load(r, i, lanes) if form.RESIDUAL else like(v, -0.0)


@loop
def residual_pair(r, i, v, form):
    return load_pair(r, i) if form.RESIDUAL else (like(v, -0.0), like(v, -0.0))


@loop
def weight_at(w, i, v, form, lanes):
    """The weight of the position of a value v of x."""
    return load(w, i, lanes) if form.WEIGHTED else like(v, 1.0)


@loop
def weight_pair(w, i, x, v, form):
    """The weights of the 16 positions that `load_pair(x, i)` gives."""
    return load_pair_as(w, i, x) if form.WEIGHTED else (like(v, 1.0), like(v, 1.0))


@loop
def counted(value, weight, form):
    """0 where the position does not count: whatever came of x there, nan included, goes no further."""
    return where_less(like(value, 0.0), weight, value, like(value, 0.0)) if form.WEIGHTED else value


@loop
def activated(v, residual, mean, scale, shift, bits, bit, p, form):
    """y from x."""
    z = fma(v - mean, scale, shift) + residual
    if form.SLOPE_BITS:
        write_bits(bits, bit, form.gradient(like(z, 1.0), z, p), like(z, 1.0))
    return form.value(z, p)


@loop
def unpacked(g, v, residual, k, scale, shift, bits, bit, p, form):
    """(dz, x − mean) from dy and x; v is y, and k is 1/scale instead of the mean, where y has taken x's place."""
    if form.INPLACE:
        z = form.inverse(v, p)
        return form.gradient(g, z, p), (z - shift) * k
    d = v - k
    if form.SLOPE_BITS:
        return choose(bits, bit, g, form.off(g, p)), d
    return form.gradient(g, fma(d, scale, shift) + residual, p), d


@loop
def weighed(g, v, residual, k, scale, shift, bits, bit, p, weight, form):
    """`unpacked`, and (0, 0) where the position does not count."""
    g, d = unpacked(g, v, residual, k, scale, shift, bits, bit, p, form)
    return counted(g, weight, form), counted(d, weight, form)


@loop
def input_gradient(g, d, w, ca, cb, cc, form):
    """dx from dz, x − mean and the weight with which x counted in the moments."""
    if form.FIXED_MOMENTS:
        return g * ca
    if form.WEIGHTED:
        return ca * fma(w, fma(d, cb, cc), g)
    return ca * (g + fma(d, cb, cc))


@loop
def gradient_at(dy, i, step, lanes):
    """dy at i, or its one value for the whole run where it is expanded (step 0)."""
    return load(dy, i, lanes) if step != 0 else splat(load(dy, 0, 1), lanes)


@loop
def gradient_pair(dy, i, step):
    if step != 0:
        return load_pair(dy, i)
    g = splat(load(dy, 0, 1), 8)
    return g, g


@loop
def put(out, i, value, streaming):
    if streaming:
        stream(out, i, value)
    else:
        store(out, i, value)


@loop
def put_pair(out, i, first, second, streaming):
    if streaming:
        stream_pair(out, i, first, second)
    else:
        store_pair(out, i, first, second)
