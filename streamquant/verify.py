"""Reads a finished output back and says what is off: inventory, index, shapes, dtypes, scales; with the source, every tensor.

Streams: a block of rows at a time. The safetensors library, which shares no code with ours, reads every header as well.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from streamquant.checkpoint.checkpoint import Checkpoint, read_checkpoint
from streamquant.checkpoint.checksum import crc32
from streamquant.checkpoint.header import TensorSpec, parse_object
from streamquant.checkpoint.journal import RECORD_NAME, read_record
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.open_source import open_source
from streamquant.checkpoint.source import Reader
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs import Inventory, Stack, Weight, find_weights, no_scheme, read_tensor
from streamquant.lazy import np, torch
from streamquant.memory import BLOCK_ELEMENTS, COPY_BYTES, row_blocks
from streamquant.names import ModelFacts, fused_groups, role_of
from streamquant.quantization_config import quantized_modules
from streamquant.read_ahead import Windows
from streamquant.schemes import Scheme
from streamquant.stored import DENSE_DTYPES, measured_tensors, stored_tensors

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BYTES = 1 << 20  # checked at a time
SCALE_SUFFIXES = {"weight_scale", "weight_scale_inv", "weight_global_scale"}
# The bits of finite and positive scales, which as integers are in the order of the numbers: smallest and largest.
GOOD_SCALES = {
    "BF16": ("uint16", 1, 0x7F7F),
    "F16": ("uint16", 1, 0x7BFF),
    "F32": ("uint32", 1, 0x7F7FFFFF),
    "F8_E4M3": ("uint8", 1, 0x7E),
    "F8_E8M0": ("uint8", 0, 0xFE),
    "U8": ("uint8", 0, 0xFE),  # e8m0 under the name that readers take
}
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
    num_checksums: int = 0
    num_rescaled: int = 0  # not compared, since a scale was moved between them
    errors: list[TensorError] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def verify(
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    expert_layout: str | None = None,
    checksums: bool = True,
    on_progress: Callable[[str], None] | None = None,
) -> Verification:
    """Check the quantized checkpoint `out`; with the source `against`, also every tensor's bytes or error.

    `revision` is that of `against`, `expert_layout` that of `convert`. `checksums`: read every file, and compare it with the checksum
    in `out`, if a conversion left them. `on_progress` is called with the name of each tensor compared. What is off ends up in
    `problems`; only a folder that is not there or not finished raises (CheckpointError, RequestError).
    """
    with LocalSource(out) as source:
        try:
            checkpoint = read_checkpoint(source)
        except CheckpointError as error:
            return Verification(str(out), [str(error)])
        if checkpoint.config is None:
            raise RequestError(f"{out} has no {checkpoint.layout.config_name}: not a finished output")
        config = checkpoint.quantization
        try:
            scheme_of = quantized_modules(config) if isinstance(config, dict) else no_scheme
        except CheckpointError as error:
            return Verification(str(out), [str(error)])
        inventory = find_weights(checkpoint, source)
        stored = {weight.module: weight for weight in inventory.weights if weight.is_quantized}
        problems = [*_container_problems(checkpoint, source), *inventory.problems, *_config_problems(checkpoint, inventory, scheme_of)]
        for weight in stored.values():
            problems += _scale_problems(weight, source)
        problems += _fused_problems(stored, scheme_of, source)
        measured = _measured(stored, scheme_of)
        problems += _measured_problems(checkpoint, measured, source)
        of_cache = _cache_scales(checkpoint, inventory)
        problems += [f"{spec.name} is not finite and positive" for spec in of_cache.values() if _num_bad_scales(source, spec, 0)]
        checksum_of = _checksums(source) if checksums else {}
        problems += _checksum_problems(source, checksum_of)
        report = Verification(str(out), problems, len(checkpoint.tensors), len(stored), num_checksums=len(checksum_of))
        if against is None:
            return report
        with open_source(against, revision=revision) as original:
            originals = find_weights(read_checkpoint(original), original, expert_layout=expert_layout)
            together = _plain_stacks(inventory) & _plain_stacks(originals)
            # What looks like a scale that no output needs may be a parameter of the source.
            others = {name: _column(checkpoint.tensors[name]) for name in inventory.dropped if name not in measured}
            theirs = _Side(Windows(original) if original.num_connections else original, _apart(originals, together))
            measured_now = of_cache.keys() - theirs.weights.keys()
            apart = {name: weight for name, weight in _apart(inventory, together).items() if name not in measured_now}
            ours = _Side(source, apart | others)
            report = replace(report, problems=[*problems, *originals.problems])
            return _compare(report, ours, theirs, scheme_of, _rescaled(source), on_progress)


# --- the container ---------------------------------------------------------------------------------------------------


def _container_problems(checkpoint: Checkpoint, source: LocalSource) -> list[str]:
    problems = []
    tensors_of: defaultdict[str, dict[str, tuple[str, list[int]]]] = defaultdict(dict)
    for spec in checkpoint.tensors.values():
        tensors_of[spec.file][spec.name] = spec.dtype, list(spec.shape)
    for shard in checkpoint.shards:
        try:
            with safe_open(source.folder / shard, framework="pt") as reader:
                slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118, it is no mapping
                theirs = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
        except SafetensorError as error:
            problems.append(f"{shard}: the safetensors library refuses it: {error}")
            continue
        if tensors_of[shard] != theirs:
            problems.append(f"{shard}: the safetensors library reads other tensors from it than its header says")
    sizes, index_name = source.sizes(), checkpoint.layout.index_name
    if index_name in sizes:
        text = bytearray(sizes[index_name])
        source.read(index_name, 0, memoryview(text))
        index = parse_object(bytes(text), file=index_name)
        for name in checkpoint.tensors.keys() - index["weight_map"].keys():
            problems.append(f"{index_name} does not list {name}")
        total = sum(spec.num_bytes for spec in checkpoint.tensors.values())
        metadata = index.get("metadata")
        said = metadata.get("total_size") if isinstance(metadata, dict) else None
        if said != total:
            problems.append(f"{index_name}: total_size is {said}, the tensors have {total} bytes")
    return problems


def _checksums(source: LocalSource) -> dict[str, str]:
    """The CRC-32 that each file of an output should have, as 8 hexadecimal digits; of another checkpoint nothing."""
    record = source.folder / RECORD_NAME
    return {file: written["crc32"] for file, written in read_record(record)["files"].items()} if record.is_file() else {}


def _rescaled(source: LocalSource) -> set[str]:
    """The tensors of an output between which a calibration has moved scales."""
    record = source.folder / RECORD_NAME
    names = read_record(record).get("rescaled") if record.is_file() else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _checksum_problems(source: LocalSource, checksum_of: Mapping[str, str]) -> Iterator[str]:
    sizes = source.sizes()
    for file, expected in checksum_of.items():
        if file not in sizes:
            yield f"{file} is missing"
            continue
        found = 0
        for start in range(0, sizes[file], COPY_BYTES):
            chunk = memoryview(bytearray(min(COPY_BYTES, sizes[file] - start)))
            source.read(file, start, chunk)
            found = crc32(chunk, found)
        if f"{found:08x}" != expected:
            yield f"{file} has the CRC-32 {found:08x}; {expected} was written"


# --- which weights are quantized, and whether they look it ------------------------------------------------------------


def _config_problems(checkpoint: Checkpoint, inventory: Inventory, scheme_of: Callable[[str], Scheme | None]) -> list[str]:
    """Where the config and the tensors disagree."""
    facts = ModelFacts.from_config(checkpoint.config, checkpoint.tensors)
    problems = []
    for weight in _said_of(inventory):
        module, scheme = weight.module, scheme_of(weight.module)
        if not weight.is_quantized:
            if scheme is not None and role_of(module, weight.shape[0], facts) != "embeddings":
                problems.append(f"{module} is stored as {weight.dtype}, but quantization_config says {scheme.preset}")
        elif scheme is None:
            problems.append(f"{module} is stored quantized, but quantization_config leaves it alone")
        else:
            problems += _layout_problems(weight, scheme)
    return problems


def _said_of(inventory: Inventory) -> Iterator[Weight]:
    """The matrices of which a config says something by name."""
    for item in inventory.items:
        if isinstance(item, Weight):
            yield item
        elif isinstance(item, Stack):
            yield from item.of_first


def _layout_problems(weight: Weight, scheme: Scheme) -> list[str]:
    """Where the tensors of a quantized weight are not those that its scheme stores."""
    dtype = next((spec.dtype for spec in weight.tensors.values() if spec.dtype in DENSE_DTYPES), weight.dtype)
    try:
        expected = {suffix: (dtype_, shape) for suffix, dtype_, shape in stored_tensors(scheme, weight.shape, dtype)}
    except RequestError:  # its groups do not divide this shape
        return [f"{weight.module} of shape {list(weight.shape)} cannot be stored as {scheme.preset}"]
    found = {spec.name.rpartition(".")[2]: (spec.dtype, spec.shape) for spec in weight.tensors.values()}
    wrong = sorted(suffix for suffix in found.keys() | expected.keys() if found.get(suffix) != expected.get(suffix))
    said = ", ".join(f"{suffix} is {_said(found.get(suffix))}, should be {_said(expected.get(suffix))}" for suffix in wrong)
    return [f"{weight.module}: {said}"] if wrong else []


def _said(what: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if what is None else f"{what[0]} {list(what[1])}"


def _scale_problems(weight: Weight, source: Reader) -> list[str]:
    problems = []
    for spec in weight.tensors.values():
        suffix = spec.name.rpartition(".")[2]
        if suffix == "weight_shape" and tuple(read_tensor(source, spec).tolist()) != weight.shape:
            problems.append(f"{spec.name} is not {list(weight.shape)}")
        if suffix not in SCALE_SUFFIXES:
            continue
        num_bad = sum(_num_bad_scales(source, spec, start) for start in range(0, spec.num_bytes, SCALE_BYTES))
        if num_bad:
            problems.append(f"{spec.name} holds {num_bad} scales that are not finite and positive")
    return problems


def _measured(stored: Mapping[str, Weight], scheme_of: Callable[[str], Scheme | None]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The scales of activations that there should be: name -> dtype and shape."""
    found = {}
    for module, weight in stored.items():
        scheme = scheme_of(module)
        for suffix, dtype, shape in () if scheme is None else measured_tensors(scheme, weight.dtype):
            found[f"{module}.{suffix}"] = dtype, shape
    return found


