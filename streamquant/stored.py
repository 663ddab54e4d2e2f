"""Dtypes of files as dtypes of torch, and which tensors a scheme stores for a weight."""

from collections.abc import Mapping
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


@lru_cache(maxsize=4096)
def stored_tensors(scheme: Scheme, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(last part of the name, dtype, shape) of what `scheme` stores for a weight, from its encoder run on shapes alone."""
    weight_NK = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
    stored = scheme.encode_whole(weight_NK)
    return tuple((suffix, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in stored.items())


@lru_cache(maxsize=4096)
def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: str) -> int:
    """Bytes of what `scheme` stores for a weight."""
    return sum(tensor_bytes(stored_dtype, stored_shape) for _, stored_dtype, stored_shape in stored_tensors(scheme, shape, dtype))
