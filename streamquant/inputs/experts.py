"""Stacks: the experts of a layer in one 3-D tensor, and the 2-D weights that they are.

    rows         [E, 2I, H]  gate in the upper half of the rows, up in the lower one; down [E, H, I]
    columns      [E, H, 2I]  the transpose: gate in the left half of the columns; down [E, I, H]
    interleaved  [E, H, 2I]  gate in the even columns, up in the odd ones; down [E, I, H]

Which it is follows from the model type, for shapes tell rows from columns but not which half is the gate. gpt-oss's MXFP4 blocks are
its interleaved layout, but with rows for columns.

Legend: E experts, H hidden size, I size of an expert.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamquant.checkpoint.header import TensorSpec
from streamquant.checkpoint.limits import MAX_TENSORS
from streamquant.errors import CheckpointError, quoted
from streamquant.inputs.fp8 import SCALE_DTYPES, ScaledFp8, scale_unit
from streamquant.inputs.mxfp4 import BLOCK_BYTES, BLOCK_ELEMENTS, MxFp4Blocks, MxFp4BlocksTransposed
from streamquant.inputs.weight import DENSE, Dense, Hints, InputFormat, Place, Weight
from streamquant.names import WEIGHT_SUFFIX
from streamquant.stored import DENSE_DTYPES

LAYOUTS = ("rows", "columns", "interleaved")
# Model type -> layouts of its files. Where there are two, shapes decide, and the first where they leave it open.
MODEL_LAYOUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter"), ("columns",)),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), ("columns", "rows")),
    "gpt_oss": ("interleaved",),
    **dict.fromkeys(
        (
            "afmoe", "axk1", "axk2", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
            "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
            "glm4v_moe_text", "glm_moe_dsa", "granitemoe", "granitemoehybrid", "granitemoeshared", "granitemoe_swa", "hunyuan_v1_moe",
            "hy_v3", "hy_v4", "jamba", "jetmoe", "kimi_k25", "kimi_linear", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
            "mistral4", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
            "qwen3_omni_moe", "qwen3_omni_moe_text", "solar_open", "zaya",
        ),
        ("rows",),
    ),
}  # fmt: skip
# Names of gate, up and down in other families, and of what holds the experts. vLLM halves once more what it finds as gate_proj in
# aria, and loads the halves under the name of both.
OTHER_NAMES: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    **dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2"), (("w1", "w3"), "w2", "block_sparse_moe")),
    "lfm2_moe": (("w1", "w3"), "w2", "feed_forward"),
    **dict.fromkeys(("aria", "aria_text"), (("gate_up_proj",), "down_proj", "mlp")),
}
USUAL_NAMES: tuple[tuple[str, ...], str, str | None] = (("gate_proj", "up_proj"), "down_proj", None)

_EXPERTS = re.compile(r"((?:.*\.)?experts)\.(gate_up_proj|down_proj|fc1|fc2)(?:\.weight)?(_blocks|_scales|_bias|_scale_inv|)")
_LINEARS = re.compile(r"((?:.*\.)?(?:block_sparse_moe|moe|mlp))\.(input_linear|output_linear)\.weight()")
_DOWN = {"down_proj", "fc2", "output_linear"}
ROLE_OF_PART = {"": "weight", "_blocks": "blocks", "_scales": "scales", "_scale_inv": "scale", "_bias": "bias"}
_DIMENSIONS = {"weight": 3, "blocks": 4}
# A matrix takes some kilobytes to plan. Real experts have megabytes, of small ones there are no more than these.
FEW_EXPERTS = 1 << 14
EXPERT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Stack:
    """The gate and up, or the down projections of a layer's experts."""

    name: str  # of the tensor, were it plain
    prefix: str  # of the names of single experts
    weights: tuple[Weight, ...]  # of single experts; empty if the layout is not known
    biases: tuple[Weight, ...]  # the same, columns of one element
    tensors: tuple[TensorSpec, ...]  # all that the source has of it
    whole: tuple[Weight, ...]  # expert by expert as in a plain 3-D tensor, unless the source has that
    problem: str  # why there are no weights

    @property
    def of_first(self) -> Iterator[Weight]:
        """The weights of the first expert, under whose names engines look for what is said of all."""
        return (weight for weight in self.weights if weight.place is not None and weight.place.expert == 0)


