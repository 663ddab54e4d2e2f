"""torch and NumPy, imported when they are first used.

That takes longer than all else which is done with headers alone. Modules take `torch` from here, and names for annotations from torch
itself where only type checkers look:

    from __future__ import annotations

    from streamquant.lazy import torch

    if TYPE_CHECKING:
        from torch import Tensor
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["F", "np", "torch"]


class _Lazy:
    """Stands for a module; has its attributes, and from the first use on its very namespace, so that a use costs nothing more."""

    __slots__ = ("__dict__", "_name")

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = import_module(self._name)
        self.__dict__ = module.__dict__
        return getattr(module, attribute)


if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
else:
    np = _Lazy("numpy")
    torch = _Lazy("torch")
    F = _Lazy("torch.nn.functional")
