"""What the control groups of this process, such as those of a container, let it have, and what it has (Linux).

A process may have no more than its own group and every group above it allow. Version 2 of control groups has one tree of them, version 1
a tree for each controller; `/proc/self/cgroup` says where in a tree this process is, `/proc/self/mountinfo` where that tree is mounted.
In a container the mount often begins at the container's own group, while the path is that of the host or of a namespace: what does not lie
below the mount is taken to be the root of the mount. https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
# Past `memory.high` a process is not killed, but slowed down until it stands still.
MEMORY_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")
NO_LIMIT = 1 << 60  # version 1 says 2**63 less a page
MEMBERSHIP = re.compile(r"^(?P<number>\d+):(?P<controllers>[^:\n]*):(?P<path>.*)$", re.MULTILINE)
MOUNT = re.compile(r"^(?:\S+ ){3}(?P<root>\S+) (?P<point>\S+) .* - (?P<kind>\S+) \S+ (?P<options>\S+)$", re.MULTILINE)


class ProcessMemory(NamedTuple):
    """Bytes of memory that a process has."""

    resident: int
    anonymous: int  # of these what is no page of a file, which the kernel could take back


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that this process may have together with all else in its groups; None if nothing limits them."""
    stated = []
    for group in _groups("memory", root):
        stated += [words[0] for name in MEMORY_FILES if (words := _words(group / name))]
        stat = _words(group / "memory.stat")
        if "hierarchical_memory_limit" in stat:  # version 1: also of groups above that are not mounted here
            stated.append(stat[stat.index("hierarchical_memory_limit") + 1])
    limits = [int(word) for word in stated if word.isdecimal()]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def cpu_limit(root: Path = ROOT) -> float | None:
    """Processors whose time this process may use together with all else in its groups; None if nothing limits them."""
    limits = []
    for group in _groups("cpu", root):
        stated = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(stated) == 2 and all(word.isdecimal() and int(word) for word in stated):
            limits.append(int(stated[0]) / int(stated[1]))
    return min(limits, default=None)


def process_memory(root: Path = ROOT) -> ProcessMemory:
    """What this process has now; zeros where the system does not tell."""
    fields = dict(line.split(":", 1) for line in _text(root / "proc/self/status").splitlines() if ":" in line)
    resident, anonymous = (int(fields[name].split()[0]) * 1024 if name in fields else None for name in ("VmRSS", "RssAnon"))
    resident = resident or 0
    return ProcessMemory(resident, resident if anonymous is None else anonymous)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the groups that this process is in, as far as they are mounted."""
    for membership in MEMBERSHIP.finditer(_text(root / "proc/self/cgroup")):
        is_v2 = membership["number"] == "0"
        if not is_v2 and controller not in membership["controllers"].split(","):
            continue
        for mount_root, mount_point in _mounts(None if is_v2 else controller, root):
            top = root / mount_point.lstrip("/")
            parent, path = f"{mount_root.rstrip('/')}/", f"{membership['path']}/"
            group = top / path.removeprefix(parent).lstrip("/")
            if not path.startswith(parent) or ".." in group.parts or not group.is_dir():
                group = top
            yield group
            yield from (folder for folder in group.parents if folder.is_relative_to(top))


def _mounts(controller: str | None, root: Path) -> Iterator[tuple[str, str]]:
    """(group at the root of the mount, where it is mounted) of version 1 with this controller, or of version 2."""
    for mount in MOUNT.finditer(_text(root / "proc/self/mountinfo")):
        if mount["kind"] == "cgroup2" if controller is None else mount["kind"] == "cgroup" and controller in mount["options"].split(","):
            yield _unescape(mount["root"]), _unescape(mount["point"])


def _unescape(path: str) -> str:
    """Spaces and the like are three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing if it is not there, or not for us to read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
