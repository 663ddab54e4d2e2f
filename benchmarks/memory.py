"""A checkpoint larger than the memory it is converted in: peak memory depends on the budget, not on the size.

    python benchmarks/memory.py                     # address space for data limited with RLIMIT_DATA; no rights needed
    python benchmarks/memory.py --cgroup DIRECTORY  # a real memory limit, page cache included

One shard of 4 GB with an embedding of 1 GB in it is converted with the default budget under a limit of 768 MiB (--limit); then a layer of
Llama 4 Scout, whose experts are two transposed stacks of 2.7 and 1.3 GB; then a checkpoint of ten times the size, under the same limit.
The large source is sparse (it reads as zeros and takes no disk) unless --full.

With --method gptq (or another that calibrates) one Llama of 4 GB in 110 layers of 1024 columns is calibrated under the limit instead,
with 32 sequences of 256 tokens; what it takes depends on the width of its layers, the vocabulary and the tokens, and not on the number of
layers.

DIRECTORY is a cgroup in which you may make groups: of version 2, delegated to you and with the memory controller handed down, as in

    systemd-run --user --pty -p Delegate=yes python benchmarks/memory.py --cgroup ...

or, as root, of version 1 (/sys/fs/cgroup/memory). A group is made in it for the converting process alone, and removed at the end.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from measure import MEGABYTE, Measurement, measure, measure_ok, streamquant_command
from synthetic import add_tokenizer, llama, stacked, write_checkpoint

LIMIT_MEBIBYTES = 768
SOURCE_BYTES = 4_000_000_000
HIDDEN, INTERMEDIATE = 4096, 14336  # the embedding is 1.05 GB
SCHEMES = ("FP8_DYNAMIC", "W4A16", "NVFP4A16")
LARGE_SCHEME = "W2A16"  # the output is real, so it should be small
NARROW_HIDDEN, NARROW_INTERMEDIATE = 1024, 4096  # of the model that is calibrated
V1_NAMES = ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
V2_NAMES = ("memory.max", "memory.peak")


def main() -> None:
    """Convert under the limit and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    parser.add_argument("--cgroup", type=Path, metavar="DIRECTORY", help="a cgroup in which to make a group with the limit")
    parser.add_argument("--limit", type=int, default=LIMIT_MEBIBYTES, metavar="MIB")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--full", action="store_true", help="write the large source in full: 40 GB of disk")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--method", default="rtn", help="calibrate a model by this method instead")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-", dir=arguments.folder))
    kind = "RLIMIT_DATA" if arguments.cgroup is None else "cgroup"
    failures, limit_bytes = 0, arguments.limit << 20
    try:
        idle = measure_ok([sys.executable, "-c", "import streamquant.cli"], log=folder / "log")
        print(f"{kind} of {limit_bytes / MEGABYTE:.0f} MB; an idle interpreter with the package: {idle.peak_anonymous / MEGABYTE:.0f} MB")
        print("\n| source | scheme | result | wall time | CPU time | peak anonymous | peak of the cgroup, with page cache |")
        print("|---|---|---|---|---|---|---|", flush=True)
        dense = llama(SOURCE_BYTES, hidden=HIDDEN, intermediate=INTERMEDIATE)
        large = llama(10 * SOURCE_BYTES, hidden=HIDDEN, intermediate=INTERMEDIATE)
        sources = [("Llama", dense, arguments.schemes, False), ("3-D experts", stacked(1), arguments.schemes, False)]
        if arguments.method != "rtn":
            narrow = llama(SOURCE_BYTES, hidden=NARROW_HIDDEN, intermediate=NARROW_INTERMEDIATE)
            sources = [(f"Llama, {arguments.method}", narrow, ["W4A16"], False)]
        elif not arguments.skip_large:
            sources.append(("Llama", large, [LARGE_SCHEME], not arguments.full))
        for kind_of_model, (tensors, config), schemes, sparse in sources:
            total = sum(tensor.num_bytes for tensor in tensors)
            needed = total * (0.3 if sparse else 1.6)
            if shutil.disk_usage(folder).free < needed:
                print(f"| {total / 1e9:.1f} GB | | skipped: needs {needed / 1e9:.0f} GB of disk | | | | |")
                continue
            write_checkpoint(folder / "source", tensors, config, shard_bytes=total, sparse=sparse)
            add_tokenizer(folder / "source")
            for scheme in schemes:
                run, cgroup_peak = convert_limited(
                    folder, scheme, method=arguments.method, limit_bytes=limit_bytes, cgroup=arguments.cgroup
                )
                failures += run.exit_code != 0
                result = "converted" if run.exit_code == 0 else f"FAILED ({run.exit_code}): {run.output.strip()[-200:]}"
                usage = "" if cgroup_peak is None else f"{cgroup_peak / MEGABYTE:.0f} MB"
                size = f"{kind_of_model}, {total / 1e9:.1f} GB{', sparse' if sparse else ''}"
                times = f"{run.seconds:.0f} s | {run.cpu_seconds:.0f} s"
                print(f"| {size} | {scheme} | {result} | {times} | {run.peak_anonymous / MEGABYTE:.0f} MB | {usage} |", flush=True)
            shutil.rmtree(folder / "source")
    finally:
        shutil.rmtree(folder)
    sys.exit(min(failures, 1))


def convert_limited(folder: Path, scheme: str, *, method: str, limit_bytes: int, cgroup: Path | None) -> tuple[Measurement, int | None]:
    """Convert folder/source under the limit. Returns what it took and the peak of the cgroup, if there is one."""
    command = streamquant_command("convert", str(folder / "source"), str(folder / "out"), "--scheme", scheme, "--device", "cpu")
    if method != "rtn":
        command += ["--method", method, "--samples", "32", "--sequence-length", "256"]
    try:
        if cgroup is None:
            return measure(command, log=folder / "log", prepare=partial(_limit_data, limit_bytes)), None
        with _group(cgroup, limit_bytes) as (prepare, peak):
            return measure(command, log=folder / "log", prepare=prepare), peak()
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)


def _limit_data(limit_bytes: int) -> None:
    """Allocations past the limit fail. Stricter than a limit on resident memory: it counts what is reserved and never touched."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


@contextmanager
def _group(parent: Path, limit_bytes: int) -> Iterator[tuple[Callable[[], None], Callable[[], int | None]]]:
    """A cgroup with the limit: a function that puts the calling process into it, and one that tells its peak so far."""
    limit_name, peak_name = V2_NAMES if (parent / "cgroup.controllers").is_file() else V1_NAMES
    group = parent / f"streamquant-benchmark-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise SystemExit(f"cannot make a group in {parent}: {error.strerror}") from None
    try:
        try:
            (group / limit_name).write_text(str(limit_bytes))
        except OSError as error:
            raise SystemExit(f"{parent} does not let its groups limit memory: {error.strerror}") from None

        def join() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        def peak() -> int | None:
            path = group / peak_name  # version 2 has it from Linux 5.19 on
            return int(path.read_text()) if path.is_file() else None

        yield join, peak
    finally:
        group.rmdir()


if __name__ == "__main__":
    main()
