"""Vectors for Numba: eight lanes at a time, with operators, loads and stores that the compiler cannot miss.

Numba hands plain loops to LLVM's auto-vectorizer, which gives up on the loops that batch normalization needs most
(several rows at a time, mixed precision, short tails). A `Vector` is LLVM's own vector type instead: `a * b + c` on
vectors is what it says on any processor, two AVX registers or four NEON ones. The same kernel source also runs on
scalars, which is how tails are done.

`lanes` is 8 for vectors and 1 for scalars throughout; `load(pointer, index, lanes)` gives a vector or a scalar
accordingly. A `uint16` pointer holds bfloat16: it is loaded as float32 and stored rounded to nearest even.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 8
FLOATS = (types.float32, types.float64)


class Vector(types.Type):
    """`LANES` values of one floating type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype}, {LANES})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_llvm_float(fe_type.dtype), LANES))


VECTORS = {dtype: Vector(dtype) for dtype in FLOATS}


def _llvm_float(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def _llvm(value_type: types.Type) -> ir.Type:
    """The LLVM type of a scalar or a Vector."""
    if isinstance(value_type, Vector):
        return ir.VectorType(_llvm_float(value_type.dtype), LANES)
    return _llvm_float(value_type)


def _of(dtype: types.Float, lanes: int) -> types.Type:
    return dtype if lanes == 1 else VECTORS[dtype]


def _element(value_type: types.Type) -> types.Float:
    return value_type.dtype if isinstance(value_type, Vector) else value_type


def _splat(builder: Any, scalar: Any, vector_type: ir.VectorType) -> Any:
    first = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector_type.count), None)
    return builder.shuffle_vector(first, ir.Constant(vector_type, ir.Undefined), zeros)


def _shuffled(builder: Any, vector: Any, lanes: range) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)


# --- arithmetic ---


def _define_operator(symbol: Any, instruction: str) -> None:
    @type_callable(symbol)
    def typing(context: Any) -> Any:
        def typer(a, b):  # type: ignore[no-untyped-def]  # numba compares this signature with the call's
            vector = a if isinstance(a, Vector) else b
            if isinstance(vector, Vector) and all(t in (vector, vector.dtype) for t in (a, b)):
                return vector
            return None

        return typer

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*_lanewise(builder, signature, args))

    for kinds in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(symbol, *kinds)(lower)


