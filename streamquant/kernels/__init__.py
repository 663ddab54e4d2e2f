"""Kernels for particular hardware, with the same bits as the reference in `schemes/kernels.py`."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from streamquant.errors import RequestError
from streamquant.schemes.kernels import TORCH, Kernels

if TYPE_CHECKING:
    import torch

KERNELS = ("auto", "torch", "numba", "triton")
MADE_FOR = {"numba": "cpu", "triton": "cuda"}
REMEDIES = {"numba": "pip install 'streamquant[fast]'", "triton": "it comes with torch for CUDA"}
LOGGER = logging.getLogger("streamquant")


def find_kernels(name: str, *devices: torch.device) -> Kernels:
    """The kernels of this name for devices of one type; "auto" takes those made for it where their package is installed and works.

    Raises RequestError for an unknown name, and for kernels that are not there or do not work.
    """
    if name not in KERNELS:
        raise RequestError(f"unknown kernels {name!r}; known are {', '.join(KERNELS)}")
    if name == "torch":
        return TORCH
    if name == "auto":
        made = next((each for each, kind in MADE_FOR.items() if kind == devices[0].type), None)
        if made is None:
            return TORCH
        if find_spec(made) is None:
            LOGGER.info("torch computes; %s would be several times as fast: %s", made, REMEDIES[made])
            return TORCH
        try:
            return _load(made, devices)
        except RequestError as error:
            LOGGER.warning("%s", error, extra={"event": "warning"})
            return TORCH
    if devices[0].type != MADE_FOR[name]:
        made_for = {"cpu": "the CPU", "cuda": "GPUs"}[MADE_FOR[name]]
        raise RequestError(f"kernels {name} are for {made_for}, not for {devices[0]}; use --kernels auto")
    if find_spec(name) is None:
        raise RequestError(f"kernels {name} need the package {name}: {REMEDIES[name]}, or use --kernels torch")
    return _load(name, devices)


def _load(name: str, devices: tuple[torch.device, ...]) -> Kernels:
    # Imported here, since they are optional and take half a second.
    if name == "numba":
        from streamquant.kernels.compiled import CompiledKernels

        return CompiledKernels()
    from streamquant.kernels.fused import TritonKernels

    kernels = TritonKernels()
    for device in devices:
        if fault := kernels.fault(device):
            raise RequestError(f"kernels triton do not work on {device}: {fault}; --kernels torch gives the same bytes")
    return kernels
