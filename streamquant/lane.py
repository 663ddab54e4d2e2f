"""Lanes: what each worker computes on, with the memory to read into, the way to the device and the way back.

On a CPU that is nearly nothing: what was read is computed on where it is. On a GPU a worker does one block at a time, and waits for it: it
reads into page-locked memory, has the block copied to the GPU, the kernels run and their results copied back, and writes those. All of
this overlaps because there are several workers (`memory.LANES_PER_GPU`), each with a stream of its own: the order within a stream binds
no other stream, and a GPU has an engine for each direction of copies besides its processors. So while one worker's block is on the way in,
another's is encoded, a third's is on the way out, and a fourth worker reads or writes a file.

Copies are asynchronous only from and to page-locked memory, which is slow to get; each lane has as much as the plan says, used again
and again. What does not fit into it is copied from ordinary memory, which CUDA has read when the call returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from streamquant.errors import RequestError
from streamquant.inputs.weight import Allocate
from streamquant.lazy import torch
from streamquant.memory import Memory
from streamquant.schemes.packing import flat

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 256


class Lane:
    """A lane on the CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def running(self) -> AbstractContextManager[None]:
        """In it, what the calling thread computes is done by this lane."""
        return nullcontext()

    def buffer(self, role: str, num_bytes: int) -> Tensor:
        """Memory for this role, used again and again."""
        buffer = self._buffers.get(role)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._buffers[role] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes]

    def memory_to_read(self) -> Allocate:
        """Memory for what is read at a time, which may overwrite what was read before."""
        return self.buffer

    def keeping(self, num_bytes: int) -> Keeping:
        """For blocks that stay on the device together; those of the call before go."""
        # One piece, used again and again: blocks kept one by one between temporaries would tear the heap apart.
        return _HostKeeping(_Arena(self.buffer("kept", num_bytes)))

    def to_device(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What was read, where it is computed on. Good until `memory_to_read` is called again."""
        return stored

    def to_host(self, stored: Mapping[str, Tensor]) -> Mapping[str, memoryview]:
        """The bytes of results. Good until the next call."""
        return {suffix: _bytes(tensor) for suffix, tensor in stored.items()}


class Keeping(Protocol):
    """Blocks that stay on a device together."""

    def memory_to_read(self) -> Allocate:
        """Memory to read a block into that is kept as it is."""

    def keep(self, weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """A block that something else may overwrite, kept in `dtype`."""


class _HostKeeping:
    """Blocks stay where they were read; decoded ones are copied."""

    def __init__(self, arena: _Arena):
        self._arena = arena

    def memory_to_read(self) -> Allocate:
        return lambda _, num_bytes: self._arena.take(num_bytes)

    def keep(self, weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
        piece = self._arena.take(weight_NK.numel() * dtype.itemsize)
        return piece.view(dtype).view(weight_NK.shape).copy_(weight_NK)


class _CudaKeeping:
    """Blocks stay in the memory of the GPU, where each has its own."""

    def __init__(self, lane: CudaLane):
        self._lane = lane

    def memory_to_read(self) -> Allocate:
        return self._lane.memory_to_read()

    def keep(self, weight_NK: Tensor, dtype: torch.dtype) -> Tensor:
        return weight_NK.to(dtype)


class CudaLane(Lane):
    """A lane on a GPU: a stream, and page-locked memory to read into and to write from. `cuda` is torch.cuda."""

    def __init__(self, device: torch.device, *, to_read: Tensor, to_write: Tensor, cuda: Any):
        super().__init__(device)
        self._cuda, self._stream = cuda, cuda.Stream(device)
        # Threads that wait for an event leave the processor to others, instead of asking on and on.
        self._copied_in, self._copied_out = cuda.Event(blocking=True), cuda.Event(blocking=True)
        self._to_read, self._to_write = _Arena(to_read), _Arena(to_write)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._cuda.stream(self._stream):
            try:
                yield
            except torch.OutOfMemoryError:
                raise RequestError(f"{self.device} has no memory left, which others may use as well; give --max-gpu-memory less") from None

    def memory_to_read(self) -> Allocate:
        self._copied_in.synchronize()
        self._to_read.clear()
        return lambda _, num_bytes: self._to_read.take(num_bytes)

    def keeping(self, num_bytes: int) -> Keeping:
        del num_bytes
        return _CudaKeeping(self)

    def to_device(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        copies = {role: torch.empty_like(tensor, device=self.device) for role, tensor in stored.items()}
        for role, tensor in stored.items():
            self._copy(tensor, copies[role])
        self._copied_in.record(self._stream)
        return copies

    def to_host(self, stored: Mapping[str, Tensor]) -> Mapping[str, memoryview]:
        self._to_write.clear()
        lines = {suffix: flat(tensor).view(torch.uint8) for suffix, tensor in stored.items() if tensor.device == self.device}
        copies = {suffix: self._to_write.take(len(line)) for suffix, line in lines.items()}
        for suffix, line in lines.items():
            self._copy(line, copies[suffix])
        self._copied_out.record(self._stream)
        self._copied_out.synchronize()
        return {suffix: _bytes(copies.get(suffix, tensor)) for suffix, tensor in stored.items()}

    def _copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)


class _Arena:
    """A piece of memory, handed out in parts."""

    def __init__(self, memory: Tensor):
        self._memory, self._taken = memory, 0

    def take(self, num_bytes: int) -> Tensor:
        """So many bytes, of other memory if not as many are left."""
        start, end = self._taken, self._taken + num_bytes
        if end > len(self._memory):
            return torch.empty(num_bytes, dtype=torch.uint8)
        self._taken = -(-end // ALIGNMENT) * ALIGNMENT
        return self._memory[start:end]

    def clear(self) -> None:
        """Take all parts back."""
        self._taken = 0


def make_lanes(devices: Sequence[torch.device], memory: Memory) -> list[Lane]:
    """A lane for each worker, on each of the devices in turn."""
    return [_lane(devices[number % len(devices)], memory) for number in range(memory.num_workers)]


def _lane(device: torch.device, memory: Memory) -> Lane:
    if device.type == "cpu":
        return Lane(device)
    to_read, to_write = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in (memory.to_gpu_bytes, memory.from_gpu_bytes))
    return CudaLane(device, to_read=to_read, to_write=to_write, cuda=torch.cuda)


def _bytes(tensor: Tensor) -> memoryview:
    return flat(tensor).view(torch.uint8).numpy().data
