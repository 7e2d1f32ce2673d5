"""Comparisons, packed bits, and the elementary functions that activations need, on scalars and vectors alike.

In float32 the functions are polynomials, right to a few units in the last place. In float64, where nobody is in a
hurry, they are the C library's, lane by lane. A scalar goes through the same operations as a lane of a vector, so that
a value does not depend on where in a tensor it stands.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from batchnorm.kernels.simd import (
    LANES,
    Vector,
    _constant,
    _element,
    _integers,
    _llvm,
    _llvm_float,
    _splat,
    fma,
)

_inline = numba.njit(error_model="numpy", forceinline=True)


@intrinsic
def like(typingctx: Any, value: Any, number: Any) -> Any:
    """A number in the precision, and in all the lanes, of a value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = context.cast(builder, args[1], types.float64, _element(value))
        return _splat(builder, scalar, _llvm(value)) if isinstance(value, Vector) else scalar

    return value(value, types.float64), codegen


# --- comparisons ---


def _define_choice(symbol: str) -> Any:
    @intrinsic
    def choice(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(symbol, args[0], args[1]), args[2], args[3])

        return a(a, a, a, a), codegen

    return choice


where_less = _define_choice("<")  # where_less(a, b, yes, no): yes in lanes where a < b; a NaN is never less
where_at_most = _define_choice("<=")


# A tensor of bits holds one an element. A vector's bits are one byte; scalars share one.


@intrinsic
def write_bits(typingctx: Any, base: Any, index: Any, value: Any, one: Any) -> Any:
    """Set the bits from the index-th on to whether `value` equals `one`; the first scalar of a byte clears the rest."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, index, value, one = args
        place = builder.gep(pointer, [builder.lshr(index, _constant(index.type, 3))])
        flags = builder.fcmp_ordered("==", value, one)
        byte = ir.IntType(8)
        if isinstance(signature.args[2], Vector):
            builder.store(builder.bitcast(flags, byte), place)
            return context.get_dummy_value()
        position = builder.trunc(builder.and_(index, _constant(index.type, 7)), byte)
        first = builder.icmp_unsigned("==", position, _constant(byte, 0))
        kept = builder.select(first, _constant(byte, 0), builder.load(place))
        builder.store(builder.or_(kept, builder.shl(builder.zext(flags, byte), position)), place)
        return context.get_dummy_value()

    return types.void(base, types.intp, value, value), codegen


@intrinsic
def choose(typingctx: Any, base: Any, index: Any, yes: Any, no: Any) -> Any:
    """`yes` where the bits from the index-th on are set, else `no`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, index, yes, no = args
        byte = builder.load(builder.gep(pointer, [builder.lshr(index, _constant(index.type, 3))]))
        if isinstance(signature.args[2], Vector):
            return builder.select(builder.bitcast(byte, _integers(1, LANES)), yes, no)
        position = builder.trunc(builder.and_(index, _constant(index.type, 7)), byte.type)
        return builder.select(builder.trunc(builder.lshr(byte, position), ir.IntType(1)), yes, no)

    return yes(base, types.intp, yes, yes), codegen


# --- float32 ---


