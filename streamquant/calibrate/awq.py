"""AWQ: channels of an input that matter are made larger in the weights, so that rounding hurts them less, and smaller in what gives them.

Lin et al., arXiv 2306.00978. With s the scale of the channels of an input X, the weight becomes W * s and X / s comes from the norm, or
the linear, before. s is searched on a grid for the least error of the outputs over all tokens,

    sum over rows of dw H dw^T,  dw = Q(W * s) / s - W,  H = X^T X

which is that of the outputs X W^T themselves, without running them. SmoothQuant (Xiao et al., arXiv 2211.10438) takes one s, from the
largest magnitudes, so that activations that are quantized too have no outliers.

Where engines round X / s to steps of one size d for all in a group of columns, that adds to the error what noise of d^2 / 12 gives, or
of the inputs themselves where they are smaller and become zeros,

    sum over columns of min(T d^2 / 12, sum over tokens of (X / s)^2) * sum over rows of (W * s)^2,

with d the largest of |X / s| in the group, divided by the largest code. With scales for each token d is smaller, before and after. Codes
in floating point of 8 bits have an error relative to each number, which no s changes.
Legend: N out_features, K in_features, T tokens, G groups, k columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from streamquant.calibrate.gptq import hessian_error
from streamquant.calibrate.statistics import Statistics
from streamquant.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

GRID = 20
TINY = 1e-4
Round = Callable[["Tensor"], "Tensor"]  # a weight to the nearest that its scheme can store


class Steps(NamedTuple):
    """How engines round an input, if that is to steps of one size for a group of columns."""

    largest_code: float
    group_size: int


class Reader(NamedTuple):
    """A weight that reads the input."""

    weight_NK: Tensor  # float32; some of its rows
    statistics: Statistics  # of what it is given: of an expert only some tokens
    round: Round
    steps: Steps | None = None
    stride: int = 1  # for how many rows each of them stands


class Scaling(NamedTuple):
    """The scale of an input's channels, and what it does to the error of the outputs."""

    scale_K: Tensor  # of the weights; what gives the input is divided by it
    error_before: float
    error_after: float

    @property
    def helps(self) -> bool:
        """Whether it is worth anything."""
        return self.error_after < self.error_before


def search_scale(readers: Sequence[Reader], statistics: Statistics, *, group_size: int, powers_of_two: bool = False) -> Scaling:
    """The best scale of the grid s = mean|x|**r / mean|w|**(1 - r) and s = mean|x|**r, r in steps of 1 / GRID.

    |w| is relative to the largest in its group of `group_size` columns, the mean over the rows of all readers. With `powers_of_two`
    scales are such, so that what reads the input and is not rounded stays exact.
    """
    mean_K = statistics.mean_K
    weight_K = _relative_magnitude(readers, group_size)
    best = Scaling(torch.ones_like(mean_K), *[_error(readers, torch.ones_like(mean_K))] * 2)
    for step in range(GRID):
        ratio = step / GRID
        for scale_K in (mean_K**ratio / (weight_K ** (1 - ratio) + TINY), mean_K**ratio):
            centred_K = _centred(scale_K, powers_of_two=powers_of_two)
            error = _error(readers, centred_K)
            if error < best.error_after:
                best = best._replace(scale_K=centred_K, error_after=error)
    return best


def smooth_scale(readers: Sequence[Reader], statistics: Statistics, *, strength: float, powers_of_two: bool = False) -> Scaling:
    """SmoothQuant's s = max|x|**strength / max|w|**(1 - strength), centred around 1."""
    weight_K = torch.stack([reader.weight_NK.abs().amax(0) for reader in readers]).amax(0)
    scale_K = statistics.amax_K.clamp(min=TINY) ** strength / weight_K.clamp(min=TINY) ** (1 - strength)
    scale_K = _centred(scale_K, powers_of_two=powers_of_two)
    before, after = (_error(readers, each_K) for each_K in (torch.ones_like(scale_K), scale_K))
    return Scaling(scale_K, before, after)


def _relative_magnitude(readers: Sequence[Reader], group_size: int) -> Tensor:
    total_K, num_rows = torch.zeros_like(readers[0].weight_NK[0]), 0
    for reader in readers:
        weight_NK = reader.weight_NK
        group_NGk = weight_NK.abs().view(len(weight_NK), -1, group_size)
        relative_NGk = group_NGk / group_NGk.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total_K += relative_NGk.flatten(1).sum(0) * reader.stride
        num_rows += len(weight_NK) * reader.stride
    return total_K / num_rows


def _centred(scale_K: Tensor, *, powers_of_two: bool) -> Tensor:
    scale_K = scale_K.clamp(min=TINY)
    scale_K = scale_K / (scale_K.amax() * scale_K.amin()).sqrt()
    return scale_K.log2().round().exp2() if powers_of_two else scale_K


def _error(readers: Sequence[Reader], scale_K: Tensor) -> float:
    total = 0.0
    for reader in readers:
        scaled_NK = reader.weight_NK * scale_K
        error = float(hessian_error(reader.round(scaled_NK) / scale_K - reader.weight_NK, reader.statistics.hessian_KK).sum())
        if reader.steps is not None:
            error += _input_error(scaled_NK, reader.statistics, scale_K, reader.steps)
        total += error * reader.stride
    return total


def _input_error(scaled_NK: Tensor, statistics: Statistics, scale_K: Tensor, steps: Steps) -> float:
    """What rounding the inputs, divided by a scale, adds for a weight that is multiplied with it."""
    largest_G = (statistics.amax_K / scale_K).view(-1, steps.group_size).amax(1)
    noise_K = (largest_G / steps.largest_code).square_().mul_(statistics.num_tokens / 12).repeat_interleave(steps.group_size)
    inputs_K = statistics.hessian_KK.diagonal() / scale_K.square()
    return float((torch.minimum(noise_K, inputs_K) * scaled_NK.square().sum(0)).sum(dtype=torch.float64))
