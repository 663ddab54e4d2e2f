"""The use cases: convert a checkpoint, and plan that without doing it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from streamquant.calibrate.method import make_calibration_wish
from streamquant.checkpoint.checkpoint import read_checkpoint, require_unchanged
from streamquant.checkpoint.journal import WORK_FOLDER, Journal
from streamquant.checkpoint.layout import MISTRAL_CONFIG_NAME
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.open_source import open_source
from streamquant.checkpoint.source import Source
from streamquant.errors import RequestError, VerificationError
from streamquant.inputs import Inventory, find_weights
from streamquant.kernels import find_kernels
from streamquant.lazy import torch
from streamquant.memory import LANES_PER_GPU, Gpus, Memory, available_cpus, budget_gpu_memory, budget_memory, container_for
from streamquant.output import files_of, finish, is_done, is_finished, job_of, require_outside, require_space
from streamquant.plan import Copy, Encode, Plan, make_plan
from streamquant.recipe import Recipe, make_recipe
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.plain import Plain
from streamquant.sizes import format_bytes, parse_size
from streamquant.stream import OnProgress, Progress, bytes_to_do, spool_bytes, stream_shards
from streamquant.trace import Trace
from streamquant.verify import verify
from streamquant.version import __version__

if TYPE_CHECKING:
    from streamquant.calibrate.run import CalibrationReport, Preparation

KV_CACHES: Final = ("fp8",)
DEFAULT_MAX_SHARD_SIZE: Final = "5GB"
DEFAULT_MEMORY: Final = {"cpu": "256MiB", "cuda": "2GiB"}
GPU_SHARE: Final = (4, 5)  # of a GPU's free memory, unless --max-gpu-memory says how much
LOGGER = logging.getLogger("streamquant")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did."""

    out: str
    plan: Plan
    memory: Memory
    device: str  # or several, with commas
    kernels: str  # by which it was computed
    resumed_shards: int  # finished by an earlier run of the same job
    nonfinite: tuple[str, ...]  # weights with NaN or infinities, stored as zeros
    seconds: float
    calibration: CalibrationReport | None = None  # of a method that takes data, unless an earlier run had finished

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        steps = list(self.plan.steps)
        encoded = [step for step in steps if isinstance(step, Encode)]
        stored = [step for step in encoded if not isinstance(step.scheme, Plain)]
        plain = [step for step in encoded if isinstance(step.scheme, Plain) and not step.unpacks]
        taken_from_stacks = {member.weight.name: step.reason for step in plain for member in step.members}
        rescaled = dict.fromkeys(() if self.calibration is None else self.calibration.rescaled)
        copied = {step.source.name: step.reason for step in steps if isinstance(step, Copy)}
        return {
            "streamquant": __version__,
            "source": self.plan.checkpoint.source,
            "revision": self.plan.checkpoint.revision,
            "out": self.out,
            "device": self.device,
            "kernels": self.kernels,
            "seconds": round(self.seconds, 3),
            "source_bytes": self.plan.source_bytes,
            "output_bytes": self.plan.output_bytes,
            "shards": [shard.file for shard in self.plan.shards],
            "resumed_shards": self.resumed_shards,
            "predicted_memory_bytes": self.memory.peak_bytes,
            "predicted_gpu_memory_bytes": self.memory.gpu_peak_bytes,
            "quantized": {member.weight.name: step.scheme.preset for step in stored for member in step.members},
            "as_stored": [member.weight.name for step in stored if step.keeps_codes for member in step.members],
            "unpacked": {member.weight.name: step.scheme.preset for step in encoded if step.unpacks for member in step.members},
            "kept": {name: reason for name, reason in (copied | taken_from_stacks).items() if name not in rescaled},
            "rescaled": list(rescaled),
            "dropped": dict(self.plan.dropped),
            "left_out": dict(self.plan.checkpoint.left_out),
            "nonfinite": list(self.nonfinite),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
        }


