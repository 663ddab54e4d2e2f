"""What a conversion tells while it runs: a bar in a terminal, lines where there is none, and a log for machines.

The package says what happens through the logger `streamquant`, to which nothing but the command line attaches a handler. Records may have a
name and figures for machines, as in `LOGGER.info("...", extra={"event": "shard", "figures": {"bytes": 1}})`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any, Self

from tqdm import tqdm

from streamquant.container import process_memory
from streamquant.errors import one_line
from streamquant.lazy import torch
from streamquant.sizes import format_bytes
from streamquant.stream import OnProgress, Progress

LINE_SECONDS = 5.0  # between two lines of progress
TO_STDERR = "-"
LOGGER = logging.getLogger("streamquant")


class JsonLog:
    """A JSON object a line, each written when it happens: the last line of a killed run is where it was. Without a file, nothing."""

    def __init__(self, file: str | None):
        """Append to `file`; "-" is stderr."""
        self.is_stderr = file == TO_STDERR
        self._file: IO[bytes] | None = None
        if file is not None:
            path: str | int = sys.stderr.fileno() if self.is_stderr else file
            self._file = open(path, "ab", closefd=not self.is_stderr)  # noqa: SIM115, `__exit__` closes it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, event: str, **figures: Any) -> None:
        """Add a line. Safe to call from several threads."""
        if self._file is not None:
            entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event} | figures
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()


@contextmanager
def narrate(log: JsonLog, *, quiet: bool) -> Iterator[OnProgress]:
    """Tell what happens meanwhile. Yields what is to be called with progress, from one thread at a time."""
    narrator = _Narrator(log, silent=quiet or log.is_stderr)
    before = LOGGER.level
    LOGGER.addHandler(narrator)
    LOGGER.setLevel(logging.INFO)
    try:
        yield narrator.show
    finally:
        narrator.finish()
        LOGGER.setLevel(before)
        LOGGER.removeHandler(narrator)


class _Narrator(logging.Handler):
    """Writes records and progress into the log, and for people what they see: in a terminal nothing but the bar and warnings."""

    def __init__(self, log: JsonLog, *, silent: bool):
        super().__init__()
        self._log, self._silent = log, silent
        self._in_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._first: tuple[float, int] | None = None  # when progress began, and from where
        self._last: Progress | None = None
        self._told_bytes: int | None = None
        self._told_at = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._log.write(getattr(record, "event", record.levelname.lower()), message=message, **getattr(record, "figures", {}))
        if record.levelno >= logging.WARNING or not self._in_terminal:
            self._say(message)

    def show(self, progress: Progress) -> None:
        """Take note of progress, and tell it if it is time to."""
        now = time.monotonic()
        self._first = self._first or (now, progress.done_bytes)
        self._last = progress
        if self._in_terminal and not self._silent:
            if self._bar is None:
                self._bar = tqdm(total=progress.total_bytes, unit="B", unit_scale=True)
            self._bar.set_postfix_str(one_line(progress.tensor), refresh=False)
            self._bar.update(progress.done_bytes - self._bar.n)
        if now - self._told_at >= LINE_SECONDS or progress.done_bytes == progress.total_bytes:
            self._tell(now)

    def finish(self) -> None:
        """Tell how far it came."""
        self._tell(time.monotonic())
        if self._bar is not None:
            self._bar.close()

    def _tell(self, now: float) -> None:
        progress = self._last
        if progress is None or self._first is None or progress.done_bytes == self._told_bytes:
            return
        self._told_bytes, self._told_at = progress.done_bytes, now
        since, first_bytes = self._first
        speed = (progress.done_bytes - first_bytes) / (now - since) if now > since else 0.0
        left = (progress.total_bytes - progress.done_bytes) / speed if speed else None
        memory = process_memory()
        figures = progress._asdict() | {
            "bytes_per_second": round(speed),
            "seconds_left": None if left is None else round(left, 1),
            "rss_bytes": memory.resident,
            "anonymous_bytes": memory.anonymous,
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            figures["gpu_bytes"] = sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
        self._log.write("progress", **figures)
        if not self._in_terminal:
            rate = "" if left is None else f"{format_bytes(speed)}/s, {left:.0f} s left, "
            self._say(f"{format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}, {rate}at {progress.tensor}")

    def _say(self, line: str) -> None:
        if not self._silent:
            tqdm.write(one_line(line), file=sys.stderr)  # which does not break the bar
