"""streamquant and llm-compressor's `oneshot` calibrating the same models with the same tokens, side by side.

    python benchmarks/calibrate.py --peer-python PYTHON [--models DIR ...] [--methods gptq awq] [--evaluate TEXT]
    python benchmarks/calibrate.py --peer-python PYTHON --synthetic 2 --samples 32 --repeats 1

PYTHON is the interpreter of an environment with llmcompressor; without it streamquant runs alone. Runs alternate, so that whatever else
the machine does falls on both; figures are medians of time and largest peaks of memory, of whole processes from the start of Python on,
on the CPU. Ratios are llm-compressor's figures divided by streamquant's. Where others use the processors too, set OMP_NUM_THREADS=1, which
both programs inherit: threads of OpenMP that wait for each other otherwise take several times as long, and not the same for both.

What is the same: the tokens (streamquant chooses windows of the text by its seed; llm-compressor gets these, tokenized already), how many
of them run through a layer at a time, the scheme, minmax as the observer, which modules are quantized, and what is stored: a line tells
if the outputs do not have the same tensors by name, dtype and shape. All else is as each program has it by default: llm-compressor runs
the model in the dtype of the checkpoint, with GPTQ in blocks of 128 columns, dampening 0.01 and actorder static, with AWQ a grid of 20
and its mappings for the architecture; streamquant runs products in bfloat16 where the processor has instructions for it
(--compute-dtype) and all else in float32, flushes its output to the disk and reads it back.

--synthetic measures, instead of models on the disk, one in the shape of Llama with random weights and the tokenizer of wiki-llama: memory
and time of layers of an ordinary size, of which nothing can be said about quality.

Seconds per layer are the median over the decoder layers of all runs: what streamquant's --log-json says of each, which includes reading
the weights and writing the codes; and the time from a pass of calibration to that of the next layer in llm-compressor's sequential
pipeline, which includes neither, nor with AWQ alone the rounding, and which AWQ and GPTQ together go through twice.

With --evaluate: perplexity, and mean KL divergence from the source in nats per token, over windows of 256 tokens, each by itself, in
float32. All variants of a model are in memory together. llm-compressor appears with minmax alone.
"""

import argparse
import io
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    streamquant_command,
)
from synthetic import WIKI_LLAMA, add_tokenizer, llama, write_checkpoint

import streamquant
from streamquant.calibrate.budget import tokens_of_batch
from streamquant.calibrate.data import CalibrationOptions, load_calibration, load_tokenizer
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource
from streamquant.memory import available_cpus
from streamquant.plan import Copy

METHODS = ("gptq", "awq", "awq+gptq")
OURS, PEER = "streamquant", "llm-compressor"
EVALUATED_TOKENS = 256  # of a window
EVALUATED_WINDOWS = 8  # at a time
START_OF_OURS = "from transformers import AutoModelForCausalLM, AutoTokenizer; import streamquant.calibrate.run"
START_OF_PEER = "from transformers import AutoModelForCausalLM, AutoTokenizer; from llmcompressor import oneshot"
# `IntermediatesCache.pin_memory` fails where torch has no accelerator.
PEER_CODE = """
import json
import sys
import time
from collections import Counter
from itertools import pairwise
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import pipeline
source, out, method, preset, group_size, ignore, batch, tokens, seconds = sys.argv[1:]
IntermediatesCache.pin_memory = lambda *arguments, **options: None
passes = []
get_batches = pipeline._get_batches
def timed_batches(activations, num_batches, input_names, desc, *arguments):
    if desc.endswith("Calibrating"):
        passes.append((int(desc[1:desc.index("/")]), time.monotonic()))
    return get_batches(activations, num_batches, input_names, desc, *arguments)
pipeline._get_batches = timed_batches
scheme = preset_name_to_scheme(preset, ["Linear"])
scheme.weights.observer = "memoryless_minmax"
if group_size:
    scheme.weights.group_size = int(group_size)
quantizer = GPTQModifier if "gptq" in method else QuantizationModifier
recipe = [AWQModifier()] if "awq" in method else []
recipe.append(quantizer(config_groups={"group_0": scheme}, ignore=ignore.split(",")))
with open(tokens) as file:
    samples = [torch.tensor(sample)[None] for sample in json.load(file)]
batches = [torch.cat(samples[start : start + int(batch)]) for start in range(0, len(samples), int(batch))]
loader = torch.utils.data.DataLoader([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches], batch_size=None)
oneshot(model=source, dataset=loader, recipe=recipe, num_calibration_samples=len(samples), output_dir=out)
layers = Counter()
for (number, start), (next_number, end) in pairwise(passes):
    if next_number > number:
        layers[number] += end - start
with open(seconds, "w") as file:
    json.dump(list(layers.values()), file)
"""


