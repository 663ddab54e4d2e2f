"""Calibrated quantization, one decoder layer at a time: memory for a layer, the Hessians of its inputs, and the hidden states.

For each layer: load its weights, run what the layers before give through it, which gives what the next one is given, and collect
statistics of the inputs of its linears meanwhile, move scales (AWQ, SmoothQuant), solve (GPTQ, or round), write.

A layer is calibrated with what it is given in the model that is not quantized. To run each layer a second time, quantized, so that the
next one sees what was lost before, takes half as much time again and is no better with 3 or 4 bits (benchmarks/README.md): no solver
here makes good in one layer what was lost in another. So a run that was killed runs the layers before from the source, and nothing is
read back.
Legend: B sequences, T tokens, H hidden size, N out_features, K in_features.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streamquant.calibrate import heap
from streamquant.calibrate.awq import Reader, Scaling, Steps, search_scale, smooth_scale
from streamquant.calibrate.budget import SEARCHED_ROWS, STACK_ELEMENTS, keeps_inputs, shows_every_expert, tokens_of_batch, widest_of
from streamquant.calibrate.clip import clip_bounds, may_clip
from streamquant.calibrate.data import Calibration
from streamquant.calibrate.gptq import Solution, gptq, hessian_error, round_to_nearest, spaced_rows
from streamquant.calibrate.hidden import HiddenStates
from streamquant.calibrate.layer_outputs import Address, LayerOutputs, is_calibrated
from streamquant.calibrate.method import Method
from streamquant.calibrate.pairs import Pair, linear_pairs, move_scale
from streamquant.calibrate.skeleton import Call, Site, Skeleton
from streamquant.calibrate.statistics import Collector, Statistics
from streamquant.calibrate.tap import Linear, Tap
from streamquant.checkpoint.header import TensorSpec
from streamquant.checkpoint.source import Source
from streamquant.checkpoint.writer import write_file
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs import Weight, read_tensor
from streamquant.lazy import torch
from streamquant.names import fold
from streamquant.plan import Copy, Encode, Measure, Member, Plan
from streamquant.schemes import Scheme
from streamquant.schemes.kernels import Kernels
from streamquant.schemes.rounding import FP4_MAX, FP8_MAX
from streamquant.schemes.scheme import Activations, round_scale
from streamquant.schemes.units import Scales, dequantize
from streamquant.stored import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

FEW_TOKENS = 128  # routed to an expert: too few for a Hessian
HOLDS = 1e-2  # of what a layer adds: how much it may differ if a scale is moved, by rounding
SMOOTHING = 0.5  # of SmoothQuant
SCALINGS = ("awq", "smoothquant")
TINY = 1e-30
LOGGER = logging.getLogger("streamquant")


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a weight, or of a pair."""

    layer: int
    name: str
    scheme: str = ""
    tokens: int = 0  # that its input was seen with
    routed_tokens: int | None = None  # of an expert: those that the router sends to it
    error_before: float = 0.0  # of the outputs over all tokens, rounded to nearest, relative to their sum of squares
    error_after: float = 0.0
    damping: float = 0.0
    fallback: str = ""  # why it was left to plain rounding, or as it was
    rescaled: tuple[str, ...] = ()  # the tensors of a pair between which a scale was moved

    @property
    def is_pair(self) -> bool:
        """Whether it is about a scale that was moved, or not."""
        return self.scheme in SCALINGS


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


