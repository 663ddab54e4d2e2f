"""MXFP4 as gpt-oss stores its experts.

    *_blocks  U8 [E, N, K/32, 16]; byte k of a block holds columns 2k (low nibble) and 2k + 1
    *_scales  U8 [E, N, K/32]; e8m0

and as DeepSeek-V4 does:

    weight  I8 [N, K/2]
    scale   F8_E8M0 [N, K/32]

Line by line both are the bytes of compressed-tensors' `mxfp4-pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import TensorSpec
from streamquant.inputs.weight import Hints, InputFormat, Weight
from streamquant.lazy import torch
from streamquant.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS = 32
BLOCK_BYTES = 16


@dataclass(frozen=True, slots=True)
class MxFp4Blocks(InputFormat):
    """MXFP4, under whichever names."""

    codes: str = "blocks"
    scales: str = "scales"

    @property
    def title(self) -> str:
        return "MXFP4 blocks"

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        return self.scheme.decode(self.repack(stored, num_columns, self.scheme), num_columns)

    @property
    def scheme(self) -> Scheme:
        return SCHEMES["MXFP4A16"]

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        del num_columns, scheme
        return {"weight_packed": stored[self.codes].view(torch.uint8), "weight_scale": stored[self.scales]}


@dataclass(frozen=True, slots=True)
class MxFp4BlocksTransposed(InputFormat):
    """The transpose of a matrix in MXFP4: a row of it lies along a column of blocks."""

    @property
    def title(self) -> str:
        return "MXFP4 blocks, transposed"

    @property
    def by_columns(self) -> frozenset[str]:
        return frozenset({"blocks", "scales"})

    @property
    def row_multiple(self) -> int:
        return BLOCK_ELEMENTS

    def line(self, role: str, row: int) -> int:
        return row // BLOCK_ELEMENTS * (BLOCK_BYTES if role == "blocks" else 1)

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        lines = {role: tensor.T.contiguous() for role, tensor in stored.items()}
        return MxFp4Blocks().decode(lines, num_columns).T.contiguous()


def find_mxfp4(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight | None:
    """A weight in DeepSeek-V4's MXFP4."""
    del hints
    codes, scale = tensors.get("weight"), tensors.get("scale")
    if codes is None or scale is None or len(codes.shape) != 2 or (codes.dtype, scale.dtype) != ("I8", "F8_E8M0"):
        return None
    num_rows, num_bytes = codes.shape
    if scale.shape != (num_rows, num_bytes // BLOCK_BYTES) or num_bytes % BLOCK_BYTES:
        return None
    return Weight(f"{module}.weight", "BF16", (num_rows, 2 * num_bytes), {"weight": codes, "scale": scale}, MxFp4Blocks("weight", "scale"))
