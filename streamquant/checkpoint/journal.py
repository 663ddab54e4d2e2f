"""The journal of a conversion: which job it is and what of it is finished, so that a killed run can go on.

`OUT/.streamquant/journal.jsonl`, one JSON object a line: first the job and the names of the files that it is going to write; then
lines for steps whose bytes are flushed, and a line for each shard once it has its final name, with checksums. A line is flushed before
the next is written; a torn last line is what a kill leaves behind and counts as not written.
"""

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self

from streamquant.checkpoint.limits import MAX_INDEX_BYTES, fault_of_file_name
from streamquant.checkpoint.writer import sync_folder
from streamquant.errors import RequestError

WORK_FOLDER = ".streamquant"
JOURNAL_NAME = "journal.jsonl"
RECORD_NAME = "streamquant.json"  # in a finished output: the job that made it, and checksums
RESTART = "choose another OUT, or --restart to discard what it has written"
SHARD_KEYS = ({"shard", "steps", "nonfinite"}, {"shard", "crc32", "nonfinite"})
REVISION_KEY = "source revision"
NOTHING: Set[str] = frozenset()
MAX_SHOWN = 100  # characters of what differs


class Journal:
    """The open journal of one job in one output folder."""

    def __init__(self, work: Path, job: Mapping[str, Any], *, files: Sequence[str] = (), restart: bool = False):
        """Start a journal in `work` for a job that is going to write `files`, or go on with the one there.

        `restart`: discard the one there, and the files that its job has written. Raises RequestError if it is of another job, damaged,
        or in use by another process.
        """
        self.shards: dict[str, int] = {}  # that have their final names -> their CRC-32
        self.steps: defaultdict[str, dict[int, int]] = defaultdict(dict)  # of other shards: finished steps -> their checksums
        self.nonfinite: set[str] = set()  # weights of which NaN or infinities were stored as zeros
        path = work / JOURNAL_NAME
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _lock(self._descriptor, where=work.parent)
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                del lines[-1]
            if lines and restart:
                _discard(work, _parse_job(lines[0], list, where=path)["files"])
                lines = []
            if lines:
                require_same_job(_parse_job(lines[0], list, where=path)["job"], job, where=work.parent, way_out=RESTART)
                for line in lines[1:]:
                    self._take(_parse(line, *SHARD_KEYS, where=path))
            os.ftruncate(self._descriptor, sum(len(line) for line in lines))
            if not lines:
                self._append({"job": job, "files": list(files)})
                sync_folder(work)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)

    def record_steps(self, shard: str, steps: Mapping[int, int], nonfinite: Set[str] = NOTHING) -> None:
        """Note that these steps of a shard are flushed: number -> checksum; and which weights are not all finite, as far as is known."""
        self._note({"shard": shard, "steps": list(steps.items()), "nonfinite": sorted(nonfinite - self.nonfinite)})

    def record_shard(self, shard: str, crc32: int, nonfinite: Set[str] = NOTHING) -> None:
        """Note that a shard has its final name."""
        self._note({"shard": shard, "crc32": crc32, "nonfinite": sorted(nonfinite - self.nonfinite)})

    def _note(self, entry: Mapping[str, Any]) -> None:
        self._append(entry)
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "crc32" in entry:
            self.shards[entry["shard"]] = entry["crc32"]
            self.steps.pop(entry["shard"], None)
        else:
            self.steps[entry["shard"]].update(entry["steps"])
        self.nonfinite.update(entry["nonfinite"])

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)


def require_same_job(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, where: Path, way_out: str = "choose another OUT") -> None:
    """Raise RequestError, naming what differs, if the output in `where` belongs to another job."""
    for key in {**ours, **theirs}:
        if theirs.get(key) != ours.get(key):
            was, now = _differing(theirs.get(key), ours.get(key))
            if key == REVISION_KEY and theirs.get(key) and way_out == RESTART:
                way_out = f"--revision {theirs[key]} goes on with it, or {way_out}"
            raise RequestError(f"{where} holds the output of another job: its {key} is {was}, now it is {now}; {way_out}")


def read_record(path: Path) -> dict[str, Any]:
    """What RECORD_NAME holds: the job, and the files that it wrote. Raises RequestError if that is not what we write."""
    text = path.read_bytes() if path.stat().st_size <= MAX_INDEX_BYTES else b""
    record = _parse_job(text, dict, where=path)
    if not all(map(_has_checksum, record["files"].values())):
        raise _damaged(path)
    return record


def _has_checksum(written: Any) -> bool:
    return isinstance(written, dict) and isinstance(written.get("crc32"), str)


def _differing(theirs: Any, ours: Any) -> tuple[str, str]:
    """Both as text; of two objects only what differs first."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**ours, **theirs}:
            if theirs.get(key) != ours.get(key):
                theirs, ours = {key: theirs.get(key)}, {key: ours.get(key)}
    return _short(theirs), _short(ours)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _parse(line: bytes, *kinds: Set[str], where: Path) -> dict[str, Any]:
    """A line of a journal, or a record, which has the keys of one of these kinds."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not any(keys <= entry.keys() for keys in kinds):
        raise _damaged(where)
    return entry


def _parse_job(line: bytes, kind_of_files: type, *, where: Path) -> dict[str, Any]:
    """A record, or the first line of a journal."""
    entry = _parse(line, {"job", "files"}, where=where)
    if not isinstance(entry["job"], dict) or not isinstance(entry["files"], kind_of_files):
        raise _damaged(where)
    return entry


def _damaged(where: Path) -> RequestError:
    return RequestError(f"{where} is damaged, or not of streamquant; choose another OUT")


def _discard(work: Path, files: Sequence[str]) -> None:
    """Delete the files of the journal's job, and what lies beside the journal."""
    out = work.parent
    if any(not isinstance(file, str) or fault_of_file_name(file) for file in files):
        raise _damaged(work / JOURNAL_NAME)
    for file in files:
        (out / file).unlink(missing_ok=True)
        for folder in (out / file).relative_to(out).parents[:-1]:
            if (out / folder).is_dir() and not any((out / folder).iterdir()):
                (out / folder).rmdir()
    for part in work.iterdir():
        if part.name != JOURNAL_NAME:
            part.unlink()


def _lock(descriptor: int, *, where: Path) -> None:
    """Take the lock that the kernel releases when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed = os.fstat(descriptor).st_nlink == 0  # by the process that had the lock, and has finished
    except BlockingIOError:
        removed = True
    if removed:
        raise RequestError(f"another process is converting into {where}")
