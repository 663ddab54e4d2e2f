"""Pairs: what gives an input, and the linears that read it, between which a scale of channels can be moved.

    norm -> every linear that reads it
    up   -> down        v -> o, if every head has keys and values of its own

They are found by data flow and by the names of projections, and believed only if they hold: with a scale moved the layer must give the same
output. That rules out residual connections, gates that are not linear in `up`, and norms that are something else.
Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LINEAR_PAIRS = {"down_proj": "up_proj", "w2": "w3", "o_proj": "v_proj"}  # what reads -> what gives, beside it
STACKED_UP = "gate_up_proj"  # the lower half of its rows is `up`


@dataclass(frozen=True, slots=True)
class Pair:
    """What gives an input, by the name of its tensor, and the weights that read it."""

    giver: str
    readers: tuple[str, ...]
    is_norm: bool = False
    first_row: int = 0  # of the rows of a giver that is a linear

    @property
    def bias(self) -> str:
        """What the giver adds, if there is such a tensor."""
        return self.giver.removesuffix("weight") + "bias"

    @property
    def tensors(self) -> set[str]:
        """All that a scale is moved between, with the bias, which may not be there."""
        return {self.giver, self.bias, *self.readers}

    @property
    def title(self) -> str:
        """For people."""
        more = f" and {len(self.readers) - 1} more" if len(self.readers) > 1 else ""
        return f"{self.giver} -> {self.readers[0]}{more}"


def linear_pairs(shapes: Mapping[str, tuple[int, int]]) -> Iterator[Pair]:
    """Pairs of linears of a layer, by their names and shapes."""
    for name, (_, num_columns) in shapes.items():
        module, _, _ = name.rpartition(".weight")
        parent, _, last = module.rpartition(".")
        if last not in LINEAR_PAIRS:
            continue
        giver, stacked = f"{parent}.{LINEAR_PAIRS[last]}.weight", f"{parent}.{STACKED_UP}.weight"
        if giver in shapes and shapes[giver][0] == num_columns:
            yield Pair(giver, (name,))
        elif stacked in shapes and shapes[stacked][0] == 2 * num_columns:
            yield Pair(stacked, (name,), first_row=num_columns)


def move_scale(
    pair: Pair, scale_K: Tensor, weights: MutableMapping[str, Tensor], vectors: MutableMapping[str, Tensor], *, offset: float = 0.0
) -> Tensor:
    """Divide what gives the input by a scale and multiply the columns of what reads it. Returns the scale as it came to be.

    `weights` holds matrices in float32, `vectors` all else as it is stored. A norm stays of its dtype, so what the readers are multiplied
    with is what it was truly divided by. `offset` is what a norm adds to its weight before it multiplies.
    """
    rows = slice(pair.first_row, pair.first_row + len(scale_K))
    if pair.is_norm:
        before_K = vectors[pair.giver].float() + offset
        after = ((before_K / scale_K) - offset).to(vectors[pair.giver].dtype)
        after_K = after.float() + offset
        scale_K = torch.where((before_K != 0) & (after_K != 0), before_K / after_K, scale_K)
        vectors[pair.giver] = after
    else:
        given_NK = weights[pair.giver].clone()
        given_NK[rows] /= scale_K[:, None]
        weights[pair.giver] = given_NK
    if pair.bias in vectors:
        bias_N = vectors[pair.bias].float()
        bias_N[rows] /= scale_K
        vectors[pair.bias] = bias_N.to(vectors[pair.bias].dtype)
    for reader in pair.readers:
        weights[reader] = weights[reader] * scale_K
    return scale_K
