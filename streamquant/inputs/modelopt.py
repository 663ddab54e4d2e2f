"""NVFP4 as NVIDIA's ModelOpt exports it.

    weight          U8 [N, K/2], the even column in the low nibble
    weight_scale    F8_E4M3 [N, K/16]
    weight_scale_2  F32 []; a multiplier, where compressed-tensors stores the reciprocal

weight = code * (weight_scale * weight_scale_2). The same codes and group scales as those of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import TensorSpec
from streamquant.errors import CheckpointError
from streamquant.inputs.weight import Hints, InputFormat, Weight
from streamquant.schemes import SCHEMES, Scheme
from streamquant.schemes.nvfp4 import GROUP
from streamquant.schemes.packing import unpack_nibbles
from streamquant.schemes.rounding import e2m1_value
from streamquant.schemes.units import dequantize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ModelOptNvFp4(InputFormat):
    """ModelOpt's NVFP4."""

    @property
    def title(self) -> str:
        return "ModelOpt NVFP4"

    @property
    def whole(self) -> frozenset[str]:
        return frozenset({"weight_scale_2"})

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        del num_columns
        scale_RC = stored["weight_scale"].float() * stored["weight_scale_2"]
        return dequantize(e2m1_value(unpack_nibbles(stored["weight"])), scale_RC, unit=(1, GROUP))

    @property
    def scheme(self) -> Scheme:
        return SCHEMES["NVFP4A16"]

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        del num_columns, scheme
        return {"weight_packed": stored["weight"], "weight_scale": stored["weight_scale"]}

    def shared(self, stored: Mapping[str, Tensor]) -> Tensor:
        return 1.0 / stored["weight_scale_2"].view(1)


def find_modelopt_nvfp4(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight | None:
    """A weight in ModelOpt's NVFP4."""
    del hints
    if "weight_scale_2" not in tensors or "weight" not in tensors or tensors["weight"].dtype != "U8":
        return None
    codes, scale = tensors["weight"], tensors.get("weight_scale")
    if len(codes.shape) != 2:
        raise CheckpointError(f"{codes.name} looks like ModelOpt's NVFP4, but has shape {list(codes.shape)}; a matrix was expected")
    num_rows, num_columns = codes.shape[0], 2 * codes.shape[1]
    if scale is None or scale.dtype != "F8_E4M3" or scale.shape != (num_rows, num_columns // GROUP) or num_columns % GROUP:
        raise CheckpointError(f"{codes.name} looks like ModelOpt's NVFP4, but has no weight_scale in F8_E4M3, one for {GROUP} columns")
    stored = {role: tensors[role] for role in ("weight", "weight_scale", "weight_scale_2")}
    scale_2 = stored["weight_scale_2"]
    if scale_2.dtype != "F32" or scale_2.num_elements != 1:
        raise CheckpointError(f"{scale_2.name} is {scale_2.dtype} {list(scale_2.shape)}; that of ModelOpt's NVFP4 is one F32")
    return Weight(f"{module}.weight", "BF16", (num_rows, num_columns), stored, ModelOptNvFp4())
