"""The calibrated mode as `convert` uses it: a tokenizer, data and a skeleton from the source, then layer by layer."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamquant.calibrate import heap
from streamquant.calibrate.budget import Needs, hidden_budget, hidden_bytes, needs_of
from streamquant.calibrate.data import Calibration, load_calibration, load_tokenizer
from streamquant.calibrate.layer import Common, Record
from streamquant.calibrate.layer_outputs import LayerOutputs, is_calibrated
from streamquant.calibrate.layers import LayerCalibration
from streamquant.calibrate.method import CalibrationWish
from streamquant.calibrate.skeleton import Skeleton, build_skeleton, shapes_of
from streamquant.checkpoint.journal import Journal
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.source import Source
from streamquant.errors import RequestError
from streamquant.inputs import Inventory, Stack, Weight
from streamquant.lazy import torch
from streamquant.memory import container_for
from streamquant.plan import Plan, Shard
from streamquant.schemes.kernels import Kernels
from streamquant.sizes import format_bytes
from streamquant.stream import OnProgress, Progress, bytes_to_do

CONFIG_NAME = "config.json"
LOGGER = logging.getLogger("streamquant")
MAX_FILE_BYTES = 256 << 20  # of a tokenizer
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # without these a processor takes longer for bfloat16 than for float32


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibration did."""

    method: str
    data: str
    samples: int
    tokens: int
    records: tuple[Record, ...]

    @property
    def fallbacks(self) -> list[Record]:
        """The weights that were left to plain rounding."""
        return [record for record in self.records if record.fallback and not record.is_pair]

    @property
    def rescaled(self) -> list[str]:
        """The tensors that are not those of the source times a number."""
        return sorted({name for record in self.records for name in record.rescaled})

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        weights = [asdict(record) for record in self.records if not record.is_pair]
        pairs = [asdict(record) for record in self.records if record.is_pair]
        return {
            "method": self.method,
            "data": self.data,
            "samples": self.samples,
            "tokens": self.tokens,
            "weights": weights,
            "pairs": pairs,
        }


@contextmanager
def model_folder(plan: Plan, source: Source) -> Iterator[Path]:
    """A local folder with the config and the tokenizer of the source."""
    if plan.checkpoint.layout.config_name != CONFIG_NAME or plan.checkpoint.config is None:
        raise RequestError(f"{plan.checkpoint.source} has no {CONFIG_NAME}, and calibration runs the model that it describes")
    if isinstance(source, LocalSource):
        yield source.folder
        return
    sizes = source.sizes()
    with tempfile.TemporaryDirectory(prefix="streamquant-") as folder:
        for file in (CONFIG_NAME, *plan.checkpoint.side_files):
            if sizes[file] <= MAX_FILE_BYTES:
                content = bytearray(sizes[file])
                source.read(file, 0, memoryview(content))
                target = Path(folder) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a calibration needs, known before anything is written."""

    wish: CalibrationWish
    plan: Plan
    weights: Mapping[str, Weight]  # what the checkpoint has as matrices, by name
    source: Source
    skeleton: Skeleton
    data: Calibration
    device: torch.device
    needs: Needs  # besides the hidden states
    max_hidden_bytes: int  # of these in memory

    @property
    def job(self) -> dict[str, Any]:
        """What the output depends on."""
        return self.wish.to_json() | {"tokens": self.data.digest}

    def calibrate(
        self,
        todo: Sequence[Shard],
        *,
        work: Path,
        journal: Journal,
        kernels: Kernels,
        allow_nonfinite: bool,
        on_progress: OnProgress | None,
    ) -> CalibrationReport:
        """Finish everything in the decoder layers that the method changes. `todo`: the shards that no earlier run has finished."""
        heap.map_large_blocks()
        heap.keep_few_kernels()
        self._tell()
        total_bytes = bytes_to_do(todo, journal)
        nonfinite: set[str] | None = set() if allow_nonfinite else None
        with torch.inference_mode(), LayerOutputs(self.plan, work=work, journal=journal) as outputs:
            common = Common(
                weights=self.weights,
                skeleton=self.skeleton,
                method=self.wish.method,
                outputs=outputs,
                device=self.device,
                kernels=kernels,
            )
            layers = LayerCalibration(
                plan=self.plan,
                common=common,
                source=self.source,
                calibration=self.data,
                max_fallback=self.wish.max_fallback,
                work=work,
                compute_dtype=find_compute_dtype(self.wish.compute_dtype, self.device),
                nonfinite=nonfinite,
                on_progress=on_progress and (lambda where: on_progress(Progress(outputs.finished_bytes, total_bytes, where))),
            )
            records = layers.run(self.max_hidden_bytes)
        return CalibrationReport(self.wish.name, self.data.title, len(self.data.samples), self.data.num_tokens, tuple(records))

    def _tell(self) -> None:
        hidden = hidden_bytes(self.skeleton, self.data.num_tokens)
        where = "in memory" if hidden <= self.max_hidden_bytes else "in a file"
        figures = {f"predicted_{name}_bytes": size for name, size in self.needs._asdict().items()}
        LOGGER.info(
            "calibrating %d layers with %d tokens of %s; a layer takes up to %s of memory (%s), hidden states take %s %s",
            self.skeleton.num_layers,
            self.data.num_tokens,
            self.data.title,
            format_bytes(self.needs.of_layer),
            self.needs,
            format_bytes(hidden),
            where,
            extra={"event": "calibrate", "figures": figures | {"hidden_states_bytes": hidden, "hidden_states": where}},
        )


def prepare(
    wish: CalibrationWish,
    plan: Plan,
    inventory: Inventory,
    source: Source,
    *,
    device: torch.device,
    max_hidden_bytes: int,
    gpu_bytes: int | None = None,
) -> Preparation:
    """Read config, tokenizer and data, build the model without its weights, and tell what memory it will take.

    `gpu_bytes`: what may be used of `device`, if that is a GPU. Raises RequestError for what cannot be calibrated, or not here.
    """
    biases = [bias for item in inventory.items if isinstance(item, Stack) for bias in item.biases]
    weights = {weight.name: weight for weight in (*inventory.weights, *biases)}
    with model_folder(plan, source) as folder:
        data = load_calibration(wish.options, load_tokenizer(folder))
        skeleton = build_skeleton(folder, shapes_of(inventory), device=device)
    heap.give_back()
    outside = [weights[name].decoded_bytes if name in weights else plan.checkpoint.tensors[name].num_bytes for name in skeleton.outer_names]
    needs = needs_of(
        skeleton,
        weights,
        wish.method,
        list(map(len, data.samples)),
        quantized={member.weight.name for step in plan.steps if is_calibrated(step) for member in step.members},
        outside=sum(outside),
        num_ahead=source.num_connections,
    )
    container = container_for(plan, devices=[device])
    max_hidden_bytes = hidden_budget(needs, max_bytes=max_hidden_bytes, container=container, gpu_bytes=gpu_bytes)
    return Preparation(wish, plan, weights, source, skeleton, data, device, needs, max_hidden_bytes)


def find_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that one of COMPUTE_DTYPES means: with "auto" bfloat16 where the device is faster with it."""
    if name == "auto":
        if device.type == "cpu":
            capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # not in older versions of torch
            is_faster = any(capabilities.get(instructions) for instructions in BF16_INSTRUCTIONS)
        else:
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if is_faster else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
