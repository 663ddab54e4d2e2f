import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import streamquant
from streamquant.errors import RequestError
from streamquant.trace import Trace
from tests.checkpoints import WIKI_LLAMA, file_bytes


def spans(file: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(file.read_text()) if event["ph"] == "X"]


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_a_timeline_tells_what_every_thread_did(tmp_path: Path, scheme: str) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "plain", scheme=scheme)
    streamquant.convert(WIKI_LLAMA, tmp_path / "traced", threads=2, trace=tmp_path / "trace.json", scheme=scheme)
    assert file_bytes(tmp_path / "plain") == file_bytes(tmp_path / "traced")
    events = spans(tmp_path / "trace.json")
    assert {event["name"] for event in events} - {"decode"} == {"read", "observe", "encode", "write", "flush"}
    by_thread = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    names = {
        event["tid"]: event["args"]["name"] for event in json.loads((tmp_path / "trace.json").read_text()) if event["name"] == "thread_name"
    }
    assert {name.rpartition("_")[0] for name in names.values()} == {"streamquant", "streamquant-record"}
    for tid, thread in by_thread.items():
        assert tid in names
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(thread))  # one thing at a time


def test_without_a_file_nothing_is_kept() -> None:
    trace = Trace()
    assert trace.span("read") is trace.span("write")


def test_a_timeline_among_the_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--trace .*trace\.json is inside OUT"):
        streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme="W4A16", trace=tmp_path / "out" / "more" / "trace.json")
    assert not (tmp_path / "out").exists()
