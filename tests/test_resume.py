"""A conversion that is stopped, at whatever moment and however, ends with the bytes of one that is not, and loses little of its work."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import streamquant
from streamquant import stream
from streamquant.checkpoint.checksum import Checksum
from streamquant.checkpoint.journal import JOURNAL_NAME, WORK_FOLDER
from streamquant.errors import CheckpointError, RequestError
from tests.checkpoints import attention, file_bytes, mlp, weight, write_checkpoint

ROOT = Path(streamquant.__file__).parent.parent
WISH: dict[str, Any] = {"scheme": "NVFP4A16"}
ENTRY = f"{WORK_FOLDER}/{JOURNAL_NAME}"


class Stop(BaseException):
    """Stands for a kill at a chosen moment."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One shard of 15 steps or so."""
    layers = {}
    for layer in range(3):
        layers |= attention(layer) | mlp(f"model.layers.{layer}.mlp", seed=layer)
    others = {"model.embed_tokens.weight": weight(300, 128), "model.norm.weight": weight(128), "model.none": torch.zeros(0, 4)}
    return write_checkpoint(tmp_path / "source", layers | others, side_files={"tokenizer.json": "{}", "chat/template.jinja": "{{ }}"})


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a conversion that nothing disturbs."""
    streamquant.convert(source, tmp_path / "whole", **WISH)
    return file_bytes(tmp_path / "whole")


@pytest.fixture
def flush_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "FLUSH_SECONDS", 0.0)


def stopping(after: int) -> Callable[[streamquant.Progress], None]:
    """A progress callback that ends the conversion at its call number `after`."""
    calls = iter(range(after))

    def stop(_: streamquant.Progress) -> None:
        if next(calls, None) is None:
            raise Stop

    return stop


def journal_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ENTRY).read_text().splitlines()]


def steps_of(out: Path) -> set[int]:
    return {index for entry in journal_of(out) for index, _ in entry.get("steps", [])}


# --- goes on in the middle of a shard --------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_a_stopped_run_does_only_the_steps_of_a_shard_that_are_left(source: Path, tmp_path: Path, whole: object, after: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        streamquant.convert(source, out, on_progress=stopping(after), threads=1, **WISH)
    assert not list(out.glob("*.safetensors"))
    done = steps_of(out) if after else set()
    assert len(done) == after
    seen: list[streamquant.Progress] = []
    conversion = streamquant.convert(source, out, on_progress=seen.append, threads=1, **WISH)
    steps = conversion.plan.shards[0].steps
    assert seen[-1].done_bytes == sum(step.source_bytes for index, step in enumerate(steps) if index not in done)
    assert file_bytes(out) == whole


def test_threads_budget_and_blocks_may_change_between_the_runs(
    source: Path, tmp_path: Path, whole: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        streamquant.convert(source, out, on_progress=stopping(3), threads=3, max_memory="300MB", **WISH)
    monkeypatch.setattr("streamquant.memory.BLOCK_ELEMENTS", 5 * 128)
    monkeypatch.setattr("streamquant.memory.MAX_KEEP_BYTES", 0)
    with pytest.raises(Stop):
        streamquant.convert(source, out, on_progress=stopping(3), threads=1, **WISH)
    streamquant.convert(source, out, threads=2, max_memory="100MB", **WISH)
    assert file_bytes(out) == whole


@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_steps_whose_file_is_not_what_it_was_are_done_again(source: Path, tmp_path: Path, whole: object, damage: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        streamquant.convert(source, out, on_progress=stopping(5), threads=1, **WISH)
    part = out / WORK_FOLDER / "model.safetensors.part"
    if damage == "gone":
        part.unlink()
    else:
        os.truncate(part, part.stat().st_size - 1)
    streamquant.convert(source, out, **WISH)
    assert file_bytes(out) == whole


def test_weights_that_an_earlier_run_found_not_to_be_finite_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamquant.memory.BATCH_BLOCKS", 0)  # one by one, to be stopped in between
    layers = attention() | mlp("model.layers.0.mlp")
    layers["model.layers.0.self_attn.q_proj.weight"][3, 5] = torch.nan
    layers["model.layers.0.mlp.down_proj.weight"][3, 5] = torch.inf
    source, out = write_checkpoint(tmp_path / "source", layers), tmp_path / "out"
    runs = 0
    while True:
        try:
            conversion = streamquant.convert(source, out, scheme="W4A16", allow_nonfinite=True, on_progress=stopping(3), threads=1)
            break
        except Stop:
            runs += 1
    assert runs > 1
    assert conversion.nonfinite == ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight")


def test_kill_9_at_any_moment_and_again_and_again(source: Path, tmp_path: Path, whole: object) -> None:
    """With every step flushed and the work slowed down, so that kills fall between steps."""
    out, generator = tmp_path / "out", random.Random(1)
    code = (
        "import sys, time, streamquant\nfrom streamquant import stream\n"
        "stream.FLUSH_SECONDS = 0\nprint(flush=True)\n"
        "streamquant.convert(sys.argv[1], sys.argv[2], scheme='NVFP4A16', threads=1, on_progress=lambda _: time.sleep(0.02))"
    )
    kills = 0
    while not (out / "config.json").exists() or (out / WORK_FOLDER).exists():
        process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process, process.stdout:
            process.stdout.readline()
            time.sleep(generator.random() * 0.3 * (kills + 1))
            process.kill()
        kills += 1
        assert kills < 40
    assert kills > 2
    assert file_bytes(out) == whole


# --- SIGTERM ---------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_is_in_work_notes_it_and_exits_75(tmp_path: Path) -> None:
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": weight(1024, 1024, seed=index) for index in range(24)}
    source, out = write_checkpoint(tmp_path / "source", tensors, config={"num_hidden_layers": 24}), tmp_path / "out"
    wish = {"scheme": "NVFP4A16", "observer": "nvfp4_expanded_mse", "kernels": "torch"}  # half a second for each weight
    options = [word for name, value in wish.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "streamquant", "convert", str(source), str(out), *options, "--threads", "1", "--quiet"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = out / WORK_FOLDER / "model.safetensors.part"
    while process.poll() is None and not (part.exists() and part.stat().st_blocks * 512 > 2 * 1024 * 1024 // 2):  # two weights
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said == "error: stopped by SIGTERM; the same command goes on where it was\n"
    assert 0 < len(steps_of(out)) < 24
    assert not list(out.glob("*.safetensors"))
    subprocess.run([word for word in command if word not in {"torch", "--kernels"}], cwd=ROOT, check=True)
    streamquant.convert(source, tmp_path / "whole", scheme=wish["scheme"], observer=wish["observer"])
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_sigterm_while_another_failure_is_told_is_no_traceback(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, click\n"
        "from streamquant import cli\n"
        "echo = click.echo\n"
        "click.echo = lambda *args, **kwargs: (setattr(click, 'echo', echo), os.kill(os.getpid(), signal.SIGTERM))\n"
        "sys.argv = ['streamquant', 'inspect', sys.argv[1]]\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "./nowhere"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "error: stopped by SIGTERM; the same command goes on where it was\n")


# --- what is on the disk, and when -----------------------------------------------------------------------------------


def test_bytes_are_flushed_before_the_journal_says_so_and_names_before_what_makes_the_folder_load(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_always: None
) -> None:
    """The order of everything that matters when the power fails, recorded at the calls to the system."""
    events: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "fdatasync", "write")}  # pwrite is another thread's, at any time

    def path_of(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path / "out"))

    def spy(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            events.append((name, path_of(descriptor)))
            return real[name](descriptor, *args)

        return call

    replace = Path.replace

    def renamed(path: Path, target: Path) -> Path:
        events.append(("rename", str(target.relative_to(tmp_path / "out"))))
        return replace(path, target)

    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, spy(name))
        patch.setattr(Path, "replace", renamed)
        streamquant.convert(source, tmp_path / "out", threads=1, **WISH)

    part = f"{WORK_FOLDER}/model.safetensors.part"
    notes = [index for index, event in enumerate(events) if event == ("write", ENTRY)]
    assert len(notes) > 10
    for note, following in itertools.pairwise(notes):
        assert events[note + 1] == ("fsync", ENTRY)
        between = events[note + 2 : following]
        assert ("fdatasync", part) in between or ("rename", "model.safetensors") in between
    named = events.index(("rename", "model.safetensors"))
    assert events[named - 1] == ("fsync", part)
    assert events[named + 1] == ("fsync", ".")
    assert notes[-1] == named + 2
    renames = [path for kind, path in events if kind == "rename"]
    assert renames[0] == "model.safetensors"
    assert renames[-1] == "config.json"


def test_a_full_disk_ends_the_run_with_its_work_kept(
    source: Path, tmp_path: Path, whole: object, monkeypatch: pytest.MonkeyPatch, flush_always: None
) -> None:
    out, room = tmp_path / "out", 200_000
    pwrite = os.pwrite

    def limited(descriptor: int, buffer: memoryview, start: int) -> int:
        nonlocal room
        if room < len(buffer):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(buffer)
        return pwrite(descriptor, buffer, start)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(OSError, match="No space left"):
        streamquant.convert(source, out, threads=1, **WISH)
    monkeypatch.setattr(os, "pwrite", pwrite)
    done = steps_of(out)
    assert done
    seen: list[streamquant.Progress] = []
    steps = streamquant.convert(source, out, threads=1, on_progress=seen.append, **WISH).plan.shards[0].steps
    assert seen[-1].done_bytes == sum(step.source_bytes for index, step in enumerate(steps) if index not in done)
    assert file_bytes(out) == whole


def test_a_disk_that_turns_out_to_be_full_when_it_is_flushed_ends_the_run_at_once(
    source: Path, tmp_path: Path, whole: object, monkeypatch: pytest.MonkeyPatch, flush_always: None
) -> None:
    """As file systems do that find room for what was written only when it goes to the disk."""
    calls = 0

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def slowly(_: streamquant.Progress) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.02)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(OSError, match="No space left"):
            streamquant.convert(source, tmp_path / "out", threads=1, on_progress=slowly, **WISH)
    assert calls < 10
    assert steps_of(tmp_path / "out") == set()
    streamquant.convert(source, tmp_path / "out", **WISH)
    assert file_bytes(tmp_path / "out") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "streamquant", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_real_full_disk_exits_4_and_the_same_command_goes_on_when_there_is_room(small_disk: Path, source: Path, tmp_path: Path) -> None:
    out = small_disk / "out"
    (small_disk / "ballast").write_bytes(bytes(900_000))
    command = ["convert", str(source), str(out), "--scheme", "FP8_DYNAMIC"]
    told = run(*command)
    assert told.returncode == 4
    assert "bytes more and its file system has" in told.stderr
    # Room enough when it is looked for, but not when it is needed.
    code = "import shutil, sys; shutil.disk_usage = lambda _: type('', (), {'free': 10**9}); import streamquant.cli; streamquant.cli.main()"
    full = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert full.returncode == 4
    assert full.stderr.splitlines()[-1].startswith("error: ")
    assert "No space left on device" in full.stderr
    (small_disk / "ballast").unlink()
    assert run(*command).returncode == 0
    streamquant.convert(source, tmp_path / "expected", scheme="FP8_DYNAMIC")
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_an_output_that_cannot_be_written_exits_4_with_its_name(small_disk: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = run("convert", str(source), str(small_disk / "out"), "--scheme", "W4A16", "--quiet")
    assert refused.returncode == 4
    assert refused.stderr == f"error: {small_disk / 'out'}: Read-only file system\n"


# --- other jobs, other processes -------------------------------------------------------------------------------------


def test_restart_discards_what_the_other_job_wrote_and_nothing_else(
    source: Path, tmp_path: Path, whole: object, flush_always: None
) -> None:
    out = tmp_path / "out"
    wish = {"scheme": "W4A16", "max_shard_size": 30_000}
    with pytest.raises(Stop):
        streamquant.convert(source, out, on_progress=stopping(8), threads=1, **wish)
    assert len(list(out.glob("*.safetensors"))) > 1
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match=r"another job: its recipe .*; choose another OUT, or --restart to discard what it has written"):
        streamquant.convert(source, out, **WISH)
    streamquant.convert(source, out, restart=True, **WISH)
    assert file_bytes(out) == {**whole, "thesis.txt": b"years of work"}


def test_restart_of_an_empty_or_finished_folder_changes_nothing(source: Path, tmp_path: Path, whole: object) -> None:
    for _ in range(2):
        streamquant.convert(source, tmp_path / "out", restart=True, **WISH)
        assert file_bytes(tmp_path / "out") == whole


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_source_that_changed_between_the_runs_is_refused_with_what_changed(source: Path, tmp_path: Path, file: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        streamquant.convert(source, out, on_progress=stopping(3), **WISH)
    os.utime(source / file, ns=(1, 1))
    with pytest.raises(RequestError, match=rf"its source files is \{{\"{file}.*now it is \{{\"{file}"):
        streamquant.convert(source, out, **WISH)


def test_a_source_that_changes_during_a_run_is_an_error_and_no_folder_that_loads(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def touch(_: streamquant.Progress) -> None:
        os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"model.safetensors of .* changed while it was read"):
        streamquant.convert(source, out, on_progress=touch, **WISH)
    assert not (out / "config.json").exists()


def test_a_second_process_is_refused_and_the_lock_of_a_dead_one_is_not(source: Path, tmp_path: Path, whole: object) -> None:
    out = tmp_path / "out"
    code = "import sys, time, streamquant\nstreamquant.convert(*sys.argv[1:], scheme='NVFP4A16', on_progress=lambda _: time.sleep(60))"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], cwd=ROOT)
    try:
        while not (out / WORK_FOLDER / "model.safetensors.part").exists() and process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(RequestError, match="another process is converting into"):
            streamquant.convert(source, out, **WISH)
        with pytest.raises(RequestError, match="another process is converting into"):
            streamquant.convert(source, out, restart=True, **WISH)
    finally:
        process.kill()
        process.wait()
    streamquant.convert(source, out, **WISH)
    assert file_bytes(out) == whole


def test_a_run_that_was_killed_while_it_tidied_up_is_finished(source: Path, tmp_path: Path, whole: object) -> None:
    out = tmp_path / "out"
    streamquant.convert(source, out, **WISH)
    (out / WORK_FOLDER).mkdir()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    streamquant.convert(source, out, **WISH)
    assert file_bytes(out) == whole
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times


# --- checksums -------------------------------------------------------------------------------------------------------


def test_a_checksum_is_that_of_the_whole_whatever_the_pieces_and_their_order() -> None:
    generator = random.Random(5)
    content = generator.randbytes(5000)
    for _ in range(200):
        cuts = sorted({0, len(content), *(generator.randrange(len(content)) for _ in range(generator.randrange(12)))})
        pieces = [*list(itertools.pairwise(cuts)), (cuts[1], cuts[1])]
        generator.shuffle(pieces)
        checksum = Checksum(len(content))
        for start, end in pieces:
            checksum.add(start, memoryview(content)[start:end])
        assert checksum.value == zlib.crc32(content)


def test_the_record_has_the_checksum_of_every_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    streamquant.convert(source, out, max_shard_size=30_000, **WISH)
    record = json.loads((out / "streamquant.json").read_text())
    files = file_bytes(out)
    del files["streamquant.json"]
    assert record["files"] == {file: {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"} for file, content in files.items()}
    assert {"streamquant version", "recipe", "source files", "plan"} <= record["job"].keys()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_verify_finds_a_flipped_bit_and_a_missing_file(source: Path, tmp_path: Path, file: str) -> None:
    out = tmp_path / "out"
    streamquant.convert(source, out, **WISH)
    assert streamquant.verify(out).num_checksums == 4
    content = bytearray((out / file).read_bytes())
    position = len(content) - 3
    content[position] ^= 1 if file == "model.safetensors" else 0x20  # a blank in JSON
    (out / file).write_bytes(content)
    found = streamquant.verify(out).problems
    assert any(problem.startswith(f"{file} has the CRC-32") for problem in found) or file == "config.json"
    assert found
    if file == "tokenizer.json":
        (out / file).unlink()
        assert streamquant.verify(out).problems == ["tokenizer.json is missing"]


def test_writing_needs_no_second_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of a shard is read back before it has its name."""
    reads = []
    preadv = os.preadv

    def spy(descriptor: int, *args: Any) -> int:
        reads.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        return preadv(descriptor, *args)

    monkeypatch.setattr(os, "preadv", spy)
    streamquant.convert(source, tmp_path / "out", **WISH)
    assert reads
    assert not [path for path in reads if WORK_FOLDER in path]
