"""Codes: the numbers that quotients are rounded to, and how they are packed into bytes.

Legend: scheme.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.lazy import torch
from streamquant.schemes.packing import pack_int32, pack_nibbles, unpack_int32, unpack_nibbles
from streamquant.schemes.rounding import e2m1_nibble, e2m1_value, round_to_e2m1, round_to_e4m3

if TYPE_CHECKING:
    from torch import Tensor


class Codes(ABC):
    """A number format for the elements of a weight."""

    @abstractmethod
    def round(self, quotient: Tensor) -> Tensor:
        """The nearest code of each float32 number, saturating. May overwrite its argument. The dtype is the format's choice."""

    def value(self, code: Tensor) -> Tensor:
        """Codes as `round` gives them -> float32 values."""
        return code

    def of_value(self, value: Tensor) -> Tensor:
        """What `value` gives -> codes as `round` gives them. May overwrite its argument."""
        return self.round(value)

    @abstractmethod
    def pack(self, code_NK: Tensor) -> Tensor:
        """Codes as `round` gives them -> what is stored."""

    @abstractmethod
    def unpack(self, stored: Tensor, num_columns: int) -> Tensor:
        """What is stored -> float32 values [N, K]."""


class _Unpacked(Codes):
    """Numbers of a dtype of torch, [N, K]."""

    def value(self, code: Tensor) -> Tensor:
        return code.float()

    def pack(self, code_NK: Tensor) -> Tensor:
        return code_NK

    def unpack(self, stored: Tensor, num_columns: int) -> Tensor:
        del num_columns
        return stored.float()


@dataclass(frozen=True, slots=True)
class E4m3(_Unpacked):
    """FP8 (e4m3fn), F8_E4M3 [N, K]."""

    def round(self, quotient: Tensor) -> Tensor:
        return round_to_e4m3(quotient)


@dataclass(frozen=True, slots=True)
class E2m1(Codes):
    """FP4 (e2m1), two codes a byte, U8 [N, K/2]."""

    def round(self, quotient: Tensor) -> Tensor:
        return round_to_e2m1(quotient)

    def of_value(self, value: Tensor) -> Tensor:
        return value  # with the sign of a zero, which rounding takes

    def pack(self, code_NK: Tensor) -> Tensor:
        return pack_nibbles(e2m1_nibble(code_NK))

    def unpack(self, stored: Tensor, num_columns: int) -> Tensor:
        del num_columns
        return e2m1_value(unpack_nibbles(stored))


@dataclass(frozen=True, slots=True)
class _Integers(Codes):
    num_bits: int

    @property
    def smallest(self) -> float:
        """The smallest code."""
        return -float(1 << (self.num_bits - 1))

    @property
    def largest(self) -> float:
        """The largest code."""
        return float((1 << (self.num_bits - 1)) - 1)

    def round(self, quotient: Tensor) -> Tensor:
        return quotient.round_().clamp_(self.smallest, self.largest)


class ByteIntegers(_Integers):
    """Integers of up to 8 bits, a byte each, I8 [N, K]."""

    def pack(self, code_NK: Tensor) -> Tensor:
        return code_NK.to(torch.int8)

    def unpack(self, stored: Tensor, num_columns: int) -> Tensor:
        del num_columns
        return stored.float()


class PackedIntegers(_Integers):
    """Integers of 2 to 8 bits in words, I32 [N, ceil(K * bits / 32)]."""

    def pack(self, code_NK: Tensor) -> Tensor:
        return pack_int32(code_NK.to(torch.int8), self.num_bits)

    def unpack(self, stored: Tensor, num_columns: int) -> Tensor:
        return unpack_int32(stored, self.num_bits, num_columns).float()


@dataclass(frozen=True, slots=True)
class Numbers(_Unpacked):
    """Numbers of a torch dtype, as they are."""

    dtype: torch.dtype

    def round(self, quotient: Tensor) -> Tensor:
        return quotient.to(self.dtype)
