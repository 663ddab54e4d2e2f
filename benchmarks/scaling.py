"""How throughput and memory go with the size of the source, with the memory budget and with the number of threads.

    python benchmarks/scaling.py [--gigabytes 1 4 16] [--plot FILE.svg]

A synthetic Llama of each size is converted with the default budget; then one of --middle GB with each budget and with each number of
threads. Runs alternate; figures are medians of time and largest peaks of memory. Throughput is bytes of the source by wall time, flushing
the output to the disk and reading back its headers included: of the whole process, and less the time that `streamquant plan` takes for a
checkpoint of one layer, which is for starting Python and importing torch.

A source larger than the page cache is read from the disk, and its figures are those of the disk. --sparse makes sources that read as zeros
and take no disk; the output is as large as ever. Disk for the default: 16 GB and up to 9 for the output. An empty list, as in `--budgets`
alone, skips that part.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from chart import Panel, svg
from measure import (
    GIGABYTE,
    Measurement,
    alternate,
    convert_on_cpu,
    largest_anonymous,
    measure_ok,
    median_cpu_seconds,
    median_seconds,
    print_header,
    print_row,
    shard_bytes,
    streamquant_command,
)
from synthetic import llama, write_checkpoint

from streamquant.memory import available_cpus

SCHEMES = ("FP8_DYNAMIC", "W4A16", "NVFP4A16")
SHARD_BYTES = 5_000_000_000
TINY, START = "tiny", "start"
COLUMNS = ("wall time", "GB/s", "GB/s without the start", "CPU time", "CPU time for a GB", "peak anonymous")


def main() -> None:
    """Measure sizes, budgets and threads, each in a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1, 4, 16], help="sizes of sources; 0.65 is the least")
    parser.add_argument("--budgets", nargs="*", default=["256MiB", "1GiB", "4GiB"], metavar="SIZE", help="values of --max-memory")
    parser.add_argument("--threads", nargs="*", default=["1", "2"], metavar="N")
    parser.add_argument("--middle", type=float, default=4, metavar="GIGABYTES", help="size of the source for budgets and threads")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparse", action="store_true", help="sources of headers and holes")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw throughput and memory by size")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="scaling-", dir=arguments.folder))
    try:
        print(f"{'sparse sources' if arguments.sparse else 'sources'}; {arguments.repeats} repeats; {available_cpus()} CPUs")
        tensors, config = llama(0, hidden=512, intermediate=512)
        write_checkpoint(folder / TINY, tensors, config, shard_bytes=SHARD_BYTES, sparse=True)
        if arguments.gigabytes:
            _measure_sizes(folder, arguments)
        if arguments.budgets or arguments.threads:
            _measure_options(folder, arguments)
    finally:
        shutil.rmtree(folder)


def _measure_sizes(folder: Path, arguments: argparse.Namespace) -> None:
    speeds: dict[str, list[tuple[float, float]]] = {scheme: [] for scheme in arguments.schemes}
    memory: dict[str, list[tuple[float, float]]] = {scheme: [] for scheme in arguments.schemes}
    print("\nDefault budget and threads:\n")
    print_header("scheme", "source", *COLUMNS)
    for gigabytes in arguments.gigabytes:
        source = _make_source(folder, gigabytes, sparse=arguments.sparse)
        size = shard_bytes(source) / GIGABYTE
        for scheme in arguments.schemes:
            start, measured = _alternate_with_start(source, scheme, {"": ()}, arguments.repeats).values()
            print_row(scheme, f"{size:.1f} GB", *_cells(measured, start, size))
            speeds[scheme].append((size, size / median_seconds(measured)))
            memory[scheme].append((size, largest_anonymous(measured)))
        shutil.rmtree(source)
    if arguments.plot is not None:
        x_label = "size of the source, GB"
        panels = [Panel("Throughput", x_label, "GB/s, start included", speeds), Panel("Peak of anonymous memory", x_label, "MB", memory)]
        arguments.plot.write_text(svg(panels), encoding="utf-8")


def _measure_options(folder: Path, arguments: argparse.Namespace) -> None:
    source = _make_source(folder, arguments.middle, sparse=arguments.sparse)
    size = shard_bytes(source) / GIGABYTE
    for option, values in (("--max-memory", arguments.budgets), ("--threads", arguments.threads)):
        if values:
            print(f"\n{size:.1f} GB:\n")
            print_header("scheme", f"`{option}`", *COLUMNS)
            for scheme in arguments.schemes:
                runs = _alternate_with_start(source, scheme, {value: (option, value) for value in values}, arguments.repeats)
                start = runs.pop(START)
                for value, measured in runs.items():
                    print_row(scheme, value, *_cells(measured, start, size))


def _make_source(folder: Path, gigabytes: float, *, sparse: bool) -> Path:
    tensors, config = llama(int(gigabytes * GIGABYTE))
    source = folder / "source"
    write_checkpoint(source, tensors, config, shard_bytes=SHARD_BYTES, sparse=sparse)
    return source


def _alternate_with_start(source: Path, scheme: str, cases: dict[str, tuple[str, ...]], repeats: int) -> dict[str, list[Measurement]]:
    """Starts, and conversions with the options of each case."""
    command = streamquant_command("plan", str(source.parent / TINY), "--scheme", scheme, "--device", "cpu")
    start = partial(measure_ok, command, log=source.parent / "log")
    conversions = {name: (partial(convert_on_cpu, source, scheme, *options), repeats) for name, options in cases.items()}
    return alternate({START: (start, repeats), **conversions})


def _cells(runs: Sequence[Measurement], start: Sequence[Measurement], gigabytes: float) -> list[str]:
    seconds, cpu_seconds = median_seconds(runs), median_cpu_seconds(runs)
    at_work = seconds - median_seconds(start)
    return [
        f"{seconds:.1f} s",
        f"{gigabytes / seconds:.2f}",
        f"{gigabytes / at_work:.2f}" if at_work > 0 else "",
        f"{cpu_seconds:.1f} s",
        f"{cpu_seconds / gigabytes:.2f} s",
        f"{largest_anonymous(runs):.0f} MB",
    ]


if __name__ == "__main__":
    main()
