"""The journal of a conversion: which job it is and which shards are finished, so that a killed run can go on.

`OUT/.streamquant/journal.jsonl`, one JSON object a line: first the job, then a line for each shard once it has its final name. A
line is flushed before the next is written; a torn last line is what a kill leaves behind and counts as not written.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from streamquant.checkpoint.writer import sync_folder
from streamquant.errors import RequestError

WORK_FOLDER = ".streamquant"
JOURNAL_NAME = "journal.jsonl"
RECORD_NAME = "streamquant.json"  # in a finished output: the job that made it


class Journal:
    """The open journal of one job in one output folder."""

    def __init__(self, work: Path, job: Mapping[str, Any]):
        """Start a journal in `work`, or go on with the one there.

        Raises RequestError if that is of another job, damaged, or in use by another process.
        """
        self.finished: set[str] = set()
        path = work / JOURNAL_NAME
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _lock(self._descriptor, where=work.parent)
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                del lines[-1]
            if lines:
                require_same_job(_entry(lines[0], "job", where=path), job, where=work.parent)
                self.finished.update(_entry(line, "shard", where=path) for line in lines[1:])
            os.ftruncate(self._descriptor, sum(len(line) for line in lines))
            if not lines:
                self._append({"job": job})
                sync_folder(work)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)

    def record(self, shard: str) -> None:
        """Note that a shard has its final name."""
        self._append({"shard": shard})
        self.finished.add(shard)

    def _append(self, entry: Mapping[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")
        os.fsync(self._descriptor)


def require_same_job(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, where: Path) -> None:
    """Raise RequestError, naming what differs, if the output in `where` belongs to another job."""
    for key in {**ours, **theirs}:
        if theirs.get(key) != ours.get(key):
            was, now = _short(theirs.get(key)), _short(ours.get(key))
            raise RequestError(f"{where} holds the output of another job: its {key} is {was}, now it is {now}; choose another OUT")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_record(path: Path) -> Any:
    """The job that made a finished output. Raises RequestError if the file is not what we write."""
    return _entry(path.read_bytes(), "job", where=path)


def _entry(text: bytes, key: str, *, where: Path) -> Any:
    try:
        return json.loads(text)[key]
    except (ValueError, KeyError, TypeError):
        raise RequestError(f"{where} is damaged, or not of streamquant; choose another OUT") from None


def _lock(descriptor: int, *, where: Path) -> None:
    """Take the lock that the kernel releases when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"another process is converting into {where}") from None
