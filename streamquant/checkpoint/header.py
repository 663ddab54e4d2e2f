"""The safetensors header: who is where in a file.

    u64 little-endian N | N bytes of JSON, space padded | data section
    {"name": {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [begin, end]}, ..., "__metadata__": {str: str}}

Offsets count from the start of the data section, which the tensors tile without hole or overlap.
Format text: https://github.com/huggingface/safetensors#format
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from streamquant.checkpoint.limits import fault_of_tensor_name
from streamquant.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader
LENGTH_BYTES = 8
MAX_DIMS = 64

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class TensorSpec(NamedTuple):
    """A tensor at a place in a file; `start` and `end` count bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def header_length(prefix: bytes, *, file: str, file_bytes: int) -> int:
    """The length N of the JSON, from the first 8 bytes of `file`; bounded by the file and by the format's limit.

    Raises CheckpointError if the file is too short or claims a header that it cannot hold.
    """
    if len(prefix) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise CheckpointError(f"{file}: {file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(f"{file}: header claims {length} bytes in a file of {file_bytes}; is the download complete?")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
    return length


def parse_object(text: bytes, *, file: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError if it is not one, or if a name appears twice in any object."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique_keys)  # json itself would take UTF-16 and half surrogate pairs
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair, which no output could hold
    except RecursionError:
        raise CheckpointError(f"{file}: its JSON nests too deeply") from None
    except ValueError as error:  # bad UTF-8 as well
        raise CheckpointError(f"{file} does not hold valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return value


def parse_header(text: bytes, *, file: str, file_bytes: int) -> list[TensorSpec]:
    """The tensors that the JSON `text` of a header describes, in the order of their offsets.

    Raises CheckpointError for anything that the format forbids: bad JSON, duplicate names, unknown dtypes, shapes that do
    not fit their offsets, holes, overlaps, bytes missing at the end of the file or left over.
    """
    header = parse_object(text, file=file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings")

    data_start = LENGTH_BYTES + len(text)
    specs = sorted(
        (_spec(name, entry, file=file, data_start=data_start) for name, entry in header.items()),
        key=lambda spec: (spec.start, spec.end),
    )
    position = data_start
    for spec in specs:
        if spec.start != position:
            fault = "overlaps the tensor before it" if spec.start < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: {spec.name} starts at byte {spec.start}, not {position}: it {fault}")
        position = spec.end
    if position != file_bytes:
        fault = "truncated" if position > file_bytes else "overlong"
        raise CheckpointError(f"{file}: {fault}: its header describes {position} bytes and the file has {file_bytes}")
    return specs


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], *, file: str) -> tuple[bytes, list[TensorSpec]]:
    """The bytes in front of the data section for tensors (name, dtype, shape) stored in this order, and their places.

    The JSON is padded with spaces to a multiple of 8 bytes, so that data in order of non-increasing element width is aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # older transformers refuse files without it
    ends = list(itertools.accumulate((tensor_bytes(dtype, shape) for _, dtype, shape in tensors), initial=0))
    for (name, dtype, shape), begin, end in zip(tensors, ends, ends[1:], strict=False):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = [LENGTH_BYTES + len(text) + end for end in ends]
    specs = [TensorSpec(*tensor, file, start, end) for tensor, start, end in zip(tensors, places, places[1:], strict=False)]
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, specs


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"{key!r} appears twice")
        entries[key] = value
    return entries


def _spec(name: str, entry: object, *, file: str, data_start: int) -> TensorSpec:
    """One entry of the header, checked field by field; whether the tensors tile the file is the caller's business."""
    if fault := fault_of_tensor_name(name):
        raise CheckpointError(f"{file} holds the tensor {name!r}, which {fault}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: {name} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: {name} has unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: shape and data_offsets of {name} must be lists of integers, none below 0")
    if math.prod(filter(None, shape)) * DTYPE_BITS[dtype] >= 2**64:  # other readers multiply in 64 bits, zeros last
        raise CheckpointError(f"{file}: {name} of {dtype} {shape} is larger than any file")
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    if num_bits != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(f"{file}: {name} of {dtype} {shape} takes {num_bits // 8} bytes, not as many as {offsets} span")
    return TensorSpec(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list, short enough to multiply up, of integers that fit a signed 64-bit word."""
    if not isinstance(value, list) or len(value) > MAX_DIMS or not {*map(type, value)} <= {int}:
        return False
    return min(value, default=0) >= 0 and max(value, default=0) < 2**63
