"""How the memory budget is spent: blocks of rows, workers, and what may be kept between two passes.

The budget is for working memory. What a conversion takes in all, which a container must allow, is

    what the process has once it has planned
    + the working memory, half as much again because a heap that several threads use is never full
    + RESERVE_BYTES
    + BOOKKEEPING_BYTES for every tensor of the output

With GPUs that is memory of the host: page-locked, for a block on the way in and one on the way out in each worker. What is computed
has a budget of its own on each GPU.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamquant.container import cpu_limit, memory_limit, process_memory
from streamquant.errors import RequestError
from streamquant.inputs import Weight
from streamquant.lazy import torch
from streamquant.plan import Encode, Plan
from streamquant.schemes import Scheme
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.observers import OBSERVERS
from streamquant.sizes import MEBIBYTE, enough_mebibytes

BLOCK_ELEMENTS = 1 << 18  # operations of torch on them about fit a 2 MB L2 cache
BATCH_BLOCKS = 8  # of small weights that a task reads; they are computed on a block at a time
SMALL_PART = 8  # weights of this part of a batch are small: calls would take longer than computing
MAX_PLAIN_BYTES = 4  # of an element that is stored as it is
GPU_BLOCK_ELEMENTS = 1 << 23  # a task of bfloat16: enough to hide what starting kernels costs
MIN_GPU_BLOCK_ELEMENTS = 1 << 20
# For each element of a block: the temporaries of the reference (40), to which other kernels leave some weights, what a search has for
# groups of 16 (22), and half as much again, which an allocator loses that cuts memory into pieces.
GPU_WORKING_BYTES = 96
LANES_PER_GPU = 4  # workers: one that reads, one that writes, one for each direction of the bus; more if there are processors for them
MAX_GPU_KEEP_BYTES = 1 << 30
COPY_BYTES = 8 << 20
PAGE_BYTES = 4096
MAX_KEEP_BYTES = 64 << 20  # reading again is nearly as fast from there on; searching again is not, so searches keep twice as much
MIN_READ_BYTES = 1 << 20
MAX_READ_BYTES = 16 << 20
MIN_READ_AHEAD_BYTES = 4 << 20
MAX_READ_AHEAD_BYTES = 256 << 20
# Pages of files, the code of torch before all, and what the allocator has to begin with. With 40 MB beside the anonymous memory a
# conversion that takes half a minute took two, with 30 it stood still.
RESERVE_BYTES = 128 << 20
BOOKKEEPING_BYTES = 2500  # tasks that wait for the next shard, and what verify knows of the output
SPARE_BYTES = 8 << 20  # more than two runs differ by, in what is said to work


class Memory(NamedTuple):
    """Working memory of a conversion, on top of the interpreter."""

    num_workers: int
    block_elements: int  # of weights that are decoded
    plain_block_elements: int  # of those that are stored as they are
    batch_elements: int  # of small weights that a task takes; 0 if none is to take several
    keep_bytes: int  # per worker: weights that share a scale are read once up to this, larger ones twice
    read_bytes: int  # per worker: what is read at a time of weights that are no plain tensors; 0 if there are none
    peak_bytes: int  # predicted
    read_ahead_bytes: int = 0  # what is fetched of a remote source before it is needed
    limit_bytes: int | None = None  # what the container allows for this and all else
    to_gpu_bytes: int = 0  # per worker: page-locked, to read into
    from_gpu_bytes: int = 0  # per worker: page-locked, to write from
    gpu_peak_bytes: int = 0  # predicted, of each GPU


class Gpus(NamedTuple):
    """Several alike, or the memory that all have."""

    num_gpus: int
    max_bytes: int  # of each, for work


@dataclass(frozen=True, slots=True)
class Container:
    """The memory that the container allows, and how much of it is not for work."""

    limit_bytes: int
    used_bytes: int  # by the process when it has planned
    reserve_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is left for work."""
        return self.limit_bytes - self.used_bytes - self.reserve_bytes

    @property
    def working_bytes(self) -> int:
        """The largest working memory that fits."""
        return self.free_bytes * 2 // 3

    def refusal(self, needed_bytes: int, what: str) -> str:
        """Says that so much more does not fit, and which limit would do."""
        enough = self.used_bytes + self.reserve_bytes + needed_bytes + SPARE_BYTES
        return (
            f"the container's memory limit of {self.limit_bytes // MEBIBYTE}MiB is too small for {what}: "
            f"{enough_mebibytes(self.used_bytes)} are in use, {enough_mebibytes(needed_bytes)} would be for the work and "
            f"{enough_mebibytes(self.reserve_bytes)} for pages of files and bookkeeping; a limit of {enough_mebibytes(enough)} works"
        )


