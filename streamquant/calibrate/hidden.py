"""What flows between layers: the hidden states of all samples, in memory up to a budget and in a file past it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

ALIGNED = 32  # elements: products are rounded otherwise where a batch does not begin at a whole vector


class HiddenStates:
    """Tensors [B, T, H], one for each batch, which a layer overwrites with what it gives the next one."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], *, dtype: torch.dtype, max_bytes: int, file: Path):
        """In `file`, which is not kept, if they take more than `max_bytes`; its pages the kernel writes out and drops as it needs."""
        sizes = [-(-math.prod(shape) // ALIGNED) * ALIGNED for shape in shapes]
        self.in_file = sum(sizes) * dtype.itemsize > max_bytes
        if self.in_file:
            memory = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
            file.unlink()  # stays until the memory is freed, and not after a kill
        else:
            memory = torch.empty(sum(sizes), dtype=dtype)
        self._batches: list[Tensor] = [
            part[: math.prod(shape)].view(shape) for part, shape in zip(torch.split(memory, sizes), shapes, strict=True)
        ]

    def get(self, batch: int, device: torch.device) -> Tensor:
        """The hidden states of a batch."""
        return self._batches[batch].to(device)

    def put(self, batch: int, hidden_BTH: Tensor) -> None:
        """Put new ones in their place."""
        self._batches[batch].copy_(hidden_BTH)
