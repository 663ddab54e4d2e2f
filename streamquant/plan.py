"""Headers and a recipe give a plan: what happens to every tensor, and where every byte of the output lies.

Pure: reads nothing but the headers and the config in a `Checkpoint`. Whatever can fail without looking at a weight fails here.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from streamquant.checkpoint.checkpoint import Checkpoint
from streamquant.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, TensorSpec, build_header, tensor_bytes
from streamquant.checkpoint.layout import Layout
from streamquant.checkpoint.limits import MAX_HEADERS_BYTES, MAX_TENSORS, fault_of_tensor_name
from streamquant.decide import NOT_A_MATRIX, Decision, Keep, decide, taken_apart, way_out
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs import Inventory, Stack, Weight
from streamquant.names import (
    EMBEDDING,
    ModelFacts,
    prediction_patterns,
    role_of,
)
from streamquant.quantization_config import describe_quantization, is_named_only
from streamquant.recipe import Recipe
from streamquant.schemes import PLAIN, Scheme
from streamquant.schemes.fp8 import Fp8
from streamquant.schemes.plain import Plain
from streamquant.stored import measured_tensors, stored_bytes, stored_tensors

NOT_STORED = PLAIN["BF16"]  # the scheme of what is copied
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}  # `kv_cache_scheme`


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor written byte for byte as it is."""

    source: TensorSpec
    output: TensorSpec
    reason: str

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return self.source.num_bytes

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is written."""
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Member:
    """One weight to quantize and the tensors it becomes."""

    weight: Weight
    stored: tuple[TensorSpec, ...]

    @property
    def module(self) -> str:
        """The module it is the weight of."""
        return self.weight.module

    def place(self, suffix: str) -> TensorSpec:
        """The stored tensor of which `suffix` is the last part of the name."""
        if len(self.stored) == 1:
            return self.stored[0]
        return next(spec for spec in self.stored if spec.name.endswith(f".{suffix}"))


@dataclass(frozen=True, slots=True)
class Encode:
    """Weights stored by a scheme together: one, or fused partners, which share what their scheme shares."""

    members: tuple[Member, ...]
    scheme: Scheme
    keeps_codes: bool = False  # the source has these codes and scales already
    reason: str = ""  # why a quantized weight is unpacked and left plain
    whole: TensorSpec | None = None  # the one tensor that the members make up, if they do

    @property
    def unpacks(self) -> bool:
        """Whether quantized weights become plain ones."""
        return isinstance(self.scheme, Plain) and self.members[0].weight.is_quantized

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(member.weight.num_bytes for member in self.members)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is written."""
        if self.whole is not None:
            return (self.whole,)
        return tuple(spec for member in self.members for spec in member.stored)