@intrinsic
def _power_of_two(typingctx: Any, rounded: Any) -> Any:
    """2ⁿ in float32, from n + _ROUND, whose lowest bits are n."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = _integers(32, LANES if isinstance(rounded, Vector) else 1)
        exponent = builder.shl(builder.bitcast(args[0], wide), _constant(wide, 23))
        return builder.bitcast(builder.add(exponent, _constant(wide, 127 << 23)), _llvm(rounded))

    return rounded(rounded), codegen


_ROUND = 1.5 * 2**23  # added to a float32, it leaves the nearest integer in the lowest bits
_PER_LN2, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_HALF_ROOT = 0x3F3504F3  # the bits of √½


@_inline
def _scale_and_rest(z):
    """(2ⁿ, eʳ − 1) with z = n·ln 2 + r and |r| ≤ ln 2 / 2; beyond what float32 holds, z is as large as it can be."""
    z = where_less(z, like(z, -87.0), like(z, -87.0), z)
    z = where_less(like(z, 88.0), z, like(z, 88.0), z)
    rounded = fma(z, like(z, _PER_LN2), like(z, _ROUND))
    n = rounded - like(z, _ROUND)
    r = fma(n, like(z, -_LN2_LOW), fma(n, like(z, -_LN2_HIGH), z))
    p = fma(r, like(z, 1.0 / 5040.0), like(z, 1.0 / 720.0))
    p = fma(r, fma(r, p, like(z, 1.0 / 120.0)), like(z, 1.0 / 24.0))
    p = fma(r, fma(r, p, like(z, 1.0 / 6.0)), like(z, 0.5))
    return _power_of_two(rounded), fma(r * r, p, r)


@_inline
def _narrow_exp(z):
    s, p = _scale_and_rest(z)
    return fma(s, p, s)


@_inline
def _narrow_expm1(z):
    s, p = _scale_and_rest(z)
    return fma(s, p, s - like(z, 1.0))


@_inline
def _narrow_erfc(a):
    """Press et al., Numerical Recipes in C, 2nd edition, erfcc: relative error 1.2e-7 for every a ≥ 0."""
    t = like(a, 1.0) / fma(a, like(a, 0.5), like(a, 1.0))
    p = fma(t, like(a, 0.17087277), like(a, -0.82215223))
    p = fma(t, fma(t, p, like(a, 1.48851587)), like(a, -1.13520398))
    p = fma(t, fma(t, p, like(a, 0.27886807)), like(a, -0.18628806))
    p = fma(t, fma(t, p, like(a, 0.09678418)), like(a, 0.37409196))
    p = fma(t, fma(t, p, like(a, 1.00002368)), like(a, -1.26551223))
    return t * _narrow_exp(fma(like(a, 0.0) - a, a, p))


@intrinsic
def _mantissa_and_exponent(typingctx: Any, value: Any) -> Any:
    """(m, e) with value = m·2ᵉ and √½ ≤ m < √2, in float32, for positive normal numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = _integers(32, LANES if isinstance(value, Vector) else 1)
        bits = builder.bitcast(args[0], wide)
        exponent = builder.ashr(builder.sub(bits, _constant(wide, _HALF_ROOT)), _constant(wide, 23))
        mantissa = builder.sub(bits, builder.shl(exponent, _constant(wide, 23)))
        pair = [builder.bitcast(mantissa, _llvm(value)), builder.sitofp(exponent, _llvm(value))]
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(value, 2)(value), codegen


@_inline
def _narrow_log1p(u):
    """log(1 + u) for u > −1: log m = 2·atanh((m − 1)/(m + 1)), and what rounding 1 + u lost."""
    w = u + like(u, 1.0)
    m, e = _mantissa_and_exponent(w)
    q = (m - like(u, 1.0)) / (m + like(u, 1.0))
    s = q * q
    p = fma(s, fma(s, fma(s, like(u, 1.0 / 9.0), like(u, 1.0 / 7.0)), like(u, 0.2)), like(u, 1.0 / 3.0))
    log = fma(e, like(u, 0.6931471805599453), (q + q) + (q + q) * s * p)
    return log + (u - (w - like(u, 1.0))) / w


# --- float64 ---


def _define_from_library(name: str) -> Any:
    @intrinsic
    def lane_by_lane(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            double = _llvm_float(types.float64)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(double, [double]), name)
            if not isinstance(value, Vector):
                return builder.call(function, args)
            result = args[0]
            for lane in range(LANES):
                place = ir.Constant(ir.IntType(32), lane)
                result = builder.insert_element(
                    result, builder.call(function, [builder.extract_element(args[0], place)]), place
                )
            return result

        return value(value), codegen

    return lane_by_lane


def _define_function(name: str, narrow: Any) -> Any:
    wide = _define_from_library(name)

    def function(z):
        raise NotImplementedError("for compiled loops")

    @overload(function, jit_options={"error_model": "numpy", "forceinline": True})
    def _choose(z):
        if _element(z) == types.float64:
            return lambda z: wide(z)
        return lambda z: narrow(z)

    return function


exp = _define_function("exp", _narrow_exp)
expm1 = _define_function("expm1", _narrow_expm1)
log1p = _define_function("log1p", _narrow_log1p)
erfc = _define_function("erfc", _narrow_erfc)
