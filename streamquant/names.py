"""What the name of a tensor says about its place in a model: fused partners, and what is kept unless asked for.

Both are tables, written by hand from what engines do (vLLM's `packed_modules_mapping` and model files).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

WEIGHT_SUFFIX = ".weight"
# The last parts of names of what a quantized weight is stored as, and dtypes of a `weight` that takes a scale beside it.
STORED_SUFFIXES = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale", "weight_zero_point", "weight_shape",
})  # fmt: skip
STORED_DTYPES = frozenset({"F8_E4M3", "I8"})


class FusedSet(NamedTuple):
    """Modules beside each other that engines stack, in this order, into one weight. Any of them may be missing."""

    members: tuple[str, ...]
    extras: tuple[str, ...] = ()  # stacked below the members in some families; never without one of them


FUSED_SETS = (
    FusedSet(("q_proj", "k_proj", "v_proj"), extras=("g_proj", "b_proj", "f_a_proj", "output_gate_proj")),
    FusedSet(("q_a_proj", "kv_a_proj_with_mqa"), extras=("g_proj",)),
    FusedSet(("wq_a", "wkv_a_with_mqa")),
    FusedSet(("wq_a", "wkv", "wgate")),
    FusedSet(("wk", "weights_proj")),
    FusedSet(("gate_proj", "up_proj")),
    FusedSet(("w1", "w3")),
    FusedSet(("c_fc_0", "c_fc_1")),
    FusedSet(("in_proj_qkv", "in_proj_z")),
    FusedSet(("in_proj_b", "in_proj_a")),
    FusedSet(("to_q", "to_k", "to_v")),
    FusedSet(("query", "key", "value")),
    FusedSet(("key_proj", "value_proj")),
)

EMBEDDING = "embedding"
MTP = "multi-token prediction"
_TOWER = re.compile(r"(visual|vision|audio|image|video|speech)(_.*)?|(.*_)?projector|embed_(vision|audio)|vit|resampler")
_MTP = re.compile(r"mtp(_.*)?|.*nextn.*")
_EMBEDDING = re.compile(r"embed(_.*)?|w[tp]e|(.*_)?embed(ding)?s?|embed_tokens.*")
_ROUTER = re.compile(r"gate|router.*|shared_expert_gate")
_STATE_SPACE = {"conv1d", "x_proj", "dt_proj", "in_proj_a", "in_proj_b", "in_proj_ba"}
_PROJECTION = re.compile(r".*_proj(_.*)?|w\d|wq.*|wk.*|wv|wo|fc\d?|c_fc.*|(up|down|gate)|q|k|v|o|dense.*|linear.*|key|query|value")
_EXPERT = re.compile(r"(.*\.)?experts\.\d+\..*")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The few numbers of config.json that names do not tell; None where it does not say."""

    num_layers: int | None = None
    num_experts: int | None = None
    num_kv_heads: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> "ModelFacts":
        """Reads the config of the language model, which multimodal configs nest."""
        text = config or {}
        for key in ("text_config", "llm_config", "language_config"):
            if isinstance(text.get(key), dict):
                text = text[key]
        expert_keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        return cls(
            num_layers=next((text[key] for key in ("num_hidden_layers", "n_layer") if type(text.get(key)) is int), None),
            num_experts=next((text[key] for key in expert_keys if type(text.get(key)) is int), None),
            num_kv_heads=text["num_key_value_heads"] if type(text.get("num_key_value_heads")) is int else None,
        )


def module_name(tensor: str) -> str:
    """The module that a weight belongs to; other tensors stand for themselves."""
    return tensor.removesuffix(WEIGHT_SUFFIX)


def fold(name: str) -> str:
    """A name with its numbers replaced by `*`, so that layers and experts fall into one."""
    return _NUMBER.sub("*", name)


def is_stored_quantized(tensor: str, dtype: str) -> bool:
    """Whether a tensor is a part of a quantized weight, as far as its name and dtype tell."""
    suffix = tensor.rpartition(".")[2]
    return suffix in STORED_SUFFIXES or (suffix == "weight" and dtype in STORED_DTYPES)


def is_expert(module: str) -> bool:
    """Whether the module lies in one of many experts; shared experts are ordinary layers."""
    return _EXPERT.fullmatch(module) is not None


@lru_cache(maxsize=4096)
def _kind_of_part(part: str) -> str | None:
    """What one part of a name tells about every module below it."""
    kinds = {"vision or audio tower, or projector": _TOWER, MTP: _MTP, EMBEDDING: _EMBEDDING, "router": _ROUTER}
    return next((kind for kind, expression in kinds.items() if expression.fullmatch(part)), None)


def reason_to_keep(module: str, num_rows: int, facts: ModelFacts) -> str | None:
    """Why the 2-D weight of `module` is not quantized unless it is asked for by name, or None."""
    parts = module.split(".")
    leaf = parts[-1]
    layer = _LAYER.search(module)
    if layer is not None and facts.num_layers is not None and int(layer[1]) >= facts.num_layers:
        return MTP
    for kind in map(_kind_of_part, parts):
        if kind is not None:
            return kind
    if leaf == "lm_head" or module in {"output", "model.output"}:
        return "lm_head"
    # Qwen3-Next has 512 experts and k_proj of 512 rows: a row count alone does not make a router.
    if num_rows == facts.num_experts and not _PROJECTION.fullmatch(leaf):
        return "router (as many rows as experts)"
    if leaf in _STATE_SPACE:
        return "state space or linear attention parameter"
    if leaf == "kv_b_proj":
        return "MLA projection that engines absorb"
    if leaf == "weights_proj" and "indexer" in parts:
        return "indexer weights"
    return None


def fused_groups(modules: Iterable[tuple[str, int]]) -> list[tuple[str, ...]]:
    """Groups of two or more fused partners among (module, number of columns), each in stacking order.

    Partners have the same parent and the same number of columns, for engines stack their rows.
    """
    roles = {role for fused in FUSED_SETS for role in fused.members + fused.extras}
    siblings: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for module, num_columns in modules:
        parent, _, leaf = module.rpartition(".")
        if leaf in roles:
            siblings[parent, num_columns].add(leaf)
    groups = []
    for (parent, _), leaves in siblings.items():
        for fused in FUSED_SETS:
            if not leaves.isdisjoint(fused.members):
                present = [role for role in fused.members + fused.extras if role in leaves]
                if len(present) > 1:
                    leaves.difference_update(present)
                    groups.append(tuple(f"{parent}.{role}" if parent else role for role in present))
    return groups
