"""Activations: what is done to z, the normalized value (plus the residual), and to the gradient that comes back.

Each is a class of static functions of z (a scalar or a vector) and p, the activation's parameter; `form` makes compiled
functions of them. Where an activation is linear in pieces, with slope 1 on one of them and one other slope elsewhere, a
bit says all that its gradient needs of z.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any

from batchnorm.kernels.elementary import erfc, exp, expm1, like, log1p, where_at_most, where_less
from batchnorm.kernels.key import Form
from batchnorm.kernels.loops.slots import loop
from batchnorm.kernels.simd import fma


class _Activation:
    """The identity, and what the others inherit."""

    @staticmethod
    def value(z, p):
        return z

    @staticmethod
    def gradient(g, z, p):
        """The gradient with respect to z from g, the gradient with respect to the value."""
        return g

    @staticmethod
    def off(g, p):
        """The gradient where the slope is not 1."""
        return g

    @staticmethod
    def inverse(y, p):
        """z from the value, where that is possible."""
        return y


class _ReLU(_Activation):
    @staticmethod
    def value(z, p):
        return where_at_most(z, like(z, 0.0), like(z, 0.0), z)

    @staticmethod
    def gradient(g, z, p):
        return where_at_most(z, like(z, 0.0), like(z, 0.0), g)

    @staticmethod
    def off(g, p):
        return like(g, 0.0)


class _LeakyReLU(_Activation):
    @staticmethod
    def value(z, p):
        return where_less(like(z, 0.0), z, z, z * p)

    @staticmethod
    def gradient(g, z, p):
        return where_less(like(z, 0.0), z, g, g * p)

    @staticmethod
    def off(g, p):
        return g * p

    @staticmethod
    def inverse(y, p):
        return where_less(like(y, 0.0), y, y, y / like(y, p))


class _ReLU6(_Activation):
    @staticmethod
    def value(z, p):
        return where_less(like(z, 6.0), z, like(z, 6.0), where_at_most(z, like(z, 0.0), like(z, 0.0), z))

    @staticmethod
    def gradient(g, z, p):
        inside = where_less(z, like(z, 6.0), g, like(z, 0.0))
        return where_at_most(z, like(z, 0.0), like(z, 0.0), inside)

    @staticmethod
    def off(g, p):
        return like(g, 0.0)


class _SiLU(_Activation):
    @staticmethod
    def value(z, p):
        return z / (like(z, 1.0) + exp(like(z, 0.0) - z))

    @staticmethod
    def gradient(g, z, p):
        s = like(z, 1.0) / (like(z, 1.0) + exp(like(z, 0.0) - z))
        return g * s * fma(z, like(z, 1.0) - s, like(z, 1.0))


class _Hardswish(_Activation):
    @staticmethod
    def value(z, p):
        part = z + like(z, 3.0)
        part = where_less(part, like(z, 0.0), like(z, 0.0), part)
        part = where_less(like(z, 6.0), part, like(z, 6.0), part)
        return z * part / like(z, 6.0)

    @staticmethod
    def gradient(g, z, p):
        slope = where_less(z, like(z, 3.0), fma(z, like(z, 1.0 / 3.0), like(z, 0.5)), like(z, 1.0))
        return where_at_most(z, like(z, -3.0), like(z, 0.0), g * slope)


class _GELU(_Activation):
    @staticmethod
    def value(z, p):
        return z * _normal(z)

    @staticmethod
    def gradient(g, z, p):
        density = exp(z * z * like(z, -0.5)) * like(z, 0.3989422804014327)  # 1/√(2π)
        return g * fma(z, density, _normal(z))


@loop
def _normal(z):
    """The standard normal distribution function."""
    size = where_less(z, like(z, 0.0), like(z, 0.0) - z, z)
    tail = erfc(size * like(z, 0.7071067811865476)) * like(z, 0.5)
    return where_less(z, like(z, 0.0), tail, like(z, 1.0) - tail)


class _GELUTanh(_Activation):
    """z·(1 + tanh u)/2 is z·sigmoid(2u)."""

    @staticmethod
    def value(z, p):
        u = z * fma(z * z, like(z, 2 * 0.7978845608028654 * 0.044715), like(z, 2 * 0.7978845608028654))
        return z / (like(z, 1.0) + exp(like(z, 0.0) - u))

    @staticmethod
    def gradient(g, z, p):
        u = z * fma(z * z, like(z, 2 * 0.7978845608028654 * 0.044715), like(z, 2 * 0.7978845608028654))
        s = like(z, 1.0) / (like(z, 1.0) + exp(like(z, 0.0) - u))
        slope = fma(z * z, like(z, 6 * 0.7978845608028654 * 0.044715), like(z, 2 * 0.7978845608028654))
        return g * s * fma(z * slope, like(z, 1.0) - s, like(z, 1.0))


class _ELU(_Activation):
    @staticmethod
    def value(z, p):
        return where_less(like(z, 0.0), z, z, expm1(z) * p)

    @staticmethod
    def gradient(g, z, p):
        return where_less(like(z, 0.0), z, g, g * p * exp(z))

    @staticmethod
    def inverse(y, p):
        """Where y has reached −p, z is lost: it is taken for the smallest that float32 could tell from it, −16.6."""
        u = where_less(y / like(y, p), like(y, 2.0**-24 - 1.0), like(y, 2.0**-24 - 1.0), y / like(y, p))
        return where_less(like(y, 0.0), y, y, log1p(u))


ACTIVATIONS: dict[str | None, type[_Activation]] = {
    None: _Activation,
    "relu": _ReLU,
    "leaky_relu": _LeakyReLU,
    "relu6": _ReLU6,
    "silu": _SiLU,
    "hardswish": _Hardswish,
    "gelu": _GELU,
    "gelu_tanh": _GELUTanh,
    "elu": _ELU,
}


@cache
def compiled(form: Form) -> Any:
    """The form as Numba can take it for an argument: a module of compiled functions and constants."""
    activation = ACTIVATIONS[form.activation]
    module: Any = types.ModuleType(f"form_{form}")
    for name in ("value", "gradient", "off", "inverse"):
        setattr(module, name, loop(getattr(activation, name)))
    module.RESIDUAL, module.SLOPE_BITS, module.INPLACE, module.FIXED_MOMENTS, module.WEIGHTED = form[1:]
    module.ACTIVE = form.activation is not None
    module.FROM_Z = form.inplace or (module.ACTIVE and not form.slope_bits)  # the backward needs z itself
    return module
