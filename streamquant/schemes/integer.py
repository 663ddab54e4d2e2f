"""Integer weights.

`int-quantized`, one byte a code, for kernels that multiply integers:
    weight        I8 [N, K]
    weight_scale  the weight's dtype or F32 [N, 1]; the weight's dtype [N, K/group]

`pack-quantized`, 2 to 8 bits a code (bit layout: packing.py):
    weight_packed      I32 [N, ceil(K*bits/32)]
    weight_scale       the weight's dtype [N, K/group], or [N, 1] per channel
    weight_shape       I64 [2] = (N, K)
    weight_zero_point  I32 [ceil(N*bits/32), K/group]; asymmetric only

Symmetric: weight ~ code * scale, scale = amax / ((qmax - qmin) / 2). Asymmetric: weight ~ (code - zero) * scale.
Source: compressed-tensors, `quantization/utils/helpers.py` (`calculate_qparams`).
Legend: scheme.py.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from streamquant.errors import RequestError
from streamquant.lazy import np, torch
from streamquant.schemes.codes import ByteIntegers, PackedIntegers
from streamquant.schemes.packing import WORD_BITS, pack_int32, unpack_int32
from streamquant.schemes.rounding import divide
from streamquant.schemes.scheme import Scheme, require_scale_dtype, round_scale
from streamquant.schemes.units import Scales

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Integer(Scheme):
    num_bits: int
    strategy: str = "group"  # "group" | "channel"
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.num_bits not in range(2, 9):
            raise RequestError(f"{self.preset} has codes of {self.num_bits} bits; 2 to 8 are stored")
        if self.strategy not in {"group", "channel"}:
            raise RequestError(f"{self.preset} has strategy channel or group, not {self.strategy}")
        if self.group_size < 1:
            raise RequestError(f"group size {self.group_size} is less than 1; for one scale a row use strategy channel")

    @property
    def weights_config(self) -> dict[str, Any]:
        group = {"group_size": self.group_size} if self.strategy == "group" else {}
        return {"num_bits": self.num_bits, "type": "int", "strategy": self.strategy, **group, "symmetric": self.symmetric, "dynamic": False}

    @property
    @abstractmethod
    def codes(self) -> ByteIntegers | PackedIntegers: ...

    def unit(self, num_columns: int) -> tuple[int, int]:
        return 1, self.group_size if self.strategy == "group" else num_columns

    def problem(self, shape: tuple[int, int], *, fused: bool, last: bool) -> str | None:
        del fused, last
        num_columns = shape[1]
        if self.strategy == "channel" or num_columns % self.group_size == 0:
            return None
        problem = f"has {num_columns} columns; {self.preset} needs a multiple of its group size {self.group_size}"
        fitting = num_columns & -num_columns  # the largest power of two that divides it
        return f"{problem} ({fitting} would fit)" if "group_size" in self.settings else problem

    def _symmetric_scale(self, bounds_BRC: Tensor, dtype: torch.dtype) -> Tensor:
        return round_scale(divide(bounds_BRC[0], (self.codes.largest - self.codes.smallest) / 2), dtype)


@dataclass(frozen=True, kw_only=True)
class ByteInt(_Integer):
    """Integers of up to 8 bits, a byte each."""

    scale_dtype: str = "weight"  # "weight" | "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_scale_dtype(self.scale_dtype)
        if not self.symmetric:
            raise RequestError(f"{self.preset} has no zero points")

    @property
    def format(self) -> str:
        return "int-quantized"

    @property
    def settings(self) -> frozenset[str]:
        return frozenset({"scale_dtype"})

    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        del shared
        stored_RC = self._symmetric_scale(bounds_BRC, torch.float32 if self.scale_dtype == "float32" else dtype)
        return Scales(stored_RC, stored_RC.float())

    @property
    def codes(self) -> ByteIntegers:
        return ByteIntegers(self.num_bits)

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": packed, "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        scale_RC = stored["weight_scale"]
        return self.codes.unpack(stored["weight"], num_columns), Scales(scale_RC, scale_RC.float())


@dataclass(frozen=True, kw_only=True)
class PackedInt(_Integer):
    """2 to 8-bit integers in int32 words, one scale for a group of columns of a row, or for a row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.symmetric and self.activations is not None:
            raise RequestError(f"{self.preset} has no zero points: no engine reads them beside quantized activations")

    @property
    def format(self) -> str:
        return "pack-quantized"

    @property
    def settings(self) -> frozenset[str]:
        if self.activations is None:
            return frozenset({"strategy", "group_size", "symmetric"})
        # vLLM's kernels for FP8 activations take groups of 128 and nothing else.
        return frozenset({"strategy", "group_size"} if self.activations.type == "int" else ())

    @property
    def row_multiple(self) -> int:
        return 1 if self.symmetric else WORD_BITS // math.gcd(WORD_BITS, self.num_bits)

    def for_expert(self) -> Scheme:
        """With integer activations vLLM reads experts, and only experts, as bytes."""
        if self.activations is None or self.activations.type != "int":
            return self
        return ByteInt(**{field.name: getattr(self, field.name) for field in fields(self)})

    def line(self, suffix: str, row: int) -> int:
        return -(-row * self.num_bits // WORD_BITS) if suffix == "weight_zero_point" else row

    def once(self, shape: tuple[int, int], dtype: torch.dtype, shared: Tensor | None) -> dict[str, Tensor]:
        del dtype, shared
        return {"weight_shape": torch.from_numpy(np.array(shape, dtype=np.int64))}

    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        del shared
        if self.symmetric:
            stored_RC = self._symmetric_scale(bounds_BRC, dtype)
            return Scales(stored_RC, stored_RC.float())
        smallest, largest = self.codes.smallest, self.codes.largest
        low_RC, high_RC = bounds_BRC
        width_RC = (high_RC - low_RC).to(dtype).float()
        # A width that overflows the dtype stays in float32: the scale, a fraction of it, does fit.
        most = torch.finfo(torch.float32).max
        width_RC = torch.where(width_RC.isinf(), (high_RC - low_RC).clamp(max=most), width_RC)
        raw_RC = divide(width_RC, largest - smallest).to(dtype)
        zero_RC = (smallest - (low_RC / raw_RC.float()).to(dtype).float()).to(dtype).float()
        zero_RC = zero_RC.clamp(smallest, largest).nan_to_num(nan=0.0).round()  # 0 / 0 in a unit of zeros
        stored_RC = round_scale(raw_RC.float(), dtype)
        return Scales(stored_RC, stored_RC.float(), zero_RC)

    @property
    def codes(self) -> PackedIntegers:
        return PackedIntegers(self.num_bits)

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        stored = {"weight_packed": packed, "weight_scale": scales.stored_RC}
        if scales.zero_RC is not None:
            stored["weight_zero_point"] = pack_int32(scales.zero_RC.T.to(torch.int8), self.num_bits).T
        return stored

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        code_NK = self.codes.unpack(stored["weight_packed"], num_columns)
        zero_RC = None
        if not self.symmetric:
            zero_RC = unpack_int32(stored["weight_zero_point"].T.contiguous(), self.num_bits, code_NK.shape[0]).T.float()
        return code_NK, Scales(stored["weight_scale"], stored["weight_scale"].float(), zero_RC)

    def problem(self, shape: tuple[int, int], *, fused: bool, last: bool) -> str | None:
        if fused and not self.symmetric and shape[0] % self.row_multiple:
            return f"has {shape[0]} rows and fused partners; packed zero points need a multiple of {self.row_multiple} there"
        return super().problem(shape, fused=fused, last=last)
