"""Microscaling formats: groups of 32 with a power of two as scale, stored as its biased exponent (e8m0) in a byte.

`mxfp4-pack-quantized`:  weight_packed U8 [N, K/2], weight_scale U8 [N, K/32]
`mxfp8-quantized`:       weight F8_E4M3 [N, K],     weight_scale U8 [N, K/32]

weight ~ code * 2**(weight_scale - 127). Readers take the scale as U8, not as F8_E8M0.
Source: OCP Microscaling Formats 1.0; the choice of the exponent: rounding.e8m0_exponent.
Legend: scheme.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamquant.lazy import torch
from streamquant.schemes.packing import pack_nibbles, unpack_nibbles
from streamquant.schemes.rounding import (
    e2m1_nibble,
    e2m1_value,
    e8m0_exponent,
    e8m0_value,
    round_to_e2m1,
    round_to_e4m3,
)
from streamquant.schemes.scheme import Scales, Scheme

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
EXPONENT_BIAS = 127


@dataclass(frozen=True, kw_only=True)
class _Mx(Scheme):
    @property
    @abstractmethod
    def max_exponent(self) -> int:
        """The exponent of the largest code."""

    def unit(self, num_columns: int) -> tuple[int, int]:
        del num_columns
        return 1, GROUP

    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        del shared
        amax_RC = bounds_BRC[0]
        if dtype != torch.float16:
            exponent_RC = e8m0_exponent(amax_RC, self.max_exponent)
        else:  # 2**-127 is no float16: the scale of what stays below its normal numbers is 1 there, as in the peer
            tiny = torch.finfo(dtype).tiny
            exponent_RC = e8m0_exponent(amax_RC.clamp(min=tiny), self.max_exponent)
            exponent_RC = torch.where(amax_RC >= 0.75 * tiny, exponent_RC, EXPONENT_BIAS)
        return Scales(exponent_RC.to(torch.uint8), e8m0_value(exponent_RC))

    def problem(self, shape: tuple[int, int], *, fused: bool, last: bool) -> str | None:
        del fused, last
        return f"has {shape[1]} columns; {self.preset} needs a multiple of {GROUP}" if shape[1] % GROUP else None


@dataclass(frozen=True, kw_only=True)
class MxFp4(_Mx):
    """MXFP4 weights."""

    @property
    def format(self) -> str:
        return "mxfp4-pack-quantized"

    @property
    def weights_config(self) -> dict[str, Any]:
        return {"num_bits": 4, "type": "float", "strategy": "group", "group_size": GROUP, "symmetric": True, "dynamic": False}

    @property
    def max_exponent(self) -> int:
        return 2

    def round(self, quotient: Tensor) -> Tensor:
        return round_to_e2m1(quotient)

    def pack(self, code_NK: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight_packed": pack_nibbles(e2m1_nibble(code_NK)), "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        del num_columns
        scale_RC = e8m0_value(stored["weight_scale"].to(torch.int32))
        return e2m1_value(unpack_nibbles(stored["weight_packed"])), Scales(stored["weight_scale"], scale_RC)


@dataclass(frozen=True, kw_only=True)
class MxFp8(_Mx):
    """MXFP8 weights (e4m3)."""

    @property
    def format(self) -> str:
        return "mxfp8-quantized"

    @property
    def weights_config(self) -> dict[str, Any]:
        return {
            "num_bits": 8, "type": "float", "strategy": "group", "group_size": GROUP, "symmetric": True, "dynamic": False,
            "scale_dtype": "torch.uint8",  # by which vLLM tells MXFP8 from FP8 in groups
        }  # fmt: skip

    @property
    def max_exponent(self) -> int:
        return 8

    def round(self, quotient: Tensor) -> Tensor:
        return round_to_e4m3(quotient)

    def code_value(self, code: Tensor) -> Tensor:
        return code.float()

    def pack(self, code_NK: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": code_NK, "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        del num_columns
        return stored["weight"].float(), Scales(stored["weight_scale"], e8m0_value(stored["weight_scale"].to(torch.int32)))
