"""Time and memory of conversions from quantized sources, beside those from the plain checkpoint that they were made from.

    python benchmarks/sources.py [--gigabytes 1.3] [--repeats 3]

The plain checkpoint is quantized into each source first. CPU time is the one to compare: it includes the start of the interpreter,
flushing and verifying, but no waiting for the disk.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from measure import MEGABYTE, measure_ok, streamquant_command
from synthetic import llama, write_checkpoint

SOURCES = {
    "bf16": (),
    "FP8 in blocks": ("--scheme", "FP8_BLOCK", "--format", "fp8"),
    "W4A16": ("--scheme", "W4A16"),
    "NVFP4A16": ("--scheme", "NVFP4A16"),
    "MXFP4": ("--scheme", "MXFP4A16"),
}
TARGETS = ("BF16", "FP8_DYNAMIC", "W4A16", "NVFP4A16")


def main() -> None:
    """Convert every source into every target and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sources-"))
    try:
        tensors, config = llama(int(arguments.gigabytes * 1e9))
        write_checkpoint(folder / "bf16", tensors, config, shard_bytes=1 << 30)
        print(f"{sum(tensor.num_bytes for tensor in tensors) / 1e9:.2f} GB in bf16; medians of {arguments.repeats}\n")
        print("| source | size | " + " | ".join(f"to {target}" for target in TARGETS) + " |")
        print("|---|---|" + "---|" * len(TARGETS), flush=True)
        for source, options in SOURCES.items():
            if options:
                measure_ok(streamquant_command("convert", str(folder / "bf16"), str(folder / source), *options), log=folder / "log")
            size = sum(path.stat().st_size for path in (folder / source).glob("*.safetensors"))
            cells = [convert(folder, source, target, arguments.repeats) for target in TARGETS]
            print(f"| {source} | {size / 1e9:.2f} GB | {' | '.join(cells)} |", flush=True)
    finally:
        shutil.rmtree(folder)


def convert(folder: Path, source: str, target: str, repeats: int) -> str:
    """Median CPU time and peak anonymous memory of a conversion, as a cell of the table."""
    if (source, target) == ("bf16", "BF16"):
        return ""
    runs = []
    for _ in range(repeats):
        command = streamquant_command("convert", str(folder / source), str(folder / "out"), "--scheme", target, "--device", "cpu")
        runs.append(measure_ok(command, log=folder / "log"))
        shutil.rmtree(folder / "out")
    seconds = statistics.median(run.cpu_seconds for run in runs)
    memory = statistics.median(run.peak_anonymous for run in runs)
    return f"{seconds:.1f} s, {memory / MEGABYTE:.0f} MB"


if __name__ == "__main__":
    main()
