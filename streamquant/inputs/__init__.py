"""Input formats: what the tensors of a checkpoint make up, told from what lies beside what.

`find_weights` sorts tensors into matrices of the model (`Weight`) and the rest. A new input format is a file here and a line in
FINDERS.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from streamquant.checkpoint.checkpoint import Checkpoint
from streamquant.checkpoint.header import TensorSpec
from streamquant.checkpoint.source import Reader
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs.awq import find_awq
from streamquant.inputs.compressed import find_compressed
from streamquant.inputs.experts import LAYOUTS, Stack, find_stacks
from streamquant.inputs.fp8 import find_fp8
from streamquant.inputs.gptq import find_gptq
from streamquant.inputs.modelopt import find_modelopt_nvfp4
from streamquant.inputs.mxfp4 import find_mxfp4
from streamquant.inputs.weight import Hints, Weight, no_scheme, read_tensor
from streamquant.names import WEIGHT_SUFFIX, language_configs
from streamquant.quantization_config import quantized_modules
from streamquant.schemes import Scheme
from streamquant.schemes.fp8 import BLOCK

__all__ = [
    "LAYOUTS",
    "STATED_KEYS",
    "Inventory",
    "Stack",
    "Weight",
    "find_weights",
    "no_scheme",
    "read_tensor",
]

FINDERS = (find_compressed, find_fp8, find_mxfp4, find_modelopt_nvfp4, find_awq, find_gptq)
READ = "FP8 with scales, compressed-tensors, ModelOpt FP8 and NVFP4, AutoAWQ, GPTQ, MXFP4 of gpt-oss and DeepSeek-V4"

# Last parts of names that only quantized weights have.
STORED_ROLES = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_shape",
    "weight_g_idx", "qweight", "qzeros", "g_idx", "pre_quant_scale", "qscale_weight",
})  # fmt: skip
ALSO_STORED = frozenset({"scale", "scales"})  # names that other parameters have as well
ACTIVATION_ROLES = frozenset({"input_scale", "input_global_scale", "input_zero_point", "input_scale_ub", "qscale_act"})
CACHE_ROLES = frozenset({"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point", "qscale_act"})
OTHER_TOOLS = {
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "SCB": "bitsandbytes", "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes", "W_q": "HQQ", "codebooks": "AQLM", "Qidxs": "QuIP#", "trellis": "EXL3", "q_weight": "EXL2",
    "bitmask": "the sparsity of compressed-tensors", "centroids": "VPTQ",
}  # fmt: skip
DTYPE_OF = {"bfloat16": "BF16", "float16": "F16"}
STATED_KEYS = ("quantization_config", "compression_config")


Item = Weight | Stack | TensorSpec


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the tensors of a checkpoint make up."""

    items: tuple[Item, ...]  # matrices, stacks of them, and tensors that are neither, in source order
    dropped: Mapping[str, str]  # tensors of the source that mean nothing to an output -> why
    problems: tuple[str, ...]  # what does not fit together
    cache_scheme: Mapping[str, Any] | None  # how compressed-tensors quantizes the KV cache, if the source has that and its scales

    @property
    def weights(self) -> Iterator[Weight]:
        """The matrices, those of stacks too."""
        for item in self.items:
            if isinstance(item, Weight):
                yield item
            elif isinstance(item, Stack):
                yield from item.weights


