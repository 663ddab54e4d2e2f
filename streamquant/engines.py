"""What engines load of a plan: each layer against a dated table of what vLLM, SGLang and transformers support (engines.toml).

    plan = streamquant.plan("path/to/model", scheme="W4A16")
    for finding in streamquant.engines.check(plan, engine="vllm", tp=4):
        print(finding.layers, finding.problem, finding.remedy)

Pure but for reading the table. A rank is one of `tp` tensor-parallel workers, which share the rows or the columns of a weight.
"""

import dataclasses
import datetime
import functools
import math
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from streamquant.errors import RequestError, quoted
from streamquant.names import MTP, ModelFacts, experts_of, fold, language_configs
from streamquant.plan import Copy, Encode, Plan
from streamquant.quantization_config import stored_like
from streamquant.schemes import Scheme
from streamquant.schemes.fp8 import NativeFp8
from streamquant.schemes.integer import PackedInt
from streamquant.schemes.packing import WORD_BITS
from streamquant.schemes.plain import Plain

SMALLEST_GROUP = 32  # that is offered in place of one that does not fit; smaller ones have few kernels
KEPT = "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What an engine loads of a scheme, in linears or in experts. engines.toml says what the fields mean."""

    refused: str | None = None
    instead: str | None = None
    only: str | None = None
    strategies: tuple[str, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    no_zero_points: str | None = None
    rows: int = 1
    columns: int = 1
    hidden: int = 1
    intermediate: int = 1
    rest: str | None = None
    alike: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine at a version, and what it loads of each scheme."""

    title: str
    version: str
    checked: datetime.date
    sources: tuple[str, ...]
    tensor_parallel: bool
    linears: Mapping[str, Support]
    experts: Mapping[str, Support]
    models: Mapping[str, str]  # model type -> why its experts do not load one by one, in whatever scheme

    def support(self, scheme: Scheme, *, expert: bool) -> Support:
        """What it loads of a scheme."""
        return (self.experts if expert else self.linears)[table_name(scheme)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something an engine does not load, or loads under a condition only, and what can be done about it."""

    layers: str  # numbers replaced by *
    count: int  # of layers; fused partners are one
    scheme: str
    problem: str
    remedy: str
    conditional: bool = False  # they do load where the problem says


@dataclass(frozen=True, slots=True)
class _Ranks:
    """An engine on a number of tensor-parallel ranks."""

    engine: Engine
    tp: int
    num_kv_heads: int | None  # of the model

    def split(self, leaf: str) -> tuple[int, int]:
        """Among how many ranks the rows and the columns of a weight are split, by the last part of its name."""
        if _is_named("row_parallel", leaf):
            return 1, self.tp
        if _is_named("kv_heads", leaf):
            return min(self.tp, self.num_kv_heads or self.tp), 1
        return (self.tp if _is_named("column_parallel", leaf) else 1), 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """What an engine holds as one weight: a weight, or fused partners."""

    modules: tuple[str, ...]  # folded
    shapes: tuple[tuple[int, int], ...]
    scheme: Scheme
    expert: bool

    @property
    def name(self) -> str:
        """`model.layers.*.self_attn.q_proj+k_proj+v_proj`."""
        parent, dot, leaf = self.modules[0].rpartition(".")
        return f"{parent}{dot}{'+'.join([leaf, *(module.rpartition('.')[2] for module in self.modules[1:])])}"


def check(plan: Plan, *, engine: str, tp: int = 1) -> list[Finding]:
    """What of the plan `engine` ("vllm", "sglang" or "transformers") does not load on `tp` tensor-parallel ranks.

    Raises RequestError for an engine that is not in the table, and for a `tp` that it does not have.
    """
    ranks = _Ranks(find_engine(engine, tp=tp), tp, ModelFacts.from_config(plan.checkpoint.config).num_kv_heads)
    findings = [finding for layer, count in _layers(plan).items() for finding in _findings(layer, count, plan, ranks)]
    return [*findings, *_of_model(plan, ranks.engine), *_mixed_experts(plan, ranks.engine)]


def find_engine(name: str, *, tp: int = 1) -> Engine:
    """The engine of this name (case does not matter), for `tp` ranks; raises RequestError where there is none."""
    engines = load_engines()
    if name.lower() not in engines:
        raise RequestError(f"unknown engine {name!r}; known are {', '.join(engines)}")
    engine = engines[name.lower()]
    if tp < 1:
        raise RequestError(f"--tp {tp}: an engine has at least one tensor-parallel rank")
    if tp > 1 and not engine.tensor_parallel:
        known = ", ".join(key for key, other in engines.items() if other.tensor_parallel)
        raise RequestError(f"--tp {tp}: how {engine.title} splits quantized layers is not in the table; leave it away (it is for {known})")
    return engine


def loads_in(scheme: Scheme) -> str:
    """The engines that load a scheme as it is, with what they do not load of it."""
    return ", ".join(filter(None, (_loads_in(engine, scheme) for engine in load_engines().values())))


def table_name(scheme: Scheme) -> str:
    """The name of a scheme in the table."""
    return f"{scheme.preset} as fp8" if isinstance(scheme, NativeFp8) else scheme.preset


@cache
def load_engines() -> Mapping[str, Engine]:
    """The engines of engines.toml, by name."""
    return {key: _engine(entry) for key, entry in _document().items() if key != "tensor_parallel"}


# --- the table -------------------------------------------------------------------------------------------------------


@cache
def _document() -> dict[str, Any]:
    return tomllib.loads((files("streamquant") / "engines.toml").read_text(encoding="utf-8"))


def _is_named(kind: str, leaf: str) -> bool:
    """Whether a list under [tensor_parallel] holds the last part of a name."""
    return leaf in _document()["tensor_parallel"][kind]


def _engine(table: dict[str, Any]) -> Engine:
    stated = {key: value for key, value in table.items() if key not in {"entries", "models", "sources"}}
    return Engine(
        **stated,
        sources=tuple(table["sources"]),
        linears=_supports(table, "linears"),
        experts=_supports(table, "experts"),
        models={model_type: entry["experts"] for entry in table["models"] for model_type in entry["types"]},
    )


def _supports(table: dict[str, Any], part: str) -> dict[str, Support]:
    supports: dict[str, Support] = {}
    for entry in table["entries"]:
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry[part].items()}
        supports.update(dict.fromkeys(entry["schemes"], Support(**fields)))
    return supports


