"""The kernels of `schemes/kernels.py` for GPUs, in Triton: the same bits, each element read once.

torch makes a pass over memory for each operation, some 20 to encode and 50 for each candidate of a search, which is slower than the bus
to the GPU. Here the search evaluates all candidates while the elements are in registers. Extremes are left to the reference, whose
three passes are faster than any bus.

Numbers are rounded by the ways of `compiled.py`. By default Triton divides approximately and contracts a * b + c; `div_rn` and
EXACT forbid it. It neither reorders operations nor flushes small numbers. bfloat16 comes as uint16.

A *line* is the columns of a unit in one row. A search cuts it into *pieces* by the order of `rounding.tree_sum`, which adds halves: of b
columns, b = r * p with p a power of two, piece i has the columns i, i + r, i + 2 * r ..., and the sums of its p numbers are what tree_sum
has after log2(p) steps. The reference does the other steps.
Legend: schemes/scheme.py; Q candidates, L lines, T pieces at a time, P columns of a piece, E elements at a time.
"""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamquant.errors import one_line
from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers
from streamquant.schemes.kernels import TORCH, TorchKernels
from streamquant.schemes.packing import pack_int32
from streamquant.schemes.rounding import tree_sum
from streamquant.schemes.units import Scales

EXACT = {"enable_fp_fusion": False}
TILE = 2048  # elements of a program that searches
MIN_PIECE, MAX_PIECE = 16, 128
MAX_ELEMENTS = 1024  # of a row, of a program that encodes

PROBED_CODES: tuple[Codes, ...] = (E4m3(), E2m1(), PackedIntegers(4))
PROBED_SHAPE, PROBED_UNIT = (47, 256), (1, 32)  # the last row has the magnitude 2**-138

E4M3, E2M1, INTEGER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ROUNDER = tl.constexpr(1.5 * 2**23)  # float32 numbers near it are integers
ROUNDER_BITS = tl.constexpr(0x4B400000)


