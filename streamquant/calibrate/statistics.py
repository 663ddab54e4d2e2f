"""What solvers know of the inputs of linears: X^T X, magnitudes, and how many tokens there were.

Linears that are given the same input share one `Statistics`: q, k and v; gate and up; with every token routed to every expert, the gate and
up of all experts. A Hessian of a layer is then computed once, and solved once.
Legend: K in_features, T tokens.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.utils.weak import WeakTensorKeyDictionary

from streamquant.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


BLOCKS = 8  # of columns, of a Hessian of which half is computed
MIN_BLOCK = 128


@dataclass(eq=False, slots=True)
class Statistics:
    """Of one input, over all tokens."""

    hessian_KK: Tensor  # X^T X, float32; while tokens are added, only what is right of the diagonal. [0, 0] if nobody asks for it
    abs_sum_K: Tensor
    amax_K: Tensor
    num_tokens: int = 0

    @classmethod
    def of_nothing(cls, num_columns: int, device: torch.device, *, hessian: bool = True) -> Statistics:
        """Of an input that was not seen yet."""
        zeros_K, size = torch.zeros(num_columns, device=device), num_columns if hessian else 0
        return cls(torch.zeros(size, size, device=device), zeros_K, zeros_K.clone())

    def add(self, input_TK: Tensor, *, magnitudes: bool = True) -> None:
        """Take tokens into account; without their `magnitudes` if nobody asks for them."""
        input_TK = input_TK.float()
        num_columns = len(self.hessian_KK)
        block = max(num_columns // BLOCKS, MIN_BLOCK)
        for start in range(0, num_columns, block):
            block_TB = input_TK[:, start : start + block]
            self.hessian_KK[start : start + block, start:].addmm_(block_TB.T, input_TK[:, start:])
        if magnitudes:
            magnitude_TK = input_TK.abs()
            self.abs_sum_K += magnitude_TK.sum(0)
            self.amax_K = torch.maximum(self.amax_K, magnitude_TK.amax(0))
        self.num_tokens += len(input_TK)

    def finish(self) -> None:
        """All tokens were added: mirror the Hessian."""
        num_columns = len(self.hessian_KK)
        block = max(num_columns // BLOCKS, MIN_BLOCK)
        for start in range(0, num_columns, block):
            end = start + block
            self.hessian_KK[end:, start:end] = self.hessian_KK[start:end, end:].T

    def divide(self, scale_K: Tensor) -> None:
        """Make these the statistics of the same input with its columns divided by a scale."""
        inverse_K = 1.0 / scale_K
        self.hessian_KK.mul_(inverse_K[:, None]).mul_(inverse_K)
        self.abs_sum_K.mul_(inverse_K)
        self.amax_K.mul_(inverse_K)

    @property
    def mean_K(self) -> Tensor:
        """The mean magnitude of each column."""
        return self.abs_sum_K / max(self.num_tokens, 1)


class Collector:
    """Statistics of a layer by linear, collected while batches run through it."""

    def __init__(self, *, hessians: bool = True, magnitudes: bool = True) -> None:
        self._hessians, self._magnitudes = hessians, magnitudes
        self._of: dict[Hashable, Statistics] = {}
        self._leaders: set[Hashable] = set()
        self._inputs = WeakTensorKeyDictionary()  # as long as they are alive, their statistics

    def add(self, linear: Hashable, input_TK: Tensor) -> None:
        """Note what a linear was given. One that is given a tensor that another was given shares its statistics from then on."""
        if not len(input_TK):
            return
        if linear not in self._of:
            if input_TK in self._inputs:
                self._of[linear] = self._inputs[input_TK]
                return
            self._of[linear] = Statistics.of_nothing(input_TK.shape[1], input_TK.device, hessian=self._hessians)
            self._leaders.add(linear)
        if linear in self._leaders:
            self._of[linear].add(input_TK, magnitudes=self._magnitudes)
            self._inputs[input_TK] = self._of[linear]

    def finish(self) -> None:
        """Everything was given."""
        for linear in self._leaders:
            self._of[linear].finish()

    def of(self, linear: Hashable) -> Statistics | None:
        """What is known of the input of a linear; None if it was never given any."""
        return self._of.get(linear)
