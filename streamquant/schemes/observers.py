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
from streamquant.schemes.kernels import Kernels
from streamquant.schemes.rounding import power_of_two_multiple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from streamquant.schemes.scheme import Scheme


class SearchGrid(NamedTuple):
    """Candidates are the extremes times `expand` times each of the factors."""

    shrink: float
    steps: float
    expand: float = 1.0

    @property
    def factors(self) -> list[float]:
        """1, and downwards in steps."""
        return [1 - i / self.steps for i in range(int(self.shrink * self.steps))]


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
    """The best bounds for each unit. Some rows of units at a time, for which scales take no more memory than the weight."""
    _, num_rows, num_columns = extremes_BRC.shape
    factors = grid.factors
    if scheme.scales_are_powers_of_two:  # `mse` shrinks by less than half, so that a scale halves once at most
        factors = factors[-1:]
    num_candidates = 1 + len(factors)
    at_once = max(weight_NK.numel() // 3 // (num_candidates * num_columns), 1)
    best = []
    for start in range(0, num_rows, at_once):
        rows_BRC = extremes_BRC[:, start : start + at_once]
        bounds_BQRC = candidates(rows_BRC, grid.expand, factors, weight_NK.dtype)
        scales = scheme.search_scales(bounds_BQRC.flatten(1, 2), weight_NK.dtype)
        shape = bounds_BQRC.shape[1:]
        zero_QRC = None if scales.zero_RC is None else scales.zero_RC.view(shape)
        rows_NK = weight_NK[start * unit[0] : (start + at_once) * unit[0]]
        index_RC = kernels.best(scheme.codes, rows_NK, unit, scales.scale_RC.view(shape), zero_QRC, amax_RC=rows_BRC.abs().amax(0))
        index_BQRC = index_RC.expand(len(bounds_BQRC), 1, *index_RC.shape)
        best.append(bounds_BQRC.gather(1, index_BQRC)[:, 0])
    return torch.cat(best, dim=1)


def candidates(extremes_BRC: Tensor, expand: float, factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The extremes, and those of a grid: [B, Q, R, C]. They are numbers of the weight's dtype, as the peer's are."""
    factor_Q11 = torch.tensor(factors, device=extremes_BRC.device)[:, None, None]
    widest_BRC = (extremes_BRC * expand).to(dtype).float()
    return torch.cat([extremes_BRC[:, None], (widest_BRC[:, None] * factor_Q11).to(dtype).float()], dim=1)
