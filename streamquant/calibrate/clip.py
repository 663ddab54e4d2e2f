"""Clipping: bounds of groups made smaller where that makes the outputs better, as AWQ's second step does.

Lin et al., arXiv 2306.00978; the grid is that of their program: up to a half, in steps of 1/20. For each row and each group of columns the
factor is taken that has the least error of what this group adds to the outputs, over all tokens,

    d H_gg d^T,  d = Q(w_g) - w_g,  H_gg = X_g^T X_g

which is had from the blocks on the diagonal of the Hessian, without running anything.
Legend: N out_features, K in_features, G groups, k columns of a group; B bounds, R rows and C columns of units (schemes/scheme.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamquant.lazy import torch
from streamquant.schemes import Scheme
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.units import dequantize

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = tuple(1 - step / 20 for step in range(1, 10))
ELEMENTS_AT_ONCE = 1 << 20


def may_clip(scheme: Scheme, num_columns: int) -> bool:
    """Whether a scheme's scales are those of groups of columns, and not tied to powers of two by its observer."""
    num_rows, group_size = scheme.unit(num_columns)
    return num_rows == 1 and group_size < num_columns and scheme.observer != "power_of_two"


def clip_bounds(
    weight_NK: Tensor,
    bounds_BRC: Tensor,
    hessian_KK: Tensor,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    shared: Tensor | None = None,
    kernels: Kernels = TORCH,
) -> Tensor:
    """The bounds (float32 [B, R, C], from `Scheme.observe`), each times the best factor, which may be 1.

    `weight_NK`: finite float32 numbers that stand for `dtype`, with inputs of which `hessian_KK` is the sum of x^T x.
    """
    num_rows, num_columns = weight_NK.shape
    unit = scheme.unit(num_columns)
    hessian_Gkk = torch.stack([hessian_KK[start : start + unit[1], start : start + unit[1]] for start in range(0, num_columns, unit[1])])
    rows = max(ELEMENTS_AT_ONCE // num_columns, 1)

    def error_of(part_NK: Tensor, part_BRC: Tensor) -> Tensor:
        scales = scheme.scales(part_BRC, dtype, shared)
        code_NK = scheme.codes.unpack(kernels.codes(scheme.codes, part_NK, unit, scales), num_columns)
        lost_NK = dequantize(code_NK, scales.scale_RC, zero_RC=scales.zero_RC, unit=unit).sub_(part_NK)
        lost_GNk = lost_NK.view(len(part_NK), -1, unit[1]).transpose(0, 1)
        return (lost_GNk @ hessian_Gkk).mul_(lost_GNk).sum(2).T

    best_BRC = bounds_BRC.clone()
    for start in range(0, num_rows, rows):
        part_NK, part_BRC = weight_NK[start : start + rows], bounds_BRC[:, start : start + rows]
        best, least_RC = best_BRC[:, start : start + rows], error_of(part_NK, part_BRC)
        for factor in FACTORS:
            candidate_BRC = part_BRC * factor
            error_RC = error_of(part_NK, candidate_BRC)
            is_less_RC = error_RC < least_RC
            least_RC = torch.where(is_less_RC, error_RC, least_RC)
            best.copy_(torch.where(is_less_RC, candidate_BRC, best))
    return best_BRC
