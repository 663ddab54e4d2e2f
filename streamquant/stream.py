"""The engine: streams the steps of a plan through a pool of workers, a block of rows at a time.

A worker reads a block, quantizes it and writes what comes out at its planned place; two workers overlap reading, computing and
writing, and on GPUs (lane.py) copying. Workers of all devices take their tasks from one queue. What is in memory at any time: a block in
each worker, the fused weights that a worker keeps between finding their largest magnitude and encoding them, and what is read
ahead of a remote source.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from streamquant.checkpoint.header import TensorSpec
from streamquant.checkpoint.journal import Journal
from streamquant.checkpoint.source import Extent, Reader, Source
from streamquant.checkpoint.writer import ShardWriter, StepWriter
from streamquant.errors import CheckpointError
from streamquant.inputs import Weight
from streamquant.inputs.weight import Allocate
from streamquant.lane import Lane, make_lanes
from streamquant.lazy import torch
from streamquant.memory import COPY_BYTES, SMALL_PART, Memory, row_blocks, row_multiple
from streamquant.plan import Copy, Encode, Measure, Member, Shard, Step
from streamquant.read_ahead import NUM_BUFFERS, ReadAhead, Reading, Spool, coalesce
from streamquant.schemes import Scheme
from streamquant.schemes.kernels import Kernels
from streamquant.stored import TORCH_DTYPES
from streamquant.trace import Trace

if TYPE_CHECKING:
    from torch import Tensor


class Progress(NamedTuple):
    """How far a conversion is, in bytes of the source's tensors."""

    done_bytes: int
    total_bytes: int
    tensor: str  # the one last worked on


OnProgress = Callable[[Progress], None]
TASK_BYTES = 16 << 20  # source bytes of one task: enough to hide what handing it out costs
QUEUED_TASKS = 4  # per worker
SHARDS_IN_WORK = 2  # one being filled while the one before it is flushed
FLUSH_SECONDS = 5.0  # between flushes of a shard: the work that the loss of a machine costs, and a step
COPY_CHUNK_BYTES = 1 << 20  # fits the cache, in which it is read, summed and written
MALLOC_LESSON_BYTES = 31 << 20
LOGGER = logging.getLogger("streamquant")


def stream_shards(
    shards: Sequence[Shard],
    source: Source,
    *,
    out: Path,
    work: Path,
    journal: Journal,
    memory: Memory,
    devices: Sequence[torch.device],
    kernels: Kernels,
    allow_nonfinite: bool,
    on_progress: OnProgress | None = None,
    trace: Trace | None = None,
) -> None:
    """Fill each shard in a temporary file in `work`, but for the steps that the journal has, and give it its name in `out`.

    However it ends, the journal then has the steps that were finished, and the names of weights that are not all finite, whose infinities
    and NaNs were stored as zeros; without `allow_nonfinite` the first one raises CheckpointError. `on_progress` is called from worker
    threads, one call at a time.
    """
    trace = trace or Trace()
    total = bytes_to_do(shards, journal)
    with (
        _Recorder(journal, out, trace) as recorder,
        _Engine(source, recorder, work, memory, devices, kernels, allow_nonfinite, total, on_progress, trace) as engine,
    ):
        for shard in shards:
            recorder.wait_for_room()
            part = work / f"{shard.file}.part"
            writer = ShardWriter(part, header=shard.header, num_bytes=shard.num_bytes, finished=journal.steps[shard.file])
            recorder.own(writer)
            engine.stream(shard, writer)
            recorder.put(_ShardInWork(shard, writer))
        recorder.wait()


def bytes_to_do(shards: Sequence[Shard], journal: Journal) -> int:
    """Bytes of the source that steps which are not finished read."""
    return sum(step.source_bytes for shard in shards for index, step in enumerate(shard.steps) if index not in journal.steps[shard.file])


