"""Rounding to the nearest code of a number format, ties to even.

Only operations that IEEE 754 defines exactly are used (+ - * /, comparison, rounding, bit moves), so that every device, every
vector width and every split of a tensor gives the same bits. Any shape; NaN is the caller's business.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from streamquant.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


FP8_MAX = 448.0  # e4m3fn
FP4_MAX = 6.0  # e2m1

MANTISSA_BITS = 23  # of float32
MANTISSA_MASK = (1 << MANTISSA_BITS) - 1
EXPONENT_MASK = 0x7F800000
MAX_EXPONENT = 254
QUARTER_BINADE = 1 << (MANTISSA_BITS - 2)  # moves a significand of 1.75 or more into the next binade


def divide(numerator: Tensor, denominator: float) -> Tensor:
    """The correctly rounded quotient. CUDA would multiply by the reciprocal of a Python number."""
    return numerator / torch.full((), denominator, dtype=numerator.dtype, device=numerator.device)


def round_to_e4m3(value: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn, saturating at +-448. Clamped first: whether the cast saturates depends on the torch version."""
    return value.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def positive_e4m3_value(code: Tensor) -> Tensor:
    """Codes of e4m3 for numbers that are not negative, in uint8 -> float32 values. The cast of torch takes three times as long."""
    as_small_number = (code.to(torch.int32) << (MANTISSA_BITS - 3)).view(torch.float32)  # exponents biased by 7, not 127
    return as_small_number.mul_(2.0**120)


def round_to_e2m1(value: Tensor) -> Tensor:
    """float32 -> float32 values of e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives), saturating at +-6.

    A negative value that rounds to zero gives -0.0, an exact -0.0 gives 0.0.
    """
    clamped = value.clamp(-FP4_MAX, FP4_MAX).add_(0.0)
    # Neighbours lie half a power of two apart: 0.5 below 2, 1 below 4, 2 above.
    exponent = clamped.abs().clamp_(min=1.0).view(torch.int32).bitwise_and_(EXPONENT_MASK)
    step = exponent.sub_(1 << MANTISSA_BITS).view(torch.float32)
    return clamped.div_(step).round_().mul_(step)


def e2m1_nibble(value: Tensor) -> Tensor:
    """Values of e2m1 -> their codes in uint8: 0..7 by magnitude, plus 8 with the sign bit (-0.0 too)."""
    doubled = value.abs().mul_(2.0)  # 0 1 2 3 4 6 8 12 for the codes 0..7
    index = doubled - (doubled - 4.0).clamp_(min=0.0).mul_(0.5)
    index.sub_(doubled.sub_(8.0).clamp_(min=0.0).mul_(0.25))
    return index.to(torch.uint8).add_(value.signbit(), alpha=8)


def e2m1_value(nibble: Tensor) -> Tensor:
    """Codes of e2m1 in uint8 -> float32 values."""
    index = nibble & 7
    doubled = index + (index.clamp(min=4) - 4) + (index.clamp(min=6) - 6) * 2  # 0 1 2 3 4 6 8 12 for the codes 0..7
    return doubled.float().mul_(0.5 - (nibble >> 3).float())


def power_of_two_multiple(amax: Tensor, factor: float) -> Tensor:
    """Magnitudes (float32, >= 0) -> the smallest `factor` times a power of two that is not below; 0 and what overflows stay."""
    mantissa, exponent = math.frexp(factor)  # mantissa in [0.5, 1)
    above = MANTISSA_MASK - int((2 * mantissa - 1) * (1 << MANTISSA_BITS))  # carries into the exponent what is larger than `factor`'s
    power = ((amax.view(torch.int32) + above) >> MANTISSA_BITS) - (exponent - 1)
    multiple = e8m0_value(power.clamp(0, MAX_EXPONENT)) * factor
    return torch.where((amax > 0) & multiple.isfinite() & (power > 0) & (multiple >= amax), multiple, amax)


def floor_power_of_two(value: Tensor) -> Tensor:
    """Positive normal float32 numbers -> the largest power of two that is not above."""
    return (value.view(torch.int32) & EXPONENT_MASK).view(torch.float32)


def e8m0_exponent(amax: Tensor, max_exponent: int) -> Tensor:
    """Largest magnitudes (float32, >= 0) -> biased exponents of their e8m0 scales in int32, 0..254.

    `max_exponent` is the exponent of the largest code: 2 for e2m1, 8 for e4m3. A significand of 1.75 or more counts as the next
    power of two, so that amax / scale is in [3.5, 7) for e2m1 and [224, 448) for e4m3. Zero and subnormals give 0.
    Rule of compressed-tensors; OCP MX 1.0 section 6.3 leaves it to the implementation.
    """
    exponent = (amax.view(torch.int32) + QUARTER_BINADE) >> MANTISSA_BITS
    return (exponent - max_exponent).clamp(min=0)


def e8m0_value(exponent: Tensor) -> Tensor:
    """Biased exponents in int32 -> float32 powers of two; 0 stands for 2**-127, a subnormal."""
    return (exponent << MANTISSA_BITS).add_(exponent == 0, alpha=1 << (MANTISSA_BITS - 1)).view(torch.float32)


def power_2_4(value: Tensor) -> Tensor:
    """value ** 2.4 for float32 values in [0, 2**24], to a relative 2e-6; values below 1e-9 count as 0.

    torch.pow is not used: its last bit depends on the device and on where a vector ends. With t = value**2 and y = t**(-1/5),
    the result is (t * y**2)**2; y comes from a guess in the exponent and two steps of Newton's method of the third order.
    """
    t = value * value
    guess = t.clamp(min=1e-18).view(torch.int32).float().mul_(-0.2).add_(1.2780597e9)
    y = guess.to(torch.int32).view(torch.float32)
    for _ in range(2):
        y2 = y * y
        u = (y2 * y2).mul_(y).mul_(t)  # t y^5, near 1
        y.mul_((u * 0.12).add_(-0.44).mul_(u).add_(1.32))  # u**(-1/5) to the second order in 1 - u
    root = y.mul_(y).mul_(t)
    return root.mul_(root)


def tree_sum(value: Tensor) -> Tensor:
    """The sum over the last dimension, always in the same order: the two halves are added until one element is left.

    torch.sum orders its additions by device, shape and number of threads.
    """
    while value.shape[-1] > 1:
        half = value.shape[-1] // 2
        total = value[..., :half] + value[..., half : 2 * half]
        if value.shape[-1] % 2:
            total = torch.cat([total, value[..., 2 * half :]], dim=-1)
        value = total
    return value[..., 0]
