"""What is in a checkpoint: files, headers, config.

layout.py tells from the names of a source's files what they are; `read_checkpoint` reads index, config and headers.
"""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from streamquant.checkpoint.header import LENGTH_BYTES, TensorSpec, header_length, parse_header, parse_object
from streamquant.checkpoint.journal import RECORD_NAME
from streamquant.checkpoint.layout import (
    CONFIG_NAMES,
    DESCRIBES_ANOTHER_QUANTIZATION,
    QUANTIZATION_KEYS,
    SUFFIX,
    Layout,
    layout_of_file,
    layout_of_folder,
    reason_to_leave_out,
)
from streamquant.checkpoint.limits import (
    MAX_CONFIG_BYTES,
    MAX_HEADERS_BYTES,
    MAX_INDEX_BYTES,
    MAX_JSON_DEPTH,
    MAX_TENSORS,
    fault_of_file_name,
)
from streamquant.checkpoint.source import Source, list_files
from streamquant.errors import CheckpointError

HEADER_GUESS_BYTES = 64 << 10  # of 400 tensors
HEADER = ", header "  # in the identity of a shard, before the hash of its header


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
    identity: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # file -> what changes with it
    revision: str | None = None  # what the source is pinned to, if it has versions
    is_remote: bool = False

    @property
    def quantization(self) -> Any:
        """What the config says about the quantization, None if it says nothing."""
        return (self.config or {}).get(self.layout.quantization_key)


def read_checkpoint(source: Source) -> Checkpoint:
    """Read headers, index and config, and check that they agree.

    Raises CheckpointError if a file is missing, damaged or contradicts another.
    """
    sizes = list_files(source)
    layout, shards = _lay_out(source, sizes)
    weight_map = {} if shards else _read_index(source, layout.index_name, sizes)
    shards = shards or tuple(sorted(set(weight_map.values())))
    tensors: dict[str, TensorSpec] = {}
    identity = {}
    header_bytes = 0
    for shard, text in _read_headers(source, shards, sizes):
        header_bytes += len(text)
        if header_bytes > MAX_HEADERS_BYTES:
            raise CheckpointError(f"the headers up to {shard} have {header_bytes} bytes; {MAX_HEADERS_BYTES} are read")
        identity[shard] = f"{_identity(source, shard, sizes)}{HEADER}{hashlib.sha256(text).hexdigest()}"
        for spec in parse_header(text, file=shard, file_bytes=sizes[shard]):
            if spec.name in tensors:
                raise CheckpointError(f"{spec.name} is in both {tensors[spec.name].file} and {shard}")
            tensors[spec.name] = spec
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"the shards up to {shard} hold {len(tensors)} tensors; {MAX_TENSORS} are read")
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file != shard:
            raise CheckpointError(f"{layout.index_name} places {name} in {shard}, which does not have it")

    config = _read_json(source, layout.config_name, sizes, max_bytes=MAX_CONFIG_BYTES) if layout.config_name in sizes else None
    left_out = {file: reason for file in sizes if file not in shards and (reason := reason_to_leave_out(file, layout))}
    for file in CONFIG_NAMES:
        if file in sizes and file != layout.config_name and _describes_quantization(source, file, sizes):
            left_out[file] = DESCRIBES_ANOTHER_QUANTIZATION
    written = {layout.config_name, layout.index_name, RECORD_NAME, *shards}
    side_files = tuple(file for file in sizes if file not in left_out and file not in written)
    _refuse_folders(side_files, written.union(sizes))
    for file in (*side_files, *({layout.config_name, layout.index_name} & sizes.keys())):
        identity[file] = _identity(source, file, sizes)
    return Checkpoint(
        source=source.name,
        shards=shards,
        tensors=MappingProxyType(tensors),
        config=None if config is None else MappingProxyType(config),
        side_files=side_files,
        layout=layout,
        left_out=MappingProxyType(left_out),
        identity=MappingProxyType(identity),
        revision=source.revision,
        is_remote=source.num_connections > 0,
    )


