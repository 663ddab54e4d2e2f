"""Reads a finished output back and says what is off: inventory, index, shapes, dtypes, scales; with the source, every tensor.

Streams: a block of rows at a time. The safetensors library, which shares no code with ours, reads every header as well.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamquant.checkpoint.header import TensorSpec, parse_object
from streamquant.checkpoint.source import INDEX_NAME, Checkpoint, LocalSource, read_checkpoint
from streamquant.errors import CheckpointError, RequestError
from streamquant.memory import BLOCK_ELEMENTS, COPY_BYTES, row_blocks
from streamquant.names import WEIGHT_SUFFIX, ModelFacts, fused_groups, is_stored_quantized, module_name, role_of
from streamquant.plan import QUANTIZABLE, TORCH_DTYPES, stored_tensors
from streamquant.quantization_config import quantized_modules
from streamquant.schemes import Scheme

SCALE_SUFFIXES = {"weight_scale", "weight_scale_inv", "weight_global_scale"}
E8M0_NAN = 255
WORSE_THAN_ZEROS = 1.0


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a dequantized weight is from its source."""

    name: str
    scheme: str
    relative_error: float  # root of the sum of squared errors over that of squared weights
    sqnr_db: float | None  # the same as signal to quantization noise ratio; None if there is no error


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found; nothing is off if `problems` is empty."""

    out: str
    problems: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_quantized: int = 0
    num_copied: int = 0
    errors: list[TensorError] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A quantized weight as found in the output."""

    module: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: str  # of the weight it was made from, as far as its scale tells
    tensors: Mapping[str, TensorSpec]  # by the last part of the name


