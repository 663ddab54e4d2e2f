"""Limits of control groups: every layout in which a process may meet them, as files below a false root, and a real group."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import streamquant
from streamquant import memory
from streamquant.container import ProcessMemory, cpu_limit, memory_limit, process_memory
from streamquant.convert import plan_memory
from streamquant.errors import RequestError
from tests.checkpoints import WIKI_LLAMA, attention, mlp, weight, write_checkpoint

PARENTS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}  # version 1, version 2
ROOT = Path(streamquant.__file__).parent.parent
GIGABYTE = 1 << 30
MEGABYTE = 1 << 20
CPU = torch.device("cpu")
V2_MOUNT = "/ /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V2 = "sys/fs/cgroup"


def v1_mount(group: str = "/", controllers: str = "memory") -> str:
    return f"{group} /sys/fs/cgroup/{controllers} rw,nosuid - cgroup cgroup rw,{controllers}"


class Layout(NamedTuple):
    """What /proc/self/cgroup and /proc/self/mountinfo say, and files below the root."""

    groups: str
    mounts: tuple[str, ...]
    files: Mapping[str, object]
    expected: float | None


def write_root(root: Path, layout: Layout) -> Path:
    mounts = ["25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw", *(f"{31 + n} 25 0:2{n} {m}" for n, m in enumerate(layout.mounts))]
    files = {"proc/self/cgroup": layout.groups + "\n", "proc/self/mountinfo": "\n".join(mounts) + "\n"} | dict(layout.files)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


MEMORY_LAYOUTS = {
    "version 2, a container with a namespace of its own": Layout("0::/", (V2_MOUNT,), {f"{V2}/memory.max": "1073741824\n"}, GIGABYTE),
    "version 2, the tree of the host": Layout(
        "0::/system.slice/docker-abc.scope", (V2_MOUNT,), {f"{V2}/system.slice/docker-abc.scope/memory.max": GIGABYTE}, GIGABYTE
    ),
    "version 2, the path of the host, and a mount that begins at the container": Layout(
        "0::/kubepods.slice/pod1/abc", (V2_MOUNT,), {f"{V2}/memory.max": GIGABYTE}, GIGABYTE
    ),
    "version 2, a group beside the root of the namespace": Layout(
        "0::/../other", (V2_MOUNT,), {f"{V2}/memory.max": GIGABYTE, "sys/fs/other/memory.max": 5}, GIGABYTE
    ),
    "version 2, a group above": Layout(
        "0::/user.slice/user-1000.slice/session-1.scope",
        (V2_MOUNT,),
        {
            f"{V2}/user.slice/user-1000.slice/session-1.scope/memory.max": "max\n",
            f"{V2}/user.slice/user-1000.slice/memory.max": GIGABYTE,
            f"{V2}/user.slice/memory.max": 2 * GIGABYTE,
        },
        GIGABYTE,
    ),
    "version 2, slowed down before it is killed": Layout(
        "0::/", (V2_MOUNT,), {f"{V2}/memory.max": 2 * GIGABYTE, f"{V2}/memory.high": GIGABYTE}, GIGABYTE
    ),
    "version 2, no limit": Layout("0::/", (V2_MOUNT,), {f"{V2}/memory.max": "max\n", f"{V2}/memory.high": "max\n"}, None),
    "version 2, a mount with a space in its name": Layout(
        "0::/a", (V2_MOUNT.replace("fs/cgroup", r"fs/c\040group"),), {"sys/fs/c group/a/memory.max": GIGABYTE}, GIGABYTE
    ),
    "version 1, a container": Layout(
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc",
        (v1_mount("/docker/abc", "cpu,cpuacct"), v1_mount("/docker/abc")),
        {f"{V2}/memory/memory.limit_in_bytes": GIGABYTE},
        GIGABYTE,
    ),
    "version 1, a container below that of the mount": Layout(
        "4:memory:/docker/abc/inner",
        (v1_mount("/docker/abc"),),
        {f"{V2}/memory/memory.limit_in_bytes": 2 * GIGABYTE, f"{V2}/memory/inner/memory.limit_in_bytes": GIGABYTE},
        GIGABYTE,
    ),
    "version 1, a mount whose name is the beginning of another": Layout(
        "4:memory:/docker/abc",
        (v1_mount("/docker/ab"),),
        {f"{V2}/memory/memory.limit_in_bytes": GIGABYTE, f"{V2}/memory/c/memory.limit_in_bytes": 5},
        GIGABYTE,
    ),
    "version 1, the path of the host, and a mount that begins at the container": Layout(
        "4:memory:/kubepods/pod1/abc", (v1_mount(),), {f"{V2}/memory/memory.limit_in_bytes": GIGABYTE}, GIGABYTE
    ),
    "version 1, a job of Slurm": Layout(
        "4:memory:/slurm/uid_1000/job_7/step_0/task_0",
        (v1_mount(),),
        {
            f"{V2}/memory/slurm/uid_1000/job_7/step_0/task_0/memory.limit_in_bytes": "9223372036854771712\n",
            f"{V2}/memory/slurm/uid_1000/job_7/memory.limit_in_bytes": GIGABYTE,
        },
        GIGABYTE,
    ),
    "version 1, a group above that is not mounted": Layout(
        "4:memory:/pod1/abc",
        (v1_mount("/pod1/abc"),),
        {
            f"{V2}/memory/memory.limit_in_bytes": 9223372036854771712,
            f"{V2}/memory/memory.stat": "cache 1\nrss 2\nhierarchical_memory_limit 1073741824\ntotal_cache 1\n",
        },
        GIGABYTE,
    ),
    "version 1 with version 2 beside it": Layout(
        "4:memory:/a\n0::/a",
        (v1_mount(), "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"),
        {f"{V2}/memory/a/memory.limit_in_bytes": GIGABYTE, f"{V2}/unified/a/cgroup.procs": 1},
        GIGABYTE,
    ),
    "version 1, no limit": Layout("4:memory:/", (v1_mount(),), {f"{V2}/memory/memory.limit_in_bytes": 9223372036854771712}, None),
    "another controller": Layout("5:cpu:/", (v1_mount(controllers="cpu"),), {f"{V2}/cpu/memory.limit_in_bytes": 5}, None),
    "nothing mounted": Layout("0::/", (), {}, None),
    "nothing that we understand": Layout("what\n", ("is this",), {}, None),
}
CPU_LAYOUTS = {
    "version 2": Layout("0::/", (V2_MOUNT,), {f"{V2}/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, a group above": Layout(
        "0::/a/b", (V2_MOUNT,), {f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "50000 100000"}, 0.5
    ),
    "version 1": Layout(
        "5:cpu,cpuacct:/a",
        (v1_mount(controllers="cpu,cpuacct"),),
        {f"{V2}/cpu,cpuacct/a/cpu.cfs_quota_us": 250000, f"{V2}/cpu,cpuacct/a/cpu.cfs_period_us": 100000},
        2.5,
    ),
    "version 1, no limit": Layout(
        "5:cpu:/", (v1_mount(controllers="cpu"),), {f"{V2}/cpu/cpu.cfs_quota_us": -1, f"{V2}/cpu/cpu.cfs_period_us": 100000}, None
    ),
    "version 2, no limit": Layout("0::/", (V2_MOUNT,), {f"{V2}/cpu.max": "max 100000\n"}, None),
    "nothing mounted": Layout("0::/", (), {}, None),
}


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS.values(), ids=MEMORY_LAYOUTS)
def test_the_least_memory_that_a_group_of_the_process_allows_is_its_limit(tmp_path: Path, layout: Layout) -> None:
    assert memory_limit(write_root(tmp_path, layout)) == layout.expected


@pytest.mark.parametrize("layout", CPU_LAYOUTS.values(), ids=CPU_LAYOUTS)
def test_the_least_time_that_a_group_of_the_process_allows_is_its_limit(tmp_path: Path, layout: Layout) -> None:
    assert cpu_limit(write_root(tmp_path, layout)) == layout.expected


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert (memory_limit(tmp_path), cpu_limit(tmp_path), process_memory(tmp_path)) == (None, None, ProcessMemory(0, 0))


def test_what_a_process_has_is_read_in_bytes(tmp_path: Path) -> None:
    status = tmp_path / "proc/self/status"
    status.parent.mkdir(parents=True)
    status.write_text("Name:\tpython\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\n")
    assert process_memory(tmp_path) == ProcessMemory(2 * MEGABYTE, MEGABYTE)
    status.write_text("Name:\tpython\nVmRSS:\t    2048 kB\n")  # gVisor does not tell them apart
    assert process_memory(tmp_path) == ProcessMemory(2 * MEGABYTE, 2 * MEGABYTE)


@pytest.mark.parametrize(("limit", "expected"), [(None, 4), (0.5, 1), (1.5, 2), (3.0, 3), (64.0, 4)])
def test_workers_are_as_many_as_the_time_that_the_container_allows_keeps_busy(
    monkeypatch: pytest.MonkeyPatch, limit: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(memory, "cpu_limit", lambda: limit)
    assert memory.available_cpus() == expected


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path: Path) -> streamquant.Plan:
    tensors = attention() | mlp("model.layers.0.mlp") | {"model.embed_tokens.weight": weight(3000, 128)}
    wide = {"model.layers.0.mlp.wide.weight": weight(8, 300_000)}
    return streamquant.plan(write_checkpoint(tmp_path / "source", tensors | wide), scheme="W8A8")


def limit_memory(monkeypatch: pytest.MonkeyPatch, limit: int, *, used: int = 200 * MEGABYTE) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: limit)
    monkeypatch.setattr(memory, "process_memory", lambda: ProcessMemory(2 * used, used))


def said_sizes(refusal: str, before: str) -> int:
    """The MiB after `before` in a message, in bytes."""
    return int(re.search(rf"{before} (\d+)MiB", refusal)[1]) * MEGABYTE  # type: ignore[index]


def test_the_default_budget_shrinks_to_what_the_container_allows(plan: streamquant.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = plan_memory(plan, devices=[CPU], threads=8)
    assert (roomy.num_workers, roomy.limit_bytes) == (8, None)
    limit_memory(monkeypatch, 1 << 40)
    assert plan_memory(plan, devices=[CPU], threads=8) == roomy._replace(limit_bytes=1 << 40)
    limit_memory(monkeypatch, 400 * MEGABYTE)
    tight = plan_memory(plan, devices=[CPU], threads=8)
    assert 1 < tight.num_workers < 8
    working, outputs = tight.peak_bytes, sum(len(step.outputs) for step in plan.steps)
    assert (200 + 128) * MEGABYTE + outputs * memory.BOOKKEEPING_BYTES + working * 3 // 2 <= 400 * MEGABYTE


@pytest.mark.parametrize("asked", [None, "1GiB"])
def test_a_limit_too_small_for_the_smallest_block_is_refused_with_the_one_that_works(
    plan: streamquant.Plan, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    limit_memory(monkeypatch, 330 * MEGABYTE)
    with pytest.raises(RequestError, match=r"limit of 330MiB is too small for the smallest block of .*wide\.weight: 200MiB are") as error:
        plan_memory(plan, devices=[CPU], max_memory=asked, threads=8)
    enough = said_sizes(str(error.value), "a limit of")
    limit_memory(monkeypatch, enough, used=205 * MEGABYTE)  # the next run has a little more
    assert plan_memory(plan, devices=[CPU], threads=8).num_workers == 1
    limit_memory(monkeypatch, enough - 10 * MEGABYTE)
    with pytest.raises(RequestError, match="too small"):
        plan_memory(plan, devices=[CPU], threads=8)


def test_a_budget_that_the_container_does_not_allow_is_refused_with_what_works(
    plan: streamquant.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 400 * MEGABYTE)
    with pytest.raises(RequestError, match=r"limit of 400MiB is too small for --max-memory 1024MiB: .*, and so does --max-memory") as error:
        plan_memory(plan, devices=[CPU], max_memory="1GiB", threads=50)
    limit, budget = (said_sizes(str(error.value), before) for before in ("a limit of", "--max-memory 1024MiB: .* --max-memory"))
    assert plan_memory(plan, devices=[CPU], max_memory=budget, threads=50).num_workers > 1
    limit_memory(monkeypatch, limit)
    assert plan_memory(plan, devices=[CPU], max_memory="1GiB", threads=50).num_workers > 10


def test_a_budget_that_the_plan_does_not_use_up_may_be_larger_than_the_limit(
    plan: streamquant.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 400 * MEGABYTE)
    assert plan_memory(plan, devices=[CPU], max_memory="1GiB", threads=1).num_workers == 1


def test_every_tensor_of_the_output_counts(plan: streamquant.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BOOKKEEPING_BYTES", 10 * MEGABYTE)
    limit_memory(monkeypatch, 500 * MEGABYTE)
    reserve = 128 + 10 * sum(len(step.outputs) for step in plan.steps)
    with pytest.raises(RequestError, match=f"and {reserve}MiB for pages of files and bookkeeping"):
        plan_memory(plan, devices=[CPU], threads=1)


# --- a real group ----------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """A control group in which commands run."""

    folder: Path
    limit_file: str

    def limit(self, num_bytes: int) -> None:
        (self.folder / self.limit_file).write_text(str(num_bytes))

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', self.folder / "cgroup.procs", sys.executable, "-m", "streamquant", *arguments]
        return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def group() -> Iterator[Group]:
    parent = next((parent for parent, file in PARENTS.items() if any(parent.glob(f"*/{file}"))), None)
    if parent is None:
        pytest.skip(f"none of {', '.join(map(str, PARENTS))} has control groups with limited memory")
    group = Group(parent / f"streamquant-test-{os.getpid()}", PARENTS[parent])
    try:
        group.folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made in {parent}: {error.strerror}")
    try:
        yield group
    finally:
        group.folder.rmdir()


def convert(out: Path) -> list[object]:
    return ["convert", WIKI_LLAMA, out, "--scheme", "NVFP4A16", "--device", "cpu"]


def plan_only(out: Path) -> list[object]:
    return ["plan", WIKI_LLAMA, "--scheme", "NVFP4A16", "--device", "cpu"]


@pytest.mark.parametrize("command", [plan_only, convert, lambda out: [*convert(out), "--dry-run"]], ids=["plan", "convert", "dry run"])
def test_a_real_limit_too_small_is_refused_and_the_one_that_is_named_works(
    group: Group, tmp_path: Path, command: Callable[[Path], list[object]]
) -> None:
    group.limit(220 * MEGABYTE)
    refused = group.run(*command(tmp_path / "out"))
    assert (refused.returncode, refused.stdout) == (2, ""), refused
    assert refused.stderr.startswith("error: the container's memory limit of 220MiB is too small for ")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    group.limit(said_sizes(refused.stderr, "a limit of"))
    done = group.run(*command(tmp_path / "out"))
    assert done.returncode == 0, done
    assert (tmp_path / "out" / "config.json").exists() == (command is convert)


def test_a_real_limit_shrinks_the_default_budget_and_not_one_that_is_asked_for(group: Group, tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.{role}_proj.weight": weight(4096, 2048) for role in ("gate", "up")}
    source = write_checkpoint(tmp_path / "source", tensors)
    wish = [source, "--scheme", "NVFP4A16", "--device", "cpu", "--threads", "20"]
    group.limit(450 * MEGABYTE)
    planned = group.run("plan", *wish)
    assert "; the container allows 472 MB in all" in planned.stdout, planned
    refused = group.run("plan", *wish, "--max-memory", "500MiB")
    assert refused.returncode == 2
    budget = said_sizes(refused.stderr, "and so does --max-memory")
    done = group.run("convert", source, tmp_path / "out", *wish[1:], "--max-memory", budget)
    assert done.returncode == 0, done


def test_a_real_limit_too_small_for_calibrating_is_refused_and_the_one_that_is_named_works(group: Group, tmp_path: Path) -> None:
    wish = [*convert(tmp_path / "out")[:3], "--scheme", "W4A16", "--method", "gptq", "--samples", "32", "--sequence-length", "256"]
    group.limit(480 * MEGABYTE)
    refused = group.run(*wish, "--device", "cpu")
    assert refused.returncode == 2, refused
    assert refused.stderr.startswith("error: the container's memory limit of 480MiB is too small for calibrating a layer (")
    assert not (tmp_path / "out").exists()
    group.limit(said_sizes(refused.stderr, "a limit of"))
    done = group.run(*wish, "--device", "cpu")
    assert done.returncode == 0, done
