"""The command line: parses, prints, exits; nothing else does. Flags are the arguments of the functions they call."""

import gc
import inspect as introspection
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

import streamquant
from streamquant import report
from streamquant.calibrate.method import COMPUTE_DTYPES, METHODS
from streamquant.checkpoint.url import without_secrets
from streamquant.convert import KV_CACHES, plan_memory, resolve_devices
from streamquant.engines import check, find_engine
from streamquant.errors import RequestError, StreamquantError, one_line
from streamquant.inputs import LAYOUTS
from streamquant.kernels import KERNELS, find_kernels
from streamquant.output import require_outside
from streamquant.progress import LOGGER, TO_STDERR, JsonLog, narrate
from streamquant.schemes import FORMATS
from streamquant.schemes.observers import OBSERVERS

GC_THRESHOLD = 1_000_000
NOT_PLANNED = (
    "method", "clip", "calibration_data", "samples", "sequence_length", "packed", "seed", "max_fallback", "compute_dtype",
    "allow_nonfinite", "cache", "restart", "trace",
)  # fmt: skip
EXIT_BUG = 1  # as Python exits after a traceback
EXIT_IO = 4
EXIT_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_INTERRUPTED = 130

Command = Callable[..., None]

REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of a SOURCE on the Hub; the default branch if not given.")
EXPERT_LAYOUT = click.option(
    "--expert-layout", type=click.Choice(LAYOUTS), help="How experts are stacked in 3-D, where the model type does not tell."
)


def _default(name: str) -> Any:
    return introspection.signature(streamquant.convert).parameters[name].default


