"""Files of the output: written under temporary names, complete and flushed before they get their own."""

import os
from pathlib import Path
from typing import Self


class ShardWriter:
    """A safetensors file of known header and size, filled by position from any thread, in any order."""

    def __init__(self, path: Path, *, header: bytes, num_bytes: int):
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        os.ftruncate(self.descriptor, num_bytes)
        self.write(0, memoryview(header))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, start: int, buffer: memoryview) -> None:
        """Write all of `buffer` at byte `start`."""
        written = 0
        while written < len(buffer):
            written += os.pwrite(self.descriptor, buffer[written:], start + written)

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
