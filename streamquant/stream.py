"""The engine: streams the steps of a plan through a pool of workers, a block of rows at a time.

A worker reads a block, quantizes it and writes what comes out at its planned place; two workers overlap reading, computing and
writing. It owns every thread. What is in memory at any time: a block in each worker, and the fused weights that a worker keeps
between finding their largest magnitude and encoding them.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamquant.checkpoint.header import TensorSpec
from streamquant.checkpoint.source import Source
from streamquant.checkpoint.writer import ShardWriter
from streamquant.errors import CheckpointError
from streamquant.memory import COPY_BYTES, Memory, row_blocks
from streamquant.plan import TORCH_DTYPES, Copy, Encode, Member, Shard, Step
from streamquant.schemes import Scheme


class Progress(NamedTuple):
    """How far a conversion is, in bytes of the source's tensors."""

    done_bytes: int
    total_bytes: int
    tensor: str  # the one last worked on


OnProgress = Callable[[Progress], None]
TASK_BYTES = 16 << 20  # source bytes of one task: enough to hide what handing it out costs
QUEUED_TASKS = 4  # per worker
SHARDS_IN_WORK = 2  # one being filled while the one before it is flushed
MALLOC_LESSON_BYTES = 31 << 20


def stream_shards(
    shards: Sequence[Shard],
    source: Source,
    *,
    work: Path,
    publish: Callable[[Shard, ShardWriter], None],
    memory: Memory,
    device: torch.device,
    allow_nonfinite: bool,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Fill each shard in a temporary file in `work` and hand it, complete, to `publish`, which runs in a thread of its own.

    `on_progress` is called from worker threads, one call at a time. Returns the names of the weights that are not all finite,
    whose infinities and NaNs were stored as zeros; without `allow_nonfinite` the first one raises CheckpointError.
    """
    total = sum(spec.num_bytes for shard in shards for step in shard.steps for spec in step.sources)
    with ExitStack() as opened, _Engine(source, memory, device, allow_nonfinite, total, on_progress) as engine:
        publications: list[Future[None]] = []
        for shard in shards:
            writer = ShardWriter(work / f"{shard.file}.part", header=shard.header, num_bytes=shard.num_bytes)
            opened.callback(writer.close)
            tasks = [future for step in shard.steps for future in engine.submit_step(step, writer)]
            publications.append(engine.publisher.submit(_publish, publish, shard, writer, tasks))
            if len(publications) >= SHARDS_IN_WORK:
                publications[-SHARDS_IN_WORK].result()
        for publication in publications:
            publication.result()
        return sorted(engine.nonfinite)


def _publish(publish: Callable[[Shard, ShardWriter], None], shard: Shard, writer: ShardWriter, tasks: Sequence[Future[Any]]) -> None:
    for task in tasks:
        task.result()
    publish(shard, writer)


class _Engine:
    """The workers, the thread that publishes, and what they share."""

    def __init__(
        self, source: Source, memory: Memory, device: torch.device, allow_nonfinite: bool, total: int, on_progress: OnProgress | None
    ):
        self.nonfinite: set[str] = set()
        self.publisher = ThreadPoolExecutor(1, "streamquant-publish")
        self._source, self._memory, self._device, self._allow_nonfinite = source, memory, device, allow_nonfinite
        self._total, self._on_progress, self._done = total, on_progress, 0
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._slots = threading.Semaphore(QUEUED_TASKS * memory.num_workers)
        self._failure: BaseException | None = None
        # Until glibc has seen a large block freed, it returns what each operation frees to the kernel, which hands it out again page
        # by page: two thirds of the system time of FP8. See mallopt(3), M_MMAP_THRESHOLD.
        torch.empty(MALLOC_LESSON_BYTES, dtype=torch.uint8)
        # A worker runs one operation at a time; threads of torch's own would only fight over the cores.
        self._torch_threads = torch.get_num_threads()
        self._workers = ThreadPoolExecutor(memory.num_workers, "streamquant", initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._failure = self._failure or error
        self._workers.shutdown(cancel_futures=True)
        self.publisher.shutdown()
        torch.set_num_threads(self._torch_threads)

    # --- handing out work -------------------------------------------------------------------------------------------

    def submit_step(self, step: Step, writer: ShardWriter) -> Iterator[Future[Any]]:
        """Queue the work of a step, waiting for room. Raises what made earlier work fail."""
        if isinstance(step, Copy):
            for start in range(0, step.source.num_bytes, COPY_BYTES):
                count = min(COPY_BYTES, step.source.num_bytes - start)
                yield self._submit(step.source, count, partial(self._copy, step, start, count, writer))
            return
        if not step.scheme.shares_amax:
            for member, start, end, num_bytes in self._pieces(step):
                yield self._submit(member.source, num_bytes, partial(self._encode, member, start, end, step.scheme, writer))
            return
        num_bytes = sum(spec.num_bytes for spec in step.sources)
        if num_bytes <= self._memory.keep_bytes:
            yield self._submit(step.sources[0], num_bytes, partial(self._encode_kept, step, writer))
            return
        scans = [
            self._submit(member.source, num_bytes // 2, partial(self._scan, member, start, end, step.scheme))
            for member, start, end, num_bytes in self._pieces(step)
        ]
        # Work starts in the order in which it is queued, so whoever waits for the scans waits for running ones.
        for member, start, end, num_bytes in self._pieces(step):
            encode = partial(self._encode, member, start, end, step.scheme, writer, shared_of=(step, scans))
            yield self._submit(member.source, num_bytes - num_bytes // 2, encode)

    def _pieces(self, step: Encode) -> Iterator[tuple[Member, int, int, int]]:
        """Members cut into ranges of rows of about TASK_BYTES, with their bytes."""
        for member in step.members:
            num_rows, num_columns = member.source.shape
            row_bytes = member.source.num_bytes // num_rows
            max_elements = TASK_BYTES * num_columns // row_bytes
            for start, end in row_blocks(num_rows, num_columns, row_multiple=step.scheme.row_multiple, max_elements=max_elements):
                yield member, start, end, (end - start) * row_bytes

    def _submit(self, spec: TensorSpec, num_bytes: int, work: Callable[[], Any]) -> Future[Any]:
        self._slots.acquire()
        if self._failure is not None:
            raise self._failure
        future = self._workers.submit(self._run, spec, num_bytes, work)
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _run(self, spec: TensorSpec, num_bytes: int, work: Callable[[], Any]) -> Any:
        if self._failure is not None:
            raise self._failure
        try:
            result = work()
            with self._lock:
                self._done += num_bytes
                if self._on_progress is not None:
                    self._on_progress(Progress(self._done, self._total, spec.name))
        except BaseException as error:
            self._failure = self._failure or error
            raise
        return result

    # --- work, in a worker ------------------------------------------------------------------------------------------

    def _copy(self, step: Copy, start: int, count: int, writer: ShardWriter) -> None:
        source = step.source
        self._source.copy(source.file, source.start + start, count, writer.descriptor, step.output.start + start)

    def _scan(self, member: Member, start: int, end: int, scheme: Scheme) -> Tensor:
        """The largest bound in a range of rows: float32 [1], on the CPU."""
        return _largest([self._observe(weight_NK, member, scheme)[1] for _, weight_NK in self._blocks(member, start, end, scheme)])

    def _encode(
        self,
        member: Member,
        start: int,
        end: int,
        scheme: Scheme,
        writer: ShardWriter,
        shared_of: tuple[Encode, Sequence[Future[Tensor]]] | None = None,
    ) -> None:
        shared = None
        if shared_of is not None:
            step, scans = shared_of
            shared = self._share(step, [scan.result() for scan in scans])
        for row, weight_NK in self._blocks(member, start, end, scheme):
            finite_NK, bounds_BRC = self._observe(weight_NK, member, scheme)
            self._store(member, writer, row, scheme.encode(finite_NK, bounds_BRC, shared=shared), scheme)
        if start == 0:
            self._store_once(member, scheme, writer, shared)

    def _encode_kept(self, step: Encode, writer: ShardWriter) -> None:
        """Read all members, find what they share, encode them from memory."""
        scheme = step.scheme
        kept = []
        for member in step.members:
            for row, weight_NK in self._blocks(member, 0, member.source.shape[0], scheme, reuse=False):
                kept.append((member, row, *self._observe(weight_NK, member, scheme)))
        shared = self._share(step, [_largest([bounds_BRC for *_, bounds_BRC in kept])])
        for member, row, weight_NK, bounds_BRC in kept:
            self._store(member, writer, row, scheme.encode(weight_NK, bounds_BRC, shared=shared), scheme)
        for member in step.members:
            self._store_once(member, scheme, writer, shared)

    def _blocks(self, member: Member, start: int, end: int, scheme: Scheme, *, reuse: bool = True) -> Iterator[tuple[int, Tensor]]:
        """(first row, weight_NK on the device) for blocks of the rows start..end. With `reuse` a block overwrites the one before."""
        spec = member.source
        num_columns = spec.shape[1]
        row_bytes = spec.num_bytes // spec.shape[0]
        blocks = row_blocks(end - start, num_columns, row_multiple=scheme.row_multiple, max_elements=self._memory.block_elements)
        for block_start, block_end in blocks:
            num_bytes = (block_end - block_start) * row_bytes
            buffer = self._buffer(num_bytes) if reuse else torch.empty(num_bytes, dtype=torch.uint8)
            self._source.read(spec.file, spec.start + (start + block_start) * row_bytes, buffer.numpy().data)
            weight_NK = buffer.view(TORCH_DTYPES[spec.dtype]).view(-1, num_columns)
            yield start + block_start, weight_NK.to(self._device)

    def _buffer(self, num_bytes: int) -> Tensor:
        """Memory of this worker, used again and again."""
        buffer: Tensor | None = getattr(self._buffers, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._buffers.buffer = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes]

    def _observe(self, weight_NK: Tensor, member: Member, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The weight, with zeros in place of what is not finite, and its bounds. Raises CheckpointError unless that is allowed."""
        bounds_BRC = scheme.observe(weight_NK)
        if bool(bounds_BRC.isfinite().all()):
            return weight_NK, bounds_BRC
        name = member.source.name
        if not self._allow_nonfinite:
            raise CheckpointError(f"{name} holds NaN or infinite weights; --allow-nonfinite stores them as zeros")
        self.nonfinite.add(name)
        finite_NK = weight_NK.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return finite_NK, scheme.observe(finite_NK)

    def _share(self, step: Encode, amaxes: Sequence[Tensor]) -> Tensor:
        amax = torch.stack(list(amaxes)).amax(0)
        return step.scheme.share(amax, TORCH_DTYPES[step.sources[0].dtype]).to(self._device)

    def _store(self, member: Member, writer: ShardWriter, row: int, stored: Mapping[str, Tensor], scheme: Scheme) -> None:
        for suffix, tensor in stored.items():
            spec = member.place(suffix)
            line_bytes = spec.num_bytes // spec.shape[0]
            writer.write(spec.start + scheme.line(suffix, row) * line_bytes, _bytes(tensor))

    def _store_once(self, member: Member, scheme: Scheme, writer: ShardWriter, shared: Tensor | None) -> None:
        num_rows, num_columns = member.source.shape
        once = scheme.once((num_rows, num_columns), TORCH_DTYPES[member.source.dtype], shared)
        self._store(member, writer, 0, once, scheme)


def _largest(bounds: Sequence[Tensor]) -> Tensor:
    return torch.stack([bound.abs().amax() for bound in bounds]).amax().view(1).cpu()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
