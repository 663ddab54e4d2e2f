"""What the name of a tensor says about its place in a model: its role, fused partners, and what is kept unless asked for.

All are tables, written by hand from what engines do (vLLM's `packed_modules_mapping` and model files).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

WEIGHT_SUFFIX = ".weight"
MAX_COUNT = 2**31  # of layers, experts and heads


class FusedSet(NamedTuple):
    """Modules beside each other that engines stack, in this order, into one weight. Any of them may be missing."""

    members: tuple[str, ...]
    extras: tuple[str, ...] = ()  # stacked below the members in some families; never without one of them


FUSED_SETS = (
    FusedSet(("q_proj", "k_proj", "v_proj"), extras=("g_proj", "b_proj", "f_a_proj", "output_gate_proj")),
    FusedSet(("q_a_proj", "kv_a_proj_with_mqa"), extras=("g_proj",)),
    FusedSet(("wq", "wk", "wv")),
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

# Where multimodal configs nest that of their language model.
LANGUAGE_KEYS = ("text_config", "llm_config", "language_config")

EMBEDDING = "embedding"
MTP = "multi-token prediction"
# Roles of modules that are kept unless asked for, with the reason that the plan gives, and all roles. Of several the first wins.
KEPT_ROLES = {
    "vision": "vision or audio tower, or projector",
    "mtp": MTP,
    "lm_head": "lm_head",
    "embeddings": EMBEDDING,
    "routers": "router",
}
ROLES = (*KEPT_ROLES, "shared_experts", "experts", "attention", "mlp")
# What one part of a name says about every module below it.
_ROLE_OF_PART = {
    "vision": re.compile(
        r"(visual|vision|audio|image|video|speech|whisper|mm)(_.*)?|(.*_)?projector|embed_(vision|audio)|vit|resampler|patch_merger"
    ),
    "mtp": re.compile(r"mtp(_.*)?|.*nextn.*|eh_proj|enorm|hnorm|shared_head"),
    "lm_head": re.compile(r"lm_head|embed_out"),
    "embeddings": re.compile(r"embed(_.*)?|w[tp]e|(.*_)?embed(ding)?s?|embed_tokens.*"),
    "routers": re.compile(r"gate|router.*|shared_expert_gate"),
    "shared_experts": re.compile(r"shared?_experts?|shared_mlp"),
    "experts": re.compile(r"experts"),
    "attention": re.compile(r"(.*_)?(attn|attention)|(Self|EncDec)Attention"),
    "mlp": re.compile(r"(.*_)?mlps?|feed_?forward|ffn|DenseReluDense"),
}
_HEADS = {"output", "model.output", "head"}
# Nemotron-H calls every kind of layer `mixer`; the projections tell.
_ROLE_IN_MIXER = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention") | dict.fromkeys(("up_proj", "down_proj"), "mlp")
# In a prediction layer whose linears are quantized engines keep these as they are.
_DENSE_IN_MTP = {"eh_proj", "fc", "mtp_linear_proj", "head"}
# The embedding that a tied head reads; others, of positions or of each layer, are not.
_TOKEN_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embed_in|wte|tok_embeddings|word_embeddings|embed|embeddings?)")
_STATE_SPACE = {"conv1d", "x_proj", "dt_proj", "in_proj_a", "in_proj_b", "in_proj_ba"}
_PROJECTION = re.compile(r".*_proj(_.*)?|w\d|wq.*|wk.*|wv|wo|fc\d?|c_fc.*|(up|down|gate)|q|k|v|o|dense.*|linear.*|key|query|value")
_EXPERT = re.compile(r"((?:.*\.)?experts)\.\d+\..*")
# Modules that stand beside the layer of a prediction block, whatever its name.
_BESIDE_PREDICTION = re.compile(r"\.\d+\.(?=(?:eh_proj|enorm|hnorm|shared_head)\.)")
# Mistral interleaves the rotary halves in the rows of wq and wk. vLLM undoes that in tensors named `weight`, not in packed codes
# nor in scales. It loads wv together with them.
_INTERLEAVED = re.compile(r"layers\.\d+\.attention\.w[qkv]")
_MISTRAL = re.compile(r"layers\.\d+\.(attention|feed_forward|gate|experts|shared_experts)(\..+)?")
_MISTRAL_TO_VLLM = {
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv_a_with_mqa": "kv_a_proj_with_mqa", "wkv_b": "kv_b_proj",
    "feed_forward": "mlp", "gate": "mlp.gate", "experts": "mlp.experts", "shared_experts": "mlp.shared_experts",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The few facts of a checkpoint that default keeps depend on; None where config.json does not say."""

    num_layers: int | None = None
    num_experts: int | None = None
    num_kv_heads: int | None = None
    ties_embeddings: bool | None = None  # lm_head is the embedding
    prediction_layers: frozenset[str] = frozenset()  # `model.layers.61.`: what stands in them tells that they predict more tokens

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, tensors: Iterable[str] = ()) -> "ModelFacts":
        """Reads the config of the language model, which multimodal configs nest, and the names of tensors."""
        text = whole = config or {}
        for key in LANGUAGE_KEYS:
            if isinstance(text.get(key), dict):
                text = text[key]
        layer_keys = ("num_hidden_layers", "n_layer", "n_layers")
        ties = [owner["tie_word_embeddings"] for owner in (whole, text) if isinstance(owner.get("tie_word_embeddings"), bool)]
        expert_keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        moe = text["moe"] if isinstance(text.get("moe"), dict) else {}  # of params.json
        return cls(
            num_layers=next((text[key] for key in layer_keys if _is_count(text.get(key))), None),
            num_experts=next((owner[key] for owner in (text, moe) for key in expert_keys if _is_count(owner.get(key))), None),
            ties_embeddings=any(ties) if ties else None,
            prediction_layers=frozenset(name[: match.end()] for name in tensors if (match := _BESIDE_PREDICTION.search(name))),
            num_kv_heads=text["num_key_value_heads"] if _is_count(text.get("num_key_value_heads")) else None,
        )

    def prediction_layer(self, module: str) -> str | None:
        """The multi-token prediction layer (`model.layers.61`) that holds the module, if its number or what it holds tells."""
        layer = _LAYER.search(module)
        if layer is not None and self.num_layers is not None and int(layer[1]) >= self.num_layers:
            return module[: layer.end(1)]
        if not self.prediction_layers:
            return None
        ends = (number.end() for number in _NUMBER.finditer(module))
        return next((module[:end] for end in ends if module[: end + 1] in self.prediction_layers), None)


