"""What compressed-tensors stores: packed and plain integers, NVFP4, MXFP4, MXFP8. FP8 with scales of its own is in fp8.py.

Tensors and their meaning are those of `schemes`; what a header leaves open (bits and groups of packed integers) is in the config.
Older checkpoints may have `weight_g_idx`, I32 [K], the group of each column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import TensorSpec
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs.weight import Hints, InputFormat, Weight, group_of_column
from streamquant.lazy import torch
from streamquant.schemes import SCHEMES, Scheme
from streamquant.schemes.integer import ByteInt, PackedInt
from streamquant.schemes.packing import WORD_BITS
from streamquant.schemes.units import dequantize
from streamquant.stored import DENSE_DTYPES, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

GROUP_INDEX = "weight_g_idx"
UNSET = -1  # in it: groups are runs of columns
SAME_BYTES = {"U8": {"U8", "F8_E8M0"}}


@dataclass(frozen=True, slots=True)
class Compressed(InputFormat):
    """A weight stored as one of our own schemes stores it."""

    stored_by: Scheme
    once: frozenset[str]  # tensors that go with no row
    scattered: bool = False  # groups are given by column

    @property
    def title(self) -> str:
        return f"compressed-tensors {self.stored_by.preset}"

    @property
    def whole(self) -> frozenset[str]:
        return self.once

    @property
    def row_multiple(self) -> int:
        return self.stored_by.row_multiple

    def line(self, role: str, row: int) -> int:
        return self.stored_by.line(role, row)

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        if not self.scattered or bool((stored[GROUP_INDEX] == UNSET).all()):
            return self.stored_by.decode(stored, num_columns)
        code_NK, scales = self.stored_by.unpack(stored, num_columns)
        group = group_of_column(stored[GROUP_INDEX], scales.scale_RC.shape[1])
        zero_NK = 0.0 if scales.zero_RC is None else scales.zero_RC[:, group]
        return (code_NK - zero_NK) * scales.scale_RC[:, group]

    @property
    def scheme(self) -> Scheme | None:
        return None if self.scattered else self.stored_by

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        del num_columns, scheme
        return {role: tensor for role, tensor in stored.items() if role not in self.once}

    def shared(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight_global_scale"].view(1)


@dataclass(frozen=True, slots=True)
class BytesWithZeros(InputFormat):
    """int8 codes with a scale and a zero point, a byte each; `int-quantized`, asymmetric, which we do not write."""

    group_size: int

    @property
    def title(self) -> str:
        return "compressed-tensors int8 with zero points"

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        del num_columns
        scale_RC, zero_RC = stored["weight_scale"].float(), stored["weight_zero_point"].float()
        return dequantize(stored["weight"].float(), scale_RC, zero_RC=zero_RC, unit=(1, self.group_size))


def find_compressed(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight | None:
    """A weight that compressed-tensors stored, but for FP8 with floating point scales."""
    packed, plain, scale = tensors.get("weight_packed"), tensors.get("weight"), tensors.get("weight_scale")
    codes = packed or plain
    if codes is None or scale is None or len(codes.shape) != 2:
        return None
    num_rows, width = codes.shape
    scheme: Scheme | None = None
    match codes.dtype, scale.dtype:
        case "I32", _ if packed is not None:
            return _packed_integers(module, tensors, hints)
        case "U8", "F8_E4M3" if "weight_global_scale" in tensors:
            scheme, shape = SCHEMES["NVFP4A16"], (num_rows, 2 * width)
        case "U8", "U8" | "F8_E8M0" if packed is not None:
            scheme, shape = SCHEMES["MXFP4A16"], (num_rows, 2 * width)
        case "F8_E4M3", "U8" | "F8_E8M0" if width % 32 == 0 and scale.shape == (num_rows, width // 32):
            scheme, shape = SCHEMES["MXFP8A16"], (num_rows, width)
        case "I8", "BF16" | "F16" | "F32" if packed is None:
            return _bytes(module, tensors, hints)
    return None if scheme is None else _weight(module, scheme, shape, "BF16", tensors)


def _packed_integers(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight:
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    said = hints.scheme_of(module)
    if not isinstance(said, PackedInt):
        found = "nothing" if said is None else said.format
        raise CheckpointError(f"{packed.name} holds integers of how many bits? quantization_config in config.json has {found} for it")
    if scale.dtype not in DENSE_DTYPES:
        raise CheckpointError(f"{scale.name} is {scale.dtype}; scales of packed integers are {', '.join(DENSE_DTYPES)}")
    num_columns = packed.shape[1] * WORD_BITS // said.num_bits
    if said.strategy == "group" and len(scale.shape) == 2:
        num_columns = scale.shape[1] * said.group_size
    elif "weight_shape" in tensors:  # the last word of a row may be partly filled
        num_rows, num_columns = hints.shape_of(tensors["weight_shape"])
        if num_rows != packed.shape[0]:
            raise CheckpointError(
                f"{tensors['weight_shape'].name} says {[num_rows, num_columns]}; {packed.name} has {packed.shape[0]} rows"
            )
    num_words = -(-num_columns * said.num_bits // WORD_BITS)
    if num_words != packed.shape[1]:
        raise CheckpointError(
            f"{packed.name} has {packed.shape[1]} words a row; {num_columns} columns of {said.num_bits} bits take {num_words}"
        )
    return _weight(module, said, (packed.shape[0], num_columns), scale.dtype, tensors)


def _bytes(module: str, tensors: Mapping[str, TensorSpec], hints: Hints) -> Weight:
    codes, scale, zeros = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
    num_rows, num_columns = codes.shape
    num_groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    if scale.shape not in {(num_rows,), (num_rows, num_groups)} or num_columns % num_groups:
        raise CheckpointError(f"{scale.name} has shape {list(scale.shape)}, which does not fit int8 codes of {list(codes.shape)}")
    dtype, group_size = hints.dtype_beside(scale.dtype), num_columns // num_groups
    if zeros is not None:
        wanted = (num_rows, num_groups)
        if (zeros.dtype, zeros.shape, scale.shape) != ("I8", wanted, wanted):
            raise CheckpointError(
                f"{zeros.name} is {zeros.dtype} {list(zeros.shape)}; zero points of int8 and their scales are {list(wanted)}"
            )
        stored = {"weight": codes, "weight_scale": scale, "weight_zero_point": zeros}
        return Weight(f"{module}.weight", dtype, (num_rows, num_columns), stored, BytesWithZeros(group_size))
    said = hints.scheme_of(module)
    if not isinstance(said, ByteInt):
        said = ByteInt(preset="int8", num_bits=8, strategy="channel" if num_groups == 1 else "group", group_size=group_size)
    said = dataclasses.replace(said, scale_dtype="float32" if scale.dtype == "F32" else "weight")
    return _weight(module, said, (num_rows, num_columns), dtype, tensors)


def _weight(module: str, scheme: Scheme, shape: tuple[int, int], dtype: str, tensors: Mapping[str, TensorSpec]) -> Weight:
    """The weight, if its tensors are those that `scheme` stores for the shape. Raises CheckpointError if not."""
    try:
        expected = stored_tensors(scheme, shape, dtype)
    except RequestError:  # its groups do not divide this shape
        raise CheckpointError(f"{module} of shape {list(shape)} cannot be stored as {scheme.preset}") from None
    found = {role: tensors[role] for role, _, _ in expected if role in tensors}
    wrong = [
        f"{role} is {_said(found.get(role))}, should be {want_dtype} {list(want_shape)}"
        for role, want_dtype, want_shape in expected
        if role not in found or found[role].shape != want_shape or found[role].dtype not in SAME_BYTES.get(want_dtype, {want_dtype})
    ]
    if wrong:
        raise CheckpointError(f"{module}: {', '.join(wrong)}")
    once = set(scheme.once(shape, torch.bfloat16, torch.ones(1) if scheme.shares_amax else None))
    index = tensors.get(GROUP_INDEX)
    scattered = index is not None
    if index is not None:
        if not isinstance(scheme, PackedInt) or scheme.strategy != "group" or (index.dtype, index.shape) != ("I32", (shape[1],)):
            raise CheckpointError(f"{index.name} is {index.dtype} {list(index.shape)}; the groups of packed integers are I32 [{shape[1]}]")
        found[GROUP_INDEX] = index
        once.add(GROUP_INDEX)
    return Weight(f"{module}.weight", dtype, shape, found, Compressed(scheme, frozenset(once), scattered))


def _said(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
