"""The kernels of `schemes/kernels.py` for processors, compiled by numba: the same bits, each element touched once in registers.

A row of weights is widened to float32, divided by the scales and rounded in one pass over memory that the cache holds; torch makes
a pass for each operation. Numbers are rounded as in `schemes/rounding.py`, or by shorter ways to the same bits, which are
written in LLVM's own instructions: numba would widen integers to 64 bits and keep a loop from being vectorized. Without `fastmath`
LLVM neither reorders nor contracts floating point operations, so every processor gives the same result.

bfloat16 comes as uint16, float32 as itself, and float16 is widened before.
Compiled functions are kept on disk (NUMBA_CACHE_DIR, else beside this file or in the user's cache), if there is a place for them.
Legend: schemes/scheme.py; Q candidates, U units.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers
from streamquant.schemes.kernels import TorchKernels
from streamquant.schemes.packing import WORD_BITS
from streamquant.schemes.rounding import FP4_MAX, FP8_MAX, MANTISSA_BITS
from streamquant.schemes.units import Scales


def _can_be_kept() -> bool:
    """Whether numba finds a folder for what it compiles. In a container there may be none that can be written to."""
    try:
        njit(cache=True)(_can_be_kept)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return False
    return True


compiled = njit(nogil=True, error_model="numpy", cache=_can_be_kept())

LANES = 16  # float32 numbers of the widest vectors
MAGNITUDE = 0x7FFFFFFF
ROUNDER = np.float32(1.5 * 2**MANTISSA_BITS)  # float32 numbers near it are integers; the last byte of it is 0
E4M3, E2M1, INTEGER = range(3)
NO_ZERO = np.zeros((0, 0), dtype=np.float32)


class CompiledKernels(TorchKernels):
    """Kernels for tensors in the memory of the processor. Weights whose columns units do not divide are left to the reference."""

    name = "numba"
    working_bytes = 10  # the source, the codes, and scales of groups of 16
    search_bytes = 12  # scales and errors of ten candidates for groups of 16

    def extremes(self, weight_NK: Tensor, unit: tuple[int, int], *, symmetric: bool) -> Tensor:
        if weight_NK.shape[1] % unit[1]:
            return super().extremes(weight_NK, unit, symmetric=symmetric)
        num_units = _num_units(weight_NK, unit)
        if symmetric:
            bits = _unsigned(weight_NK)
            largest = np.zeros(num_units, dtype=bits.dtype)
            _largest(bits, *unit, largest)
            return torch.from_numpy(largest).view(weight_NK.dtype).float()[None]
        bits = _signed(weight_NK)
        bounds = np.zeros((2, *num_units), dtype=bits.dtype)
        _bounds(bits, *unit, bounds)
        return torch.from_numpy(bounds).view(weight_NK.dtype).float()

    def codes(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scales: Scales) -> Tensor:
        if weight_NK.shape[1] % unit[1]:
            return super().codes(codes, weight_NK, unit, scales)
        weight, (num_rows, num_columns) = _loadable(weight_NK), weight_NK.shape
        scale, zero = _scales(scales, _num_units(weight_NK, unit))
        match codes:
            case E4m3():
                packed = torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn)
                _codes_e4m3(weight, *unit, scale, packed.view(torch.uint8).numpy())
            case E2m1():
                packed = torch.empty((num_rows, num_columns // 2), dtype=torch.uint8)
                _codes_e2m1(weight, *unit, scale, packed.numpy())
            case ByteIntegers():
                packed = torch.empty((num_rows, num_columns), dtype=torch.int8)
                _codes_int(weight, *unit, scale, zero, *_limits(codes), packed.view(torch.uint8).numpy())
            case PackedIntegers(num_bits):
                packed = torch.empty((num_rows, -(-num_columns * num_bits // WORD_BITS)), dtype=torch.int32)
                _codes_packed_int(weight, *unit, scale, zero, *_limits(codes), num_bits, packed.view(torch.uint8).numpy())
            case _:
                raise AssertionError(f"no kernel for {codes}")
        return packed

    def errors(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], candidates: Sequence[Scales]) -> Tensor:
        if weight_NK.shape[1] % unit[1]:
            return super().errors(codes, weight_NK, unit, candidates)
        num_units = _num_units(weight_NK, unit)
        scale = torch.stack([scales.scale_RC.expand(num_units) for scales in candidates]).flatten(1).numpy()
        zero = np.zeros((1, scale.shape[1]), dtype=np.float32)
        smallest = largest = np.float32(0)
        match codes:
            case E4m3():
                kind = E4M3
            case E2m1():
                kind = E2M1
            case ByteIntegers() | PackedIntegers():
                kind = INTEGER
                smallest, largest = _limits(codes)
                zeros = [scales.zero_RC.expand(num_units).flatten().numpy() for scales in candidates if scales.zero_RC is not None]
                zero = np.stack(zeros) if zeros else zero
            case _:
                raise AssertionError(f"no kernel for {codes}")
        sums = np.empty_like(scale)
        _errors(kind, _loadable(weight_NK), *unit, num_units[1], scale, zero, smallest, largest, sums)
        return torch.from_numpy(sums).view(-1, *num_units)


def _num_units(weight_NK: Tensor, unit: tuple[int, int]) -> tuple[int, int]:
    return -(-weight_NK.shape[0] // unit[0]), weight_NK.shape[1] // unit[1]


def _unsigned(weight_NK: Tensor) -> NDArray[Any]:
    return weight_NK.contiguous().view(torch.uint32 if weight_NK.dtype == torch.float32 else torch.uint16).numpy()


def _signed(weight_NK: Tensor) -> NDArray[Any]:
    return weight_NK.contiguous().view(torch.int32 if weight_NK.dtype == torch.float32 else torch.int16).numpy()


def _loadable(weight_NK: Tensor) -> NDArray[Any]:
    if weight_NK.dtype == torch.bfloat16:
        return _unsigned(weight_NK)
    return weight_NK.float().contiguous().numpy()


def _scales(scales: Scales, num_units: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scales and zeros, one for each unit."""
    zero = NO_ZERO if scales.zero_RC is None else scales.zero_RC.expand(num_units).contiguous().numpy()
    return scales.scale_RC.expand(num_units).contiguous().numpy(), zero