def verify(
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Verification:
    """Check the quantized checkpoint `out`; with the source `against`, also every tensor's bytes or error.

    `on_progress` is called with the name of each tensor compared. What is off ends up in `problems`; only a folder that is not
    there or not quantized raises (CheckpointError, RequestError).
    """
    with LocalSource(out) as source:
        try:
            checkpoint = read_checkpoint(source)
        except CheckpointError as error:
            return Verification(str(out), [str(error)])
        config = (checkpoint.config or {}).get("quantization_config")
        if not isinstance(config, dict):
            raise RequestError(f"{out} has no quantization_config in its config.json: not a quantized checkpoint, or an unfinished one")
        try:
            scheme_of = quantized_modules(config)
        except CheckpointError as error:
            return Verification(str(out), [str(error)])
        stored, problems = _inventory(checkpoint, source, scheme_of)
        problems = _container_problems(checkpoint, source) + problems
        for weight in stored.values():
            problems += _scale_problems(weight, source)
        problems += _fused_problems(stored, source)
        report = Verification(str(out), problems, len(checkpoint.tensors), len(stored))
        if against is None:
            return report
        with LocalSource(against) as original:
            return _compare(report, checkpoint, source, stored, original, on_progress)


# --- the container ---------------------------------------------------------------------------------------------------


def _container_problems(checkpoint: Checkpoint, source: LocalSource) -> list[str]:
    problems = []
    for shard in checkpoint.shards:
        ours = {spec.name: (spec.dtype, list(spec.shape)) for spec in checkpoint.tensors.values() if spec.file == shard}
        try:
            with safe_open(source.folder / shard, framework="pt") as reader:
                slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118, it is no mapping
                theirs = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
        except SafetensorError as error:
            problems.append(f"{shard}: the safetensors library refuses it: {error}")
            continue
        if ours != theirs:
            problems.append(f"{shard}: the safetensors library reads other tensors from it than its header says")
    sizes = source.sizes()
    if INDEX_NAME in sizes:
        text = bytearray(sizes[INDEX_NAME])
        source.read(INDEX_NAME, 0, memoryview(text))
        index = parse_object(bytes(text), file=INDEX_NAME)
        for name in checkpoint.tensors.keys() - index["weight_map"].keys():
            problems.append(f"{INDEX_NAME} does not list {name}")
        total = sum(spec.num_bytes for spec in checkpoint.tensors.values())
        if index.get("metadata", {}).get("total_size") != total:
            problems.append(f"{INDEX_NAME}: total_size is {index.get('metadata', {}).get('total_size')}, the tensors have {total} bytes")
    return problems


# --- which weights are quantized, and whether they look it ------------------------------------------------------------


def _inventory(
    checkpoint: Checkpoint, source: LocalSource, scheme_of: Callable[[str], Scheme | None]
) -> tuple[dict[str, _Stored], list[str]]:
    """The quantized weights that are stored as their scheme wants it, and a line for each that is not."""
    parts: defaultdict[str, dict[str, TensorSpec]] = defaultdict(dict)
    dense: dict[str, TensorSpec] = {}
    for name, spec in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        if is_stored_quantized(name, spec.dtype):
            parts[module][suffix] = spec
        elif name.endswith(WEIGHT_SUFFIX) and len(spec.shape) == 2:
            dense[module] = spec
    problems = []
    stored = {}
    for module, tensors in parts.items():
        if module in dense:
            tensors["weight"] = dense.pop(module)
        scheme = scheme_of(module)
        if scheme is None:
            problems.append(f"{module} is stored quantized, but quantization_config leaves it alone")
            continue
        weight = _stored_weight(module, scheme, tensors, source)
        if isinstance(weight, str):
            problems.append(weight)
        else:
            stored[module] = weight
    facts = ModelFacts.from_config(checkpoint.config, checkpoint.tensors)
    for module, spec in dense.items():
        scheme = scheme_of(module)
        if scheme is not None and role_of(module, spec.shape[0], facts) != "embeddings":
            problems.append(f"{module} is stored as {spec.dtype}, but quantization_config says {scheme.preset}")
    return stored, problems


def _stored_weight(module: str, scheme: Scheme, tensors: dict[str, TensorSpec], source: LocalSource) -> _Stored | str:
    shape = _weight_shape(tensors, source)
    if shape is None:
        return f"{module}: {', '.join(sorted(tensors))} do not make up a weight of {scheme.format}"
    scale = tensors.get("weight_scale")
    dtype = scale.dtype if scale is not None and scale.dtype in QUANTIZABLE else "BF16"
    try:
        expected = {suffix: (dtype_, shape_) for suffix, dtype_, shape_ in stored_tensors(scheme, shape, dtype)}
    except RequestError:  # its groups do not divide this shape
        return f"{module} of shape {list(shape)} cannot be stored as {scheme.preset}"
    found = {suffix: (spec.dtype, spec.shape) for suffix, spec in tensors.items()}
    if found != expected:
        wrong = sorted(suffix for suffix in found.keys() | expected.keys() if found.get(suffix) != expected.get(suffix))
        said = ", ".join(f"{suffix} is {_said(found.get(suffix))}, should be {_said(expected.get(suffix))}" for suffix in wrong)
        return f"{module}: {said}"
    return _Stored(module, scheme, shape, dtype, tensors)


def _said(what: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if what is None else f"{what[0]} {list(what[1])}"


def _weight_shape(tensors: Mapping[str, TensorSpec], source: LocalSource) -> tuple[int, int] | None:
    """Rows and columns of the weight, from the tensor that holds its codes."""
    codes = tensors.get("weight_packed") or tensors.get("weight")
    if codes is None or len(codes.shape) != 2:
        return None
    if codes.dtype == "I32":
        spec = tensors.get("weight_shape")
        if spec is None or spec.num_bytes != 16:
            return None
        num_rows, num_columns = _read(source, spec).tolist()
        return (num_rows, num_columns) if num_rows == codes.shape[0] and num_columns > 0 else None
    return codes.shape[0], codes.shape[1] * (2 if codes.dtype == "U8" else 1)


def _scale_problems(weight: _Stored, source: LocalSource) -> list[str]:
    problems = []
    for suffix in SCALE_SUFFIXES & weight.tensors.keys():
        spec = weight.tensors[suffix]
        for start in range(0, spec.num_bytes, COPY_BYTES):
            scale = _read(source, spec, start, min(start + COPY_BYTES, spec.num_bytes))
            bad = (scale == E8M0_NAN) if scale.dtype == torch.uint8 else ~(scale.float().isfinite() & (scale.float() > 0))
            if bool(bad.any()):
                problems.append(f"{spec.name} holds {int(bad.sum())} scales that are not finite and positive")
                break
    return problems


def _fused_problems(stored: Mapping[str, _Stored], source: LocalSource) -> list[str]:
    problems = []
    for modules in fused_groups((module, weight.shape[1]) for module, weight in stored.items()):
        members = [stored[module] for module in modules]
        if any(member.scheme != members[0].scheme for member in members):
            problems.append(f"{', '.join(modules)} are loaded as one weight and have different schemes")
        elif members[0].scheme.shares_amax:
            suffix = "weight_global_scale" if "weight_global_scale" in members[0].tensors else "weight_scale"
            scales = {float(_read(source, member.tensors[suffix])) for member in members}
            if len(scales) > 1:
                problems.append(f"{', '.join(modules)} are loaded as one weight and differ in {suffix}: {sorted(scales)}")
    return problems


# --- against the source ----------------------------------------------------------------------------------------------


def _compare(
    report: Verification,
    checkpoint: Checkpoint,
    source: LocalSource,
    stored: Mapping[str, _Stored],
    original: LocalSource,
    on_progress: Callable[[str], None] | None,
) -> Verification:
    originals = read_checkpoint(original).tensors
    problems, errors, num_copied = list(report.problems), [], 0
    accounted: set[str] = set()
    for name, spec in originals.items():
        if on_progress is not None:
            on_progress(name)
        weight = stored.get(module_name(name)) if name.endswith(WEIGHT_SUFFIX) else None
        copied = checkpoint.tensors.get(name)
        if weight is not None:
            accounted.update(tensor.name for tensor in weight.tensors.values())
            if spec.shape != weight.shape:
                problems.append(f"{name} has shape {list(weight.shape)}, its source {list(spec.shape)}")
                continue
            error = _weight_error(weight, source, spec, original)
            errors.append(error)
            if not error.relative_error < WORSE_THAN_ZEROS:
                problems.append(f"{name} dequantizes with a relative error of {error.relative_error:.3g}: zeros would be closer")
        elif copied is None:
            problems.append(f"{name} of the source is missing")
        else:
            accounted.add(name)
            num_copied += 1
            if (copied.dtype, copied.shape) != (spec.dtype, spec.shape) or not _same_bytes(copied, source, spec, original):
                problems.append(f"{name} is neither quantized nor the same as in the source")
    problems += [f"{name} stems from no tensor of the source" for name in checkpoint.tensors if name not in accounted]
    return Verification(report.out, problems, report.num_tensors, report.num_quantized, num_copied, errors)


def _weight_error(weight: _Stored, source: LocalSource, spec: TensorSpec, original: LocalSource) -> TensorError:
    noise = signal = 0.0
    once = _stored_once(weight, source)
    for start, end in _blocks(weight):
        original_NK = _read_rows(original, spec, start, end).double()
        difference_NK = _decode(weight, source, once, start, end).double() - original_NK
        noise += float(difference_NK.square().sum())
        signal += float(original_NK.square().sum())
    relative = math.sqrt(noise / signal) if signal else math.inf if noise else 0.0
    sqnr = -20 * math.log10(relative) if 0 < relative < math.inf else None
    return TensorError(spec.name, weight.scheme.preset, relative, sqnr)


def _blocks(weight: _Stored) -> Iterator[tuple[int, int]]:
    return row_blocks(*weight.shape, row_multiple=weight.scheme.row_multiple, max_elements=BLOCK_ELEMENTS)


def _stored_once(weight: _Stored, source: LocalSource) -> dict[str, Tensor]:
    once = weight.scheme.once(weight.shape, TORCH_DTYPES[weight.dtype], torch.ones(1) if weight.scheme.shares_amax else None)
    return {suffix: _read(source, weight.tensors[suffix]) for suffix in once}


def _decode(weight: _Stored, source: LocalSource, once: Mapping[str, Tensor], start: int, end: int) -> Tensor:
    """The rows start..end, float32 [rows, K]."""
    by_rows = {
        suffix: _read_rows(source, spec, weight.scheme.line(suffix, start), weight.scheme.line(suffix, end))
        for suffix, spec in weight.tensors.items()
        if suffix not in once
    }
    return weight.scheme.decode({**by_rows, **once}, weight.shape[1])


def _same_bytes(copied: TensorSpec, source: LocalSource, spec: TensorSpec, original: LocalSource) -> bool:
    for start in range(0, spec.num_bytes, COPY_BYTES):
        count = min(COPY_BYTES, spec.num_bytes - start)
        ours, theirs = bytearray(count), bytearray(count)
        source.read(copied.file, copied.start + start, memoryview(ours))
        original.read(spec.file, spec.start + start, memoryview(theirs))
        if ours != theirs:
            return False
    return True


def _read(source: LocalSource, spec: TensorSpec, start: int = 0, end: int | None = None) -> Tensor:
    """The bytes start..end of a tensor, flat, in its dtype."""
    buffer = torch.empty((spec.num_bytes if end is None else end) - start, dtype=torch.uint8)
    source.read(spec.file, spec.start + start, buffer.numpy().data)
    return buffer.view(TORCH_DTYPES[spec.dtype])


def _read_rows(source: LocalSource, spec: TensorSpec, start: int, end: int) -> Tensor:
    """The lines start..end of a tensor."""
    line_bytes = spec.num_bytes // spec.shape[0]
    return _read(source, spec, start * line_bytes, end * line_bytes).view(-1, *spec.shape[1:])


def dequantize(out: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) for every tensor of a quantized checkpoint, one at a time: quantized ones as float32, others as they are."""
    with LocalSource(out) as source:
        checkpoint = read_checkpoint(source)
        config = (checkpoint.config or {}).get("quantization_config") or {}
        stored, problems = _inventory(checkpoint, source, quantized_modules(config))
        if problems:
            raise CheckpointError(f"{out}: {problems[0]}")
        parts = {spec.name for weight in stored.values() for spec in weight.tensors.values()}
        for weight in stored.values():
            once = _stored_once(weight, source)
            yield f"{weight.module}{WEIGHT_SUFFIX}", torch.cat([_decode(weight, source, once, *rows) for rows in _blocks(weight)])
        for name, spec in checkpoint.tensors.items():
            if name not in parts:
                yield name, _read(source, spec).view(spec.shape)