def container_for(plan: Plan, *, devices: Sequence[torch.device]) -> Container | None:
    """What the container allows for this plan, once it is made; None if it does not limit memory."""
    limit = memory_limit()
    if limit is None:
        return None
    for device in devices:
        torch.empty(1, device=device)  # starts CUDA, so that what that takes of the host's memory is in use
    num_outputs = sum(len(step.outputs) for step in plan.steps)
    return Container(limit, process_memory().anonymous, RESERVE_BYTES + num_outputs * BOOKKEEPING_BYTES)


def budget_memory(
    plan: Plan,
    *,
    max_bytes: int,
    num_workers: int,
    kernels: Kernels = TORCH,
    is_remote: bool = False,
    container: Container | None = None,
    may_shrink: bool = False,
) -> Memory:
    """Fit the work into `max_bytes`, or less if it `may_shrink` to what the container allows, with at most `num_workers` workers.

    Raises RequestError naming the smallest budget that works if even one worker needs more, and the smallest limit that works if the
    container does not allow it.
    """
    searches = any(isinstance(step, Encode) and OBSERVERS[step.scheme.observer] for step in plan.steps)
    working_bytes = kernels.working_bytes + kernels.search_bytes * searches
    plain_block_elements = BLOCK_ELEMENTS * TORCH.working_bytes // kernels.working_bytes
    block_bytes, culprit = COPY_BYTES, ""
    reads_parts = False
    smallest = sys.maxsize
    for step in plan.steps:
        if isinstance(step, Encode):
            if not step.scheme.shares_amax:
                smallest = min(smallest, sum(member.weight.num_elements for member in step.members))
            for member in step.members:
                num_rows, num_columns = member.weight.shape
                reads_parts = reads_parts or not member.weight.is_plain
                elements, per_element = (
                    (plain_block_elements, working_bytes) if member.weight.is_plain else (BLOCK_ELEMENTS, TORCH.working_bytes)
                )
                rows = max(elements // max(num_columns, 1), row_multiple(member.weight, step.scheme))
                if min(rows, num_rows) * num_columns * per_element > block_bytes:
                    block_bytes, culprit = min(rows, num_rows) * num_columns * per_element, member.weight.name
    read_bytes = MIN_READ_BYTES if reads_parts else 0
    needed = block_bytes + 2 * read_bytes  # as read, and turned if its rows are columns
    ahead = max(block_bytes // 4, MIN_READ_AHEAD_BYTES) if is_remote else 0  # a block fits a fraction of it, also in float32
    max_bytes = _allowed(needed + ahead, culprit, max_bytes, container, may_shrink=may_shrink)
    if is_remote:
        ahead = min(max(max_bytes // 4, ahead), MAX_READ_AHEAD_BYTES, max_bytes - needed)
    num_workers = max(min(num_workers, (max_bytes - ahead) // needed), 1)
    left = (max_bytes - ahead) // num_workers - block_bytes
    stack_bytes = plain_block_elements * working_bytes
    batch_elements = (
        0 if is_remote else min(BATCH_BLOCKS * plain_block_elements, max(block_bytes + left - stack_bytes, 0) // MAX_PLAIN_BYTES)
    )
    batch_bytes = stack_bytes + batch_elements * MAX_PLAIN_BYTES if smallest <= batch_elements // SMALL_PART else 0
    if reads_parts:
        read_bytes = max(min(left // 4, MAX_READ_BYTES), MIN_READ_BYTES)
    keep_bytes = min(left - 2 * read_bytes, MAX_KEEP_BYTES * (1 + searches))
    keep_bytes = keep_bytes * 4 // 5  # the rest holds what was observed of the weights
    peak_bytes = num_workers * (max(block_bytes, batch_bytes) + 2 * read_bytes + _kept(plan, keep_bytes) * 5 // 4) + ahead
    _require_room(peak_bytes, needed + ahead, max_bytes, container)
    limit_bytes = None if container is None else container.limit_bytes
    return Memory(num_workers, BLOCK_ELEMENTS, plain_block_elements, batch_elements, keep_bytes, read_bytes, peak_bytes, ahead, limit_bytes)


def budget_gpu_memory(
    plan: Plan,
    *,
    max_bytes: int,
    num_workers: int,
    gpus: Gpus,
    is_remote: bool = False,
    container: Container | None = None,
    may_shrink: bool = False,
) -> Memory:
    """The same with GPUs, within the memory of each of them, too: the largest blocks of which enough are in work at a time.

    Raises RequestError as well if the GPUs have too little memory for a block.
    """
    kinds = _kinds(plan)
    read_bytes = 0 if all(kind.is_plain for kind in kinds) else MAX_READ_BYTES
    smallest = _largest_block(kinds, MIN_GPU_BLOCK_ELEMENTS, read_bytes)
    ahead = max(4 * smallest.to_gpu_bytes, MIN_READ_AHEAD_BYTES) if is_remote else 0
    max_bytes = _allowed(smallest.host_bytes + ahead, smallest.culprit, max_bytes, container, may_shrink=may_shrink)
    if smallest.gpu_bytes > gpus.max_bytes:
        what = f"{smallest.culprit}: its smallest block takes {smallest.gpu_bytes} bytes of a GPU's memory"
        raise RequestError(f"{what}, and there are {gpus.max_bytes} for it; give --max-gpu-memory {smallest.gpu_bytes}, or --device cpu")
    if is_remote:
        ahead = min(max(max_bytes // 4, ahead), MAX_READ_AHEAD_BYTES, max_bytes - smallest.host_bytes)
    elements, enough = 2 * GPU_BLOCK_ELEMENTS, min(num_workers, LANES_PER_GPU * gpus.num_gpus)
    lanes = 0
    while lanes < enough and elements > MIN_GPU_BLOCK_ELEMENTS:
        elements //= 2
        block = _largest_block(kinds, elements, read_bytes)
        lanes = min((max_bytes - ahead) // block.host_bytes, gpus.max_bytes // block.gpu_bytes * gpus.num_gpus)
    num_workers = min(num_workers, lanes)
    lanes_of_gpu = -(-num_workers // gpus.num_gpus)
    keep_bytes = min((gpus.max_bytes // lanes_of_gpu - block.gpu_bytes) * 4 // 5, MAX_GPU_KEEP_BYTES)
    peak_bytes = num_workers * block.host_bytes + ahead
    _require_room(peak_bytes, smallest.host_bytes + ahead, max_bytes, container)
    limit_bytes = None if container is None else container.limit_bytes
    return Memory(
        num_workers, elements, elements, 0 if is_remote else elements, keep_bytes, read_bytes, peak_bytes, ahead, limit_bytes,
        to_gpu_bytes=block.to_gpu_bytes, from_gpu_bytes=block.from_gpu_bytes,
        gpu_peak_bytes=lanes_of_gpu * (block.gpu_bytes + _kept(plan, keep_bytes) * 5 // 4),
    )  # fmt: skip


class _Kind(NamedTuple):
    """What decides the size of a weight's blocks."""

    shape: tuple[int, int]
    row_multiple: int
    is_plain: bool
    read_bytes: int
    stored_bytes: int


class _Block(NamedTuple):
    """What a block takes at most, of any weight."""

    to_gpu_bytes: int  # powers of two, which is what page-locked memory comes in
    from_gpu_bytes: int
    host_bytes: int
    gpu_bytes: int
    culprit: str  # the weight with the largest


def _kinds(plan: Plan) -> dict[_Kind, str]:
    """The kinds of weights to encode, with the name of one of them."""
    kinds: dict[_Kind, str] = {}
    for step in plan.steps:
        if isinstance(step, Encode):
            for member in step.members:
                weight, stored_bytes = member.weight, sum(spec.num_bytes for spec in member.stored)
                kind = _Kind(weight.shape, row_multiple(weight, step.scheme), weight.is_plain, weight.num_bytes, stored_bytes)
                kinds.setdefault(kind, weight.name)
    return kinds


def _largest_block(kinds: dict[_Kind, str], max_elements: int, read_bytes: int) -> _Block:
    to_gpu, from_gpu, most, culprit = read_bytes, 0, 1, ""
    for kind, name in kinds.items():
        num_rows, num_columns = kind.shape
        rows = min(max(max_elements // max(num_columns, 1), kind.row_multiple), num_rows)
        from_gpu = max(from_gpu, -(-kind.stored_bytes * rows // max(num_rows, 1)))
        if kind.is_plain:
            to_gpu = max(to_gpu, kind.read_bytes * rows // max(num_rows, 1))
        if rows * num_columns > most:
            most, culprit = rows * num_columns, name
    to_gpu, from_gpu = (1 << (size - 1).bit_length() for size in (to_gpu, from_gpu + PAGE_BYTES))
    return _Block(to_gpu, from_gpu, to_gpu + from_gpu + 2 * read_bytes + COPY_BYTES, most * GPU_WORKING_BYTES, culprit)


def _allowed(needed: int, culprit: str, max_bytes: int, container: Container | None, *, may_shrink: bool) -> int:
    """The budget, which is enough for the smallest block and reading ahead of it, or RequestError."""
    if container is not None and needed > container.working_bytes:
        raise RequestError(container.refusal(needed * 3 // 2, f"the smallest block of {culprit}" if culprit else "this conversion"))
    if container is not None and may_shrink:
        max_bytes = min(max_bytes, container.working_bytes)
    if needed > max_bytes:
        what = f"{culprit}: its smallest block" if culprit else "reading ahead"
        raise RequestError(f"{what} takes {needed} bytes of working memory; give --max-memory {needed}")
    return max_bytes


def _require_room(peak_bytes: int, needed: int, max_bytes: int, container: Container | None) -> None:
    """Raise RequestError, with a budget that works, if what would be used of this one does not fit the container."""
    if container is not None and peak_bytes > container.working_bytes:
        fits = max(container.working_bytes - SPARE_BYTES, needed)
        refusal = container.refusal(peak_bytes * 3 // 2, f"--max-memory {enough_mebibytes(max_bytes)}")
        raise RequestError(f"{refusal}, and so does --max-memory {enough_mebibytes(fits)}")


def _kept(plan: Plan, keep_bytes: int) -> int:
    """The most that is kept between two passes."""
    shared = (
        sum(member.weight.decoded_bytes for member in step.members)
        for step in plan.steps
        if isinstance(step, Encode) and step.scheme.shares_amax
    )
    return max((num_bytes for num_bytes in shared if num_bytes <= keep_bytes), default=0)


def row_multiple(weight: Weight, scheme: Scheme) -> int:
    """Blocks of rows start at multiples of this, for what is read and for what is written."""
    return math.lcm(weight.format.row_multiple, scheme.row_multiple)


def available_cpus() -> int:
    """Processors that this process may use, as far as they are its own and as far as it may have their time."""
    num_cpus, limit = len(os.sched_getaffinity(0)), cpu_limit()
    return num_cpus if limit is None else min(num_cpus, math.ceil(limit))


def row_blocks(num_rows: int, num_columns: int, *, row_multiple: int, max_elements: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of rows of about `max_elements` elements that start at multiples of `row_multiple`."""
    rows = max(max_elements // max(num_columns, 1) // row_multiple, 1) * row_multiple
    return ((start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))
