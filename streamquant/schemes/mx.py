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
from streamquant.schemes.codes import Codes, E2m1, E4m3
from streamquant.schemes.rounding import e8m0_exponent, e8m0_value
from streamquant.schemes.scheme import Scheme
from streamquant.schemes.units import Scales

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

    @property
    def scales_are_powers_of_two(self) -> bool:
        return True

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

    @property
    def codes(self) -> Codes:
        return E2m1()

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight_packed": packed, "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        scale_RC = e8m0_value(stored["weight_scale"].to(torch.int32))
        return self.codes.unpack(stored["weight_packed"], num_columns), Scales(stored["weight_scale"], scale_RC)


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

    @property
    def codes(self) -> Codes:
        return E4m3()

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": packed, "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        scale_RC = e8m0_value(stored["weight_scale"].to(torch.int32))
        return self.codes.unpack(stored["weight"], num_columns), Scales(stored["weight_scale"], scale_RC)
