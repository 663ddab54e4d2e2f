"""Scales that are moved between what gives an input and what reads it, in a layer, wherever that helps (AWQ, SmoothQuant).

Legend: B sequences, T tokens, H hidden size, N out_features, K in_features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from streamquant.calibrate.awq import Reader, Scaling, Steps, search_scale, smooth_scale
from streamquant.calibrate.budget import SEARCHED_ROWS
from streamquant.calibrate.gptq import output_size, round_to_nearest, spaced_rows
from streamquant.calibrate.layer import Common, Layer, Record
from streamquant.calibrate.layer_outputs import is_calibrated
from streamquant.calibrate.pairs import Pair, linear_pairs, move_scale
from streamquant.calibrate.skeleton import Call
from streamquant.calibrate.statistics import Statistics
from streamquant.calibrate.tap import Tap
from streamquant.lazy import torch
from streamquant.plan import Copy
from streamquant.schemes import Scheme
from streamquant.schemes.kernels import Kernels
from streamquant.schemes.rounding import FP4_MAX
from streamquant.schemes.scheme import Activations
from streamquant.schemes.units import dequantize
from streamquant.stored import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

HOLDS = 1e-2  # of what a layer adds: how much it may differ if a scale is moved, by rounding
SMOOTHING = 0.5  # of SmoothQuant


def move_scales(
    common: Common, layer: Layer, tap: Tap, statistics: Mapping[str, Statistics | None], hidden_BTH: Tensor, call: Call
) -> list[Record]:
    """Move scales between what gives an input and what reads it, wherever that helps; write what is then no longer a copy."""
    expected_BTH = common.skeleton.run(layer.module, hidden_BTH, call)
    records, changed = [], set[str]()
    for pair, offset in _pairs(layer, tap):
        problem = _problem(common, layer, pair) or _does_not_hold(common, layer, pair, offset, hidden_BTH, call, expected_BTH)
        scaling = None if problem else _scaling(common, layer, pair, statistics)
        if scaling is None or not scaling.helps:
            records.append(Record(layer.index, pair.title, scheme=common.method.scaling, fallback=problem or "does not help"))
            continue
        seen = _most(statistics[name] for name in pair.readers)
        assert seen is not None
        scale_K = move_scale(pair, scaling.scale_K, layer.weights, layer.vectors, offset=offset)
        for own in {id(own): own for name in pair.readers if (own := statistics[name]) is not None}.values():
            own.divide(scale_K)
        changed |= pair.tensors & layer.sites.keys()
        _put(common, layer, pair)
        common.view(layer, pair.tensors & layer.weights.keys())
        size = sum(
            output_size(layer.weights[name], own.hessian_KK)
            for name in pair.readers
            if (own := statistics[name]) is not None and is_calibrated(common.outputs.step_of(name))
        )
        records.append(
            Record(
                layer.index,
                pair.title,
                scheme=common.method.scaling,
                tokens=seen.num_tokens,
                error_before=scaling.error_before / size,
                error_after=scaling.error_after / size,
                rescaled=tuple(sorted(pair.tensors & layer.sites.keys())),
            )
        )
    for name in changed:
        address = common.outputs.address_of[name]
        if isinstance(address.step, Copy):
            tensor = layer.weights[name].to(TORCH_DTYPES[common.weights[name].dtype]) if name in layer.weights else layer.vectors[name]
            common.outputs.write(address, [(address.step.output, tensor)])
    return records


def _pairs(layer: Layer, tap: Tap) -> Iterator[tuple[Pair, float]]:
    names_at = defaultdict(list)
    for name, site in layer.sites.items():
        names_at[site.parameter].append(name)
    for norm, readers in tap.norm_readers.items():
        names = tuple(name for reader in readers for name in names_at[reader] if name in layer.weights)
        yield Pair(names_at[norm][0], names, is_norm=True), tap.norm_offset(norm)
    for pair in linear_pairs({name: (weight.shape[0], weight.shape[1]) for name, weight in layer.weights.items()}):
        yield pair, 0.0


def _problem(common: Common, layer: Layer, pair: Pair) -> str:
    """Why the scale of a pair cannot be moved, as far as the plan tells; or ""."""
    steps = {name: common.outputs.step_of(name) for name in pair.tensors & layer.sites.keys()}
    if not any(is_calibrated(steps[name]) for name in pair.readers):
        return "nothing that reads it is quantized"
    fixed = next((name for name, step in steps.items() if not (is_calibrated(step) or isinstance(step, Copy))), None)
    if fixed is None:
        return ""
    return f"{fixed} {'is a part of what is copied' if steps[fixed] is None else 'keeps the codes that the source has'}"


def _does_not_hold(common: Common, layer: Layer, pair: Pair, offset: float, hidden_BTH: Tensor, call: Call, expected_BTH: Tensor) -> str:
    """Why not: with a scale moved the layer gives something else. Or ""."""
    before = replace(layer, weights={name: layer.weights[name].clone() for name in pair.tensors & layer.weights.keys()})
    moved = replace(layer, weights=dict(layer.weights), vectors=dict(layer.vectors))
    scale_K = torch.ones(layer.weights[pair.readers[0]].shape[1], device=common.device)
    scale_K[::2], scale_K[1::3] = 2.0, 0.5
    move_scale(pair, scale_K, moved.weights, moved.vectors, offset=offset)
    _put(common, moved, pair)
    moved_BTH = common.skeleton.run(layer.module, hidden_BTH, call)
    _put(common, before, pair)
    difference, size = (moved_BTH - expected_BTH).norm(), (expected_BTH - hidden_BTH).norm()  # without what goes past the layer
    return "" if difference <= HOLDS * size else "the layer is not the same with a scale moved"


def _put(common: Common, layer: Layer, pair: Pair) -> None:
    """Put the tensors of a pair into the module."""
    for name in pair.tensors & layer.sites.keys():
        common.skeleton.set_weight(layer.module, layer.sites[name], layer.read(name))


def _scaling(common: Common, layer: Layer, pair: Pair, statistics: Mapping[str, Statistics | None]) -> Scaling | None:
    seen = _most(statistics[name] for name in pair.readers)
    if seen is None:
        return None
    readers, group_size, is_exact = [], 1, pair.bias in layer.vectors
    searches = common.method.scaling == "awq"  # SmoothQuant asks for the largest weights, in whatever rows they are
    for name in pair.readers:
        step, own = common.outputs.step_of(name), statistics[name]
        if own is None or not is_calibrated(step):
            continue
        weight_NK, unit = layer.weights[name], step.scheme.unit(layer.weights[name].shape[1])
        rows = spaced_rows(len(weight_NK), SEARCHED_ROWS if searches and unit[0] == 1 else len(weight_NK))
        round_weight = partial(_rounded, scheme=step.scheme, dtype=common.dtype(name), kernels=common.kernels)
        readers.append(Reader(weight_NK[rows], own, round_weight, _steps(step.scheme.activations, weight_NK.shape[1]), rows.step))
        group_size = unit[1]
    if not pair.is_norm:
        is_exact = is_exact or not is_calibrated(common.outputs.step_of(pair.giver))
    if searches:
        return search_scale(readers, seen, group_size=group_size, powers_of_two=is_exact)
    return smooth_scale(readers, seen, strength=SMOOTHING, powers_of_two=is_exact)


def _most(several: Iterable[Statistics | None]) -> Statistics | None:
    """Those with the most tokens."""
    return max((each for each in several if each is not None), key=lambda each: each.num_tokens, default=None)


def _steps(activations: Activations | None, num_columns: int) -> Steps | None:
    """How engines round inputs with one scheme."""
    if activations is None or (activations.type, activations.num_bits) == ("float", 8):
        return None
    largest_code = FP4_MAX if activations.type == "float" else 2.0 ** (activations.num_bits - 1) - 1
    return Steps(largest_code, activations.group_size or num_columns)


def _rounded(weight_NK: Tensor, *, scheme: Scheme, dtype: torch.dtype, kernels: Kernels) -> Tensor:
    """The nearest that a scheme can store, as if the weight stood alone."""
    shared = scheme.share(weight_NK.abs().amax().view(1), dtype) if scheme.shares_amax else None
    solution = round_to_nearest(weight_NK, scheme, shared=shared, dtype=dtype, kernels=kernels)
    unit = scheme.unit(weight_NK.shape[1])
    return dequantize(solution.code_NK, solution.scales.scale_RC, zero_RC=solution.scales.zero_RC, unit=unit)
