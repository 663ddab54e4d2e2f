"""Headers and a recipe give a plan: what happens to every tensor, and where every byte of the output lies.

Pure: reads nothing but the headers and the config in a `Checkpoint`. Whatever can fail without looking at a weight fails here.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from streamquant.checkpoint.header import DTYPE_BITS, TensorSpec, build_header, tensor_bytes
from streamquant.checkpoint.source import Checkpoint
from streamquant.errors import CheckpointError, RequestError
from streamquant.names import (
    EMBEDDING,
    KEPT_ROLES,
    ROLES,
    WEIGHT_SUFFIX,
    ModelFacts,
    experts_of,
    fused_groups,
    is_head_or_embedding,
    is_stored_quantized,
    module_name,
    prediction_patterns,
    reason_to_keep,
    reason_to_keep_within,
    role_of,
)
from streamquant.quantization_config import describe_quantization, is_named_only, stored_like
from streamquant.recipe import Matcher, Recipe, Rule
from streamquant.schemes import Scheme
from streamquant.schemes.fp8 import Fp8

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
QUANTIZABLE = ("BF16", "F16", "F32")
NOT_A_MATRIX = "not a 2-D weight"


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor written byte for byte as it is."""

    source: TensorSpec
    output: TensorSpec
    reason: str

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        """What is read."""
        return (self.source,)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is written."""
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Member:
    """One weight to quantize and the tensors it becomes."""

    source: TensorSpec
    stored: tuple[TensorSpec, ...]

    @property
    def module(self) -> str:
        """The module it is the weight of."""
        return module_name(self.source.name)

    def place(self, suffix: str) -> TensorSpec:
        """The stored tensor of which `suffix` is the last part of the name."""
        return next(spec for spec in self.stored if spec.name.endswith(f".{suffix}"))


@dataclass(frozen=True, slots=True)
class Encode:
    """Weights quantized together: one, or fused partners, which share what their scheme shares."""

    members: tuple[Member, ...]
    scheme: Scheme

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        """What is read."""
        return tuple(member.source for member in self.members)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is written."""
        return tuple(spec for member in self.members for spec in member.stored)


Step = Copy | Encode


@dataclass(frozen=True, slots=True)
class Keep:
    """The decision to leave a tensor as it is."""

    reason: str
    by_user: bool = False
    partner: str | None = None  # the fused partner that is kept and is why


Decision = Scheme | Keep


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
    quantization_config: Mapping[str, Any]

    @property
    def steps(self) -> Iterator[Step]:
        """The steps of all shards, in order."""
        return (step for shard in self.shards for step in shard.steps)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of tensors to read."""
        return sum(spec.num_bytes for step in self.steps for spec in step.sources)

    @cached_property
    def output_bytes(self) -> int:
        """Exact bytes of the output's safetensors files."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides the bytes of the output, but for the weights themselves."""
        digest = hashlib.sha256(json.dumps([dict(self.quantization_config), self.checkpoint.side_files]).encode())
        for shard in self.shards:
            digest.update(json.dumps(_shard_json(shard)).encode())
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
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "quantization_config": dict(self.quantization_config),
            "side_files": list(self.checkpoint.side_files),
            "left_out": dict(self.checkpoint.left_out),
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, max_shard_bytes: int) -> Plan:
    """Decide what happens to every tensor of the checkpoint.

    Raises RequestError if the recipe cannot be followed, CheckpointError if the checkpoint is of a kind not supported.
    """
    _refuse_unsupported(checkpoint)
    decisions, claims = _decide(checkpoint, recipe)
    groups = _fused(checkpoint, decisions)
    _refuse_idle(recipe, claims, decisions)
    _refuse_mixed_experts(decisions)
    shards = _lay_out(_draft(checkpoint, decisions, groups), max_shard_bytes)

    encoded = [step for shard in shards for step in shard.steps if isinstance(step, Encode)]
    if not encoded:
        raise RequestError(f"nothing in {checkpoint.source} would be quantized: every tensor is kept; --include overrides default keeps")
    quantized = {member.module: step.scheme for step in encoded for member in step.members}
    not_linear = {NOT_A_MATRIX, EMBEDDING}
    kept = [module_name(name) for name, fate in decisions.items() if isinstance(fate, Keep) and fate.reason not in not_linear]
    has_lm_head = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
    patterns = _prediction_patterns(checkpoint, kept, quantized)
    config = describe_quantization(quantized, kept, absent_lm_head=not has_lm_head, kept_patterns=patterns)
    return Plan(checkpoint, recipe, shards, config)


