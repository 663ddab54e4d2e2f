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

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from streamquant.lazy import torch
from streamquant.schemes.kernels import Kernels
from streamquant.schemes.rounding import power_2_4, power_of_two_multiple
from streamquant.schemes.units import Scales

if TYPE_CHECKING:
    from torch import Tensor

    from streamquant.schemes.scheme import Scheme


class SearchGrid(NamedTuple):
    """Candidates are the extremes times expand * (1 - i / steps), for i in range(int(shrink * steps))."""

    shrink: float
    steps: float
    expand: float = 1.0


CANDIDATES_AT_ONCE = 10
OBSERVERS: dict[str, SearchGrid | None] = {
    "minmax": None,
    "power_of_two": None,
    "mse": SearchGrid(shrink=0.20, steps=100.0),
    "nvfp4_expanded_mse": SearchGrid(shrink=1 - 0.8 / 1.8, steps=200.0, expand=1.8),
}


def observe_units(scheme: Scheme, weight_NK: Tensor, unit: tuple[int, int], kernels: Kernels) -> Tensor:
    """Bounds of each unit, float32 [B, R, C], by the scheme's observer. Not finite where a weight is not."""
    extremes_BRC = kernels.extremes(weight_NK, unit, symmetric=scheme.symmetric)
    if scheme.observer == "power_of_two":
        return power_of_two_multiple(extremes_BRC, scheme.largest_code)
    grid = OBSERVERS[scheme.observer]
    return extremes_BRC if grid is None else _search(scheme, weight_NK, unit, extremes_BRC, grid, kernels)


def _search(scheme: Scheme, weight_NK: Tensor, unit: tuple[int, int], extremes_BRC: Tensor, grid: SearchGrid, kernels: Kernels) -> Tensor:
    dtype = weight_NK.dtype
    widest_BRC = (extremes_BRC * grid.expand).to(dtype).float()
    unit_scale_RC = scheme.search_scales(extremes_BRC, dtype).scale_RC
    best_BRC, best_error_RC = extremes_BRC, None
    for bounds_BQRC in _candidates(extremes_BRC, widest_BRC, grid, dtype):
        scales = scheme.search_scales(bounds_BQRC.flatten(1, 2), dtype)  # of all at once: a GPU takes longer to start than to do it
        shape_QRC = bounds_BQRC.shape[1:]
        sum_QRC = kernels.errors(scheme.codes, weight_NK, unit, _split(scales, shape_QRC[0]))
        # In units of one scale, so that nothing underflows.
        error_QRC = sum_QRC * power_2_4(scales.scale_RC.view(shape_QRC) / unit_scale_RC)
        for bounds_BRC, error_RC in zip(bounds_BQRC.unbind(1), error_QRC, strict=True):
            if best_error_RC is None:
                best_error_RC = error_RC
                continue
            better_RC = error_RC < best_error_RC  # false where the error is NaN
            best_BRC = torch.where(better_RC, bounds_BRC, best_BRC)
            best_error_RC = torch.where(better_RC, error_RC, best_error_RC)
    return best_BRC


def _candidates(extremes_BRC: Tensor, widest_BRC: Tensor, grid: SearchGrid, dtype: torch.dtype) -> Iterator[Tensor]:
    """The extremes and those of the grid, some at a time: [B, Q, R, C]. They are numbers of the weight's dtype, as the peer's are."""
    factors = [1 - i / grid.steps for i in range(int(grid.shrink * grid.steps))]
    factor_Q11 = torch.tensor(factors, device=widest_BRC.device)[:, None, None]
    for start in range(0, len(factors), CANDIDATES_AT_ONCE):
        bounds_BQRC = (widest_BRC[:, None] * factor_Q11[start : start + CANDIDATES_AT_ONCE]).to(dtype).float()
        yield bounds_BQRC if start else torch.cat([extremes_BRC[:, None], bounds_BQRC], dim=1)


def _split(scales: Scales, count: int) -> list[Scales]:
    """Scales of `count` candidates that lie one below the other."""
    zeros = [None] * count if scales.zero_RC is None else scales.zero_RC.chunk(count)
    return [Scales(*each) for each in zip(scales.stored_RC.chunk(count), scales.scale_RC.chunk(count), zeros, strict=True)]
