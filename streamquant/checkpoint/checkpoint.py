"""What is in a checkpoint: files, headers, config.

layout.py tells from the names of a source's files what they are; `read_checkpoint` reads index, config and headers.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
    Layout,
    layout_of_file,
    layout_of_folder,
    reason_to_leave_out,
)
from streamquant.checkpoint.source import Source
from streamquant.errors import CheckpointError

MAX_JSON_BYTES = 256 << 20
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
    sizes = dict(sorted(source.sizes().items()))  # in one order, wherever they come from
    layout, shards = _lay_out(source, sizes)
    weight_map = {} if shards else _read_index(source, layout.index_name, sizes)
    shards = shards or tuple(sorted(set(weight_map.values())))
    tensors: dict[str, TensorSpec] = {}
    identity = {}
    for shard, text in _read_headers(source, shards, sizes):
        identity[shard] = f"{_identity(source, shard, sizes)}{HEADER}{hashlib.sha256(text).hexdigest()}"
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
    side_files = tuple(file for file in sizes if file not in left_out and file not in written)
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