@dataclass(slots=True)
class _Layer:
    """A layer in work."""

    index: int
    module: nn.Module
    sites: Mapping[str, Site]  # by names in the checkpoint
    weights: dict[str, Tensor] = field(default_factory=dict)  # matrices, float32, in the memory of the module as a rule
    vectors: dict[str, Tensor] = field(default_factory=dict)  # everything else, as stored

    def read(self, name: str) -> Tensor:
        """Any tensor of it."""
        return self.weights[name] if name in self.weights else self.vectors[name]

    def linear(self, name: str) -> Linear:
        """The product that a matrix is a part of."""
        return Linear(self.sites[name].parameter, self.sites[name].expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCalibration:
    """What layers share."""

    plan: Plan
    weights: Mapping[str, Weight]  # what the checkpoint has as matrices, by name
    source: Source
    skeleton: Skeleton
    calibration: Calibration
    method: Method
    max_fallback: float  # the part of the weights that may be left to plain rounding
    outputs: LayerOutputs
    work: Path
    device: torch.device
    kernels: Kernels
    compute_dtype: torch.dtype  # of products while layers are run; all else of them is float32
    nonfinite: set[str] | None  # takes names of weights with NaN and infinities, which count as zeros; None if they are an error
    on_progress: Callable[[str], None] | None  # told what is worked on

    @property
    def _records_file(self) -> Path:
        return self.work / "calibration.json"

    def run(self, max_hidden_bytes: int) -> list[Record]:
        """Finish the steps of all weights in decoder layers, and of the norms whose scales move.

        Raises RequestError if more than `max_fallback` of the weights are left to plain rounding.
        """
        layers = [list(self.skeleton.sites(index)) for index in range(self.skeleton.num_layers)]
        addresses = [self._steps_of(names) for names in layers]
        self._require_reached({address for of_layer in addresses for address in of_layer})
        finished = [all(map(self.outputs.is_finished, of_layer)) for of_layer in addresses]
        records = self._earlier_records(finished)
        num_weights = sum(len(address.step.members) for of_layer in addresses for address in of_layer if isinstance(address.step, Encode))
        self._require_few_fallbacks(records, num_weights)
        if all(finished):
            return records
        states, calls = self._first_states(max_hidden_bytes)
        seconds: list[float] = []
        for index, names in enumerate(layers):
            started = time.monotonic()
            if finished[index]:
                self._pass(self._load(index, names), states, calls)
            else:
                of_layer = self._layer(index, names, states, calls, records)
                records += of_layer
                self._require_few_fallbacks(records, num_weights)
                seconds.append(time.monotonic() - started)
                self._tell(index, of_layer, seconds, num_left=len(layers) - 1 - index)
            self.skeleton.drop_layer(index)
            states.advance()
            heap.give_back()
        return records

    def _require_reached(self, reached: Set[Address]) -> None:
        """What takes data is in a layer."""
        for step in (address.step for address in self.outputs.addresses if address not in reached):
            if isinstance(step, Measure):
                raise RequestError(
                    f"{step.module} is in no decoder layer, where its keys and values could be measured; leave out --kv-cache"
                )
            if isinstance(step, Encode) and step.scheme.needs_data:
                weight = step.members[0].weight
                raise RequestError(
                    f"{weight.name} is in no decoder layer, where {step.scheme.preset} could measure its inputs; "
                    f"--ignore {weight.module}, or give it another scheme"
                )

    # --- what a layer is made of ------------------------------------------------------------------------------------

    def _steps_of(self, names: Sequence[str]) -> list[Address]:
        """The steps of a layer that quantize its weights, and those that measure its keys and values."""
        modules = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in names)
        places = [*filter(self._is_matrix, names), *modules]
        addresses = dict.fromkeys(self.outputs.address_of[place] for place in places if place in self.outputs.address_of)
        return [address for address in addresses if is_calibrated(address.step) or isinstance(address.step, Measure)]

    def _read(self, name: str) -> Tensor:
        """A tensor of the checkpoint: float32 if it is a matrix."""
        if name not in self.weights:
            spec = self.plan.checkpoint.tensors[name]
            return read_tensor(self.source, spec).view(spec.shape)
        weight = self.weights[name]
        weight_NK = weight.decode(weight.read(self.source, 0, weight.shape[0])).float()
        if _is_finite(weight_NK):
            return weight_NK
        if self.nonfinite is None:
            raise CheckpointError(f"{name} holds NaN or infinite weights; --allow-nonfinite stores them as zeros")
        self.nonfinite.add(name)
        return weight_NK.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _read_outer(self, name: str) -> Tensor:
        """A tensor outside of the layers, as stored if it is plain: an embedding in float32 may be larger than a layer."""
        weight = self.weights.get(name)
        if weight is None or weight.is_plain:
            spec = self.plan.checkpoint.tensors[name]
            return read_tensor(self.source, spec).view(spec.shape)
        return weight.decode(weight.read(self.source, 0, weight.shape[0]))

    def _load(self, index: int, names: Sequence[str]) -> _Layer:
        layer = _Layer(index, self.skeleton.layer(index), self.skeleton.sites(index))
        num_ahead = self.source.num_connections
        with ThreadPoolExecutor(max(num_ahead, 1)) as threads:
            tensors = _read_ahead(self._read, names, threads, num_ahead) if num_ahead else map(self._read, names)

            def load(name: str) -> Tensor:
                tensor = next(tensors)  # in the order of the names
                if not self._is_matrix(name):
                    layer.vectors[name] = tensor.to(self.device)
                return tensor

            self.skeleton.load_layer(index, load)
        self._view(layer, filter(self._is_matrix, names))
        return layer

    def _view(self, layer: _Layer, names: Iterable[str]) -> None:
        """Have the matrices of a layer as its module has them."""
        layer.weights.update({name: self.skeleton.weight(layer.module, layer.sites[name]) for name in names})

    def _is_matrix(self, name: str) -> bool:
        return name in self.weights and not self.weights[name].is_vector

    # --- running ----------------------------------------------------------------------------------------------------

    def _first_states(self, max_bytes: int) -> tuple[HiddenStates, list[list[Call]]]:
        """What enters the first layer, and the calls of all layers, for each batch of samples of one length."""
        self.skeleton.load_outer(self._read_outer)
        widest = widest_of([self.weights[name] for name in self.skeleton.sites(0) if self._is_matrix(name)])
        batches = list(_batches(self.calibration.samples, max_tokens=tokens_of_batch(widest)))
        hidden_size = self.skeleton.hidden_size
        shapes = [(*batch.shape, hidden_size) for batch in batches]
        file = self.work / "hidden-states.part"
        states = HiddenStates(shapes, dtype=self.skeleton.dtype, max_bytes=max_bytes, file=file, twice=keeps_inputs(self.skeleton))
        calls = []
        for number, batch_BT in enumerate(batches):
            hidden_BTH, of_layers = self.skeleton.record(batch_BT.to(self.device))
            states.put(number, hidden_BTH)
            calls.append(of_layers)
        states.advance()
        self.skeleton.drop_outer()
        return states, calls

    def _pass(self, layer: _Layer, states: HiddenStates, calls: Sequence[Sequence[Call]]) -> None:
        """Run all batches through a layer, for what it gives."""
        lower = self.compute_dtype != torch.float32
        for number, of_layers in enumerate(calls):
            self._say(f"layer {layer.index + 1} of {self.skeleton.num_layers}, batch {number + 1} of {len(calls)}")
            with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=lower, cache_enabled=False):
                hidden_BTH = self.skeleton.run(layer.module, states.get(number, self.device), of_layers[layer.index])
            if not _is_finite(hidden_BTH):
                raise CheckpointError(f"layer {layer.index} gives numbers that are not finite for the calibration data")
            states.put(number, hidden_BTH)

    def _layer(
        self, index: int, names: Sequence[str], states: HiddenStates, calls: Sequence[Sequence[Call]], earlier: Sequence[Record]
    ) -> list[Record]:
        """Quantize a layer."""
        layer = self._load(index, names)
        first_BTH = states.get(0, self.device).clone() if self.method.scaling else None  # the pass may overwrite it
        statistics, tap = self._statistics(layer, states, calls)
        records = []
        if first_BTH is not None:
            records += self._move_scales(layer, tap, statistics, first_BTH, calls[0][index])
        records += self._solve(layer, names, statistics, tap)
        self._store_cache_scales(names, tap)
        self._note([*earlier, *records])
        self.outputs.commit(self.nonfinite or set())
        return records

    def _statistics(self, layer: _Layer, states: HiddenStates, calls: Sequence[Sequence[Call]]) -> tuple[dict[str, Statistics | None], Tap]:
        """What is known of the input of each matrix, and the tap that has seen it.

        Of an expert that is the tokens that are routed to it; all tokens, if those are too few, or if the Hessians of so many inputs
        would be too large: then what reads the same input shares one.
        """
        wanted = {name: layer.linear(name) for name in layer.weights if self.method.scaling or is_calibrated(self.outputs.step_of(name))}
        linears = {linear: layer.weights[name].shape[1] for name, linear in wanted.items()}
        of_experts = [num_columns for linear, num_columns in linears.items() if linear.expert is not None]
        every_expert = self.method.uses_hessians and shows_every_expert(of_experts)
        statistics, tap = self._tapped(layer, states, calls, linears.keys(), every_expert=every_expert)
        starved = [] if every_expert else [name for name in wanted if _starves(tap, layer.sites[name])]
        if starved:
            LOGGER.info(
                "layer %d: %d weights of experts get fewer than %d tokens: all are shown to them", layer.index, len(starved), FEW_TOKENS
            )
            statistics.update(dict.fromkeys(starved))  # not to have both
            everything, _ = self._tapped(layer, states, calls, {wanted[name] for name in starved}, every_expert=True)
            statistics.update({name: everything[name] for name in starved})
        return statistics, tap

    def _tapped(
        self,
        layer: _Layer,
        states: HiddenStates,
        calls: Sequence[Sequence[Call]],
        linears: Set[Linear],
        *,
        every_expert: bool,
    ) -> tuple[dict[str, Statistics | None], Tap]:
        measures = any(self._needs_data(name) for name in layer.weights)
        collector = Collector(hessians=self.method.uses_hessians, magnitudes=measures or bool(self.method.scaling))

        def add(linear: Linear, input_TK: Tensor) -> None:
            if linear in linears:
                collector.add(linear, input_TK)

        cache = any(isinstance(address.step, Measure) for address in self._steps_of(tuple(layer.sites)))
        with Tap(layer.module, add, every_expert=every_expert, cache=cache) as tap:
            self._pass(layer, states, calls)
        collector.finish()
        return {name: collector.of(layer.linear(name)) for name in layer.weights}, tap

    def _needs_data(self, name: str) -> bool:
        step = self.outputs.step_of(name)
        return isinstance(step, Encode) and step.scheme.needs_data

    # --- scales -----------------------------------------------------------------------------------------------------

    def _move_scales(
        self, layer: _Layer, tap: Tap, statistics: Mapping[str, Statistics | None], hidden_BTH: Tensor, call: Call
    ) -> list[Record]:
        """Move scales between what gives an input and what reads it, wherever that helps; write what is then no longer a copy."""
        expected_BTH = self.skeleton.run(layer.module, hidden_BTH, call)
        records, changed = [], set[str]()
        for pair, offset in self._pairs(layer, tap):
            problem = self._problem(pair, layer.sites) or self._does_not_hold(layer, pair, offset, hidden_BTH, call, expected_BTH)
            scaling = None if problem else self._scaling(layer, pair, statistics)
            if scaling is None or not scaling.helps:
                records.append(Record(layer.index, pair.title, scheme=self.method.scaling, fallback=problem or "does not help"))
                continue
            seen = _most(statistics[name] for name in pair.readers)
            assert seen is not None
            scale_K = move_scale(pair, scaling.scale_K, layer.weights, layer.vectors, offset=offset)
            for own in {id(own): own for name in pair.readers if (own := statistics[name]) is not None}.values():
                own.divide(scale_K)
            changed |= pair.tensors & layer.sites.keys()
            self._put(layer, pair)
            self._view(layer, pair.tensors & layer.weights.keys())
            size = sum(
                _size([layer.weights[name]], own)
                for name in pair.readers
                if (own := statistics[name]) is not None and is_calibrated(self.outputs.step_of(name))
            )
            records.append(
                Record(
                    layer.index,
                    pair.title,
                    scheme=self.method.scaling,
                    tokens=seen.num_tokens,
                    error_before=scaling.error_before / size,
                    error_after=scaling.error_after / size,
                    rescaled=tuple(sorted(pair.tensors & layer.sites.keys())),
                )
            )
        for name in changed:
            address = self.outputs.address_of[name]
            if isinstance(address.step, Copy):
                tensor = layer.weights[name].to(TORCH_DTYPES[self.weights[name].dtype]) if name in layer.weights else layer.vectors[name]
                self.outputs.write(address, [(address.step.output, tensor)])
        return records

    def _pairs(self, layer: _Layer, tap: Tap) -> Iterator[tuple[Pair, float]]:
        names_at = defaultdict(list)
        for name, site in layer.sites.items():
            names_at[site.parameter].append(name)
        for norm, readers in tap.norm_readers.items():
            names = tuple(name for reader in readers for name in names_at[reader] if name in layer.weights)
            yield Pair(names_at[norm][0], names, is_norm=True), tap.norm_offset(norm)
        for pair in linear_pairs({name: (weight.shape[0], weight.shape[1]) for name, weight in layer.weights.items()}):
            yield pair, 0.0

    def _problem(self, pair: Pair, sites: Mapping[str, Site]) -> str:
        """Why the scale of a pair cannot be moved, as far as the plan tells; or ""."""
        steps = {name: self.outputs.step_of(name) for name in pair.tensors & sites.keys()}
        if not any(is_calibrated(steps[name]) for name in pair.readers):
            return "nothing that reads it is quantized"
        fixed = next((name for name, step in steps.items() if not (is_calibrated(step) or isinstance(step, Copy))), None)
        if fixed is None:
            return ""
        return f"{fixed} {'is a part of what is copied' if steps[fixed] is None else 'keeps the codes that the source has'}"

    def _does_not_hold(self, layer: _Layer, pair: Pair, offset: float, hidden_BTH: Tensor, call: Call, expected_BTH: Tensor) -> str:
        """Why not: with a scale moved the layer gives something else. Or ""."""
        before = replace(layer, weights={name: layer.weights[name].clone() for name in pair.tensors & layer.weights.keys()})
        moved = replace(layer, weights=dict(layer.weights), vectors=dict(layer.vectors))
        scale_K = torch.ones(layer.weights[pair.readers[0]].shape[1], device=self.device)
        scale_K[::2], scale_K[1::3] = 2.0, 0.5
        move_scale(pair, scale_K, moved.weights, moved.vectors, offset=offset)
        self._put(moved, pair)
        moved_BTH = self.skeleton.run(layer.module, hidden_BTH, call)
        self._put(before, pair)
        difference, size = (moved_BTH - expected_BTH).norm(), (expected_BTH - hidden_BTH).norm()  # without what goes past the layer
        return "" if difference <= HOLDS * size else "the layer is not the same with a scale moved"

    def _put(self, layer: _Layer, pair: Pair) -> None:
        """Put the tensors of a pair into the module."""
        for name in pair.tensors & layer.sites.keys():
            self.skeleton.set_weight(layer.module, layer.sites[name], layer.read(name))

    def _scaling(self, layer: _Layer, pair: Pair, statistics: Mapping[str, Statistics | None]) -> Scaling | None:
        seen = _most(statistics[name] for name in pair.readers)
        if seen is None:
            return None
        readers, group_size, is_exact = [], 1, pair.bias in layer.vectors
        searches = self.method.scaling == "awq"  # SmoothQuant asks for the largest weights, in whatever rows they are
        for name in pair.readers:
            step, own = self.outputs.step_of(name), statistics[name]
            if own is None or not is_calibrated(step):
                continue
            weight_NK, unit = layer.weights[name], step.scheme.unit(layer.weights[name].shape[1])
            rows = spaced_rows(len(weight_NK), SEARCHED_ROWS if searches and unit[0] == 1 else len(weight_NK))
            round_weight = partial(_rounded, scheme=step.scheme, dtype=self._dtype(name), kernels=self.kernels)
            readers.append(Reader(weight_NK[rows], own, round_weight, _steps(step.scheme.activations, weight_NK.shape[1]), rows.step))
            group_size = unit[1]
        if not pair.is_norm:
            is_exact = is_exact or not is_calibrated(self.outputs.step_of(pair.giver))
        if searches:
            return search_scale(readers, seen, group_size=group_size, powers_of_two=is_exact)
        return smooth_scale(readers, seen, strength=SMOOTHING, powers_of_two=is_exact)

    # --- solving ----------------------------------------------------------------------------------------------------

    def _solve(self, layer: _Layer, names: Sequence[str], statistics: Mapping[str, Statistics | None], tap: Tap) -> list[Record]:
        addresses = [address for address in self._steps_of(names) if isinstance(address.step, Encode)]
        amax = self._input_amax(layer, statistics) if any(_scheme(address).needs_data for address in addresses) else {}
        jobs = [job for address in addresses for job in self._jobs(address, layer, statistics, amax)]
        stored: defaultdict[Address, list[Any]] = defaultdict(list)
        records = []
        for group in _stacks(jobs):
            self._say(group[0].member.weight.name)
            solution, errors = self._solution(group)
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
            self.outputs.write(address, tensors)
        return records

    def _store_cache_scales(self, names: Sequence[str], tap: Tap) -> None:
        """amax / 448 of keys and of values, a tensor each."""
        for address in self._steps_of(names):
            step = address.step
            if not isinstance(step, Measure):
                continue
            amax = tap.cache_amax
            if amax is None or not all(0 < largest < math.inf for largest in amax):
                found = "were not seen: the model computes attention by itself" if amax is None else f"have the largest magnitudes {amax}"
                raise RequestError(f"{step.module}: its keys and values {found}; leave out --kv-cache")
            scales = [round_scale(torch.tensor([largest / FP8_MAX]), TORCH_DTYPES[step.k_scale.dtype]) for largest in amax]
            self.outputs.write(address, list(zip(step.outputs, scales, strict=True)))

    def _input_amax(self, layer: _Layer, statistics: Mapping[str, Statistics | None]) -> dict[str, float]:
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
        self, address: Address, layer: _Layer, statistics: Mapping[str, Statistics | None], input_amax: Mapping[str, float]
    ) -> list[_Job]:
        step = _encode(address)
        members = [(member, layer.weights[member.weight.name]) for member in step.members]
        shared = None
        if step.scheme.shares_amax:
            amax = max(float(weight_NK.abs().amax()) for _, weight_NK in members)
            dtype = self._dtype(step.members[0].weight.name)
            shared = step.scheme.share(torch.tensor([amax], device=self.device), dtype)
        inputs = max(input_amax[member.weight.name] for member, _ in members) if step.scheme.needs_data else None
        return [_Job(address, member, weight_NK, statistics[member.weight.name], shared, inputs) for member, weight_NK in members]

    def _solution(self, group: Sequence[_Job]) -> tuple[Solution, list[tuple[float, float]]]:
        """Codes for weights with one input, stacked, and the errors of each before and after."""
        scheme, dtype, seen = _scheme(group[0].address), self._dtype(group[0].member.weight.name), group[0].statistics
        weight_NK = torch.cat([job.weight_NK for job in group]) if len(group) > 1 else group[0].weight_NK
        known: Any = {"shared": group[0].shared, "dtype": dtype, "kernels": self.kernels}
        if seen is None or not self.method.uses_hessians:
            solution = round_to_nearest(weight_NK, scheme, **known)
            return solution._replace(fallback="" if seen else "no token reached it"), [(0.0, 0.0)] * len(group)
        solution = self._solved(weight_NK, seen.hessian_KK, scheme, known)
        rows = [len(job.weight_NK) for job in group]
        before_N, after_N = torch.split(solution.error_before_N, rows), torch.split(solution.error_after_N, rows)
        sizes = [_size([job.weight_NK], seen) for job in group]
        return solution, [
            (float(before.sum()) / size, float(after.sum()) / size) for before, after, size in zip(before_N, after_N, sizes, strict=True)
        ]

    def _solved(self, weight_NK: Tensor, hessian_KK: Tensor, scheme: Scheme, known: Mapping[str, Any]) -> Solution:
        """By the solver of the method; with clipped bounds, if it clips and that helps."""

        def solve(bounds_BRC: Tensor | None) -> Solution:
            if self.method.solver == "gptq":
                return gptq(weight_NK, hessian_KK, scheme, bounds_BRC=bounds_BRC, **known)
            return round_to_nearest(weight_NK, scheme, hessian_KK=hessian_KK, bounds_BRC=bounds_BRC, **known)

        if not (self.method.clips and may_clip(scheme, weight_NK.shape[1])):
            return solve(None)
        bounds_BRC = scheme.observe(weight_NK.to(known["dtype"]), kernels=self.kernels)
        plain = round_to_nearest(weight_NK, scheme, hessian_KK=hessian_KK, bounds_BRC=bounds_BRC, **known)
        solution = solve(clip_bounds(weight_NK, bounds_BRC, hessian_KK, scheme, **known))
        if solution.error_after < plain.error_after:
            return solution._replace(error_before_N=plain.error_before_N)
        return plain._replace(damping=solution.damping, fallback=solution.fallback)

    def _dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self.weights[name].dtype]

    # --- telling ----------------------------------------------------------------------------------------------------

    def _earlier_records(self, finished: Sequence[bool]) -> list[Record]:
        """What earlier runs of this job have noted of the layers that they finished."""
        if not self._records_file.is_file():
            return []
        entries = json.loads(self._records_file.read_bytes())
        return [Record(**entry | {"rescaled": tuple(entry["rescaled"])}) for entry in entries if finished[entry["layer"]]]

    def _note(self, records: Sequence[Record]) -> None:
        """Before the journal says that a layer is finished, so that none of a finished layer is missing."""
        write_file(self._records_file, json.dumps([asdict(record) for record in records]).encode(), work=self.work)

    def _require_few_fallbacks(self, records: Sequence[Record], num_weights: int) -> None:
        fallen = [record for record in records if record.fallback and not record.is_pair]
        if len(fallen) > self.max_fallback * num_weights:
            raise RequestError(
                f"{len(fallen)} of {num_weights} weights could not be calibrated, the last being {fallen[-1].name}: {fallen[-1].fallback}; "
                "give more --samples, or a higher --max-fallback"
            )

    def _say(self, where: str) -> None:
        if self.on_progress is not None:
            self.on_progress(where)

    def _tell(self, index: int, records: Sequence[Record], seconds: Sequence[float], *, num_left: int) -> None:
        """What became of a layer; `seconds` are those of all so far."""
        errors: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for record in records:
            if not record.is_pair:
                name = fold(record.name).partition(".*.")[2].removesuffix(".weight")
                errors[name].append((record.error_before, record.error_after))
        means = {name: tuple(sum(column) / len(column) for column in zip(*several, strict=True)) for name, several in errors.items()}
        left = num_left * sum(seconds) / len(seconds)
        said = ", ".join(f"{name} {before:.2g} -> {after:.2g}" for name, (before, after) in means.items() if before)
        LOGGER.info(
            "layer %d of %d: %s, %.1f s, %.0f s left for layers",
            index + 1,
            self.skeleton.num_layers,
            f"error of {said}" if said else "inputs measured",
            seconds[-1],
            left,
            extra={
                "event": "layer",
                "figures": {"layer": index, "errors": means, "seconds": round(seconds[-1], 3), "seconds_left": round(left, 1)},
            },
        )
        self._say(f"layer {index + 1} of {self.skeleton.num_layers}")