def require_unchanged(checkpoint: Checkpoint, source: Source) -> None:
    """Raise CheckpointError if a file that was read is no longer what it was."""
    sizes = source.sizes()
    for file, identity in checkpoint.identity.items():
        if file not in sizes or identity.partition(HEADER)[0] != _identity(source, file, sizes):
            raise CheckpointError(f"{file} of {source.name} changed while it was read; run again with --restart")


def _identity(source: Source, file: str, sizes: Mapping[str, int]) -> str:
    return f"{sizes[file]} bytes, {source.stamp(file)}"


def _read_headers(source: Source, shards: Sequence[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
    """The JSON of each header; of a few at a time where reading takes long, no more, for they may be large."""
    at_a_time = max(source.num_connections, 1)
    with ThreadPoolExecutor(at_a_time, "streamquant-headers") as pool:
        for start in range(0, len(shards), at_a_time):
            batch = shards[start : start + at_a_time]
            yield from zip(batch, pool.map(lambda shard: _read_header(source, shard, sizes[shard]), batch), strict=True)


def _read_header(source: Source, shard: str, file_bytes: int) -> bytes:
    """The JSON of a header, as a rule by one read."""
    guess = bytearray(min(HEADER_GUESS_BYTES, file_bytes))
    source.read(shard, 0, memoryview(guess))
    end = LENGTH_BYTES + header_length(bytes(guess[:LENGTH_BYTES]), file=shard, file_bytes=file_bytes)
    text = guess[LENGTH_BYTES:end]
    if end > len(guess):
        rest = bytearray(end - len(guess))
        source.read(shard, len(guess), memoryview(rest))
        text += rest
    return bytes(text)


def _read_json(source: Source, file: str, sizes: Mapping[str, int], *, max_bytes: int) -> dict[str, Any]:
    if sizes[file] > max_bytes:
        raise CheckpointError(f"{file} of {sizes[file]} bytes is too large to be what its name says; the limit is {max_bytes}")
    text = bytearray(sizes[file])
    source.read(file, 0, memoryview(text))
    value = parse_object(bytes(text), file=file)
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        children = itertools.chain.from_iterable(node.values() if isinstance(node, dict) else node for node in level)
        level = [child for child in children if isinstance(child, dict | list)]
    if level:
        raise CheckpointError(f"{file}: its JSON nests too deeply; {MAX_JSON_DEPTH} levels are read")
    return value


def _describes_quantization(source: Source, file: str, sizes: Mapping[str, int]) -> bool:
    """Whether a config that is a mere side file here, and may be anything, describes a quantization."""
    try:
        return bool(_read_json(source, file, sizes, max_bytes=MAX_CONFIG_BYTES).get(QUANTIZATION_KEYS[file]))
    except CheckpointError:
        return False


def _refuse_folders(side_files: Iterable[str], names: Collection[str]) -> None:
    """Raise CheckpointError if side files lie in a folder whose name is that of a file, in the source or of the output."""
    folders = {str(folder) for file in side_files for folder in PurePosixPath(file).parents}
    for folder in sorted(folders):
        if folder in names or ("/" not in folder and folder.endswith(SUFFIX)):
            raise CheckpointError(f"{folder} is a folder, and the name of a file that is written; rename the folder or take it away")


def _lay_out(source: Source, sizes: Mapping[str, int]) -> tuple[Layout, tuple[str, ...]]:
    """The layout, and the shards where no index lists them."""
    if not source.is_file:
        return layout_of_folder(sizes, where=source.name)
    (file,) = (name for name in sizes if name not in CONFIG_NAMES)
    return layout_of_file(file, sizes), (file,)


def _read_index(source: Source, index_name: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """The weight map of the index."""
    weight_map = _read_json(source, index_name, sizes, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_name}: weight_map must map tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{index_name}: weight_map is empty")
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(SUFFIX):
            raise CheckpointError(f"{index_name} names {shard!r}, which is not a {SUFFIX} file")
        if fault := fault_of_file_name(shard):
            raise CheckpointError(f"{index_name} names {shard!r}, which {fault}")
        if shard not in sizes:
            raise CheckpointError(f"{index_name} names {shard}, which is not in {source.name}; is the download complete?")
    return weight_map
