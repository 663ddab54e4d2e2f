"""Throughput of a conversion straight from a Hub on loopback beside one from disk, of the same checkpoint, alternating.

    python benchmarks/hub.py [--gigabytes 1.3] [--repeats 3] [SCHEME ...]

The Hub is tests/fakehub.py in a process of its own, which takes about 0.3 s of CPU time a GB from the same machine. Every file of both
outputs must be the same.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import CommandFailedError, Measurement, measure
from synthetic import llama, write_checkpoint

ROOT = Path(__file__).parent.parent
SCHEMES = ("FP8_DYNAMIC", "W4A16", "NVFP4A16")
HEADER = """\
| scheme | from disk | from the Hub | throughput | CPU time | from the Hub | peak anonymous | from the Hub |
|---|---|---|---|---|---|---|---|"""
RECORD = "streamquant.json"  # tells where the source was


def main() -> None:
    """Print a table with a row for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "served", "org", "model")
        tensors, config = llama(int(arguments.gigabytes * 1e9))
        write_checkpoint(model, tensors, config, shard_bytes=int(0.5e9))
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        with subprocess.Popen([sys.executable, "-m", "tests.fakehub", str(model.parent.parent)], cwd=ROOT, stdout=subprocess.PIPE) as hub:
            try:
                assert hub.stdout is not None
                endpoint = next(line for line in hub.stdout if b"HF_ENDPOINT" in line).decode().strip().partition("=")[2]
                hub.stdout.readline()
                print(HEADER)
                for scheme in arguments.schemes:
                    print(_row(scheme, model, endpoint, size, Path(folder), arguments.repeats), flush=True)
            finally:
                hub.terminate()


def _row(scheme: str, model: Path, endpoint: str, size: int, folder: Path, repeats: int) -> str:
    local, remote = [], []
    for _ in range(repeats):
        local.append(_convert(str(model), scheme, folder / "local", endpoint))
        remote.append(_convert("org/model", scheme, folder / "remote", endpoint))
        for file in (folder / "local").iterdir():
            if file.name != RECORD and file.read_bytes() != (folder / "remote" / file.name).read_bytes():
                raise CommandFailedError(f"{file.name} differs")
    ratio = statistics.median(ours.seconds / theirs.seconds for ours, theirs in zip(local, remote, strict=True))
    cells = [scheme, *(_speed(size, side) for side in (local, remote)), f"**{ratio:.0%}**"]
    cells += [f"{statistics.median(m.cpu_seconds for m in side):.1f} s" for side in (local, remote)]
    cells += [f"{max(m.peak_anonymous for m in side) / 1e6:.0f} MB" for side in (local, remote)]
    return f"| {' | '.join(cells)} |"


def _speed(size: int, side: Sequence[Measurement]) -> str:
    return f"{size / statistics.median(m.seconds for m in side) / 1e9:.2f} GB/s"


def _convert(source: str, scheme: str, out: Path, endpoint: str) -> Measurement:
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-m", "streamquant", "convert", source, str(out), "--scheme", scheme, "--quiet"]
    taken = measure(command, log=out.parent / "log", environment=environment)
    if taken.exit_code:
        raise CommandFailedError(taken.output)
    return taken


if __name__ == "__main__":
    main()
