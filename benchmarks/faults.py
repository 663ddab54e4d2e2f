"""Soak: conversions from a Hub that fails, each killed at random moments and run again, must end like one that nothing disturbs.

    python -m benchmarks.faults [--conversions 200] [--kills 10] [--faults 0.2] [--seed 1]

Every run is the command line in a process of its own, forked from one that has imported everything. A kill is SIGKILL or SIGTERM, at a
moment drawn from the time that a run takes. Half of the conversions flush and note every step, so that SIGKILL finds finished steps as
well. At the end of each conversion every byte of every file is compared, and nothing else may be left: no file in OUT, no temporary
file, no cache.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.checkpoints import WIKI_LLAMA, file_bytes
from tests.fakehub import FakeHub

SCHEMES = ("FP8_DYNAMIC", "W4A16", "NVFP4A16", "MXFP4")
REPO = "org/wiki-llama"
FINISHED, NETWORK, TERMINATED = 0, 5, 75
FIRST_WAIT_SECONDS, STALL_SECONDS = 0.01, 0.2


def main() -> None:
    """Print figures; exit 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversions", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10, help="at most, of each")
    parser.add_argument("--faults", type=float, default=0.2, help="share of the requests that fail")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "served" / "org").mkdir(parents=True)
        (folder / "served" / REPO).symlink_to(WIKI_LLAMA)
        (folder / "tmp").mkdir()
        with FakeHub(folder / "served", seed=arguments.seed, stall_seconds=0.5) as hub:
            os.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
            os.environ["NO_PROXY"] = "127.0.0.1,localhost"
            sys.exit(_soak(arguments, hub, folder))


def _soak(arguments: argparse.Namespace, hub: FakeHub, folder: Path) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["streamquant.cli", "streamquant.checkpoint.hub"])
    generator = random.Random(arguments.seed)
    started = time.monotonic()

    def run(scheme: str, out: Path, *, flush_always: bool = False) -> BaseProcess:
        process = context.Process(target=_convert, args=(scheme, str(out), flush_always))
        process.start()
        return process

    whole: dict[str, dict[str, bytes]] = {}
    seconds: dict[str, float] = {}
    for scheme in SCHEMES:
        begun = time.monotonic()
        process = run(scheme, folder / "whole" / scheme)
        process.join()
        assert process.exitcode == FINISHED
        seconds[scheme], whole[scheme] = time.monotonic() - begun, file_bytes(folder / "whole" / scheme)

    known = set((folder / "tmp").iterdir())  # of torch and of the forks, not of a conversion
    hub.faults = arguments.faults
    hub.requests.clear()
    runs, wrong = Counter[str](), 0
    for number in range(arguments.conversions):
        scheme, out = SCHEMES[number % len(SCHEMES)], folder / "out"
        for kills_left in range(generator.randint(1, arguments.kills), -1, -1):
            process = run(scheme, out, flush_always=number % 8 < 4)
            if kills_left:
                process.join(generator.uniform(0, seconds[scheme]))
                number_of_signal = generator.choice((signal.SIGKILL, signal.SIGTERM))
                if process.exitcode is None:
                    os.kill(process.pid or 0, number_of_signal)
            process.join()
            runs[_ending(process.exitcode)] += 1
            if process.exitcode == FINISHED:
                break
        while process.exitcode == NETWORK:
            process = run(scheme, out)
            process.join()
            runs[_ending(process.exitcode)] += 1
        left = sorted(path.name for path in set((folder / "tmp").iterdir()) - known)
        if process.exitcode != FINISHED or file_bytes(out) != whole[scheme] or left or (folder / "home").exists():
            print(f"conversion {number} ({scheme}) ended with {process.exitcode}, with {sorted(file_bytes(out))}; left: {left}")
            wrong += 1
        shutil.rmtree(out)
    faults = Counter(request.fault for request in hub.requests if request.fault)
    print(f"conversions {arguments.conversions}, of them wrong {wrong}, in {time.monotonic() - started:.0f} s")
    print(f"runs        {runs.total()}: {_counts(runs)}")
    print(f"requests    {len(hub.requests)}, failed {faults.total()}: {_counts(faults)}")
    return 1 if wrong else 0


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counter.most_common())


def _ending(exit_code: int | None) -> str:
    names = {FINISHED: "finished", NETWORK: "ended by the network", TERMINATED: "ended by SIGTERM", -signal.SIGKILL: "ended by SIGKILL"}
    names[-signal.SIGTERM] = "ended by SIGTERM before they began"
    return names.get(exit_code or 0, f"with exit code {exit_code}")


def _convert(scheme: str, out: str, flush_always: bool) -> None:
    """The command line, in a new process, with short waits."""
    from streamquant import cli, stream
    from streamquant.checkpoint import http, retry

    retry.FIRST_WAIT_SECONDS, http.STALL_SECONDS = FIRST_WAIT_SECONDS, STALL_SECONDS
    if flush_always:
        stream.FLUSH_SECONDS = 0.0
    sys.argv = ["streamquant", "convert", REPO, out, "--scheme", scheme, "--max-shard-size", "3MB", "--quiet"]
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115, expected errors
    cli.main()


if __name__ == "__main__":
    main()