def _recipe_options(command: Command) -> Command:
    """The options that decide what a conversion does, shared by `convert` and `plan`."""
    options = [
        REVISION,
        click.option(
            "--scheme",
            metavar="SCHEME",
            help="Preset for every linear weight that is not kept (see `streamquant schemes`), "
            "or several by role or pattern: experts=NVFP4A16, attention=keep, W8A8.",
        ),
        click.option("--recipe", metavar="FILE", help="TOML file of ordered rules: pattern -> scheme or keep."),
        click.option(
            "--ignore", metavar="PATTERN", multiple=True, help="Keep these modules: a role, a name, a glob or re:REGEX. Repeatable."
        ),
        click.option("--include", metavar="PATTERN", multiple=True, help="Quantize these although they are kept by default. Repeatable."),
        click.option("--observer", type=click.Choice(list(OBSERVERS)), help="How bounds of weights are found; minmax if not given."),
        click.option("--group-size", type=int, metavar="N", help="Columns that share a scale, for integer schemes."),
        click.option("--symmetric/--asymmetric", default=None, help="Without or with zero points, for weight-only integer schemes."),
        click.option(
            "--strategy", type=click.Choice(["tensor", "channel", "group", "block"]), help="What shares a scale, for schemes with a choice."
        ),
        click.option("--scale-dtype", type=click.Choice(["weight", "float32"]), help="Dtype of FP8 and INT8 scales."),
        click.option("--format", type=click.Choice(FORMATS), default=_default("format"), show_default=True, help="fp8: native block FP8."),
        click.option("--kv-cache", type=click.Choice(KV_CACHES), help="Measure scales for keys and values, with calibration data."),
        EXPERT_LAYOUT,
        click.option("--max-shard-size", metavar="SIZE", default=_default("max_shard_size"), show_default=True, help="Of an output file."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _calibration_options(command: Command) -> Command:
    """The options of methods that take data."""
    options = [
        click.option(
            "--method",
            type=click.Choice(list(METHODS)),
            default=_default("method"),
            show_default=True,
            help="rtn rounds, without data; the others calibrate.",
        ),
        click.option("--clip/--no-clip", default=None, help="Let groups clip their largest weights if that helps; awq does."),
        click.option(
            "--calibration-data", metavar="DATA", help="Text, JSONL, folder, or data set on the Hub; a text comes with the package."
        ),
        click.option("--samples", type=int, metavar="N", help="Sequences to calibrate with; 512 if not given."),
        click.option("--sequence-length", type=int, metavar="N", help="Tokens of a sequence; 2048 if not given."),
        click.option("--packed/--per-sample", default=None, help="Cut joined texts into sequences, or take each text as one."),
        click.option("--seed", type=int, metavar="N", help="Of the choice of samples; 0 if not given."),
        click.option("--max-fallback", type=float, metavar="PART", help="Of the weights, left to plain rounding; 0.05 if not given."),
        click.option("--compute-dtype", type=click.Choice(COMPUTE_DTYPES), help="In which layers are run; auto: what is faster."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _machine_options(command: Command) -> Command:
    """The options that decide how a conversion is done, and change no byte of it."""
    options = [
        click.option("--device", default=_default("device"), show_default=True, metavar="auto|cpu|cuda[:N],...", help="Where to compute."),
        click.option("--max-memory", metavar="SIZE", help="Working memory on top of the interpreter; 256MiB, with a GPU 2GiB."),
        click.option("--max-gpu-memory", metavar="SIZE", help="Working memory on each GPU; 80 % of what is free if not given."),
        click.option("--threads", type=int, metavar="N", help="Workers; one for each processor if not given, at least four for a GPU."),
        click.option(
            "--kernels",
            type=click.Choice(KERNELS),
            default=_default("kernels"),
            show_default=True,
            help="What computes: numba on a CPU, triton on a GPU, torch on both.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(streamquant.__version__, prog_name="streamquant")
def cli() -> None:
    """Turn a checkpoint into a quantized one, streaming it: no model is built, no shard is held in memory."""


@cli.command()
@click.argument("source")
@click.argument("out")
@_recipe_options
@_calibration_options
@_machine_options
@click.option("--allow-nonfinite", is_flag=True, help="Store NaN and infinite weights as zeros instead of stopping.")
@click.option("--cache", is_flag=True, help="Download a SOURCE on the Hub into its cache instead of streaming it.")
@click.option("--restart", is_flag=True, help="Discard what an unfinished run of another job has written into OUT.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--report", "report_file", metavar="FILE.json", help="Write what was done to a JSON file.")
@click.option("--log-json", metavar="FILE", help="Append what happens to a file, a JSON object a line; - for stderr.")
@click.option("--trace", metavar="FILE", help="Write a timeline of what each thread does, for chrome://tracing or Perfetto.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def convert(source: str, out: str, *, dry_run: bool, report_file: str | None, log_json: str | None, quiet: bool, **options: Any) -> None:
    """Quantize the checkpoint SOURCE (a directory or a .safetensors file) into the new directory OUT.

    Run the same command again after it was killed, and it goes on where it was.
    """
    with _logged(log_json, source=source, out=out, dry_run=dry_run, settings=options) as log:
        if dry_run:
            machine = {name: options.pop(name) for name in ("device", "max_memory", "max_gpu_memory", "threads", "kernels")}
            for name in NOT_PLANNED:
                del options[name]
            _print_plan(source, as_json=False, machine=machine, options=options)
            log.write("done", dry_run=True)
            return
        with narrate(log, quiet=quiet) as on_progress:
            conversion = streamquant.convert(source, out, on_progress=on_progress, **options)
            done = conversion.to_json()
            if report_file is not None:
                Path(report_file).write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
            counted = {name: len(value) if isinstance(value, dict | list) else value for name, value in done.items()}
            LOGGER.info("%s is complete and verified", out, extra={"event": "done", "figures": counted})
        if not quiet:
            click.echo(_text(report.conversion_lines(conversion)))


@contextmanager
def _logged(file: str | None, *, source: str, out: str, **figures: Any) -> Iterator[JsonLog]:
    """A log that begins with what is to be done, and ends with the error if there is one."""
    if file is not None and file != TO_STDERR:
        require_outside(out, file, option="--log-json")
    with JsonLog(file) as log:
        log.write("start", streamquant=streamquant.__version__, source=without_secrets(source), out=out, **figures)
        try:
            yield log
        except BaseException as error:
            failure = _failure(error)
            message, exit_code = failure or (f"a bug: {type(error).__name__}, with a traceback on stderr", EXIT_BUG)
            log.write("error", message=message, exit_code=exit_code)
            if failure is not None and log.is_stderr:
                sys.exit(exit_code)
            raise


@cli.command()
@click.argument("source")
@_recipe_options
@_machine_options
@click.option("--engine", metavar="vllm|sglang|transformers", help="Also check what this engine loads; exit 2 if not everything.")
@click.option("--tp", type=int, metavar="N", help="Tensor-parallel ranks of the engine; 1 if not given.")
@click.option("--json", "as_json", is_flag=True, help="Every tensor, as JSON.")
def plan(
    source: str,
    *,
    engine: str | None,
    tp: int | None,
    as_json: bool,
    device: str,
    max_memory: str | None,
    max_gpu_memory: str | None,
    threads: int | None,
    kernels: str,
    **options: Any,
) -> None:
    """Show what `convert` would do: what happens to each tensor, sizes, memory."""
    if tp is not None and engine is None:
        raise RequestError(f"--tp {tp} says on how many ranks an engine runs; say which with --engine")
    machine = {
        "device": device, "max_memory": max_memory, "max_gpu_memory": max_gpu_memory, "threads": threads, "kernels": kernels
    }  # fmt: skip
    _print_plan(source, as_json=as_json, machine=machine, options=options, engine=engine, tp=1 if tp is None else tp)


def _print_plan(
    source: str, *, as_json: bool, machine: dict[str, Any], options: dict[str, Any], engine: str | None = None, tp: int = 1
) -> None:
    target = None if engine is None else find_engine(engine, tp=tp)
    the_plan = streamquant.plan(source, **options)
    devices = resolve_devices(machine.pop("device"))
    memory = plan_memory(the_plan, devices=devices, **machine | {"kernels": find_kernels(machine["kernels"], *devices)})
    findings = [] if engine is None else check(the_plan, engine=engine, tp=tp)
    if as_json:
        parts = the_plan.json_parts()
        if target is not None:  # a key more, put before the others: they come in parts because there can be 80 MB of them
            stated = {"name": target.title, "version": target.version, "checked": str(target.checked), "tp": tp}
            checked = json.dumps({"engine": stated | {"findings": [asdict(finding) for finding in findings]}})
            click.echo(checked[:-1] + ", " + next(parts).removeprefix("{"), nl=False)
        for part in parts:
            click.echo(part, nl=False)
        click.echo()
    else:
        click.echo(_text(report.plan_lines(the_plan, memory)))
        if target is not None:
            click.echo(_text(["", *report.engine_lines(target, findings, tp=tp)]))
    problems = [finding for finding in findings if not finding.conditional]
    if target is not None and problems:
        others = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise RequestError(f"{target.title} {target.version} does not load {problems[0].layers}{others} (way out: {problems[0].remedy})")


@cli.command()
@click.argument("source")
@REVISION
@click.option("--json", "as_json", is_flag=True, help="Every tensor, as JSON.")
def inspect(source: str, *, revision: str | None, as_json: bool) -> None:
    """Show what is in a checkpoint, from its headers."""
    inspection = streamquant.inspect(source, revision=revision)
    click.echo(json.dumps(inspection.to_json()) if as_json else _text(report.inspection_lines(inspection)))


@cli.command()
@click.argument("out")
@click.option("--against", metavar="SOURCE", help="Also compare every tensor with its source.")
@REVISION
@EXPERT_LAYOUT
@click.option("--json", "as_json", is_flag=True, help="Every tensor, as JSON.")
def verify(out: str, *, against: str | None, revision: str | None, expert_layout: str | None, as_json: bool) -> None:
    """Check a quantized checkpoint: inventory, index, shapes, scales, checksums; exit 6 if anything is off."""
    if revision is not None and against is None:
        raise RequestError(f"--revision {revision} is one of a source; say of which with --against")
    result = streamquant.verify(out, against=against, revision=revision, expert_layout=expert_layout)
    click.echo(json.dumps(result.to_json()) if as_json else _text(report.verification_lines(result)))
    if result.problems:
        raise streamquant.VerificationError(f"{out}: {len(result.problems)} problems")


@cli.command()
def schemes() -> None:
    """List the schemes: bits per weight, how they are stored, which engines load them."""
    click.echo(_text(report.scheme_lines()))


def main() -> None:
    """Run the command line; expected failures are one line on stderr and an exit code."""
    # A plan is millions of objects that all live; looking for garbage among them takes half of the time of planning.
    gc.set_threshold(GC_THRESHOLD)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        _run()
    except _Terminated as error:  # also while another failure was being told
        _fail(error)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is said and done; what is left is leaving
        gc.freeze()  # or Python would look for garbage once more, in torch and all


def _run() -> None:
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BaseException as error:
        if isinstance(error, _Terminated) or _failure(error) is None:
            raise
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    failure = _failure(error)
    assert failure is not None
    message, exit_code = failure
    click.echo(f"error: {message}", err=True)
    sys.exit(exit_code)


def _failure(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error, and the exit code; None for a bug of ours, which keeps its traceback."""
    match error:
        case StreamquantError():
            return str(error), error.exit_code
        case click.Abort() | KeyboardInterrupt():
            return "interrupted; the same command goes on where it was", EXIT_INTERRUPTED
        case _Terminated():
            return "stopped by SIGTERM; the same command goes on where it was", EXIT_TERMINATED
        case OSError():
            return one_line(f"{error.filename or 'reading or writing'}: {error.strerror or error}"), EXIT_IO
    return None


class _Terminated(BaseException):
    """SIGTERM came. As with KeyboardInterrupt, what is being worked on is finished and noted on the way out."""


def _terminate(number: int, frame: object) -> None:
    del frame
    signal.signal(number, signal.SIG_IGN)
    raise _Terminated


def _text(lines: Iterable[str]) -> str:
    """Lines as they are printed, whoever wrote the names and the settings in them."""
    return "\n".join(map(one_line, lines))
