"""streamquant and llm-compressor's `model_free_ptq` on the same checkpoint, side by side.

    python benchmarks/compare.py --peer-python PYTHON [--schemes FP8_DYNAMIC ...] [--mse]

PYTHON is the interpreter of an environment with llmcompressor. Runs alternate, so that whatever else the machine does falls on both;
figures are medians of time and largest peaks of memory. The source is in the page cache for both. Before the first run, both
outputs of a scheme are required to hold the same tensors, by name, dtype and shape.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import MEGABYTE, Measurement, measure_ok, streamquant_command
from synthetic import llama, write_checkpoint

from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM", "MXFP8", "MXFP4", "NVFP4A16")
PEER_CODE = """
import sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq
source, out, preset, observer, workers = sys.argv[1:]
scheme = preset_name_to_scheme(preset, ["Linear"])
scheme.weights.observer = observer
model_free_ptq(source, out, scheme=scheme, ignore=["lm_head", "model.embed_tokens"], device="cpu", max_workers=int(workers))
"""
PEER_OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse"}


def main() -> None:
    """Measure the floors, then scheme by scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, type=Path, help="interpreter of an environment with llmcompressor")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--mse", action="store_true", help="the mse observer instead of minmax; choose a smaller size")
    parser.add_argument("--gigabytes", type=float, default=2.7)
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-workers", type=int, default=1, help="max_workers of the peer, shards at a time; 1 is its default")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    arguments = parser.parse_args()
    observer = "mse" if arguments.mse else "minmax"
    folder = Path(tempfile.mkdtemp(prefix="compare-", dir=arguments.folder))
    try:
        tensors, config = llama(int(arguments.gigabytes * 1e9))
        source = folder / "source"
        write_checkpoint(source, tensors, config, shard_bytes=int(arguments.shard_gigabytes * 1e9))
        total = sum(tensor.num_bytes for tensor in tensors)
        count = len(list(source.glob("*.safetensors")))
        print(f"source: {total / 1e9:.2f} GB in {count} shards; observer {observer}; {arguments.repeats} repeats; {os.cpu_count()} CPUs\n")
        _print_floors(folder, arguments.peer_python, arguments.repeats)
        print("| scheme | wall time | peer | ratio | CPU time | peer | ratio | peak anonymous | peer | ratio | peak RSS | peer |")
        print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for scheme in arguments.schemes:
            ours = streamquant_command("convert", str(source), str(folder / "ours"), "--scheme", scheme, "--observer", observer)
            ours += ["--device", "cpu", "--quiet"]
            peer = [str(arguments.peer_python), "-c", PEER_CODE, str(source), str(folder / "peer"), scheme]
            peer += [PEER_OBSERVERS[observer], str(arguments.peer_workers)]
            _print_row(scheme, *_alternate(folder, ours, peer, arguments.repeats))
    finally:
        shutil.rmtree(folder)


def _alternate(folder: Path, ours: Sequence[str], peer: Sequence[str], repeats: int) -> tuple[list[Measurement], list[Measurement]]:
    runs: tuple[list[Measurement], list[Measurement]] = ([], [])
    for repeat in range(repeats):
        runs[0].append(_run(ours, folder))
        runs[1].append(_run(peer, folder))
        if repeat == 0:
            _require_same_tensors(folder / "ours", folder / "peer")
        shutil.rmtree(folder / "ours")
        shutil.rmtree(folder / "peer")
    return runs


def _run(command: Sequence[str], folder: Path) -> Measurement:
    os.sync()  # what was written before is not to be flushed now
    environment = dict(os.environ)
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    return measure_ok(command, log=folder / "log", environment=environment)


def _require_same_tensors(ours: Path, peer: Path) -> None:
    found = []
    for out in (ours, peer):
        with LocalSource(out) as opened:
            found.append({(spec.name, spec.dtype, spec.shape) for spec in read_checkpoint(opened).tensors.values()})
    if found[0] != found[1]:
        difference = sorted(found[0] ^ found[1])
        raise SystemExit(f"the outputs differ in {len(difference)} tensors, such as {difference[:3]}")


def _print_floors(folder: Path, peer_python: Path, repeats: int) -> None:
    """What neither program could beat: reading and writing the bytes once, and starting up."""
    commands = {
        "copy of the source (cp)": ["cp", "-r", str(folder / "source"), str(folder / "copy")],
        "copy, flushed to the disk (cp, sync)": [
            "sh",
            "-c",
            'cp -r "$0" "$1" && sync "$1"/*',
            str(folder / "source"),
            str(folder / "copy"),
        ],
        "start of streamquant": [sys.executable, "-c", "import streamquant.cli"],
        "start of the peer": [str(peer_python), "-c", "from llmcompressor import model_free_ptq"],
    }
    print("| floor | wall time | CPU time | peak anonymous | peak RSS |")
    print("|---|---|---|---|---|")
    for name, command in commands.items():
        runs = []
        for _ in range(repeats):
            runs.append(_run(command, folder))
            shutil.rmtree(folder / "copy", ignore_errors=True)
        print(f"| {name} | {_seconds(runs):.1f} s | {_cpu_seconds(runs):.1f} s | {_anonymous(runs):.0f} MB | {_rss(runs):.0f} MB |")
    print(flush=True)


def _print_row(scheme: str, ours: Sequence[Measurement], peer: Sequence[Measurement]) -> None:
    cells = [
        scheme,
        f"{_seconds(ours):.1f} s",
        f"{_seconds(peer):.1f} s",
        f"**{_seconds(peer) / _seconds(ours):.1f}**",
        f"{_cpu_seconds(ours):.1f} s",
        f"{_cpu_seconds(peer):.1f} s",
        f"**{_cpu_seconds(peer) / _cpu_seconds(ours):.1f}**",
        f"{_anonymous(ours):.0f} MB",
        f"{_anonymous(peer):.0f} MB",
        f"**{_anonymous(peer) / _anonymous(ours):.1f}**",
        f"{_rss(ours):.0f} MB",
        f"{_rss(peer):.0f} MB",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def _seconds(runs: Sequence[Measurement]) -> float:
    return statistics.median(run.seconds for run in runs)


def _cpu_seconds(runs: Sequence[Measurement]) -> float:
    return statistics.median(run.cpu_seconds for run in runs)


def _anonymous(runs: Sequence[Measurement]) -> float:
    return max(run.peak_anonymous for run in runs) / MEGABYTE


def _rss(runs: Sequence[Measurement]) -> float:
    return max(run.peak_rss for run in runs) / MEGABYTE


if __name__ == "__main__":
    main()
