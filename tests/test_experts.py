"""3-D stacks of experts: taken apart as their layout says, never as a guess, and left in one piece where they stay as they are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamquant
from streamquant import memory
from streamquant.errors import CheckpointError, RequestError
from streamquant.inputs.experts import MODEL_LAYOUTS
from streamquant.plan import Copy, Encode
from streamquant.verify import dequantize
from tests import quantized_sources as sources
from tests.checkpoints import attention, mlp, read_config, read_tensors, weight, write_checkpoint

EXPERTS = "model.layers.0.mlp.experts"
E, H, I = 3, 128, 64  # noqa: E741, as in the legend of inputs/experts.py
ROUTER = {"model.layers.0.mlp.gate.weight": weight(E, H)}


def single() -> dict[str, Tensor]:
    """The experts one by one, as they should come out."""
    return {name: tensor for expert in range(E) for name, tensor in mlp(f"{EXPERTS}.{expert}", columns=H, rows=I, seed=10 * expert).items()}


def stacked(layout: str) -> tuple[Tensor, Tensor]:
    """gate_up and down of `single`, built from the definition of the layout."""
    parts = single()
    gate, up, down = (
        torch.stack([parts[f"{EXPERTS}.{expert}.{leaf}.weight"] for expert in range(E)]) for leaf in ("gate_proj", "up_proj", "down_proj")
    )
    if layout == "rows":
        return torch.cat([gate, up], 1), down
    if layout == "columns":
        return torch.cat([gate, up], 1).transpose(1, 2), down.transpose(1, 2)
    pairs = torch.stack([gate, up], 2).flatten(1, 2)  # gate 0, up 0, gate 1, up 1 ...
    return pairs.transpose(1, 2), down.transpose(1, 2)


def source(folder: Path, layout: str, model_type: str, *, gate_up: str = "gate_up_proj", down: str = "down_proj") -> Path:
    tensors = dict(zip((f"{EXPERTS}.{gate_up}", f"{EXPERTS}.{down}"), stacked(layout), strict=True))
    return write_checkpoint(folder, tensors | ROUTER | attention(columns=H), config={"model_type": model_type, "num_local_experts": E})


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)


@pytest.mark.parametrize(
    ("layout", "model_type", "names"),
    [
        ("rows", "qwen3_moe", {}),
        ("rows", "qwen3_5_moe", {}),
        ("columns", "llama4", {}),
        ("columns", "qwen3_vl_moe", {}),
        ("rows", "qwen3_vl_moe", {}),  # as transformers 5 saves it
        ("interleaved", "gpt_oss", {}),
    ],
)
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_DYNAMIC"])
def test_a_stack_becomes_the_tensors_of_its_single_experts(
    tmp_path: Path, layout: str, model_type: str, names: Mapping[str, str], scheme: str
) -> None:
    """llm-compressor splits every stack along its rows, and makes garbage of the transposed ones (E8)."""
    plain = write_checkpoint(tmp_path / "single", single() | ROUTER | attention(columns=H), config={"num_local_experts": E})
    streamquant.convert(plain, tmp_path / "expected", scheme=scheme)
    streamquant.convert(source(tmp_path / "source", layout, model_type, **names), tmp_path / "out", scheme=scheme)
    assert same(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected"))
    assert read_config(tmp_path / "out") == read_config(tmp_path / "expected")
    report = streamquant.verify(tmp_path / "out", against=tmp_path / "source")
    assert not report.problems
    assert len(report.errors) == 4 + 3 * E


@pytest.mark.parametrize(
    ("model_type", "down"),
    [("mixtral", "model.layers.0.block_sparse_moe.experts.1.w2"), ("lfm2_moe", "model.layers.0.feed_forward.experts.1.w2")],
)
def test_families_that_number_their_projections_keep_doing_so(tmp_path: Path, model_type: str, down: str) -> None:
    plan = streamquant.plan(source(tmp_path / "source", "rows", model_type), scheme="W8A8")
    modules = [member.module for step in plan.steps if isinstance(step, Encode) for member in step.members]
    assert {down, down.replace("w2", "w1"), down.replace("w2", "w3")} <= set(modules)
    fused = [[member.module for member in step.members] for step in plan.steps if isinstance(step, Encode) and len(step.members) > 1]
    assert [down.replace("w2", "w1"), down.replace("w2", "w3")] in fused


def test_granite_and_aria_have_names_of_their_own(tmp_path: Path) -> None:
    gate_up, down = stacked("rows")
    granite = {"model.layers.0.block_sparse_moe.input_linear.weight": gate_up, "model.layers.0.block_sparse_moe.output_linear.weight": down}
    shared = {"model.layers.0.shared_mlp.input_linear.weight": weight(64, H)}  # one matrix, no stack
    source_ = write_checkpoint(tmp_path / "granite", granite | shared, config={"model_type": "granitemoe"})
    plan = streamquant.plan(source_, scheme="W8A8")
    modules = [member.module for step in plan.steps if isinstance(step, Encode) for member in step.members]
    assert modules[:2] == ["model.layers.0.block_sparse_moe.experts.0.gate_proj", "model.layers.0.block_sparse_moe.experts.0.up_proj"]
    assert "model.layers.0.shared_mlp.input_linear" in modules
    assert len(modules) == 3 * E + 1

    gate_up, down = stacked("columns")
    aria = {f"{EXPERTS}.fc1.weight": gate_up, f"{EXPERTS}.fc2.weight": down}
    streamquant.convert(write_checkpoint(tmp_path / "aria", aria, config={"model_type": "aria"}), tmp_path / "out", scheme="FP8_DYNAMIC")
    values = dict(dequantize(tmp_path / "out"))
    assert values.keys() == {f"{EXPERTS}.{expert}.{leaf}.weight" for expert in range(E) for leaf in ("gate_up_proj", "down_proj")}
    assert torch.allclose(values[f"{EXPERTS}.1.gate_up_proj.weight"], gate_up[1].T.float(), rtol=0.07, atol=1e-4)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_a_layout_that_is_not_known_is_asked_for_and_not_guessed(tmp_path: Path, scheme: str) -> None:
    unknown = source(tmp_path / "source", "columns", "newest_moe")
    settings = {"scheme": scheme} | ({"group_size": 64} if scheme == "W4A16" else {})
    with pytest.raises(
        CheckpointError, match=r"down_proj \[3, 64, 128\] stacks experts in 3-D in a layout that is not known for newest_moe"
    ):
        streamquant.plan(unknown, **settings)
    kept = streamquant.plan(unknown, **settings, ignore=["experts"])
    assert {step.source.name for step in kept.steps if isinstance(step, Copy)} == {
        f"{EXPERTS}.gate_up_proj",
        f"{EXPERTS}.down_proj",
        *ROUTER,
    }
    streamquant.convert(unknown, tmp_path / "out", **settings, expert_layout="columns")
    streamquant.convert(source(tmp_path / "known", "columns", "llama4"), tmp_path / "expected", **settings)
    assert same(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected"))
    assert not streamquant.verify(tmp_path / "out", against=unknown, expert_layout="columns").problems


def test_a_layout_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="unknown expert layout 'sideways'; known are rows, columns, interleaved"):
        streamquant.plan(source(tmp_path / "source", "rows", "newest_moe"), scheme="W8A8", expert_layout="sideways")


def test_shapes_that_contradict_the_model_type_are_an_error(tmp_path: Path) -> None:
    """Turned by 90 degrees, a square-looking stack would be quantized along the wrong axis."""
    with pytest.raises(CheckpointError, match=r"gate_up_proj \[3, 128, 128\] and down_proj \[3, 64, 128\] are not stacked in rows"):
        streamquant.plan(source(tmp_path / "source", "columns", "qwen3_moe"), scheme="FP8_DYNAMIC")


def test_every_model_type_has_layouts_that_exist() -> None:
    assert {layout for layouts in MODEL_LAYOUTS.values() for layout in layouts} == {"rows", "columns", "interleaved"}


# --- kept --------------------------------------------------------------------------------------------------------------


def test_kept_stacks_stay_in_one_piece_byte_for_byte(tmp_path: Path) -> None:
    source_ = source(tmp_path / "source", "columns", "llama4")
    streamquant.convert(source_, tmp_path / "out", scheme="attention=FP8_DYNAMIC")
    written, before = read_tensors(tmp_path / "out"), read_tensors(source_)
    stacks = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]
    assert all(torch.equal(written[name], before[name]) for name in stacks)
    ignored = read_config(tmp_path / "out")["ignore"]
    leaves = [f"{EXPERTS}.0.{leaf}" for leaf in ("down_proj", "gate_proj", "up_proj")]  # where vLLM looks
    assert [name for name in ignored if "experts" in name] == [EXPERTS, *leaves]
    report = streamquant.verify(tmp_path / "out", against=source_)
    assert (report.problems, report.num_copied) == ([], 3)


def test_no_checkpoint_has_stacks_in_one_layer_and_single_experts_in_another(tmp_path: Path) -> None:
    """vLLM's Llama 4 takes experts one by one or in stacks, whichever it sees first."""
    tensors = {}
    for layer in (0, 1):
        gate_up, down = stacked("columns")
        tensors |= {
            f"model.layers.{layer}.feed_forward.experts.gate_up_proj": gate_up,
            f"model.layers.{layer}.feed_forward.experts.down_proj": down,
        }
    source_ = write_checkpoint(tmp_path / "source", tensors, config={"model_type": "llama4_text"})
    streamquant.convert(source_, tmp_path / "out", scheme="FP8_DYNAMIC", ignore=["*.layers.1"])
    names = read_tensors(tmp_path / "out").keys()
    assert "model.layers.1.feed_forward.experts.2.up_proj.weight" in names
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in names)
    assert not streamquant.verify(tmp_path / "out", against=source_).problems