def _is_count(value: object) -> bool:
    """Whether this may be the number of something. Of larger ones in a config Python cannot even print what they add up to."""
    return type(value) is int and 0 < value < MAX_COUNT


def language_configs(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A config and those nested in it that may speak of the language model."""
    top = config or {}
    return [top, *(top[key] for key in LANGUAGE_KEYS if isinstance(top.get(key), dict))]


def module_name(tensor: str) -> str:
    """The module that a weight belongs to; other tensors stand for themselves."""
    return tensor.removesuffix(WEIGHT_SUFFIX)


def name_in_vllm(module: str) -> str | None:
    """The name by which vLLM looks up a linear module of Mistral's own layout in `quantization`; None for other names."""
    if module == "output":
        return "lm_head"
    if _MISTRAL.fullmatch(module) is None:
        return None
    return "model." + ".".join(_MISTRAL_TO_VLLM.get(part, part) for part in module.split("."))


def fold(name: str) -> str:
    """A name with its numbers replaced by `*`, so that layers and experts fall into one."""
    return _NUMBER.sub("*", name)


def experts_of(module: str) -> str | None:
    """The name of all the experts of a layer, if the module lies in one of them; shared experts are ordinary layers."""
    match = _EXPERT.fullmatch(module)
    return None if match is None else match[1]


@lru_cache(maxsize=4096)
def _role_of_part(part: str) -> str | None:
    return next((role for role, expression in _ROLE_OF_PART.items() if expression.fullmatch(part)), None)


def role_of(module: str, num_rows: int | None, facts: ModelFacts, *, besides: str | None = None) -> str | None:
    """The role of a module in ROLES, or None where its name leaves that open.

    `num_rows`: of its weight, if that is a matrix. `besides`: a role not to consider.
    """
    parts = module.split(".")
    roles = set(map(_role_of_part, parts))
    if "vision" not in roles:  # numbers of the language model say nothing about a tower
        if facts.prediction_layer(module) is not None:
            roles.add("mtp")
        if module in _HEADS:
            roles.add("lm_head")
        # Qwen3-Next has 512 experts and k_proj of 512 rows: a row count alone does not make a router.
        if num_rows is not None and num_rows == facts.num_experts and not _PROJECTION.fullmatch(parts[-1]):
            roles.add("routers")
    roles.discard(besides)
    if parts[-2:-1] == ["mixer"] and not roles.intersection(ROLES):
        return _ROLE_IN_MIXER.get(parts[-1])
    return next((role for role in ROLES if role in roles), None)


def is_head_or_embedding(module: str, role: str | None) -> bool:
    """Whether the module is one of the two that a tied model has as one weight."""
    return role == "lm_head" or (role == "embeddings" and _TOKEN_EMBEDDING.fullmatch(module) is not None)


def reason_to_keep(module: str, role: str | None) -> str | None:
    """Why the 2-D weight of a module of this role is not quantized unless it is asked for by name, or None."""
    if role in KEPT_ROLES:
        by_rows = role == "routers" and role not in map(_role_of_part, module.split("."))
        return KEPT_ROLES[role] + " (as many rows as experts)" * by_rows
    parts = module.split(".")
    leaf = parts[-1]
    if leaf in _STATE_SPACE:
        return "state space or linear attention parameter"
    if leaf in {"kv_b_proj", "wkv_b"}:
        return "MLA projection that engines absorb"
    if _INTERLEAVED.fullmatch(module):
        return "q/k/v in Mistral's order of rows, which engines undo in unquantized weights only"
    if leaf == "weights_proj" and "indexer" in parts:
        return "indexer weights"
    return None


def reason_to_keep_within(asked: str, module: str, num_rows: int, facts: ModelFacts) -> str | None:
    """The same where `asked`, one of KEPT_ROLES, is asked for as a whole: embeddings and routers in a tower are still kept."""
    if asked == "mtp" and module.rpartition(".")[2] in _DENSE_IN_MTP:
        return f"{asked}: what engines do not quantize there"
    reason = reason_to_keep(module, role_of(module, num_rows, facts, besides=asked))
    return reason and f"{asked}: {reason}"


def prediction_patterns(modules: Iterable[str], facts: ModelFacts) -> set[str]:
    """Regular expressions, matched from the start, for the multi-token prediction blocks of these modules as engines name them.

    vLLM and SGLang rename and fuse what is in them without telling the quantization config: `model.layers.61.mtp_block.self_attn.qkv_proj`
    (vLLM, Step-3.5), `mtp.layers.0.self_attn.qkv_proj` (SGLang, Qwen), and in vLLM block i of MiMo's `model.mtp_layers` and of
    Ernie's `model.mtp_block` is layer num_hidden_layers + i.
    """
    blocks = set()
    for module in modules:
        layer = facts.prediction_layer(module)
        parts = (layer or module).split(".")
        root = next((index for index, part in enumerate(parts) if _role_of_part(part) == "mtp"), None)
        if root is None:
            blocks.add(".".join(parts[-2:]))
            continue
        blocks.add(parts[root])
        number = next((int(part) for part in parts[root:] if part.isdecimal()), None)
        if number is not None and facts.num_layers is not None:
            blocks.add(f"layers.{facts.num_layers + number}")
    return {rf"(.*[.])?{re.escape(block).replace(re.escape('.'), '[.]')}[.]" for block in blocks}


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
