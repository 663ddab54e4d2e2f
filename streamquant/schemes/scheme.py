"""What every scheme is: how the weight of one Linear is stored.

A scheme cuts a weight into units that share a scale, observes each unit, turns what it saw into scales, rounds the elements to
codes and packs them. Work goes by blocks of rows; a block starts at a multiple of `row_multiple`, and cutting a weight
differently changes no bit. A new wire format is a subclass in a file of its own and a line in `schemes/__init__.py`.

Legend: N out_features, K in_features, R rows of units, C units in a row of units, a rows and b columns of a unit,
B bounds: 1 (the largest magnitude, symmetric schemes) or 2 (minimum and maximum, asymmetric ones).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from streamquant.errors import RequestError
from streamquant.lazy import torch
from streamquant.schemes.codes import Codes
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.observers import observe_units
from streamquant.schemes.units import Scales, dequantize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """How the engine shall quantize the inputs of a layer."""

    num_bits: int
    type: str  # "int" | "float"
    strategy: str  # "token" | "group" | "tensor" | "tensor_group"
    group_size: int | None = None
    scale_dtype: str | None = None
    dynamic: bool | str = True  # False: the checkpoint has a scale; "local": it has one over those that the engine finds

    @property
    def config(self) -> dict[str, Any]:
        """The `input_activations` entry of a config group; what is None is left out, since old readers refuse unknown keys."""
        said = {key: value for key, value in asdict(self).items() if value is not None}
        return said | {"symmetric": True}


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """How the weight of one Linear is stored. A value; subclasses add the settings of their format."""

    preset: str = field(compare=False)
    observer: str = "minmax"
    activations: Activations | None = None
    symmetric: bool = True  # if not, units have a zero point

    # --- what a format must say -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def format(self) -> str:
        """The name of the wire format in compressed-tensors."""

    @property
    @abstractmethod
    def weights_config(self) -> dict[str, Any]:
        """The `weights` entry of a config group: nothing that a reader can do without, since old readers refuse unknown keys."""

    @abstractmethod
    def unit(self, num_columns: int) -> tuple[int, int]:
        """Rows and columns of the elements that share a scale."""

    @abstractmethod
    def scales(self, bounds_BRC: Tensor, dtype: torch.dtype, shared: Tensor | None) -> Scales:
        """Scales for bounds (float32) of a weight of `dtype`. `shared` is the result of `share`, where the format needs it."""

    @property
    @abstractmethod
    def codes(self) -> Codes:
        """The numbers that elements are rounded to."""

    @abstractmethod
    def stored(self, packed: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The stored tensors of a block of rows, by the last part of their name, from packed codes."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        """Values of codes (float32 [N, K]) and scales of a block of rows."""

    @property
    def needs_data(self) -> bool:
        """Whether it stores scales of the inputs, `input_scales`."""
        return self.activations is not None and self.activations.dynamic is not True

    @property
    def title(self) -> str:
        """The preset, with the observer unless that is minmax."""
        return self.preset if self.observer == "minmax" else f"{self.preset} ({self.observer})"

    # --- what a format may say --------------------------------------------------------------------------------------

    @property
    def settings(self) -> frozenset[str]:
        """Fields that a user may set, besides `observer`."""
        return frozenset()

    def for_expert(self) -> Scheme:
        """The scheme for the weight of an expert, where engines read experts in another format."""
        return self

    @property
    def largest_code(self) -> float:
        """The magnitude that the scale of a unit maps its largest weight to, where scales can be powers of two."""
        raise RequestError(f"observer {self.observer} is made for floating point codes with floating point scales, not for {self.preset}")

    def exact_for(self, source: Scheme | None) -> Scheme:
        """The scheme for weights that `source` stored: with settings under which it changes no value, where there are such."""
        del source
        return self

    @property
    def shares_amax(self) -> bool:
        """Whether scales depend on the largest magnitude in the whole tensor, or in all tensors fused with it."""
        return False

    @property
    def scales_are_powers_of_two(self) -> bool:
        """Whether the format has no other scales."""
        return False

    @property
    def row_multiple(self) -> int:
        """A block of rows starts at a multiple of this."""
        return 1

    def line(self, suffix: str, row: int) -> int:
        """The line of the stored tensor at which weight row `row` (a multiple of `row_multiple`, or N) begins."""
        del suffix
        return row

    def share(self, amax: Tensor, dtype: torch.dtype) -> Tensor:
        """From the largest magnitude in all fused weights (float32 [1]) to what their scales share (float32 [1])."""
        raise AssertionError(f"{self.preset} shares nothing, and was asked to for {amax} in {dtype}")

    def once(self, shape: tuple[int, int], dtype: torch.dtype, shared: Tensor | None) -> dict[str, Tensor]:
        """The stored tensors that are written once for a weight and not by rows."""
        del shape, dtype, shared
        return {}

    def input_scales(self, amax: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors that tell of the inputs, of which the largest magnitude is `amax` (float32 [1]): none if engines measure them.

        `dtype` is that of the weight.
        """
        del amax, dtype
        return {}

    def search_scales(self, bounds_BRC: Tensor, dtype: torch.dtype) -> Scales:
        """The scales by which an observer compares candidates; they leave out what is shared."""
        return self.scales(bounds_BRC, dtype, None)

    def problem(self, shape: tuple[int, int], *, fused: bool, last: bool) -> str | None:
        """Why engines could not load a weight of this shape, or None.

        `fused`: it has partners that engines stack into one weight; `last`: no partner comes below it.
        """
        del shape, fused, last
        return None

    # --- what all formats do ----------------------------------------------------------------------------------------

    def observe(self, weight_NK: Tensor, *, kernels: Kernels = TORCH) -> Tensor:
        """Bounds of each unit, float32 [B, R, C], as the scheme's observer chooses them. Not finite where a weight is not.

        Raises RequestError if groups of columns do not divide the weight.
        """
        unit = self.unit(weight_NK.shape[1])
        if unit[0] == 1 and weight_NK.shape[1] % unit[1]:
            raise RequestError(f"{weight_NK.shape[1]} columns are no multiple of {unit[1]}, which {self.preset} needs")
        return observe_units(self, weight_NK, unit, kernels)

    def encode(
        self, weight_NK: Tensor, bounds_BRC: Tensor | None = None, *, shared: Tensor | None = None, kernels: Kernels = TORCH
    ) -> dict[str, Tensor]:
        """Quantize a block of rows.

        `weight_NK`: bfloat16, float16 or float32, finite; may be on the meta device. `bounds_BRC`: from `observe`, which is
        called if they are not given. `shared`: from `share`, required where `shares_amax`.
        Returns the stored tensors that go by rows, by the last part of their name ("weight_packed", "weight_scale", ...).
        """
        if bounds_BRC is None:
            bounds_BRC = self.observe(weight_NK, kernels=kernels)
        scales = self.scales(bounds_BRC, weight_NK.dtype, shared)
        return self.stored(kernels.codes(self.codes, weight_NK, self.unit(weight_NK.shape[1]), scales), scales)

    def encode_whole(self, weight_NK: Tensor, *, kernels: Kernels = TORCH) -> dict[str, Tensor]:
        """Quantize a weight that stands alone: every stored tensor, by the last part of its name."""
        bounds_BRC, shared = self.observe(weight_NK, kernels=kernels), None
        if self.shares_amax:
            shared = self.share(bounds_BRC.abs().amax().view(1), weight_NK.dtype)
        by_rows = self.encode(weight_NK, bounds_BRC, shared=shared, kernels=kernels)
        return by_rows | self.once((weight_NK.shape[0], weight_NK.shape[1]), weight_NK.dtype, shared)

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        """Dequantize a block of rows, given with the tensors written once: float32 [N, K], the product not rounded further."""
        code_NK, scales = self.unpack(stored, num_columns)
        return dequantize(code_NK, scales.scale_RC, zero_RC=scales.zero_RC, unit=self.unit(num_columns))

    def pack(self, code_NK: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The stored tensors of a block of rows, by the last part of their name, from codes as `codes.round` gives them."""
        return self.stored(self.codes.pack(code_NK), scales)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 scale in the dtype it is stored in. Zero, of a unit of zeros or by underflow, becomes that dtype's epsilon."""
    rounded = scale.to(dtype)
    return torch.where(rounded > 0, rounded, torch.finfo(dtype).eps)


def require_scale_dtype(scale_dtype: str) -> None:
    """Raise RequestError for a `scale_dtype` that is neither the weight's own nor float32."""
    if scale_dtype not in {"weight", "float32"}:
        raise RequestError(f"unknown scale dtype {scale_dtype!r}; known are weight and float32")