def _limits(codes: ByteIntegers | PackedIntegers) -> tuple[np.float32, np.float32]:
    return np.float32(codes.smallest), np.float32(codes.largest)


# --- single numbers, in LLVM's instructions --------------------------------------------------------------------------

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
def _magnitude(b: Any, number: Any) -> Any:
    """The bits of a number without its sign."""
    return b.and_(number, _same_type(number, (1 << (number.type.width - 1)) - 1))


@_instructions(None)
def _ordered(b: Any, number: Any) -> Any:
    """The bits of a number <-> integers in the order of the numbers."""
    width = number.type.width
    sign = b.ashr(number, _same_type(number, width - 1))
    return b.xor(number, b.and_(sign, _same_type(number, (1 << (width - 1)) - 1)))


@_instructions(types.float32)
def _widened(b: Any, number: Any) -> Any:
    """The float32 number that the bits of a bfloat16 number, or a float32 number, stand for."""
    return number if number.type == _F32 else b.bitcast(b.shl(b.zext(number, _I32), _i32(16)), _F32)


@_instructions(types.uint8)
def _last_byte(b: Any, number: Any) -> Any:
    """Of a float32 number near ROUNDER: the integer by which it is larger."""
    return b.trunc(b.bitcast(number, _I32), _I8)


@_instructions(types.float32)
def _fifth_root_guess(b: Any, t: Any) -> Any:
    """The guess of `rounding.power_2_4`."""
    t = b.select(b.fcmp_ordered("<", t, _f32(1e-18)), _f32(1e-18), t)
    bits = b.sitofp(b.bitcast(t, _I32), _F32)
    return b.bitcast(b.fptosi(b.fadd(b.fmul(bits, _f32(-0.2)), _f32(1.2780597e9)), _I32), _F32)