# --- pieces ----------------------------------------------------------------------------------------------------------


def _read_ahead(read: Callable[[str], Tensor], names: Iterable[str], threads: ThreadPoolExecutor, num_ahead: int) -> Iterator[Tensor]:
    """The tensors with these names; `num_ahead` of them, and no more, are being read before they are asked for."""
    waiting: deque[Future[Tensor]] = deque()
    for name in names:
        waiting.append(threads.submit(read, name))
        if len(waiting) > num_ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; `Tensor.isfinite` makes several passes, which takes 15 times as long."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _encode(address: Address) -> Encode:
    assert isinstance(address.step, Encode)
    return address.step


def _scheme(address: Address) -> Scheme:
    return _encode(address).scheme


def _most(several: Iterable[Statistics | None]) -> Statistics | None:
    """Those with the most tokens."""
    return max((each for each in several if each is not None), key=lambda each: each.num_tokens, default=None)


def _starves(tap: Tap, site: Site) -> bool:
    routed = tap.routed_tokens(site)
    return routed is not None and routed < FEW_TOKENS


def _batches(samples: Sequence[Tensor], *, max_tokens: int) -> Iterator[Tensor]:
    """Samples of one length together, [B, T], in their order."""
    batch: list[Tensor] = []
    for sample in samples:
        if batch and (len(sample) != len(batch[0]) or (len(batch) + 1) * len(sample) > max_tokens):
            yield torch.stack(batch)
            batch = []
        batch.append(sample)
    if batch:
        yield torch.stack(batch)


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


def _size(weights: Sequence[Tensor], statistics: Statistics) -> float:
    """The sum of squares of what these weights give, from the rows of which errors are measured."""
    total = 0.0
    for weight_NK in weights:
        rows = spaced_rows(len(weight_NK))
        total += float(hessian_error(weight_NK[rows], statistics.hessian_KK).sum()) * rows.step
    return max(total, TINY)
