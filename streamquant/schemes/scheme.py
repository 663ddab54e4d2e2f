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
from typing import TYPE_CHECKING, Any, NamedTuple

from streamquant.errors import RequestError
from streamquant.lazy import F, torch
from streamquant.schemes.observers import observe_units

if TYPE_CHECKING:
    from torch import Tensor


class Scales(NamedTuple):
    """Scales of a block of rows: weight ~ (code - zero) * scale."""

    stored_RC: Tensor  # as written to the file, in the dtype written
    scale_RC: Tensor  # the same or what follows from it, float32
    zero_RC: Tensor | None = None  # float32 integers; only asymmetric schemes have it


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """How the engine shall quantize the inputs of a layer. Stored in the config, nowhere else."""

    num_bits: int
    type: str  # "int" | "float"
    strategy: str  # "token" | "group"
    group_size: int | None = None
    scale_dtype: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The `input_activations` entry of a config group; what is None is left out, since old readers refuse unknown keys."""
        said = {key: value for key, value in asdict(self).items() if value is not None}
        return said | {"symmetric": True, "dynamic": True}


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

    @abstractmethod
    def round(self, quotient: Tensor) -> Tensor:
        """The nearest code of each float32 number, saturating. May overwrite its argument. The dtype is the format's choice."""

    def code_value(self, code: Tensor) -> Tensor:
        """Codes as `round` gives them -> float32 values."""
        return code

    @abstractmethod
    def pack(self, code_NK: Tensor, scales: Scales) -> dict[str, Tensor]:
        """The stored tensors of a block of rows, by the last part of their name."""

    @abstractmethod
    def unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        """The inverse of `pack`: values of codes (float32 [N, K]) and scales."""

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

    def observe(self, weight_NK: Tensor) -> Tensor:
        """Bounds of each unit, float32 [B, R, C], as the scheme's observer chooses them. Not finite where a weight is not."""
        return observe_units(self, self.units(weight_NK))

    def encode(self, weight_NK: Tensor, bounds_BRC: Tensor | None = None, *, shared: Tensor | None = None) -> dict[str, Tensor]:
        """Quantize a block of rows.

        `weight_NK`: bfloat16, float16 or float32, finite; may be on the meta device. `bounds_BRC`: from `observe`, which is
        called if they are not given. `shared`: from `share`, required where `shares_amax`.
        Returns the stored tensors that go by rows, by the last part of their name ("weight_packed", "weight_scale", ...).
        """
        if bounds_BRC is None:
            bounds_BRC = self.observe(weight_NK)
        scales = self.scales(bounds_BRC, weight_NK.dtype, shared)
        code_RaCb = self.round_units(self.units(weight_NK).float(), scales)
        return self.pack(join_units(code_RaCb, weight_NK.shape), scales)

    def encode_whole(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Quantize a weight that stands alone: every stored tensor, by the last part of its name."""
        bounds_BRC, shared = self.observe(weight_NK), None
        if self.shares_amax:
            shared = self.share(bounds_BRC.abs().amax().view(1), weight_NK.dtype)
        by_rows = self.encode(weight_NK, bounds_BRC, shared=shared)
        return by_rows | self.once((weight_NK.shape[0], weight_NK.shape[1]), weight_NK.dtype, shared)

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        """Dequantize a block of rows, given with the tensors written once: float32 [N, K], the product not rounded further."""
        code_NK, scales = self.unpack(stored, num_columns)
        return dequantize(code_NK, scales.scale_RC, zero_RC=scales.zero_RC, unit=self.unit(num_columns))

    def units(self, weight_NK: Tensor) -> Tensor:
        """The weight as [R, a, C, b]: a view, but where blocks at the edge are filled up with zeros.

        Raises RequestError if groups of columns do not divide it.
        """
        unit = self.unit(weight_NK.shape[1])
        if unit[0] == 1 and weight_NK.shape[1] % unit[1]:
            raise RequestError(f"{weight_NK.shape[1]} columns are no multiple of {unit[1]}, which {self.preset} needs")
        return cut_units(weight_NK, unit)

    def round_units(self, weight_RaCb: Tensor, scales: Scales) -> Tensor:
        """The code of each element. The quotient stays in float32 and is rounded once."""
        return self.round(self.quotient(weight_RaCb, scales))

    @staticmethod
    def quotient(weight_RaCb: Tensor, scales: Scales) -> Tensor:
        """The float32 number that is rounded to a code: weight / scale + zero."""
        quotient_RaCb = weight_RaCb / scales.scale_RC[:, None, :, None]
        if scales.zero_RC is not None:
            quotient_RaCb.add_(scales.zero_RC[:, None, :, None])
        return quotient_RaCb


def cut_units(weight_NK: Tensor, unit: tuple[int, int]) -> Tensor:
    """A weight as [R, a, C, b], units of `unit` rows and columns: a view, but where units at the edge are filled up with zeros."""
    missing = (0, -weight_NK.shape[1] % unit[1], 0, -weight_NK.shape[0] % unit[0])
    if any(missing):
        weight_NK = F.pad(weight_NK, missing)
    return weight_NK.view(-1, unit[0], weight_NK.shape[1] // unit[1], unit[1])


def join_units(weight_RaCb: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `cut_units`, for a weight of this shape."""
    return weight_RaCb.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def dequantize(code_NK: Tensor, scale_RC: Tensor, *, unit: tuple[int, int], zero_RC: Tensor | None = None) -> Tensor:
    """(code - zero) * scale in float32, for values of codes (float32) and the scales of their units; rounded no further."""
    code_RaCb = cut_units(code_NK, unit)
    if zero_RC is not None:
        code_RaCb = code_RaCb - zero_RC[:, None, :, None]
    return join_units(code_RaCb * scale_RC[:, None, :, None], code_NK.shape)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 scale in the dtype it is stored in. Zero, of a unit of zeros or by underflow, becomes that dtype's epsilon."""
    rounded = scale.to(dtype)
    return torch.where(rounded > 0, rounded, torch.finfo(dtype).eps)


def require_scale_dtype(scale_dtype: str) -> None:
    """Raise RequestError for a `scale_dtype` that is neither the weight's own nor float32."""
    if scale_dtype not in {"weight", "float32"}:
        raise RequestError(f"unknown scale dtype {scale_dtype!r}; known are weight and float32")
