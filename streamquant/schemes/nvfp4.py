"""NVFP4: e2m1 weights in groups of 16, an FP8 scale for each group, one float32 scale over all.

`nvfp4-pack-quantized`:
    weight_packed        U8 [N, K/2], the even column in the low nibble
    weight_scale         F8_E4M3 [N, K/16]
    weight_global_scale  F32 [1]; an inverse scale: it divides the group scale
    input_global_scale   F32 [1], if inputs are quantized too; the same of these

weight ~ code * weight_scale / weight_global_scale. Engines keep one global scale for weights that they fuse, so fused weights
share the largest magnitude from which it follows.
Source: compressed-tensors, `quantization/utils/helpers.py` (`generate_gparam`, `calculate_qparams`).
Legend: scheme.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streamquant.lazy import torch
from streamquant.schemes.codes import Codes, E2m1
from streamquant.schemes.mx import MxFp4
from streamquant.schemes.rounding import FP4_MAX, FP8_MAX, divide, floor_power_of_two, positive_e4m3_value, round_to_e4m3
from streamquant.schemes.scheme import Scheme, round_scale
from streamquant.schemes.units import Scales

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
CODE_OF_SMALLEST_SCALE = 0x20  # 0.125, of a group of zeros: the epsilon of float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class NvFp4(Scheme):
    """NVFP4 weights."""

    @property
    def format(self) -> str:
        return "nvfp4-pack-quantized"

    @property
    def weights_config(self) -> dict[str, Any]:
        return {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": GROUP, "symmetric": True, "dynamic": False}

    @property
    def shares_amax(self) -> bool:
        return True

    @property
    def largest_code(self) -> float:
        return FP4_MAX

    def exact_for(self, source: Scheme | None) -> Scheme:
        """The codes are those of MXFP4, and its scales fit if the exponents under one global scale differ by no more than 17."""
        exact = isinstance(source, MxFp4) and self.observer == "minmax"
        return replace(self, observer="power_of_two") if exact else self

    def unit(self, num_columns: int) -> tuple[int, int]:
        del num_columns
        return 1, GROUP

    def share(self, amax: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse global scale 2688 / amax (2688 = 448 * 6), rounded twice to `dtype` as the peer does; 1 if it overflows.

        With scales that are powers of two it is one as well, the next below.
        """
        inv_scale = _inverse_global_scale(amax, dtype)
        if self.observer == "power_of_two":
            inv_scale = floor_power_of_two(inv_scale)
        return inv_scale

    def once(self, shape: tuple[int, int], dtype: torch.dtype, shared: Tensor | None) -> dict[str, Tensor]:
        del shape, dtype
        assert shared is not None
        return {"weight_global_scale": shared}

    def input_scales(self, amax: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"input_global_scale": _inverse_global_scale(amax, dtype)} if self.needs_data else {}

    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        assert shared is not None
        group_scale_RC = divide(bounds_BRC[0], FP4_MAX).to(_working_dtype(dtype)).float()
        code_RC = round_to_e4m3(group_scale_RC * shared).view(torch.uint8)
        code_RC.add_(code_RC == 0, alpha=CODE_OF_SMALLEST_SCALE)
        return Scales(code_RC.view(torch.float8_e4m3fn), positive_e4m3_value(code_RC) / shared)

    def search_scales(self, bounds_BRC: Tensor, dtype: torch.dtype) -> Scales:
        scale_RC = round_scale(divide(bounds_BRC[0], FP4_MAX), _working_dtype(dtype)).float()
        return Scales(scale_RC, scale_RC)

    @property
    def codes(self) -> Codes:
        return E2m1()

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight_packed": packed, "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        scale_RC = stored["weight_scale"].float() / stored["weight_global_scale"]
        return self.codes.unpack(stored["weight_packed"], num_columns), Scales(stored["weight_scale"], scale_RC)

    def problem(self, shape: tuple[int, int], *, fused: bool, last: bool) -> str | None:
        del fused, last
        return f"has {shape[1]} columns; {self.preset} needs a multiple of {GROUP}" if shape[1] % GROUP else None


def _inverse_global_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    dtype = _working_dtype(dtype)
    reciprocal = (1.0 / amax.clamp(min=torch.finfo(dtype).tiny)).to(dtype).float()
    inv_scale = (reciprocal * (FP8_MAX * FP4_MAX)).to(dtype).float()
    return torch.where(inv_scale.isfinite(), inv_scale, 1.0)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scales are computed. 2688 / amax overflows float16, which destroys weights in the peer."""
    return torch.float32 if dtype == torch.float16 else dtype
