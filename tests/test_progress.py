"""What a conversion tells while it runs, to people and to machines."""

import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import streamquant
from streamquant import progress
from streamquant.container import ProcessMemory
from streamquant.progress import LOGGER, JsonLog, narrate
from streamquant.stream import Progress
from tests.checkpoints import WIKI_LLAMA, attention, file_bytes, weight, write_checkpoint

ROOT = Path(streamquant.__file__).parent.parent
EAGER = "import streamquant.progress as p; p.LINE_SECONDS = 0; from streamquant.cli import main; main()"  # tells of every task
COMMAND = [sys.executable, "-c", EAGER, "convert"]


def run(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=os.environ | settings)


def read_log(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def names_of(events: list[dict[str, Any]]) -> list[str]:
    """Names of events, one for each row of equals."""
    return [event["event"] for index, event in enumerate(events) if index == 0 or event["event"] != events[index - 1]["event"]]


@pytest.fixture
def slow(tmp_path: Path) -> tuple[Path, list[str]]:
    """A source, and options with which it takes some seconds."""
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": weight(512, 1024, seed=index) for index in range(12)}
    source = write_checkpoint(tmp_path / "slow", tensors, config={"num_hidden_layers": 12})
    return source, ["--scheme", "W4A16", "--observer", "mse", "--kernels", "torch", "--threads", "1", "--max-shard-size", "300KB"]


def start_and_wait_for_a_shard(source: Path, out: Path, log: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, str(source), str(out), "--log-json", str(log), *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (log.exists() and '"event": "shard"' in log.read_text()) and process.poll() is None:
        time.sleep(0.005)
    return process


# --- for people ------------------------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_lines_from_the_plan_to_the_end(tmp_path: Path) -> None:
    done = run(WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", "--max-shard-size", "5MB", "--threads", "1")
    first, *between, reading, last = done.stderr.splitlines()
    expected = r"13.6 MB to read and 6.65 MB to write in 2 files, with \d+(\.\d)? MB of working memory in 1 workers, kernels: numba"
    assert re.fullmatch(expected, first)
    shards = [f"model-0000{number}-of-00002.safetensors is finished" for number in (1, 2)]
    assert [line for line in between if line.endswith("finished")] == shards
    told = [line for line in between if not line.endswith("finished")]
    assert len(told) > 10
    assert all(" of 13.6 MB, " in line and ", at " in line for line in told)
    assert all("/s, " in line and " s left, at " in line for line in told[1:])  # from the second on there is a speed
    assert told[-1].startswith("13.6 MB of 13.6 MB, ")
    assert (reading, last) == (f"reading {tmp_path / 'out'} back", f"{tmp_path / 'out'} is complete and verified")


def test_a_line_every_few_seconds_and_one_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with narrate(JsonLog(None), quiet=False) as show:
        for done in range(0, 50):
            show(Progress(done * 10**6, 10**8, "a.weight"))
            now += 1.0
    assert capsys.readouterr().err.splitlines() == [
        *(f"{done} MB of 100 MB, 1 MB/s, {100 - done} s left, at a.weight" for done in range(5, 50, 5)),
        "49 MB of 100 MB, 980 kB/s, 52 s left, at a.weight",
    ]


@pytest.mark.parametrize("total", [0, 10])
def test_no_time_and_no_bytes_are_no_trouble(total: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    with narrate(JsonLog(None), quiet=False) as show:
        show(Progress(0, total, "a"))
        show(Progress(total, total, "b"))
        show(Progress(total, total, "c"))
    assert capsys.readouterr().err.splitlines() == {0: ["0 B of 0 B, at a"], 10: ["10 B of 10 B, at b"]}[total]


def test_names_of_tensors_reach_no_terminal_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with narrate(JsonLog(None), quiet=False) as show:
        show(Progress(1, 1, "a\x1b[2J\nerror: b"))
    assert capsys.readouterr().err == "1 B of 1 B, at a\\x1b[2J\\nerror: b\n"


def test_in_a_terminal_there_is_a_bar_and_no_line_but_warnings(tmp_path: Path) -> None:
    code = EAGER.replace(
        "from",
        """
import logging
show = p._Narrator.show
def warn(self, progress):
    show(self, progress)
    if progress.tensor.endswith("0.mlp.up_proj.weight"):
        logging.getLogger("streamquant").warning("waiting 8 s: the Hub answers 429")
p._Narrator.show = warn
from""",
    )
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": weight(128, 1024, seed=index) for index in range(8)}
    source = write_checkpoint(tmp_path / "source", tensors, config={"num_hidden_layers": 8})
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "out"), "--scheme", "W4A16"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while chunk := read_terminal(ours):
        seen += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = seen.decode().replace("\r\n", "\n")
    assert [line.split("\r")[-1] for line in text.split("\n") if "Hub" in line] == ["waiting 8 s: the Hub answers 429"]
    assert "| 2.10M/2.10M [" in text
    assert "up_proj.weight]" in text
    assert not any(line in text for line in (" to read and ", " is finished", " of 2.1 MB", " back\n", " is complete"))


def read_terminal(descriptor: int) -> bytes:
    """What is there to be read, and nothing once the other end is closed."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        return b""


def test_quiet_hides_warnings_but_not_from_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, said in ((True, ""), (False, "waiting 8 s: the Hub answers 429\n")):
        with JsonLog(str(tmp_path / "log")) as log, narrate(log, quiet=quiet):
            LOGGER.warning("waiting %d s: the Hub answers %d", 8, 429)
        assert capsys.readouterr().err == said
    assert [(event["event"], event["message"]) for event in read_log(tmp_path / "log")] == 2 * [
        ("warning", "waiting 8 s: the Hub answers 429")
    ]


def test_importing_the_package_configures_no_logging() -> None:
    code = "import logging, streamquant.cli; ours = logging.getLogger('streamquant'); "
    code += "assert not ours.handlers and not logging.getLogger().handlers and ours.level == logging.NOTSET and ours.propagate"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_logger_is_left_as_it_was() -> None:
    before = LOGGER.handlers.copy(), LOGGER.level
    with pytest.raises(ZeroDivisionError), narrate(JsonLog(None), quiet=True):
        assert (LOGGER.handlers.copy(), LOGGER.level) != before
        raise ZeroDivisionError
    assert (LOGGER.handlers, LOGGER.level) == before


# --- for machines ----------------------------------------------------------------------------------------------------


def test_the_log_tells_a_conversion_from_start_to_end(tmp_path: Path) -> None:
    log, report = tmp_path / "log.jsonl", tmp_path / "report.json"
    before = datetime.now(UTC)
    options = ["--scheme", "NVFP4A16", "--ignore", "*.layers.0", "--threads", "1", "--log-json", log, "--report", report, "--quiet"]
    done = run(WIKI_LLAMA, tmp_path / "out", *options)
    assert (done.returncode, done.stderr) == (0, "")
    events = read_log(log)
    assert names_of(events) == ["start", "plan", "progress", "shard", "verify", "done"]
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)
    assert all(moment.utcoffset() == timedelta(0) and before - timedelta(seconds=1) < moment < datetime.now(UTC) for moment in times)

    start, plan, *_, shard, _, end = events
    assert (start["streamquant"], start["source"], start["out"]) == (streamquant.__version__, str(WIKI_LLAMA), str(tmp_path / "out"))
    assert (start["dry_run"], start["settings"]["scheme"], start["settings"]["ignore"]) == (False, "NVFP4A16", ["*.layers.0"])
    expected = streamquant.plan(WIKI_LLAMA, scheme="NVFP4A16", ignore=["*.layers.0"])
    assert (plan["source_bytes"], plan["output_bytes"], plan["shards"]) == (expected.source_bytes, expected.output_bytes, 1)
    assert plan["workers"] == 1
    assert plan["predicted_memory_bytes"] > 8 << 20
    assert (shard["file"], shard["bytes"]) == ("model.safetensors", expected.output_bytes)
    written = json.loads(report.read_text())
    assert {name for name, value in end.items() if written.get(name, value) != value} == {"shards", "quantized", "kept", *written} & {
        name for name, value in written.items() if isinstance(value, dict | list)
    }
    assert (end["quantized"], end["kept"], end["seconds"]) == (35, len(written["kept"]), written["seconds"])


def test_progress_in_the_log_has_what_a_dead_run_leaves_one_to_ask(tmp_path: Path) -> None:
    run(WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", "--log-json", tmp_path / "log")
    told = [event for event in read_log(tmp_path / "log") if event["event"] == "progress"]
    assert len(told) > 10
    assert [event["done_bytes"] for event in told] == sorted({event["done_bytes"] for event in told})
    assert {event["total_bytes"] for event in told} == {13_638_144}
    assert told[-1]["done_bytes"] == 13_638_144
    assert all(event["tensor"].endswith("weight") for event in told)
    assert (told[0]["bytes_per_second"], told[0]["seconds_left"], told[-1]["seconds_left"]) == (0, None, 0.0)
    assert all(event["bytes_per_second"] > 0 for event in told[1:])
    assert all(event["rss_bytes"] > event["anonymous_bytes"] > 100 << 20 for event in told)
    assert torch.cuda.is_available() or all("gpu_bytes" not in event for event in told)


def test_memory_in_the_log_is_that_of_the_process_and_of_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "process_memory", lambda: ProcessMemory(7, 5))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 ** (device + 1))
    with JsonLog(str(tmp_path / "log")) as log, narrate(log, quiet=True) as show:
        show(Progress(1, 1, "a"))
    [event] = read_log(tmp_path / "log")
    assert (event["rss_bytes"], event["anonymous_bytes"], event["gpu_bytes"]) == (7, 5, 1110)


def test_the_log_of_a_killed_run_tells_where_it_was_and_the_next_run_goes_on_in_it(slow: tuple[Path, list[str]], tmp_path: Path) -> None:
    source, options = slow
    out, log = tmp_path / "out", tmp_path / "log"
    process = start_and_wait_for_a_shard(source, out, log, *options, "--quiet")
    process.kill()
    process.communicate()
    killed = read_log(log)
    assert names_of(killed)[:3] == ["start", "plan", "progress"]
    assert not {"done", "error"} & set(names_of(killed))
    assert next(event for event in reversed(killed) if event["event"] == "progress")["tensor"].startswith("model.layers.")
    assert run(source, out, *options, "--log-json", log).returncode == 0
    events = read_log(log)
    assert events[: len(killed)] == killed
    again = events[len(killed) :]
    assert names_of(again)[:4] == ["start", "plan", "resume", "progress"]
    assert (again[2]["finished_shards"], again[-1]["event"]) == (again[-1]["resumed_shards"], "done")
    assert again[2]["finished_shards"] > 0


def test_a_run_that_is_stopped_says_so_and_how_far_it_came(slow: tuple[Path, list[str]], tmp_path: Path) -> None:
    source, options = slow
    process = start_and_wait_for_a_shard(source, tmp_path / "out", tmp_path / "log", *options)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    events = read_log(tmp_path / "log")
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("error", 75)
    assert events[-1]["message"] == "stopped by SIGTERM; the same command goes on where it was"
    assert said.splitlines()[-1] == f"error: {events[-1]['message']}"
    assert [event["event"] for event in events].count("shard") == len(list((tmp_path / "out").glob("*.safetensors")))


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["{tmp}/no", "{tmp}/out", "--scheme", "W4A16"], 3, "{tmp}/no"),
        ([WIKI_LLAMA, "{tmp}/out", "--scheme", "W4A16", "--max-memory", "1KB"], 2, "give --max-memory"),
        ([WIKI_LLAMA, "/proc/out", "--scheme", "W4A16"], 4, "/proc/out"),
        ([WIKI_LLAMA, "{tmp}/out", "--dry-run"], 2, "nothing to do"),
    ],
)
def test_errors_end_the_log_with_the_message_and_the_exit_code(tmp_path: Path, arguments: list[object], exit_code: int, said: str) -> None:
    failed = run(*(str(argument).format(tmp=tmp_path) for argument in arguments), "--log-json", tmp_path / "log")
    assert failed.returncode == exit_code
    first, *_, last = read_log(tmp_path / "log")
    assert (first["event"], last["event"], last["exit_code"]) == ("start", "error", exit_code)
    assert said.format(tmp=tmp_path) in last["message"]
    assert failed.stderr.splitlines()[-1] == f"error: {last['message']}"


def test_a_bug_is_in_the_log_by_its_name_alone(tmp_path: Path) -> None:
    """Its message may be of a library, and hold anything."""
    code = EAGER.replace("main()", "import streamquant, sys; streamquant.convert = lambda *_, **__: {}['hf_secret']; main()")
    command = [sys.executable, "-c", code, "convert", WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", "--log-json", tmp_path / "log"]
    failed = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    last = read_log(tmp_path / "log")[-1]
    assert (last["event"], last["message"], last["exit_code"]) == ("error", "a bug: KeyError, with a traceback on stderr", 1)


def test_a_dry_run_is_logged(tmp_path: Path) -> None:
    dry = run(WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", "--dry-run", "--log-json", tmp_path / "log")
    assert (dry.returncode, dry.stderr) == (0, "")
    start, done = read_log(tmp_path / "log")
    assert (start["event"], start["dry_run"], done["event"], done["dry_run"]) == ("start", True, "done", True)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A17"])
def test_a_log_on_stderr_is_all_that_is_there(tmp_path: Path, scheme: str) -> None:
    done = run(WIKI_LLAMA, tmp_path / "out", "--scheme", scheme, "--log-json", "-")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    expected = {"W4A16": (0, "start", "done"), "W4A17": (2, "start", "error")}[scheme]
    assert (done.returncode, events[0]["event"], events[-1]["event"]) == expected
    assert done.stdout.startswith("quantized ") == (scheme == "W4A16")


def test_a_log_among_the_output_is_refused_and_one_that_cannot_be_opened_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    inside = run(WIKI_LLAMA, out, "--scheme", "W4A16", "--log-json", out / "log")
    assert (inside.returncode, "is inside OUT" in inside.stderr, out.exists()) == (2, True, False)
    nowhere = run(WIKI_LLAMA, out, "--scheme", "W4A16", "--log-json", tmp_path / "no" / "log")
    assert (nowhere.returncode, str(tmp_path / "no" / "log") in nowhere.stderr, out.exists()) == (4, True, False)


def test_the_token_of_the_hub_is_not_in_the_log(tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    done = run(WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", "--log-json", tmp_path / "log", HF_TOKEN=secret)
    assert done.returncode == 0
    assert secret not in (tmp_path / "log").read_text() + done.stderr + done.stdout


def test_a_conversion_from_python_is_silent_and_its_records_are_there_for_who_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write_checkpoint(tmp_path / "source", attention())
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    with caplog.at_level(logging.INFO, logger="streamquant"):
        streamquant.convert(source, tmp_path / "again", scheme="W4A16")
    assert [getattr(record, "event", None) for record in caplog.records] == ["plan", "shard", "verify"]
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "again")


def test_a_log_on_a_stderr_that_is_no_file_is_not_asked_for() -> None:
    """Whoever captures stderr in Python gets lines, for which no descriptor is needed."""
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        with narrate(JsonLog(None), quiet=False):
            LOGGER.info("a line")
        assert sys.stderr.getvalue() == "a line\n"
    finally:
        sys.stderr = stderr