class TritonKernels(TorchKernels):
    """Kernels for GPUs.

    Left to the reference are weights whose columns units do not divide, and searches in lines that are no multiple of MIN_PIECE.
    """

    name = "triton"

    def __init__(self) -> None:
        self._lock = threading.Lock()  # the compiler is not made for several threads

    def fault(self, device: torch.device) -> str | None:
        """Why they are not to be used on a device, or None: they encode and search weights of all sizes as the reference does."""
        try:
            return self._first_difference(device)
        except Exception as error:  # noqa: BLE001, a compiler that is missing or that knows no such GPU fails in its own ways
            return one_line(str(error).strip().partition("\n")[0] or type(error).__name__)

    def _first_difference(self, device: torch.device) -> str | None:
        magnitude_N1 = torch.exp2(-3.0 * torch.arange(PROBED_SHAPE[0]))[:, None]  # down to what is no normal number
        weight_NK = (torch.randn(PROBED_SHAPE, generator=torch.Generator().manual_seed(0)) * magnitude_N1).to(device)
        scale_RC = TORCH.extremes(weight_NK, PROBED_UNIT, symmetric=True)[0] * 0.125
        scales = Scales(scale_RC, scale_RC)
        for codes in PROBED_CODES:
            encoded = [kernels.codes(codes, weight_NK, PROBED_UNIT, scales).view(torch.uint8) for kernels in (self, TORCH)]
            searched = [kernels.errors(codes, weight_NK, PROBED_UNIT, scale_RC[None], None) for kernels in (self, TORCH)]
            if not (torch.equal(*encoded) and torch.equal(*searched)):
                return f"they give other bits than the reference for {codes}"
        return None

    def codes(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scales: Scales) -> Tensor:
        num_columns = weight_NK.shape[1]
        if num_columns % unit[1]:
            return super().codes(codes, weight_NK, unit, scales)
        match codes:
            case PackedIntegers(4) if num_columns % 8 == 0:
                return self._codes(codes, weight_NK, unit, scales, per_byte=2, offset=8).view(torch.int32)
            case PackedIntegers(8) if num_columns % 4 == 0:
                return self._codes(codes, weight_NK, unit, scales, per_byte=1, offset=128).view(torch.int32)
            case PackedIntegers(num_bits):
                return pack_int32(self._codes(codes, weight_NK, unit, scales, per_byte=1).view(torch.int8), num_bits)
            case ByteIntegers():
                return self._codes(codes, weight_NK, unit, scales, per_byte=1).view(torch.int8)
            case E2m1() if num_columns % 2 == 0:
                return self._codes(codes, weight_NK, unit, scales, per_byte=2)
            case E4m3():
                return self._codes(codes, weight_NK, unit, scales, per_byte=1).view(torch.float8_e4m3fn)
        return super().codes(codes, weight_NK, unit, scales)

    def errors(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None) -> Tensor:
        num_rows, num_columns = weight_NK.shape
        a, b = unit
        piece = min(b & -b, MAX_PIECE)
        if num_columns % b or piece < MIN_PIECE:
            return super().errors(codes, weight_NK, unit, scale_QRC, zero_QRC)
        num_units = _num_units(weight_NK, unit)
        kind, num_bits = _kind(codes)
        shape = (len(scale_QRC), num_units[0], a, num_units[1], b // piece)
        sums = torch.empty(shape, dtype=torch.float32, device=weight_NK.device)
        num_pieces = sums[0].numel()
        with self._lock, _current(weight_NK.device):
            _errors_kernel[(triton.cdiv(num_pieces, TILE // piece),)](
                _loadable(weight_NK), scale_QRC.contiguous(), None if zero_QRC is None else zero_QRC.contiguous(), sums,
                len(scale_QRC), num_rows * num_units[1] * (b // piece), num_pieces, a, num_units[1], scale_QRC[0].numel(), b // piece,
                kind, num_bits, TILE // piece, piece, **EXACT,
            )  # fmt: skip
        return tree_sum(tree_sum(sums).transpose(2, 3))

    def _codes(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scales: Scales, *, per_byte: int, offset: int = 0) -> Tensor:
        """Codes plus `offset` in bytes, the even column in the low bits."""
        num_rows, num_columns = weight_NK.shape
        num_units = _num_units(weight_NK, unit)
        scale_RC = scales.scale_RC.expand(num_units).contiguous()
        zero_RC = None if scales.zero_RC is None else scales.zero_RC.expand(num_units).contiguous()
        kind, num_bits = _kind(codes)
        num_elements = min(triton.next_power_of_2(num_columns), MAX_ELEMENTS)
        packed = torch.empty((num_rows, num_columns // per_byte), dtype=torch.uint8, device=weight_NK.device)
        with self._lock, _current(weight_NK.device):
            _codes_kernel[(num_rows, triton.cdiv(num_columns, num_elements))](
                _loadable(weight_NK), scale_RC, zero_RC, packed,
                num_columns, *unit, num_units[1], kind, num_bits, offset, per_byte, num_elements, **EXACT,
            )  # fmt: skip
        return packed


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _num_units(weight_NK: Tensor, unit: tuple[int, int]) -> tuple[int, int]:
    return -(-weight_NK.shape[0] // unit[0]), weight_NK.shape[1] // unit[1]


def _loadable(weight_NK: Tensor) -> Tensor:
    contiguous_NK = weight_NK.contiguous()
    return contiguous_NK.view(torch.uint16) if weight_NK.dtype == torch.bfloat16 else contiguous_NK


def _kind(codes: Codes) -> tuple[int, int]:
    """Which format the kernels round to, and the bits of its integers."""
    match codes:
        case E4m3():
            return E4M3.value, 8
        case E2m1():
            return E2M1.value, 4
        case ByteIntegers(num_bits) | PackedIntegers(num_bits):
            return INTEGER.value, num_bits
    raise AssertionError(f"no kernel for {codes}")


# --- single numbers --------------------------------------------------------------------------------------------------


@triton.jit
def _widened(number):  # type: ignore[no-untyped-def]
    """As float32 what is float32, float16, or the bits of bfloat16."""
    if number.dtype == tl.uint16:
        return (number.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505, the compiler wants one return in each branch
        return number.to(tl.float32)


@triton.jit
def _minifloat(number, dropped: tl.constexpr, bias: tl.constexpr, largest_bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the magnitude of a float32 number: its code in a format with `dropped` bits less, and the number that the code stands for.

    Normal numbers are rounded by a carry out of the bits that are dropped, ties to even. The others lie evenly apart, so that adding
    the power of two whose neighbours lie as far apart rounds them.
    """
    power_bits: tl.constexpr = (128 - bias + dropped) << 23
    power = tl.full(number.shape, power_bits, tl.int32).to(tl.float32, bitcast=True)
    bits = tl.minimum(number.to(tl.int32, bitcast=True) & 0x7FFFFFFF, largest_bits)
    carried = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    added = bits.to(tl.float32, bitcast=True) + power
    is_normal = bits >= (128 - bias) << 23
    code = tl.where(is_normal, (carried >> dropped) - ((127 - bias) << (23 - dropped)), added.to(tl.int32, bitcast=True) - power_bits)
    normal = (carried & (-1 << dropped)).to(tl.float32, bitcast=True)
    return code, tl.where(is_normal, normal, added - power)


@triton.jit
def _e4m3(number):  # type: ignore[no-untyped-def]
    return _minifloat(number, 20, 7, 0x43E00000)  # 448


@triton.jit
def _e2m1(number):  # type: ignore[no-untyped-def]
    return _minifloat(number, 22, 1, 0x40C00000)  # 6


@triton.jit
def _rounded(quotient, num_bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest integer of `num_bits`, plus ROUNDER."""
    largest: tl.constexpr = (1 << (num_bits - 1)) - 1
    return tl.minimum(tl.maximum(quotient, -largest - 1.0), largest * 1.0) + ROUNDER


@triton.jit
def _code(quotient, kind: tl.constexpr, num_bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code of a float32 number, in int32."""
    if kind == E4M3:
        return _e4m3(quotient)[0] | ((quotient.to(tl.int32, bitcast=True) >> 24) & 0x80)
    elif kind == E2M1:  # noqa: RET505
        return _e2m1(quotient)[0] | tl.where(quotient < 0, 8, 0)
    else:
        return _rounded(quotient, num_bits).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def _distance(quotient, kind: tl.constexpr, num_bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code - quotient, or the same with the other sign."""
    if kind == E4M3:
        return _e4m3(quotient)[1] - tl.abs(quotient)
    elif kind == E2M1:  # noqa: RET505
        return _e2m1(quotient)[1] - tl.abs(quotient)
    else:
        return (_rounded(quotient, num_bits) - ROUNDER) - quotient


@triton.jit
def _power_2_4(value):  # type: ignore[no-untyped-def]
    """`rounding.power_2_4`, operation by operation."""
    t = value * value
    bits = tl.maximum(t, 1e-18).to(tl.int32, bitcast=True).to(tl.float32)
    y = (bits * -0.2 + 1.2780597e9).to(tl.int32).to(tl.float32, bitcast=True)
    for _ in tl.static_range(2):
        y2 = y * y
        u = y2 * y2 * y * t
        y = y * ((u * 0.12 + -0.44) * u + 1.32)
    root = y * y * t
    return root * root


# --- encoding --------------------------------------------------------------------------------------------------------


@triton.jit
def _codes_kernel(  # type: ignore[no-untyped-def]
    weight, scale, zero, packed, num_columns, a, b, units_in_row,
    kind: tl.constexpr, num_bits: tl.constexpr, offset: tl.constexpr, per_byte: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """A part of a row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * E + tl.arange(0, E)
    start = row.to(tl.int64) * num_columns
    is_there = column < num_columns
    unit = (row // a).to(tl.int64) * units_in_row + column // b
    number = _widened(tl.load(weight + start + column, mask=is_there, other=0))
    quotient = tl.div_rn(number, tl.load(scale + unit, mask=is_there, other=1.0))
    if zero is not None:
        quotient += tl.load(zero + unit, mask=is_there, other=0.0)
    code = _code(quotient, kind, num_bits) + offset
    if per_byte == 2:
        low, high = tl.split(tl.reshape(code, (E // 2, 2)))
        byte = tl.program_id(1) * (E // 2) + tl.arange(0, E // 2)
        tl.store(packed + start // 2 + byte, ((low & 15) | (high << 4)).to(tl.uint8), mask=byte < num_columns // 2)
    else:
        tl.store(packed + start + column, code.to(tl.uint8), mask=is_there)


# --- searching -------------------------------------------------------------------------------------------------------


@triton.jit
def _fold(number, T: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """`rounding.tree_sum` over the second dimension, of a power of two."""
    half: tl.constexpr = P // 2
    low, high = tl.split(tl.permute(tl.reshape(number, (T, 2, half)), (0, 2, 1)))
    total = low + high
    if half > 1:
        return _fold(total, T, half)
    else:  # noqa: RET505
        return tl.reshape(total, (T,))


@triton.jit
def _errors_kernel(  # type: ignore[no-untyped-def]
    weight, scale, zero, sums, num_candidates, num_pieces_there, num_pieces, a, units_in_row, num_units, pieces_in_line,
    kind: tl.constexpr, num_bits: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The sums over T pieces of |code - quotient| ** 2.4 for each candidate. Rows that the last units lack count as zeros."""
    piece = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    line = piece // pieces_in_line
    first = line * (P * pieces_in_line) + piece % pieces_in_line
    element = first[:, None] + (tl.arange(0, P) * pieces_in_line)[None, :]
    number = _widened(tl.load(weight + element, mask=(piece < num_pieces_there)[:, None], other=0))
    unit = line // units_in_row // a * units_in_row + line % units_in_row
    is_there = piece < num_pieces
    for _ in range(num_candidates):
        divisor = tl.load(scale + unit, mask=is_there, other=1.0)
        quotient = tl.div_rn(number, tl.broadcast_to(divisor[:, None], (T, P)))
        if zero is not None:
            quotient += tl.load(zero + unit, mask=is_there, other=0.0)[:, None]
            zero += num_units
        power = _power_2_4(_distance(quotient, kind, num_bits))
        tl.store(sums + piece, _fold(power, T, P), mask=is_there)
        scale += num_units
        sums += num_pieces