def stated_quantization(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the config says of how the checkpoint is quantized, at its top or in the language model's part; empty if nothing."""
    top, *nested = language_configs(checkpoint.config)
    said = [checkpoint.quantization, *(owner.get(key) for owner in (*nested, top) for key in STATED_KEYS)]
    return next((stated for stated in said if isinstance(stated, dict)), {})


def find_weights(checkpoint: Checkpoint, source: Reader, *, expert_layout: str | None = None) -> Inventory:
    """Sort the tensors of a checkpoint. Reads nothing but `weight_shape` tensors, and those only where no header tells the shape.

    `expert_layout`: one of LAYOUTS, of 3-D stacks whose layout the model type does not tell; RequestError if it is another. What does
    not fit together ends up in `problems`.
    """
    if expert_layout not in {None, *LAYOUTS}:
        raise RequestError(f"unknown expert layout {expert_layout!r}; known are {', '.join(LAYOUTS)}")
    stated = stated_quantization(checkpoint)
    hints = _hints(checkpoint.config, stated, source, expert_layout)
    problems: list[str] = []
    item_of = _stored_together(checkpoint, hints, problems)
    quantized = {item.module for item in item_of.values() if isinstance(item, Weight)}
    cache_scheme = stated.get("kv_cache_scheme") if stated.get("quant_method") == "compressed-tensors" else None
    cache_scheme = cache_scheme if isinstance(cache_scheme, dict) else None
    drops_cache = cache_scheme is None and bool(stated or quantized)  # in a plain checkpoint such a name is a parameter's
    items: dict[str, Item] = {}
    stray: defaultdict[str, list[str]] = defaultdict(list)
    dropped: dict[str, str] = {}
    for name, spec in checkpoint.tensors.items():
        module, _, role = name.rpartition(".")
        if name in item_of:
            item = item_of[name]
            if item is not None and items.setdefault(item.name, item) is not item:
                problems.append(_twice(item.name))
        elif role in ACTIVATION_ROLES and (module in quantized or module + WEIGHT_SUFFIX in checkpoint.tensors):
            dropped[name] = "static scale of activations"
        elif role in CACHE_ROLES and drops_cache:
            dropped[name] = "scale of a quantized KV cache"
        elif role in STORED_ROLES or role in OTHER_TOOLS:
            by = f" of {OTHER_TOOLS[role]}" if role in OTHER_TOOLS else ""
            stray[module].append(f"{role} {spec.dtype} {list(spec.shape)}{by}")
        elif name in items:
            problems.append(_twice(name))
        elif name.endswith(WEIGHT_SUFFIX) and len(spec.shape) == 2:
            items[name] = Weight(name, spec.dtype, (spec.shape[0], spec.shape[1]), {"weight": spec})
        else:
            items[name] = spec
    problems += _names_twice(items.values())
    for module, parts in stray.items():
        problems.append(f"{module}: {', '.join(sorted(parts))} do not make up a weight of a kind that is read: {READ}")
    rotations = stated.get("transform_config")
    if quantized and isinstance(rotations, dict) and rotations.get("config_groups"):
        problems.append("quantization_config has a transform_config: the weights are rotated, which is not undone")
    return Inventory(tuple(items.values()), MappingProxyType(dropped), tuple(problems), cache_scheme)


def _stored_together(checkpoint: Checkpoint, hints: Hints, problems: list[str]) -> dict[str, Weight | Stack | None]:
    """What each tensor is a part of, by its name, where that is more than itself; None for parts of something that is wrong."""
    item_of: dict[str, Weight | Stack | None] = {}
    try:
        for stack in find_stacks(checkpoint.tensors.values(), hints):
            item_of.update(dict.fromkeys((spec.name for spec in stack.tensors), stack))
    except CheckpointError as error:
        problems.append(str(error))
    for module, tensors in _stored_modules(checkpoint).items():
        try:
            weight = next(filter(None, (find(module, tensors, hints) for find in FINDERS)), None)
        except CheckpointError as error:
            problems.append(str(error))
            item_of.update(dict.fromkeys(spec.name for spec in tensors.values()))
        else:
            if weight is not None:
                item_of.update(dict.fromkeys((spec.name for spec in weight.tensors.values()), weight))
    return item_of


def _names_twice(items: Collection[Item]) -> list[str]:
    """A problem if single experts have the names of those in a stack."""
    if not any(isinstance(item, Stack) for item in items):
        return []
    names = Counter(name for item in items for name in _names(item))
    name, count = names.most_common(1)[0]
    return [_twice(name)] if count > 1 else []


def _names(item: Item) -> list[str]:
    return [part.name for part in (*item.weights, *item.biases) or item.tensors] if isinstance(item, Stack) else [item.name]


def _twice(name: str) -> str:
    return f"{name} is stored twice: plain and quantized, or by itself and in a stack of experts"


def _stored_modules(checkpoint: Checkpoint) -> dict[str, dict[str, TensorSpec]]:
    """The tensors, by module and last part of the name, of every module that has one which a quantized weight may have.

    Without those that hold nothing, which are part of no weight.
    """
    modules: defaultdict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in checkpoint.tensors.items():
        module, _, role = name.rpartition(".")
        if spec.num_elements and (role in STORED_ROLES or role in ACTIVATION_ROLES or role in ALSO_STORED):
            modules[module][role] = spec
    for module, tensors in modules.items():
        weight = checkpoint.tensors.get(module + WEIGHT_SUFFIX)
        if weight is not None and weight.num_elements:
            tensors["weight"] = weight
    return modules


def _hints(config: Mapping[str, Any] | None, stated: Mapping[str, Any], source: Reader, expert_layout: str | None) -> Hints:
    owners = language_configs(config)
    said = (owner.get(key) for owner in owners for key in ("dtype", "torch_dtype"))
    dtype = next((DTYPE_OF[value] for value in said if isinstance(value, str) and value in DTYPE_OF), "BF16")
    return Hints(
        dtype=dtype,
        quantization=stated,
        block=_block(stated),
        scheme_of=_reader(stated),
        shape_of=partial(_read_shape, source),
        model_types=tuple(owner["model_type"] for owner in owners if isinstance(owner.get("model_type"), str)),
        expert_layout=expert_layout,
    )


def _block(stated: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block of FP8: said by the config, or DeepSeek's."""
    groups = stated.get("config_groups")
    args = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    candidates = [stated.get("weight_block_size"), *(arg.get("block_structure") for arg in args if isinstance(arg, dict))]
    for candidate in candidates:
        if isinstance(candidate, list) and len(candidate) == 2 and all(type(size) is int and size > 0 for size in candidate):
            return candidate[0], candidate[1]
    return BLOCK, BLOCK


def _reader(stated: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """The scheme of each module as a config of compressed-tensors says. A config that makes no sense raises where it is asked."""
    if stated.get("quant_method") != "compressed-tensors":
        return no_scheme
    try:
        return quantized_modules(stated)
    except CheckpointError as error:
        problem = str(error)

    def refuse(module: str) -> Scheme | None:
        raise CheckpointError(f"{module}: {problem}")

    return refuse


def _read_shape(source: Reader, spec: TensorSpec) -> tuple[int, int]:
    if (spec.dtype, spec.shape) != ("I64", (2,)):
        raise CheckpointError(f"{spec.name} is {spec.dtype} {list(spec.shape)}; a shape is I64 [2]")
    rows, columns = read_tensor(source, spec).tolist()
    return rows, columns
