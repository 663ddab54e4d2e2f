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
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamquant.calibrate import heap
from streamquant.calibrate.budget import keeps_inputs, shows_every_expert, tokens_of_batch, widest_of
from streamquant.calibrate.data import Calibration
from streamquant.calibrate.hidden import HiddenStates
from streamquant.calibrate.layer import Common, Layer, Record
from streamquant.calibrate.layer_outputs import Address, is_calibrated
from streamquant.calibrate.scales import move_scales
from streamquant.calibrate.skeleton import Call, Site
from streamquant.calibrate.solve import solve_weights, store_cache_scales
from streamquant.calibrate.statistics import Collector, Statistics
from streamquant.calibrate.tap import Linear, Tap
from streamquant.checkpoint.source import Source
from streamquant.checkpoint.writer import write_file
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs import read_tensor
from streamquant.lazy import torch
from streamquant.names import fold
from streamquant.plan import Encode, Measure, Plan

if TYPE_CHECKING:
    from torch import Tensor

FEW_TOKENS = 128  # routed to an expert: too few for a Hessian
LOGGER = logging.getLogger("streamquant")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCalibration:
    """All layers, one after the other."""

    plan: Plan
    common: Common
    source: Source
    calibration: Calibration
    max_fallback: float  # the part of the weights that may be left to plain rounding
    work: Path
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
        layers = [list(self.common.skeleton.sites(index)) for index in range(self.common.skeleton.num_layers)]
        addresses = [self._steps_of(names) for names in layers]
        self._require_reached({address for of_layer in addresses for address in of_layer})
        finished = [all(map(self.common.outputs.is_finished, of_layer)) for of_layer in addresses]
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
            self.common.skeleton.drop_layer(index)
            states.advance()
            heap.give_back()
        return records

    def _require_reached(self, reached: Set[Address]) -> None:
        """What takes data is in a layer."""
        for step in (address.step for address in self.common.outputs.addresses if address not in reached):
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
        places = [*filter(self.common.is_matrix, names), *modules]
        addresses = dict.fromkeys(self.common.outputs.address_of[place] for place in places if place in self.common.outputs.address_of)
        return [address for address in addresses if is_calibrated(address.step) or isinstance(address.step, Measure)]

    def _read(self, name: str) -> Tensor:
        """A tensor of the checkpoint: float32 if it is a matrix."""
        if name not in self.common.weights:
            spec = self.plan.checkpoint.tensors[name]
            return read_tensor(self.source, spec).view(spec.shape)
        weight = self.common.weights[name]
        weight_NK = weight.decode(weight.read(self.source, 0, weight.shape[0])).float()
        if _is_finite(weight_NK):
            return weight_NK
        if self.nonfinite is None:
            raise CheckpointError(f"{name} holds NaN or infinite weights; --allow-nonfinite stores them as zeros")
        self.nonfinite.add(name)
        return weight_NK.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _read_outer(self, name: str) -> Tensor:
        """A tensor outside of the layers, as stored if it is plain: an embedding in float32 may be larger than a layer."""
        weight = self.common.weights.get(name)
        if weight is None or weight.is_plain:
            spec = self.plan.checkpoint.tensors[name]
            return read_tensor(self.source, spec).view(spec.shape)
        return weight.decode(weight.read(self.source, 0, weight.shape[0]))

    def _load(self, index: int, names: Sequence[str]) -> Layer:
        layer = Layer(index, self.common.skeleton.layer(index), self.common.skeleton.sites(index))
        num_ahead = self.source.num_connections
        with ThreadPoolExecutor(max(num_ahead, 1)) as threads:
            tensors = _read_ahead(self._read, names, threads, num_ahead) if num_ahead else map(self._read, names)

            def load(name: str) -> Tensor:
                tensor = next(tensors)  # in the order of the names
                if not self.common.is_matrix(name):
                    layer.vectors[name] = tensor.to(self.common.device)
                return tensor

            self.common.skeleton.load_layer(index, load)
        self.common.view(layer, filter(self.common.is_matrix, names))
        return layer

    # --- running ----------------------------------------------------------------------------------------------------

    def _first_states(self, max_bytes: int) -> tuple[HiddenStates, list[list[Call]]]:
        """What enters the first layer, and the calls of all layers, for each batch of samples of one length."""
        self.common.skeleton.load_outer(self._read_outer)
        widest = widest_of([self.common.weights[name] for name in self.common.skeleton.sites(0) if self.common.is_matrix(name)])
        batches = list(_batches(self.calibration.samples, max_tokens=tokens_of_batch(widest)))
        hidden_size = self.common.skeleton.hidden_size
        shapes = [(*batch.shape, hidden_size) for batch in batches]
        file = self.work / "hidden-states.part"
        states = HiddenStates(
            shapes, dtype=self.common.skeleton.dtype, max_bytes=max_bytes, file=file, twice=keeps_inputs(self.common.skeleton)
        )
        calls = []
        for number, batch_BT in enumerate(batches):
            hidden_BTH, of_layers = self.common.skeleton.record(batch_BT.to(self.common.device))
            states.put(number, hidden_BTH)
            calls.append(of_layers)
        states.advance()
        self.common.skeleton.drop_outer()
        return states, calls

    def _pass(self, layer: Layer, states: HiddenStates, calls: Sequence[Sequence[Call]]) -> None:
        """Run all batches through a layer, for what it gives."""
        lower = self.compute_dtype != torch.float32
        for number, of_layers in enumerate(calls):
            self._say(f"layer {layer.index + 1} of {self.common.skeleton.num_layers}, batch {number + 1} of {len(calls)}")
            with torch.autocast(self.common.device.type, dtype=self.compute_dtype, enabled=lower, cache_enabled=False):
                hidden_BTH = self.common.skeleton.run(layer.module, states.get(number, self.common.device), of_layers[layer.index])
            if not _is_finite(hidden_BTH):
                raise CheckpointError(f"layer {layer.index} gives numbers that are not finite for the calibration data")
            states.put(number, hidden_BTH)

    def _layer(
        self, index: int, names: Sequence[str], states: HiddenStates, calls: Sequence[Sequence[Call]], earlier: Sequence[Record]
    ) -> list[Record]:
        """Quantize a layer."""
        layer = self._load(index, names)
        first_BTH = states.get(0, self.common.device).clone() if self.common.method.scaling else None  # the pass may overwrite it
        statistics, tap = self._statistics(layer, states, calls)
        records = []
        if first_BTH is not None:
            records += move_scales(self.common, layer, tap, statistics, first_BTH, calls[0][index])
        addresses = self._steps_of(names)
        encoded = [address for address in addresses if isinstance(address.step, Encode)]
        records += solve_weights(self.common, layer, encoded, statistics, tap, self._say)
        store_cache_scales(self.common, addresses, tap)
        self._note([*earlier, *records])
        self.common.outputs.commit(self.nonfinite or set())
        return records

    def _statistics(self, layer: Layer, states: HiddenStates, calls: Sequence[Sequence[Call]]) -> tuple[dict[str, Statistics | None], Tap]:
        """What is known of the input of each matrix, and the tap that has seen it.

        Of an expert that is the tokens that are routed to it; all tokens, if those are too few, or if the Hessians of so many inputs
        would be too large: then what reads the same input shares one.
        """
        wanted = {
            name: layer.linear(name)
            for name in layer.weights
            if self.common.method.scaling or is_calibrated(self.common.outputs.step_of(name))
        }
        linears = {linear: layer.weights[name].shape[1] for name, linear in wanted.items()}
        of_experts = [num_columns for linear, num_columns in linears.items() if linear.expert is not None]
        every_expert = self.common.method.uses_hessians and shows_every_expert(of_experts)
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
        layer: Layer,
        states: HiddenStates,
        calls: Sequence[Sequence[Call]],
        linears: Set[Linear],
        *,
        every_expert: bool,
    ) -> tuple[dict[str, Statistics | None], Tap]:
        measures = any(self._needs_data(name) for name in layer.weights)
        collector = Collector(hessians=self.common.method.uses_hessians, magnitudes=measures or bool(self.common.method.scaling))

        def add(linear: Linear, input_TK: Tensor) -> None:
            if linear in linears:
                collector.add(linear, input_TK)

        cache = any(isinstance(address.step, Measure) for address in self._steps_of(tuple(layer.sites)))
        with Tap(layer.module, add, every_expert=every_expert, cache=cache) as tap:
            self._pass(layer, states, calls)
        collector.finish()
        return {name: collector.of(layer.linear(name)) for name in layer.weights}, tap

    def _needs_data(self, name: str) -> bool:
        step = self.common.outputs.step_of(name)
        return isinstance(step, Encode) and step.scheme.needs_data

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
            self.common.skeleton.num_layers,
            f"error of {said}" if said else "inputs measured",
            seconds[-1],
            left,
            extra={
                "event": "layer",
                "figures": {"layer": index, "errors": means, "seconds": round(seconds[-1], 3), "seconds_left": round(left, 1)},
            },
        )
        self._say(f"layer {index + 1} of {self.common.skeleton.num_layers}")


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