def _measured_problems(checkpoint: Checkpoint, measured: Mapping[str, tuple[str, tuple[int, ...]]], source: Reader) -> Iterator[str]:
    scale_of: dict[str, float] = {}  # by module
    for name, expected in measured.items():
        spec = checkpoint.tensors.get(name)
        found = None if spec is None else (spec.dtype, spec.shape)
        if spec is None or found != expected:
            yield f"{name} is {_said(found)}, should be {_said(expected)}"
        elif _num_bad_scales(source, spec, 0):
            yield f"{name} is not finite and positive"
        else:
            scale_of[name.rpartition(".")[0]] = float(read_tensor(source, spec))
    for modules in fused_groups((module, 0) for module in scale_of):
        scales = {scale_of[module] for module in modules}
        if len(scales) > 1:
            yield f"{', '.join(modules)} are loaded as one weight and differ in the scale of their inputs: {sorted(scales)}"


def _cache_scales(checkpoint: Checkpoint, inventory: Inventory) -> dict[str, TensorSpec]:
    """Scales of keys and values, if the config says that these are quantized."""
    if inventory.cache_scheme is None:
        return {}
    found = {name: spec for name, spec in checkpoint.tensors.items() if name.rpartition(".")[2] in ("k_scale", "v_scale")}
    return {name: spec for name, spec in found.items() if spec.dtype in GOOD_SCALES and spec.num_bytes}


