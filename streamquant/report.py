"""What people read: tables of plans, checkpoints and verifications, as lines of text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from streamquant.convert import Conversion
from streamquant.engines import Engine, Finding, loads_in
from streamquant.inspect import Inspection
from streamquant.memory import Memory
from streamquant.names import fold
from streamquant.plan import Copy, Encode, Measure, Plan, Step
from streamquant.schemes import PLAIN, SCHEMES, WITHOUT_DATA, Scheme
from streamquant.schemes.plain import Plain
from streamquant.sizes import format_bytes
from streamquant.verify import Verification

if TYPE_CHECKING:
    from streamquant.calibrate.layer import Record
    from streamquant.calibrate.run import CalibrationReport

MAX_ROWS = 60
MANY_COLUMNS = 4096
BYTE_SCALES = {"nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"}  # formats; others have scales of the weight's dtype


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns aligned on the left, two spaces apart."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def plan_lines(plan: Plan, memory: Memory) -> list[str]:
    """What happens to each tensor, layers folded together, and what it takes."""
    rows: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for step in plan.steps:
        for name, shape, dtype, fate, before, after in _fates(step):
            row = rows[fold(name), dtype, shape, fate]
            row[0] += 1
            row[1] += before
            row[2] += after
    lines = table(
        ("tensor", "count", "dtype", "shape", "before", "after", "what happens"),
        ((n, str(c), d, s, format_bytes(b), format_bytes(a), f) for (n, d, s, f), (c, b, a) in rows.items()),
    )
    lines += ["", *summary_lines(plan)]
    limit = "" if memory.limit_bytes is None else f"; the container allows {format_bytes(memory.limit_bytes)} in all"
    on_gpu = f" and {format_bytes(memory.gpu_peak_bytes)} on each GPU" if memory.gpu_peak_bytes else ""
    lines.append(
        f"memory      {format_bytes(memory.peak_bytes)} of working memory{on_gpu} in {memory.num_workers} workers, predicted{limit}"
    )
    return lines


def engine_lines(engine: Engine, findings: Sequence[Finding], *, tp: int) -> list[str]:
    """What an engine does not load of a plan, and the ways out."""
    ranks = f" on {tp} ranks" if tp > 1 else ""
    verdict = "" if findings else ": everything loads"
    lines = [f"engine      {engine.title} {engine.version}{ranks}{verdict} (table of {engine.checked})"]
    for finding in findings:
        label = "condition" if finding.conditional else "PROBLEM"
        layers = f"{finding.count} x {finding.layers} ({finding.scheme})"
        lines.append(f"{label:12}{layers}: {finding.problem}; way out: {finding.remedy}")
    return lines


def summary_lines(plan: Plan) -> list[str]:
    """Sizes, what is kept and left out, in a few lines."""
    encoded = [step for step in plan.steps if isinstance(step, Encode)]
    stored = [step for step in encoded if not isinstance(step.scheme, Plain)]
    schemes = ", ".join(dict.fromkeys(step.scheme.title for step in stored))
    fused = sum(1 for step in stored if len(step.members) > 1)
    ratio = plan.output_bytes / max(plan.source_bytes, 1)
    checkpoint = plan.checkpoint
    lines = [] if checkpoint.revision is None else [f"source      {checkpoint.source} at {checkpoint.revision}"]
    if stored:
        lines.append(f"quantized   {sum(len(step.members) for step in stored)} weights to {schemes}; {fused} fused groups")
    as_stored = [member.weight.name for step in stored if step.keeps_codes for member in step.members]
    if as_stored:
        lines.append(f"as stored   {len(as_stored)} of them, whose codes and scales the source has: {_examples(as_stored)}")
    measured = [member.module for step in stored if step.scheme.needs_data for member in step.members]
    caches = [step.module for step in plan.steps if isinstance(step, Measure)]
    lines += [
        f"with data   {len(names)} x {what}: {_examples(names)}"
        for what, names in (("scale of inputs", measured), ("scales of keys and values", caches))
        if names
    ]
    lines += [
        *(f"unpacked    {len(names)} x {fate}: {_examples(names)}" for fate, names in _unpacked(encoded).items()),
        *(f"kept        {len(names)} x {reason}: {_examples(names)}" for reason, names in _kept(plan.steps).items()),
        *(f"dropped     {len(names)} x {reason}: {_examples(names)}" for reason, names in _dropped(plan).items()),
        *(f"left out    {file}: {reason}" for file, reason in checkpoint.left_out.items()),
        f"size        {format_bytes(plan.source_bytes)} -> {format_bytes(plan.output_bytes)} ({ratio:.0%}) in {len(plan.shards)} files",
    ]
    if checkpoint.config is None:
        lines.append("config      the source has no config.json: the output's will hold nothing but quantization_config")
    return lines


def _unpacked(encoded: Iterable[Encode]) -> dict[str, list[str]]:
    """Names of quantized weights that are left plain, by what they become and why."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for step in encoded:
        if step.unpacks:
            fate = step.scheme.title + (f", {step.reason}" if step.reason else "")
            names[fate] += [member.weight.name for member in step.members]
    return names


