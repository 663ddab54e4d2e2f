"""Where a checkpoint comes from: a folder of files that are read by position.

A new kind of source is a new class with what `Source` has. The names that it lists may come from anybody; `list_files` looks at them.
"""

from collections.abc import Mapping
from typing import Protocol

from streamquant.checkpoint.limits import MAX_FILES, fault_of_file_name
from streamquant.errors import CheckpointError

SKIPPED = {".git", ".cache", ".streamquant"}  # of git, of downloads, of ourselves: part of no checkpoint, at any depth


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


def list_files(source: Source) -> dict[str, int]:
    """What `source.sizes()` says, without files in SKIPPED. Raises CheckpointError for names that could not be files in an output."""
    sizes = {file: num_bytes for file, num_bytes in source.sizes().items() if SKIPPED.isdisjoint(file.split("/"))}
    if len(sizes) > MAX_FILES:
        raise CheckpointError(f"{source.name} holds {len(sizes)} files; a checkpoint has no more than {MAX_FILES}")
    for file in sizes:
        if fault := fault_of_file_name(file):
            raise CheckpointError(f"{source.name} holds {file!r}, which {fault}; give it another name or take it away")
    return sizes
