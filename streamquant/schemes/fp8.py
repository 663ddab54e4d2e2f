"""FP8 weights (e4m3fn) with scales of a floating point dtype.

compressed-tensors `float-quantized` (with input activations) and `naive-quantized` (without):
    weight        F8_E4M3 [N, K]
    weight_scale  the weight's dtype or F32: tensor [1], channel [N, 1], block [ceil(N/128), ceil(K/128)]
    input_scale   the same dtype, [1]; if inputs are not measured while a model runs

Native block FP8, as DeepSeek-V3 stores it, which transformers, vLLM and SGLang read without compressed-tensors:
    weight            F8_E4M3 [N, K]
    weight_scale_inv  F32 [ceil(N/128), ceil(K/128)]; a multiplier in spite of its name

weight ~ code * scale, scale = amax / 448.
Legend: scheme.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streamquant.errors import RequestError
from streamquant.lazy import torch
from streamquant.schemes.codes import Codes, E4m3
from streamquant.schemes.mx import MxFp4
from streamquant.schemes.rounding import FP8_MAX, divide
from streamquant.schemes.scheme import Scheme, require_scale_dtype, round_scale
from streamquant.schemes.units import Scales

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Fp8(Scheme):
    """FP8 weights, one scale a tensor, a channel (row) or a block of 128 x 128."""

    strategy: str = "channel"
    scale_dtype: str = "weight"  # "weight" | "float32"

    def __post_init__(self) -> None:
        require_scale_dtype(self.scale_dtype)
        block_activations = self.activations is not None and self.activations.strategy == "group"
        allowed = {"block"} if block_activations else {"tensor", "channel"}
        if self.activations is None:
            allowed = {"tensor", "channel", "block"}
        if self.strategy not in allowed:
            raise RequestError(f"{self.preset} has strategy {' or '.join(sorted(allowed))}, not {self.strategy}")
        if self.strategy == "tensor" and self.observer not in {"minmax", "power_of_two"}:
            raise RequestError(f"observer {self.observer} needs a scale per channel or block; {self.preset} here has one per tensor")

    @property
    def settings(self) -> frozenset[str]:
        return frozenset({"strategy", "scale_dtype"})

    @property
    def format(self) -> str:
        return "naive-quantized" if self.activations is None else "float-quantized"

    @property
    def weights_config(self) -> dict[str, Any]:
        block = {"block_structure": [BLOCK, BLOCK]} if self.strategy == "block" else {}
        return {"num_bits": 8, "type": "float", "strategy": self.strategy, **block, "symmetric": True, "dynamic": False}

    @property
    def shares_amax(self) -> bool:
        return self.strategy == "tensor"

    @property
    def largest_code(self) -> float:
        return FP8_MAX

    def exact_for(self, source: Scheme | None) -> Scheme:
        """Codes of MXFP4 times powers of two are codes of FP8, as long as exponents under one scale differ by no more than 14."""
        exact = isinstance(source, MxFp4) and self.observer == "minmax"
        return replace(self, observer="power_of_two") if exact else self

    @property
    def row_multiple(self) -> int:
        return BLOCK if self.strategy == "block" else 1

    def unit(self, num_columns: int) -> tuple[int, int]:
        return (BLOCK, BLOCK) if self.strategy == "block" else (1, num_columns)

    def line(self, suffix: str, row: int) -> int:
        return -(-row // BLOCK) if self.strategy == "block" and suffix != "weight" else row

    def share(self, amax: Tensor, dtype: torch.dtype) -> Tensor:
        return self._stored_scale(amax, dtype).float()

    def once(self, shape: tuple[int, int], dtype: torch.dtype, shared: Tensor | None) -> dict[str, Tensor]:
        del shape
        return {} if shared is None else {"weight_scale": shared.to(self._dtype(dtype))}

    def input_scales(self, amax: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"input_scale": self._stored_scale(amax, dtype)} if self.needs_data else {}

    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        stored_RC = self._stored_scale(bounds_BRC[0], dtype) if shared is None else shared.view(1, 1)
        return Scales(stored_RC, stored_RC.float())

    @property
    def codes(self) -> Codes:
        return E4m3()

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": packed} if self.shares_amax else {"weight": packed, "weight_scale": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        scale = stored["weight_scale"]
        scale_RC = scale.view(1, 1) if self.shares_amax else scale
        return self.codes.unpack(stored["weight"], num_columns), Scales(scale_RC, scale_RC.float())

    def problem(self, shape: tuple[int, int], *, fused: bool, last: bool) -> str | None:
        if self.strategy != "block":
            return None
        num_rows, num_columns = shape
        if num_columns % BLOCK:
            return f"has {num_columns} columns; {self.preset} needs a multiple of {BLOCK}"
        if fused and not last and num_rows % BLOCK:
            return f"has {num_rows} rows and engines stack a fused partner below it; {self.preset} needs a multiple of {BLOCK} there"
        return None

    def _dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.scale_dtype == "float32" else weight_dtype

    def _stored_scale(self, amax: Tensor, dtype: torch.dtype) -> Tensor:
        return round_scale(divide(amax, FP8_MAX), self._dtype(dtype))


@dataclass(frozen=True, kw_only=True)
class NativeFp8(Fp8):
    """Block FP8 as DeepSeek-V3 stores it: FP8_BLOCK by other names, with float32 scales."""

    strategy: str = "block"
    scale_dtype: str = "float32"

    @property
    def settings(self) -> frozenset[str]:
        return frozenset()

    @property
    def format(self) -> str:
        return "fp8"

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        return {"weight": packed, "weight_scale_inv": scales.stored_RC}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        return super().unpack({"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}, num_columns)

    def _stored_scale(self, amax: Tensor, dtype: torch.dtype) -> Tensor:
        del dtype
        scale = divide(amax, FP8_MAX)
        return torch.where(scale > 0, scale, 1.0)