def _loads_in(engine: Engine, scheme: Scheme) -> str | None:
    notes, refused = [], []
    for part in ("linears", "experts"):
        expert = part == "experts"
        stored = scheme.for_expert() if expert else scheme
        support = engine.support(stored, expert=expert)
        if any(_refusals(stored, support, engine)):
            refused.append(part)
        elif support.only is not None:
            notes.append(f"{part} only {support.only}")
    if refused == ["linears", "experts"]:
        return None
    notes = [*(f"no {part}" for part in refused), *notes]
    return f"{engine.title} ({', '.join(notes)})" if notes else engine.title


# --- a layer ---------------------------------------------------------------------------------------------------------


def _layers(plan: Plan) -> Counter[_Layer]:
    """The quantized layers, those that differ in nothing but numbers in their names counted together."""
    layers: Counter[_Layer] = Counter()
    for step in plan.steps:
        if isinstance(step, Encode) and not isinstance(step.scheme, Plain):
            names = tuple(member.module for member in step.members)
            shapes = tuple(member.weight.shape for member in step.members)
            layers[_Layer(tuple(map(fold, names)), shapes, step.scheme, experts_of(names[0]) is not None)] += 1
    return layers


def _findings(layer: _Layer, count: int, plan: Plan, ranks: _Ranks) -> Iterator[Finding]:
    """What is found of a layer; its shape is looked at only if the scheme with its settings loads."""
    finding = functools.partial(Finding, layers=layer.name, count=count, scheme=layer.scheme.title)
    engine, ignore = ranks.engine, _ignore(layer)
    support = engine.support(layer.scheme, expert=layer.expert)
    refusals = list(_refusals(layer.scheme, support, engine))
    for problem, setting in refusals:
        yield finding(problem=problem, remedy=_ways_out(setting, ignore))
    if refusals:
        return
    if support.only is not None:
        remedy = _ways_out(f"elsewhere {support.instead} in its place", ignore)
        yield finding(problem=f"{engine.title} loads them only {support.only}", remedy=remedy, conditional=True)
    if problem := _not_alone(layer.scheme, support, plan, engine):
        yield finding(problem=problem, remedy=_ways_out("--ignore the other layers", ignore))
    if problem := _misfit(layer, ranks):
        yield finding(problem=problem, remedy=_ways_out(_smaller_tp(layer, ranks), _smaller_group(layer, ranks), ignore))


