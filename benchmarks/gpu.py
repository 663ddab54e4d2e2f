"""Conversions on a GPU beside the same ones on the CPU, and what the machine could do at best. Without a GPU it measures nothing.

    PYTHONPATH=. python benchmarks/gpu.py                # ends soon after --minutes at the latest
    PYTHONPATH=. python benchmarks/gpu.py --kernel-only  # the numerics alone, on weights that are on the GPU already, by all kernels

Needs the repository, torch for CUDA and the dependencies of the package; 20 GB of disk in --folder. All conversions are done in one
process, so that times are without the start of Python and of CUDA, which are told apart; flushing to the disk and reading headers back are
in them.

First every scheme and observer converts a small checkpoint, and examples/wiki-llama, on the CPU, on one GPU, and on all if there are
several: each file of the outputs must be the same. Then the large one is converted. A run that would not end in time, going by that of
the small checkpoint, is left out.
"""

import argparse
import filecmp
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from floors import memory_bandwidth, read_and_write
from measure import GIGABYTE, measure_ok, print_header, print_row, shard_bytes
from synthetic import llama, write_checkpoint

import streamquant
from streamquant.kernels import find_kernels
from streamquant.memory import GPU_BLOCK_ELEMENTS, available_cpus
from streamquant.plan import Encode
from streamquant.schemes import Scheme, find_scheme

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "wiki-llama"
SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM", "MXFP8", "MXFP4", "NVFP4A16")
SEARCHED = ("W4A16", "FP8_BLOCK", "NVFP4A16")  # also with the mse observer
EVERY_GPU = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
DEVICES = ("cpu", "cuda:0", *([EVERY_GPU] if torch.cuda.device_count() > 1 else []))
KERNELS = ("torch", "auto")
COPY_BYTES = 256 << 20
NUM_COPIES = 10
KERNEL_COLUMNS = 4096
KERNEL_SECONDS = 0.5


class Case(NamedTuple):
    """How to quantize, and where."""

    scheme: str
    observer: str
    device: str


class Run(NamedTuple):
    """What a conversion took."""

    seconds: float
    gpu_bytes: int  # largest allocation, on the GPU that has most


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine does at best, in bytes a second."""

    read: float
    write: float
    write_flushed: float
    to_gpu: float
    from_gpu: float


def main() -> None:
    """Measure the machine, compare the devices' outputs, then measure conversions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint whose conversion is measured")
    parser.add_argument("--small-gigabytes", type=float, default=1.0, help="size of the checkpoint whose outputs are compared")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--searched", nargs="*", default=SEARCHED, metavar="SCHEME", help="schemes to run with the mse observer, too")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=7.5, help="begin no run that would end later")
    parser.add_argument("--kernel-only", action="store_true", help="time the numerics on the GPU and nothing else")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    _print_machine()
    cases = [Case(scheme, "minmax", device) for scheme in arguments.schemes for device in DEVICES]
    cases += [Case(scheme, "mse", device) for device in reversed(DEVICES) for scheme in arguments.searched]
    if arguments.kernel_only:
        _print_kernels([case for case in cases if case.device == "cuda:0"])
        return
    folder = Path(tempfile.mkdtemp(prefix="gpu-", dir=arguments.folder))
    try:
        small, large = folder / "small", folder / "large"
        for source, gigabytes in ((small, arguments.small_gigabytes), (large, arguments.gigabytes)):
            tensors, config = llama(int(gigabytes * GIGABYTE))
            write_checkpoint(source, tensors, config, shard_bytes=5_000_000_000)
        rates = _measure_rates(large, folder)
        same, times = _compare_devices(small, folder, cases)
        growth = _encoded_bytes(large, arguments.schemes[0]) / _encoded_bytes(small, arguments.schemes[0])
        expected = {case: seconds * growth for case, seconds in times.items()}
        _print_conversions(large, folder, cases, arguments.repeats, rates, deadline, expected=expected)
    finally:
        shutil.rmtree(folder)
    if not same:
        sys.exit("the outputs of the devices differ")


# --- the machine --------------------------------------------------------------------------------------------------------


def _print_machine() -> None:
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(", ".join(f"{gpu.name}, {gpu.total_memory / GIGABYTE:.0f} GB" for gpu in gpus), end="; ")
    print(f"{available_cpus()} CPUs: {next(iter(models), 'unknown')}, {memory / GIGABYTE:.0f} GB; ", end="")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}, ", end="")
    print(f"streamquant {streamquant.__version__}; ", end="")
    print(f"kernels: {', '.join(find_kernels('auto', torch.device(device)).name for device in ('cpu', 'cuda'))}\n", flush=True)


