"""Memory that is freed goes back to the system: matrices of many sizes leave holes in glibc's heap, and with each layer more is held.

Where the C library is another, nothing is done.
"""

import ctypes
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAPPED_BYTES = 16 << 20  # every new page is zeroed: with 1 MiB layers of small models took 1.4 times as long

NEVER = (1 << 31) - 1


def map_large_blocks() -> None:
    """Have blocks of MAPPED_BYTES and more mapped, for the rest of the process; by itself glibc takes up to 32 MiB from its heap."""
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