@dataclass(frozen=True, slots=True)
class Program:
    """What calibrates a model, and where to."""

    name: str
    command: Sequence[str]
    out: Path
    layers: Callable[[], list[float]]  # reads what the run before took for each layer, in seconds


@dataclass(frozen=True, slots=True)
class Run:
    """What a program took."""

    measurement: Measurement
    layer_seconds: list[float]


def main() -> None:
    """Measure the starts of both programs, then model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--models", nargs="+", type=Path, default=[WIKI_LLAMA], metavar="DIR")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq", "awq"])
    parser.add_argument("--synthetic", type=float, metavar="GIGABYTES", help="a model of random weights instead")
    parser.add_argument("--compute-dtype", default="auto", help="of streamquant")
    parser.add_argument("--scheme", default="W4A16", help="a preset that both programs know")
    parser.add_argument("--group-size", type=int, metavar="N", help="that of the preset if not given")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to calibrate with; the default text of streamquant if not given")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="windows of the text")
    parser.add_argument("--sequence-length", type=int, default=256, metavar="N", help="tokens of a window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--evaluate", type=Path, metavar="TEXT", help="also compare the outputs by perplexity and KL divergence on it")
    parser.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows instead of all")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are made")
    arguments = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    folder = Path(tempfile.mkdtemp(prefix="calibrate-", dir=arguments.folder))
    try:
        _print_starts(folder, arguments)
        for model in arguments.models if arguments.synthetic is None else [_synthetic(folder / "synthetic", arguments.synthetic)]:
            _compare(model.resolve(), folder, arguments)
    finally:
        shutil.rmtree(folder)


def _synthetic(folder: Path, gigabytes: float) -> Path:
    tensors, config = llama(round(gigabytes * GIGABYTE))
    write_checkpoint(folder, tensors, config, shard_bytes=GIGABYTE)
    add_tokenizer(folder)
    return folder


def _print_starts(folder: Path, arguments: argparse.Namespace) -> None:
    """What each program takes before it has read anything."""
    commands = {f"start of {OURS}": [sys.executable, "-c", START_OF_OURS]}
    if arguments.peer_python is not None:
        commands[f"start of {PEER}"] = [str(arguments.peer_python.absolute()), "-c", START_OF_PEER]
    starts = alternate({name: (partial(_measure, command, folder), arguments.repeats) for name, command in commands.items()})
    print(f"{arguments.repeats} repeats; {available_cpus()} CPUs\n")
    print_header("start", "wall time", "CPU time", "peak anonymous", "peak RSS")
    for name, runs in starts.items():
        times = (f"{median_seconds(runs):.1f} s", f"{median_cpu_seconds(runs):.1f} s")
        print_row(name, *times, f"{largest_anonymous(runs):.0f} MB", f"{largest_rss(runs):.0f} MB")


def _compare(model: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """Print the tables of a model."""
    samples = _write_tokens(model, folder / "tokens.json", arguments)
    plan = streamquant.plan(model, scheme=arguments.scheme, group_size=arguments.group_size)
    ignored = [step.source.name.removesuffix(".weight") for step in plan.steps if isinstance(step, Copy) and len(step.source.shape) > 1]
    ignored.append("lm_head")  # of which there is no tensor where it is tied to the embedding
    print(f"\n{model.name}: {arguments.scheme}, group size {arguments.group_size or 'of the preset'}, {samples}\n")
    print_header(
        *("model", "method", "program", "wall time", "ratio", "seconds per layer", "ratio"),
        *("CPU time", "ratio", "peak anonymous", "ratio", "peak RSS", "ratio"),
    )
    outputs = {}
    notes = []
    for method in arguments.methods:
        programs = _programs(method, model, folder, ignored, arguments)
        runs = alternate({program.name: (partial(_run, program, folder), arguments.repeats) for program in programs})
        for name, mine in runs.items():
            print_row(model.name, method, name, *_cells(mine, runs[OURS]))
        outputs[method] = {program.name: program.out for program in programs}
        tensors = [_tensors(program.out) for program in programs]
        differing = sorted(tensors[0] ^ tensors[-1])
        if differing:
            notes.append(f"{method}: the outputs differ in {len(differing)} tensors, such as {differing[:2]}")
    if notes:
        print("\n" + "\n".join(notes))
    if arguments.evaluate is not None:
        _evaluate(_variants(model, outputs, folder, arguments), arguments)


def _variants(
    model: Path, outputs: Mapping[str, Mapping[str, Path]], folder: Path, arguments: argparse.Namespace
) -> dict[tuple[str, str, str], Path]:
    """Folders by method, program and options: the source, what was measured, and what is made now beside it."""
    variants = {("source", "", ""): model}
    clips = [(method, "--no-clip" if "awq" in method else "--clip") for method in outputs]
    for method, options in (("rtn", ""), *((method, "--observer mse") for method in ("rtn", *outputs)), *clips):
        out = folder / f"{method} {options}"
        _measure(_our_command(model, out, method, arguments, *options.split()), folder, out)
        variants[method, OURS, options] = out
    measured = {(method, program, ""): out for method, programs in outputs.items() for program, out in programs.items()}
    order = ["source", "rtn", *outputs]
    return dict(sorted((variants | measured).items(), key=lambda item: (order.index(item[0][0]), item[0][1] != OURS, item[0][2])))


def _write_tokens(model: Path, file: Path, arguments: argparse.Namespace) -> str:
    """Write the tokens that streamquant will take, for its peer, and tell what they are."""
    options = CalibrationOptions(
        data=None if arguments.text is None else str(arguments.text), samples=arguments.samples, sequence_length=arguments.sequence_length
    )
    calibration = load_calibration(options, load_tokenizer(model))
    file.write_text(json.dumps([tokens_T.tolist() for tokens_T in calibration.samples]))
    return f"{len(calibration.samples)} windows with {calibration.num_tokens} tokens of {calibration.title}"


def _programs(method: str, model: Path, folder: Path, ignored: Sequence[str], arguments: argparse.Namespace) -> list[Program]:
    """Ours, then the peer if there is one. `ignored` are the modules that it shall not quantize."""
    log, seconds = folder / "log.jsonl", folder / "seconds.json"
    out = folder / f"{method}-ours"
    ours = Program(OURS, _our_command(model, out, method, arguments, "--log-json", str(log)), out, partial(_our_layers, log))
    if arguments.peer_python is None:
        return [ours]
    out = folder / f"{method}-peer"
    settings = [method, arguments.scheme, str(arguments.group_size or ""), ",".join(ignored)]
    widest = max(max(tensor.shape) for tensor in read_checkpoint(LocalSource(model)).tensors.values() if ".layers." in tensor.name)
    batch = max(tokens_of_batch(widest) // arguments.sequence_length, 1)
    command = [str(arguments.peer_python.absolute()), "-c", PEER_CODE, str(model), str(out), *settings, str(batch)]
    return [ours, Program(PEER, [*command, str(folder / "tokens.json"), str(seconds)], out, lambda: json.loads(seconds.read_text()))]


def _our_command(model: Path, out: Path, method: str, arguments: argparse.Namespace, *options: str) -> list[str]:
    command = streamquant_command("convert", str(model), str(out), "--scheme", arguments.scheme, "--method", method, "--device", "cpu")
    if arguments.group_size is not None:
        command += ["--group-size", str(arguments.group_size)]
    if method != "rtn":
        command += ["--samples", str(arguments.samples), "--sequence-length", str(arguments.sequence_length)]
        command += ["--compute-dtype", arguments.compute_dtype]
        if arguments.text is not None:
            command += ["--calibration-data", str(arguments.text.resolve())]
    return [*command, "--quiet", *options]


def _our_layers(log: Path) -> list[float]:
    """What the log says of each layer; the log, which runs add to, is removed."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    return [event["seconds"] for event in events if event["event"] == "layer"]