def _minifloat(b: Any, number: Any, *, mantissa_bits: int, bias: int, largest: float) -> tuple[Any, Any]:
    """Of the magnitude of a float32 number: its code in a small format, and the number that the code stands for.

    Normal numbers are rounded by a carry out of the bits that are dropped, ties to even. The others lie evenly apart, so that adding
    the power of two whose neighbours lie as far apart rounds them.
    """
    bits = b.and_(b.bitcast(number, _I32), _i32(MAGNITUDE))
    bits = b.select(b.icmp_unsigned("<", bits, _i32(_bits(largest))), bits, _i32(_bits(largest)))
    dropped = MANTISSA_BITS - mantissa_bits
    last_kept = b.and_(b.lshr(bits, _i32(dropped)), _i32(1))
    carried = b.add(b.add(bits, _i32((1 << (dropped - 1)) - 1)), last_kept)
    power = 2.0 ** (1 - bias + dropped)
    added = b.fadd(b.bitcast(bits, _F32), _f32(power))
    is_normal = b.icmp_unsigned(">=", bits, _i32(_bits(2.0 ** (1 - bias))))
    normal_code = b.sub(b.lshr(carried, _i32(dropped)), _i32((127 - bias) << mantissa_bits))
    code = b.select(is_normal, normal_code, b.sub(b.bitcast(added, _I32), _i32(_bits(power))))
    normal = b.bitcast(b.and_(carried, _i32(-1 << dropped)), _F32)
    return code, b.select(is_normal, normal, b.fsub(added, _f32(power)))


def _e4m3(b: Any, number: Any) -> tuple[Any, Any]:
    return _minifloat(b, number, mantissa_bits=3, bias=7, largest=FP8_MAX)


def _e2m1(b: Any, number: Any) -> tuple[Any, Any]:
    return _minifloat(b, number, mantissa_bits=1, bias=1, largest=FP4_MAX)


@_instructions(types.uint8)
def _e4m3_code(b: Any, number: Any) -> Any:
    sign = b.and_(b.lshr(b.bitcast(number, _I32), _i32(24)), _i32(0x80))
    return b.trunc(b.or_(_e4m3(b, number)[0], sign), _I8)


@_instructions(types.uint8)
def _e2m1_code(b: Any, number: Any) -> Any:
    """With the sign of a negative number that rounds to zero, but not of a zero."""
    sign = b.select(b.fcmp_ordered("<", number, _f32(0.0)), _i32(8), _i32(0))
    return b.trunc(b.or_(_e2m1(b, number)[0], sign), _I8)


@_instructions(types.float32)
def _e4m3_magnitude(b: Any, number: Any) -> Any:
    return _e4m3(b, number)[1]


@_instructions(types.float32)
def _e2m1_magnitude(b: Any, number: Any) -> Any:
    return _e2m1(b, number)[1]


# --- observing -------------------------------------------------------------------------------------------------------


