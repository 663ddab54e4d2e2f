"""Where a checkpoint comes from: a folder of files that are read by position.

A new kind of source is a new class with what `Source` has.
"""

from collections.abc import Mapping
from typing import Protocol


class Source(Protocol):
    """A folder of files, read by position."""

    name: str
    is_file: bool  # one file of weights, whatever lies beside it

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by name relative to the folder with forward slashes."""

    def stamp(self, file: str) -> str:
        """What changes when the file is replaced (a modification time, an ETag)."""

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on. Raises CheckpointError if the file ends before."""

    def copy(self, file: str, start: int, num_bytes: int, target: int, target_start: int) -> None:
        """Copy bytes into the open file descriptor `target` at `target_start`."""