def _prediction_patterns(checkpoint: Checkpoint, kept: Iterable[str], quantized: Iterable[str]) -> set[str]:
    """Patterns for the multi-token prediction blocks that are kept, or none if one would match what is quantized."""
    facts = ModelFacts.from_config(checkpoint.config, checkpoint.tensors)
    patterns = prediction_patterns((module for module in kept if role_of(module, None, facts) == "mtp"), facts)
    matched = re.compile("|".join(patterns)).match if patterns else None
    return set() if matched is None or any(map(matched, quantized)) else patterns


# --- deciding --------------------------------------------------------------------------------------------------------


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    config = checkpoint.config or {}
    nested = config.get("text_config")
    for owner in (config, nested if isinstance(nested, dict) else {}):
        stated = owner.get("quantization_config") or owner.get("compression_config")
        if stated:
            method = stated.get("quant_method") if isinstance(stated, dict) else stated
            raise CheckpointError(f"{checkpoint.source} is already quantized ({method}); only bf16, fp16 and fp32 sources are supported")
    for spec in checkpoint.tensors.values():
        if is_stored_quantized(spec.name, spec.dtype):
            raise CheckpointError(
                f"{spec.name} ({spec.dtype}) belongs to a weight that is already quantized; only bf16, fp16 and fp32 are supported"
            )
        if len(spec.shape) == 3 and "experts" in spec.name.split("."):
            raise CheckpointError(
                f"{spec.name} {list(spec.shape)} stacks experts in 3-D, which is not supported; one 2-D weight per expert is"
            )


def _decide(checkpoint: Checkpoint, recipe: Recipe) -> tuple[dict[str, Decision], dict[int, list[str]]]:
    """For each tensor its scheme, or why it is kept, before fused partners are brought into line; and the matrices of each rule."""
    facts = ModelFacts.from_config(checkpoint.config, checkpoint.tensors)
    rules, include = Matcher([rule.pattern for rule in recipe.rules]), Matcher(recipe.include)
    claims: defaultdict[int, list[str]] = defaultdict(list)
    included: set[int] = set()
    decisions: dict[str, Decision] = {}
    roles: dict[str, str | None] = {}  # of the modules with a matrix
    for name, spec in checkpoint.tensors.items():
        if not _is_matrix(spec):
            decisions[name] = Keep(NOT_A_MATRIX)
            continue
        module = module_name(name)
        role = roles[module] = role_of(module, spec.shape[0], facts)
        index, include_index = rules.first(module, role), include.first(module, role)
        default = reason_to_keep(module, role)
        if include_index is not None:
            included.add(include_index)
            asked = recipe.include[include_index]
            default = reason_to_keep_within(asked, module, spec.shape[0], facts) if asked in KEPT_ROLES else None
        if index is not None:
            claims[index].append(name)
        decisions[name] = _decision(spec, None if index is None else recipe.rules[index], default=default)
    pointless = [recipe.include[number] for number in include.unmatched(roles, used=included)]
    _refuse_tied(facts, roles, decisions, pointless)
    # A pattern that matches nothing is a mistake. One that gives a scheme must match something that could have one.
    for number in rules.unmatched(roles, used=claims):
        others = {module: role_of(module, None, facts) for module in map(module_name, checkpoint.tensors) if module not in roles}
        _refuse_unmatched(recipe.rules[number], modules=others | roles, matrices=roles)
    for pattern in pointless:
        raise RequestError(f"--include: {_called(pattern)} matches no weight that can be quantized{_hint(pattern, roles)}")
    return decisions, claims


def _is_matrix(spec: TensorSpec) -> bool:
    return spec.name.endswith(WEIGHT_SUFFIX) and len(spec.shape) == 2


