"""Dtypes of files as dtypes of torch, and which tensors a scheme stores for a weight."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType

import torch

from streamquant.checkpoint.header import tensor_bytes
from streamquant.schemes import Scheme

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool,
})  # fmt: skip
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})
DENSE_DTYPES = ("BF16", "F16", "F32")  # of weights that can be quantized
MAX_SAMPLE_ELEMENTS = 1 << 23  # a row of blocks of 65,536 columns


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
        *((suffix, DTYPE_NAMES[block.dtype], (scheme.line(suffix, shape[0]), *block.shape[1:])) for suffix, block in by_rows.items()),
        *((suffix, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in once.items()),
    )


@lru_cache(maxsize=4096)
def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: str) -> int:
    """Bytes of what `scheme` stores for a weight."""
    return sum(tensor_bytes(stored_dtype, stored_shape) for _, stored_dtype, stored_shape in stored_tensors(scheme, shape, dtype))