def spool_bytes(shards: Sequence[Shard], memory: Memory) -> int:
    """The most that temporary files take of the disk: of two steps at a time that are read more than once and fit no buffers."""
    if not memory.read_ahead_bytes:
        return 0
    largest = 0
    for step in (step for shard in shards for step in shard.steps):
        if isinstance(step, Encode) and _reads_again(step) and step.source_bytes > memory.read_ahead_bytes // 2:
            extents = coalesce(_all_extents(step), max_bytes=memory.read_ahead_bytes // NUM_BUFFERS)
            if len(extents) > NUM_BUFFERS:
                largest = max(largest, sum(extent.num_bytes for extent in extents))
    return 2 * largest


@dataclass(slots=True)
class _Task:
    """What a worker does at a time."""

    tensor: str
    num_bytes: int  # of the source, to count progress
    extents: Sequence[Extent]  # all that `work` reads
    work: Callable[[Reader], Any]
    ends: Sequence[_StepInWork] = ()  # the steps of which it is the last task
    future: Future[Any] = field(init=False)  # since it was handed out


@dataclass(slots=True)
class _StepInWork:
    """A step, all of whose tasks are handed out."""

    shard: Shard
    writer: ShardWriter
    index: int
    output: StepWriter
    tasks: Sequence[_Task] = ()


class _Part(NamedTuple):
    """A weight of a batch."""

    step: Encode
    member: Member
    output: StepWriter


@dataclass(slots=True)
class _Batch:
    """Small steps that a task encodes."""

    in_work: list[_StepInWork] = field(default_factory=list)
    steps: list[Encode] = field(default_factory=list)
    num_elements: int = 0

    def add(self, in_work: _StepInWork, step: Encode) -> None:
        """Put a step to the others."""
        self.in_work.append(in_work)
        self.steps.append(step)
        self.num_elements += sum(member.weight.num_elements for member in step.members)


@dataclass(slots=True)
class _Stack:
    """Weights of a batch with as many columns, read one below the other."""

    memory: Tensor
    buffer: memoryview = field(init=False)  # the same bytes
    parts: list[_Part] = field(default_factory=list)
    num_bytes: int = 0

    def __post_init__(self) -> None:
        self.buffer = self.memory.numpy().data

    def read(self, part: _Part, spec: TensorSpec, reader: Reader) -> None:
        """Put a weight, which is stored as it is, to the others."""
        start, self.num_bytes = self.num_bytes, self.num_bytes + spec.num_bytes
        reader.read(spec.file, spec.start, self.buffer[start : self.num_bytes])
        self.parts.append(part)

    def clear(self) -> None:
        """Make room."""
        self.parts, self.num_bytes = [], 0


@dataclass(slots=True)
class _ShardInWork:
    """A shard, all of whose steps are handed out."""

    shard: Shard
    writer: ShardWriter


class _Recorder:
    """Waits for steps in order, flushes and notes them, and gives shards their names; in a thread of its own."""

    def __init__(self, journal: Journal, out: Path, trace: Trace):
        self.nonfinite: set[str] = set()
        self._journal, self._out, self._trace = journal, out, trace
        self._items: queue.SimpleQueue[_StepInWork | _ShardInWork | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(SHARDS_IN_WORK)
        self._writers: list[ShardWriter] = []
        self._unflushed: list[_StepInWork] = []  # finished steps of one shard
        self._last_flush = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "streamquant-record")
        self._everything = self._thread.submit(self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._items.put(None)
        self._thread.shutdown()
        for writer in self._writers:
            writer.close()

    def wait_for_room(self) -> None:
        """Wait until another shard may be begun. Raises what made recording fail."""
        self._room.acquire()
        self.check()

    def check(self) -> None:
        """Raise what made recording fail, such as a disk that turned out to be full when it was flushed."""
        if self._everything.done():
            self._everything.result()

    def own(self, writer: ShardWriter) -> None:
        """Close this in the end."""
        self._writers.append(writer)

    def put(self, item: _StepInWork | _ShardInWork) -> None:
        """Record this, after everything before it, once its tasks are done."""
        self._items.put(item)

    def wait(self) -> None:
        """Wait until everything is recorded. Raises what made that, or a task, fail."""
        self._items.put(None)
        self._everything.result()

    def _run(self) -> None:
        try:
            while (item := self._items.get()) is not None:
                if isinstance(item, _ShardInWork):
                    self._publish(item)
                else:
                    for task in item.tasks:
                        task.future.result()
                    self._unflushed.append(item)
                    if time.monotonic() - self._last_flush >= FLUSH_SECONDS:
                        self._flush()
        finally:
            self._room.release()
            self._flush()

    def _publish(self, item: _ShardInWork) -> None:
        item.writer.finished.update(self._take_unflushed())
        with self._trace.span("flush"):
            item.writer.publish(self._out / item.shard.file)
        self._journal.record_shard(item.shard.file, item.writer.crc32, self.nonfinite)
        figures = {"file": item.shard.file, "bytes": item.shard.num_bytes}
        LOGGER.info("%s is finished", item.shard.file, extra={"event": "shard", "figures": figures})
        self._room.release()

    def _flush(self) -> None:
        if self._unflushed:
            shard, writer = self._unflushed[0].shard, self._unflushed[0].writer
            with self._trace.span("flush"):
                writer.flush()
            steps = self._take_unflushed()
            writer.finished.update(steps)
            self._journal.record_steps(shard.file, steps, self.nonfinite)
        self._last_flush = time.monotonic()

    def _take_unflushed(self) -> dict[int, int]:
        steps = {item.index: item.output.checksum for item in self._unflushed}
        self._unflushed.clear()
        return steps


class _Engine:
    """The workers and what they share."""

    def __init__(
        self,
        source: Source,
        recorder: _Recorder,
        work: Path,
        memory: Memory,
        devices: Sequence[torch.device],
        kernels: Kernels,
        allow_nonfinite: bool,
        total: int,
        on_progress: OnProgress | None,
        trace: Trace,
    ):
        self._source, self._recorder, self._work, self._memory = source, recorder, work, memory
        self._kernels, self._allow_nonfinite = kernels, allow_nonfinite
        self._total, self._on_progress, self._done = total, on_progress, 0
        self._trace = trace
        self._lock = threading.Lock()
        self._lanes = make_lanes(devices, memory)
        self._own = threading.local()  # of a worker: its lane
        self._slots = threading.Semaphore(QUEUED_TASKS * memory.num_workers)
        self._failure: BaseException | None = None
        reads_ahead = memory.read_ahead_bytes and source.num_connections  # which it has not if all was downloaded since the plan
        self._read_ahead = ReadAhead(source, memory.read_ahead_bytes, trace) if reads_ahead else None
        self._spools: list[Spool] = []
        # Until glibc has seen a large block freed, it returns what each operation frees to the kernel, which hands it out again page
        # by page: two thirds of the system time of FP8. See mallopt(3), M_MMAP_THRESHOLD.
        torch.empty(MALLOC_LESSON_BYTES, dtype=torch.uint8)
        # A worker runs one operation at a time; threads of torch's own would only fight over the cores.
        self._torch_threads = torch.get_num_threads()
        self._workers = ThreadPoolExecutor(memory.num_workers, "streamquant", initializer=self._start_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._failure = self._failure or error
        if error is not None:
            self._source.interrupt()
        if self._read_ahead is not None:
            self._read_ahead.close()
        self._workers.shutdown(cancel_futures=True)
        for spool in self._spools:
            spool.close()
        torch.set_num_threads(self._torch_threads)

    # --- handing out work -------------------------------------------------------------------------------------------

    def stream(self, shard: Shard, writer: ShardWriter) -> None:
        """Hand out the steps of a shard that are not finished, waiting for room. Raises what made earlier work fail."""
        groups = self._groups(shard, writer)
        if self._read_ahead is None:
            for task in (task for group in groups for task in group):
                self._hand_out(task, None)
        else:
            for task, reading in self._read_ahead.fetch(groups):
                self._hand_out(task, reading)

    def _groups(self, shard: Shard, writer: ShardWriter) -> Iterator[Sequence[_Task]]:
        """The tasks of the steps, in groups whose bytes are fetched together."""
        batches: dict[tuple[Scheme, str], _Batch] = {}
        for index, step in enumerate(shard.steps):
            if index in writer.finished:
                continue
            output = StepWriter(writer)
            if isinstance(step, Encode) and self._may_be_batched(step):
                kind = step.scheme, step.members[0].weight.dtype
                batch = batches.setdefault(kind, _Batch())
                batch.add(_StepInWork(shard, writer, index, output), step)
                if batch.num_elements > self._memory.batch_elements - self._small_elements:
                    yield [self._batch_task(batches.pop(kind))]
                continue
            tasks = list(self._tasks(step, output))
            if tasks:
                tasks[-1].ends = [_StepInWork(shard, writer, index, output, tasks)]
                yield from self._fitting(step, tasks)
        yield from ([self._batch_task(batch)] for batch in batches.values())

    @property
    def _small_elements(self) -> int:
        """A step of at most so many elements is done together with others."""
        return self._memory.batch_elements // SMALL_PART

    def _may_be_batched(self, step: Encode) -> bool:
        if step.scheme.shares_amax or step.keeps_codes:
            return False
        weights = [member.weight for member in step.members]
        return sum(weight.num_elements for weight in weights) <= self._small_elements and all(
            weight.is_plain and weight.dtype == weights[0].dtype and weight.shape[0] % step.scheme.row_multiple == 0 for weight in weights
        )

    def _batch_task(self, batch: _Batch) -> _Task:
        parts = [_Part(step, member, work.output) for work, step in zip(batch.in_work, batch.steps, strict=True) for member in step.members]
        extents = [extent for step in batch.steps for extent in _all_extents(step)]
        num_bytes = sum(step.source_bytes for step in batch.steps)
        task = _Task(parts[0].member.weight.name, num_bytes, extents, partial(self._encode_batch, parts), ends=batch.in_work)
        for step_in_work in batch.in_work:
            step_in_work.tasks = [task]
        return task

    def _fitting(self, step: Step, tasks: Sequence[_Task]) -> Iterator[Sequence[_Task]]:
        """The tasks of a step, in groups that fit what is read ahead."""
        if self._read_ahead is None or self._read_ahead.fits(tasks):
            yield tasks
        elif not (isinstance(step, Encode) and _reads_again(step)):
            yield from ([task] for task in tasks)
        else:  # what is read more than once is fetched once
            spool = Spool(self._work)
            self._spools.append(spool)
            keeping = []
            for extent in self._read_ahead.pieces(tasks):
                keeping.append(_Task(tasks[0].tensor, 0, [extent], partial(self._keep, extent, spool)))
                yield keeping[-1:]
            for task in tasks:
                task.extents, task.work = (), partial(_read_kept, task.work, spool, keeping)
                yield [task]

    def _tasks(self, step: Step, output: StepWriter) -> Iterator[_Task]:
        if isinstance(step, Measure):
            raise AssertionError(f"{step.module} should have been measured before")
        if isinstance(step, Copy):
            spec = step.source
            for start in range(spec.start, spec.end, COPY_BYTES):
                extent = Extent(spec.file, start, min(start + COPY_BYTES, spec.end))
                yield _Task(spec.name, extent.num_bytes, [extent], partial(self._copy, step, extent, output))
        elif step.scheme.shares_amax and sum(member.weight.decoded_bytes for member in step.members) <= self._memory.keep_bytes:
            yield _Task(step.members[0].weight.name, step.source_bytes, _all_extents(step), partial(self._encode_kept, step, output))
        elif step.keeps_codes and self._shares_already(step, self._source):
            yield from self._member_tasks(step, lambda member, start, end: partial(self._repack, step, member, start, end, output))
        elif not step.scheme.shares_amax:
            yield from self._member_tasks(step, lambda member, start, end: partial(self._encode, step, member, start, end, output))
        else:  # read everything for the largest magnitude, then again to encode it
            scans = list(self._member_tasks(step, lambda member, start, end: partial(self._scan, step, member, start, end)))
            encodes = list(
                self._member_tasks(step, lambda member, start, end: partial(self._encode, step, member, start, end, output, scans=scans))
            )
            for task, again in zip(scans, encodes, strict=True):
                task.num_bytes //= 2
                again.num_bytes -= task.num_bytes
            yield from (*scans, *encodes)

    def _member_tasks(self, step: Encode, work: Callable[[Member, int, int], Callable[[Reader], Any]]) -> Iterator[_Task]:
        """Tasks of about TASK_BYTES: a member and a range of its rows each."""
        for member in step.members:
            weight = member.weight
            num_rows, num_columns = weight.shape
            task_bytes = min(TASK_BYTES, self._memory.read_bytes or TASK_BYTES, self._memory.read_ahead_bytes // 4 or TASK_BYTES)
            max_elements = task_bytes * weight.num_elements // max(weight.num_bytes, 1)
            for start, end in row_blocks(num_rows, num_columns, row_multiple=row_multiple(weight, step.scheme), max_elements=max_elements):
                num_bytes = weight.num_bytes * end // num_rows - weight.num_bytes * start // num_rows
                yield _Task(weight.name, num_bytes, weight.extents(start, end), work(member, start, end))

    def _hand_out(self, task: _Task, reading: Reading | None) -> None:
        self._slots.acquire()
        if self._failure is not None:
            raise self._failure
        self._recorder.check()
        task.future = self._workers.submit(self._run, task, reading)
        task.future.add_done_callback(lambda _: self._slots.release())
        for step_in_work in task.ends:
            self._recorder.put(step_in_work)
        task.ends = ()  # leaves no cycle: the command line has garbage collected after a million objects

    def _run(self, task: _Task, reading: Reading | None) -> Any:
        try:
            if self._failure is not None:
                raise self._failure
            with self._lane.running():
                result = task.work(reading or self._source)
            with self._lock:
                self._done += task.num_bytes
                if self._on_progress is not None:
                    self._on_progress(Progress(self._done, self._total, task.tensor))
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            if reading is not None:
                reading.release()
        return result

    # --- work, in a worker ------------------------------------------------------------------------------------------

    def _start_worker(self) -> None:
        torch.set_num_threads(1)
        self._own.lane = self._lanes.pop(0)

    @property
    def _lane(self) -> Lane:
        lane: Lane = self._own.lane
        return lane

    def _copy(self, step: Copy, extent: Extent, output: StepWriter, reader: Reader) -> None:
        moved = step.output.start - step.source.start
        for start in range(extent.start, extent.end, COPY_CHUNK_BYTES):
            piece = self._read(Extent(extent.file, start, min(start + COPY_CHUNK_BYTES, extent.end)), reader)
            with self._trace.span("write"):
                output.write(start + moved, piece)

    def _keep(self, extent: Extent, spool: Spool, reader: Reader) -> None:
        spool.write(extent.file, extent.start, self._read(extent, reader))

    def _read(self, extent: Extent, reader: Reader) -> memoryview:
        buffer: memoryview = self._lane.buffer("copy", extent.num_bytes).numpy().data
        with self._trace.span("read"):
            reader.read(extent.file, extent.start, buffer)
        return buffer

    def _scan(self, step: Encode, member: Member, start: int, end: int, reader: Reader) -> float:
        """The largest bound in a range of rows."""
        blocks = self._blocks(member, start, end, step.scheme, reader)
        return max(_largest(self._observe(weight_NK, member, step.scheme)[1]) for _, weight_NK in blocks)

    def _encode(
        self, step: Encode, member: Member, start: int, end: int, output: StepWriter, reader: Reader, *, scans: Sequence[_Task] = ()
    ) -> None:
        # Work starts in the order in which it is handed out, so whoever waits for the scans waits for running ones.
        shared = self._share(step, [scan.future.result() for scan in scans]) if scans else None
        scheme = step.scheme
        for row, weight_NK in self._blocks(member, start, end, scheme, reader):
            finite_NK, bounds_BRC = self._observe(weight_NK, member, scheme)
            self._encode_block(member, output, row, scheme, finite_NK, bounds_BRC, shared)
        if start == 0:
            self._store_once(member, scheme, output, shared)

    def _encode_batch(self, parts: Sequence[_Part], reader: Reader) -> None:
        """Read weights of one scheme and one dtype in their order; encode those with as many columns, up to a block of them, as one."""
        num_bytes = Counter[int]()  # by columns
        for _, member, _ in parts:
            num_bytes[member.weight.shape[1]] += member.weight.num_bytes
        block_bytes = self._memory.plain_block_elements * TORCH_DTYPES[parts[0].member.weight.dtype].itemsize
        sizes = {num_columns: min(size, block_bytes) for num_columns, size in num_bytes.items()}
        memory = self._lane.memory_to_read()("batch", sum(sizes.values()))
        stacks = dict(zip(sizes, map(_Stack, torch.split(memory, list(sizes.values()))), strict=True))
        left = list[_Part]()
        for part in parts:
            weight = part.member.weight
            stack, spec = stacks[weight.shape[1]], weight.tensors["weight"]
            if stack.num_bytes + spec.num_bytes > len(stack.memory):
                left += self._encode_stack(stack)
            with self._trace.span("read"):
                stack.read(part, spec, reader)
        for stack in stacks.values():
            left += self._encode_stack(stack)
        for step, member, output in left:  # finds the one that is not finite
            self._encode(step, member, 0, member.weight.shape[0], output, reader)

    def _encode_stack(self, stack: _Stack) -> list[_Part]:
        """Encode the weights of a stack, and clear it. Returns them if they are not all finite; else none is left."""
        parts, memory = stack.parts, stack.memory[: stack.num_bytes]
        stack.clear()
        return [] if self._encode_alike(parts, memory) else parts

    def _encode_alike(self, parts: Sequence[_Part], memory: Tensor) -> bool:
        """Encode weights that lie in `memory`, one below the other. Returns whether all are finite; else nothing is done."""
        scheme, weight = parts[0].step.scheme, parts[0].member.weight
        stacked_NK = memory.view(TORCH_DTYPES[weight.dtype]).view(-1, weight.shape[1])
        weight_NK = self._lane.to_device({"weight": stacked_NK})["weight"]
        with self._trace.span("observe"):
            bounds_BRC = scheme.observe(weight_NK, kernels=self._kernels)
        if not math.isfinite(_largest(bounds_BRC)):
            return False
        with self._trace.span("encode"):
            stored = scheme.encode(weight_NK, bounds_BRC, kernels=self._kernels)
            num_lines = {suffix: len(tensor) for suffix, tensor in stored.items()}
            bytes_of = self._lane.to_host(stored)
        start = 0
        for _, member, output in parts:
            end = start + member.weight.shape[0]
            for suffix, count in num_lines.items():
                line_bytes = len(bytes_of[suffix]) // count
                first, last = (scheme.line(suffix, row) * line_bytes for row in (start, end))
                with self._trace.span("write"):
                    output.write(member.place(suffix).start, bytes_of[suffix][first:last])
            start = end
        for _, member, output in parts:
            self._store_once(member, scheme, output, None)
        return True

    def _repack(self, step: Encode, member: Member, start: int, end: int, output: StepWriter, reader: Reader) -> None:
        """Store the codes and scales that the source has."""
        weight, scheme = member.weight, step.scheme
        stored: dict[str, Tensor] = {}
        for row, stored in self._stored_blocks(weight, start, end, scheme, reader, self._lane.memory_to_read):
            self._store(member, output, row, self._lane.to_host(weight.repack(stored, scheme)), scheme)
        if start == 0:
            self._store_once(member, scheme, output, weight.format.shared(stored) if scheme.shares_amax else None)

    def _shares_already(self, step: Encode, reader: Reader) -> bool:
        """Whether the members of a step share in the source what their scheme wants them to share."""
        if not step.scheme.shares_amax:
            return True
        weights = [member.weight for member in step.members]
        shared = [weight.format.shared(weight.read_whole(reader)) for weight in weights]
        return all(torch.equal(other, shared[0]) for other in shared)

    def _encode_kept(self, step: Encode, output: StepWriter, reader: Reader) -> None:
        """Read all members, find what they share, encode them from memory; or store what the source has, if that is shared already."""
        if step.keeps_codes and self._shares_already(step, reader):
            for member in step.members:
                self._repack(step, member, 0, member.weight.shape[0], output, reader)
            return
        scheme = step.scheme
        keeping = self._lane.keeping(sum(member.weight.decoded_bytes for member in step.members))
        kept = []
        for member in step.members:
            weight, dtype = member.weight, TORCH_DTYPES[member.weight.dtype]
            memory = keeping.memory_to_read if weight.is_plain else self._lane.memory_to_read
            for row, weight_NK in self._blocks(member, 0, weight.shape[0], scheme, reader, memory):
                finite_NK, bounds_BRC = self._observe(weight_NK, member, scheme)
                kept.append((member, row, finite_NK if weight.is_plain else keeping.keep(finite_NK, dtype), bounds_BRC))
        shared = self._share(step, [max(_largest(bounds_BRC) for *_, bounds_BRC in kept)])
        for member, row, weight_NK, bounds_BRC in kept:
            self._encode_block(member, output, row, scheme, weight_NK, bounds_BRC, shared)
        for member in step.members:
            self._store_once(member, scheme, output, shared)

    def _blocks(
        self, member: Member, start: int, end: int, scheme: Scheme, reader: Reader, memory: Callable[[], Allocate] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(first row, weight_NK on the device) for blocks of the rows start..end.

        They are read into what `memory` gives, by default into memory in which a block overwrites the one before.
        """
        weight = member.weight
        for row, stored in self._stored_blocks(weight, start, end, scheme, reader, memory or self._lane.memory_to_read):
            with self._trace.span("decode"):
                weight_NK = weight.decode(self._lane.to_device(stored))
            yield row, weight_NK

    def _stored_blocks(
        self, weight: Weight, start: int, end: int, scheme: Scheme, reader: Reader, memory: Callable[[], Allocate]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(first row, what the source has of it) for blocks of the rows start..end."""
        multiple, num_columns = row_multiple(weight, scheme), weight.shape[1]
        # Several tensors, or strided ones, are read more at a time than is decoded: a line of theirs would be a few bytes.
        read_elements = self._memory.plain_block_elements
        if not weight.is_plain:
            read_elements = self._memory.read_bytes * weight.num_elements // max(weight.num_bytes, 1)
        for read in row_blocks(end - start, num_columns, row_multiple=multiple, max_elements=read_elements):
            first, last = start + read[0], start + read[1]
            with self._trace.span("read"):
                stored = weight.read(reader, first, last, memory())
            if weight.is_plain:
                yield first, stored
                continue
            for block in row_blocks(last - first, num_columns, row_multiple=multiple, max_elements=self._memory.block_elements):
                yield first + block[0], weight.select(stored, first + block[0], first + block[1], of_start=first)

    def _observe(self, weight_NK: Tensor, member: Member, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The weight, with zeros in place of what is not finite, and its bounds. Raises CheckpointError unless that is allowed."""
        with self._trace.span("observe"):
            bounds_BRC = scheme.observe(weight_NK, kernels=self._kernels)
        if math.isfinite(_largest(bounds_BRC)):
            return weight_NK, bounds_BRC
        name = member.weight.name
        if not self._allow_nonfinite:
            raise CheckpointError(f"{name} holds NaN or infinite weights; --allow-nonfinite stores them as zeros")
        self._recorder.nonfinite.add(name)
        finite_NK = weight_NK.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return finite_NK, scheme.observe(finite_NK, kernels=self._kernels)

    def _encode_block(
        self,
        member: Member,
        output: StepWriter,
        row: int,
        scheme: Scheme,
        weight_NK: Tensor,
        bounds_BRC: Tensor,
        shared: Tensor | None,
    ) -> None:
        with self._trace.span("encode"):
            bytes_of = self._lane.to_host(scheme.encode(weight_NK, bounds_BRC, shared=shared, kernels=self._kernels))
        self._store(member, output, row, bytes_of, scheme)

    def _store(self, member: Member, output: StepWriter, row: int, stored: Mapping[str, memoryview], scheme: Scheme) -> None:
        for suffix, bytes_of in stored.items():
            spec = member.place(suffix)
            line_bytes = spec.num_bytes // spec.shape[0]
            with self._trace.span("write"):
                output.write(spec.start + scheme.line(suffix, row) * line_bytes, bytes_of)

    def _store_once(self, member: Member, scheme: Scheme, output: StepWriter, shared: Tensor | None) -> None:
        once = scheme.once(member.weight.shape, TORCH_DTYPES[member.weight.dtype], shared)
        self._store(member, output, 0, self._lane.to_host(once), scheme)

    def _share(self, step: Encode, amaxes: Sequence[float]) -> Tensor:
        amax = torch.tensor([max(amaxes)], dtype=torch.float32)
        return step.scheme.share(amax, TORCH_DTYPES[step.members[0].weight.dtype]).to(self._lane.device)


def _all_extents(step: Encode) -> list[Extent]:
    return [extent for member in step.members for extent in member.weight.extents(0, member.weight.shape[0])]


def _reads_again(step: Encode) -> bool:
    """Whether its tasks read bytes that other tasks of it read, too."""
    return step.scheme.shares_amax or any(not member.weight.in_order for member in step.members)


def _read_kept(work: Callable[[Reader], Any], spool: Spool, keeping: Sequence[_Task], reader: Reader) -> Any:
    """Do `work` with what these tasks have kept in the spool."""
    del reader
    for task in keeping:
        task.future.result()
    return work(spool)


def _largest(bounds: Tensor) -> float:
    """The largest magnitude. No tensor: small ones that outlive large ones tear the heap apart, which then grows with the model."""
    return float(bounds.abs().amax())