def plan(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    scheme: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    observer: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    strategy: str | None = None,
    scale_dtype: str | None = None,
    format: str = "compressed-tensors",
    kv_cache: str | None = None,
    expert_layout: str | None = None,
    max_shard_size: str | int = DEFAULT_MAX_SHARD_SIZE,
) -> Plan:
    """What `convert` would do with the same arguments, from headers and config alone.

    Raises RequestError for a wish that cannot be met, CheckpointError for a source that is damaged or not supported.
    """
    wish = make_recipe(
        scheme=scheme,
        recipe=None if recipe is None else Path(recipe),
        ignore=ignore,
        include=include,
        format=format,
        observer=observer,
        group_size=group_size,
        symmetric=symmetric,
        strategy=strategy,
        scale_dtype=scale_dtype,
    )
    with open_source(source, revision=revision) as opened:
        return _plan(opened, wish, format=format, kv_cache=kv_cache, expert_layout=expert_layout, max_shard_size=max_shard_size)[0]


def _plan(
    source: Source, wish: Recipe, *, format: str, kv_cache: str | None, expert_layout: str | None, max_shard_size: str | int
) -> tuple[Plan, Inventory]:
    max_shard_bytes = parse_size(max_shard_size)
    if kv_cache not in {None, *KV_CACHES}:
        raise RequestError(f"unknown KV cache {kv_cache!r}; known are {', '.join(KV_CACHES)}")
    checkpoint = read_checkpoint(source)
    if format != "compressed-tensors" and checkpoint.layout.config_name == MISTRAL_CONFIG_NAME:
        raise RequestError(f"{MISTRAL_CONFIG_NAME} describes compressed-tensors only; leave out --format {format}")
    inventory = find_weights(checkpoint, source, expert_layout=expert_layout)
    return make_plan(checkpoint, inventory, wish, max_shard_bytes=max_shard_bytes, fp8_cache=kv_cache is not None), inventory


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    scheme: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    observer: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    strategy: str | None = None,
    scale_dtype: str | None = None,
    format: str = "compressed-tensors",
    kv_cache: str | None = None,
    expert_layout: str | None = None,
    max_shard_size: str | int = DEFAULT_MAX_SHARD_SIZE,
    method: str = "rtn",
    clip: bool | None = None,
    calibration_data: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    packed: bool | None = None,
    seed: int | None = None,
    max_fallback: float | None = None,
    compute_dtype: str | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    max_gpu_memory: str | int | None = None,
    threads: int | None = None,
    kernels: str = "auto",
    allow_nonfinite: bool = False,
    cache: bool = False,
    restart: bool = False,
    trace: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Quantize the checkpoint `source`, a directory or a .safetensors file, into the new directory `out`.

    revision: branch, tag or commit of a source on the Hub; pinned to the commit when the conversion begins.
    scheme: preset (see `streamquant schemes`; "BF16" unpacks a quantized source) for every linear weight that is not kept, or several
    by role or pattern
        ("experts=NVFP4A16,attention=FP8_BLOCK"); or None, with a `recipe`.
    recipe: TOML file of ordered rules (recipe.py); its rules come before `scheme`.
    ignore, include: patterns of modules to keep, and of modules to quantize although they are kept by default.
    observer, group_size, symmetric, strategy, scale_dtype: settings of each scheme in `scheme` in place of its own.
    format: "compressed-tensors", or "fp8" for native block FP8.
    kv_cache: "fp8" measures scales for keys and values, with calibration data.
    expert_layout: "rows", "columns" or "interleaved": how experts are stacked in 3-D tensors (inputs/experts.py), if the model
    type does not tell.
    max_shard_size: bytes, or a size such as "5GB", of a file of the output.
    method: "rtn" rounds, with data only for schemes that store activation scales; "gptq", "awq", "smoothquant", "awq+gptq" and
        "smoothquant+gptq" calibrate, one decoder layer at a time (extra `calibrate`).
    clip: with a method that calibrates, choose for each group of columns how much of its largest weights to clip, for the least error of
        the outputs; None: with "awq" and "awq+gptq".
    calibration_data: text, JSONL or JSON file, folder of such files, or data set on the Hub; None: a text that comes with the package.
    samples, sequence_length: how many sequences, of at most how many tokens; 512 of 2048. packed: texts are joined and cut into sequences
        of one length, else each is one. seed: of the choice of samples.
    max_fallback: the part of all weights that may be left to plain rounding, 0.05, before calibration counts as failed.
    compute_dtype: of the products by which layers are run: "float32", "bfloat16", or "auto" for what the device is faster with.
    device: "auto" takes a GPU if there is one, else the CPU; also "cpu", "cuda", "cuda:1", or several GPUs: "cuda:0,cuda:1". The output
        is the same.
    max_memory: working memory on top of the interpreter; None: 256MiB, with a GPU 2GiB, of which what is copied is page-locked.
    max_gpu_memory: working memory on each GPU; None: 80 % of what is free.
    threads: workers; None: one for each processor that this process may use, and at least four for each GPU.
    kernels: "numba" compiles for the processor (extra `fast`), "triton" for GPUs, "torch" needs nothing else and is slower; the output
        is the same. "auto" takes what is installed.
    allow_nonfinite: store NaN and infinite weights as zeros instead of stopping.
    cache: download a source on the Hub into its ordinary cache first, instead of streaming it.
    restart: discard what an unfinished run of another job has written into `out`.
    trace: file for a timeline of what each thread does, in Chrome's trace format (trace.py).
    on_progress: called from worker threads, one call at a time.

    A run that was killed goes on when called again with the same arguments, at the tensor where it was. `out` gets its
    index and config last, so no half-written folder loads. Raises a StreamquantError, whose subclasses say whose fault it was;
    VerificationError means that the finished output does not read back as planned.
    """
    started = time.monotonic()
    out = Path(out)
    if trace is not None:
        require_outside(out, trace, option="--trace")
    devices = resolve_devices(device)
    found_kernels = find_kernels(kernels, *devices)
    wish = make_recipe(
        scheme=scheme,
        recipe=None if recipe is None else Path(recipe),
        ignore=ignore,
        include=include,
        format=format,
        observer=observer,
        group_size=group_size,
        symmetric=symmetric,
        strategy=strategy,
        scale_dtype=scale_dtype,
    )
    calibration_wish = make_calibration_wish(
        method,
        wish.schemes,
        fp8_cache=kv_cache is not None,
        clip=clip,
        data=None if calibration_data is None else os.fspath(calibration_data),
        samples=samples,
        sequence_length=sequence_length,
        packed=packed,
        seed=seed,
        max_fallback=max_fallback,
        compute_dtype=compute_dtype,
    )
    with open_source(source, revision=revision, cache=cache) as opened:
        the_plan, inventory = _plan(
            opened, wish, format=format, kv_cache=kv_cache, expert_layout=expert_layout, max_shard_size=max_shard_size
        )
        if isinstance(opened, LocalSource):
            _refuse_overlap(opened.folder, out)
        preparation = None
        if calibration_wish is not None:
            from streamquant.calibrate.run import prepare  # with transformers, which only this mode needs

            preparation = prepare(
                calibration_wish,
                the_plan,
                inventory,
                opened,
                device=devices[0],
                max_hidden_bytes=parse_size(DEFAULT_MEMORY[devices[0].type] if max_memory is None else max_memory),
                gpu_bytes=None if devices[0].type == "cpu" else _gpus(devices[:1], max_gpu_memory).max_bytes,
            )
        # Last, since what the process has by then, transformers too, is not free for work.
        memory = plan_memory(
            the_plan, kernels=found_kernels, devices=devices, max_memory=max_memory, max_gpu_memory=max_gpu_memory, threads=threads
        )
        _tell_plan(the_plan, memory, found_kernels)
        work = _Work(
            plan=the_plan,
            source=opened,
            out=out,
            job=job_of(the_plan, allow_nonfinite=allow_nonfinite, calibration=None if preparation is None else preparation.job),
            memory=memory,
            devices=devices,
            kernels=found_kernels,
            allow_nonfinite=allow_nonfinite,
            on_progress=on_progress,
        )
        done = work.do(preparation, restart=restart, trace=trace)
    LOGGER.info("reading %s back", out, extra={"event": "verify"})
    report = verify(out, checksums=False)  # they stem from the bytes just written
    if report.problems:
        more = f" (and {len(report.problems) - 1} more; see `streamquant verify {out}`)" if len(report.problems) > 1 else ""
        raise VerificationError(f"{out} does not read back as planned: {report.problems[0]}{more}")
    return Conversion(
        out=str(out),
        plan=the_plan,
        memory=memory,
        device=",".join(map(str, devices)),
        kernels=found_kernels.name,
        resumed_shards=done.resumed_shards,
        nonfinite=done.nonfinite,
        seconds=time.monotonic() - started,
        calibration=done.calibration,
    )


class _Done(NamedTuple):
    resumed_shards: int
    nonfinite: tuple[str, ...] = ()
    calibration: CalibrationReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A conversion that may write."""

    plan: Plan
    source: Source
    out: Path
    job: Mapping[str, Any]
    memory: Memory
    devices: Sequence[torch.device]
    kernels: Kernels
    allow_nonfinite: bool
    on_progress: OnProgress | None

    def do(self, preparation: Preparation | None, *, restart: bool, trace: str | os.PathLike[str] | None) -> _Done:
        """Write what is not written yet."""
        folder = self.out / WORK_FOLDER
        if is_finished(self.out, self.job):
            if folder.is_dir():  # killed while it was being removed
                shutil.rmtree(folder)
            return _Done(len(self.plan.shards))
        folder.mkdir(parents=True, exist_ok=True)
        with Journal(folder, self.job, files=files_of(self.plan), restart=restart) as journal:
            todo = [shard for shard in self.plan.shards if not is_done(shard, self.out, journal)]
            done = _Done(len(self.plan.shards) - len(todo))
            if done.resumed_shards or any(journal.steps.values()):
                LOGGER.info(
                    "going on where an earlier run was: %d of %d files are finished",
                    done.resumed_shards,
                    len(self.plan.shards),
                    extra={"event": "resume", "figures": {"finished_shards": done.resumed_shards}},
                )
            self.source.prepare(list(self.plan.checkpoint.identity))
            require_space(todo, out=self.out, work=folder, temporary_bytes=spool_bytes(todo, self.memory))
            total_bytes = bytes_to_do(todo, journal)
            if preparation is not None:
                calibration = preparation.calibrate(
                    todo,
                    work=folder,
                    journal=journal,
                    kernels=self.kernels,
                    allow_nonfinite=self.allow_nonfinite,
                    on_progress=self.on_progress,
                )
                done = done._replace(calibration=calibration)
            calibrated_bytes = total_bytes - bytes_to_do(todo, journal)
            with Trace(trace) as timeline:
                stream_shards(
                    todo,
                    self.source,
                    out=self.out,
                    work=folder,
                    journal=journal,
                    memory=self.memory,
                    devices=self.devices,
                    kernels=self.kernels,
                    allow_nonfinite=self.allow_nonfinite,
                    on_progress=self.on_progress and partial(_shifted, self.on_progress, calibrated_bytes),
                    trace=timeline,
                )
            require_unchanged(self.plan.checkpoint, self.source)
            rescaled = () if done.calibration is None else done.calibration.rescaled
            finish(self.plan, self.source, out=self.out, work=folder, job=self.job, journal=journal, rescaled=rescaled)
            done = done._replace(nonfinite=tuple(sorted(journal.nonfinite)))
            shutil.rmtree(folder)
        return done