class _Found(NamedTuple):
    """The tensors of a stack."""

    prefix: str
    leaf: str
    tensors: dict[str, TensorSpec]  # by role

    @property
    def main(self) -> TensorSpec:
        """The tensor with the values or the codes."""
        main = self.tensors.get("weight") or self.tensors.get("blocks")
        if main is None:
            raise CheckpointError(f"{next(iter(self.tensors.values())).name} is there without {self.prefix}.{self.leaf}")
        return main

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values, in three dimensions."""
        shape = self.main.shape
        return (*shape[:2], shape[2] * BLOCK_ELEMENTS) if "blocks" in self.tensors else shape

    @property
    def is_quantized(self) -> bool:
        """Whether it has scales."""
        return not {"scale", "scales"}.isdisjoint(self.tensors)


def find_stacks(tensors: Iterable[TensorSpec], hints: Hints) -> list[Stack]:
    """The stacks among the tensors. Raises CheckpointError for one whose parts or shapes contradict each other or the model type."""
    # Ordinary matrices, most of the tensors there are, are let by before any name is looked at.
    candidates = [spec for spec in tensors if len(spec.shape) != 2 or not spec.name.endswith(WEIGHT_SUFFIX)]
    stacks = _gather(candidates)
    for stack in stacks:
        _check(stack)
    _refuse_too_many(stacks)
    layers: defaultdict[str, list[_Found]] = defaultdict(list)
    for stack in stacks:
        layers[stack.prefix].append(stack)
    layouts = {prefix: _layout(prefix, layer, hints) for prefix, layer in layers.items()}
    problems = {stack.prefix: problem for stack in stacks if (problem := _no_values(stack))}  # of all stacks of a layer, or of none
    found = [_stack(stack, layouts[stack.prefix], problems.get(stack.prefix, ""), hints) for stack in stacks]
    named = {spec.name for stack in stacks for spec in stack.tensors.values()}
    others = [spec for spec in candidates if len(spec.shape) > 2 and spec.name not in named]
    unknown = [spec for spec in others if not {"experts", "moe"}.isdisjoint(spec.name.split("."))]
    return found + [Stack(spec.name, spec.name, (), (), (spec,), (), _unknown(spec, hints)) for spec in unknown]


def _gather(tensors: Iterable[TensorSpec]) -> list[_Found]:
    """The tensors of each stack whose names say what they are."""
    found: dict[tuple[str, str], _Found] = {}
    for spec in tensors:
        match = _EXPERTS.fullmatch(spec.name) or _LINEARS.fullmatch(spec.name)
        if match is not None:
            prefix = match[1] if match[1].endswith("experts") else f"{match[1]}.experts"
            stack, role = found.setdefault((prefix, match[2]), _Found(prefix, match[2], {})), ROLE_OF_PART[match[3]]
            if role in stack.tensors:
                raise CheckpointError(f"{spec.name} and {stack.tensors[role].name} are the same stack of experts")
            stack.tensors[role] = spec
    return [stack for stack in found.values() if len(stack.main.shape) > 2 or not stack.tensors.keys() <= {"weight", "bias"}]


def _refuse_too_many(stacks: Sequence[_Found]) -> None:
    """Raise CheckpointError for more experts than anybody has, each of which would take memory to plan."""
    num_experts = sum(stack.main.shape[0] for stack in stacks)
    num_bytes = sum(stack.main.num_bytes for stack in stacks)
    if num_experts > min(FEW_EXPERTS + num_bytes // EXPERT_BYTES, MAX_TENSORS):
        raise CheckpointError(f"{stacks[0].main.name} and others stack {num_experts} experts in {num_bytes} bytes, which nobody does")


def _check(stack: _Found) -> None:
    """Raise CheckpointError unless the parts of the stack go together and hold something."""
    main, *others = (role for role in ("weight", "blocks", "scale", "scales") if role in stack.tensors)
    spec = stack.tensors[main]
    if others not in ([], ["scale"] if main == "weight" else ["scales"]):
        raise CheckpointError(
            f"{spec.name} has {', '.join(stack.tensors[role].name for role in others)} beside it, which do not go together"
        )
    if len(spec.shape) != _DIMENSIONS[main] or not spec.num_elements:
        raise CheckpointError(f"{spec.name} has shape {list(spec.shape)}; a stack of experts has {_DIMENSIONS[main]} dimensions, none of 0")


def _no_values(stack: _Found) -> str:
    """Why the stack cannot be taken apart, if it holds codes that mean nothing by themselves."""
    main = stack.main
    if not stack.tensors.keys() <= {"weight", "bias"} or main.dtype in DENSE_DTYPES:
        return ""
    way_out = f"to leave the experts as they are: --ignore {quoted(stack.prefix)}"
    return f"{main.name} is {main.dtype} without scales; only {', '.join(DENSE_DTYPES)} can be quantized ({way_out})"


def _unknown(spec: TensorSpec, hints: Hints) -> str:
    model = hints.model_types[-1] if hints.model_types else "no model type"
    return (
        f"{spec.name} {list(spec.shape)} stacks experts in 3-D in a layout that is not known for {model}: "
        f"state it with --expert-layout {'|'.join(LAYOUTS)}, or leave it as it is: --ignore {quoted(spec.name)}"
    )


def _layout(prefix: str, layer: Sequence[_Found], hints: Hints) -> str | None:
    """The layout of the stacks of a layer; None if it is not known."""
    shapes = {("down" if stack.leaf in _DOWN else "gate_up"): stack.shape for stack in layer}
    known = (hints.expert_layout,) if hints.expert_layout else next((MODEL_LAYOUTS[t] for t in hints.model_types if t in MODEL_LAYOUTS), ())
    if not known:
        return None
    gate_up, down = shapes.get("gate_up"), shapes.get("down")
    if gate_up is None or down is None or any("blocks" in stack.tensors for stack in layer):
        return known[0]
    for layout in known:
        (rows, columns), (down_rows, down_columns) = gate_up[1:], down[1:]
        if layout != "rows":
            rows, columns, down_rows, down_columns = columns, rows, down_columns, down_rows
        if (gate_up[0], rows, columns) == (down[0], 2 * down_columns, down_rows):
            return layout
    raise CheckpointError(f"{prefix}: gate_up_proj {list(gate_up)} and down_proj {list(down)} are not stacked in {' or '.join(known)}")


def _stack(stack: _Found, layout: str | None, problem: str, hints: Hints) -> Stack:
    """The stack with its single experts, unless `problem` says why there are none."""
    name, everything = stack.main.name.removesuffix("_blocks"), tuple(stack.tensors.values())
    if layout is None and stack.is_quantized:
        raise CheckpointError(f"{stack.main.name} is quantized in a layout not known: state it with --expert-layout {'|'.join(LAYOUTS)}")
    if layout is None or problem:
        return Stack(name, stack.prefix, (), (), everything, (), problem or _unknown(stack.main, hints))
    form, dtype = _format(stack, layout, hints)
    num_experts, *sides = stack.shape
    rows, columns = reversed(sides) if "weight" in form.by_columns else sides
    prefix, leaves = _names(stack, hints)
    size = _rows_of_one(stack, rows, leaves, form, interleaved=layout == "interleaved")
    step = len(leaves) if layout == "interleaved" else 1
    parts = [
        (f"{prefix}.{expert}.{leaf}", Place(expert, number if step > 1 else number * size, step))
        for expert in range(num_experts)
        for number, leaf in enumerate(leaves)
    ]
    tensors = {role: spec for role, spec in stack.tensors.items() if role != "bias"}
    weights = [Weight(f"{module}.weight", dtype, (size, columns), tensors, form, place) for module, place in parts]
    bias = _bias(stack, rows)
    biases = [Weight(f"{module}.bias", spec.dtype, (size, 1), {"weight": spec}, DENSE, place) for spec in bias for module, place in parts]
    whole: list[Weight] = []
    if isinstance(form, MxFp4Blocks):  # the plain stack is its transpose
        turned = MxFp4BlocksTransposed()
        whole = [Weight(name, dtype, (columns, rows), tensors, turned, Place(expert)) for expert in range(num_experts)]
    elif stack.is_quantized:
        whole = [Weight(name, dtype, (rows, columns), tensors, form, Place(expert)) for expert in range(num_experts)]
    return Stack(name, prefix, tuple(weights), tuple(biases), everything, tuple(whole), "")


def _names(stack: _Found, hints: Hints) -> tuple[str, tuple[str, ...]]:
    """What the names of single experts begin with, and the last parts of the names of the weights that each becomes."""
    gate_up, down, owner = next((OTHER_NAMES[t] for t in hints.model_types if t in OTHER_NAMES), USUAL_NAMES)
    prefix = stack.prefix if owner is None else re.sub(r"[^.]*\.experts$", f"{owner}.experts", stack.prefix)
    return prefix, (down,) if stack.leaf in _DOWN else gate_up


def _rows_of_one(stack: _Found, rows: int, leaves: Sequence[str], form: InputFormat, *, interleaved: bool) -> int:
    """Rows of each weight that an expert becomes."""
    size, rest = divmod(rows, len(leaves))
    if rest:
        raise CheckpointError(f"{stack.main.name}: {rows} rows are no pair of gate and up")
    if len(leaves) > 1 and not interleaved and size % form.row_multiple:
        raise CheckpointError(f"{stack.main.name}: gate and up of {size} rows share a block of {form.row_multiple} rows")
    return size


def _bias(stack: _Found, rows: int) -> list[TensorSpec]:
    """The biases of all experts, if there are any."""
    bias = stack.tensors.get("bias")
    if bias is None:
        return []
    shape = (stack.shape[0], rows)
    if bias.shape != shape or bias.dtype not in DENSE_DTYPES:
        raise CheckpointError(f"{bias.name} is {bias.dtype} {list(bias.shape)}; the bias of {stack.main.name} has shape {list(shape)}")
    return [bias]


def _format(stack: _Found, layout: str, hints: Hints) -> tuple[InputFormat, str]:
    """How the stack is stored, and the dtype of its values."""
    tensors, main = stack.tensors, stack.main
    if "blocks" in tensors:
        scales = tensors.get("scales")
        fits = scales is not None and scales.shape == main.shape[:3] and (main.dtype, scales.dtype) == ("U8", "U8")
        if layout != "interleaved" or not fits or main.shape[3] != BLOCK_BYTES:
            raise CheckpointError(f"{main.name} {main.dtype} {list(main.shape)} with its scales is not stored as gpt-oss stores MXFP4")
        return MxFp4Blocks(), "BF16"
    if "scale" in tensors:
        scale = tensors["scale"]
        if main.dtype != "F8_E4M3" or scale.dtype not in SCALE_DTYPES or layout != "rows":
            raise CheckpointError(
                f"{main.name} ({main.dtype}, {layout}) with {scale.name} ({scale.dtype}): only FP8 stacked in rows is read"
            )
        if scale.shape[:1] != main.shape[:1]:
            raise CheckpointError(f"{scale.name} has shape {list(scale.shape)}: {main.name} has {main.shape[0]} experts")
        unit = scale_unit((main.shape[1], main.shape[2]), scale.shape[1:], block=hints.block, name=scale.name)
        return ScaledFp8(unit, scale.dtype), hints.dtype_beside(scale.dtype)
    return Dense(transposed=layout != "rows"), main.dtype
