"""Runs a command and watches its memory, that of its children included (Linux); and what the figures of several runs are."""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SAMPLE_SECONDS = 0.02
END_BYTES = 2000
MEGABYTE = 1e6
GIGABYTE = 1e9

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a command took."""

    seconds: float
    cpu_seconds: float  # of all its threads and children; says less about neighbours on the machine than `seconds` does
    peak_rss: int  # bytes; includes pages of files that the kernel could take back
    peak_anonymous: int  # bytes of memory proper
    exit_code: int
    output: str  # the end of stdout and stderr


class CommandFailedError(Exception):
    """A measured command did not succeed."""


def measure(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> Measurement:
    """Run `command`, in the folder of the file `log` that takes its output, sampling its memory every 20 ms.

    `prepare` runs in the new process before the command does.
    """
    peak_rss = peak_anonymous = 0
    with log.open("wb") as output:
        cpu_before = _children_cpu_seconds()
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env=environment, preexec_fn=prepare)
        try:
            while child.poll() is None:
                rss, anonymous = _tree_memory(child.pid)
                peak_rss, peak_anonymous = max(peak_rss, rss), max(peak_anonymous, anonymous)
                time.sleep(SAMPLE_SECONDS)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds = time.monotonic() - started
    cpu_seconds = _children_cpu_seconds() - cpu_before
    with log.open("rb") as output:
        output.seek(max(log.stat().st_size - END_BYTES, 0))
        end = output.read().decode(errors="replace")
    return Measurement(seconds, cpu_seconds, peak_rss, peak_anonymous, child.returncode, end)


def measure_ok(command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Measurement:
    """As `measure`; raises CommandFailedError unless the command exits with 0."""
    measurement = measure(command, log=log, environment=environment)
    if measurement.exit_code != 0:
        raise CommandFailedError(f"{' '.join(command)[:200]} exited with {measurement.exit_code}:\n{measurement.output}")
    return measurement


def streamquant_command(*arguments: str) -> list[str]:
    """The program under test, run by this interpreter."""
    return [sys.executable, "-m", "streamquant", *arguments]


def convert_on_cpu(source: Path, scheme: str, *options: str) -> Measurement:
    """Convert `source` into a folder beside it, which is removed again."""
    out = source.parent / "out"
    command = streamquant_command("convert", str(source), str(out), "--scheme", scheme, "--device", "cpu", "--quiet", *options)
    try:
        return measure_ok(command, log=source.parent / "log")
    finally:
        shutil.rmtree(out, ignore_errors=True)


def alternate(cases: Mapping[str, tuple[Callable[[], T], int]]) -> dict[str, list[T]]:
    """Run each case as many times as it says, in turns, so that whatever else the machine does falls on all of them."""
    results: dict[str, list[T]] = {name: [] for name in cases}
    for turn in range(max(repeats for _, repeats in cases.values())):
        for name, (run, repeats) in cases.items():
            if turn < repeats:
                os.sync()  # what was written before is not to be flushed now
                results[name].append(run())
    return results


def median_seconds(runs: Sequence[Measurement]) -> float:
    """The median wall time."""
    return statistics.median(run.seconds for run in runs)


def median_cpu_seconds(runs: Sequence[Measurement]) -> float:
    """The median CPU time."""
    return statistics.median(run.cpu_seconds for run in runs)


def largest_anonymous(runs: Sequence[Measurement]) -> float:
    """The largest peak of anonymous memory, in MB."""
    return max(run.peak_anonymous for run in runs) / MEGABYTE


def largest_rss(runs: Sequence[Measurement]) -> float:
    """The largest peak of resident memory, in MB."""
    return max(run.peak_rss for run in runs) / MEGABYTE


def shards(checkpoint: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(checkpoint.glob("*.safetensors"))


def shard_bytes(checkpoint: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in shards(checkpoint))


def print_row(*cells: str) -> None:
    """A row of a markdown table, at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*cells: str) -> None:
    """The first two lines of a markdown table."""
    print_row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree_memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes, now, of a process and all its descendants."""
    rss = anonymous = 0
    pending = [pid]
    while pending:
        process = Path("/proc", str(pending.pop()))
        try:
            fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            for task in (process / "task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        rss += _kilobytes(fields.get("VmRSS"))
        anonymous += _kilobytes(fields.get("RssAnon"))
    return rss, anonymous


def _kilobytes(field: str | None) -> int:
    return 0 if field is None else int(field.split()[0]) * 1024  # a zombie has none