def _run(program: Program, folder: Path) -> Run:
    return Run(_measure(program.command, folder, program.out), program.layers())


def _measure(command: Sequence[str], folder: Path, out: Path | None = None) -> Measurement:
    """Run a command, which makes `out` anew if given."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
    environment = dict(os.environ)
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    return measure_ok(command, log=folder / "log", environment=environment)


def _cells(mine: Sequence[Run], ours: Sequence[Run]) -> list[str]:
    figures: list[tuple[Callable[[Sequence[Run]], float], str]] = [
        (lambda runs: median_seconds(_measurements(runs)), ".1f} s"),
        (lambda runs: statistics.median(seconds for run in runs for seconds in run.layer_seconds), ".2f} s"),
        (lambda runs: median_cpu_seconds(_measurements(runs)), ".1f} s"),
        (lambda runs: largest_anonymous(_measurements(runs)), ".0f} MB"),
        (lambda runs: largest_rss(_measurements(runs)), ".0f} MB"),
    ]
    cells = []
    for figure, form in figures:
        cells += [("{:" + form).format(figure(mine)), "" if mine is ours else f"**{figure(mine) / figure(ours):.1f}**"]
    return cells


def _measurements(runs: Sequence[Run]) -> list[Measurement]:
    return [run.measurement for run in runs]


def _tensors(checkpoint: Path) -> set[tuple[str, str, tuple[int, ...]]]:
    with LocalSource(checkpoint) as opened:
        return {(spec.name, spec.dtype, spec.shape) for spec in read_checkpoint(opened).tensors.values()}


def _evaluate(variants: Mapping[tuple[str, str, str], Path], arguments: argparse.Namespace) -> None:
    """Print how well each variant predicts the text, and how far from the first one."""
    import torch

    source = next(iter(variants.values()))
    text = arguments.evaluate.read_text(encoding="utf-8")
    ids = load_tokenizer(source)(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_windows = min(len(ids) // EVALUATED_TOKENS, arguments.windows or len(ids))
    ids_WT = torch.tensor(ids[: num_windows * EVALUATED_TOKENS]).view(num_windows, EVALUATED_TOKENS)
    models = [_load(path) for path in variants.values()]
    losses, divergences = [0.0] * len(models), [0.0] * len(models)
    with torch.inference_mode():
        for batch_WT in ids_WT.split(EVALUATED_WINDOWS):
            expected_WTV = None
            for number, model in enumerate(models):
                logits_WTV = model(input_ids=batch_WT, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                expected_WTV = logits_WTV if expected_WTV is None else expected_WTV
                losses[number] -= logits_WTV.gather(-1, batch_WT[:, 1:, None]).double().sum().item()
                divergences[number] += (expected_WTV.exp() * (expected_WTV - logits_WTV)).double().sum().item()
    num_predictions = num_windows * (EVALUATED_TOKENS - 1)
    print(f"\n{source.name} on {num_windows} windows of {EVALUATED_TOKENS} tokens of {arguments.evaluate.name}\n")
    print_header("method", "program", "options", "perplexity", "beside the source", "KL divergence from the source")
    for names, loss, divergence in zip(variants, losses, divergences, strict=True):
        difference = f"{math.expm1((loss - losses[0]) / num_predictions):+.3%}"
        print_row(*names, f"{math.exp(loss / num_predictions):.4f}", difference, f"{divergence / num_predictions:.5f}")


def _load(folder: Path) -> Any:
    """A model of transformers in float32, with its weights dequantized."""
    import torch
    import transformers

    options = {}
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # four bars and a warning for each model
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).float().eval()


if __name__ == "__main__":
    main()