def _measure_rates(source: Path, folder: Path) -> Rates:
    """Measure and print what the machine does at best."""
    starts = {"start of streamquant": "import streamquant.cli", "start of torch and CUDA": "import torch; torch.empty(1, device='cuda')"}
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    print_header("floor", "measured")
    for name, code in starts.items():
        print_row(name, f"{measure_ok([sys.executable, '-c', code], log=folder / 'log', environment=environment).seconds:.1f} s")
    on_host, on_gpu = torch.empty(COPY_BYTES, dtype=torch.uint8), torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    pinned = on_host.pin_memory()
    rates = Rates(
        read=_disk_rate(source, folder, output_bytes=0),
        write=_disk_rate(source, folder, read=False),
        write_flushed=_disk_rate(source, folder, read=False, flush=True),
        to_gpu=_copy_rate(pinned, on_gpu),
        from_gpu=_copy_rate(on_gpu, pinned),
    )
    figures = {
        "reading the source from the page cache": rates.read,
        "writing as many bytes": rates.write,
        "the same, flushed to the disk": rates.write_flushed,
        "copying to the GPU from pinned memory": rates.to_gpu,
        "copying to the GPU from other memory": _copy_rate(on_host, on_gpu),
        "copying from the GPU to pinned memory": rates.from_gpu,
        "copying from the GPU to other memory": _copy_rate(on_gpu, on_host),
        "copying in memory, read and written": memory_bandwidth(available_cpus()) * GIGABYTE,
    }
    for name, rate in figures.items():
        print_row(name, f"{rate / GIGABYTE:.1f} GB/s")
    return rates


def _disk_rate(source: Path, folder: Path, *, output_bytes: int | None = None, read: bool = True, flush: bool = False) -> float:
    num_bytes = shard_bytes(source)
    output_bytes = num_bytes if output_bytes is None else output_bytes
    os.sync()
    out, num_threads = folder / "transfer", available_cpus()
    return num_bytes / read_and_write(source, out, output_bytes=output_bytes, num_threads=num_threads, read=read, flush=flush).seconds


def _copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    seconds = []
    for _ in range(NUM_COPIES):
        started = time.monotonic()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    return source.nbytes / statistics.median(seconds)


# --- conversions --------------------------------------------------------------------------------------------------------


def _convert(source: Path, out: Path, case: Case) -> Run:
    os.sync()  # what was written before is not to be flushed now
    torch.cuda.empty_cache()
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    started = time.monotonic()
    streamquant.convert(source, out, scheme=case.scheme, observer=case.observer, device=case.device)
    seconds = time.monotonic() - started
    return Run(seconds, max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())))


def _encoded_bytes(source: Path, scheme: str) -> int:
    return sum(step.source_bytes for step in streamquant.plan(source, scheme=scheme).steps if isinstance(step, Encode))


def _compare_devices(small: Path, folder: Path, cases: list[Case]) -> tuple[bool, dict[Case, float]]:
    """Whether all devices make the same files of each source, and how long each case took with the small one."""
    sources = [EXAMPLE, small] if EXAMPLE.is_dir() else [small]
    times: dict[Case, float] = {}
    all_same = True
    print(f"\nFiles of the outputs, for {' and '.join(source.name for source in sources)} ({shard_bytes(small) / GIGABYTE:.1f} GB):\n")
    print_header("scheme", "observer", *(f"{small.name}, {device}" for device in DEVICES), "files")
    for scheme, observer in dict.fromkeys((case.scheme, case.observer) for case in cases):
        different: list[str] = []
        num_files = 0
        for source in sources:
            outs = {device: folder / device for device in DEVICES}
            for device, out in outs.items():
                times[Case(scheme, observer, device)] = _convert(source, out, Case(scheme, observer, device)).seconds
            names = sorted({path.name for out in outs.values() for path in out.iterdir()})
            for device in DEVICES[1:]:
                _, differing, missing = filecmp.cmpfiles(outs["cpu"], outs[device], names, shallow=False)
                different += [f"{source.name}/{name} on {device}" for name in (*differing, *missing)]
            num_files += len(names)
            for out in outs.values():
                shutil.rmtree(out)
        seconds = (f"{times[Case(scheme, observer, device)]:.1f} s" for device in DEVICES)
        print_row(scheme, observer, *seconds, f"**differ**: {', '.join(different)}" if different else f"{num_files} are the same")
        all_same = all_same and not different
    return all_same, times