def _refusals(scheme: Scheme, support: Support, engine: Engine) -> Iterator[tuple[str, str]]:
    """(problem, remedy) of a scheme with its settings, whatever the shape."""
    if support.refused is not None:
        yield f"{engine.title} {support.refused}", f"{support.instead} in its place"
        return
    strategy, group_size = scheme.weights_config["strategy"], scheme.weights_config.get("group_size")
    if support.strategies is not None and strategy not in support.strategies:
        allowed = " or ".join(support.strategies)
        yield f"{engine.title} loads them with a scale per {allowed}, not per {strategy}", f"--strategy {support.strategies[-1]}"
    if support.group_sizes is not None and group_size is not None and group_size not in support.group_sizes:
        fitting = max((size for size in support.group_sizes if size <= group_size), default=min(support.group_sizes))
        sizes = ", ".join(map(str, support.group_sizes))
        yield f"{engine.title} loads groups of {sizes}, not {group_size}", f"--group-size {fitting}"
    if support.no_zero_points is not None and not scheme.symmetric:
        yield f"{engine.title} {support.no_zero_points}", "--symmetric"


def _not_alone(scheme: Scheme, support: Support, plan: Plan, engine: Engine) -> str:
    """What is wrong with the other layers of the checkpoint, where all must be alike, or nothing."""
    config = plan.quantization_config
    if support.rest == "scheme" and len(config["config_groups"]) > 1:
        return f"{engine.title} loads these experts only where no layer is quantized in another way"
    if support.rest == "format" and config["format"] != scheme.format:
        return f"{engine.title} loads these experts only where all quantized layers are {scheme.format}"
    return ""


def _misfit(layer: _Layer, ranks: _Ranks) -> str:
    """What does not divide the shape of a layer or the part of it that a rank gets, or nothing."""
    support = ranks.engine.support(layer.scheme, expert=layer.expert)
    rows_of_rank = 0
    for module, shape in zip(layer.modules, layer.shapes, strict=True):
        leaf = module.rpartition(".")[2]
        ways = ranks.split(leaf)
        needed = _multiples(layer.scheme, support, leaf, ways)
        rows_of_rank += shape[0] // ways[0]
        for kind, length, among, multiple in zip(("rows", "columns"), shape, ways, needed, strict=True):
            if length % among:
                return f"{leaf} has {length} {kind}, which {among} ranks cannot share evenly"
            if length // among % multiple:
                share = f", {length // among} on each of {among} ranks" if among > 1 else ""
                return f"{leaf} has {length} {kind}{share}; {ranks.engine.title} needs a multiple of {multiple} there"
    if rows_of_rank % support.rows:
        on_rank = " on each rank" if ranks.tp > 1 else ""
        return f"has {rows_of_rank} rows{on_rank}; {ranks.engine.title} needs a multiple of {support.rows} there"
    return ""


def _multiples(scheme: Scheme, support: Support, leaf: str, ways: tuple[int, int]) -> tuple[int, int]:
    """What must divide the rows and the columns of a weight on a rank, where they are split so many ways."""
    down = _is_named("row_parallel", leaf)  # of an expert: from its intermediate width to the hidden one
    rows, columns = (support.hidden, support.intermediate) if down else (support.intermediate, support.hidden)
    if ways[0] > 1:
        rows = math.lcm(rows, scheme.row_multiple)
    if ways[1] > 1:
        columns = math.lcm(columns, _column_multiple(scheme))
    return rows, math.lcm(columns, support.columns)


def _column_multiple(scheme: Scheme) -> int:
    """Columns that cannot be parted among ranks: those of a group or a block, and of a packed word."""
    word = WORD_BITS // math.gcd(WORD_BITS, scheme.num_bits) if isinstance(scheme, PackedInt) else 1
    grouped = scheme.weights_config["strategy"] in {"group", "tensor_group", "block"}
    return math.lcm(word, scheme.unit(1)[1] if grouped else 1)


