"""Memory that nobody uses goes back to the system, so that no layer finds less of it than the one before.

Matrices of many sizes leave holes in glibc's heap (where the C library is another, nothing is done), and libraries keep a kernel for each
shape of a product, of which experts, given another number of tokens in each batch, make hundreds.
"""

import ctypes
import os
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAPPED_BYTES = 16 << 20  # every new page is zeroed: with 1 MiB layers of small models took 1.4 times as long

NEVER = (1 << 31) - 1  # bytes at the end of the heap from which on `free` gives them back

KEPT_KERNELS = 32  # more than a layer has shapes of products, without experts
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # of ideep and oneDNN: by themselves 1024 of 0.3 MB, in bfloat16


def keep_few_kernels() -> None:
    """Have libraries forget kernels that they made for one shape. They ask for it once, when they first make one."""
    for variable in KERNEL_CACHES:
        os.environ.setdefault(variable, str(KEPT_KERNELS))


def map_large_blocks() -> None:
    """Have blocks of MAPPED_BYTES and more mapped, for the rest of the process; by itself glibc takes up to 32 MiB from its heap.

    With that set `free` gives back whatever is above 128 KiB, as every matrix is; that is left to `give_back`.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def give_back() -> None:
    """Give whatever pages of the heap nobody uses back to the system."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):
        return None
