"""Kernels for particular hardware, with the same bits as the reference in `schemes/kernels.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from streamquant.errors import RequestError
from streamquant.schemes.kernels import TORCH, Kernels

if TYPE_CHECKING:
    import torch

KERNELS = ("auto", "torch", "numba")


def find_kernels(name: str, device: torch.device) -> Kernels:
    """The kernels of this name for a device; "auto" takes compiled ones where their package is installed.

    Raises RequestError for an unknown name, and for kernels that are not there.
    """
    if name not in KERNELS:
        raise RequestError(f"unknown kernels {name!r}; known are {', '.join(KERNELS)}")
    has_numba = find_spec("numba") is not None
    if name == "torch" or (name == "auto" and not (has_numba and device.type == "cpu")):
        return TORCH
    if device.type != "cpu":
        raise RequestError(f"kernels {name} are for the CPU, not for {device}; use --kernels auto")
    if not has_numba:
        raise RequestError("kernels numba need the package numba: pip install 'streamquant[fast]', or use --kernels torch")
    from streamquant.kernels.compiled import CompiledKernels  # here, since numba is optional and takes half a second

    return CompiledKernels()