def _lanewise(builder: Any, signature: Any, args: Any) -> list[Any]:
    """The arguments, scalars among them repeated in every lane of the result's type."""
    result = signature.return_type
    return [v if t == result else _splat(builder, v, _llvm(result)) for v, t in zip(args, signature.args, strict=True)]


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c in one rounding where the processor can; scalars beside vectors count for every lane."""
    kinds = (a, b, c)
    result = next((k for k in kinds if isinstance(k, Vector)), a)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm_type, lanes = _llvm(result), f"v{LANES}" if isinstance(result, Vector) else ""
        name = f"llvm.fmuladd.{lanes}f{_element(result).bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(llvm_type, [llvm_type] * 3), name)
        return builder.call(function, _lanewise(builder, signature, args))

    scalar = _element(result)
    return result(*(k if isinstance(k, Vector) else scalar for k in kinds)), codegen


@intrinsic
def convert(typingctx: Any, value: Any, dtype: Any) -> Any:
    """The value, scalar or vector, in another floating type."""
    lanes = LANES if isinstance(value, Vector) else 1
    source, target = _element(value), dtype.dtype
    result = _of(target, lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if source == target:
            return args[0]
        return (builder.fpext if target == types.float64 else builder.fptrunc)(args[0], _llvm(result))

    return result(value, dtype), codegen


@intrinsic
def splat(typingctx: Any, value: Any, lanes: Any) -> Any:
    """The scalar in every lane (or the scalar itself where `lanes` is 1)."""
    count = _literal(lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if count == 1 else _splat(builder, args[0], _llvm(VECTORS[value]))

    return _of(value, count)(value, lanes), codegen


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of a vector's lanes, always in the same order: halves are added until one lane is left."""
    scalar = _element(value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rest, lanes = args[0], LANES if isinstance(value, Vector) else 1
        while lanes > 1:
            lanes //= 2
            low, high = (_shuffled(builder, rest, range(start, start + lanes)) for start in (0, lanes))
            rest = builder.fadd(low, high)
        return builder.extract_element(rest, ir.Constant(ir.IntType(32), 0)) if isinstance(value, Vector) else rest

    return scalar(value), codegen


# --- memory ---


@intrinsic
def pointer(typingctx: Any, address: Any, dtype: Any) -> Any:
    """The integer address as a pointer to `dtype`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.intp, dtype), codegen


@intrinsic
def reinterpret(typingctx: Any, base: Any, dtype: Any) -> Any:
    """The same address as a pointer to another type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(base, dtype), codegen


@intrinsic
def offset(typingctx: Any, base: Any, count: Any) -> Any:
    """The pointer moved on by `count` elements."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return base(base, types.intp), codegen


@intrinsic
def load(typingctx: Any, base: Any, index: Any, lanes: Any) -> Any:
    """One scalar or `LANES` neighbours from `base[index]` on; bfloat16 (a uint16 pointer) arrives as float32."""
    count, stored = _literal(lanes), base.dtype
    result = _of(types.float32 if stored == types.uint16 else stored, count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = ir.IntType(16) if stored == types.uint16 else _llvm_float(stored)
        place = _place(builder, args[0], args[1], raw, count)
        value = builder.load(place, align=_bytes(stored))
        if stored != types.uint16:
            return value
        wide = _integers(32, count)
        return builder.bitcast(builder.shl(builder.zext(value, wide), _constant(wide, 16)), _llvm(result))

    return result(base, types.intp, lanes), codegen


@intrinsic
def store(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a scalar or vector to `base[index]` and on; into bfloat16 it is rounded to nearest even, NaN stays NaN."""
    count, stored = (LANES if isinstance(value, Vector) else 1), base.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = ir.IntType(16) if stored == types.uint16 else _llvm_float(stored)
        place = _place(builder, args[0], args[1], raw, count)
        result = _to_bfloat16(builder, args[2], count) if stored == types.uint16 else args[2]
        builder.store(result, place, align=_bytes(stored))
        return context.get_dummy_value()

    return types.void(base, types.intp, value), codegen


@intrinsic
def stream(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
    """`store` around the caches, for output that will not fit; the address must be a multiple of the vector's size.

    It saves reading the line that is about to be overwritten. End with `fence()` before another thread may read.
    A scalar is just stored.
    """
    stored, count = base.dtype, LANES if isinstance(value, Vector) else 1

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = ir.IntType(16) if stored == types.uint16 else _llvm_float(stored)
        result = _to_bfloat16(builder, args[2], count) if stored == types.uint16 else args[2]
        written = builder.store(result, _place(builder, args[0], args[1], raw, count), align=count * _bytes(stored))
        if count > 1:
            _around_caches(builder, written)
        return context.get_dummy_value()

    return types.void(base, types.intp, value), codegen


def _around_caches(builder: Any, written: Any) -> None:
    written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


# Two vectors at a time. Which lane holds which of the 16 neighbours is left open: for bfloat16 one vector has those at
# even places and the other those at odd ones, since two halves of a 32-bit word come apart, and together again, without
# any moving of lanes. What is done to all lanes alike does not notice.


@intrinsic
def load_pair(typingctx: Any, base: Any, index: Any) -> Any:
    """16 neighbours from `base[index]` on, in two vectors, in the order that `store_pair` expects."""
    stored = base.dtype
    result = VECTORS[types.float32 if stored == types.uint16 else stored]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if stored == types.uint16:
            words = builder.load(_place(builder, args[0], args[1], ir.IntType(16), 2 * LANES), align=2)
            wide = _integers(32, LANES)
            words = builder.bitcast(words, wide)
            halves = builder.shl(words, _constant(wide, 16)), builder.and_(words, _constant(wide, 0xFFFF0000))
            pair = [builder.bitcast(half, _llvm(result)) for half in halves]
        else:
            places = (args[1], builder.add(args[1], ir.Constant(ir.IntType(64), LANES)))
            raw = _llvm_float(stored)
            pair = [builder.load(_place(builder, args[0], at, raw, LANES), align=_bytes(stored)) for at in places]
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(result, 2)(base, types.intp), codegen


@intrinsic
def load_pair_as(typingctx: Any, base: Any, index: Any, other: Any) -> Any:
    """16 neighbours of `base` in the order in which `load_pair(other, index)` gives those of `other`."""
    result = VECTORS[base.dtype]
    halves = (range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)) if other.dtype == types.uint16 else None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = _llvm_float(base.dtype)
        both = builder.load(_place(builder, args[0], args[1], raw, 2 * LANES), align=_bytes(base.dtype))
        parts = halves or (range(LANES), range(LANES, 2 * LANES))
        return context.make_tuple(builder, signature.return_type, [_shuffled(builder, both, part) for part in parts])

    return types.UniTuple(result, 2)(base, types.intp, other), codegen


def _define_pair_store(around_caches: bool) -> Any:
    @intrinsic
    def pair_store(typingctx: Any, base: Any, index: Any, first: Any, second: Any) -> Any:
        stored = base.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            raw = ir.IntType(16) if stored == types.uint16 else _llvm_float(stored)
            if stored == types.uint16:
                low, high = (_rounded(builder, value, LANES) for value in args[2:])
                wide = _integers(32, LANES)
                low = builder.lshr(low, _constant(wide, 16))
                words = builder.or_(low, builder.and_(high, _constant(wide, 0xFFFF0000)))
                values = [(args[1], builder.bitcast(words, _integers(16, 2 * LANES)), 2 * LANES)]
            else:
                after = builder.add(args[1], ir.Constant(ir.IntType(64), LANES))
                values = [(args[1], args[2], LANES), (after, args[3], LANES)]
            for at, value, count in values:
                align = _bytes(stored) * (count if around_caches else 1)
                written = builder.store(value, _place(builder, args[0], at, raw, count), align=align)
                if around_caches:
                    _around_caches(builder, written)
            return context.get_dummy_value()

        return types.void(base, types.intp, first, second), codegen

    return pair_store


store_pair = _define_pair_store(around_caches=False)
stream_pair = _define_pair_store(around_caches=True)


@intrinsic
def prefetch(typingctx: Any, base: Any, index: Any) -> Any:
    """Ask for the cache line of `base[index]` ahead of its use; any address is allowed."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        place = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        builder.call(function, [place, *(ir.Constant(i32, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(base, types.intp), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Let every store so far, streamed ones too, be seen before any later one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def alloca(typingctx: Any, count: Any, dtype: Any) -> Any:
    """Uninitialised memory for `count` (a literal) values on the stack of the function that calls."""
    size = _literal(count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return cgutils.alloca_once(builder, context.get_value_type(dtype.dtype), size=size)

    return types.CPointer(dtype.dtype)(count, dtype), codegen


def _rounded(builder: Any, value: Any, count: int) -> Any:
    """The bits of float32 values, rounded to nearest even in their upper half, the bfloat16; NaN stays NaN."""
    wide = _integers(32, count)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, _constant(wide, 16)), _constant(wide, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(wide, 0x7FFF)))
    # Rounding would carry a NaN's payload into infinity or zero.
    return builder.select(builder.fcmp_unordered("uno", value, value), _constant(wide, 0x7FC00000), rounded)


def _to_bfloat16(builder: Any, value: Any, count: int) -> Any:
    upper = builder.lshr(_rounded(builder, value, count), _constant(_integers(32, count), 16))
    return builder.trunc(upper, _integers(16, count))


def _integers(bits: int, count: int) -> ir.Type:
    return ir.IntType(bits) if count == 1 else ir.VectorType(ir.IntType(bits), count)


def _place(builder: Any, base: Any, index: Any, raw: ir.Type, count: int) -> Any:
    wanted = raw if count == 1 else ir.VectorType(raw, count)
    return builder.bitcast(builder.gep(base, [index]), wanted.as_pointer())


def _constant(llvm_type: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(llvm_type, [value] * llvm_type.count if isinstance(llvm_type, ir.VectorType) else value)


def _bytes(dtype: types.Type) -> int:
    return int(dtype.bitwidth) // 8


def _literal(lanes: Any) -> int:
    if not isinstance(lanes, types.IntegerLiteral):
        raise TypingError("lanes must be a literal")
    return int(lanes.literal_value)


# --- the outside world ---


@intrinsic
def call_int(typingctx: Any, address: Any) -> Any:
    """Call `int f(void)` at an address; one that arrives with the arguments leaves the code cacheable."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer())
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.intp), codegen


@intrinsic
def call_void(typingctx: Any, address: Any) -> Any:
    """Call `void f(void)` at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen
