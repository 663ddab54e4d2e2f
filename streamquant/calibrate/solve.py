"""What is stored of the weights of a layer: codes and scales by the solver of the method, and scales of inputs, keys and values.

Legend: schemes/scheme.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from streamquant.calibrate.budget import STACK_ELEMENTS
from streamquant.calibrate.clip import clip_bounds, may_clip
from streamquant.calibrate.gptq import Solution, gptq, output_size, round_to_nearest
from streamquant.calibrate.layer import Common, Layer, Record
from streamquant.calibrate.layer_outputs import Address
from streamquant.calibrate.statistics import Statistics
from streamquant.calibrate.tap import Tap
from streamquant.checkpoint.header import TensorSpec
from streamquant.errors import CheckpointError, RequestError
from streamquant.lazy import torch
from streamquant.plan import Encode, Measure, Member
from streamquant.schemes import Scheme
from streamquant.schemes.rounding import FP8_MAX
from streamquant.schemes.scheme import round_scale
from streamquant.schemes.units import Scales
from streamquant.stored import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


class _Job(NamedTuple):
    """A weight to solve."""

    address: Address
    member: Member
    weight_NK: Tensor
    statistics: Statistics | None
    shared: Tensor | None
    input_amax: float | None  # of the inputs of all members of its step, if it stores that


class _Solved(NamedTuple):
    code_NK: Tensor
    scales: Scales


def solve_weights(
    common: Common,
    layer: Layer,
    addresses: Sequence[Address],
    statistics: Mapping[str, Statistics | None],
    tap: Tap,
    say: Callable[[str], None],
) -> list[Record]:
    """Find codes and scales of the weights of these steps, and write them; `say` is told the name of one in work."""
    amax = _input_amax(layer, statistics) if any(_scheme(address).needs_data for address in addresses) else {}
    jobs = [job for address in addresses for job in _jobs(common, address, layer, statistics, amax)]
    stored: defaultdict[Address, list[Any]] = defaultdict(list)
    records = []
    for group in _stacks(jobs):
        say(group[0].member.weight.name)
        solution, errors = _solution(common, group)
        for job, solved, (before, after) in zip(group, _split(group, solution), errors, strict=True):
            stored[job.address] += _stored(job, solved)
            records.append(
                Record(
                    layer.index,
                    job.member.weight.name,
                    scheme=_scheme(job.address).title,
                    tokens=0 if job.statistics is None else job.statistics.num_tokens,
                    routed_tokens=tap.routed_tokens(layer.sites[job.member.weight.name]),
                    error_before=before,
                    error_after=after,
                    damping=solution.damping,
                    fallback=solution.fallback,
                )
            )
    for address, tensors in stored.items():
        common.outputs.write(address, tensors)
    return records


def store_cache_scales(common: Common, addresses: Sequence[Address], tap: Tap) -> None:
    """amax / 448 of keys and of values, a tensor each."""
    for address in addresses:
        step = address.step
        if not isinstance(step, Measure):
            continue
        amax = tap.cache_amax
        if amax is None or not all(0 < largest < math.inf for largest in amax):
            found = "were not seen: the model computes attention by itself" if amax is None else f"have the largest magnitudes {amax}"
            raise RequestError(f"{step.module}: its keys and values {found}; leave out --kv-cache")
        scales = [round_scale(torch.tensor([largest / FP8_MAX]), TORCH_DTYPES[step.k_scale.dtype]) for largest in amax]
        common.outputs.write(address, list(zip(step.outputs, scales, strict=True)))


def _input_amax(layer: Layer, statistics: Mapping[str, Statistics | None]) -> dict[str, float]:
    """The largest magnitude that each weight is multiplied with.

    Of an expert that no token has reached it is the largest for the same weights of others, or else in the layer: a scale of 0 gives
    infinities as soon as a token comes.
    """
    own = {name: 0.0 if seen is None else float(seen.amax_K.amax()) for name, seen in statistics.items()}
    lost = next((name for name, amax in own.items() if not math.isfinite(amax)), None)
    if lost is not None:
        raise CheckpointError(f"{lost} is given numbers that are not finite for the calibration data")
    largest: defaultdict[str, float] = defaultdict(float)
    for name, amax in own.items():
        for group in ("", layer.sites[name].parameter):
            largest[group] = max(largest[group], amax)
    if not largest[""]:
        raise CheckpointError(f"layer {layer.index} is given nothing but zeros for the calibration data")
    return {name: amax or largest[layer.sites[name].parameter] or largest[""] for name, amax in own.items()}


def _jobs(
    common: Common, address: Address, layer: Layer, statistics: Mapping[str, Statistics | None], input_amax: Mapping[str, float]
) -> list[_Job]:
    step = _encode(address)
    members = [(member, layer.weights[member.weight.name]) for member in step.members]
    shared = None
    if step.scheme.shares_amax:
        amax = max(float(weight_NK.abs().amax()) for _, weight_NK in members)
        dtype = common.dtype(step.members[0].weight.name)
        shared = step.scheme.share(torch.tensor([amax], device=common.device), dtype)
    inputs = max(input_amax[member.weight.name] for member, _ in members) if step.scheme.needs_data else None
    return [_Job(address, member, weight_NK, statistics[member.weight.name], shared, inputs) for member, weight_NK in members]


def _solution(common: Common, group: Sequence[_Job]) -> tuple[Solution, list[tuple[float, float]]]:
    """Codes for weights with one input, stacked, and the errors of each before and after."""
    scheme, dtype, seen = _scheme(group[0].address), common.dtype(group[0].member.weight.name), group[0].statistics
    weight_NK = torch.cat([job.weight_NK for job in group]) if len(group) > 1 else group[0].weight_NK
    known: Any = {"shared": group[0].shared, "dtype": dtype, "kernels": common.kernels}
    if seen is None or not common.method.uses_hessians:
        solution = round_to_nearest(weight_NK, scheme, **known)
        return solution._replace(fallback="" if seen else "no token reached it"), [(0.0, 0.0)] * len(group)
    solution = _solved(common, weight_NK, seen.hessian_KK, scheme, known)
    rows = [len(job.weight_NK) for job in group]
    before_N, after_N = torch.split(solution.error_before_N, rows), torch.split(solution.error_after_N, rows)
    sizes = [output_size(job.weight_NK, seen.hessian_KK) for job in group]
    return solution, [
        (float(before.sum()) / size, float(after.sum()) / size) for before, after, size in zip(before_N, after_N, sizes, strict=True)
    ]


def _solved(common: Common, weight_NK: Tensor, hessian_KK: Tensor, scheme: Scheme, known: Mapping[str, Any]) -> Solution:
    """By the solver of the method; with clipped bounds, if it clips and that helps."""

    def solve(bounds_BRC: Tensor | None) -> Solution:
        if common.method.solver == "gptq":
            return gptq(weight_NK, hessian_KK, scheme, bounds_BRC=bounds_BRC, **known)
        return round_to_nearest(weight_NK, scheme, hessian_KK=hessian_KK, bounds_BRC=bounds_BRC, **known)

    if not (common.method.clips and may_clip(scheme, weight_NK.shape[1])):
        return solve(None)
    bounds_BRC = scheme.observe(weight_NK.to(known["dtype"]), kernels=common.kernels)
    plain = round_to_nearest(weight_NK, scheme, hessian_KK=hessian_KK, bounds_BRC=bounds_BRC, **known)
    solution = solve(clip_bounds(weight_NK, bounds_BRC, hessian_KK, scheme, **known))
    if solution.error_after < plain.error_after:
        return solution._replace(error_before_N=plain.error_before_N)
    return plain._replace(damping=solution.damping, fallback=solution.fallback)


def _encode(address: Address) -> Encode:
    assert isinstance(address.step, Encode)
    return address.step


def _scheme(address: Address) -> Scheme:
    return _encode(address).scheme


def _stacks(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs that can be solved as one: of one input, one scheme, and rows that do not depend on each other."""
    groups: defaultdict[Any, list[_Job]] = defaultdict(list)
    for number, job in enumerate(jobs):
        scheme = _scheme(job.address)
        stands_alone = scheme.unit(job.weight_NK.shape[1])[0] > 1 or job.statistics is None
        shares = id(job.address.step) if scheme.shares_amax else None
        groups[number if stands_alone else (id(job.statistics), scheme, job.member.weight.dtype, shares)].append(job)
    for group in groups.values():
        part: list[_Job] = []
        for job in group:
            if part and sum(other.weight_NK.numel() for other in part) + job.weight_NK.numel() > STACK_ELEMENTS:
                yield part
                part = []
            part.append(job)
        yield part


def _split(group: Sequence[_Job], solution: Solution) -> Iterator[_Solved]:
    """What belongs to each weight of a stack."""
    start = 0
    for job in group:
        end = start + len(job.weight_NK)
        if len(group) == 1 or len(solution.scales.scale_RC) == 1:
            scales = solution.scales
        else:
            scales = Scales(*[None if part is None else part[start:end] for part in solution.scales])  # type: ignore[arg-type]
        yield _Solved(solution.code_NK[start:end], scales)
        start = end


def _stored(job: _Job, solved: _Solved) -> list[tuple[TensorSpec, Tensor]]:
    """The outputs of a weight and where they go."""
    scheme, weight = _scheme(job.address), job.member.weight
    tensors = scheme.pack(scheme.codes.of_value(solved.code_NK.clone()), solved.scales)
    dtype = TORCH_DTYPES[weight.dtype]
    tensors = tensors | scheme.once(weight.shape, dtype, job.shared)
    if job.input_amax is not None:
        tensors |= scheme.input_scales(torch.tensor([job.input_amax]), dtype)
    return [(job.member.place(suffix), tensor) for suffix, tensor in tensors.items()]
