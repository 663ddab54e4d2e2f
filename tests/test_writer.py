"""Files of the output and the journal: what is there, and under which name, at every moment."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamquant.checkpoint.header import build_header
from streamquant.checkpoint.journal import JOURNAL_NAME, WORK_FOLDER, Journal, require_same_job
from streamquant.checkpoint.writer import ShardWriter, StepWriter, write_file
from streamquant.errors import RequestError

JOB = {"recipe": [["*", "FP8_DYNAMIC"]], "source files": {"model.safetensors": "80 bytes"}, "allow nonfinite": False, "note": "Größe\n"}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "out" / WORK_FOLDER
    folder.mkdir(parents=True)
    return folder


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208, it is a count


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def finished_in(work: Path, job: object = JOB) -> dict[str, int]:
    with Journal(work, job) as journal:
        return dict(journal.shards)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_a_shard_filled_by_threads_in_any_order_gets_its_name_when_it_is_whole(work):
    tensors = {"a": torch.arange(1000, dtype=torch.int32), "b": torch.arange(999).to(torch.uint8), "empty": torch.zeros(0, 3)}
    header, specs = build_header([("a", "I32", (1000,)), ("b", "U8", (999,)), ("empty", "F32", (0, 3))], file="model.safetensors")
    pieces = [(spec.start + at, spec, at) for spec in specs for at in range(0, spec.num_bytes, 100)]
    part, final = work / "model.safetensors.part", work.parent / "model.safetensors"
    part.write_bytes(b"left over from a run that was killed" * 1000)

    with ShardWriter(part, header=header, num_bytes=specs[-1].end) as writer:

        def write_piece(piece):
            start, spec, at = piece
            step = StepWriter(writer)
            step.write(start, tensors[spec.name].view(torch.uint8).numpy().data[at : at + 100])
            return step.checksum

        with ThreadPoolExecutor(8) as pool:
            writer.finished.update(enumerate(pool.map(write_piece, reversed(pieces))))
        assert names_in(work.parent) == {WORK_FOLDER}
        writer.publish(final)
    assert names_in(work) == set()
    assert final.stat().st_size == specs[-1].end
    assert writer.crc32 == zlib.crc32(final.read_bytes())
    loaded = load_file(final)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("failed", [True, False], ids=["that failed", "that was closed"])
def test_a_shard_that_was_not_published_never_has_its_name(work, failed):
    before = num_open_files()
    writer = ShardWriter(work / "a.part", header=b"header", num_bytes=100)
    if failed:
        with pytest.raises(ZeroDivisionError), writer:
            raise ZeroDivisionError
    writer.close()
    writer.close()
    assert num_open_files() == before
    assert names_in(work.parent) == {WORK_FOLDER}
    assert (work / "a.part").read_bytes() == b"header" + bytes(94)


def test_publishing_replaces_the_file_of_that_name_at_once(work):
    final = work.parent / "config.json"
    write_file(final, b"old and longer", work=work)
    with final.open("rb") as reader:
        write_file(final, b"new", work=work)
        assert final.read_bytes() == b"new"
        assert reader.read() == b"old and longer"
    write_file(final, b"", work=work)
    assert final.read_bytes() == b""
    assert names_in(work) == set()


def test_a_shard_that_cannot_get_its_name_keeps_the_other_one(work):
    before = num_open_files()
    writer = ShardWriter(work / "a.part", header=b"", num_bytes=3)
    (work.parent / "a").mkdir()
    with pytest.raises(IsADirectoryError), writer:
        writer.publish(work.parent / "a")
    assert names_in(work) == {"a.part"}
    assert num_open_files() == before


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_where_it_was(work):
    assert finished_in(work) == {}
    with Journal(work, JOB) as journal:
        journal.record_steps("first", {0: 10, 2: 30})
        journal.record_steps("second", {5: 50}, {"a", "b"})
        journal.record_shard("first", 77, {"a", "b", "c"})
    with Journal(work, JOB) as journal:
        assert journal.shards == {"first": 77}
        assert dict(journal.steps) == {"second": {5: 50}}
        assert journal.nonfinite == {"a", "b", "c"}
        journal.record_steps("second", {6: 60}, {"c"})
        journal.record_shard("third\n with a line feed", 0)
    with Journal(work, JOB) as journal:
        assert journal.shards == {"first": 77, "third\n with a line feed": 0}
        assert journal.steps["second"] == {5: 50, 6: 60}
    lines = [json.loads(line) for line in (work / JOURNAL_NAME).read_text().splitlines()]
    assert lines[-2:] == [
        {"shard": "second", "steps": [[6, 60]], "nonfinite": []},
        {"shard": "third\n with a line feed", "crc32": 0, "nonfinite": []},
    ]


def test_a_record_is_on_the_disk_before_the_journal_is_closed(work):
    with Journal(work, JOB) as journal:
        journal.record_shard("first", 5)
        assert json.loads((work / JOURNAL_NAME).read_text().splitlines()[-1])["shard"] == "first"


def test_a_journal_torn_at_any_byte_counts_only_its_whole_lines_and_goes_on(work):
    job, shards = {"recipe": "W4A16"}, ["first", "second"]
    with Journal(work, job) as journal:
        for shard in shards:
            journal.record_shard(shard, 1)
    path = work / JOURNAL_NAME
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        num_whole = max(whole[:end].count(b"\n") - 1, 0)
        with Journal(work, job) as journal:
            assert list(journal.shards) == shards[:num_whole], end
            for shard in shards[num_whole:]:
                journal.record_shard(shard, 1)
        assert path.read_bytes() == whole, end


OTHER_JOBS = {
    "another value": ({"allow nonfinite": True}, "its allow nonfinite is false, now it is true"),
    "a key that was not there": ({"scale dtype": "F32"}, 'its scale dtype is null, now it is "F32"'),
    "another value deep inside": (
        {"source files": {"model.safetensors": "81 bytes"}},
        'its source files is {"model.safetensors": "80 bytes"}',
    ),
}


@pytest.mark.parametrize(("change", "fault"), OTHER_JOBS.values(), ids=OTHER_JOBS)
def test_the_journal_of_a_job_with_it_is_refused_and_left_as_it_is(work, change, fault):
    with Journal(work, JOB) as journal:
        journal.record_shard("first", 9)
    before, opened = (work / JOURNAL_NAME).read_bytes(), num_open_files()
    with pytest.raises(RequestError) as caught:
        Journal(work, JOB | change)
    message = str(caught.value)
    assert message.startswith(f"{work.parent} holds the output of another job: ")
    assert fault in message
    assert message.endswith("; choose another OUT, or --restart to discard what it has written")
    assert (work / JOURNAL_NAME).read_bytes() == before
    assert num_open_files() == opened
    assert finished_in(work) == {"first": 9}


def test_jobs_are_the_same_if_they_are_equal_in_every_key_of_either(tmp_path):
    require_same_job({}, {}, where=tmp_path)
    require_same_job(json.loads(json.dumps(JOB)), dict(reversed(JOB.items())), where=tmp_path)
    for theirs, ours in [({"a": 1, "b": 2}, {"a": 1}), ({"a": 1}, {"a": 1, "b": 2}), ({"b": 1}, {"b": 2})]:
        with pytest.raises(RequestError, match="its b is"):
            require_same_job(theirs, ours, where=tmp_path)


def test_a_long_difference_is_shortened(tmp_path):
    with pytest.raises(RequestError) as caught:
        require_same_job({"plan": "a" * 5000}, {"plan": list(range(5000))}, where=tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("line", [b"hello\n", b"{}\n", b"[]\n", b"\0\0\0\n", b"\xff\n"])
def test_a_damaged_journal_is_refused_and_left_alone(tmp_path: Path, line: bytes) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(line)
    with pytest.raises(RequestError, match="is damaged, or not of streamquant"):
        Journal(tmp_path, JOB)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == line


def test_a_second_process_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    with Journal(tmp_path, JOB), pytest.raises(RequestError, match="another process is converting into"):
        Journal(tmp_path, JOB)
    with Journal(tmp_path, JOB) as journal:
        assert journal.shards == {}