@dataclass(frozen=True, slots=True)
class Measure:
    """Scales of the keys and values that an attention module keeps; only a calibration can finish this step."""

    module: str
    k_scale: TensorSpec
    v_scale: TensorSpec

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return 0

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is written."""
        return (self.k_scale, self.v_scale)


Step = Copy | Encode | Measure


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the output: its header and the steps that fill it. Can be produced without any other shard."""

    file: str
    steps: tuple[Step, ...]
    num_bytes: int  # of the file

    @property
    def header(self) -> bytes:
        """The bytes in front of the data. Made when they are written: those of all shards together are large."""
        outputs = sorted((spec for step in self.steps for spec in step.outputs), key=lambda spec: (spec.start, spec.end))
        return build_header([spec[:3] for spec in outputs], file=self.file)[0]


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do."""

    checkpoint: Checkpoint
    recipe: Recipe
    shards: tuple[Shard, ...]
    quantization_config: Mapping[str, Any]  # empty if nothing is quantized
    dropped: Mapping[str, str]  # tensors of the source that mean nothing in the output -> why

    @property
    def steps(self) -> Iterator[Step]:
        """The steps of all shards, in order."""
        return (step for shard in self.shards for step in shard.steps)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of tensors to read."""
        return sum(step.source_bytes for step in self.steps)

    @cached_property
    def output_bytes(self) -> int:
        """Exact bytes of the output's safetensors files."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides the bytes of the output, but for the weights themselves."""
        digest = hashlib.sha256(json.dumps([dict(self.quantization_config), self.checkpoint.side_files]).encode())
        for shard in self.shards:
            digest.update(json.dumps([shard.file, shard.num_bytes, [_step_key(step) for step in shard.steps]]).encode())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values. Keys are only ever added."""
        return self._summary() | {"shards": [_shard_json(shard) for shard in self.shards]}

    def json_parts(self) -> Iterator[str]:
        """`to_json` as text, a shard at a time: a plan of 100,000 tensors is 80 MB of it."""
        yield json.dumps(self._summary())[:-1] + ', "shards": ['
        for number, shard in enumerate(self.shards):
            yield (", " if number else "") + json.dumps(_shard_json(shard))
        yield "]}"

    def _summary(self) -> dict[str, Any]:
        return {
            "source": self.checkpoint.source,
            "revision": self.checkpoint.revision,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "quantization_config": dict(self.quantization_config),
            "side_files": list(self.checkpoint.side_files),
            "left_out": dict(self.checkpoint.left_out),
            "dropped": dict(self.dropped),
        }


def make_plan(checkpoint: Checkpoint, inventory: Inventory, recipe: Recipe, *, max_shard_bytes: int, fp8_cache: bool = False) -> Plan:
    """Decide what happens to every tensor of the checkpoint, of which `inventory` says what they make up.

    `fp8_cache`: with scales for keys and values in FP8.
    Raises RequestError if the recipe cannot be followed, CheckpointError if the checkpoint is of a kind not supported.
    """
    if inventory.problems:
        more = f" (and {len(inventory.problems) - 1} more)" if len(inventory.problems) > 1 else ""
        raise CheckpointError(f"{inventory.problems[0]}{more}")
    facts = ModelFacts.from_config(checkpoint.config, checkpoint.tensors)
    decisions, groups = decide(inventory, recipe, facts)
    attention = _attention(inventory, facts) if fp8_cache else {}
    shards = _lay_out(_draft(inventory, decisions, groups, attention), checkpoint.layout, max_shard_bytes)

    encoded = [step for shard in shards for step in shard.steps if isinstance(step, Encode)]
    if not encoded:
        if all(isinstance(scheme, Plain) for scheme in recipe.schemes):
            raise RequestError(f"nothing in {checkpoint.source} is quantized, so nothing would be unpacked")
        raise RequestError(f"nothing in {checkpoint.source} would be quantized: every tensor is kept; --include overrides default keeps")
    quantized = {member.module: step.scheme for step in encoded for member in step.members if not isinstance(step.scheme, Plain)}
    config = _describe(inventory, decisions, quantized, facts)
    if config and inventory.cache_scheme is not None:
        config["kv_cache_scheme"] = inventory.cache_scheme
    if fp8_cache:
        if "config_groups" not in config:
            raise RequestError(
                "--kv-cache is stated in the config of compressed-tensors, and there will be none; choose another --scheme or --format"
            )
        config["kv_cache_scheme"] = FP8_CACHE
    return Plan(checkpoint, recipe, shards, config, inventory.dropped)


def _attention(inventory: Inventory, facts: ModelFacts) -> dict[str, str]:
    """The attention modules of decoder layers that keep keys and values: the weight that gives keys -> the module."""
    if inventory.cache_scheme is not None:
        raise RequestError("the source has scales of its KV cache, which are kept; leave out --kv-cache")
    names = {weight.name for weight in inventory.weights}
    found = {}
    for weight in inventory.weights:
        module, _, leaf = weight.module.rpartition(".")
        keeps = leaf == "qkv_proj" or (leaf == "k_proj" and f"{module}.v_proj.weight" in names)
        if keeps and role_of(weight.module, weight.shape[0], facts) == "attention":
            found[weight.name] = module
    if not found:
        raise RequestError("--kv-cache: no decoder layer has a k_proj and a v_proj, or a qkv_proj, so there is nothing to measure")
    return found


def _describe(
    inventory: Inventory, decisions: Mapping[str, Decision], quantized: Mapping[str, Scheme], facts: ModelFacts
) -> dict[str, Any]:
    """The quantization_config, empty if nothing is quantized."""
    if not quantized:
        return {}
    apart = taken_apart(inventory, decisions)
    kept = []
    for item in inventory.items:
        if isinstance(item, Stack) and not apart:
            kept += [item.prefix, *(weight.module for weight in item.of_first)]
    for weight in inventory.weights:
        if weight.module not in quantized and (apart or weight.place is None) and decisions[weight.name] != Keep(EMBEDDING):
            kept.append(weight.module)
    has_lm_head = any(weight.name.endswith("lm_head.weight") for weight in inventory.weights)
    patterns = _prediction_patterns(facts, kept, quantized)
    return describe_quantization(quantized, kept, absent_lm_head=not has_lm_head, kept_patterns=patterns)


def _prediction_patterns(facts: ModelFacts, kept: Iterable[str], quantized: Iterable[str]) -> set[str]:
    """Patterns for the multi-token prediction blocks that are kept, or none if one would match what is quantized."""
    patterns = prediction_patterns((module for module in kept if role_of(module, None, facts) == "mtp"), facts)
    matched = re.compile("|".join(patterns)).match if patterns else None
    return set() if matched is None or any(map(matched, quantized)) else patterns


# --- drafting --------------------------------------------------------------------------------------------------------


_Output = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class _Draft(NamedTuple):
    """A step before its outputs have a place: a tensor to copy, or weights to store by a scheme."""

    tensor: TensorSpec | None
    weights: tuple[Weight, ...]
    scheme: Scheme
    reason: str = ""
    keeps_codes: bool = False
    stack: str = ""  # the name of the 3-D tensor that the weights make up together
    attention: str = ""  # the module whose keys and values are measured, of which the weight is that of the keys

    def outputs(self) -> list[list[_Output]]:
        """What is written, for each weight, or in one list for all."""
        if self.attention:
            return [[(f"{self.attention}.{role}", self.weights[0].dtype, (1,)) for role in ("k_scale", "v_scale")]]
        if self.tensor is not None:
            return [[self.tensor[:3]]]
        if self.stack:
            [(_, dtype, shape)] = stored_tensors(self.scheme, self.weights[0].shape, self.weights[0].dtype)
            return [[(self.stack, dtype, (len(self.weights), *shape))]]
        return [self._outputs_of(weight) for weight in self.weights]

    def _outputs_of(self, weight: Weight) -> list[_Output]:
        stored, module = stored_tensors(self.scheme, weight.shape, weight.dtype), weight.module
        if weight.is_vector:
            return [(weight.name, dtype, shape[:1]) for _, dtype, shape in stored]
        stored += measured_tensors(self.scheme, weight.dtype)
        return [(f"{module}.{suffix}", dtype, shape) for suffix, dtype, shape in stored]

    def num_bytes(self) -> int:
        """Bytes of what is written."""
        if self.tensor is not None:
            return self.tensor.num_bytes
        if self.attention:
            return 2 * tensor_bytes(self.weights[0].dtype, (1,))
        return sum(stored_bytes(self.scheme, weight.shape, weight.dtype) for weight in self.weights)

    def step(self, outputs: Sequence[Sequence[_Output]], places: Mapping[str, TensorSpec]) -> Step:
        """The step that writes `outputs`, with the places of these by name."""
        if self.tensor is not None:
            return Copy(self.tensor, places[self.tensor.name], self.reason)
        if self.attention:
            k_scale, v_scale = (places[name] for name, _, _ in outputs[0])
            return Measure(self.attention, k_scale, v_scale)
        if self.stack:
            whole = places[self.stack]
            part_bytes = whole.num_bytes // len(self.weights)
            starts = range(whole.start, whole.end, part_bytes)
            parts = [TensorSpec(whole.name, whole.dtype, whole.shape[1:], whole.file, start, start + part_bytes) for start in starts]
            members = tuple(Member(weight, (part,)) for weight, part in zip(self.weights, parts, strict=True))
            return Encode(members, self.scheme, reason=self.reason, whole=whole)
        encoded = [Member(weight, tuple([places[name] for name, _, _ in own])) for weight, own in zip(self.weights, outputs, strict=True)]
        return Encode(tuple(encoded), self.scheme, self.keeps_codes, self.reason)


def _draft(
    inventory: Inventory, decisions: Mapping[str, Decision], groups: Sequence[tuple[str, ...]], attention: Mapping[str, str]
) -> list[_Draft]:
    """Drafts of the steps in source order, fused partners together at the place of the first."""
    group_of = {name: group for group in groups for name in group}
    weights = {weight.name: weight for weight in inventory.weights}
    apart = taken_apart(inventory, decisions)
    problems: dict[str, tuple[str, ...]] = {}  # with the weights that must be kept to avoid it
    drafts: list[_Draft] = []
    done: set[str] = set()
    for item in inventory.items:
        if isinstance(item, TensorSpec):
            drafts.append(_copy(item, NOT_A_MATRIX))
            continue
        if isinstance(item, Stack) and not (apart and item.weights):
            drafts += _together(item, decisions)
            continue
        for weight in item.weights if isinstance(item, Stack) else (item,):
            decision = decisions[weight.name]
            if weight.name in attention:
                drafts.append(_Draft(None, (weight,), NOT_STORED, attention=attention[weight.name]))
            if isinstance(decision, Keep):
                drafts.append(_kept(weight, decision))
            elif weight.name not in done:
                group = group_of.get(weight.name, (weight.name,))
                done.update(group)
                members = tuple(weights[name] for name in group)
                problems.update(dict.fromkeys(_problems(members, decision), group))
                drafts += _stored(members, decision)
        if isinstance(item, Stack):
            drafts += [_Draft(None, (bias,), PLAIN[bias.dtype], NOT_A_MATRIX) for bias in item.biases]
    if problems:
        first, *others = problems
        more = f" (and {len(others)} more weights)" if others else ""
        raise RequestError(f"{first}{more} ({way_out([name for names in problems.values() for name in names])})")
    return drafts


def _copy(tensor: TensorSpec, reason: str) -> _Draft:
    return _Draft(tensor, (), NOT_STORED, reason)


def _together(stack: Stack, decisions: Mapping[str, Decision]) -> list[_Draft]:
    """A stack that stays one: its tensors, or a plain one in their place."""
    decision = decisions[stack.weights[0].name] if stack.weights else Keep(NOT_A_MATRIX)
    reason = decision.reason if isinstance(decision, Keep) else ""
    if not stack.whole:
        return [_copy(tensor, reason) for tensor in stack.tensors]
    scheme = PLAIN[stack.whole[0].dtype] if isinstance(decision, Keep) else decision
    biases = [_copy(bias.tensors["weight"], NOT_A_MATRIX) for bias in stack.biases[:1]]
    return [_Draft(None, stack.whole, scheme, reason, stack=stack.name), *biases]


def _kept(weight: Weight, decision: Keep) -> _Draft:
    """A weight as it is; what is quantized, or no tensor of its own, is written as one of plain numbers."""
    if weight.is_plain:
        return _copy(weight.tensors["weight"], decision.reason)
    return _Draft(None, (weight,), PLAIN[weight.dtype], decision.reason)


def _stored(members: tuple[Weight, ...], scheme: Scheme) -> list[_Draft]:
    """Weights that a scheme stores together; those that have its codes and scales already keep them."""
    sources = {member.format.scheme for member in members}
    exact = scheme.exact_for(*sources) if len(sources) == 1 else scheme
    if scheme.needs_data:
        return [_Draft(None, members, exact)]
    kept = [member.format.keeps_codes_of(scheme) for member in members]
    if scheme.shares_amax:
        if kept[0] is not None and all(other == kept[0] for other in kept):
            return [_Draft(None, members, kept[0], keeps_codes=True)]
        return [_Draft(None, members, exact)]
    drafts = [_Draft(None, (member,), own, keeps_codes=True) for member, own in zip(members, kept, strict=True) if own is not None]
    rest = tuple(member for member, own in zip(members, kept, strict=True) if own is None)
    return [*drafts, _Draft(None, rest, exact)] if rest else drafts


def _problems(weights: Sequence[Weight], scheme: Scheme) -> list[str]:
    """What keeps the members of a group from being stored so that engines load them."""
    problems = []
    for number, weight in enumerate(weights, start=1):
        problem = scheme.problem(weight.shape, fused=len(weights) > 1, last=number == len(weights))
        if problem is None and isinstance(scheme, Fp8) and scheme.strategy == "block" and is_named_only(weight.module):
            problem = f"is a head or an embedding, where engines load no blocks of {scheme.preset}"
        if isinstance(scheme, Fp8) and scheme.shares_amax and scheme.scale_dtype == "weight" and weight.dtype != weights[0].dtype:
            problem = f"is {weight.dtype} and its fused partner {weights[0].dtype}: their one scale needs --scale-dtype float32"
        if problem is not None:
            problems.append(f"{weight.name} {problem}")
    return problems


# --- laying out ------------------------------------------------------------------------------------------------------


def _lay_out(drafts: Sequence[_Draft], layout: Layout, max_shard_bytes: int) -> tuple[Shard, ...]:
    """Fill shards in order; a step is never split, so a shard is larger than `max_shard_bytes` only if one step is."""
    batches: list[list[_Draft]] = []
    filled = 0
    for draft in drafts:
        step_bytes = draft.num_bytes()
        if not batches or filled + step_bytes > max_shard_bytes:
            batches.append([])
            filled = 0
        batches[-1].append(draft)
        filled += step_bytes
    laid_out = [_shard(layout.shard_name(number, len(batches)), batch) for number, batch in enumerate(batches, start=1)]
    _require_readable([specs for _, specs in laid_out])
    return tuple(shard for shard, _ in laid_out)


def _require_readable(outputs: Iterable[Sequence[TensorSpec]]) -> None:
    """Raise RequestError if the output, given shard by shard, would be refused as a source: it has longer and more names than its own."""
    num_tensors = num_bytes = 0
    for specs in filter(None, outputs):
        header_bytes = specs[0].start
        num_tensors, num_bytes = num_tensors + len(specs), num_bytes + header_bytes
        if header_bytes > MAX_HEADER_BYTES:
            raise RequestError(f"{specs[0].file} would have a header of {header_bytes} bytes; give a smaller --max-shard-size")
        longest = max((spec.name for spec in specs), key=len)
        if fault := fault_of_tensor_name(longest):
            raise RequestError(f"the output would hold {longest!r}, which {fault}")
    if num_tensors > MAX_TENSORS or num_bytes > MAX_HEADERS_BYTES:
        allowed = f"{MAX_TENSORS} in {MAX_HEADERS_BYTES}"
        raise RequestError(f"the output would have {num_tensors} tensors in {num_bytes} bytes of headers; {allowed} are read")


def _shard(file: str, drafts: Sequence[_Draft]) -> tuple[Shard, list[TensorSpec]]:
    """A shard, and the tensors in it by their places."""
    outputs = [draft.outputs() for draft in drafts]
    # Widest elements first, so that every tensor is aligned to its element.
    in_order = sorted((output for lists in outputs for own in lists for output in own), key=lambda output: -DTYPE_BITS[output[1]])
    header, placed = build_header(in_order, file=file)
    places = {spec.name: spec for spec in placed}
    end = placed[-1].end if placed else len(header)
    return Shard(file, tuple([draft.step(lists, places) for draft, lists in zip(drafts, outputs, strict=True)]), end), placed


# --- as plain values -------------------------------------------------------------------------------------------------


def _shard_json(shard: Shard) -> dict[str, Any]:
    return {"file": shard.file, "bytes": shard.num_bytes, "steps": [_step_json(step) for step in shard.steps]}


def _step_json(step: Step) -> dict[str, Any]:
    if isinstance(step, Copy):
        return {"action": "copy", "reason": step.reason, "source": _spec_json(step.source), "output": _spec_json(step.output)}
    if isinstance(step, Measure):
        return {"action": "measure", "module": step.module, "outputs": [_spec_json(spec) for spec in step.outputs]}
    return {
        "action": "quantize",
        "scheme": step.scheme.preset,
        "observer": step.scheme.observer,
        "keeps_codes": step.keeps_codes,
        "reason": step.reason,
        "members": [
            {"module": m.module, "source": _weight_json(m.weight), "outputs": [_spec_json(spec) for spec in m.stored]} for m in step.members
        ],
    }


def _step_key(step: Step) -> tuple[Any, ...]:
    """All that decides what a step writes, and where; made of tuples, of which there may be a million."""
    if isinstance(step, Copy):
        return ("copy", step.source, step.output)
    if isinstance(step, Measure):
        return ("measure", step.module, step.outputs)
    weights = [(m.weight.name, m.weight.dtype, m.weight.shape, m.weight.format.title, m.weight.place) for m in step.members]
    places = [(*m.weight.tensors.items(), m.stored) for m in step.members]
    return (step.scheme.preset, step.scheme.observer, step.keeps_codes, weights, places, step.whole)


def _weight_json(weight: Weight) -> dict[str, Any]:
    if weight.is_plain:
        return _spec_json(weight.tensors["weight"])
    return {
        "name": weight.name,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
        "bytes": weight.num_bytes,
        "stored_as": weight.format.title,
        "place": weight.place,
        "tensors": {role: _spec_json(spec) for role, spec in weight.tensors.items()},
    }


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "file": spec.file,
        "start": spec.start,
        "bytes": spec.num_bytes,
    }
