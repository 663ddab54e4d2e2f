"""What no conversion beats: reading its source and writing as many bytes as it puts out, and moving bytes through memory."""

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measure import GIGABYTE, Measurement, shards

PIECE_BYTES = 1 << 20
ARRAY_BYTES = 256 << 20  # of each thread; more than caches hold
PASSES = 5


def read_and_write(source: Path, out: Path, *, output_bytes: int, num_threads: int, read: bool = True, flush: bool = False) -> Measurement:
    """Read all shards of `source` in pieces of 1 MiB and write `output_bytes`, of each piece its share, into `out`, which is removed again.

    Each thread writes a file of its own, since file systems let one at a time write to a file. With 0 for `output_bytes` it only reads,
    without `read` it only writes.
    """
    out.mkdir()
    try:
        pieces = list(_pieces(source))
        started, cpu_started = time.monotonic(), time.process_time()
        with ThreadPoolExecutor(num_threads) as pool:
            works = [
                pool.submit(_transfer, pieces, range(first, len(pieces), num_threads), out / str(first), output_bytes, read, flush)
                for first in range(num_threads)
            ]
            for work in works:
                work.result()
        return Measurement(time.monotonic() - started, time.process_time() - cpu_started, 0, 0, 0, "")
    finally:
        shutil.rmtree(out)


def memory_bandwidth(num_threads: int) -> float:
    """GB/s of copying in memory, read and written bytes both counted: the median of a few passes of all threads at once."""
    pairs = [(np.ones(ARRAY_BYTES, np.uint8), np.ones(ARRAY_BYTES, np.uint8)) for _ in range(num_threads)]
    seconds = []
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(PASSES):
            started = time.monotonic()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            seconds.append(time.monotonic() - started)
    return 2 * ARRAY_BYTES * num_threads / statistics.median(seconds) / GIGABYTE


def _pieces(source: Path) -> Iterator[tuple[Path, int]]:
    for path in shards(source):
        for start in range(0, path.stat().st_size, PIECE_BYTES):
            yield path, start


def _transfer(pieces: list[tuple[Path, int]], mine: range, out: Path, output_bytes: int, read: bool, flush: bool) -> None:
    buffer = memoryview(bytearray(max(PIECE_BYTES, -(-output_bytes // len(pieces)))))
    files: dict[Path, int] = {}
    with out.open("wb", buffering=0) as output:
        try:
            for index in mine:
                path, start = pieces[index]
                if path not in files:
                    files[path] = os.open(path, os.O_RDONLY)
                if read:
                    os.preadv(files[path], [buffer[:PIECE_BYTES]], start)
                output.write(buffer[: output_bytes * (index + 1) // len(pieces) - output_bytes * index // len(pieces)])
            if flush:
                os.fsync(output.fileno())
        finally:
            for file in files.values():
                os.close(file)
