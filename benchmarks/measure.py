"""Runs a command and watches its memory, that of its children included (Linux)."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
END_BYTES = 2000
MEGABYTE = 1e6


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
