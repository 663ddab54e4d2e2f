"""Weights as plain numbers, not quantized: what a quantized source is unpacked to.

    weight  BF16 or F16 [N, K]

Legend: scheme.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streamquant.lazy import torch
from streamquant.schemes.codes import Codes, Numbers
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.scheme import Scheme
from streamquant.schemes.units import Scales

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

    def encode(
        self, weight_NK: Tensor, bounds_BRC: Tensor | None = None, *, shared: Tensor | None = None, kernels: Kernels = TORCH
    ) -> dict[str, Tensor]:
        """The weight in `dtype`."""
        del bounds_BRC, shared, kernels
        return {"weight": weight_NK.to(self.dtype)}

    @property
    def codes(self) -> Codes:
        return Numbers(self.dtype)

    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        del scales
        return {"weight": packed}

    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        one_RC = torch.ones((len(stored["weight"]), 1), device=stored["weight"].device)
        return self.codes.unpack(stored["weight"], num_columns), Scales(one_RC, one_RC)
