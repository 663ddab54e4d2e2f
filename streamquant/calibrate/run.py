"""The calibrated mode as `convert` uses it: a tokenizer, data and a skeleton from the source, then layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamquant.calibrate import heap
from streamquant.calibrate.data import Calibration, load_calibration, load_tokenizer
from streamquant.calibrate.layer_outputs import LayerOutputs
from streamquant.calibrate.layers import LayerCalibration, Record
from streamquant.calibrate.method import CalibrationWish
from streamquant.calibrate.skeleton import build_skeleton, shapes_of
from streamquant.checkpoint.journal import Journal
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.source import Source
from streamquant.errors import RequestError
from streamquant.inputs import Inventory, Stack
from streamquant.lazy import torch
from streamquant.plan import Plan, Shard
from streamquant.schemes.kernels import Kernels
from streamquant.stream import OnProgress, Progress, bytes_to_do

CONFIG_NAME = "config.json"
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
    inventory: Inventory
    source: Source
    folder: Path  # with the config of the model
    data: Calibration

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
        max_hidden_bytes: int,
        device: torch.device,
        kernels: Kernels,
        allow_nonfinite: bool,
        on_progress: OnProgress | None,
    ) -> CalibrationReport:
        """Finish everything in the decoder layers that the method changes. `todo`: the shards that no earlier run has finished."""
        heap.map_large_blocks()
        heap.keep_few_kernels()
        total_bytes = bytes_to_do(todo, journal)
        nonfinite: set[str] | None = set() if allow_nonfinite else None
        biases = [bias for item in self.inventory.items if isinstance(item, Stack) for bias in item.biases]
        with torch.inference_mode(), LayerOutputs(self.plan, work=work, journal=journal) as outputs:
            layers = LayerCalibration(
                plan=self.plan,
                weights={weight.name: weight for weight in (*self.inventory.weights, *biases)},
                source=self.source,
                skeleton=build_skeleton(self.folder, shapes_of(self.inventory), device=device),
                calibration=self.data,
                method=self.wish.method,
                max_fallback=self.wish.max_fallback,
                outputs=outputs,
                work=work,
                device=device,
                kernels=kernels,
                compute_dtype=find_compute_dtype(self.wish.compute_dtype, device),
                nonfinite=nonfinite,
                on_progress=on_progress and (lambda where: on_progress(Progress(outputs.finished_bytes, total_bytes, where))),
            )
            records = layers.run(max_hidden_bytes)
        return CalibrationReport(self.wish.name, self.data.title, len(self.data.samples), self.data.num_tokens, tuple(records))


@contextmanager
def prepare(wish: CalibrationWish, plan: Plan, inventory: Inventory, source: Source) -> Iterator[Preparation]:
    """Read config, tokenizer and data."""
    with model_folder(plan, source) as folder:
        yield Preparation(wish, plan, inventory, source, folder, load_calibration(wish.options, load_tokenizer(folder)))


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
