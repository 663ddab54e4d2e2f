"""The operations on all elements of a weight, which is where the time goes, and their reference in torch.

Whoever offers them faster, for a processor or a GPU, must give the same bits: `streamquant/kernels`.
Legend: scheme.py; Q candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from streamquant.lazy import torch
from streamquant.schemes.codes import Codes
from streamquant.schemes.rounding import power_2_4, tree_sum
from streamquant.schemes.units import Scales, cut_units, join_units, quotient

if TYPE_CHECKING:
    from torch import Tensor


class Kernels(Protocol):
    """What costs time for every element of a weight. `weight_NK` is bfloat16, float16 or float32; `unit` is (a, b)."""

    @property
    def name(self) -> str:
        """What users call them."""

    @property
    def working_bytes(self) -> int:
        """Memory for each element of a block that is observed and encoded, the block included, at most."""

    @property
    def search_bytes(self) -> int:
        """What an observer that searches takes more for each element."""

    def extremes(self, weight_NK: Tensor, unit: tuple[int, int], *, symmetric: bool) -> Tensor:
        """Of each unit the largest magnitude, or the minimum and the maximum with zero among them: float32 [B, R, C].

        Not finite where a weight is not.
        """

    def codes(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scales: Scales) -> Tensor:
        """weight / scale + zero in float32, rounded once to a code and packed. Finite weights."""

    def errors(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None) -> Tensor:
        """For each of the candidates, float32 scales and zeros, the sum over each unit of |code - quotient| ** 2.4, float32 [Q, R, C].

        `rounding.power_2_4`, added by `rounding.tree_sum` over b, then over a.
        """

    def best(
        self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None, *, amax_RC: Tensor
    ) -> Tensor:
        """Which of the candidates has the least error in each unit, int64 [R, C]; the first of equals.

        The error is the sum of `errors` times `rounding.power_2_4` of the scale in units of the first candidate's, so that nothing
        underflows. Where the first candidate's is no number, as in a unit with a weight that is not finite, it is the first.
        `amax_RC`: the largest magnitude in each unit, or what is not finite.
        """


class TorchKernels:
    """The reference, on every device that torch has."""

    name = "torch"
    working_bytes = 40  # the source and at most nine temporaries in float32 (search, e2m1)
    search_bytes = 0

    def extremes(self, weight_NK: Tensor, unit: tuple[int, int], *, symmetric: bool) -> Tensor:
        weight_RaCb = cut_units(weight_NK, unit)
        if symmetric:
            return weight_RaCb.abs().amax(3).amax(1).float()[None]
        low_RC = weight_RaCb.amin(3).amin(1).float().clamp_(max=0.0)
        high_RC = weight_RaCb.amax(3).amax(1).float().clamp_(min=0.0)
        return torch.stack([low_RC, high_RC])

    def codes(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scales: Scales) -> Tensor:
        code_RaCb = codes.round(quotient(cut_units(weight_NK, unit).float(), scales.scale_RC, scales.zero_RC))
        return codes.pack(join_units(code_RaCb, weight_NK.shape))

    def errors(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None) -> Tensor:
        weight_RaCb = cut_units(weight_NK, unit).float()
        sums = []
        for q, scale_RC in enumerate(scale_QRC):
            quotient_RaCb = quotient(weight_RaCb, scale_RC, None if zero_QRC is None else zero_QRC[q])
            distance_RaCb = codes.value(codes.round(quotient_RaCb.clone())).sub_(quotient_RaCb)
            sums.append(tree_sum(tree_sum(power_2_4(distance_RaCb)).transpose(1, 2)))
        return torch.stack(sums)

    def best(
        self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None, *, amax_RC: Tensor
    ) -> Tensor:
        del amax_RC
        error_QRC = self.errors(codes, weight_NK, unit, scale_QRC, zero_QRC).mul_(power_2_4(scale_QRC / scale_QRC[0]))
        index_RC, least_RC = torch.zeros_like(error_QRC[0], dtype=torch.int64), error_QRC[0]
        for index, error_RC in enumerate(error_QRC[1:], start=1):
            better_RC = error_RC < least_RC  # false where the error is NaN
            index_RC = torch.where(better_RC, index, index_RC)
            least_RC = torch.where(better_RC, error_RC, least_RC)
        return index_RC


TORCH = TorchKernels()
