"""Steps of a plan that the calibrated mode finishes itself, layer by layer, before the engine streams the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeGuard

from streamquant.checkpoint.header import TensorSpec
from streamquant.checkpoint.journal import Journal
from streamquant.checkpoint.writer import ShardWriter, StepWriter
from streamquant.lazy import torch
from streamquant.plan import Copy, Encode, Measure, Plan, Shard, Step
from streamquant.schemes.plain import Plain

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Address:
    """Where in a plan a step is; there is one for each."""

    shard: Shard
    number: int  # of the step in it

    @property
    def step(self) -> Step:
        """The step."""
        return self.shard.steps[self.number]


class LayerOutputs:
    """The shards that layers are written into, under their temporary names.

    To the engine what is written here looks like what an earlier run has finished.
    """

    def __init__(self, plan: Plan, *, work: Path, journal: Journal):
        self._work, self._journal = work, journal
        self._writers: dict[str, ShardWriter] = {}
        self._pending: dict[str, dict[Address, StepWriter]] = {}
        self.finished_bytes = 0  # of the source, of steps that this run has finished
        self.address_of: dict[str, Address] = {}  # by the name of a weight or tensor of the source, or of a module that is measured
        for shard in plan.shards:
            for index, step in enumerate(shard.steps):
                self.address_of.update(dict.fromkeys(_names(step), Address(shard, index)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for writer in self._writers.values():
            writer.close()

    @property
    def addresses(self) -> list[Address]:
        """Those of all steps, in the order of the plan."""
        return list(dict.fromkeys(self.address_of.values()))

    def step_of(self, name: str) -> Step | None:
        """What happens to a weight or tensor of the source; None for an expert whose stack is copied whole."""
        address = self.address_of.get(name)
        return None if address is None else address.step

    def is_finished(self, address: Address) -> bool:
        """Whether this run, or an earlier one, has the step on the disk."""
        return address.shard.file in self._journal.shards or address.number in self._writer(address.shard).finished

    def write(self, address: Address, tensors: Sequence[tuple[TensorSpec, Tensor]]) -> None:
        """Write all outputs of a step."""
        output = self._output(address)
        for spec, tensor in tensors:
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            assert len(content) == spec.num_bytes, f"{spec.name}: {len(content)} bytes for {spec.num_bytes}"
            output.write(spec.start, content.numpy().data)

    def commit(self, nonfinite: set[str]) -> None:
        """Flush what was written, and note that it is finished.

        Shards without a step that quantizes are noted first: when the steps that tell that a layer is finished are noted, all of it is.
        """
        quantizes = {file: any(not isinstance(address.step, Copy) for address in outputs) for file, outputs in self._pending.items()}
        for file in sorted(self._pending, key=lambda file: quantizes[file]):
            writer, outputs = self._writers[file], self._pending[file]
            writer.flush()
            steps = {address.number: output.checksum for address, output in outputs.items()}
            writer.finished.update(steps)
            self._journal.record_steps(file, steps, nonfinite)
            self.finished_bytes += sum(address.step.source_bytes for address in outputs)
        self._pending.clear()

    def _output(self, address: Address) -> StepWriter:
        self._writer(address.shard)
        return self._pending.setdefault(address.shard.file, {}).setdefault(address, StepWriter(self._writers[address.shard.file]))

    def _writer(self, shard: Shard) -> ShardWriter:
        if shard.file not in self._writers:
            part = self._work / f"{shard.file}.part"
            finished = self._journal.steps[shard.file]
            self._writers[shard.file] = ShardWriter(part, header=shard.header, num_bytes=shard.num_bytes, finished=finished)
        return self._writers[shard.file]


def _names(step: Step) -> list[str]:
    if isinstance(step, Copy):
        return [step.source.name]
    return [step.module] if isinstance(step, Measure) else [member.weight.name for member in step.members]


def is_calibrated(step: Step | None) -> TypeGuard[Encode]:
    """Whether a step quantizes plain numbers."""
    return isinstance(step, Encode) and not step.keeps_codes and not isinstance(step.scheme, Plain)
