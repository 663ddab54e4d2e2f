"""How the memory budget is spent: blocks of rows, workers, and what may be kept between two passes.

The budget is for working memory. What a conversion takes in all, which a container must allow, is

    what the process has once it has planned
    + the working memory, half as much again because a heap that several threads use is never full
    + RESERVE_BYTES
    + BOOKKEEPING_BYTES for every tensor of the output
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from streamquant.container import cpu_limit, memory_limit, process_memory
from streamquant.errors import RequestError
from streamquant.inputs import Weight
from streamquant.lazy import torch
from streamquant.plan import Encode, Plan
from streamquant.schemes import Scheme
from streamquant.schemes.kernels import TORCH
from streamquant.sizes import MEBIBYTE, enough_mebibytes

BLOCK_ELEMENTS = 1 << 18  # operations of torch on them about fit a 2 MB L2 cache
GPU_BLOCK_ELEMENTS = 1 << 24
BATCH_BLOCKS = 4
SMALL_PART = 4  # weights of this part of a batch are small: calls would take longer than computing
COPY_BYTES = 8 << 20
MAX_KEEP_BYTES = 64 << 20
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
    batch_elements: int  # of small weights that are computed together; 0 if none are
    keep_bytes: int  # per worker: weights that share a scale are read once up to this, larger ones twice
    read_bytes: int  # per worker: what is read at a time of weights that are no plain tensors; 0 if there are none
    peak_bytes: int  # predicted
    read_ahead_bytes: int = 0  # what is fetched of a remote source before it is needed
    limit_bytes: int | None = None  # what the container allows for this and all else


@dataclass(frozen=True, slots=True)
class Container:
    """The memory that the container allows, and how much of it is not for work."""

    limit_bytes: int
    used_bytes: int  # by the process when it has planned
    reserve_bytes: int

    @property
    def working_bytes(self) -> int:
        """The largest working memory that fits."""
        return (self.limit_bytes - self.used_bytes - self.reserve_bytes) * 2 // 3

    def refusal(self, working_bytes: int, what: str) -> str:
        """Says that so much working memory does not fit, and which limit would do."""
        enough = self.used_bytes + self.reserve_bytes + working_bytes * 3 // 2 + SPARE_BYTES
        return (
            f"the container's memory limit of {self.limit_bytes // MEBIBYTE}MiB is too small for {what}: "
            f"{enough_mebibytes(self.used_bytes)} are in use, {enough_mebibytes(working_bytes * 3 // 2)} would be for the work and "
            f"{enough_mebibytes(self.reserve_bytes)} for pages of files and bookkeeping; a limit of {enough_mebibytes(enough)} works"
        )


def container_for(plan: Plan, *, device: torch.device) -> Container | None:
    """What the container allows for this plan, once it is made; None if it does not limit memory."""
    limit = memory_limit()
    if limit is None:
        return None
    torch.empty(1, device=device)  # starts CUDA, so that what that takes of the host's memory is in use
    num_outputs = sum(len(step.outputs) for step in plan.steps)
    return Container(limit, process_memory().anonymous, RESERVE_BYTES + num_outputs * BOOKKEEPING_BYTES)


def budget_memory(
    plan: Plan,
    *,
    max_bytes: int,
    num_workers: int,
    on_gpu: bool,
    working_bytes: int = TORCH.working_bytes,
    is_remote: bool = False,
    container: Container | None = None,
    may_shrink: bool = False,
) -> Memory:
    """Fit the work into `max_bytes`, or less if it `may_shrink` to what the container allows, with at most `num_workers` workers.

    working_bytes: what the kernels need for each element of a block of plain weights.
    Raises RequestError naming the smallest budget that works if even one worker needs more, and the smallest limit that works if the
    container does not allow it.
    """
    block_elements = GPU_BLOCK_ELEMENTS if on_gpu else BLOCK_ELEMENTS
    plain_block_elements = block_elements * TORCH.working_bytes // working_bytes
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
                    (plain_block_elements, working_bytes) if member.weight.is_plain else (block_elements, TORCH.working_bytes)
                )
                rows = max(elements // max(num_columns, 1), row_multiple(member.weight, step.scheme))
                if min(rows, num_rows) * num_columns * per_element > block_bytes:
                    block_bytes, culprit = min(rows, num_rows) * num_columns * per_element, member.weight.name
    read_bytes = MIN_READ_BYTES if reads_parts else 0
    needed = block_bytes + 2 * read_bytes  # as read, and turned if its rows are columns
    ahead = max(block_bytes // 4, MIN_READ_AHEAD_BYTES) if is_remote else 0  # a block fits a fraction of it, also in float32
    if container is not None and needed + ahead > container.working_bytes:
        raise RequestError(container.refusal(needed + ahead, f"the smallest block of {culprit}" if culprit else "this conversion"))
    if container is not None and may_shrink:
        max_bytes = min(max_bytes, container.working_bytes)
    if needed + ahead > max_bytes:
        what = f"{culprit}: its smallest block" if culprit else "reading ahead"
        raise RequestError(f"{what} takes {needed + ahead} bytes of working memory; give --max-memory {needed + ahead}")
    if is_remote:
        ahead = min(max(max_bytes // 4, ahead), MAX_READ_AHEAD_BYTES, max_bytes - needed)
    num_workers = max(min(num_workers, (max_bytes - ahead) // needed), 1)
    left = (max_bytes - ahead) // num_workers - block_bytes
    batch_elements = 0 if is_remote else min(BATCH_BLOCKS * plain_block_elements, (block_bytes + left) // working_bytes)
    batch_bytes = batch_elements * working_bytes if smallest <= batch_elements // SMALL_PART else 0
    if reads_parts:
        read_bytes = max(min(left // 4, MAX_READ_BYTES), MIN_READ_BYTES)
    keep_bytes = min(left - 2 * read_bytes, MAX_KEEP_BYTES)
    keep_bytes = keep_bytes * 4 // 5  # the rest holds what was observed of the weights
    shared = [
        sum(member.weight.decoded_bytes for member in step.members)
        for step in plan.steps
        if isinstance(step, Encode) and step.scheme.shares_amax
    ]
    kept = max((num_bytes for num_bytes in shared if num_bytes <= keep_bytes), default=0)
    peak_bytes = num_workers * (max(block_bytes, batch_bytes) + 2 * read_bytes + kept * 5 // 4) + ahead
    if container is not None and peak_bytes > container.working_bytes:
        fits = max(container.working_bytes - SPARE_BYTES, needed + ahead)
        refusal = container.refusal(peak_bytes, f"--max-memory {enough_mebibytes(max_bytes)}")
        raise RequestError(f"{refusal}, and so does --max-memory {enough_mebibytes(fits)}")
    limit_bytes = None if container is None else container.limit_bytes
    return Memory(num_workers, block_elements, plain_block_elements, batch_elements, keep_bytes, read_bytes, peak_bytes, ahead, limit_bytes)


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
