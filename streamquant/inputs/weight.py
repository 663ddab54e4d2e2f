"""A weight as a source stores it: in which tensors, where its rows lie in them, how they become numbers.

A `Weight` is one 2-D matrix of the model, whether it is a plain tensor, codes and scales in several tensors (of several shards), or
a part of a 3-D stack of experts. Its rows are read from the tensors by position, and decoded, so that no more than a range of rows
of it is ever in memory.

Legend: N out_features, K in_features, L lines and W elements of a line of a stored tensor, n rows read.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from streamquant.checkpoint.header import DTYPE_BITS, TensorSpec, tensor_bytes
from streamquant.checkpoint.source import Extent, Reader
from streamquant.errors import CheckpointError
from streamquant.lazy import torch
from streamquant.names import WEIGHT_SUFFIX
from streamquant.schemes import Scheme
from streamquant.schemes.fp8 import Fp8
from streamquant.schemes.integer import ByteInt
from streamquant.schemes.rounding import e8m0_value
from streamquant.stored import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

E4M3_NAN = 0x7F  # but for the sign
Allocate = Callable[[str, int], "Tensor"]  # (role, bytes) -> uint8 memory to read into


def new_memory(role: str, num_bytes: int) -> Tensor:
    """Memory that is not used again."""
    del role
    return torch.empty(num_bytes, dtype=torch.uint8)


class InputFormat(ABC):
    """How a weight is stored. A role is the name that a format gives one of the tensors, its last part as a rule."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What users call it."""

    @property
    def by_columns(self) -> frozenset[str]:
        """Tensors in which a row of the weight lies along a column."""
        return frozenset()

    @property
    def whole(self) -> frozenset[str]:
        """Tensors that are read whole for any range of rows."""
        return frozenset()

    @property
    def row_multiple(self) -> int:
        """A range of rows starts at a multiple of this."""
        return 1

    def line(self, role: str, row: int) -> int:
        """The line (or column) of the tensor at which weight row `row`, a multiple of `row_multiple` or N, begins."""
        del role
        return row

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        """The rows [n, K] that the tensors hold; float32, but where the stored values are the weight's own."""

    @property
    def scheme(self) -> Scheme | None:
        """A scheme that stores the same codes with the same scales, if there is one."""
        return None

    def repack(self, stored: Mapping[str, Tensor], num_columns: int, scheme: Scheme) -> dict[str, Tensor]:
        """The same codes and scales as `scheme` stores them: what its `encode` would return for these rows."""
        raise AssertionError(f"{self.title} has no codes of {scheme.preset}: {set(stored)}, {num_columns}")

    def shared(self, stored: Mapping[str, Tensor]) -> Tensor:
        """What `Scheme.share` would return (float32 [1]), from tensors in `whole`, if the scheme shares anything."""
        raise AssertionError(f"{self.title} shares nothing: {set(stored)}")

    def keeps_codes_of(self, asked: Scheme) -> Scheme | None:
        """`asked`, with scales of the dtype that is stored, if it stores the codes and scales that are there already."""
        native = self.scheme
        if native is None or not isinstance(asked, type(native)) or asked.weights_config != native.weights_config:
            return None
        if isinstance(asked, Fp8 | ByteInt) and isinstance(native, Fp8 | ByteInt):
            asked = dataclasses.replace(asked, scale_dtype=native.scale_dtype)
        return dataclasses.replace(asked, observer="minmax")


@dataclass(frozen=True, slots=True)
class Dense(InputFormat):
    """A matrix of plain numbers, [N, K] or transposed [K, N]."""

    transposed: bool = False

    @property
    def title(self) -> str:
        return "transposed" if self.transposed else "plain"

    @property
    def by_columns(self) -> frozenset[str]:
        return frozenset({"weight"} if self.transposed else ())

    def decode(self, stored: Mapping[str, Tensor], num_columns: int) -> Tensor:
        del num_columns
        return stored["weight"].contiguous()


DENSE = Dense()