def _decision(spec: TensorSpec, rule: Rule | None, *, default: str | None) -> Decision:
    if default == EMBEDDING:  # whoever else keeps it: engines have no linear layer here that must be told
        return Keep(default)
    if rule is None:
        return Keep("no rule asks for it", by_user=True)
    if rule.scheme is None:
        return Keep(f"asked for by {rule.origin} {rule.pattern}", by_user=True)
    if default is not None:
        return Keep(default)
    if spec.dtype not in QUANTIZABLE:
        raise RequestError(f"{spec.name} is {spec.dtype}; only {', '.join(QUANTIZABLE)} can be quantized ({_way_out([spec.name])})")
    if not spec.num_elements:
        return Keep("empty")
    return rule.scheme if experts_of(module_name(spec.name)) is None else rule.scheme.for_expert()


def _refuse_tied(facts: ModelFacts, roles: Mapping[str, str | None], decisions: Mapping[str, Decision], pointless: Sequence[str]) -> None:
    """Raise RequestError if lm_head or the embedding is to be quantized although both are one weight.

    `pointless`: the patterns to include that match nothing; lm_head may be among them, for a tied model need not store it.
    """
    tied = facts.ties_embeddings
    if tied is None:
        tied = "embeddings" in roles.values() and "lm_head" not in roles.values()
    if not tied:
        return
    asked = [
        module
        for module, role in roles.items()
        if is_head_or_embedding(module, role) and not isinstance(decisions[module + WEIGHT_SUFFIX], Keep)
    ]
    asked += [pattern for pattern in pointless if Matcher([pattern]).first("lm_head", "lm_head") is not None]
    if asked:
        raise RequestError(
            f"{asked[0]} cannot be quantized: the model ties lm_head to its embedding, and engines read both as one weight "
            "(do not ask for it; or untie them first: store lm_head.weight and set tie_word_embeddings to false in config.json)"
        )


def _refuse_unmatched(rule: Rule, *, modules: Mapping[str, str | None], matrices: Mapping[str, str | None]) -> None:
    """Raise RequestError for a rule that matches no matrix, unless it keeps something else. Modules come with their roles."""
    if rule.scheme is not None:
        hint = _hint(rule.pattern, matrices)
        raise RequestError(f"{rule.origin}: {_called(rule.pattern)} matches no weight that can be quantized{hint}")
    if not Matcher([rule.pattern]).matches_any(modules):
        raise RequestError(f"{rule.origin}: {_called(rule.pattern)} matches no module{_hint(rule.pattern, modules)}")


def _refuse_idle(recipe: Recipe, claims: Mapping[int, Sequence[str]], decisions: Mapping[str, Decision]) -> None:
    """Raise RequestError for a rule that asks for a scheme which nothing gets, for all its matrices are kept by default."""
    for number, names in claims.items():
        rule = recipe.rules[number]
        kept = {name: fate for name in names if isinstance(fate := decisions[name], Keep)}
        if rule.scheme is not None and not rule.is_default and len(kept) == len(names):
            reasons = ", ".join(dict.fromkeys(fate.reason for fate in kept.values()))
            way_out = _options("--include", [fate.partner or name for name, fate in kept.items()])
            raise RequestError(
                f"{rule.origin}: {_called(rule.pattern)} gets {rule.scheme.preset} nowhere: all it matches is kept by default, {reasons}"
                f" (to quantize it all the same: {way_out})"
            )


def _called(pattern: str) -> str:
    return f"{'role' if pattern in ROLES else 'pattern'} {pattern!r}"


def _hint(pattern: str, modules: Iterable[str]) -> str:
    """A module whose last parts are the pattern, offered where a plain name matches nothing."""
    if not pattern.startswith("re:") and any(module.endswith("." + pattern) for module in modules):
        return f" (did you mean '*.{pattern}'?)"
    return ""


