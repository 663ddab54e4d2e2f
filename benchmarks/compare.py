"""streamquant, llm-compressor's `model_free_ptq` and auto-round's model-free mode on the same checkpoint, side by side.

    python benchmarks/compare.py --peer-python PYTHON [--auto-round-python PYTHON] [--schemes FP8_DYNAMIC ...]

Each PYTHON is the interpreter of an environment with llmcompressor, or with auto-round; a peer without one is left out. Runs alternate, so
that whatever else the machine does falls on all; figures are medians of time and largest peaks of memory. The source is in the page
cache for everyone. Every output of llm-compressor must hold the same tensors as ours, by name, dtype and shape; auto-round packs
integers as AutoGPTQ does, so there it must have kept the same tensors as they were.

Beside them is what no program beats: reading the source and writing as many bytes as the output has, once without and once with flushing
them to the disk. streamquant flushes its output and reads its headers back; the peers do neither.

auto-round does W8A16, W4A16, W4A16_ASYM, MXFP8 and MXFP4 without a model, by rounding to nearest (its search among three scales for MXFP is
off). It compiles its quantizer with torch.compile, which takes it seconds in each process; --auto-round-eager turns that off.

With --mse (llm-compressor only) a peer takes hours for 8 GB: choose --gigabytes 0.7 and --peer-repeats 1.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from floors import memory_bandwidth, read_and_write
from measure import (
    GIGABYTE,
    Measurement,
    alternate,
    largest_anonymous,
    largest_rss,
    measure_ok,
    median_cpu_seconds,
    median_seconds,
    print_header,
    print_row,
    shard_bytes,
    shards,
    streamquant_command,
)
from synthetic import llama, write_checkpoint

import streamquant
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource
from streamquant.memory import available_cpus
from streamquant.plan import Copy

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM", "MXFP8", "MXFP4", "NVFP4A16")
PEER_OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse"}
LLM_COMPRESSOR_CODE = """
import sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq
source, out, preset, observer, workers, ignore = sys.argv[1:]
scheme = preset_name_to_scheme(preset, ["Linear"])
scheme.weights.observer = observer
model_free_ptq(source, out, scheme=scheme, ignore=ignore.split(","), device="cpu", max_workers=int(workers))
"""
AUTO_ROUND_CODE = """
import sys
from auto_round import AutoRound
source, out, scheme, symmetric, compile = sys.argv[1:]
options = {"enable_torch_compile": compile == "True", "disable_opt_rtn": True, "device_map": "cpu"}
if symmetric == "False":
    options["sym"] = False
AutoRound(source, scheme=scheme, model_free=True, **options).quantize_and_save(out)
"""
AUTO_ROUND_SCHEMES = {  # its names for ours, and whether symmetric
    "W8A16": ("W8A16", True),
    "W4A16": ("W4A16", True),
    "W4A16_ASYM": ("W4A16", False),
    "MXFP8": ("MXFP8", True),
    "MXFP4": ("MXFP4", True),
}
AUTO_ROUND_STORES_OTHERWISE = ("W8A16", "W4A16", "W4A16_ASYM")


@dataclass(frozen=True, slots=True)
class Program:
    """What quantizes a checkpoint, and where to."""

    name: str
    command: Sequence[str]
    out: Path
    same_tensors: bool = True  # whether it stores what we store


def main() -> None:
    """Measure the floors, then scheme by scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--auto-round-python", type=Path, metavar="PYTHON", help="interpreter of an environment with auto-round")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--mse", action="store_true", help="the mse observer instead of minmax; choose a smaller size")
    parser.add_argument("--source", type=Path, metavar="DIR", help="a checkpoint that exists, instead of a synthetic one")
    parser.add_argument("--gigabytes", type=float, default=2.7)
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, help="fewer for the peers; as many as --repeats if not given")
    parser.add_argument("--peer-workers", type=int, default=1, help="max_workers of llm-compressor, shards at a time; 1 is its default")
    parser.add_argument("--auto-round-eager", action="store_true", help="without torch.compile, which auto-round has on by default")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compare-", dir=arguments.folder))
    try:
        source = arguments.source
        if source is None:
            source = folder / "source"
            tensors, config = llama(int(arguments.gigabytes * 1e9))
            write_checkpoint(source, tensors, config, shard_bytes=int(arguments.shard_gigabytes * 1e9))
        size = f"{shard_bytes(source) / GIGABYTE:.2f} GB in {len(shards(source))} shards"
        print(f"source: {size}; observer {_observer(arguments)}; {arguments.repeats} repeats; {available_cpus()} CPUs\n")
        _print_floors(source.resolve(), folder, arguments)
        print_header(
            *("scheme", "program", "wall time", "ratio", "speed", "share of reading and writing", "of the same, flushed"),
            *("CPU time", "ratio", "peak anonymous", "ratio", "peak RSS"),
        )
        for scheme in arguments.schemes:
            _compare(scheme, source.resolve(), folder, arguments)
    finally:
        shutil.rmtree(folder)


def _print_floors(source: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """What no program beats, whatever the scheme: copying the source, and starting up."""
    copy = folder / "copy"
    commands: dict[str, Sequence[str]] = {
        "copy of the source (cp)": ["cp", "-r", str(source), str(copy)],
        "copy, flushed to the disk (cp, sync)": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(copy)],
        "start of streamquant": [sys.executable, "-c", "import streamquant.cli"],
    }
    if arguments.peer_python is not None:
        commands["start of llm-compressor"] = [str(arguments.peer_python), "-c", "from llmcompressor import model_free_ptq"]
    if arguments.auto_round_python is not None:
        commands["start of auto-round"] = [str(arguments.auto_round_python), "-c", "from auto_round import AutoRound"]
    floors = alternate({name: (partial(_run, command, folder, copy), arguments.repeats) for name, command in commands.items()})
    print_header("floor", "wall time", "CPU time", "peak anonymous", "peak RSS")
    for name, runs in floors.items():
        times = (f"{median_seconds(runs):.1f} s", f"{median_cpu_seconds(runs):.1f} s")
        print_row(name, *times, f"{largest_anonymous(runs):.0f} MB", f"{largest_rss(runs):.0f} MB")
    print(f"\ncopying in memory with {available_cpus()} threads: {memory_bandwidth(available_cpus()):.1f} GB/s read and written\n")