def _shifted(on_progress: OnProgress, done_bytes: int, progress: Progress) -> None:
    """Tell of progress that comes after what was done before."""
    on_progress(Progress(progress.done_bytes + done_bytes, progress.total_bytes + done_bytes, progress.tensor))


def _tell_plan(the_plan: Plan, memory: Memory, kernels: Kernels) -> None:
    figures = {
        "source_bytes": the_plan.source_bytes,
        "output_bytes": the_plan.output_bytes,
        "shards": len(the_plan.shards),
        "workers": memory.num_workers,
        "kernels": kernels.name,
        "predicted_memory_bytes": memory.peak_bytes,
        "predicted_gpu_memory_bytes": memory.gpu_peak_bytes,
        "memory_limit_bytes": memory.limit_bytes,
    }
    LOGGER.info(
        "%s to read and %s to write in %d files, with %s of working memory in %d workers, kernels: %s",
        format_bytes(the_plan.source_bytes),
        format_bytes(the_plan.output_bytes),
        len(the_plan.shards),
        format_bytes(memory.peak_bytes),
        memory.num_workers,
        kernels.name,
        extra={"event": "plan", "figures": figures},
    )


def plan_memory(
    the_plan: Plan,
    *,
    devices: Sequence[torch.device],
    kernels: Kernels = TORCH,
    max_memory: str | int | None = None,
    max_gpu_memory: str | int | None = None,
    threads: int | None = None,
) -> Memory:
    """How `convert` spends its memory budgets on a plan.

    Raises RequestError if a budget is too small, or larger than what the container allows or a GPU has.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"{threads} threads are too few; at least 1")
    kind = devices[0].type
    max_bytes = parse_size(DEFAULT_MEMORY[kind] if max_memory is None else max_memory)
    container, is_remote, may_shrink = container_for(the_plan, devices=devices), the_plan.checkpoint.is_remote, max_memory is None
    if kind == "cpu":
        if max_gpu_memory is not None:
            raise RequestError(f"--max-gpu-memory {max_gpu_memory} is for GPUs, and this is done on the CPU; leave it out")
        return budget_memory(
            the_plan,
            max_bytes=max_bytes,
            num_workers=threads or available_cpus(),
            kernels=kernels,
            is_remote=is_remote,
            container=container,
            may_shrink=may_shrink,
        )
    return budget_gpu_memory(
        the_plan,
        max_bytes=max_bytes,
        num_workers=threads or max(available_cpus(), LANES_PER_GPU * len(devices)),
        gpus=_gpus(devices, max_gpu_memory),
        is_remote=is_remote,
        container=container,
        may_shrink=may_shrink,
    )


def _gpus(devices: Sequence[torch.device], max_memory: str | int | None) -> Gpus:
    """The GPUs, and what may be used of each. Raises RequestError if one has less than is asked for."""
    free = {device: _free_bytes(device) for device in devices}
    least = min(devices, key=lambda device: free[device])
    if max_memory is None:
        return Gpus(len(devices), free[least] * GPU_SHARE[0] // GPU_SHARE[1])
    asked = parse_size(max_memory)
    if asked > free[least]:
        raise RequestError(f"--max-gpu-memory {max_memory} is more than the {free[least]} bytes that are free on {least}")
    return Gpus(len(devices), asked)


def _free_bytes(device: torch.device) -> int:
    """Memory that no one uses, with what torch holds without using it."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def resolve_devices(device: str) -> tuple[torch.device, ...]:
    """The torch devices that a `device` argument means: the CPU or GPUs. Raises RequestError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return (torch.device(device),)
    devices = tuple(map(_resolve_gpu, device.split(",")))
    if len(set(devices)) < len(devices):
        raise RequestError(f"device {device} names a GPU twice")
    return devices


def _resolve_gpu(device: str) -> torch.device:
    kind, colon, index = device.partition(":")
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise RequestError(f"unknown device {device!r}; known are auto, cpu, cuda and cuda:N, or several of the last with commas")
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise RequestError(
            f"device {device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; --device cpu gives the same bytes"
        )
    return torch.device(kind, int(index) if colon else torch.cuda.current_device())


def _refuse_overlap(folder: Path, out: Path) -> None:
    source, target = folder.resolve(), out.resolve()
    if target == source or source in target.parents:
        raise RequestError(f"OUT {out} is inside SOURCE {folder}; choose another place")
    if target in source.parents:
        raise RequestError(f"OUT {out} contains SOURCE {folder}; choose another place")
