"""The kernels of `schemes/kernels.py` for processors, compiled by numba: the same bits, each element touched once in registers.

A row of weights is widened to float32, divided by the scales and rounded in one pass over memory that the cache holds; torch makes
a pass for each operation. Without `fastmath`
LLVM neither reorders nor contracts floating point operations, so every processor gives the same result.

bfloat16 comes as uint16, float32 as itself, and float16 is widened before.
Compiled functions are kept on disk (NUMBA_CACHE_DIR, else beside this file or in the user's cache), if there is a place for them.
Legend: schemes/scheme.py; Q candidates, U units.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamquant.kernels.instructions import ROUNDER, compiled, e2m1_code, e4m3_code, last_byte, magnitude, ordered, widened
from streamquant.kernels.search import Weight, best_candidates, exact_sums, kind_of
from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers
from streamquant.schemes.kernels import TorchKernels
from streamquant.schemes.packing import WORD_BITS
from streamquant.schemes.units import Scales

NO_ZERO = np.zeros((0, 0), dtype=np.float32)


class CompiledKernels(TorchKernels):
    """Kernels for tensors in the memory of the processor. Weights whose columns units do not divide are left to the reference."""

    name = "numba"
    working_bytes = 10  # the source, the codes, and scales of groups of 16
    search_bytes = 12  # bounds and scales of candidates, a third as many as elements, in several forms

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

    def errors(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None) -> Tensor:
        if weight_NK.shape[1] % unit[1]:
            return super().errors(codes, weight_NK, unit, scale_QRC, zero_QRC)
        kind, smallest, largest = kind_of(codes)
        scale, zero = _lines(scale_QRC, zero_QRC)
        unit_J = np.tile(np.arange(scale.shape[1]), len(scale))
        sum_J = np.empty(len(unit_J), np.float32)
        exact_sums(kind, _words(weight_NK, unit), unit_J, scale.reshape(-1), zero.reshape(-1), smallest, largest, sum_J)
        return torch.from_numpy(sum_J).view(scale_QRC.shape)

    def best(
        self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None, *, amax_RC: Tensor
    ) -> Tensor:
        if weight_NK.shape[1] % unit[1]:
            return super().best(codes, weight_NK, unit, scale_QRC, zero_QRC, amax_RC=amax_RC)
        kind, smallest, largest = kind_of(codes)
        scale, zero = _lines(scale_QRC, zero_QRC)
        index_U = np.empty(scale.shape[1], np.int64)
        best_candidates(kind, _words(weight_NK, unit), amax_RC.flatten().numpy(), scale, zero, smallest, largest, index_U)
        return torch.from_numpy(index_U).view(scale_QRC.shape[1:])


def _num_units(weight_NK: Tensor, unit: tuple[int, int]) -> tuple[int, int]:
    return -(-weight_NK.shape[0] // unit[0]), weight_NK.shape[1] // unit[1]


def _words(weight_NK: Tensor, unit: tuple[int, int]) -> Weight:
    is_paired = weight_NK.dtype == torch.bfloat16 and unit[1] % 2 == 0
    words = (weight_NK if is_paired else weight_NK.float()).contiguous().view(torch.uint32).numpy()
    num_rows, row_words = words.shape
    return Weight(words.reshape(-1), 2 if is_paired else 1, num_rows, row_words, *unit, weight_NK.shape[1] // unit[1])


def _lines(scale_QRC: Tensor, zero_QRC: Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scales and zeros of candidates, [Q, U]."""
    scale = scale_QRC.flatten(1).numpy()
    return scale, np.zeros_like(scale) if zero_QRC is None else zero_QRC.flatten(1).numpy()


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


# --- observing -------------------------------------------------------------------------------------------------------


@compiled
def _largest(bits, a, b, largest):  # type: ignore[no-untyped-def]
    """The bits of the largest magnitude of each unit, [R, C], which begins as zeros."""
    for row in range(len(bits)):
        for unit in range(largest.shape[1]):
            most = largest[row // a, unit]
            for j in range(b):
                bits_here = magnitude(bits[row, unit * b + j])
                most = bits_here if bits_here > most else most
            largest[row // a, unit] = most


@compiled
def _bounds(bits, a, b, bounds):  # type: ignore[no-untyped-def]
    """The bits of the smallest and the largest number of each unit and zero, [2, R, C], which begins as zeros."""
    for row in range(len(bits)):
        for unit in range(bounds.shape[2]):
            low, high = ordered(bounds[0, row // a, unit]), ordered(bounds[1, row // a, unit])
            for j in range(b):
                number = ordered(bits[row, unit * b + j])
                low = number if number < low else low
                high = number if number > high else high
            bounds[0, row // a, unit], bounds[1, row // a, unit] = ordered(low), ordered(high)


# --- encoding --------------------------------------------------------------------------------------------------------


@compiled
def _quotients(weight, scale, b, quotient):  # type: ignore[no-untyped-def]
    """A row of weights divided by the scales of its units."""
    for unit in range(len(scale)):
        divisor = scale[unit]
        for j in range(b):
            quotient[unit * b + j] = widened(weight[unit * b + j]) / divisor


@compiled
def _int_codes(weight, scale, zero, b, smallest, largest, rounder, code):  # type: ignore[no-untyped-def]
    """A row of weights as the last bytes of (weight / scale + zero, between smallest and largest) + rounder."""
    for unit in range(len(scale)):
        divisor = scale[unit]
        shift = zero[unit] if len(zero) else np.float32(0)
        for j in range(b):
            quotient = widened(weight[unit * b + j]) / divisor + shift
            quotient = smallest if quotient < smallest else quotient
            quotient = largest if quotient > largest else quotient
            code[unit * b + j] = last_byte(quotient + rounder)


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
            packed[row, column] = e4m3_code(quotient[column])


@compiled
def _codes_e2m1(weight, a, b, scale, packed):  # type: ignore[no-untyped-def]
    quotient, code = np.empty(weight.shape[1], np.float32), np.empty(weight.shape[1], np.uint8)
    for row in range(len(weight)):
        _quotients(weight[row], scale[row // a], b, quotient)
        for column in range(len(quotient)):
            code[column] = e2m1_code(quotient[column])
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
