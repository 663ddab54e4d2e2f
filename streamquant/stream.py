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

from streamquant.checkpoint.source import Source
from streamquant.checkpoint.writer import ShardWriter
from streamquant.errors import CheckpointError
from streamquant.inputs import Weight
from streamquant.memory import COPY_BYTES, Memory, row_blocks, row_multiple
from streamquant.plan import Copy, Encode, Member, Shard, Step
from streamquant.schemes import Scheme
from streamquant.schemes.packing import flat
from streamquant.stored import TORCH_DTYPES


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
    total = sum(step.source_bytes for shard in shards for step in shard.steps)
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
                yield self._submit(step.source.name, count, partial(self._copy, step, start, count, writer))
        elif step.keeps_codes and self._share_already(step):
            for member, start, end, num_bytes in self._pieces(step):
                yield self._submit(member.weight.name, num_bytes, partial(self._repack, member, start, end, step.scheme, writer))
        elif not step.scheme.shares_amax:
            for member, start, end, num_bytes in self._pieces(step):
                yield self._submit(member.weight.name, num_bytes, partial(self._encode, member, start, end, step.scheme, writer))
        elif sum(member.weight.decoded_bytes for member in step.members) <= self._memory.keep_bytes:
            yield self._submit(step.members[0].weight.name, step.source_bytes, partial(self._encode_kept, step, writer))
        else:
            yield from self._submit_two_passes(step, writer)

    def _submit_two_passes(self, step: Encode, writer: ShardWriter) -> Iterator[Future[Any]]:
        """Read everything for the largest magnitude, then again to encode it."""
        scans = [
            self._submit(member.weight.name, num_bytes // 2, partial(self._scan, member, start, end, step.scheme))
            for member, start, end, num_bytes in self._pieces(step)
        ]
        # Work starts in the order in which it is queued, so whoever waits for the scans waits for running ones.
        for member, start, end, num_bytes in self._pieces(step):
            encode = partial(self._encode, member, start, end, step.scheme, writer, shared_of=(step, scans))
            yield self._submit(member.weight.name, num_bytes - num_bytes // 2, encode)

    def _pieces(self, step: Encode) -> Iterator[tuple[Member, int, int, int]]:
        """Members cut into ranges of rows of about TASK_BYTES, with their bytes."""
        for member in step.members:
            weight = member.weight
            num_rows, num_columns = weight.shape
            task_bytes = min(TASK_BYTES, self._memory.read_bytes or TASK_BYTES)
            max_elements = task_bytes * weight.num_elements // max(weight.num_bytes, 1)
            for start, end in row_blocks(num_rows, num_columns, row_multiple=row_multiple(weight, step.scheme), max_elements=max_elements):
                yield member, start, end, weight.num_bytes * end // num_rows - weight.num_bytes * start // num_rows

    def _submit(self, tensor: str, num_bytes: int, work: Callable[[], Any]) -> Future[Any]:
        self._slots.acquire()
        if self._failure is not None:
            raise self._failure
        future = self._workers.submit(self._run, tensor, num_bytes, work)
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _run(self, tensor: str, num_bytes: int, work: Callable[[], Any]) -> Any:
        if self._failure is not None:
            raise self._failure
        try:
            result = work()
            with self._lock:
                self._done += num_bytes
                if self._on_progress is not None:
                    self._on_progress(Progress(self._done, self._total, tensor))
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

    def _repack(self, member: Member, start: int, end: int, scheme: Scheme, writer: ShardWriter) -> None:
        """Store the codes and scales that the source has."""
        weight = member.weight
        stored: dict[str, Tensor] = {}
        for row, stored in self._stored_blocks(weight, start, end, scheme):
            self._store(member, writer, row, weight.repack(stored, scheme), scheme)
        if start == 0:
            self._store_once(member, scheme, writer, weight.format.shared(stored) if scheme.shares_amax else None)

    def _share_already(self, step: Encode) -> bool:
        """Whether the members of a step share in the source what their scheme wants them to share."""
        if not step.scheme.shares_amax:
            return True
        weights = [member.weight for member in step.members]
        shared = [weight.format.shared(weight.read_whole(self._source)) for weight in weights]
        return all(torch.equal(other, shared[0]) for other in shared)

    def _encode_kept(self, step: Encode, writer: ShardWriter) -> None:
        """Read all members, find what they share, encode them from memory."""
        scheme = step.scheme
        kept = []
        for member in step.members:
            # In one piece: blocks kept one by one between temporaries would tear the heap apart.
            whole_NK = torch.empty(member.weight.shape, dtype=TORCH_DTYPES[member.weight.dtype], device=self._device)
            for row, weight_NK in self._blocks(member, 0, len(whole_NK), scheme):
                finite_NK, bounds_BRC = self._observe(weight_NK, member, scheme)
                block_NK = whole_NK[row : row + len(finite_NK)].copy_(finite_NK)
                kept.append((member, row, block_NK, bounds_BRC))
        shared = self._share(step, [_largest([bounds_BRC for *_, bounds_BRC in kept])])
        for member, row, weight_NK, bounds_BRC in kept:
            self._store(member, writer, row, scheme.encode(weight_NK, bounds_BRC, shared=shared), scheme)
        for member in step.members:
            self._store_once(member, scheme, writer, shared)

    def _blocks(self, member: Member, start: int, end: int, scheme: Scheme) -> Iterator[tuple[int, Tensor]]:
        """(first row, weight_NK on the device) for blocks of the rows start..end. A block may overwrite the one before."""
        weight = member.weight
        for row, stored in self._stored_blocks(weight, start, end, scheme):
            yield row, weight.decode({role: tensor.to(self._device) for role, tensor in stored.items()})

    def _stored_blocks(self, weight: Weight, start: int, end: int, scheme: Scheme) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(first row, what the source has of it) for blocks of the rows start..end."""
        multiple, num_columns = row_multiple(weight, scheme), weight.shape[1]
        # Several tensors, or strided ones, are read more at a time than is decoded: a line of theirs would be a few bytes.
        read_elements = self._memory.block_elements
        if not weight.is_plain:
            read_elements = self._memory.read_bytes * weight.num_elements // max(weight.num_bytes, 1)
        for read in row_blocks(end - start, num_columns, row_multiple=multiple, max_elements=read_elements):
            first, last = start + read[0], start + read[1]
            stored = weight.read(self._source, first, last, self._buffer)
            if weight.is_plain:
                yield first, stored
                continue
            for block in row_blocks(last - first, num_columns, row_multiple=multiple, max_elements=self._memory.block_elements):
                yield first + block[0], weight.select(stored, first + block[0], first + block[1], of_start=first)

    def _buffer(self, role: str, num_bytes: int) -> Tensor:
        """Memory of this worker, used again and again."""
        buffer: Tensor | None = getattr(self._buffers, role, None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
            setattr(self._buffers, role, buffer)
        return buffer[:num_bytes]

    def _observe(self, weight_NK: Tensor, member: Member, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """The weight, with zeros in place of what is not finite, and its bounds. Raises CheckpointError unless that is allowed."""
        bounds_BRC = scheme.observe(weight_NK)
        if bool(bounds_BRC.isfinite().all()):
            return weight_NK, bounds_BRC
        name = member.weight.name
        if not self._allow_nonfinite:
            raise CheckpointError(f"{name} holds NaN or infinite weights; --allow-nonfinite stores them as zeros")
        self.nonfinite.add(name)
        finite_NK = weight_NK.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return finite_NK, scheme.observe(finite_NK)

    def _share(self, step: Encode, amaxes: Sequence[Tensor]) -> Tensor:
        amax = torch.stack(list(amaxes)).amax(0)
        return step.scheme.share(amax, TORCH_DTYPES[step.members[0].weight.dtype]).to(self._device)

    def _store(self, member: Member, writer: ShardWriter, row: int, stored: Mapping[str, Tensor], scheme: Scheme) -> None:
        for suffix, tensor in stored.items():
            spec = member.place(suffix)
            line_bytes = spec.num_bytes // spec.shape[0]
            writer.write(spec.start + scheme.line(suffix, row) * line_bytes, _bytes(tensor))

    def _store_once(self, member: Member, scheme: Scheme, writer: ShardWriter, shared: Tensor | None) -> None:
        once = scheme.once(member.weight.shape, TORCH_DTYPES[member.weight.dtype], shared)
        self._store(member, writer, 0, once, scheme)


def _largest(bounds: Sequence[Tensor]) -> Tensor:
    return torch.stack([bound.abs().amax() for bound in bounds]).amax().view(1).cpu()


def _bytes(tensor: Tensor) -> memoryview:
    return flat(tensor.cpu()).view(torch.uint8).numpy().data
