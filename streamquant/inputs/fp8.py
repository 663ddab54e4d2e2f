"""FP8 weights (e4m3fn) with a scale beside them: DeepSeek's, ModelOpt's, Mistral's and compressed-tensors'.

    weight              F8_E4M3 [N, K]
    one of SCALE_ROLES  F32, BF16, F16 or F8_E8M0: for the tensor [] or [1], for rows [N] or [N, 1], for blocks
                        [ceil(N/a), ceil(K/b)] (ModelOpt: [N/a, 1, K/b, 1]); a multiplier by any of its names

weight = code * scale, in float32, rounded once. DeepSeek-V3 has blocks of 128 x 128; its `weight_dequant` kernel is the source.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import TensorSpec
from streamquant.errors import CheckpointError
from streamquant.inputs.weight import Hints, InputFormat, Weight, scale_value
from streamquant.schemes import Scheme
from streamquant.schemes.fp8 import BLOCK, Fp8
from streamquant.schemes.units import Scales, dequantize

if TYPE_CHECKING:
    from torch import Tensor

SCALE_ROLES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
PER_ROW = (1, sys.maxsize)
STRATEGIES = {None: "tensor", PER_ROW: "channel", (BLOCK, BLOCK): "block"}


@dataclass(frozen=True, slots=True)
class ScaledFp8(InputFormat):
    """FP8 codes and a scale for every `unit` of rows and columns, which may be larger than the weight, or one for all."""

    unit: tuple[int, int] | None
    scale_dtype: str  # of the file

    @property
    def title(self) -> str:
        if self.unit is None:
            return "FP8 per tensor"
        return "FP8 per row" if self.unit == PER_ROW else f"FP8 in blocks of {self.unit[0]} x {self.unit[1]}"

    @property
    def whole(self) -> frozenset[str]:
        return frozenset({"scale"} if self.unit is None else ())

    @property
    def row_multiple(self) -> int:
        return 1 if self.unit is None else self.unit[0]

    def line(self, role: str, row: int) -> int:
        return row if role == "weight" else -(-row // self.row_multiple)

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        code_NK, scale_RC = stored["weight"].float(), scale_value(stored["scale"])
        if self.unit is None:
            return code_NK.mul_(scale_RC.view(1, 1))
        return dequantize(code_NK, scale_RC, unit=(min(self.unit[0], len(code_NK)), min(self.unit[1], num_columns)))

    @property
    def scheme(self) -> Scheme | None:
        if self.unit not in STRATEGIES:
            return None
        kept = "weight" if self.scale_dtype in {"BF16", "F16"} else "float32"
        return Fp8(preset=self.title, strategy=STRATEGIES[self.unit], scale_dtype=kept)

    def keeps_codes_of(self, asked: Scheme) -> Scheme | None:
        """One scale for all is one for every row or block as well."""
        native = self.scheme
        if self.unit is None and isinstance(asked, Fp8) and isinstance(native, Fp8):
            return replace(asked, observer="minmax", scale_dtype=native.scale_dtype)
        return super(ScaledFp8, self).keeps_codes_of(asked)  # bare super() does not know a class with slots

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        scale = stored["scale"]
        if self.scale_dtype == "F8_E8M0" or scheme.format == "fp8":  # native block FP8 has float32 scales
            scale = scale_value(scale)
        if self.unit is None and not scheme.shares_amax:
            rows, columns = scheme.unit(num_columns)
            scale = scale.expand(-(-len(stored["weight"]) // rows), -(-num_columns // columns)).contiguous()
        return scheme.pack(stored["weight"], Scales(scale, scale))

    def shared(self, stored: Mapping[str, Tensor]) -> Tensor:
        return scale_value(stored["scale"]).view(1)


def find_fp8(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight | None:
    """A weight in FP8 with a scale, unless the scale is that of MXFP8."""
    role = next((role for role in SCALE_ROLES if role in tensors), None)
    weight = tensors.get("weight")
    if weight is None or role is None or weight.dtype != "F8_E4M3" or tensors[role].dtype not in SCALE_DTYPES:
        return None
    scale = tensors[role]
    if len(weight.shape) != 2:
        raise CheckpointError(f"{weight.name} in FP8 has shape {list(weight.shape)}; a matrix was expected")
    unit = scale_unit(weight.shape, scale.shape, block=hints.block, name=scale.name)
    dtype = hints.dtype_beside(scale.dtype)
    shape = (weight.shape[0], weight.shape[1])
    return Weight(f"{module}.weight", dtype, shape, {"weight": weight, "scale": scale}, ScaledFp8(unit, scale.dtype))


def scale_unit(shape: tuple[int, ...], scale_shape: tuple[int, ...], *, block: tuple[int, int], name: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from the shapes of a matrix and of its scale. Raises CheckpointError if they do not fit."""
    num_rows, num_columns = shape
    sizes = [size for size in scale_shape if size != 1]
    if not sizes:
        return None
    if sizes == [num_rows] and scale_shape[0] == num_rows:
        return PER_ROW
    blocks = (-(-num_rows // block[0]), -(-num_columns // block[1]))
    if scale_shape in {blocks, (blocks[0], 1, blocks[1], 1)}:
        return block
    raise CheckpointError(
        f"{name} has shape {list(scale_shape)}: a weight of {list(shape)} has scales [1], [{num_rows}, 1] or, in blocks of "
        f"{block[0]} x {block[1]}, {list(blocks)}"
    )