def _kept(steps: Iterable[Step]) -> dict[str, list[str]]:
    """Names of tensors that are copied, or taken from a stack as they are, by the reason."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for step in steps:
        if isinstance(step, Copy):
            names[step.reason].append(step.source.name)
        elif isinstance(step, Encode) and isinstance(step.scheme, Plain) and not step.unpacks:
            names[step.reason] += [member.weight.name for member in step.members]
    return names


def _dropped(plan: Plan) -> dict[str, list[str]]:
    """Names of tensors that are not written, by the reason."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in plan.dropped.items():
        names[reason].append(name)
    return names


def conversion_lines(conversion: Conversion) -> list[str]:
    """What a conversion did."""
    lines = summary_lines(conversion.plan)
    if conversion.calibration is not None:
        lines += _calibration_lines(conversion.calibration)
    if conversion.resumed_shards:
        lines.append(f"resumed     {conversion.resumed_shards} of {len(conversion.plan.shards)} files were finished by an earlier run")
    for name in conversion.nonfinite:
        lines.append(f"not finite  {name}: NaN and infinities were stored as zeros")
    speed = conversion.plan.source_bytes / max(conversion.seconds, 1e-9)
    lines.append(f"done        {conversion.out} in {conversion.seconds:.1f} s ({format_bytes(speed)}/s, {conversion.device}), verified")
    return lines


def _calibration_lines(calibration: CalibrationReport) -> list[str]:
    weights = [record for record in calibration.records if not record.is_pair]
    pairs = [record for record in calibration.records if record.is_pair]
    before, after = (sum(errors) / max(len(errors), 1) for errors in ([r.error_before for r in weights], [r.error_after for r in weights]))
    lines = [f"calibrated  {len(weights)} weights by {calibration.method} with {calibration.tokens} tokens of {calibration.data}"]
    if before:
        lines.append(f"error       of their outputs, relative, on the mean {before:.3g} if rounded, {after:.3g} as written")
    if pairs:
        helped = [record for record in pairs if not record.fallback]
        before, after = sum(record.error_before for record in helped), sum(record.error_after for record in helped)
        gain = f", which makes the error of what reads them {after / before:.2f} times as large" if before else ""
        lines.append(f"scales      moved in {len(helped)} of {len(pairs)} pairs{gain}")
        lines += [f"not moved   {len(names)} x {reason}: {_examples(names)}" for reason, names in _by_reason(pairs).items()]
    lines += [f"fallback    {len(names)} x {reason}: {_examples(names)}" for reason, names in _by_reason(weights).items()]
    return lines


def _by_reason(records: Iterable[Record]) -> dict[str, list[str]]:
    names: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        if record.fallback:
            names[record.fallback].append(record.name)
    return names


def inspection_lines(inspection: Inspection) -> list[str]:
    """What is in a checkpoint, layers folded together."""
    rows: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    checkpoint = inspection.checkpoint
    for spec in checkpoint.tensors.values():
        row = rows[fold(spec.name), spec.dtype, _shape(spec.shape)]
        row[0] += 1
        row[1] += spec.num_bytes
    config = checkpoint.config or {}
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    dtypes = ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in inspection.bytes_by_dtype.items())
    return [
        *table(("tensor", "count", "dtype", "shape", "bytes"), ((n, str(c), d, s, format_bytes(b)) for (n, d, s), (c, b) in rows.items())),
        "",
        f"model       {config.get('model_type', 'unknown')} ({', '.join(architectures) or 'no architecture named'})",
        f"quantized   {inspection.quant_method or 'not, by its config'}",
        f"tensors     {len(checkpoint.tensors)} in {len(checkpoint.shards)} files, {inspection.num_parameters:,} parameters",
        f"size        {format_bytes(inspection.num_bytes)} ({dtypes})",
        *(f"left out    {file}: {reason}" for file, reason in checkpoint.left_out.items()),
    ]


