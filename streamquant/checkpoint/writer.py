"""Files of the output: written under temporary names, complete and flushed before they get their own.

What holds after a loss of power, since each step waits for the disk: bytes are in the file before the journal says so, all bytes of a
file before it has its name, its name before the journal says so, and every file before index and config.
"""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from streamquant.checkpoint.checksum import Checksum

WRITE_BEHIND_BYTES = 16 << 20
NOTHING = (sys.maxsize, 0)
NO_STEPS: Mapping[int, int] = MappingProxyType({})


class ShardWriter:
    """A file of known size that begins with `header`, filled step by step, by position, from any thread, in any order.

    `finished`: the steps whose bytes an earlier run has flushed, with their checksums. They are forgotten unless the file is there.
    """

    def __init__(self, path: Path, *, header: bytes, num_bytes: int, finished: Mapping[int, int] = NO_STEPS):
        self.path = path
        self.num_bytes = num_bytes
        self._lock = threading.Lock()
        self._idle, self._idle_bytes = NOTHING, 0  # from the first to the last byte that the disk was not told of, and how many
        goes_on = bool(finished) and path.is_file() and path.stat().st_size == num_bytes
        self.finished = dict(finished) if goes_on else {}
        truncate = 0 if goes_on else os.O_TRUNC
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | truncate | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(self.descriptor, num_bytes)
            first = StepWriter(self)
            first.write(0, memoryview(header))
        except BaseException:
            self.close()
            raise
        self._header_checksum = first.checksum

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def crc32(self) -> int:
        """The CRC-32 of the file, once all its steps are finished."""
        value = self._header_checksum
        for checksum in self.finished.values():
            value ^= checksum
        return value

    def write(self, start: int, buffer: memoryview) -> None:
        """Write all of `buffer` at byte `start`. The disk begins with it soon, so that it does not stand idle until somebody waits."""
        written = 0
        while written < len(buffer):
            written += os.pwrite(self.descriptor, buffer[written:], start + written)
        with self._lock:
            self._idle_bytes += written
            self._idle = min(self._idle[0], start), max(self._idle[1], start + written)
            if self._idle_bytes < WRITE_BEHIND_BYTES:
                return
            (start, end), self._idle, self._idle_bytes = self._idle, NOTHING, 0
        os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)  # starts writing; what is not on the disk is kept

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        os.fdatasync(self.descriptor)

    def publish(self, final: Path) -> None:
        """Flush to the disk, then give the file its name, then flush the name."""
        os.fsync(self.descriptor)
        self.close()
        self.path.replace(final)
        sync_folder(final.parent)

    def close(self) -> None:
        """Close the file; without `publish` it keeps its temporary name."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class StepWriter:
    """What one step writes into a file, and the checksum of that."""

    def __init__(self, writer: ShardWriter):
        self._writer = writer
        self._checksum = Checksum(writer.num_bytes)

    def write(self, start: int, buffer: memoryview) -> None:
        """Write all of `buffer` at byte `start`."""
        self._writer.write(start, buffer)
        self._checksum.add(start, buffer)

    @property
    def checksum(self) -> int:
        """What the step adds to the CRC-32 of the file."""
        return self._checksum.value


def write_file(final: Path, content: bytes, *, work: Path) -> None:
    """Write a small file whole: under a temporary name in `work`, flushed, then renamed."""
    with ShardWriter(work / f"{final.name}.part", header=content, num_bytes=len(content)) as writer:
        writer.publish(final)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
