"""A checkpoint on a file system."""

import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from streamquant.checkpoint.layout import CONFIG_NAMES, parts_of_file
from streamquant.checkpoint.source import SKIPPED
from streamquant.errors import CheckpointError

SOURCE = "SOURCE is a directory, a .safetensors file, a model on the Hub such as org/model, or a URL"
# A pipe or a device may have taken the place of a file since it was listed; opened without these, it could stop the program.
NO_WAITING = os.O_NONBLOCK | os.O_NOCTTY


class LocalSource:
    """A directory, or one safetensors file with the config beside it. Reads with pread and maps nothing.

    Links in it are followed to its own files and, from a snapshot in the Hub's cache, to the blobs of that repository. Through one that
    leads elsewhere a private file of the user could become part of the output.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; {SOURCE}")
        self.name = str(path)
        self.is_file = not path.is_dir()
        self.revision: str | None = None
        self.num_connections = 0
        if self.is_file and path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a .safetensors file; {SOURCE}")
        self.folder = path.parent if self.is_file else path
        self._file = path.name
        self._roots = _roots(self.folder)
        self._opened: dict[int, tuple[str, int]] = {}  # by thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file opened for reading."""
        while self._opened:
            os.close(self._opened.popitem()[1][1])

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, in folders too. Raises CheckpointError for what is neither."""
        if self.is_file:
            configs = [name for name in CONFIG_NAMES if (self.folder / name).is_file()]
            return {name: self._size(name) for name in parts_of_file(self._file, configs)}
        sizes = {}
        folders = [""]
        while folders:  # of any depth, so no recursion
            folder = folders.pop()
            with os.scandir(self.folder / folder) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name in SKIPPED:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name + "/")
                    else:
                        sizes[name] = self._size(name)
        return sizes

    def stamp(self, file: str) -> str:
        """The modification time in nanoseconds."""
        return str((self.folder / file).stat().st_mtime_ns)

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on. Safe to call from several threads."""
        filled = 0
        while filled < len(buffer):
            count = os.preadv(self._open(file), [buffer[filled:]], start + filled)
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {start + filled}; it was longer when its header was read")
            filled += count

    def prepare(self, files: Sequence[str]) -> None:
        """Nothing to do."""

    def interrupt(self) -> None:
        """Local reads do not wait."""

    def _open(self, file: str) -> int:
        """The file, open until this thread wants another: a process may not hold all shards of a large checkpoint open."""
        thread = threading.get_ident()
        opened = self._opened.get(thread)
        if opened is None or opened[0] != file:
            descriptor = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC | NO_WAITING)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise CheckpointError(f"{self.folder / file} is not a regular file any more")
            if opened is not None:
                os.close(opened[1])
            opened = self._opened[thread] = file, descriptor
        return opened[1]

    def _size(self, file: str) -> int:
        """Bytes of a file that may be a link."""
        path = self.folder / file
        if path.is_symlink() and not (self.is_file and file == self._file):
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(root) for root in self._roots):
                raise CheckpointError(f"{path} is a link that leads out of {self.folder}; put a copy of what it leads to in its place")
            if target.is_dir():
                raise CheckpointError(f"{path} is a link to a folder, which is not followed; put the folder in its place or take it away")
        return _size(path)


def _roots(folder: Path) -> list[Path]:
    """The folders to which links in `folder` may lead."""
    folder = folder.resolve()
    snapshot = next((path for path in (folder, *folder.parents) if path.match("models--*/snapshots/*")), None)
    return [folder] if snapshot is None else [folder, snapshot.parent.parent / "blobs"]


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing, to itself, to where we may not look
        raise CheckpointError(f"{path} leads to no file: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size
