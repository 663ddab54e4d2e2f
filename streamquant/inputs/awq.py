"""4-bit weights as AutoAWQ stores them (version "gemm").

    qweight  I32 [K, N/8]
    qzeros   I32 [K/group, N/8]; absent without zero points, which are 8 then
    scales   F16 or BF16 [K/group, N]

Nibble k of a word, from the low end, is column 8j + (0, 2, 4, 6, 1, 3, 5, 7)[k]. weight[n, k] = (code - zero) * scale, codes and
zeros 0..15. Source: AutoAWQ, `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import TensorSpec
from streamquant.errors import CheckpointError
from streamquant.inputs.weight import Hints, InputFormat, Weight
from streamquant.lazy import torch
from streamquant.schemes import Scheme
from streamquant.schemes.integer import PackedInt
from streamquant.schemes.units import Scales, dequantize

if TYPE_CHECKING:
    from torch import Tensor

NUM_BITS = 4
PER_WORD = 8
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
MIDDLE = 8  # of the codes; subtracted, they are signed


@dataclass(frozen=True, slots=True)
class Awq(InputFormat):
    """AutoAWQ's int4, a scale and perhaps a zero point for each group of columns."""

    group_size: int
    has_zeros: bool

    @property
    def title(self) -> str:
        return f"AutoAWQ int4, groups of {self.group_size}"

    @property
    def by_columns(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales"})

    @property
    def row_multiple(self) -> int:
        return PER_WORD

    def line(self, role: str, row: int) -> int:
        return row if role == "scales" else row // PER_WORD

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        del num_columns
        code_NK, scales = self._unpack(stored)
        return dequantize(code_NK.float(), scales.scale_RC, zero_RC=scales.zero_RC, unit=(1, self.group_size))

    @property
    def scheme(self) -> Scheme:
        return PackedInt(preset=self.title, num_bits=NUM_BITS, group_size=self.group_size, symmetric=not self.has_zeros)

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        del num_columns
        return scheme.pack(*self._unpack(stored))

    def _unpack(self, stored: Mapping[str, Tensor]) -> tuple[Tensor, Scales]:
        """Signed codes, and scales with signed zero points."""
        scale_RC = stored["scales"].contiguous()
        zero_RC = _unpack_words(stored["qzeros"]).float() if self.has_zeros else None
        return _unpack_words(stored["qweight"]), Scales(scale_RC, scale_RC.float(), zero_RC)


def _unpack_words(word_Wn: Tensor) -> Tensor:
    """Words of 8 rows each -> signed codes, int8 [8W, n]."""
    nibbles = [(word_Wn >> NUM_BITS * nibble) & 15 for nibble in NIBBLE_OF_COLUMN]
    return (torch.stack(nibbles, dim=1).flatten(0, 1) - MIDDLE).to(torch.int8)


def find_awq(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight | None:
    """A weight in AutoAWQ's layout."""
    codes, scale, zeros = tensors.get("qweight"), tensors.get("scales"), tensors.get("qzeros")
    if codes is None or scale is None or len(codes.shape) != 2 or len(scale.shape) != 2 or codes.shape[1] * PER_WORD != scale.shape[1]:
        return None
    version = str(hints.quantization.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"{codes.name} is stored in AutoAWQ's version {version}; only gemm is read")
    (num_columns, _), (num_groups, num_rows) = codes.shape, scale.shape
    fits = num_groups > 0 and num_columns % num_groups == 0 and scale.dtype in {"F16", "BF16"} and codes.dtype == "I32"
    if not fits or (zeros is not None and (zeros.dtype, zeros.shape) != ("I32", (num_groups, codes.shape[1]))):
        raise CheckpointError(f"{codes.name} {list(codes.shape)} and {scale.name} {list(scale.shape)} do not make up a weight of AutoAWQ")
    stored = {"qweight": codes, "scales": scale} | ({} if zeros is None else {"qzeros": zeros})
    return Weight(f"{module}.weight", scale.dtype, (num_rows, num_columns), stored, Awq(num_columns // num_groups, zeros is not None))
