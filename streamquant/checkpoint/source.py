"""Where a checkpoint comes from: a folder of files that are read by position.

A new kind of source is a new class with what `Source` has, and a line in `open_source`. The names that it lists may come from anybody;
`list_files` looks at them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self

from streamquant.checkpoint.limits import MAX_FILES, fault_of_file_name
from streamquant.errors import CheckpointError

SKIPPED = {".git", ".cache", ".streamquant"}  # of git, of downloads, of ourselves: part of no checkpoint, at any depth


class Extent(NamedTuple):
    """The bytes start..end of a file."""

    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """How many."""
        return self.end - self.start


class Reader(Protocol):
    """Files that are read by position."""

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on. Safe to call from several threads.

        Raises CheckpointError if the file ends before or is not what it was, NetworkError if it cannot be reached.
        """


class Source(Reader, Protocol):
    """A folder of files."""

    @property
    def name(self) -> str:
        """What people call it; holds no secrets."""

    @property
    def is_file(self) -> bool:
        """Whether it is one file of weights, whatever lies beside it."""

    @property
    def revision(self) -> str | None:
        """What it is pinned to, if it has versions."""

    @property
    def num_connections(self) -> int:
        """Reads at a time that pay; 0 where reads are local and waiting for them is short."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by name relative to the folder with forward slashes."""

    def stamp(self, file: str) -> str:
        """What changes when the file is replaced (a modification time, a hash of what is in it)."""

    def prepare(self, files: Sequence[str]) -> None:
        """Do what is to be done once before these files are read from end to end."""

    def interrupt(self) -> None:
        """Make every read that waits for the network fail soon."""


def list_files(source: Source) -> dict[str, int]:
    """What `source.sizes()` says, in one order, without files in SKIPPED. Raises CheckpointError for names that no output could have."""
    sizes = {file: num_bytes for file, num_bytes in sorted(source.sizes().items()) if SKIPPED.isdisjoint(file.split("/"))}
    if len(sizes) > MAX_FILES:
        raise CheckpointError(f"{source.name} holds {len(sizes)} files; a checkpoint has no more than {MAX_FILES}")
    for file in sizes:
        if fault := fault_of_file_name(file):
            raise CheckpointError(f"{source.name} holds {file!r}, which {fault}; give it another name or take it away")
    return sizes
