"""Where a checkpoint comes from, and what is in it: files, headers, config.

A `Source` lists files and reads bytes; layout.py tells from their names what they are; `read_checkpoint` reads index, config and
headers. A new kind of source (the Hub, an object store) is a new class with what `Source` has.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol, Self

from streamquant.checkpoint.header import LENGTH_BYTES, TensorSpec, header_length, parse_header, parse_object
from streamquant.checkpoint.journal import RECORD_NAME
from streamquant.checkpoint.layout import (
    CONFIG_NAMES,
    DESCRIBES_ANOTHER_QUANTIZATION,
    QUANTIZATION_KEYS,
    Layout,
    layout_of_file,
    layout_of_folder,
    reason_to_leave_out,
)
from streamquant.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20
COPY_CHUNK_BYTES = 8 << 20
SKIPPED_FOLDERS = {".git", ".cache", ".streamquant"}


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


class LocalSource:
    """A directory, or one safetensors file with the config beside it. Reads with pread and maps nothing."""

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; SOURCE is a local directory or a .safetensors file")
        self.name = str(path)
        self.is_file = not path.is_dir()
        if self.is_file and path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a .safetensors file; SOURCE is a local directory or a .safetensors file")
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
            config = layout_of_file(self._file, configs).config_name
            return {name: _size(self.folder / name) for name in (self._file, *configs) if name in {self._file, config}}
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

    def copy(self, file: str, start: int, num_bytes: int, target: int, target_start: int) -> None:
        """Copy in the kernel where the file systems can, through a small buffer where they cannot."""
        source, copied = self._open(file), 0
        while copied < num_bytes:
            chunk = min(num_bytes - copied, COPY_CHUNK_BYTES)
            try:
                count = os.copy_file_range(source, target, chunk, start + copied, target_start + copied)
            except OSError as error:
                if error.errno not in {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}:
                    raise
                count = os.pwrite(target, os.pread(source, chunk, start + copied), target_start + copied)
            if count == 0:
                raise CheckpointError(f"{file} ends at byte {start + copied}; it was longer when its header was read")
            copied += count

    def _open(self, file: str) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            opened = os.open(self.folder / file, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors.setdefault(file, opened)
            if descriptor != opened:  # another thread was first
                os.close(opened)
        return descriptor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is in a checkpoint, from its headers and its config alone."""

    source: str
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorSpec]  # in source order
    config: Mapping[str, Any] | None
    side_files: tuple[str, ...]  # neither weights nor files that a conversion writes anew
    layout: Layout = field(default_factory=Layout)
    left_out: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # file -> reason
    identity: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # shard -> what it changes with

    @property
    def quantization(self) -> Any:
        """What the config says about the quantization, None if it says nothing."""
        return (self.config or {}).get(self.layout.quantization_key)


def read_checkpoint(source: Source) -> Checkpoint:
    """Read headers, index and config, and check that they agree.

    Raises CheckpointError if a file is missing, damaged or contradicts another.
    """
    sizes = source.sizes()
    layout, shards = _lay_out(source, sizes)
    weight_map = {} if shards else _read_index(source, layout.index_name, sizes)
    shards = shards or tuple(sorted(set(weight_map.values())))
    tensors: dict[str, TensorSpec] = {}
    identity = {}
    for shard in shards:
        text = _read_header(source, shard, sizes[shard])
        identity[shard] = f"{sizes[shard]} bytes, {source.stamp(shard)}, header {hashlib.sha256(text).hexdigest()}"
        for spec in parse_header(text, file=shard, file_bytes=sizes[shard]):
            if spec.name in tensors:
                raise CheckpointError(f"{spec.name} is in both {tensors[spec.name].file} and {shard}")
            tensors[spec.name] = spec
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(f"{layout.index_name} places {name} in {shard}, which does not have it")

    config = _read_json(source, layout.config_name, sizes[layout.config_name]) if layout.config_name in sizes else None
    left_out = {file: reason for file in sizes if file not in shards and (reason := reason_to_leave_out(file, layout))}
    for file in CONFIG_NAMES:
        if file in sizes and file != layout.config_name and _describes_quantization(source, file, sizes[file]):
            left_out[file] = DESCRIBES_ANOTHER_QUANTIZATION
    written = {layout.config_name, layout.index_name, RECORD_NAME, *shards}
    return Checkpoint(
        source=source.name,
        shards=shards,
        tensors=MappingProxyType(tensors),
        config=None if config is None else MappingProxyType(config),
        side_files=tuple(file for file in sizes if file not in left_out and file not in written),
        layout=layout,
        left_out=MappingProxyType(left_out),
        identity=MappingProxyType(identity),
    )


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


def _read_header(source: Source, shard: str, file_bytes: int) -> bytes:
    prefix = bytearray(min(LENGTH_BYTES, file_bytes))
    source.read(shard, 0, memoryview(prefix))
    text = bytearray(header_length(bytes(prefix), file=shard, file_bytes=file_bytes))
    source.read(shard, LENGTH_BYTES, memoryview(text))
    return bytes(text)


def _read_json(source: Source, file: str, num_bytes: int) -> dict[str, Any]:
    if num_bytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} of {num_bytes} bytes is too large to be what its name says")
    text = bytearray(num_bytes)
    source.read(file, 0, memoryview(text))
    return parse_object(bytes(text), file=file)


def _describes_quantization(source: Source, file: str, num_bytes: int) -> bool:
    """Whether a config that is a mere side file here, and may be anything, describes a quantization."""
    try:
        return bool(_read_json(source, file, num_bytes).get(QUANTIZATION_KEYS[file]))
    except CheckpointError:
        return False


def _lay_out(source: Source, sizes: Mapping[str, int]) -> tuple[Layout, tuple[str, ...]]:
    """The layout, and the shards where no index lists them."""
    if not source.is_file:
        return layout_of_folder(sizes, where=source.name)
    (file,) = (name for name in sizes if name not in CONFIG_NAMES)
    return layout_of_file(file, sizes), (file,)


def _read_index(source: Source, index_name: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """The weight map of the index."""
    weight_map = _read_json(source, index_name, sizes[index_name]).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_name}: weight_map must map tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{index_name}: weight_map is empty")
    for shard in sorted(set(weight_map.values())):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{index_name} names {shard!r}, which leaves the folder")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_name} names {shard!r}, which is not a .safetensors file")
        if shard not in sizes:
            raise CheckpointError(f"{index_name} names {shard}, which is not in {source.name}; is the download complete?")
    return weight_map
