"""Fetches what tasks are going to read from a remote source, in their order, a bounded number of bytes ahead, over several connections.

Tasks come in groups, which read the same bytes or bytes that lie side by side. Groups are put together to windows; in a window what is
close is fetched in one request, up to the size of a buffer, and nothing is fetched twice. A buffer is free again once the last task that
reads from it is done.
"""

import os
import queue
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol, TypeVar

from streamquant.checkpoint.source import Extent, Source
from streamquant.trace import Trace

GAP_BYTES = 128 << 10  # fetched in less time than another request takes
NUM_BUFFERS = 16
WINDOW_BUFFERS = 4
WINDOW_BYTES = 8 << 20
KEPT_WINDOWS = 4


class Task(Protocol):
    """Something that reads."""

    @property
    def extents(self) -> Sequence[Extent]:
        """All that it reads."""


T = TypeVar("T", bound=Task)


class ReadAhead:
    """Reads a remote source ahead with `num_bytes` of buffers."""

    def __init__(self, source: Source, num_bytes: int, trace: Trace):
        self._source, self._trace = source, trace
        self._buffer_bytes = num_bytes // NUM_BUFFERS
        self._free: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(None)  # memory is taken when it is needed
        self._fetchers = ThreadPoolExecutor(source.num_connections, "streamquant-fetch")

    def close(self) -> None:
        """Stop fetching."""
        self._fetchers.shutdown(cancel_futures=True)

    def pieces(self, tasks: Iterable[Task]) -> list[Extent]:
        """What is fetched for these tasks, a buffer each."""
        return coalesce((extent for task in tasks for extent in task.extents), max_bytes=self._buffer_bytes)

    def fits(self, tasks: Iterable[Task]) -> bool:
        """Whether all that these tasks read can be in the buffers at once."""
        return len(self.pieces(tasks)) <= NUM_BUFFERS

    def fetch(self, groups: Iterable[Sequence[T]]) -> Iterator[tuple[T, "Reading"]]:
        """The tasks of the groups, each of which `fits`, and what each reads from, while that is being fetched.

        Waits for buffers. Every task must be started before the next is asked for, and release what it read from in the end.
        """
        window: list[T] = []
        extents: list[Extent] = []
        for group in groups:
            own = self.pieces(group)
            together = coalesce([*extents, *own], max_bytes=self._buffer_bytes)
            if window and len(together) > WINDOW_BUFFERS:
                yield from self._fetch_window(window)
                window, together = [], own
            window += group
            extents = together
        yield from self._fetch_window(window)

    def _fetch_window(self, tasks: Sequence[T]) -> Iterator[tuple[T, "Reading"]]:
        extents = self.pieces(tasks)
        read = [[index for index, extent in enumerate(extents) if any(_overlap(extent, own) for own in task.extents)] for task in tasks]
        num_readers = Counter(index for indices in read for index in indices)
        pieces = [self._request(extent, num_readers[index]) for index, extent in enumerate(extents)]
        for task, indices in zip(tasks, read, strict=True):
            yield task, Reading([pieces[index] for index in indices])

    def _fetch(self, extent: Extent, view: memoryview) -> None:
        with self._trace.span("fetch"):
            self._source.read(extent.file, extent.start, view)

    def _request(self, extent: Extent, num_readers: int) -> "_Piece":
        buffer = self._free.get() or bytearray(self._buffer_bytes)
        view = memoryview(buffer)[: extent.num_bytes]
        fetched = self._fetchers.submit(self._fetch, extent, view)
        return _Piece(extent, view, fetched, num_readers, lambda: self._free.put(buffer))


class _Piece:
    """The bytes of a request, for as long as a task reads from them."""

    def __init__(self, extent: Extent, view: memoryview, fetched: Future[None], num_readers: int, free: Callable[[], None]):
        self.extent = extent
        self._view, self._fetched, self._num_readers, self._free = view, fetched, num_readers, free
        self._lock = threading.Lock()

    def read(self, start: int, end: int) -> memoryview:
        """The bytes start..end of the file, once they are there."""
        self._fetched.result()
        return self._view[start - self.extent.start : end - self.extent.start]

    def release(self) -> None:
        """One reader less."""
        with self._lock:
            self._num_readers -= 1
            is_last = self._num_readers == 0
        if is_last:
            self._free()


class Reading:
    """What a task reads from."""

    def __init__(self, pieces: Sequence[_Piece]):
        self._pieces = pieces

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on, waiting for them. Raises what kept them from being fetched."""
        wanted = Extent(file, start, start + len(buffer))
        found = 0
        for piece in self._pieces:
            if _overlap(piece.extent, wanted):
                first, last = max(start, piece.extent.start), min(wanted.end, piece.extent.end)
                buffer[first - start : last - start] = piece.read(first, last)
                found += last - first
        assert found == len(buffer), f"{wanted} is not what the task said it would read"

    def release(self) -> None:
        """Say that nothing more is read."""
        for piece in self._pieces:
            piece.release()


class Windows:
    """Reads a remote source by large pieces and keeps the last few, for whoever reads small ones that lie behind each other."""

    def __init__(self, source: Source):
        self._source, self._sizes = source, source.sizes()
        self._kept: OrderedDict[Extent, bytearray] = OrderedDict()

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        filled = 0
        while filled < len(buffer):
            extent, window = self._window(file, start + filled)
            first = start + filled - extent.start
            count = min(len(buffer) - filled, len(window) - first)
            buffer[filled : filled + count] = memoryview(window)[first : first + count]
            filled += count

    def _window(self, file: str, position: int) -> tuple[Extent, bytearray]:
        for extent in self._kept:
            if extent.file == file and extent.start <= position < extent.end:
                self._kept.move_to_end(extent)
                return extent, self._kept[extent]
        extent = Extent(file, position, min(position + WINDOW_BYTES, self._sizes[file]))
        if len(self._kept) == KEPT_WINDOWS:
            self._kept.popitem(last=False)
        window = self._kept[extent] = bytearray(extent.num_bytes)
        self._source.read(file, position, memoryview(window))
        return extent, window


class Spool:
    """Parts of a source's files in temporary files, at the same places, which vanish with the process whatever happens."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._lock = threading.Lock()

    def write(self, file: str, start: int, buffer: memoryview) -> None:
        """Keep the bytes from `start` on."""
        written = 0
        while written < len(buffer):
            written += os.pwrite(self._descriptor(file), buffer[written:], start + written)

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes that were kept."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._descriptor(file), [buffer[filled:]], start + filled)
            assert count, f"{file} was not kept as far as byte {start + filled}"
            filled += count

    def close(self) -> None:
        """Give the disk space back."""
        for file in self._files.values():
            file.close()

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115, `close` closes it
            return self._files[file].fileno()


def coalesce(extents: Iterable[Extent], *, max_bytes: int) -> list[Extent]:
    """Extents of at most `max_bytes` that cover these, in order, and of what lies between them no more than short gaps."""
    gap_bytes = min(GAP_BYTES, max_bytes // 2)  # so that none of them covers nothing but a gap
    joined: list[Extent] = []
    for extent in sorted(extents):
        if joined and joined[-1].file == extent.file and extent.start <= joined[-1].end + gap_bytes:
            joined[-1] = joined[-1]._replace(end=max(joined[-1].end, extent.end))
        elif extent.num_bytes:
            joined.append(extent)
    return [Extent(file, at, min(at + max_bytes, end)) for file, start, end in joined for at in range(start, end, max_bytes)]


def _overlap(one: Extent, other: Extent) -> bool:
    return one.file == other.file and one.start < other.end and other.start < one.end
