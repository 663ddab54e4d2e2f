"""Throughput of a mixture of experts, whose weights have 1 MiB each, beside that of a dense checkpoint of the same size.

    python benchmarks/small_tensors.py [--experts 8000] [SCHEME ...]

The experts are those of a Qwen3-MoE, one tensor for each of the three weights of an expert; the dense checkpoint is a Llama with weights
of 2 to 34 MB. Runs alternate. The default takes 25 GB of disk: two sources of 9 GB, and one output at a time. The full one, 50,000 weights
in 56 GB, needs no disk for its sources, but up to 30 GB for the output:

    python benchmarks/small_tensors.py --experts 50000 --sparse W4A16

Sparse sources read as zeros. No kernel branches on values, so they tell as much of speed, except for what reading from a disk takes.
"""

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path

from measure import (
    GIGABYTE,
    alternate,
    convert_on_cpu,
    largest_anonymous,
    median_cpu_seconds,
    median_seconds,
    print_header,
    print_row,
    shard_bytes,
)
from synthetic import llama, qwen3_moe, write_checkpoint

SCHEMES = ("FP8_DYNAMIC", "W4A16", "NVFP4A16")
EXPERT_BYTES = 1 << 20
SHARD_BYTES = 4_000_000_000


def main() -> None:
    """Print a row for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--experts", type=int, default=8000, metavar="N", help="weights of experts; made up to whole layers of 384")
    parser.add_argument("--sparse", action="store_true", help="sources of headers and holes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="small-tensors-", dir=arguments.folder))
    try:
        experts, experts_config = qwen3_moe(arguments.experts * EXPERT_BYTES)
        dense, dense_config = llama(sum(tensor.num_bytes for tensor in experts))
        write_checkpoint(folder / "experts", experts, experts_config, shard_bytes=SHARD_BYTES, sparse=arguments.sparse)
        write_checkpoint(folder / "dense", dense, dense_config, shard_bytes=SHARD_BYTES, sparse=arguments.sparse)
        sizes = {name: shard_bytes(folder / name) / GIGABYTE for name in ("experts", "dense")}
        num_weights = sum(".experts." in tensor.name for tensor in experts)
        print(f"{num_weights:,} weights of experts in {sizes['experts']:.1f} GB; dense: {sizes['dense']:.1f} GB in {len(dense)} tensors\n")
        print_header("scheme", "experts", "dense", "ratio", "CPU time for a GB", "dense", "peak anonymous", "dense")
        for scheme in arguments.schemes:
            runs = alternate({name: (partial(convert_on_cpu, folder / name, scheme), arguments.repeats) for name in sizes})
            speeds = [sizes[name] / median_seconds(measured) for name, measured in runs.items()]
            cells = [*(f"{speed:.2f} GB/s" for speed in speeds), f"**{speeds[0] / speeds[1]:.0%}**"]
            cells += [f"{median_cpu_seconds(measured) / sizes[name]:.2f} s" for name, measured in runs.items()]
            cells += [f"{largest_anonymous(measured):.0f} MB" for measured in runs.values()]
            print_row(scheme, *cells)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
