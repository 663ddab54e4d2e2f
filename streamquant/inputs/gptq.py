"""Integer weights as AutoGPTQ and GPTQModel store them.

    qweight  I32 [K*bits/32, N]; word row j holds, from the low bits up, columns of the weight one after another
    qzeros   I32 [groups, N*bits/32]; zero points, less 1 in `checkpoint_format` "gptq", as they are in "gptq_v2"
    scales   F16 or BF16 [groups, N]
    g_idx    I32 [K]: the group of each column; absent where that is k // group size

weight[n, k] = (code - zero) * scale of the group of k. Transposed, qweight is the bit stream of pack-quantized (packing.py).
Source: AutoGPTQ, `nn_modules/qlinear`; GPTQModel, `utils/model.py` for the second format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import TensorSpec
from streamquant.errors import CheckpointError
from streamquant.inputs.weight import Hints, InputFormat, Weight, group_of_column
from streamquant.lazy import torch
from streamquant.schemes import Scheme
from streamquant.schemes.integer import PackedInt
from streamquant.schemes.packing import WORD_BITS, unpack_int32
from streamquant.schemes.units import Scales, dequantize
from streamquant.stored import DENSE_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class Gptq(InputFormat):
    """GPTQ's integers, a scale and a zero point for each group of columns."""

    num_bits: int
    group_size: int
    symmetric: bool
    in_order: bool  # the groups are runs of columns
    zero_offset: int  # what was subtracted from the stored zero points

    @property
    def title(self) -> str:
        order = "" if self.in_order else ", columns in the order of their activations"
        return f"GPTQ int{self.num_bits}, groups of {self.group_size}{order}"

    @property
    def by_columns(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales"})

    @property
    def whole(self) -> frozenset[str]:
        return frozenset({"g_idx"})

    @property
    def row_multiple(self) -> int:
        return WORD_BITS // math.gcd(WORD_BITS, self.num_bits)

    def line(self, role: str, row: int) -> int:
        return row * self.num_bits // WORD_BITS if role == "qzeros" else row

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        code_NK, scales = self._unpack(stored, num_columns)
        assert scales.zero_RC is not None
        if "g_idx" not in stored:
            return dequantize(code_NK.float(), scales.scale_RC, zero_RC=scales.zero_RC, unit=(1, self.group_size))
        group = group_of_column(stored["g_idx"], scales.scale_RC.shape[1])
        return (code_NK.float() - scales.zero_RC[:, group]) * scales.scale_RC[:, group]

    @property
    def scheme(self) -> Scheme | None:
        if not self.in_order:
            return None
        return PackedInt(preset=self.title, num_bits=self.num_bits, group_size=self.group_size, symmetric=self.symmetric)

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        code_NK, scales = self._unpack(stored, num_columns)
        zero_RC = scales.zero_RC
        assert zero_RC is not None
        if "g_idx" in stored and not torch.equal(stored["g_idx"].view(-1).long(), torch.arange(num_columns) // self.group_size):
            raise CheckpointError("g_idx scatters the columns of groups, though config.json says desc_act is false; correct config.json")
        if self.symmetric and bool((zero_RC != 0).any()):
            raise CheckpointError("qzeros are not all in the middle, though config.json says sym is true; correct config.json")
        if bool((zero_RC >= 1 << (self.num_bits - 1)).any()):
            raise CheckpointError(f"zero point {1 << self.num_bits} does not fit {self.num_bits} bits; unpack it with --scheme FP16 first")
        return scheme.pack(code_NK, scales._replace(zero_RC=None) if self.symmetric else scales)

    def _unpack(self, stored: Mapping[str, Tensor], num_columns: int) -> tuple[Tensor, Scales]:
        """Signed codes, and scales with signed zero points."""
        scale_RC = stored["scales"].contiguous()
        zero_RC = unpack_int32(stored["qzeros"].T.contiguous(), self.num_bits, len(scale_RC)).T.float() + self.zero_offset
        return unpack_int32(stored["qweight"].contiguous(), self.num_bits, num_columns), Scales(scale_RC, scale_RC.float(), zero_RC)


def find_gptq(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight | None:
    """A weight in GPTQ's layout."""
    codes, scale, zeros = tensors.get("qweight"), tensors.get("scales"), tensors.get("qzeros")
    if codes is None or scale is None or zeros is None:
        return None
    said, order = hints.quantization, tensors.get("g_idx")
    checkpoint_format = said.get("checkpoint_format", "gptq")
    if said.get("quant_method") != "gptq" or not isinstance(checkpoint_format, str) or checkpoint_format not in ZERO_OFFSETS:
        raise CheckpointError(
            f"{codes.name} looks like GPTQ, but how zero points are stored is not known: quantization_config in config.json should have "
            f"quant_method gptq, checkpoint_format {' or '.join(ZERO_OFFSETS)}, and has {said.get('quant_method')}, {checkpoint_format}"
        )
    words = (codes.dtype, zeros.dtype, "I32" if order is None else order.dtype)
    if any(len(spec.shape) != 2 for spec in (codes, scale, zeros)) or words != ("I32",) * 3 or scale.dtype not in DENSE_DTYPES:
        raise CheckpointError(f"{codes.name}, {scale.name} and {zeros.name} do not make up a weight of GPTQ")
    num_groups, num_rows = scale.shape
    num_bits = zeros.shape[1] * WORD_BITS // num_rows
    num_columns = codes.shape[0] * WORD_BITS // max(num_bits, 1)
    fits = (
        num_bits in {2, 3, 4, 8}
        and zeros.shape == (num_groups, num_rows * num_bits // WORD_BITS)
        and codes.shape == (num_columns * num_bits // WORD_BITS, num_rows)
        and num_rows % (WORD_BITS // math.gcd(WORD_BITS, num_bits)) == 0
        and num_columns % num_groups == 0
        and (order is None or order.shape == (num_columns,))
    )
    if not fits:
        raise CheckpointError(
            f"{codes.name} {list(codes.shape)}, {zeros.name} {list(zeros.shape)} and {scale.name} {list(scale.shape)} "
            "do not make up a weight of GPTQ"
        )
    stored = {"qweight": codes, "qzeros": zeros, "scales": scale} | ({} if order is None else {"g_idx": order})
    form = Gptq(
        num_bits,
        num_columns // num_groups,
        symmetric=said.get("sym") is True,
        in_order=order is None or said.get("desc_act") is False,
        zero_offset=ZERO_OFFSETS[checkpoint_format],
    )
    return Weight(f"{module}.weight", scale.dtype, (num_rows, num_columns), stored, form)