def verification_lines(report: Verification) -> list[str]:
    """What verify found: errors of weights folded over layers, then everything that is off."""
    rows: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for error in report.errors:
        rows[fold(error.name), error.scheme].append(error.relative_error)
    lines = []
    if rows:
        lines = table(
            ("weight", "count", "scheme", "mean relative error", "largest"),
            ((n, str(len(e)), s, f"{sum(e) / len(e):.5f}", f"{max(e):.5f}") for (n, s), e in rows.items()),
        )
        lines += ["", f"copied      {report.num_copied} tensors, the same bytes as in the source"]
    if report.num_rescaled:
        lines.append(f"rescaled    {report.num_rescaled} tensors between which calibration has moved scales: not compared")
    lines.append(
        f"checked     {report.num_tensors} tensors, {report.num_quantized} quantized weights, checksums of {report.num_checksums} files"
    )
    lines += [f"PROBLEM     {problem}" for problem in report.problems[:MAX_ROWS]]
    if len(report.problems) > MAX_ROWS:
        lines.append(f"PROBLEM     and {len(report.problems) - MAX_ROWS} more; see --json")
    lines.append(f"{'failed' if report.problems else 'passed':12}{report.out}")
    return lines


def scheme_lines() -> list[str]:
    """The presets: what they store and who runs it."""
    rows = []
    for name, scheme in SCHEMES.items():
        inputs = "as they are"
        if scheme.activations is not None:
            inputs = f"{scheme.activations.type}{scheme.activations.num_bits} per {scheme.activations.strategy}"
            inputs += ", with data" if scheme.needs_data else ""
        settings = ", ".join(sorted(setting.replace("_", " ") for setting in scheme.settings)) or "-"
        rows.append((name, f"{bits_per_weight(scheme):.3f}", inputs, scheme.format, loads_in(scheme), settings))
    lines = table(("scheme", "bits/weight", "activations", "stored as", "loads in", "settings"), rows)
    lines += [
        "",
        *(
            f"{name} stores activation scales, which take calibration data; without data: {instead}"
            for name, instead in WITHOUT_DATA.items()
        ),
    ]
    return [
        *lines,
        "FP8_BLOCK with --format fp8 is stored as DeepSeek-V3 does it, which needs no compressed-tensors to load.",
        f"{', '.join(scheme.preset for scheme in PLAIN.values())} unpack a quantized source into plain numbers, and quantize nothing.",
        "Experts stacked in 3-D become single ones, unless they are kept or only unpacked: gpt-oss loads in stacks alone.",
    ]


def bits_per_weight(scheme: Scheme) -> float:
    """Bits stored for a weight of a large bfloat16 matrix: its code, and its part of the scale and the zero point of its unit."""
    code_bits: int = scheme.weights_config["num_bits"]
    scale_bits = 8 if scheme.format in BYTE_SCALES else 16
    if scheme.weights_config["strategy"] == "tensor":
        return code_bits
    zero_bits = 0 if scheme.symmetric else code_bits
    return code_bits + (scale_bits + zero_bits) / math.prod(scheme.unit(MANY_COLUMNS))


def _fates(step: Step) -> list[tuple[str, str, str, str, int, int]]:
    if isinstance(step, Copy):
        spec = step.source
        return [(spec.name, _shape(spec.shape), spec.dtype, f"kept: {step.reason}", spec.num_bytes, spec.num_bytes)]
    if isinstance(step, Measure):
        num_bytes = sum(spec.num_bytes for spec in step.outputs)
        return [(step.module, "", "", "scales of keys and values in FP8", 0, num_bytes)]
    partners = [member.module.rpartition(".")[2] for member in step.members]
    fate = step.scheme.title
    if isinstance(step.scheme, Plain):
        fate = f"unpacked to {fate}" if step.unpacks else "taken from its stack"
        fate += f", kept: {step.reason}" if step.reason else ""
    elif step.keeps_codes:
        fate += ", as stored"
    if len(partners) > 1 and step.whole is None:
        fate += f", fused {'+'.join(partners)}"
    return [
        (
            member.weight.name,
            _shape(member.weight.shape),
            member.weight.format.title if member.weight.is_quantized else member.weight.dtype,
            fate,
            member.weight.num_bytes,
            sum(spec.num_bytes for spec in member.stored),
        )
        for member in step.members
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _examples(names: Sequence[str]) -> str:
    folded = list(dict.fromkeys(map(fold, names)))
    return ", ".join(folded[:3]) + (", ..." if len(folded) > 3 else "")
