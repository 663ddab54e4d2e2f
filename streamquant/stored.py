"""Dtypes of files as dtypes of torch, and which tensors a scheme stores for a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from streamquant.checkpoint.header import tensor_bytes
from streamquant.lazy import torch
from streamquant.schemes import Scheme

if TYPE_CHECKING:
    from torch import Tensor

NAMES_IN_TORCH: Mapping[str, str] = MappingProxyType({
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool",
})  # fmt: skip
NAMES_IN_FILES: Mapping[str, str] = MappingProxyType({f"torch.{theirs}": ours for ours, theirs in NAMES_IN_TORCH.items()})
DENSE_DTYPES = ("BF16", "F16", "F32")  # of weights that can be quantized
MAX_SAMPLE_ELEMENTS = 1 << 23  # a row of blocks of 65,536 columns


class _TorchDtypes(dict[str, "torch.dtype"]):
    """Looks a dtype up in torch when it is first asked for: names alone need no torch."""

    def __missing__(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, NAMES_IN_TORCH[name])
        self[name] = dtype
        return dtype


TORCH_DTYPES: Mapping[str, torch.dtype] = _TorchDtypes()


@lru_cache(maxsize=4096)
def stored_tensors(scheme: Scheme, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(last part of the name, dtype, shape) of what `scheme` stores for a weight, from its encoder run on its first rows as zeros."""
    num_rows = min(shape[0], scheme.row_multiple)
    # The first operation on the meta device imports torch's compiler, which takes longer than torch: only for what is too wide to hold.
    device = "cpu" if num_rows * shape[1] <= MAX_SAMPLE_ELEMENTS else "meta"
    rows_NK = torch.zeros((num_rows, shape[1]), dtype=TORCH_DTYPES[dtype], device=device)
    shared = torch.ones(1, device=device) if scheme.shares_amax else None
    by_rows = replace(scheme, observer="minmax").encode(rows_NK, shared=shared)
    once = scheme.once(shape, TORCH_DTYPES[dtype], shared)
    return (
        *((suffix, dtype_name(block), (scheme.line(suffix, shape[0]), *block.shape[1:])) for suffix, block in by_rows.items()),
        *((suffix, dtype_name(tensor), tuple(tensor.shape)) for suffix, tensor in once.items()),
    )


@lru_cache(maxsize=4096)
def measured_tensors(scheme: Scheme, dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """The same of what it stores of the inputs of a weight, which only a calibration can know."""
    scales = scheme.input_scales(torch.ones(1), TORCH_DTYPES[dtype]) if scheme.needs_data else {}
    return tuple([(suffix, dtype_name(tensor), tuple(tensor.shape)) for suffix, tensor in scales.items()])


def dtype_name(tensor: Tensor) -> str:
    """The name that the dtype of a tensor has in a file."""
    return NAMES_IN_FILES[str(tensor.dtype)]


@lru_cache(maxsize=4096)
def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: str) -> int:
    """Bytes of what `scheme` stores for a weight and its inputs."""
    tensors = (*stored_tensors(scheme, shape, dtype), *measured_tensors(scheme, dtype))
    return sum(tensor_bytes(stored_dtype, stored_shape) for _, stored_dtype, stored_shape in tensors)