def test_the_experts_of_a_layer_are_stored_alike(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=rf"{EXPERTS}: engines load the experts of a layer as one"):
        streamquant.plan(source(tmp_path / "source", "rows", "qwen3_moe"), scheme="FP8_DYNAMIC", ignore=["*.down_proj"])


# --- stored quantized --------------------------------------------------------------------------------------------------


def gpt_oss(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """gpt-oss in MXFP4, and its plain tensors as transformers and vLLM name them."""
    tensors: dict[str, Tensor] = {}
    plain = {}
    for leaf, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        parts = [sources.mxfp4(rows, columns, seed=rows + expert, exponents=(112, 125)) for expert in range(E)]
        tensors[f"{EXPERTS}.{leaf}_blocks"] = torch.stack([packed.view(rows, -1, 16) for packed, _, _ in parts])
        tensors[f"{EXPERTS}.{leaf}_scales"] = torch.stack([exponent for _, exponent, _ in parts])
        plain[f"{EXPERTS}.{leaf}"] = torch.stack([values for _, _, values in parts]).transpose(1, 2).contiguous()
        tensors[f"{EXPERTS}.{leaf}_bias"] = plain[f"{EXPERTS}.{leaf}_bias"] = weight(E, rows, seed=rows)
    config = {"model_type": "gpt_oss", **sources.quantization_config("mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])}
    others = {"model.layers.0.mlp.router.weight": weight(E, H)} | attention(columns=H)
    return write_checkpoint(folder, tensors | others, config=config), plain | others


def test_gpt_oss_is_unpacked_to_the_stacks_that_engines_load(tmp_path: Path) -> None:
    source_, plain = gpt_oss(tmp_path / "source")
    streamquant.convert(source_, tmp_path / "out", scheme="BF16")
    assert same(read_tensors(tmp_path / "out"), plain)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    report = streamquant.verify(tmp_path / "out", against=source_)
    assert not report.problems
    assert {error.relative_error for error in report.errors} == {0.0}


def test_the_attention_of_gpt_oss_is_quantized_beside_unpacked_stacks(tmp_path: Path) -> None:
    source_, plain = gpt_oss(tmp_path / "source")
    streamquant.convert(source_, tmp_path / "out", scheme="attention=FP8_DYNAMIC")
    written = read_tensors(tmp_path / "out")
    experts = {name: tensor for name, tensor in plain.items() if "experts" in name}
    assert same({name: written[name] for name in experts}, experts)
    assert not streamquant.verify(tmp_path / "out", against=source_).problems


@pytest.mark.parametrize(
    ("scheme", "exact"), [("MXFP4A16", True), ("NVFP4A16", True), ("FP8_DYNAMIC", True), ("MXFP8", True), ("W8A8", False)]
)
def test_experts_of_gpt_oss_one_by_one(tmp_path: Path, scheme: str, exact: bool) -> None:
    source_, plain = gpt_oss(tmp_path / "source")
    streamquant.convert(source_, tmp_path / "out", scheme=f"experts={scheme}")
    values = dict(dequantize(tmp_path / "out"))
    for expert in range(E):
        for leaf, rows in (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2))):
            expected = plain[f"{EXPERTS}.gate_up_proj"][expert].T[rows].float()
            assert torch.equal(values[f"{EXPERTS}.{expert}.{leaf}.weight"], expected) is exact
            assert torch.equal(values[f"{EXPERTS}.{expert}.{leaf}.bias"], plain[f"{EXPERTS}.gate_up_proj_bias"][expert][rows])
        assert torch.equal(values[f"{EXPERTS}.{expert}.down_proj.weight"], plain[f"{EXPERTS}.down_proj"][expert].T.float()) is exact
        assert torch.equal(values[f"{EXPERTS}.{expert}.down_proj.bias"], plain[f"{EXPERTS}.down_proj_bias"][expert])
    written, before = read_tensors(tmp_path / "out"), read_tensors(source_)
    if scheme == "MXFP4A16":  # the bytes of the source, row by row
        assert torch.equal(written[f"{EXPERTS}.1.up_proj.weight_packed"], before[f"{EXPERTS}.gate_up_proj_blocks"][1, 1::2].flatten(1))
        assert torch.equal(written[f"{EXPERTS}.1.up_proj.weight_scale"], before[f"{EXPERTS}.gate_up_proj_scales"][1, 1::2])
    assert not streamquant.verify(tmp_path / "out", against=source_).problems


def fp8_stack(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Experts as transformers stacks those of a block FP8 model."""
    tensors: dict[str, Tensor] = {}
    plain = {}
    for leaf, rows, columns in (("gate_up_proj", 512, 128), ("down_proj", 128, 256)):
        parts = [sources.fp8_block(rows, columns, seed=rows + expert) for expert in range(E)]
        tensors[f"{EXPERTS}.{leaf}"] = torch.stack([part.tensors["weight"] for part in parts])
        tensors[f"{EXPERTS}.{leaf}_scale_inv"] = torch.stack([part.tensors["weight_scale_inv"] for part in parts])
        plain[f"{EXPERTS}.{leaf}"] = torch.stack([part.values_NK for part in parts])
    config = {"model_type": "qwen3_moe", **sources.FP8_CONFIG}
    return write_checkpoint(folder, tensors | ROUTER, config=config), plain | ROUTER


def test_codes_of_a_stack_with_one_block_in_a_row_are_kept(tmp_path: Path) -> None:
    """Every other line of scales of one element each is strided memory."""
    packed, exponent, _ = sources.mxfp4(64, 32)
    down, down_exponent, _ = sources.mxfp4(32, 32, seed=1)
    tensors = {
        f"{EXPERTS}.gate_up_proj_blocks": packed.view(1, 64, 1, 16),
        f"{EXPERTS}.gate_up_proj_scales": exponent.view(1, 64, 1),
        f"{EXPERTS}.down_proj_blocks": down.view(1, 32, 1, 16),
        f"{EXPERTS}.down_proj_scales": down_exponent.view(1, 32, 1),
    }
    streamquant.convert(
        write_checkpoint(tmp_path / "source", tensors, config={"model_type": "gpt_oss"}), tmp_path / "out", scheme="MXFP4A16"
    )
    written = read_tensors(tmp_path / "out")
    assert torch.equal(written[f"{EXPERTS}.0.up_proj.weight_packed"], packed[1::2])
    assert torch.equal(written[f"{EXPERTS}.0.up_proj.weight_scale"], exponent[1::2])


def test_a_stack_in_fp8_is_unpacked_whole_and_taken_apart_with_its_scales(tmp_path: Path) -> None:
    source_, plain = fp8_stack(tmp_path / "source")
    streamquant.convert(source_, tmp_path / "bf16", scheme="BF16")
    assert same(read_tensors(tmp_path / "bf16"), plain)
    streamquant.convert(source_, tmp_path / "out", scheme="FP8_BLOCK")
    written, before = read_tensors(tmp_path / "out"), read_tensors(source_)
    up = f"{EXPERTS}.2.up_proj"
    assert torch.equal(written[f"{up}.weight"].view(torch.uint8), before[f"{EXPERTS}.gate_up_proj"][2, 256:].view(torch.uint8))
    assert torch.equal(written[f"{up}.weight_scale"], before[f"{EXPERTS}.gate_up_proj_scale_inv"][2, 2:])
    assert not streamquant.verify(tmp_path / "out", against=source_).problems


# --- what does not fit ---------------------------------------------------------------------------------------------------

FP8_ROWS = sources.fp8_rows(64, 32).tensors["weight"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"gate_up_proj": weight(0, 64, 32)}, r"gate_up_proj has shape \[0, 64, 32\]; a stack of experts has 3 dimensions, none of 0"),
        ({"gate_up_proj": weight(2, 64, 32, 1)}, "a stack of experts has 3 dimensions"),
        ({"gate_up_proj": weight(2, 64, 32), "gate_up_proj.weight": weight(2, 64, 32)}, "are the same stack of experts"),
        (
            {"gate_up_proj": weight(2, 64, 32), "gate_up_proj_scales": weight(2, 64)},
            "gate_up_proj_scales beside it, which do not go together",
        ),
        ({"gate_up_proj": FP8_ROWS[None], "gate_up_proj_scale_inv": weight(2, 64)}, r"scale_inv has shape \[2, 64\]: .* has 1 experts"),
        ({"gate_up_proj": FP8_ROWS[None], "gate_up_proj_scale_inv": torch.tensor(1.0)}, r"scale_inv has shape \[\]: .* has 1 experts"),
        ({"gate_up_proj": FP8_ROWS[None], "gate_up_proj_scale_inv": weight(1, 64).double()}, "only FP8 stacked in rows is read"),
        ({"gate_up_proj_blocks": weight(2, 64, 1, 16), "gate_up_proj_scales": weight(2, 64, 1)}, "is not stored as gpt-oss stores MXFP4"),
        ({"gate_up_proj": FP8_ROWS[None]}, "is F8_E4M3 without scales; only BF16, F16, F32 can be quantized"),
        ({"gate_up_proj": weight(20000, 2, 1)}, "and others stack 20000 experts in 80000 bytes"),
        ({"gate_up_proj": weight(2, 64, 32), "1.up_proj.weight": weight(32, 32)}, "experts.1.up_proj.weight is stored twice"),
        ({"gate_up_proj": weight(2, 64, 32), "0.up_proj.weight": weight(2, 32, 32)}, "experts.0.up_proj.weight is stored twice"),
        (
            {"gate_up_proj.weight": weight(2, 64, 32), "gate_up_proj_blocks": weight(2, 64, 1, 16)},
            "_blocks beside it, which do not go together",
        ),
        ({"gate_up_proj": weight(2, 64, 32), "fc1": weight(2, 64, 32)}, "experts.0.gate_proj.weight is stored twice"),
    ],
)
def test_parts_of_a_stack_that_do_not_fit_are_named(tmp_path: Path, tensors: Mapping[str, Tensor], said: str) -> None:
    folder = write_checkpoint(
        tmp_path / "source",
        {f"{EXPERTS}.{name}": tensor for name, tensor in tensors.items()} | attention(),
        config={"model_type": "qwen3_moe"},
    )
    with pytest.raises(CheckpointError, match=said):
        streamquant.plan(folder, scheme="FP8_DYNAMIC")


def test_a_quantized_stack_of_no_known_layout_is_not_passed_through(tmp_path: Path) -> None:
    folder, _ = fp8_stack(tmp_path / "source")
    (folder / "config.json").write_text(json.dumps({"model_type": "newest_moe", **sources.FP8_CONFIG}))
    for settings in ({"scheme": "BF16"}, {"scheme": "FP8_DYNAMIC", "ignore": ["experts"]}):
        with pytest.raises(CheckpointError, match="is quantized in a layout not known: state it with --expert-layout"):
            streamquant.plan(folder, **settings)


def test_codes_in_a_stack_without_scales_are_left_as_they_are_beside_one_that_is_taken_apart(tmp_path: Path) -> None:
    codes = {"model.layers.1.mlp.experts.gate_up_proj": FP8_ROWS[None], "model.layers.1.mlp.experts.down_proj": FP8_ROWS[None, :32].clone()}
    both = dict(zip((f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"), stacked("rows"), strict=True)) | codes
    folder = write_checkpoint(tmp_path / "source", both, config={"model_type": "mixtral"})
    streamquant.convert(folder, tmp_path / "out", scheme="FP8_DYNAMIC", ignore=["model.layers.1"])
    written = read_tensors(tmp_path / "out")
    assert all(torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in codes.items())


def test_codes_in_a_stack_without_scales_are_not_passed_off_as_unpacked(tmp_path: Path) -> None:
    stack = {f"{EXPERTS}.gate_up_proj": sources.fp8_rows(64, 32).tensors["weight"][None]}
    others = {f"model.layers.0.self_attn.o_proj.{role}": tensor for role, tensor in sources.fp8_rows(64, 64).tensors.items()}
    source_ = write_checkpoint(tmp_path / "source", stack | others, config={"model_type": "qwen3_moe"})
    with pytest.raises(CheckpointError, match=r"gate_up_proj is F8_E4M3 without scales; .*--ignore"):
        streamquant.plan(source_, scheme="BF16")
    assert streamquant.plan(source_, scheme="BF16", ignore=["experts"])


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns", "interleaved"])
@pytest.mark.parametrize("threads", [1, 3])
def test_small_reads_of_a_stack_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, threads: int) -> None:
    model_type = {"rows": "qwen3_moe", "columns": "llama4", "interleaved": "gpt_oss"}[layout]
    source_ = source(tmp_path / "source", layout, model_type)
    streamquant.convert(source_, tmp_path / "usual", scheme="NVFP4A16")
    monkeypatch.setattr(memory, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(memory, "MIN_READ_BYTES", 3000)
    monkeypatch.setattr(memory, "MAX_READ_BYTES", 5000)
    monkeypatch.setattr(memory, "MAX_KEEP_BYTES", 100)
    streamquant.convert(source_, tmp_path / "odd", scheme="NVFP4A16", threads=threads)
    assert same(read_tensors(tmp_path / "odd"), read_tensors(tmp_path / "usual"))


def test_the_plan_of_a_stack_counts_its_bytes_once(tmp_path: Path) -> None:
    source_ = source(tmp_path / "source", "columns", "llama4")
    plan = streamquant.plan(source_, scheme="W8A8")
    assert plan.source_bytes == sum(spec.num_bytes for spec in streamquant.inspect(source_).checkpoint.tensors.values())
    seen: list[Any] = []
    streamquant.convert(source_, tmp_path / "out", scheme="W8A8", on_progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == plan.source_bytes
