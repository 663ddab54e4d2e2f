"""A checkpoint on a file system."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from streamquant.checkpoint.layout import CONFIG_NAMES, parts_of_file
from streamquant.errors import CheckpointError

SOURCE = "SOURCE is a directory, a .safetensors file, a model on the Hub such as org/model, or a URL"
SKIPPED_FOLDERS = {".git", ".cache", ".streamquant"}


class LocalSource:
    """A directory, or one safetensors file with the config beside it. Reads with pread and maps nothing."""

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
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file opened for reading."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def sizes(self) -> dict[str, int]:
        """Bytes of every regular file; links to files are followed (the Hub cache is made of them), links to folders are not."""
        if self.is_file:
            configs = [name for name in CONFIG_NAMES if (self.folder / name).is_file()]
            return {name: _size(self.folder / name) for name in parts_of_file(self._file, configs)}
        sizes = {}
        for folder, subfolders, files in os.walk(self.folder, onerror=_raise):
            subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
            for name in sorted(files):
                path = Path(folder, name)
                sizes[path.relative_to(self.folder).as_posix()] = _size(path)
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
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            opened = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors.setdefault(file, opened)
            if descriptor != opened:  # another thread was first
                os.close(opened)
        return descriptor


def _raise(error: OSError) -> None:
    raise error


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:  # a link to nothing, to itself, to where we may not look
        raise CheckpointError(f"{path} leads to no file: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size
