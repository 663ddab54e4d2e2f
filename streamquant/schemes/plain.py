"""Weights as plain numbers, not quantized: what a quantized source is unpacked to.

    weight  BF16 or F16 [N, K]

Legend: scheme.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamquant.lazy import torch
from streamquant.schemes.scheme import Scales, Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plain(Scheme):
    """The values of a weight, rounded to `dtype`. A code is a value, and every scale is 1."""

    dtype_name: str  # in torch and in configs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is stored."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def format(self) -> str:
        return "dense"

    @property
    def weights_config(self) -> dict[str, Any]:
        return {}

    def unit(self, num_columns: int) -> tuple[int, int]:
        return 1, num_columns

    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        del dtype, shared
        one_RC = torch.ones_like(bounds_BRC[0])
        return Scales(one_RC, one_RC)

    def round(self, quotient: Tensor) -> Tensor:
        return quotient.to(self.dtype)

    def encode(self, weight_NK: Tensor, bounds_BRC: Tensor | None = None, *, shared: Tensor | None = None) -> dict[str, Tensor]:
        """The weight in `dtype`."""
        del bounds_BRC, shared
        return {"weight": weight_NK.to(self.dtype)}

    def pack(self, code_NK: Tensor, scales: Scales) -> dict[str, Tensor]:
        del scales
        return {"weight": code_NK}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        del num_columns
        one_RC = torch.ones((len(stored["weight"]), 1), device=stored["weight"].device)
        return stored["weight"].float(), Scales(one_RC, one_RC)
