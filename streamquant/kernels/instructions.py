"""What the loops of compiled kernels are made of: numba's compiler as they need it, and functions of single numbers in LLVM's instructions.

numba would widen integers to 64 bits and keep a loop from being vectorized. Numbers are rounded as in `schemes/rounding.py`, or by
shorter ways to the same bits.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from streamquant.schemes.rounding import EXPONENT_MASK, FP4_MAX, FP8_MAX, MANTISSA_BITS


def _can_be_kept() -> bool:
    """Whether numba finds a folder for what it compiles. In a container there may be none that can be written to."""
    try:
        njit(cache=True)(_can_be_kept)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return False
    return True


_IS_KEPT = _can_be_kept()
compiled = njit(nogil=True, error_model="numpy", cache=_IS_KEPT)
# Here a * b + c may be rounded once, so that the result depends on the processor.
contracted = njit(nogil=True, error_model="numpy", cache=_IS_KEPT, fastmath={"contract"})

MAGNITUDE = 0x7FFFFFFF
ROUNDER = np.float32(1.5 * 2**MANTISSA_BITS)  # float32 numbers near it are integers; the last byte of it is 0

_F32, _I32, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(8)


def _instructions(result: Any) -> Callable[[Callable[[Any, Any], Any]], Any]:
    """A function of one number that compiled code can call, from one that builds its instructions.

    `result`: its type, or None for that of the argument.
    """

    def decorate(build: Callable[[Any, Any], Any]) -> Any:
        def typed(context: Any, number: Any) -> Any:
            del context
            return (result or number)(number), lambda _context, builder, _signature, values: build(builder, values[0])

        return intrinsic(typed)

    return decorate


def _i32(value: int) -> Any:
    return ir.Constant(_I32, value)


def _f32(value: float) -> Any:
    return ir.Constant(_F32, float(np.float32(value)))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _same_type(number: Any, value: int) -> Any:
    return ir.Constant(number.type, value)


@_instructions(None)
def magnitude(b: Any, number: Any) -> Any:
    """The bits of a number without its sign."""
    return b.and_(number, _same_type(number, (1 << (number.type.width - 1)) - 1))


@_instructions(None)
def ordered(b: Any, number: Any) -> Any:
    """The bits of a number <-> integers in the order of the numbers."""
    width = number.type.width
    sign = b.ashr(number, _same_type(number, width - 1))
    return b.xor(number, b.and_(sign, _same_type(number, (1 << (width - 1)) - 1)))


@_instructions(types.float32)
def widened(b: Any, number: Any) -> Any:
    """The float32 number that the bits of a bfloat16 number, or a float32 number, stand for."""
    return number if number.type == _F32 else b.bitcast(b.shl(b.zext(number, _I32), _i32(16)), _F32)


@_instructions(types.uint8)
def last_byte(b: Any, number: Any) -> Any:
    """Of a float32 number near ROUNDER: the integer by which it is larger."""
    return b.trunc(b.bitcast(number, _I32), _I8)


@_instructions(types.float32)
def fifth_root_guess(b: Any, t: Any) -> Any:
    """The guess of `rounding.power_2_4` at t ** (-1/5), for t >= 1e-18."""
    bits = b.sitofp(b.bitcast(t, _I32), _F32)
    return b.bitcast(b.fptosi(b.fadd(b.fmul(bits, _f32(-0.2)), _f32(1.2780597e9)), _I32), _F32)


def _clamped_magnitude(b: Any, number: Any, largest: float) -> Any:
    bits = b.and_(b.bitcast(number, _I32), _i32(MAGNITUDE))
    return b.select(b.icmp_unsigned("<", bits, _i32(_bits(largest))), bits, _i32(_bits(largest)))


def _minifloat_code(b: Any, number: Any, *, mantissa_bits: int, bias: int, largest: float) -> Any:
    """The code of the magnitude of a float32 number in a small format.

    Normal numbers are rounded by a carry out of the bits that are dropped, ties to even. The others lie evenly apart, so that adding
    the power of two whose neighbours lie as far apart rounds them.
    """
    bits = _clamped_magnitude(b, number, largest)
    dropped = MANTISSA_BITS - mantissa_bits
    last_kept = b.and_(b.lshr(bits, _i32(dropped)), _i32(1))
    carried = b.add(b.add(bits, _i32((1 << (dropped - 1)) - 1)), last_kept)
    power = 2.0 ** (1 - bias + dropped)
    added = b.fadd(b.bitcast(bits, _F32), _f32(power))
    is_normal = b.icmp_unsigned(">=", bits, _i32(_bits(2.0 ** (1 - bias))))
    normal_code = b.sub(b.lshr(carried, _i32(dropped)), _i32((127 - bias) << mantissa_bits))
    return b.select(is_normal, normal_code, b.sub(b.bitcast(added, _I32), _i32(_bits(power))))


def _nearest_minifloat(b: Any, number: Any, *, mantissa_bits: int, bias: int, largest: float) -> Any:
    """The magnitude of a float32 number, rounded to a small format: the power of two is added whose neighbours lie as far apart."""
    bits = _clamped_magnitude(b, number, largest)
    binade = b.and_(bits, _i32(EXPONENT_MASK))
    lowest = _i32(_bits(2.0 ** (1 - bias)))
    binade = b.select(b.icmp_unsigned("<", binade, lowest), lowest, binade)
    power = b.bitcast(b.add(binade, _i32((MANTISSA_BITS - mantissa_bits) << MANTISSA_BITS)), _F32)
    return b.fsub(b.fadd(b.bitcast(bits, _F32), power), power)


_E4M3: dict[str, Any] = {"mantissa_bits": 3, "bias": 7, "largest": FP8_MAX}
_E2M1: dict[str, Any] = {"mantissa_bits": 1, "bias": 1, "largest": FP4_MAX}


@_instructions(types.uint8)
def e4m3_code(b: Any, number: Any) -> Any:
    sign = b.and_(b.lshr(b.bitcast(number, _I32), _i32(24)), _i32(0x80))
    return b.trunc(b.or_(_minifloat_code(b, number, **_E4M3), sign), _I8)


@_instructions(types.uint8)
def e2m1_code(b: Any, number: Any) -> Any:
    """With the sign of a negative number that rounds to zero, but not of a zero."""
    sign = b.select(b.fcmp_ordered("<", number, _f32(0.0)), _i32(8), _i32(0))
    return b.trunc(b.or_(_minifloat_code(b, number, **_E2M1), sign), _I8)


@_instructions(types.float32)
def nearest_e4m3(b: Any, number: Any) -> Any:
    return _nearest_minifloat(b, number, **_E4M3)


@_instructions(types.float32)
def nearest_e2m1(b: Any, number: Any) -> Any:
    return _nearest_minifloat(b, number, **_E2M1)