def _num_bad_scales(source: Reader, spec: TensorSpec, start: int) -> int:
    """Of the scales in SCALE_BYTES from byte `start` on."""
    dtype, smallest, largest = GOOD_SCALES[spec.dtype]
    buffer = bytearray(min(SCALE_BYTES, spec.num_bytes - start))
    source.read(spec.file, spec.start + start, memoryview(buffer))
    bits = np.frombuffer(buffer, dtype)
    if bits.min() >= smallest and bits.max() <= largest:
        return 0
    return int(((bits < smallest) | (bits > largest)).sum())


def _fused_problems(stored: Mapping[str, Weight], scheme_of: Callable[[str], Scheme | None], source: Reader) -> list[str]:
    problems = []
    for modules in fused_groups((module, weight.shape[1]) for module, weight in stored.items()):
        schemes = [scheme_of(module) for module in modules]
        if any(scheme != schemes[0] for scheme in schemes):
            problems.append(f"{', '.join(modules)} are loaded as one weight and have different schemes")
        elif all(scheme is not None and scheme.shares_amax for scheme in (*schemes, *(stored[module].format.scheme for module in modules))):
            shared = {float(stored[module].format.shared(stored[module].read_whole(source))) for module in modules}
            if len(shared) > 1:
                problems.append(f"{', '.join(modules)} are loaded as one weight and differ in the scale they share: {sorted(shared)}")
    return problems


# --- against the source ----------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """A checkpoint to compare, as matrices by name."""

    source: Reader
    weights: Mapping[str, Weight]