def _print_conversions(
    source: Path, folder: Path, cases: list[Case], repeats: int, rates: Rates, deadline: float, *, expected: dict[Case, float]
) -> None:
    """Convert `source` in each case, as far as there is time for what it is `expected` to take."""
    print(f"\n{shard_bytes(source) / GIGABYTE:.1f} GB, {repeats} repeats. Shares are of the time that the transfer alone would take.\n")
    print_header(
        *("scheme", "observer", "device", "time", "speed", "of the CPU's", "of minmax"),
        *("share of reading and writing", "of the same, flushed", "of the bus", "GPU memory"),
    )
    medians: dict[Case, float] = {}
    for case in cases:
        if time.monotonic() + expected[case] * repeats > deadline:
            print_row(*case, f"no time: would take {expected[case]:.0f} s", *[""] * 7)
            continue
        runs = []
        for _ in range(repeats):
            runs.append(_convert(source, folder / "out", case))
            shutil.rmtree(folder / "out")
        seconds = medians[case] = statistics.median(run.seconds for run in runs)
        others = (case._replace(device="cpu"), case._replace(observer="minmax"))
        speedups = (f"{medians[other] / seconds:.2f}" if other != case and other in medians else "" for other in others)
        memory = f"{max(run.gpu_bytes for run in runs) / GIGABYTE:.2f} GB" if case.device != "cpu" else ""
        speed = f"{shard_bytes(source) / seconds / GIGABYTE:.2f} GB/s"
        print_row(*case, f"{seconds:.2f} s", speed, *speedups, *_shares(source, case, seconds, rates), memory)


def _shares(source: Path, case: Case, seconds: float, rates: Rates) -> list[str]:
    """Which part of the time each transfer alone would take: the page cache, the disk, the buses to the GPUs and back at once."""
    plan = streamquant.plan(source, scheme=case.scheme, observer=case.observer)
    encoded = [step for step in plan.steps if isinstance(step, Encode)]
    reading = plan.source_bytes / rates.read
    to_gpu = sum(step.source_bytes for step in encoded) / rates.to_gpu
    from_gpu = sum(spec.num_bytes for step in encoded for spec in step.outputs) / rates.from_gpu
    shares = [reading + plan.output_bytes / rate for rate in (rates.write, rates.write_flushed)]
    bus = f"{max(to_gpu, from_gpu) / seconds / len(case.device.split(',')):.0%}" if case.device != "cpu" else ""
    return [*(f"{share / seconds:.0%}" for share in shares), bus]


# --- numerics alone -----------------------------------------------------------------------------------------------------


def _print_kernels(cases: list[Case]) -> None:
    """Time observing and encoding of a block as large as a conversion's on a GPU."""
    shape = (GPU_BLOCK_ELEMENTS // KERNEL_COLUMNS, KERNEL_COLUMNS)
    on_gpu = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    bus = _copy_rate(torch.empty(COPY_BYTES, dtype=torch.uint8).pin_memory(), on_gpu)
    print(f"bfloat16 weights of {shape[0]} x {shape[1]} on the GPU, in bytes of the weight; the bus to it has {bus / GIGABYTE:.1f} GB/s:\n")
    print_header("scheme", "observer", "kernels", "observe", "encode", "both", "times the bus", "bits")
    found = dict.fromkeys(find_kernels(name, torch.device("cuda")) for name in KERNELS)
    for case in cases:
        scheme = find_scheme(case.scheme, observer=case.observer)
        weight_NK = torch.empty(shape, device=case.device).normal_(0.0, 0.02).to(torch.bfloat16)
        reference = scheme.encode_whole(weight_NK)
        for kernels in found:
            bounds_BRC = scheme.observe(weight_NK, kernels=kernels)
            encode = partial(scheme.encode, weight_NK, bounds_BRC, shared=_shared(scheme, bounds_BRC), kernels=kernels)
            seconds = (_seconds(partial(scheme.observe, weight_NK, kernels=kernels)), _seconds(encode))
            rates = [weight_NK.nbytes / taken for taken in (*seconds, sum(seconds))]
            same = all(torch.equal(tensor.view(torch.uint8), reference[suffix].view(torch.uint8)) for suffix, tensor in encode().items())
            figures = (*(f"{rate / GIGABYTE:.1f} GB/s" for rate in rates), f"{rates[-1] / bus:.1f}", "same" if same else "**differ**")
            print_row(case.scheme, case.observer, kernels.name, *figures)


def _shared(scheme: Scheme, bounds_BRC: torch.Tensor) -> torch.Tensor | None:
    return scheme.share(bounds_BRC.abs().amax().view(1), torch.bfloat16) if scheme.shares_amax else None


def _seconds(work: Callable[[], object]) -> float:
    """The mean time of a call and of waiting for its end, as a conversion does."""
    work()
    torch.cuda.synchronize()
    count, started = 0, time.monotonic()
    while count == 0 or time.monotonic() - started < KERNEL_SECONDS:
        work()
        count += 1
        torch.cuda.synchronize()
    return (time.monotonic() - started) / count


if __name__ == "__main__":
    main()
