"""A lane on a GPU, with a stand-in for CUDA that copies as late as it may, and finds what was overwritten before it was copied."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import streamquant
from streamquant.errors import RequestError
from streamquant.lane import CudaLane, Lane, make_lanes
from streamquant.memory import Memory
from tests.checkpoints import WIKI_LLAMA, file_bytes

CPU = torch.device("cpu")


class PendingCopy(NamedTuple):
    """A copy that was asked for."""

    source: Tensor
    content: Tensor  # what the source was then
    target: Tensor
    is_done: bool  # already, for kernels that come after it on the stream; its source may be read again until it is waited for


class Stream:
    """A stream of the stand-in."""

    def __init__(self, _: torch.device):
        self.pending: list[PendingCopy] = []


class Event:
    """An event of the stand-in: what was asked for before it is done when it is waited for."""

    def __init__(self, blocking: bool):
        assert blocking
        self._before: list[PendingCopy] = []

    def record(self, stream: Stream) -> None:
        self._check()
        self._before += stream.pending
        stream.pending = []

    def synchronize(self) -> None:
        self._check()
        for copy in self._before:
            if not copy.is_done:
                copy.target.copy_(copy.content)
        self._before = []

    def _check(self) -> None:
        assert all(torch.equal(copy.source, copy.content) for copy in self._before), "overwritten before it was copied"


class Cuda:
    """Stands for torch.cuda."""

    Stream, Event = Stream, Event

    @staticmethod
    def stream(_: Stream) -> AbstractContextManager[None]:
        return nullcontext()


class LateLane(CudaLane):
    """A lane that copies results only when they are waited for."""

    def __init__(self, num_bytes: int):
        to_read, to_write = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
        super().__init__(CPU, to_read=to_read, to_write=to_write, cuda=Cuda)
        self._is_reading = False

    def to_device(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._is_reading = True
        copies = super().to_device(stored)
        self._is_reading = False
        return copies

    def _copy(self, source: Tensor, target: Tensor) -> None:
        self._stream.pending.append(PendingCopy(source, source.clone(), target, self._is_reading))
        if self._is_reading:
            target.copy_(source)


@pytest.mark.parametrize("num_bytes", [1 << 24, 5000], ids=["enough", "too little"])
@pytest.mark.parametrize("wish", [{"scheme": "W4A16_ASYM"}, {"scheme": "NVFP4A16"}, {"scheme": "FP8_BLOCK"}], ids=str)
def test_a_conversion_reads_and_writes_what_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], num_bytes: int
) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "cpu", **wish)
    monkeypatch.setattr("streamquant.memory.BLOCK_ELEMENTS", 5000)
    monkeypatch.setattr("streamquant.stream.make_lanes", lambda _, memory: [LateLane(num_bytes) for _ in range(memory.num_workers)])
    streamquant.convert(WIKI_LLAMA, tmp_path / "late", threads=3, **wish)
    assert file_bytes(tmp_path / "cpu") == file_bytes(tmp_path / "late")


def test_memory_to_read_into_is_used_again_and_again() -> None:
    lane = LateLane(1024)
    first = lane.memory_to_read()("weight", 300)
    lane.to_device({"weight": first})
    allocate = lane.memory_to_read()
    parts = [allocate(role, 300) for role in "abc"]
    assert [part.data_ptr() - first.data_ptr() for part in parts[:2]] == [0, 512]
    assert len(parts[2]) == 300  # of other memory


def test_the_stand_in_finds_what_is_overwritten_too_early() -> None:
    lane = LateLane(1024)
    part = lane.memory_to_read()("weight", 300)
    lane.to_device({"weight": part})
    part.fill_(1)
    with pytest.raises(AssertionError, match="overwritten"):
        lane.memory_to_read()


def test_memory_that_ran_out_is_told_with_the_way_out() -> None:
    with pytest.raises(RequestError, match=r"cpu has no memory left.*give --max-gpu-memory"), LateLane(1).running():
        raise torch.OutOfMemoryError


def test_workers_are_on_all_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamquant.lane.CudaLane", lambda device, **_: Lane(device))
    monkeypatch.setattr("torch.empty", lambda size, *, dtype, pin_memory: [size, dtype, pin_memory])
    devices = [torch.device("cuda", index) for index in range(2)]
    lanes = make_lanes(devices, Memory(5, 1, 1, 1, 0, 0, 0))
    assert [lane.device.index for lane in lanes] == [0, 1, 0, 1, 0]