class Place(NamedTuple):
    """Where in a 3-D stack the rows of a weight are: those of one expert, every `step`-th row from `first` on."""

    expert: int
    first: int = 0
    step: int = 1


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix of the model, and where the source has it."""

    name: str
    dtype: str  # of its values: BF16, F16 or F32
    shape: tuple[int, int]
    tensors: Mapping[str, TensorSpec]  # by role
    format: InputFormat = DENSE
    place: Place | None = None

    @property
    def module(self) -> str:
        """The module it is the weight of."""
        return self.name.removesuffix(WEIGHT_SUFFIX)  # not by module_name: this is called a million times

    @property
    def is_plain(self) -> bool:
        """Whether a tensor of the source is this weight, byte for byte."""
        return self.format is DENSE and self.place is None

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored as codes and scales."""
        return not isinstance(self.format, Dense)

    @property
    def in_order(self) -> bool:
        """Whether rows that follow each other lie behind each other in the source, with nothing between."""
        return not self.format.by_columns and (self.place is None or self.place.step == 1)

    @property
    def num_bytes(self) -> int:
        """Bytes that the source has of it."""
        if self.place is None:
            return sum(spec.num_bytes for spec in self.tensors.values())
        return sum(self._num_bytes(role) for role in self.tensors)

    @property
    def is_vector(self) -> bool:
        """Whether it is no matrix, but the bias of an expert in a stack, as one column."""
        return not self.name.endswith(WEIGHT_SUFFIX) and self.shape[1] == 1

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of its values."""
        return tensor_bytes(self.dtype, self.shape)

    def read(self, source: Reader, start: int, end: int, allocate: Allocate = new_memory) -> dict[str, Tensor]:
        """What is stored of the rows start..end, by role: [n, ...] with what belongs to the first row first."""
        return {role: self._read(source, role, start, end, allocate) for role in self.tensors}

    def extents(self, start: int, end: int) -> list[Extent]:
        """Where the source has what `read` reads, with what lies between."""
        return [self._rectangle(role, start, end).extent for role in self.tensors]

    def read_whole(self, source: Reader) -> dict[str, Tensor]:
        """What is stored once for all rows."""
        return {role: self._read(source, role, 0, 0, new_memory) for role in self.tensors.keys() & self.format.whole}

    def select(self, stored: Mapping[str, Tensor], start: int, end: int, *, of_start: int) -> dict[str, Tensor]:
        """The rows start..end out of what was read from row `of_start` on."""
        chosen = {}
        for role, tensor in stored.items():
            if role in self.format.whole:
                chosen[role] = tensor
            else:
                offset = self.format.line(role, of_start)
                chosen[role] = tensor[self.format.line(role, start) - offset : self.format.line(role, end) - offset]
        return chosen

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The values of rows that were read: [n, K] of the weight's dtype."""
        return self.values(stored).to(TORCH_DTYPES[self.dtype])

    def values(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The same, float32 where they are computed."""
        try:
            return self.format.decode(stored, self.shape[1])
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from None

    def repack(self, stored: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
        """The rows that were read as `scheme` stores them, with the same codes and scales."""
        try:
            repacked = self.format.repack(stored, self.shape[1], scheme)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from None
        if not all(map(_is_finite, repacked.values())):
            raise CheckpointError(
                f"{self.name} holds codes or scales that are no numbers; --scheme BF16 --allow-nonfinite unpacks it first"
            )
        return repacked

    def _lines(self, role: str) -> tuple[int, int, int]:
        """Of a stored tensor seen as lines of elements: the first line, the number of lines, elements in a line."""
        shape = self.tensors[role].shape
        if self.place is None:
            return 0, math.prod(shape[:1]), math.prod(shape[1:])
        num_lines = math.prod(shape[1:2])
        return self.place.expert * num_lines, num_lines, math.prod(shape[2:])

    def _num_bytes(self, role: str) -> int:
        _, num_lines, width = self._lines(role)
        if role in self.format.whole:
            return num_lines * width * _element_bytes(self.tensors[role])
        other = num_lines if role in self.format.by_columns else width
        return self.format.line(role, self.shape[0]) * other * _element_bytes(self.tensors[role])

    def _read(self, source: Reader, role: str, start: int, end: int, allocate: Allocate) -> Tensor:
        rectangle = self._rectangle(role, start, end)
        lines = _read_rectangle(source, role, rectangle, allocate)
        if role in self.format.whole:
            return lines
        step = 1 if self.place is None else self.place.step
        if role in self.format.by_columns:
            # Turned at once: block by block it would take three times as long.
            return lines[:, ::step].T.contiguous()
        return lines[::step]

    def _rectangle(self, role: str, start: int, end: int) -> _Rectangle:
        """Where a stored tensor has the rows start..end, and, if they are not next to each other, what lies between."""
        spec = self.tensors[role]
        first_line, num_lines, width = self._lines(role)
        all_lines = (first_line, first_line + num_lines)
        if role in self.format.whole:
            return _Rectangle(spec, width, all_lines, (0, width))
        _, first, step = self.place or Place(0)
        begin = self.format.line(role, first) + self.format.line(role, start) * step
        count = self.format.line(role, end) - self.format.line(role, start)
        chosen = (begin, begin + (count - 1) * step + 1)
        if role in self.format.by_columns:
            return _Rectangle(spec, width, all_lines, chosen)
        return _Rectangle(spec, width, (first_line + chosen[0], first_line + chosen[1]), (0, width))


class _Rectangle(NamedTuple):
    """Lines and columns, half-open, of a stored tensor of `width` columns."""

    spec: TensorSpec
    width: int
    lines: tuple[int, int]
    columns: tuple[int, int]

    @property
    def line_bytes(self) -> int:
        """Bytes of the chosen columns of a line."""
        return (self.columns[1] - self.columns[0]) * _element_bytes(self.spec)

    @property
    def stride(self) -> int:
        """Bytes from line to line."""
        return self.width * _element_bytes(self.spec)

    @property
    def extent(self) -> Extent:
        """From the first byte to the last."""
        start = self.spec.start + self.lines[0] * self.stride + self.columns[0] * _element_bytes(self.spec)
        num_lines = self.lines[1] - self.lines[0]
        return Extent(self.spec.file, start, start + (num_lines - 1) * self.stride + self.line_bytes if num_lines else start)


def _element_bytes(spec: TensorSpec) -> int:
    return DTYPE_BITS[spec.dtype] // 8


def _read_rectangle(source: Reader, role: str, rectangle: _Rectangle, allocate: Allocate) -> Tensor:
    """The elements of a rectangle: [L, W]."""
    (file, start, end), line_bytes, stride = rectangle.extent, rectangle.line_bytes, rectangle.stride
    num_lines = rectangle.lines[1] - rectangle.lines[0]
    buffer = allocate(role, num_lines * line_bytes)
    bytes_of = buffer.numpy().data
    if end - start == len(bytes_of):
        source.read(file, start, bytes_of)
    else:
        for line in range(num_lines):
            source.read(file, start + line * stride, bytes_of[line * line_bytes : (line + 1) * line_bytes])
    return buffer.view(_read_dtype(rectangle.spec.dtype)).view(num_lines, rectangle.columns[1] - rectangle.columns[0])


def no_scheme(module: str) -> Scheme | None:
    """The scheme of each module where nothing is said of any."""
    del module
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What config.json says about how weights are stored. The tensors decide; this settles what they leave open."""

    dtype: str  # of values whose own tensors do not tell
    quantization: Mapping[str, Any]  # quantization_config, or nothing
    block: tuple[int, int]  # of FP8 in blocks
    scheme_of: Callable[[str], Scheme | None]  # of a module, by compressed-tensors
    shape_of: Callable[[TensorSpec], tuple[int, int]]  # what a `weight_shape` says
    model_types: tuple[str, ...]  # of the model, then of its language model
    expert_layout: str | None  # said by the user

    def dtype_beside(self, scale_dtype: str) -> str:
        """The dtype of values that have a scale of `scale_dtype`."""
        return scale_dtype if scale_dtype in {"BF16", "F16"} else self.dtype


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:  # has NaN and no infinities
        return not bool(((tensor.view(torch.uint8) & E4M3_NAN) == E4M3_NAN).any())
    return not tensor.dtype.is_floating_point or bool(tensor.isfinite().all())


def _read_dtype(dtype: str) -> torch.dtype:
    return torch.uint8 if dtype == "F8_E8M0" else TORCH_DTYPES[dtype]  # torch before 2.7 has no e8m0


def scale_value(scale: Tensor) -> Tensor:
    """Scales as stored, of a floating point dtype or e8m0 in bytes -> float32."""
    return e8m0_value(scale.to(torch.int32)) if scale.dtype == torch.uint8 else scale.float()


def group_of_column(index: Tensor, num_groups: int) -> Tensor:
    """The group of each column as stored, once it is known that there are such groups."""
    if bool(((index < 0) | (index >= num_groups)).any()):
        raise CheckpointError(f"the group of a column is {int(index.min())} to {int(index.max())}; there are {num_groups} groups")
    return index.view(-1).long()


def read_tensor(source: Reader, spec: TensorSpec, start: int = 0, end: int | None = None) -> Tensor:
    """The bytes start..end of a tensor, flat, in its dtype."""
    buffer = torch.empty((spec.num_bytes if end is None else end) - start, dtype=torch.uint8)
    source.read(spec.file, spec.start + start, buffer.numpy().data)
    return buffer.view(_read_dtype(spec.dtype))
