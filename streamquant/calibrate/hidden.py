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
    """Tensors [B, T, H], one for each batch: what a layer is given, and what it gives the next one in their place."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], *, dtype: torch.dtype, max_bytes: int, file: Path, twice: bool = False):
        """In `file`, which is not kept, if they take more than `max_bytes`; its pages the kernel writes out and drops as it needs.

        `twice`: what a layer is given stays until `advance`, beside what it gives. Else that overwrites it.
        """
        sizes = [-(-math.prod(shape) // ALIGNED) * ALIGNED for shape in shapes] * (1 + twice)
        self.in_file = sum(sizes) * dtype.itemsize > max_bytes
        if self.in_file:
            memory = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
            file.unlink()  # stays until the memory is freed, and not after a kill
        else:
            memory = torch.empty(sum(sizes), dtype=dtype)
        parts = zip(torch.split(memory, sizes), [*shapes, *shapes], strict=False)
        batches = [part[: math.prod(shape)].view(shape) for part, shape in parts]
        self._inputs, self._outputs = batches[: len(shapes)], batches[-len(shapes) :]

    def get(self, batch: int, device: torch.device) -> Tensor:
        """What the layer is given of a batch."""
        return self._inputs[batch].to(device)

    def put(self, batch: int, hidden_BTH: Tensor) -> None:
        """What it gives."""
        self._outputs[batch].copy_(hidden_BTH)

    def advance(self) -> None:
        """What the layer has given is what the next one is given."""
        self._inputs, self._outputs = self._outputs, self._inputs