def _fused(checkpoint: Checkpoint, decisions: dict[str, Decision]) -> list[tuple[str, ...]]:
    """Groups of fused tensors to be quantized together. Where one is kept by default, `decisions` then keep its partners too."""
    matrices = [(module_name(name), spec.shape[1]) for name, spec in checkpoint.tensors.items() if _is_matrix(spec)]
    groups = []
    for modules in fused_groups(matrices):
        names = tuple(module + WEIGHT_SUFFIX for module in modules)
        fates = {name: decisions[name] for name in names}
        schemes = {fate for fate in fates.values() if not isinstance(fate, Keep)}
        kept = {name: fate for name, fate in fates.items() if isinstance(fate, Keep)}
        if not schemes:
            continue
        if len(schemes) > 1 or any(fate.by_user for fate in kept.values()):
            said = ", ".join(f"{module_name(name)} {_said(fate)}" for name, fate in fates.items())
            raise RequestError(f"engines load these as one weight, so they need one scheme: {said}")
        if kept:
            name, fate = next(iter(kept.items()))
            partner = Keep(f"fused with {module_name(name)}, which is kept: {fate.reason}", partner=name)
            decisions.update({name: partner for name in names if name not in kept})
            continue
        groups.append(names)
    return groups


def _refuse_mixed_experts(decisions: Mapping[str, Decision]) -> None:
    """Raise RequestError if the experts of one layer are not all stored in one way, for engines load them as one weight."""
    firsts: dict[str, tuple[str, Decision]] = {}
    for name, decision in decisions.items():
        experts = experts_of(module_name(name))
        if experts is None or decision == Keep(NOT_A_MATRIX):
            continue
        first, decided = firsts.setdefault(experts, (name, decision))
        if decision != decided and _stored_as(decision) != _stored_as(decided):
            raise RequestError(
                f"{experts}: engines load the experts of a layer as one, so they need one scheme: {module_name(first)} {_said(decided)}, "
                f"{module_name(name)} {_said(decision)} ({_way_out([name])})"
            )


def _stored_as(decision: Decision) -> str:
    return "kept" if isinstance(decision, Keep) else stored_like(decision)


def _said(decision: Decision) -> str:
    return "kept" if isinstance(decision, Keep) else decision.title


