"""What becomes of each weight: the scheme that a recipe gives it, or the reason why it is kept.

Pure. Fused partners and the experts of a layer get one fate; what a recipe asks for and cannot have is an error here.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from streamquant.errors import CheckpointError, RequestError, quoted
from streamquant.inputs import Inventory, Stack, Weight
from streamquant.names import (
    EMBEDDING,
    KEPT_ROLES,
    ROLES,
    WEIGHT_SUFFIX,
    ModelFacts,
    experts_of,
    fused_groups,
    is_head_or_embedding,
    module_name,
    reason_to_keep,
    reason_to_keep_within,
    role_of,
)
from streamquant.quantization_config import stored_like
from streamquant.recipe import Matcher, Recipe, Rule
from streamquant.schemes import PLAIN, Scheme
from streamquant.schemes.plain import Plain
from streamquant.stored import DENSE_DTYPES

NOT_A_MATRIX = "not a 2-D weight"


@dataclass(frozen=True, slots=True)
class Keep:
    """The decision to leave a tensor as it is."""

    reason: str
    by_user: bool = False
    partner: str | None = None  # the fused partner that is kept and is why


Decision = Scheme | Keep


def decide(inventory: Inventory, recipe: Recipe, facts: ModelFacts) -> tuple[dict[str, Decision], list[tuple[str, ...]]]:
    """The fate of every matrix by its name, and the groups of fused ones that are stored together.

    Raises RequestError if the recipe cannot be followed, CheckpointError if nobody knows how to take a stack apart.
    """
    decisions, claims = _decide(inventory, recipe, facts)
    groups = _fused(inventory, decisions)
    _refuse_idle(recipe, claims, decisions)
    _refuse_mixed_experts(decisions)
    return decisions, groups


def taken_apart(inventory: Inventory, decisions: Mapping[str, Decision]) -> bool:
    """Whether stacks become single experts: if any is quantized, for loaders take all experts of a model in one way."""
    stacked = (weight for item in inventory.items if isinstance(item, Stack) for weight in item.weights)
    return any(not isinstance(decisions[weight.name], Keep | Plain) for weight in stacked)


def _decide(inventory: Inventory, recipe: Recipe, facts: ModelFacts) -> tuple[dict[str, Decision], dict[int, list[str]]]:
    """For each matrix its scheme, or why it is kept, before fused partners are brought into line; and the matrices of each rule."""
    rules, include = Matcher([rule.pattern for rule in recipe.rules]), Matcher(recipe.include)
    claims: defaultdict[int, list[str]] = defaultdict(list)
    included: set[int] = set()
    decisions: dict[str, Decision] = {}
    roles: dict[str, str | None] = {}  # of the modules with a matrix
    for weight in inventory.weights:
        module = weight.module
        role = roles[module] = role_of(module, weight.shape[0], facts)
        index, include_index = rules.first(module, role), include.first(module, role)
        default = reason_to_keep(module, role)
        if include_index is not None:
            included.add(include_index)
            asked = recipe.include[include_index]
            default = reason_to_keep_within(asked, module, weight.shape[0], facts) if asked in KEPT_ROLES else None
        if index is not None:
            claims[index].append(weight.name)
        decisions[weight.name] = _decision(weight, None if index is None else recipe.rules[index], default=default)
    others = {
        module_name(item.name): role_of(module_name(item.name), None, facts) for item in inventory.items if not isinstance(item, Weight)
    }
    _refuse_unknown_stacks(inventory, recipe, rules, others)
    pointless = [recipe.include[number] for number in include.unmatched(roles, used=included)]
    _refuse_tied(facts, roles, decisions, pointless)
    # A pattern that matches nothing is a mistake. One that gives a scheme must match something that could have one.
    for number in rules.unmatched(roles, used=claims):
        _refuse_unmatched(recipe.rules[number], modules=others | roles, matrices=roles)
    for pattern in pointless:
        raise RequestError(f"--include: {_called(pattern)} matches no weight that can be quantized{_hint(pattern, roles)}")
    return decisions, claims


def _decision(weight: Weight, rule: Rule | None, *, default: str | None) -> Decision:
    if default == EMBEDDING:  # whoever else keeps it: engines have no linear layer here that must be told
        return Keep(default)
    if rule is None:
        return Keep("no rule asks for it", by_user=True) if default is None else Keep(default)
    if rule.scheme is None:
        return Keep(f"asked for by {rule.origin} {rule.pattern}", by_user=True)
    if isinstance(rule.scheme, Plain):
        if not weight.is_quantized:
            return Keep("not quantized")
        if rule.scheme == PLAIN["F16"] and weight.dtype != "F16":
            raise RequestError(f"{weight.name} ({weight.format.title}) may hold numbers that float16 does not; use --scheme BF16")
        return rule.scheme
    if default is not None:
        return Keep(default)
    if weight.dtype not in DENSE_DTYPES:
        raise RequestError(f"{weight.name} is {weight.dtype}; only {', '.join(DENSE_DTYPES)} can be quantized ({way_out([weight.name])})")
    if not weight.num_elements:
        return Keep("empty")
    return rule.scheme if experts_of(weight.module) is None else rule.scheme.for_expert()


def _refuse_unknown_stacks(inventory: Inventory, recipe: Recipe, rules: Matcher, roles: Mapping[str, str | None]) -> None:
    """Raise CheckpointError for a stack of experts that is to be quantized or unpacked, and of which nobody knows how."""
    for item in inventory.items:
        if isinstance(item, Stack) and item.problem:
            module = module_name(item.name)
            index = rules.first(module, roles[module])
            asked = None if index is None else recipe.rules[index].scheme
            is_plain = all(spec.dtype in DENSE_DTYPES for spec in item.tensors)
            if asked is None or (isinstance(asked, Plain) and is_plain) or reason_to_keep(module, roles[module]) is not None:
                continue
            raise CheckpointError(item.problem)


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
        if is_head_or_embedding(module, role) and not isinstance(decisions[module + WEIGHT_SUFFIX], Keep | Plain)
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


def _fused(inventory: Inventory, decisions: dict[str, Decision]) -> list[tuple[str, ...]]:
    """Groups of fused weights to be stored together. Where one is kept by default, `decisions` then keep its partners too."""
    groups = []
    for modules in fused_groups((weight.module, weight.shape[1]) for weight in inventory.weights):
        names = tuple(module + WEIGHT_SUFFIX for module in modules)
        fates = {name: decisions[name] for name in names}
        schemes = {fate for fate in fates.values() if not isinstance(fate, Keep)}
        kept = {name: fate for name, fate in fates.items() if isinstance(fate, Keep)}
        if not schemes or any(isinstance(scheme, Plain) for scheme in schemes):
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
        if experts is None:
            continue
        first, decided = firsts.setdefault(experts, (name, decision))
        if decision != decided and _stored_as(decision) != _stored_as(decided):
            raise RequestError(
                f"{experts}: engines load the experts of a layer as one, so they need one scheme: {module_name(first)} {_said(decided)}, "
                f"{module_name(name)} {_said(decision)} ({way_out([name])})"
            )


def _stored_as(decision: Decision) -> str:
    return "kept" if isinstance(decision, Keep) else stored_like(decision)


def _said(decision: Decision) -> str:
    return "kept" if isinstance(decision, Keep) else decision.title


# --- ways out --------------------------------------------------------------------------------------------------------


def way_out(names: Sequence[str]) -> str:
    return "to leave it as it is: " + _options("--ignore", names)


def _options(flag: str, names: Sequence[str]) -> str:
    """The flag for each of these weights, all experts of a layer being one; for more than three with globs."""
    patterns = list(dict.fromkeys(experts_of(module) or module for module in map(module_name, names)))
    if len(patterns) > 3:
        patterns = list(dict.fromkeys(_glob(module) for module in patterns))
    return " ".join(f"{flag} {quoted(pattern)}" for pattern in patterns)


def _glob(module: str) -> str:
    """The last two parts of a name, for all layers: `*.mlp.up_proj`."""
    return ".".join(["*", *module.split(".")[-2:]])