@compiled
def _largest(bits, a, b, largest):  # type: ignore[no-untyped-def]
    """The bits of the largest magnitude of each unit, [R, C], which begins as zeros."""
    for row in range(len(bits)):
        for unit in range(largest.shape[1]):
            most = largest[row // a, unit]
            for j in range(b):
                magnitude = _magnitude(bits[row, unit * b + j])
                most = magnitude if magnitude > most else most
            largest[row // a, unit] = most


@compiled
def _bounds(bits, a, b, bounds):  # type: ignore[no-untyped-def]
    """The bits of the smallest and the largest number of each unit and zero, [2, R, C], which begins as zeros."""
    for row in range(len(bits)):
        for unit in range(bounds.shape[2]):
            low, high = _ordered(bounds[0, row // a, unit]), _ordered(bounds[1, row // a, unit])
            for j in range(b):
                number = _ordered(bits[row, unit * b + j])
                low = number if number < low else low
                high = number if number > high else high
            bounds[0, row // a, unit], bounds[1, row // a, unit] = _ordered(low), _ordered(high)


# --- encoding --------------------------------------------------------------------------------------------------------


@compiled
def _quotients(weight, scale, b, quotient):  # type: ignore[no-untyped-def]
    """A row of weights divided by the scales of its units."""
    for unit in range(len(scale)):
        divisor = scale[unit]
        for j in range(b):
            quotient[unit * b + j] = _widened(weight[unit * b + j]) / divisor


@compiled
def _int_codes(weight, scale, zero, b, smallest, largest, rounder, code):  # type: ignore[no-untyped-def]
    """A row of weights as the last bytes of (weight / scale + zero, between smallest and largest) + rounder."""
    for unit in range(len(scale)):
        divisor = scale[unit]
        shift = zero[unit] if len(zero) else np.float32(0)
        for j in range(b):
            quotient = _widened(weight[unit * b + j]) / divisor + shift
            quotient = smallest if quotient < smallest else quotient
            quotient = largest if quotient > largest else quotient
            code[unit * b + j] = _last_byte(quotient + rounder)


@compiled
def _pack_nibbles(code, packed):  # type: ignore[no-untyped-def]
    """Two codes a byte, the even one in the low nibble."""
    pairs = code.view(np.uint16)
    for i in range(len(pairs)):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> 4))


@compiled
def _pack_bits(code, num_bits, packed):  # type: ignore[no-untyped-def]
    """A stream of codes of `num_bits`: eight of them are that many bytes."""
    for i in range(0, len(code), 8):
        stream = np.uint64(0)
        for j in range(8):
            stream |= np.uint64(code[i + j]) << np.uint64(j * num_bits)
        first = i // 8 * num_bits
        for j in range(min(num_bits, len(packed) - first)):
            packed[first + j] = np.uint8(stream >> np.uint64(8 * j))


@compiled
def _codes_e4m3(weight, a, b, scale, packed):  # type: ignore[no-untyped-def]
    quotient = np.empty(weight.shape[1], np.float32)
    for row in range(len(weight)):
        _quotients(weight[row], scale[row // a], b, quotient)
        for column in range(len(quotient)):
            packed[row, column] = _e4m3_code(quotient[column])


@compiled
def _codes_e2m1(weight, a, b, scale, packed):  # type: ignore[no-untyped-def]
    quotient, code = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.uint8)
    for row in range(len(weight)):
        _quotients(weight[row], scale[row // a], b, quotient)
        for column in range(len(quotient)):
            code[column] = _e2m1_code(quotient[column])
        _pack_nibbles(code, packed[row])


@compiled
def _codes_int(weight, a, b, scale, zero, smallest, largest, packed):  # type: ignore[no-untyped-def]
    for row in range(len(weight)):
        _int_codes(weight[row], scale[row // a], zero[row // a] if len(zero) else scale[0, :0], b, smallest, largest, ROUNDER, packed[row])


@compiled
def _codes_packed_int(weight, a, b, scale, zero, smallest, largest, num_bits, packed):  # type: ignore[no-untyped-def]
    num_columns = weight.shape[1]
    rounder = ROUNDER - smallest  # codes are stored unsigned
    code = np.zeros(-(-num_columns // 32) * 32, np.uint8)
    for row in range(len(weight)):
        of_row = zero[row // a] if len(zero) else scale[0, :0]
        target = packed[row, :num_columns] if num_bits == 8 else code[:num_columns]
        _int_codes(weight[row], scale[row // a], of_row, b, smallest, largest, rounder, target)
        if num_bits == 8:
            packed[row, num_columns:] = 0
        elif num_bits == 4:
            _pack_nibbles(code[: 2 * packed.shape[1]], packed[row])
        else:
            _pack_bits(code, num_bits, packed[row])


# --- searching -------------------------------------------------------------------------------------------------------


@compiled
def _power_2_4(value):  # type: ignore[no-untyped-def]
    """`rounding.power_2_4`, operation by operation."""
    t = value * value
    y = _fifth_root_guess(t)
    for _ in range(2):
        y2 = y * y
        u = y2 * y2 * y * t
        y = y * ((u * np.float32(0.12) + np.float32(-0.44)) * u + np.float32(1.32))
    root = y * y * t
    return root * root


@compiled
def _fold(numbers, count):  # type: ignore[no-untyped-def]
    """`rounding.tree_sum` of the first `count` lines, into the first."""
    while count > 1:
        half = count // 2
        for i in range(half):
            for lane in range(LANES):
                numbers[i, lane] += numbers[half + i, lane]
        if count % 2:
            for lane in range(LANES):
                numbers[half, lane] = numbers[2 * half, lane]
        count = half + count % 2


@compiled
def _load_tile(weight, a, b, row_units, first, line, tile):  # type: ignore[no-untyped-def]
    """Row `line` of the units from `first` on, one in each lane; zeros past the end."""
    for lane in range(LANES):
        row, start = (first + lane) // row_units * a + line, (first + lane) % row_units * b
        if row < len(weight):
            for j in range(b):
                tile[j, lane] = _widened(weight[row, start + j])
        else:
            tile[:, lane] = 0


@compiled
def _load_lanes(of_units, first, lanes):  # type: ignore[no-untyped-def]
    """The numbers of the units from `first` on; the last one for lanes without a unit."""
    for lane in range(LANES):
        lanes[lane] = of_units[min(first + lane, len(of_units) - 1)]


@compiled
def _distances(kind, tile, scale, zero, smallest, largest, power):  # type: ignore[no-untyped-def]
    """|code - quotient| ** 2.4 for a tile."""
    if kind == E4M3:
        for j in range(len(tile)):
            for lane in range(LANES):
                quotient = tile[j, lane] / scale[lane]
                power[j, lane] = _power_2_4(_e4m3_magnitude(quotient) - abs(quotient))
    elif kind == E2M1:
        for j in range(len(tile)):
            for lane in range(LANES):
                quotient = tile[j, lane] / scale[lane]
                power[j, lane] = _power_2_4(_e2m1_magnitude(quotient) - abs(quotient))
    else:
        for j in range(len(tile)):
            for lane in range(LANES):
                quotient = tile[j, lane] / scale[lane] + zero[lane]
                nearest = smallest if quotient < smallest else quotient
                nearest = largest if nearest > largest else nearest
                power[j, lane] = _power_2_4(((nearest + ROUNDER) - ROUNDER) - quotient)


@compiled
def _errors(kind, weight, a, b, row_units, scale, zero, smallest, largest, sums):  # type: ignore[no-untyped-def]
    """The sums over units, [Q, U], of what `_distances` gives for each candidate. `zero` has a line for all or for each of them."""
    num_candidates, num_units = scale.shape
    tile, power = np.empty((b, LANES), np.float32), np.empty((b, LANES), np.float32)
    of_lines = np.empty((num_candidates, a, LANES), np.float32)
    scale_lanes, zero_lanes = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, num_units, LANES):
        for line in range(a):
            _load_tile(weight, a, b, row_units, first, line, tile)
            for candidate in range(num_candidates):
                _load_lanes(scale[candidate], first, scale_lanes)
                _load_lanes(zero[min(candidate, len(zero) - 1)], first, zero_lanes)
                _distances(kind, tile, scale_lanes, zero_lanes, smallest, largest, power)
                _fold(power, b)
                for lane in range(LANES):
                    of_lines[candidate, line, lane] = power[0, lane]
        for candidate in range(num_candidates):
            _fold(of_lines[candidate], a)
            for lane in range(min(LANES, num_units - first)):
                sums[candidate, first + lane] = of_lines[candidate, 0, lane]