def _compare(
    report: Verification,
    ours: _Side,
    theirs: _Side,
    scheme_of: Callable[[str], Scheme | None],
    rescaled: Set[str],
    on_progress: Callable[[str], None] | None,
) -> Verification:
    """The report, with what is different from the source and the error of each quantized weight."""
    problems, errors, num_copied, num_rescaled = list(report.problems), [], 0, 0
    for name, original in theirs.weights.items():
        if on_progress is not None:
            on_progress(name)
        written = ours.weights.get(name)
        if written is None:
            problems.append(f"{name} of the source is missing")
        elif name in rescaled and written.shape == original.shape:
            num_rescaled += 1
        elif written.is_plain and original.is_plain and written.dtype == original.dtype:
            num_copied += 1
            if not _same_bytes(written.tensors["weight"], ours.source, original.tensors["weight"], theirs.source):
                problems.append(f"{name} is neither quantized nor the same as in the source")
        elif written.shape != original.shape:
            problems.append(f"{name} has shape {list(written.shape)}, its source {list(original.shape)}")
        else:
            scheme = scheme_of(written.module)
            said = written.format.title if scheme is None else scheme.preset
            error = _weight_error(written, ours.source, original, theirs.source, scheme=said)
            errors.append(error)
            if not error.relative_error < WORSE_THAN_ZEROS:
                problems.append(f"{name} dequantizes with a relative error of {error.relative_error:.3g}: zeros would be closer")
    problems += [f"{name} stems from no tensor of the source" for name in ours.weights if name not in theirs.weights]
    return replace(report, problems=problems, num_copied=num_copied, num_rescaled=num_rescaled, errors=errors)


def _plain_stacks(inventory: Inventory) -> set[str]:
    """Names of the stacks that are plain 3-D tensors."""
    return {item.name for item in inventory.items if isinstance(item, Stack) and not item.whole}


def _apart(inventory: Inventory, together: set[str]) -> dict[str, Weight]:
    """Everything by name, tensors that are no matrix as one column, stacks in single experts but for those `together`."""
    parts = []
    for item in inventory.items:
        if isinstance(item, Weight):
            parts.append(item)
        elif isinstance(item, TensorSpec):
            parts.append(_column(item))
        elif item.name in together:
            parts += map(_column, item.tensors)
        else:
            parts += [*item.weights, *item.biases]
    return {part.name: part for part in parts}


def _column(spec: TensorSpec) -> Weight:
    return Weight(spec.name, spec.dtype, (spec.num_elements, 1), {"weight": spec})


def _weight_error(ours: Weight, source: Reader, original: Weight, original_source: Reader, *, scheme: str) -> TensorError:
    both_codes = ours.is_quantized and original.is_quantized  # those that were kept have the same values before any rounding
    noise = signal = 0.0
    for start, end in _blocks(ours, original):
        stored = original.read(original_source, start, end)
        original_NK = (original.values(stored) if both_codes else original.decode(stored)).double()
        difference_NK = ours.values(ours.read(source, start, end)).double() - original_NK
        noise += float(difference_NK.square().sum())
        signal += float(original_NK.square().sum())
    relative = math.sqrt(noise / signal) if signal else math.inf if noise else 0.0
    sqnr = -20 * math.log10(relative) if 0 < relative < math.inf else None
    return TensorError(ours.name, scheme, relative, sqnr)


def _blocks(*weights: Weight) -> Iterator[tuple[int, int]]:
    multiple = math.lcm(*(weight.format.row_multiple for weight in weights))
    return row_blocks(*weights[0].shape, row_multiple=multiple, max_elements=BLOCK_ELEMENTS)


def _same_bytes(ours: TensorSpec, source: Reader, theirs: TensorSpec, original: Reader) -> bool:
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    for start in range(0, theirs.num_bytes, COPY_BYTES):
        count = min(COPY_BYTES, theirs.num_bytes - start)
        our_bytes, their_bytes = bytearray(count), bytearray(count)
        source.read(ours.file, ours.start + start, memoryview(our_bytes))
        original.read(theirs.file, theirs.start + start, memoryview(their_bytes))
        if our_bytes != their_bytes:
            return False
    return True


def dequantize(out: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for everything in a checkpoint, one at a time: matrices as float32 if quantized, the rest as it is."""
    with LocalSource(out) as source:
        inventory = find_weights(read_checkpoint(source), source)
        if inventory.problems:
            raise CheckpointError(f"{out}: {inventory.problems[0]}")
        for item in inventory.items:
            if isinstance(item, Weight):
                yield item.name, _decode(item, source)
            elif isinstance(item, TensorSpec):
                yield item.name, read_tensor(source, item).view(item.shape)
            elif item.whole:
                yield item.name, torch.stack([_decode(weight, source) for weight in item.whole])
                for bias in item.biases[:1]:
                    yield bias.tensors["weight"].name, read_tensor(source, bias.tensors["weight"]).view(bias.tensors["weight"].shape)
            else:
                for spec in item.tensors:
                    yield spec.name, read_tensor(source, spec).view(spec.shape)


def _decode(weight: Weight, source: Reader) -> Tensor:
    """All of a weight, float32 if it is quantized."""
    return torch.cat([weight.values(weight.read(source, *rows)) for rows in _blocks(weight)])