def _compare(scheme: str, source: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the rows of a scheme."""
    plan = streamquant.plan(source, scheme=scheme, observer=_observer(arguments))
    kept = [step.source.name for step in plan.steps if isinstance(step, Copy) and len(step.source.shape) > 1]
    ours, *peers = _programs(scheme, source, folder, arguments, kept=kept)
    transfer = partial(read_and_write, source, folder / "transfer", output_bytes=plan.output_bytes, num_threads=available_cpus())
    runs = alternate(
        {ours.name: (partial(_run, ours.command, folder, ours.out), arguments.repeats)}
        | {"reading and writing": (transfer, arguments.repeats), "the same, flushed": (partial(transfer, flush=True), arguments.repeats)}
        | {peer.name: (partial(_run_peer, peer, source, ours.out), arguments.peer_repeats or arguments.repeats) for peer in peers}
    )
    shutil.rmtree(ours.out)
    floors = {name: runs.pop(name) for name in ("reading and writing", "the same, flushed")}
    for name, mine in runs.items():
        shares = [f"{median_seconds(floor) / median_seconds(mine):.0%}" for floor in floors.values()]
        print_row(scheme, name, *_cells(mine, runs[ours.name], shares, source_bytes=plan.source_bytes))
    for name, floor in floors.items():
        times = (f"{median_seconds(floor):.2f} s", "", f"{plan.source_bytes / median_seconds(floor) / GIGABYTE:.2f} GB/s", "", "")
        print_row(scheme, name, *times, f"{median_cpu_seconds(floor):.2f} s", "", "", "", "")


def _cells(mine: Sequence[Measurement], ours: Sequence[Measurement], shares: Sequence[str], *, source_bytes: int) -> list[str]:
    figures = (median_seconds, median_cpu_seconds, largest_anonymous)
    time_ratio, cpu_ratio, memory_ratio = ("" if mine is ours else f"**{figure(mine) / figure(ours):.1f}**" for figure in figures)
    return [
        f"{median_seconds(mine):.1f} s",
        time_ratio,
        f"{source_bytes / median_seconds(mine) / GIGABYTE:.2f} GB/s",
        *shares,
        f"{median_cpu_seconds(mine):.1f} s",
        cpu_ratio,
        f"{largest_anonymous(mine):.0f} MB",
        memory_ratio,
        f"{largest_rss(mine):.0f} MB",
    ]


def _programs(scheme: str, source: Path, folder: Path, arguments: argparse.Namespace, *, kept: Sequence[str]) -> list[Program]:
    """Ours, then the peers that can do this. `kept` are the weights that none shall quantize."""
    observer = _observer(arguments)
    command = streamquant_command("convert", str(source), str(folder / "ours"), "--scheme", scheme, "--observer", observer)
    programs = [Program("streamquant", [*command, "--device", "cpu", "--quiet"], folder / "ours")]
    out = folder / "peer"
    if arguments.peer_python is not None:
        ignore = ",".join(name.removesuffix(".weight") for name in kept)
        command = [str(arguments.peer_python), "-c", LLM_COMPRESSOR_CODE, str(source), str(out), scheme, PEER_OBSERVERS[observer]]
        programs.append(Program("llm-compressor", [*command, str(arguments.peer_workers), ignore], out))
    if arguments.auto_round_python is not None and scheme in AUTO_ROUND_SCHEMES and not arguments.mse:
        name, symmetric = AUTO_ROUND_SCHEMES[scheme]
        command = [str(arguments.auto_round_python), "-c", AUTO_ROUND_CODE, str(source), str(out), name, str(symmetric)]
        command.append(str(not arguments.auto_round_eager))
        programs.append(Program("auto-round", command, out, same_tensors=scheme not in AUTO_ROUND_STORES_OTHERWISE))
    return programs


def _observer(arguments: argparse.Namespace) -> str:
    return "mse" if arguments.mse else "minmax"


def _run(command: Sequence[str], folder: Path, out: Path) -> Measurement:
    """Run a program that makes `out`, anew."""
    shutil.rmtree(out, ignore_errors=True)
    environment = dict(os.environ)
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    return measure_ok(command, log=folder / "log", environment=environment)


def _run_peer(peer: Program, source: Path, ours: Path) -> Measurement:
    """Run a peer and require that it did what we did."""
    measurement = _run(peer.command, peer.out.parent, peer.out)
    found = [_tensors(out) if peer.same_tensors else _tensors(out) & _tensors(source) for out in (ours, peer.out)]
    if found[0] != found[1]:
        difference = sorted(found[0] ^ found[1])
        raise SystemExit(f"the output of {peer.name} differs from ours in {len(difference)} tensors, such as {difference[:3]}")
    shutil.rmtree(peer.out)
    return measurement


def _tensors(checkpoint: Path) -> set[tuple[str, str, tuple[int, ...]]]:
    with LocalSource(checkpoint) as opened:
        return {(spec.name, spec.dtype, spec.shape) for spec in read_checkpoint(opened).tensors.values()}


if __name__ == "__main__":
    main()
