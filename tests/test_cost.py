"""What a conversion costs, counted, not timed: bytes read and written, calls of kernels and of the system."""

import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamquant
from streamquant import memory, stream
from streamquant.checkpoint import writer
from streamquant.errors import CheckpointError
from streamquant.schemes.codes import Codes
from streamquant.schemes.kernels import TorchKernels
from streamquant.schemes.units import Scales
from tests.checkpoints import mlp, require_same_output, weight, write_checkpoint

NUM_EXPERTS = 48
NUM_WEIGHTS = NUM_EXPERTS * 3 * 128 * 128 + 1024 * 512  # of `experts`
HEADERS = 100_000  # bytes, at most
BLOCK = 1 << 15


class CountingKernels(TorchKernels):
    """The reference, with the number of calls and of elements of each operation."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def extremes(self, weight_NK: Tensor, unit: tuple[int, int], *, symmetric: bool) -> Tensor:
        self._count("extremes", weight_NK)
        return super().extremes(weight_NK, unit, symmetric=symmetric)

    def codes(self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scales: Scales) -> Tensor:
        self._count("codes", weight_NK)
        return super().codes(codes, weight_NK, unit, scales)

    def best(
        self, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], scale_QRC: Tensor, zero_QRC: Tensor | None, *, amax_RC: Tensor
    ) -> Tensor:
        self._count("best", weight_NK)
        return super().best(codes, weight_NK, unit, scale_QRC, zero_QRC, amax_RC=amax_RC)

    def _count(self, operation: str, weight_NK: Tensor) -> None:
        self.calls[operation] += 1
        self.elements[operation] += weight_NK.numel()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> CountingKernels:
    counting = CountingKernels()
    module = sys.modules["streamquant.convert"]  # the attribute of the package is the function
    monkeypatch.setattr(module, "find_kernels", lambda *_: counting)
    return counting


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the system on tensors, and bytes that they moved."""
    counter: Counter[str] = Counter()

    def count(name: str, num_bytes: Any) -> None:
        call = getattr(os, name)

        def spy(*args: Any) -> Any:
            counter[name] += 1
            counter[f"{name} bytes"] += num_bytes(*args)
            return call(*args)

        monkeypatch.setattr(os, name, spy)

    count("preadv", lambda *args: sum(map(len, args[1])))
    count("pwrite", lambda *args: len(args[1]))
    count("posix_fadvise", lambda *args: args[2])
    return counter


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A gate, an up and a down projection of 128 x 128 for each expert, and one large weight."""
    tensors = {name: tensor for expert in range(NUM_EXPERTS) for name, tensor in expert_of(expert).items()}
    return write_checkpoint(tmp_path / "experts", tensors | {"model.layers.0.self_attn.o_proj.weight": weight(1024, 512)})


def expert_of(expert: int) -> dict[str, Tensor]:
    return mlp(f"model.layers.0.mlp.experts.{expert}", rows=128, seed=3 * expert)


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK_ELEMENTS", BLOCK)
    monkeypatch.setattr(memory, "BATCH_BLOCKS", 8)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16", "W4A16_ASYM", "NVFP4A16"])
def test_every_byte_is_read_and_written_once(
    experts: Path, tmp_path: Path, kernels: CountingKernels, system: Counter[str], scheme: str
) -> None:
    streamquant.convert(experts, tmp_path / "out", scheme=scheme)
    source, out = tensor_bytes(experts), tensor_bytes(tmp_path / "out")
    assert source <= system["preadv bytes"] <= source + out // 8 + HEADERS  # an eighth, at most, for scales, which are read back
    assert out <= system["pwrite bytes"] <= out + 10_000  # config and index beside it
    assert (
        kernels.elements["extremes"]
        == kernels.elements["codes"]
        == sum(p.numel() for e in range(NUM_EXPERTS) for p in expert_of(e).values()) + 1024 * 512
    )


def test_what_shares_a_scale_and_is_too_large_to_keep_is_read_twice(
    experts: Path, tmp_path: Path, kernels: CountingKernels, system: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MAX_KEEP_BYTES", 0)
    streamquant.convert(experts, tmp_path / "out", scheme="NVFP4A16")
    assert (
        2 * tensor_bytes(experts) * 0.99
        <= system["preadv bytes"]
        <= 2 * tensor_bytes(experts) + 100_000 + tensor_bytes(tmp_path / "out") // 8
    )
    assert kernels.elements["extremes"] == 2 * kernels.elements["codes"]


def test_small_weights_share_calls_of_kernels(
    experts: Path, tmp_path: Path, kernels: CountingKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, batch_blocks = 8 * 128 * 128, 4
    monkeypatch.setattr(memory, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(memory, "BATCH_BLOCKS", batch_blocks)
    streamquant.convert(experts, tmp_path / "out", scheme="W4A16", threads=1)
    of_experts = NUM_EXPERTS * 3 * 128 * 128
    calls_for_experts = kernels.calls["codes"] - math.ceil(1024 * 512 / block)
    assert calls_for_experts <= 1.2 * of_experts / block  # not one for each of the 144 weights
    assert kernels.calls["extremes"] == kernels.calls["codes"]


def test_small_weights_are_read_in_the_order_of_the_file_whatever_their_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: tensor for e in range(NUM_EXPERTS) for name, tensor in mlp(f"model.layers.0.mlp.experts.{e}", rows=256).items()}
    source = write_checkpoint(tmp_path / "source", tensors)
    starts: list[int] = []
    preadv = os.preadv

    def spy(descriptor: int, buffers: Any, start: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(source):
            starts.append(start)
        return preadv(descriptor, buffers, start)

    plan = streamquant.plan(source, scheme="FP8_DYNAMIC")
    monkeypatch.setattr(os, "preadv", spy)
    streamquant.convert(source, tmp_path / "out", scheme="FP8_DYNAMIC", threads=1)
    of_weights = starts[-len(tensors) :]
    assert of_weights == sorted(spec.start for spec in plan.checkpoint.tensors.values())


@pytest.mark.parametrize("leaf", ["gate_proj", "down_proj"])
def test_a_weight_that_is_not_finite_keeps_no_others_from_being_encoded_together(
    leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: tensor for e in range(NUM_EXPERTS) for name, tensor in mlp(f"model.layers.0.mlp.experts.{e}", rows=256).items()}
    tensors[f"model.layers.0.mlp.experts.1.{leaf}.weight"][5, 7] = math.nan
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=rf"experts\.1\.{leaf}\.weight holds NaN"):
        streamquant.convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    streamquant.convert(source, tmp_path / "out", scheme="FP8_DYNAMIC", allow_nonfinite=True, restart=True)
    monkeypatch.setattr(memory, "BATCH_BLOCKS", 0)
    streamquant.convert(source, tmp_path / "alone", scheme="FP8_DYNAMIC", allow_nonfinite=True)
    require_same_output(tmp_path / "out", tmp_path / "alone")


def test_a_large_weight_takes_a_call_of_each_operation_for_a_block(
    tmp_path: Path, kernels: CountingKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    monkeypatch.setattr(stream, "TASK_BYTES", 8 * 2 * BLOCK)
    source = write_checkpoint(tmp_path / "large", {"model.layers.0.mlp.down_proj.weight": weight(1024, 512)})
    streamquant.convert(source, tmp_path / "out", scheme="W4A16", observer="mse")
    num_blocks = 1024 * 512 // BLOCK
    assert kernels.calls == {"extremes": num_blocks, "best": num_blocks, "codes": num_blocks}


def test_the_disk_begins_before_the_end(experts: Path, tmp_path: Path, system: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WRITE_BEHIND_BYTES", 1 << 16)
    streamquant.convert(experts, tmp_path / "out", scheme="FP8_DYNAMIC")
    out = tensor_bytes(tmp_path / "out")
    assert out // (1 << 16) // 4 <= system["posix_fadvise"] <= out // (1 << 16)
    assert system["posix_fadvise bytes"] >= out - 2 * (1 << 16)


def test_memory_is_taken_for_blocks_and_not_for_weights(tmp_path: Path, kernels: CountingKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host buffers of a worker are made once, and used for everything."""
    small_blocks(monkeypatch)
    source = write_checkpoint(tmp_path / "two", {f"model.layers.{layer}.mlp.down_proj.weight": weight(512, 512) for layer in range(6)})
    made: list[int] = []
    empty = torch.empty

    def counted(*size: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8 and isinstance(size[0], int):
            made.append(size[0])
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    streamquant.convert(source, tmp_path / "out", scheme="FP8_DYNAMIC", threads=1)
    buffers = [num_bytes for num_bytes in made if num_bytes != stream.MALLOC_LESSON_BYTES and num_bytes >= BLOCK]
    assert len(buffers) <= 2