def _smaller_tp(layer: _Layer, ranks: _Ranks) -> str:
    """The option for the most ranks, fewer than now, on which the layer fits, or nothing."""
    for tp in range(ranks.tp - 1, 0, -1):
        if ranks.tp % tp == 0 and not _misfit(layer, dataclasses.replace(ranks, tp=tp)):
            return f"--tp {tp}"
    return ""


def _smaller_group(layer: _Layer, ranks: _Ranks) -> str:
    """The option for the largest group size, smaller than now, with which the layer fits, or nothing."""
    if not isinstance(layer.scheme, PackedInt) or layer.scheme.strategy != "group" or "group_size" not in layer.scheme.settings:
        return ""
    group_size = layer.scheme.group_size // 2
    while group_size >= SMALLEST_GROUP:
        scheme = dataclasses.replace(layer.scheme, group_size=group_size)
        other = dataclasses.replace(layer, scheme=scheme)
        support = ranks.engine.support(scheme, expert=layer.expert)
        if not any(_refusals(scheme, support, ranks.engine)) and not _misfit(other, ranks):
            return f"--group-size {group_size}"
        group_size //= 2
    return ""


# --- all experts -----------------------------------------------------------------------------------------------------


def _of_model(plan: Plan, engine: Engine) -> Iterator[Finding]:
    """Experts of models whose experts the engine does not load one by one."""
    types = [owner.get("model_type") for owner in language_configs(plan.checkpoint.config)]
    problem = next((problem for model_type, problem in engine.models.items() if model_type in types), None)
    owners = {(fold(owner), step.scheme.title) for step, owner in _experts(plan) if not isinstance(step.scheme, Plain)}
    if problem is not None:
        for owner, scheme in sorted(owners):
            count = len({found for step, found in _experts(plan) if fold(found) == owner and step.scheme.title == scheme})
            remedy = f"--ignore {quoted(_glob(owner))}"
            yield Finding(layers=owner, count=count, scheme=scheme, problem=f"{engine.title} {problem}", remedy=remedy)


def _mixed_experts(plan: Plan, engine: Engine) -> Iterator[Finding]:
    """Experts that the engine reads by the scheme of others, where there are several."""
    owners: defaultdict[str, set[str]] = defaultdict(set)  # all experts of a layer, folded -> of which layers
    kept = any(isinstance(step, Copy) and step.reason != MTP and experts_of(step.output.name) for step in plan.steps)
    ways = {KEPT: KEPT} if kept else {}
    alike = False
    for step, owner in _experts(plan):
        owners[fold(owner)].add(owner)
        if isinstance(step.scheme, Plain):
            ways[KEPT] = KEPT
        else:
            ways[stored_like(step.scheme)] = step.scheme.preset
            alike = alike or engine.support(step.scheme, expert=True).alike
    if alike and len(ways) > 1:
        for folded, layers in owners.items():
            yield Finding(
                layers=folded,
                count=len(layers),
                scheme=", ".join(sorted(ways.values())),
                problem=f"{engine.title} reads all experts of a model by one scheme",
                remedy=f"one scheme for all of them, or --ignore {quoted(_glob(folded))}",
            )


def _experts(plan: Plan) -> Iterator[tuple[Encode, str]]:
    """Steps that write experts one by one, with the name of all experts of their layer."""
    for step in plan.steps:
        if isinstance(step, Encode) and step.whole is None and (owner := experts_of(step.members[0].module)) is not None:
            yield step, owner


# --- ways out --------------------------------------------------------------------------------------------------------


def _ignore(layer: _Layer) -> str:
    """The options that keep a layer; engines stack experts, so all of them are kept."""
    modules = [layer.modules[0].rpartition(".experts.")[0] + ".experts"] if layer.expert else layer.modules
    return " ".join(f"--ignore {quoted(_glob(module))}" for module in modules)


def _glob(folded: str) -> str:
    """The last parts of a folded name, from a named one on: `*.mlp.down_proj`."""
    parts = folded.split(".")
    if len(parts) <= 2:
        return folded
    start = -2
    while parts[start] == "*" and -start < len(parts):
        start -= 1
    return ".".join(["*", *parts[start:]])


def _ways_out(*offers: str) -> str:
    *others, last = filter(None, offers)
    return f"{', '.join(others)} or {last}" if others else last