class _Draft(NamedTuple):
    """A step before its outputs have a place."""

    sources: tuple[TensorSpec, ...]
    decision: Decision

    def outputs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of what is written."""
        if isinstance(self.decision, Keep):
            return [(spec.name, spec.dtype, spec.shape) for spec in self.sources]
        return [
            (f"{module_name(spec.name)}.{suffix}", dtype, shape)
            for spec in self.sources
            for suffix, dtype, shape in stored_tensors(self.decision, (spec.shape[0], spec.shape[1]), spec.dtype)
        ]

    def num_bytes(self) -> int:
        """Bytes of what is written."""
        if isinstance(self.decision, Keep):
            return sum(spec.num_bytes for spec in self.sources)
        return sum(stored_bytes(self.decision, (spec.shape[0], spec.shape[1]), spec.dtype) for spec in self.sources)

    def step(self, places: Mapping[str, TensorSpec]) -> Step:
        """The step, with the places of its outputs by name."""
        if isinstance(self.decision, Keep):
            return Copy(self.sources[0], places[self.sources[0].name], self.decision.reason)
        members = []
        for spec in self.sources:
            module = module_name(spec.name)
            stored = stored_tensors(self.decision, (spec.shape[0], spec.shape[1]), spec.dtype)
            members.append(Member(spec, tuple(places[f"{module}.{suffix}"] for suffix, _, _ in stored)))
        return Encode(tuple(members), self.decision)


def _draft(checkpoint: Checkpoint, decisions: Mapping[str, Decision], groups: Sequence[tuple[str, ...]]) -> list[_Draft]:
    """Drafts of the steps in source order, fused partners together at the place of the first."""
    group_of = {name: group for group in groups for name in group}
    problems: dict[str, tuple[str, ...]] = {}  # with the weights that must be kept to avoid it
    drafts: list[_Draft] = []
    done: set[str] = set()
    for name, spec in checkpoint.tensors.items():
        decision = decisions[name]
        if isinstance(decision, Keep):
            drafts.append(_Draft((spec,), decision))
        elif name not in done:
            group = group_of.get(name, (name,))
            done.update(group)
            specs = tuple(checkpoint.tensors[member] for member in group)
            problems.update(dict.fromkeys(_problems(specs, decision), group))
            drafts.append(_Draft(specs, decision))
    if problems:
        first, *others = problems
        more = f" (and {len(others)} more weights)" if others else ""
        raise RequestError(f"{first}{more} ({_way_out([name for names in problems.values() for name in names])})")
    return drafts


def _problems(specs: Sequence[TensorSpec], scheme: Scheme) -> list[str]:
    """What keeps the members of a group from being stored so that engines load them."""
    problems = []
    for number, spec in enumerate(specs, start=1):
        shape = (spec.shape[0], spec.shape[1])
        problem = scheme.problem(shape, fused=len(specs) > 1, last=number == len(specs))
        if problem is None and isinstance(scheme, Fp8) and scheme.strategy == "block" and is_named_only(module_name(spec.name)):
            problem = f"is a head or an embedding, where engines load no blocks of {scheme.preset}"
        if problem is not None:
            problems.append(f"{spec.name} {problem}")
    return problems


def _way_out(names: Sequence[str]) -> str:
    return "to leave it as it is: " + _options("--ignore", names)


def _options(flag: str, names: Sequence[str]) -> str:
    """The flag for each of these weights, all experts of a layer being one; for more than three with globs."""
    patterns = list(dict.fromkeys(experts_of(module) or module for module in map(module_name, names)))
    if len(patterns) > 3:
        patterns = list(dict.fromkeys(_glob(module) for module in patterns))
    return " ".join(f"{flag} '{pattern}'" for pattern in patterns)


def _glob(module: str) -> str:
    """The last two parts of a name, for all layers: `*.mlp.up_proj`."""
    return ".".join(["*", *module.split(".")[-2:]])


@lru_cache(maxsize=4096)
def stored_tensors(scheme: Scheme, shape: tuple[int, int], dtype: str) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """(last part of the name, dtype, shape) of what `scheme` stores for a weight, from its encoder run on shapes alone."""
    weight_NK = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta")
    stored = scheme.encode_whole(weight_NK)
    return tuple((suffix, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in stored.items())


@lru_cache(maxsize=4096)
def stored_bytes(scheme: Scheme, shape: tuple[int, int], dtype: str) -> int:
    """Bytes of what `scheme` stores for a weight."""
    return sum(tensor_bytes(stored_dtype, stored_shape) for _, stored_dtype, stored_shape in stored_tensors(scheme, shape, dtype))


def _lay_out(drafts: Sequence[_Draft], max_shard_bytes: int) -> tuple[Shard, ...]:
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
    if len(batches) == 1:
        return (_shard("model.safetensors", batches[0]),)
    return tuple(_shard(f"model-{number:05d}-of-{len(batches):05d}.safetensors", batch) for number, batch in enumerate(batches, start=1))


def _shard(file: str, drafts: Sequence[_Draft]) -> Shard:
    # Widest elements first, so that every tensor is aligned to its element.
    outputs = sorted((output for draft in drafts for output in draft.outputs()), key=lambda output: -DTYPE_BITS[output[1]])
    header, placed = build_header(outputs, file=file)
    places = {spec.name: spec for spec in placed}
    end = placed[-1].end if placed else len(header)
    return Shard(file, tuple(draft.step(places) for draft in drafts), end)


# --- as plain values -------------------------------------------------------------------------------------------------


def _shard_json(shard: Shard) -> dict[str, Any]:
    return {"file": shard.file, "bytes": shard.num_bytes, "steps": [_step_json(step) for step in shard.steps]}


def _step_json(step: Step) -> dict[str, Any]:
    if isinstance(step, Copy):
        return {"action": "copy", "reason": step.reason, "source": _spec_json(step.source), "output": _spec_json(step.output)}
    return {
        "action": "quantize",
        "scheme": step.scheme.preset,
        "observer": step.scheme.observer,
        "members": [
            {"module": m.module, "source": _spec_json(m.source), "outputs": [_spec_json(spec) for spec in m.stored]} for m in step.members
        ],
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


def bits_per_weight(scheme: Scheme) -> float:
    """Bits stored per weight, scales included, for a large matrix."""
    shape = (4096, 4096)
    return 8 * stored_bytes(scheme, shape, "BF16") / math.prod(shape)
