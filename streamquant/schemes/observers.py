"""Observers: the bounds of each unit from which its scale follows.

`minmax` takes the extremes. `power_of_two` widens them until the scale is a power of two, which changes no value of a weight that
was stored in MXFP4 and suits kernels that take e8m0 scales. The others try
shrunken (or expanded) extremes and keep those with the least sum of
|dequantized - weight| ** 2.4 over the unit. Grid, norm and defaults are llm-compressor's (`observers/mse.py`); two things differ
on purpose: no early stop, which would make a unit's result depend on its neighbours, and the unchanged extremes are always among
the candidates, so that a search is never worse than minmax under its own norm.

Legend: R rows of units, C units in a row, a rows and b columns of a unit, B bounds (see scheme.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamquant.lazy import torch
from streamquant.schemes.rounding import power_2_4, power_of_two_multiple, tree_sum

if TYPE_CHECKING:
    from torch import Tensor

    from streamquant.schemes.scheme import Scheme


class SearchGrid(NamedTuple):
    """Candidates are the extremes times expand * (1 - i / steps), for i in range(int(shrink * steps))."""

    shrink: float
    steps: float
    expand: float = 1.0


OBSERVERS: dict[str, SearchGrid | None] = {
    "minmax": None,
    "power_of_two": None,
    "mse": SearchGrid(shrink=0.20, steps=100.0),
    "nvfp4_expanded_mse": SearchGrid(shrink=1 - 0.8 / 1.8, steps=200.0, expand=1.8),
}


def observe_units(scheme: Scheme, weight_RaCb: Tensor) -> Tensor:
    """Bounds of each unit, float32 [B, R, C], by the scheme's observer. Not finite where a weight is not."""
    extremes_BRC = _extremes(weight_RaCb, symmetric=scheme.symmetric)
    if scheme.observer == "power_of_two":
        return power_of_two_multiple(extremes_BRC, scheme.largest_code)
    grid = OBSERVERS[scheme.observer]
    return extremes_BRC if grid is None else _search(scheme, weight_RaCb, extremes_BRC, grid)


def _extremes(weight_RaCb: Tensor, *, symmetric: bool) -> Tensor:
    if symmetric:
        return weight_RaCb.abs().amax(3).amax(1).float()[None]
    low_RC = weight_RaCb.amin(3).amin(1).float().clamp_(max=0.0)
    high_RC = weight_RaCb.amax(3).amax(1).float().clamp_(min=0.0)
    return torch.stack([low_RC, high_RC])


def _search(scheme: Scheme, weight_RaCb: Tensor, extremes_BRC: Tensor, grid: SearchGrid) -> Tensor:
    dtype = weight_RaCb.dtype
    weight_RaCb = weight_RaCb.float()
    best_BRC = extremes_BRC
    unit_scale_RC = scheme.search_scales(extremes_BRC, dtype).scale_RC
    best_error_RC = _error(scheme, weight_RaCb, extremes_BRC, dtype, unit_scale_RC)
    widest_BRC = (extremes_BRC * grid.expand).to(dtype).float()
    for i in range(int(grid.shrink * grid.steps)):
        # Candidates are numbers of the weight's dtype, as the peer's are.
        candidate_BRC = (widest_BRC * (1 - i / grid.steps)).to(dtype).float()
        error_RC = _error(scheme, weight_RaCb, candidate_BRC, dtype, unit_scale_RC)
        better_RC = error_RC < best_error_RC  # false where the error is NaN
        best_BRC = torch.where(better_RC, candidate_BRC, best_BRC)
        best_error_RC = torch.where(better_RC, error_RC, best_error_RC)
    return best_BRC


def _error(scheme: Scheme, weight_RaCb: Tensor, bounds_BRC: Tensor, dtype: torch.dtype, unit_scale_RC: Tensor) -> Tensor:
    """The sum of |dequantized - weight| ** 2.4 of each unit, in units of `unit_scale_RC` so that nothing underflows."""
    scales = scheme.search_scales(bounds_BRC, dtype)
    quotient_RaCb = scheme.quotient(weight_RaCb, scales)
    distance_RaCb = scheme.code_value(scheme.round(quotient_RaCb.clone())).sub_(quotient_RaCb)
    sum_RC = tree_sum(tree_sum(power_2_4(distance_RaCb)).transpose(1, 2))
    return sum_RC * power_2_4(scales.scale_RC / unit_scale_RC)
