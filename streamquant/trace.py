"""What each thread does when: a timeline in Chrome's trace format, for chrome://tracing or https://ui.perfetto.dev.

Of its two forms this is the "JSON Array Format", in which the last bracket may be missing: the trace of a killed run can be looked at, too.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import json
import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self


class Trace:
    """Writes spans of time to a file, or nowhere."""

    def __init__(self, file: str | os.PathLike[str] | None = None):
        """Overwrites `file`."""
        self._file = None if file is None else Path(file).open("w", encoding="utf-8")  # noqa: SIM115, `__exit__` closes it
        self._lock = threading.Lock()
        self._named: set[int] = set()
        if self._file is not None:
            self._file.write("[\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "streamquant"}}) + "\n]\n")
            self._file.close()

    def span(self, name: str) -> AbstractContextManager[Any]:
        """Its body is what this thread does meanwhile."""
        return _NOTHING if self._file is None else _Span(self, name)

    def add(self, name: str, start: int, end: int) -> None:
        """Note that this thread did something from `start` to `end`, in nanoseconds of time.perf_counter_ns."""
        assert self._file is not None
        thread = threading.get_native_id()
        event = {"ph": "X", "pid": 0, "tid": thread, "name": name, "ts": start / 1e3, "dur": (end - start) / 1e3}
        with self._lock:
            if thread not in self._named:
                self._named.add(thread)
                who = {"ph": "M", "pid": 0, "tid": thread, "name": "thread_name", "args": {"name": threading.current_thread().name}}
                self._file.write(json.dumps(who) + ",\n")
            self._file.write(json.dumps(event) + ",\n")


class _Span:
    def __init__(self, trace: Trace, name: str):
        self._trace, self._name, self._start = trace, name, 0

    def __enter__(self) -> None:
        self._start = time.perf_counter_ns()

    def __exit__(self, *exc: object) -> None:
        self._trace.add(self._name, self._start, time.perf_counter_ns())


_NOTHING: AbstractContextManager[None] = nullcontext()
