"""Units: the elements of a weight that share a scale.

Legend: scheme.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamquant.lazy import F

if TYPE_CHECKING:
    from torch import Tensor


class Scales(NamedTuple):
    """Scales of a block of rows: weight ~ (code - zero) * scale."""

    stored_RC: Tensor  # as written to the file, in the dtype written
    scale_RC: Tensor  # the same or what follows from it, float32
    zero_RC: Tensor | None = None  # float32 integers; only asymmetric schemes have it


def cut_units(weight_NK: Tensor, unit: tuple[int, int]) -> Tensor:
    """A weight as [R, a, C, b], units of `unit` rows and columns: a view, but where units at the edge are filled up with zeros."""
    missing = (0, -weight_NK.shape[1] % unit[1], 0, -weight_NK.shape[0] % unit[0])
    if any(missing):
        weight_NK = F.pad(weight_NK, missing)
    return weight_NK.view(-1, unit[0], weight_NK.shape[1] // unit[1], unit[1])


def join_units(weight_RaCb: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `cut_units`, for a weight of this shape."""
    return weight_RaCb.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def quotient(weight_RaCb: Tensor, scale_RC: Tensor, zero_RC: Tensor | None) -> Tensor:
    """The float32 number that is rounded to a code: weight / scale + zero."""
    quotient_RaCb = weight_RaCb / scale_RC[:, None, :, None]
    if zero_RC is not None:
        quotient_RaCb.add_(zero_RC[:, None, :, None])
    return quotient_RaCb


def dequantize(code_NK: Tensor, scale_RC: Tensor, *, unit: tuple[int, int], zero_RC: Tensor | None = None) -> Tensor:
    """(code - zero) * scale in float32, for values of codes (float32) and the scales of their units; rounded no further."""
    code_RaCb = cut_units(code_NK, unit)
    if zero_RC is not None:
        code_RaCb = code_RaCb - zero_RC[:, None, :, None]
    return join_units(code_RaCb * scale_RC[:, None, :, None], code_NK.shape)
