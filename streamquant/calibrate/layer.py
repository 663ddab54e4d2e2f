"""A decoder layer in work, what all layers of a model share, and what is told of one.

Legend: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamquant.calibrate.layer_outputs import LayerOutputs
from streamquant.calibrate.method import Method
from streamquant.calibrate.skeleton import Site, Skeleton
from streamquant.calibrate.tap import Linear
from streamquant.inputs import Weight
from streamquant.lazy import torch
from streamquant.schemes.kernels import Kernels
from streamquant.stored import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

SCALINGS = ("awq", "smoothquant")


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a weight, or of a pair."""

    layer: int
    name: str
    scheme: str = ""
    tokens: int = 0  # that its input was seen with
    routed_tokens: int | None = None  # of an expert: those that the router sends to it
    error_before: float = 0.0  # of the outputs over all tokens, rounded to nearest, relative to their sum of squares
    error_after: float = 0.0
    damping: float = 0.0
    fallback: str = ""  # why it was left to plain rounding, or as it was
    rescaled: tuple[str, ...] = ()  # the tensors of a pair between which a scale was moved

    @property
    def is_pair(self) -> bool:
        """Whether it is about a scale that was moved, or not."""
        return self.scheme in SCALINGS


@dataclass(slots=True)
class Layer:
    """A layer in work."""

    index: int
    module: nn.Module
    sites: Mapping[str, Site]  # by names in the checkpoint
    weights: dict[str, Tensor] = field(default_factory=dict)  # matrices, float32, in the memory of the module as a rule
    vectors: dict[str, Tensor] = field(default_factory=dict)  # everything else, as stored

    def read(self, name: str) -> Tensor:
        """Any tensor of it."""
        return self.weights[name] if name in self.weights else self.vectors[name]

    def linear(self, name: str) -> Linear:
        """The product that a matrix is a part of."""
        return Linear(self.sites[name].parameter, self.sites[name].expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What the layers share."""

    weights: Mapping[str, Weight]  # what the checkpoint has as matrices, by name
    skeleton: Skeleton
    method: Method
    outputs: LayerOutputs
    device: torch.device
    kernels: Kernels

    def is_matrix(self, name: str) -> bool:
        """Whether a tensor, by its name in the checkpoint, is one that inputs are multiplied with."""
        return name in self.weights and not self.weights[name].is_vector

    def dtype(self, name: str) -> torch.dtype:
        """That a matrix is stored in."""
        return TORCH_DTYPES[self.weights[name].dtype]

    def view(self, layer: Layer, names: Iterable[str]) -> None:
        """Have these matrices of a layer as its module has them."""
        layer.weights.update({name: self.skeleton.weight(layer.module, layer.sites[name]) for name in names})
