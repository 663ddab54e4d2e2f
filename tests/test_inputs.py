"""Quantized sources: every format is unpacked to the values of its own formula, bit for bit, and stored anew without loss."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, FP8BlockDequantizer, ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import streamquant
from streamquant import memory
from streamquant.errors import CheckpointError, RequestError
from streamquant.plan import Copy, Encode
from streamquant.schemes import find_scheme
from streamquant.verify import dequantize
from tests import quantized_sources as sources
from tests.checkpoints import DATA_FREE, WIKI_LLAMA, attention, mlp, read_config, read_tensors, weight, write_checkpoint
from tests.quantized_sources import AWQ_CONFIG, FP8_CONFIG, Stored, gptq_config

MODULE = "model.layers.0.self_attn.o_proj"
NORM = {"model.norm.weight": weight(64)}


def named(stored: Stored, module: str = MODULE) -> dict[str, Tensor]:
    return {f"{module}.{role}": tensor for role, tensor in stored.tensors.items()}


CASES: dict[str, tuple[Stored, Mapping[str, Any]]] = {
    "FP8 blocks": (sources.fp8_block(384, 256), FP8_CONFIG),
    "FP8 blocks at the edge, as in kv_a_proj of DeepSeek-V3": (sources.fp8_block(576, 448), FP8_CONFIG),
    "FP8 blocks of 64": (sources.fp8_block(130, 192, block=64), sources.quantization_config("fp8", weight_block_size=[64, 64])),
    "FP8 blocks of a row": (sources.fp8_block(8, 64, block=(1, 16)), sources.quantization_config("fp8", weight_block_size=[1, 16])),
    "FP8 blocks larger than any weight": (
        sources.fp8_block(8, 64, block=(2**40, 32)),
        sources.quantization_config("fp8", weight_block_size=[2**40, 32]),
    ),
    "FP8 blocks without a config": (sources.fp8_block(256, 256), {}),
    "FP8 blocks with e8m0 scales": (sources.fp8_block(384, 256, scale_dtype=torch.float8_e8m0fnu), FP8_CONFIG),
    "FP8 blocks with bf16 scales": (sources.fp8_block(384, 256, scale_dtype=torch.bfloat16), FP8_CONFIG),
    "FP8 with a scalar scale_inv": (sources.fp8_tensor(384, 256, name="weight_scale_inv"), FP8_CONFIG),
    "FP8 per tensor": (sources.fp8_tensor(384, 256), {}),
    "FP8 per tensor, [1]": (sources.fp8_tensor(384, 256, shape=(1,)), {}),
    "FP8 per tensor, Mistral's own": (sources.fp8_tensor(384, 256, name="qscale_weight"), {}),
    "FP8 per row": (sources.fp8_rows(384, 256), {}),
    "FP8 per row, float32 [N]": (sources.fp8_rows(384, 256, flat=True, scale_dtype=torch.float32), {}),
    "ModelOpt FP8 in blocks, 4-D": (sources.fp8_modelopt_blocks(256, 384), {}),
    "ModelOpt NVFP4": (sources.modelopt_nvfp4(384, 256), {}),
    "DeepSeek-V4 MXFP4": (sources.deepseek_v4_mxfp4(384, 256), {}),
    "AutoAWQ": (sources.awq(384, 256), AWQ_CONFIG),
    "AutoAWQ without zero points": (sources.awq(384, 256, zeros=False), AWQ_CONFIG),
} | {
    f"GPTQ int{bits}{', sym' * sym}{', desc_act' * order}{', v2' * v2}": (
        sources.gptq(96, 256, bits=bits, sym=sym, order=order, v2=v2),
        gptq_config(bits=bits, sym=sym, desc_act=order, checkpoint_format="gptq_v2" if v2 else "gptq"),
    )
    for bits in (2, 3, 4, 8)
    for sym in (True, False)
    for order in (True, False)
    for v2 in (True, False)
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("case", CASES)
def test_unpacking_gives_the_values_of_the_format_bit_for_bit(tmp_path: Path, case: str) -> None:
    stored, config = CASES[case]
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM, config=config)
    scheme = {torch.bfloat16: "BF16", torch.float16: "FP16"}[stored.values_NK.dtype]
    streamquant.convert(source, tmp_path / "out", scheme=scheme)
    written = read_tensors(tmp_path / "out")
    assert written.keys() == {f"{MODULE}.weight", "model.norm.weight"}
    assert torch.equal(bits(written[f"{MODULE}.weight"]), bits(stored.values_NK))
    report = streamquant.verify(tmp_path / "out", against=source)
    assert not report.problems
    assert [error.relative_error for error in report.errors] == [0.0]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16", "W8A16"])
@pytest.mark.parametrize(
    "case", ["FP8 blocks at the edge, as in kv_a_proj of DeepSeek-V3", "ModelOpt NVFP4", "AutoAWQ", "GPTQ int3, sym, desc_act"]
)
def test_quantizing_a_quantized_source_is_quantizing_its_values(tmp_path: Path, case: str, scheme: str) -> None:
    """Nothing passes through a bf16 copy on disk, and nothing but the values counts. Small blocks: ranges start anywhere they may."""
    stored, config = CASES[case]
    settings = {"group_size": 32} if scheme == "W8A16" else {}
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM, config=config)
    plain = write_checkpoint(tmp_path / "plain", {f"{MODULE}.weight": stored.values_NK} | NORM)
    streamquant.convert(source, tmp_path / "out", scheme=scheme, **settings)
    streamquant.convert(plain, tmp_path / "expected", scheme=scheme, **settings)
    written, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected")
    if case == "ModelOpt NVFP4" and scheme == "NVFP4A16":
        assert torch.equal(written[f"{MODULE}.weight_packed"], stored.tensors["weight"])  # it was NVFP4 already
        return
    assert written.keys() == expected.keys()
    assert all(torch.equal(bits(written[name]), bits(expected[name])) for name in expected)
    assert read_config(tmp_path / "out") == read_config(tmp_path / "expected")


def test_parts_in_different_shards_and_dense_layers_among_quantized_ones(tmp_path: Path) -> None:
    first, second = sources.fp8_block(256, 256, seed=1), sources.fp8_block(128, 256, seed=2)
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    dense = {f"{MODULE}.weight": weight(256, 256), "model.layers.0.self_attn.v_proj.weight": weight(128, 256)} | NORM
    everything = named(first, q) | named(second, k) | dense
    shards = [{name: tensor for name, tensor in everything.items() if "scale" in name}]
    shards += [{name: tensor for name, tensor in everything.items() if "scale" not in name}]
    source = write_checkpoint(tmp_path / "source", *shards, config=FP8_CONFIG)
    streamquant.convert(source, tmp_path / "out", scheme="BF16")
    written = read_tensors(tmp_path / "out")
    assert torch.equal(written[f"{q}.weight"], first.values_NK)
    assert torch.equal(written[f"{k}.weight"], second.values_NK)
    assert all(torch.equal(written[name], tensor) for name, tensor in dense.items())


def test_fused_partners_share_what_their_values_tell_after_unpacking(tmp_path: Path) -> None:
    """llm-compressor looks for partners before it converts int4, and gives q, k and v three global scales (E13)."""
    plain = attention() | mlp("model.layers.0.mlp")
    streamquant.convert(write_checkpoint(tmp_path / "plain", plain), tmp_path / "int4", scheme="W4A16", max_shard_size=30_000)
    source = tmp_path / "int4"
    by_shard = {spec.name: spec.file for spec in streamquant.inspect(source).checkpoint.tensors.values()}
    assert len(set(by_shard.values())) > 2
    streamquant.convert(source, tmp_path / "out", scheme="NVFP4A16")
    written = read_tensors(tmp_path / "out")
    values = dict(dequantize(source))
    for fused in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        parent = "self_attn" if "q_proj" in fused else "mlp"
        names = [f"model.layers.0.{parent}.{leaf}" for leaf in fused]
        amax = max(values[f"{name}.weight"].abs().max() for name in names)
        shared = {float(written[f"{name}.weight_global_scale"]) for name in names}
        assert shared == {float(((1 / amax).bfloat16() * torch.tensor(2688.0)).bfloat16())}


# --- what is stored already --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [preset for preset in DATA_FREE if preset != "INT8"])
def test_our_own_outputs_are_read_back_exactly_and_pass_through_untouched(tmp_path: Path, preset: str) -> None:
    plain = attention() | mlp("model.layers.0.mlp") | mlp("model.layers.0.mlp.experts.0", seed=40, columns=128) | NORM
    streamquant.convert(write_checkpoint(tmp_path / "plain", plain), tmp_path / "first", scheme=preset, max_shard_size=40_000)
    streamquant.convert(tmp_path / "first", tmp_path / "again", scheme=preset)
    first, again = read_tensors(tmp_path / "first"), read_tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(bits(first[name]), bits(again[name])) for name in first)
    assert read_config(tmp_path / "first") == read_config(tmp_path / "again")

    streamquant.convert(tmp_path / "first", tmp_path / "plain again", scheme="BF16")
    unpacked = read_tensors(tmp_path / "plain again")
    assert unpacked.keys() == plain.keys()
    values = decompressed(first, read_config(tmp_path / "first"))
    assert all(torch.equal(unpacked[f"{module}.weight"], value.bfloat16()) for module, value in values.items())
    assert len(values) == 10


def decompressed(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What compressed-tensors makes of each module."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, role = name.rpartition(".")
        if any(other.startswith(f"{module}.weight_") for other in tensors):
            modules.setdefault(module, {})[role] = tensor
    values = {}
    for module, parts in modules.items():
        groups = list(config["config_groups"].values())
        packed = {"weight_packed"} & parts.keys()
        group = next(group for group in groups if len(groups) == 1 or (group["format"] == "pack-quantized") == bool(packed))
        args = QuantizationArgs(**group["weights"])
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=group["format"])
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        values[module] = compressor.decompress(parts, scheme)["weight"]
    return values


@pytest.mark.parametrize(
    ("case", "settings", "lossless"),
    [
        ("FP8 blocks", {"scheme": "FP8_BLOCK"}, True),
        ("FP8 blocks", {"scheme": "FP8_BLOCK", "format": "fp8"}, True),
        ("FP8 blocks with bf16 scales", {"scheme": "FP8_BLOCK", "format": "fp8"}, True),
        ("FP8 blocks with e8m0 scales", {"scheme": "FP8_BLOCK"}, True),
        ("ModelOpt FP8 in blocks, 4-D", {"scheme": "FP8_BLOCK"}, True),
        ("FP8 per tensor", {"scheme": "FP8_DYNAMIC", "strategy": "tensor"}, True),
        ("FP8 per tensor", {"scheme": "FP8_DYNAMIC"}, True),
        ("FP8 per tensor", {"scheme": "FP8_BLOCK"}, True),
        ("FP8 per tensor, Mistral's own", {"scheme": "FP8A16", "strategy": "channel"}, True),
        ("FP8 per row", {"scheme": "FP8_DYNAMIC"}, True),
        ("FP8 per row", {"scheme": "FP8A16"}, True),
        ("FP8 per row", {"scheme": "FP8_DYNAMIC", "observer": "mse"}, True),
        ("FP8 per row, float32 [N]", {"scheme": "FP8_DYNAMIC"}, True),
        ("FP8 per row", {"scheme": "FP8_BLOCK"}, False),
        ("FP8 blocks of a row", {"scheme": "FP8_DYNAMIC"}, False),
        ("DeepSeek-V4 MXFP4", {"scheme": "MXFP4A16"}, True),
        ("DeepSeek-V4 MXFP4", {"scheme": "MXFP4"}, True),
        ("AutoAWQ", {"scheme": "W4A16_ASYM", "group_size": 32}, True),
        ("AutoAWQ", {"scheme": "W4A16", "group_size": 32}, False),
        ("AutoAWQ", {"scheme": "W4A16_ASYM", "group_size": 64}, False),
        ("AutoAWQ without zero points", {"scheme": "W4A16", "group_size": 32}, True),
        ("GPTQ int4, sym", {"scheme": "W4A16", "group_size": 32}, True),
        ("GPTQ int4, sym, v2", {"scheme": "W4A16", "group_size": 32}, True),
        ("GPTQ int4", {"scheme": "W4A16_ASYM", "group_size": 32}, True),
        ("GPTQ int3, sym", {"scheme": "W3A16", "group_size": 32}, True),
        ("GPTQ int8, sym", {"scheme": "W8A16", "group_size": 32}, True),
        ("GPTQ int4, sym, desc_act", {"scheme": "W4A16", "group_size": 32}, False),
    ],
)
def test_codes_that_are_there_already_are_kept(tmp_path: Path, case: str, settings: dict[str, Any], lossless: bool) -> None:
    stored, config = CASES[case]
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM, config=config)
    (step,) = [step for step in streamquant.plan(source, **settings).steps if isinstance(step, Encode)]
    assert step.keeps_codes is lossless
    streamquant.convert(source, tmp_path / "out", **settings)
    (error,) = streamquant.verify(tmp_path / "out", against=source).errors
    assert (error.relative_error == 0) is lossless
    written = read_tensors(tmp_path / "out")
    if "weight" in stored.tensors and f"{MODULE}.weight" in written:
        assert torch.equal(bits(written[f"{MODULE}.weight"]), bits(stored.tensors["weight"])) is lossless


def test_the_codes_and_scales_of_modelopt_are_kept_and_its_multiplier_becomes_a_divisor(tmp_path: Path) -> None:
    parts = {
        f"model.layers.0.mlp.{leaf}": sources.modelopt_nvfp4(64, 128, seed=seed, scale_2=2.0**-13)
        for seed, leaf in enumerate(("gate_proj", "up_proj"))
    }
    tensors = {name: tensor for module, stored in parts.items() for name, tensor in named(stored, module).items()} | NORM
    streamquant.convert(write_checkpoint(tmp_path / "source", tensors), tmp_path / "out", scheme="NVFP4A16")
    written, values = read_tensors(tmp_path / "out"), dict(dequantize(tmp_path / "out"))
    for module, stored in parts.items():
        assert torch.equal(written[f"{module}.weight_packed"], stored.tensors["weight"])
        assert torch.equal(bits(written[f"{module}.weight_scale"]), bits(stored.tensors["weight_scale"]))
        assert written[f"{module}.weight_global_scale"].tolist() == [2.0**13]
        assert torch.equal(values[f"{module}.weight"].bfloat16(), stored.values_NK)
    plan = streamquant.plan(tmp_path / "source", scheme="NVFP4A16")
    assert set(plan.dropped.values()) == {"static scale of activations"}


def test_partners_that_do_not_share_their_scale_in_the_source_share_it_in_the_output(tmp_path: Path) -> None:
    """Checkpoints of llm-compressor have experts whose gate and up differ in it (E1)."""
    parts = {
        f"model.layers.0.mlp.{leaf}": sources.modelopt_nvfp4(64, 128, seed=seed, scale_2=scale)
        for seed, (leaf, scale) in enumerate([("gate_proj", 1e-4), ("up_proj", 3e-4)])
    }
    tensors = {name: tensor for module, stored in parts.items() for name, tensor in named(stored, module).items()} | NORM
    streamquant.convert(write_checkpoint(tmp_path / "source", tensors), tmp_path / "out", scheme="NVFP4A16")
    written = read_tensors(tmp_path / "out")
    assert len({float(written[f"{module}.weight_global_scale"]) for module in parts}) == 1
    assert all(error.relative_error < 0.12 for error in streamquant.verify(tmp_path / "out", against=tmp_path / "source").errors)


@pytest.mark.parametrize("settings", [{"scheme": "NVFP4A16"}, {"scheme": "FP8_BLOCK"}, {"scheme": "FP8_DYNAMIC"}, {"scheme": "MXFP8"}])
def test_mxfp4_becomes_nvfp4_and_fp8_without_changing_a_value(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Every code beside every exponent of a range of 15, in one tensor: NVFP4 would take 18, FP8 with one scale for them takes 15."""
    packed, exponent, values = sources.mxfp4(256, 384, exponents=(110, 125))
    stored = Stored({"weight": packed.view(torch.int8), "scale": exponent.view(torch.float8_e8m0fnu)}, values)
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM)
    streamquant.convert(source, tmp_path / "out", **settings)
    assert torch.equal(dict(dequantize(tmp_path / "out"))[f"{MODULE}.weight"].bfloat16(), values)
    (error,) = streamquant.verify(tmp_path / "out", against=source).errors
    assert error.relative_error == 0.0
    again = streamquant.plan(source, **settings, observer="mse") if settings["scheme"] != "MXFP8" else None
    assert again is None or next(step for step in again.steps if isinstance(step, Encode)).scheme.observer == "mse"


def test_nvfp4_takes_every_exponent_that_mxfp4_can_have_under_one_global_scale() -> None:
    packed, exponent, values = sources.mxfp4(18, 64)
    exponent = torch.arange(100, 118, dtype=torch.uint8).view(18, 1).expand(18, 2).contiguous()
    scheme = find_scheme("MXFP4A16")
    values = scheme.decode({"weight_packed": packed, "weight_scale": exponent}, 64).bfloat16()
    exact = find_scheme("NVFP4A16").exact_for(scheme)
    assert torch.equal(exact.decode(exact.encode_whole(values), 64).bfloat16(), values)


# --- another program's answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "converter", "settings"),
    [
        ("AutoAWQ", AutoAWQConverter(group_size=32), {"scheme": "W4A16_ASYM", "group_size": 32}),
        ("AutoAWQ without zero points", AutoAWQConverter(group_size=32, zero_point=False), {"scheme": "W4A16", "group_size": 32}),
        ("ModelOpt NVFP4", ModelOptNvfp4Converter(targets=["re:.*_proj"]), {"scheme": "NVFP4A16"}),
        ("FP8 blocks", FP8BlockDequantizer(targets=["re:.*_proj"]), {"scheme": "BF16"}),
        (
            "FP8 blocks at the edge, as in kv_a_proj of DeepSeek-V3",
            FP8BlockDequantizer(targets=["re:.*_proj"]),
            {"scheme": "BF16"},
        ),
        (
            "FP8 blocks of 64",
            FP8BlockDequantizer(targets=["re:.*_proj"], weight_block_size=(64, 64)),
            {"scheme": "BF16"},
        ),
    ],
)
def test_converters_of_compressed_tensors_write_the_same_bytes(tmp_path: Path, case: str, converter: Any, settings: dict[str, Any]) -> None:
    stored, config = CASES[case]
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM, config=config)
    streamquant.convert(source, tmp_path / "out", **settings)
    written, expected = read_tensors(tmp_path / "out"), converter.process(read_tensors(source))
    expected.pop(f"{MODULE}.input_global_scale", None)  # of activations, which NVFP4A16 does not quantize
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        # Theirs is [] where llm-compressor writes [1], as we do.
        assert torch.equal(bits(written[name]), bits(tensor.view(1) if name.endswith("global_scale") else tensor)), name


@pytest.mark.parametrize("program", [program for program in sources.PROGRAMS if "desc_act" not in program])
def test_a_model_stored_by_another_program_becomes_the_output_of_the_same_codes(tmp_path: Path, program: str) -> None:
    scheme = sources.PROGRAMS[program].scheme
    streamquant.convert(WIKI_LLAMA, tmp_path / "ours", scheme=scheme)
    source = sources.reencode(tmp_path / "ours", tmp_path / "theirs", program)
    assert all(step.keeps_codes for step in streamquant.plan(source, scheme=scheme).steps if isinstance(step, Encode))
    streamquant.convert(source, tmp_path / "out", scheme=scheme)
    ours, again = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "out")
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        if name.endswith("weight_global_scale"):  # stored as its reciprocal by ModelOpt
            assert torch.allclose(again[name], tensor, rtol=2e-7, atol=0)
        else:
            assert torch.equal(bits(again[name]), bits(tensor)), name
    assert read_config(tmp_path / "ours") == read_config(tmp_path / "out")


# --- beside the weights ------------------------------------------------------------------------------------------------


def test_the_report_accounts_for_every_tensor_of_a_quantized_source(tmp_path: Path) -> None:
    tensors = named(sources.fp8_rows(64, 128)) | named(sources.fp8_tensor(64, 128), "model.layers.0.self_attn.kv_b_proj") | NORM
    conversion = streamquant.convert(write_checkpoint(tmp_path / "source", tensors), tmp_path / "out", scheme="FP8_DYNAMIC")
    report = conversion.to_json()
    assert report["quantized"] == {f"{MODULE}.weight": "FP8_DYNAMIC"}
    assert report["as_stored"] == [f"{MODULE}.weight"]
    assert report["unpacked"] == {"model.layers.0.self_attn.kv_b_proj.weight": "BF16"}
    assert report["kept"].keys() == NORM.keys()
    assert report["dropped"] == {"model.layers.0.self_attn.kv_b_proj.input_scale": "static scale of activations"}


def test_the_head_of_a_tied_model_is_unpacked_if_it_is_there(tmp_path: Path) -> None:
    tensors = named(sources.fp8_rows(64, 128), "lm_head") | {"model.embed_tokens.weight": weight(64, 128)}
    source = write_checkpoint(tmp_path / "source", tensors, config={"tie_word_embeddings": True})
    streamquant.convert(source, tmp_path / "out", scheme="BF16")
    assert torch.equal(read_tensors(tmp_path / "out")["lm_head.weight"], sources.fp8_rows(64, 128).values_NK)


def test_a_kept_weight_of_a_quantized_source_is_unpacked_and_said_to_be(tmp_path: Path) -> None:
    tensors = named(sources.fp8_block(256, 256, seed=1)) | named(sources.fp8_block(128, 256, seed=2), "model.layers.0.self_attn.kv_b_proj")
    source = write_checkpoint(tmp_path / "source", tensors | NORM, config=FP8_CONFIG)
    plan = streamquant.plan(source, scheme="W4A16")
    fates = {
        step.members[0].module.rpartition(".")[2]: (step.scheme.preset, step.reason) for step in plan.steps if isinstance(step, Encode)
    }
    assert fates == {"o_proj": ("W4A16", ""), "kv_b_proj": ("BF16", "MLA projection that engines absorb")}
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert torch.equal(
        read_tensors(tmp_path / "out")["model.layers.0.self_attn.kv_b_proj.weight"], sources.fp8_block(128, 256, seed=2).values_NK
    )
    assert "model.layers.0.self_attn.kv_b_proj" in read_config(tmp_path / "out")["ignore"]


def test_several_groups_of_a_source_are_read_by_their_own_schemes(tmp_path: Path) -> None:
    plain = attention() | mlp("model.layers.0.mlp") | NORM
    line = "mlp=W4A16,*.o_proj=W8A16,attention=FP8_DYNAMIC"
    streamquant.convert(write_checkpoint(tmp_path / "plain", plain), tmp_path / "mixed", scheme=line)
    streamquant.convert(tmp_path / "mixed", tmp_path / "out", scheme=line)
    first, again = read_tensors(tmp_path / "mixed"), read_tensors(tmp_path / "out")
    assert all(torch.equal(bits(first[name]), bits(again[name])) for name in first)
    streamquant.convert(tmp_path / "mixed", tmp_path / "bf16", scheme="BF16")
    assert not streamquant.verify(tmp_path / "bf16", against=tmp_path / "mixed").problems


def test_a_cache_scheme_and_its_scales_stay_and_others_scales_do_not(tmp_path: Path) -> None:
    cache = {"model.layers.0.self_attn.k_scale": torch.ones(1), "model.layers.0.self_attn.v_scale": torch.ones(1)}
    plain = write_checkpoint(tmp_path / "plain", attention() | cache)
    streamquant.convert(plain, tmp_path / "first", scheme="FP8_DYNAMIC")
    assert cache.keys() <= read_tensors(tmp_path / "first").keys()  # whatever they are there, they are no scales of a cache
    assert not streamquant.verify(tmp_path / "first", against=plain).problems
    quantized = write_checkpoint(tmp_path / "quantized", named(sources.fp8_block(128, 128)) | cache, config=FP8_CONFIG)
    assert set(streamquant.plan(quantized, scheme="W4A16").dropped) == set(cache)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    streamquant.convert(write_checkpoint(tmp_path / "a", attention()), tmp_path / "source", scheme="FP8_DYNAMIC")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    source = write_checkpoint(tmp_path / "b", read_tensors(tmp_path / "source") | cache, config=config)
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert read_config(tmp_path / "out")["kv_cache_scheme"] == scheme
    assert cache.keys() <= read_tensors(tmp_path / "out").keys()


def test_a_scale_of_activations_beside_a_plain_weight_is_dropped_too(tmp_path: Path) -> None:
    """The output would have it beside a weight that is quantized otherwise."""
    source = write_checkpoint(tmp_path / "source", attention() | {f"{MODULE}.input_scale": torch.ones(1)})
    streamquant.convert(source, tmp_path / "out", scheme="FP8_DYNAMIC")
    assert f"{MODULE}.input_scale" not in read_tensors(tmp_path / "out")
    assert not streamquant.verify(tmp_path / "out", against=source).problems


def test_a_config_of_a_quantization_that_is_not_there_is_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source", attention(), config=FP8_CONFIG | {"text_config": {"quantization_config": {"a": 1}, "b": 2}}
    )
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["text_config"] == {"b": 2}


def test_unpacking_states_the_dtype_that_weights_then_have(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "source", named(sources.awq(64, 64)) | NORM, config=AWQ_CONFIG | {"text_config": {"dtype": "float16"}}
    )
    streamquant.convert(source, tmp_path / "out", scheme="BF16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"]) == ("bfloat16", {"dtype": "bfloat16"})
    assert torch.equal(read_tensors(tmp_path / "out")[f"{MODULE}.weight"], sources.awq(64, 64).values_NK.bfloat16())


# --- what does not fit -------------------------------------------------------------------------------------------------


def changed(stored: Stored, **tensors: Tensor | None) -> Stored:
    return stored._replace(tensors={role: tensor for role, tensor in (stored.tensors | tensors).items() if tensor is not None})


@pytest.mark.parametrize(
    ("stored", "config", "said"),
    [
        (
            changed(sources.fp8_block(256, 256), weight_scale_inv=torch.ones(3, 2)),
            FP8_CONFIG,
            r"weight_scale_inv has shape \[3, 2\]: .*128 x 128, \[2, 2\]",
        ),
        (changed(sources.awq(64, 64), qzeros=torch.zeros(1, 8, dtype=torch.int32)), AWQ_CONFIG, "do not make up a weight of AutoAWQ"),
        (sources.awq(64, 64), sources.quantization_config("awq", version="gemv"), "AutoAWQ's version gemv; only gemm is read"),
        (sources.gptq(64, 64), {}, "how zero points are stored is not known"),
        (sources.gptq(64, 64), gptq_config(checkpoint_format="marlin"), "checkpoint_format gptq or gptq_v2, and has gptq, marlin"),
        (changed(sources.gptq(64, 64), g_idx=torch.zeros(3, dtype=torch.int32)), gptq_config(), "do not make up a weight of GPTQ"),
        (changed(sources.modelopt_nvfp4(64, 64), weight_scale=None), {}, "looks like ModelOpt's NVFP4, but has no weight_scale"),
        (changed(sources.fp8_rows(64, 64), weight=None), {}, "weight_scale BF16 .* do not make up a weight of a kind that is read"),
        (sources.gptq(64, 64), gptq_config(checkpoint_format=["gptq"]), "checkpoint_format gptq or gptq_v2, and has gptq, "),
        (changed(sources.gptq(64, 64), qweight=torch.ones(8, 64)), gptq_config(), "do not make up a weight of GPTQ"),
        (changed(sources.gptq(64, 64), g_idx=torch.zeros(64)), gptq_config(), "do not make up a weight of GPTQ"),
        (changed(sources.modelopt_nvfp4(64, 64), weight=torch.tensor(1, dtype=torch.uint8)), {}, r"has shape \[\]; a matrix was expected"),
        (
            changed(sources.modelopt_nvfp4(64, 64), weight=torch.ones(64, 36, dtype=torch.uint8)),
            {},
            "has no weight_scale .* for 16 columns",
        ),
        (changed(sources.modelopt_nvfp4(64, 64), weight_scale_2=torch.ones(4)), {}, r"F32 \[4\]; that of ModelOpt's NVFP4 is one F32"),
        (
            Stored({"weight_packed": torch.ones(8, 64, dtype=torch.int8), "weight_scale": weight(8, 1)}, weight(1)),
            {},
            "weight_packed I8 .* do not make up a weight",
        ),
        (changed(sources.gptq(64, 64), scales=torch.zeros(0, 64).half()), gptq_config(), "qweight I32 .* do not make up a weight"),
        (changed(sources.fp8_rows(64, 64), weight=torch.zeros(64, 0).to(torch.float8_e4m3fn)), {}, "weight_scale BF16 .* do not make up"),
        (
            Stored(
                {
                    "weight_packed": torch.zeros(8, 8, dtype=torch.int32),
                    "weight_scale": weight(8, 1),
                    "weight_shape": torch.tensor([8, 64]),
                },
                weight(1),
            ),
            {},
            "weight_packed holds integers of how many bits",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, stored: Stored, config: Mapping[str, Any], said: str) -> None:
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM, config=config)
    with pytest.raises(CheckpointError, match=said):
        streamquant.plan(source, scheme="FP8_DYNAMIC")


@pytest.mark.parametrize(
    ("stored", "config", "said"),
    [
        (
            sources.gptq(64, 64, order=True),
            gptq_config(),
            "o_proj.weight: g_idx scatters the columns of groups, though .*desc_act is false",
        ),
        (
            changed(sources.gptq(64, 64), g_idx=torch.full((64,), -1, dtype=torch.int32)),
            gptq_config(desc_act=True),
            "o_proj.weight: the group of a column is -1 to -1; there are 2 groups",
        ),
        (sources.gptq(64, 64, sym=False), gptq_config(), "qzeros are not all in the middle, though config.json says sym is true"),
    ],
)
def test_a_config_that_the_tensors_contradict_is_found_while_reading(
    tmp_path: Path, stored: Stored, config: Mapping[str, Any], said: str
) -> None:
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM, config=config)
    with pytest.raises(CheckpointError, match=said):
        streamquant.convert(source, tmp_path / "out", scheme="W4A16", group_size=32)


INT = torch.int32


@pytest.mark.parametrize(
    ("settings", "parts", "said"),
    [
        (
            {"group_size": 32},
            {"weight_g_idx": torch.zeros(128)},
            r"weight_g_idx is F32 \[128\]; the groups of packed integers are I32 \[128\]",
        ),
        ({"group_size": 32}, {"weight_g_idx": torch.full((128,), 4, dtype=INT)}, "the group of a column is 4 to 4; there are 4 groups"),
        ({"group_size": 32}, {"weight_scale": torch.ones(128, 4, dtype=INT)}, "weight_scale is I32; scales of packed integers are BF16"),
        ({"group_size": 32}, {"weight_scale": weight(128, 5)}, "has 16 words a row; 160 columns of 4 bits take 20"),
        ({"strategy": "channel"}, {"weight_shape": torch.tensor([128, -1])}, "has 16 words a row; -1 columns of 4 bits take 0"),
        ({"strategy": "channel"}, {"weight_shape": torch.tensor([128, 2**62])}, "has 16 words a row; 4611686018427387904 columns"),
        ({"strategy": "channel"}, {"weight_shape": torch.tensor([64, 128])}, r"weight_shape says \[64, 128\]"),
    ],
)
def test_parts_of_packed_integers_that_do_not_fit_are_named(
    tmp_path: Path, settings: dict[str, Any], parts: dict[str, Tensor], said: str
) -> None:
    plain = write_checkpoint(tmp_path / "plain", {f"{MODULE}.weight": weight(128, 128)} | NORM)
    streamquant.convert(plain, tmp_path / "packed", scheme="W4A16", **settings)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    tensors = read_tensors(tmp_path / "packed") | {f"{MODULE}.{role}": tensor for role, tensor in parts.items()}
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    with pytest.raises(CheckpointError, match=said):
        streamquant.convert(source, tmp_path / "out", scheme="BF16")


@pytest.mark.parametrize("unset", [True, False])
def test_groups_of_packed_integers_may_be_given_by_column(tmp_path: Path, unset: bool) -> None:
    plain = write_checkpoint(tmp_path / "plain", {f"{MODULE}.weight": weight(128, 128)} | NORM)
    streamquant.convert(plain, tmp_path / "packed", scheme="W4A16_ASYM", group_size=32)
    index = torch.full((128,), -1, dtype=INT) if unset else torch.arange(128, dtype=INT) // 32
    tensors = read_tensors(tmp_path / "packed") | {f"{MODULE}.weight_g_idx": index}
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    values = [dict(dequantize(folder))[f"{MODULE}.weight"] for folder in (source, tmp_path / "packed")]
    assert torch.equal(*values)


@pytest.mark.parametrize("shapes", [([128], [128]), ([128, 3], [128, 3]), ([128, 4], [128, 2]), ([128, 1, 1], [128, 1, 1])])
def test_zero_points_of_int8_that_do_not_fit_are_named(tmp_path: Path, shapes: tuple[list[int], list[int]]) -> None:
    scale, zeros = torch.ones(shapes[0]), torch.zeros(shapes[1], dtype=torch.int8)
    parts = {"weight": torch.ones(128, 128, dtype=torch.int8), "weight_scale": scale, "weight_zero_point": zeros}
    source = write_checkpoint(tmp_path / "source", {f"{MODULE}.{role}": tensor for role, tensor in parts.items()} | NORM)
    with pytest.raises(CheckpointError, match=r"zero points of int8 and their scales are|does not fit int8 codes"):
        streamquant.plan(source, scheme="BF16")


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    streamquant.convert(write_checkpoint(tmp_path / "plain", attention()), tmp_path / "source", scheme="W4A16")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"R1": {}}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="weights are rotated"):
        streamquant.plan(tmp_path / "source", scheme="BF16")


def test_numbers_that_float16_may_not_hold_are_not_unpacked_to_it(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", named(sources.fp8_rows(64, 64)) | NORM)
    with pytest.raises(RequestError, match=r"o_proj.weight \(FP8 per row\) may hold numbers that float16 does not; .* --scheme BF16"):
        streamquant.plan(source, scheme="FP16")


def test_plain_schemes_have_no_settings(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="BF16 has no scales, so no observer mse"):
        find_scheme("BF16", observer="mse")
    with pytest.raises(RequestError, match="BF16 has no group size to choose"):
        find_scheme("BF16", group_size=32)
    source = write_checkpoint(tmp_path / "source", attention())
    with pytest.raises(RequestError, match="is quantized, so nothing would be unpacked"):
        streamquant.plan(source, scheme="BF16")


def test_codes_that_are_no_numbers_stop_the_run_by_name(tmp_path: Path) -> None:
    stored = sources.fp8_rows(64, 64)
    stored.tensors["weight"].view(torch.uint8)[3, 5] = 0x7F
    source = write_checkpoint(tmp_path / "source", named(stored) | NORM)
    for scheme, said in (
        ("BF16", "NaN or infinite weights"),
        ("W8A8", "NaN or infinite weights"),
        ("FP8_DYNAMIC", "codes or scales that are no numbers"),
    ):
        with pytest.raises(CheckpointError, match=rf"{MODULE}.weight holds {said}"):
            streamquant.convert(source, tmp_path / scheme, scheme=scheme)
    conversion = streamquant.convert(source, tmp_path / "zeros", scheme="BF16", allow_nonfinite=True)
    assert conversion.nonfinite == (f"{MODULE}.weight",)


def test_codes_without_scales_that_are_kept_are_copied(tmp_path: Path) -> None:
    codes = {"model.embed_tokens.weight": torch.ones(64, 128, dtype=torch.int8), "a.weight": weight(64, 64).to(torch.float8_e4m3fn)}
    source = write_checkpoint(tmp_path / "source", attention() | codes)
    streamquant.convert(source, tmp_path / "out", scheme="W4A16", ignore=["a"])
    written = read_tensors(tmp_path / "out")
    assert all(torch.equal(bits(written[name]), bits(tensor)) for name, tensor in codes.items())
    assert not streamquant.verify(tmp_path / "out", against=source).problems


def test_copies_are_still_copies(tmp_path: Path) -> None:
    """A tensor of a dtype that nothing here computes with passes byte for byte (E6)."""
    odd = {"a.scale_table": torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu), "a.indices": torch.arange(5)}
    source = write_checkpoint(tmp_path / "source", attention() | odd)
    plan = streamquant.plan(source, scheme="W8A8")
    assert {step.source.name for step in plan.steps if isinstance(step, Copy)} == odd.keys()
    streamquant.convert(source, tmp_path / "out", scheme="W8A8")
    written = read_tensors(tmp_path / "out")
    assert all(torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in odd.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_blocks_and_budget_change_no_byte_of_what_is_made_from_codes(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = named(sources.awq(384, 256, seed=3)) | named(sources.awq(256, 256, seed=4), "model.layers.0.mlp.down_proj") | NORM
    source = write_checkpoint(tmp_path / "source", tensors, config=AWQ_CONFIG)
    streamquant.convert(source, tmp_path / "usual", scheme="NVFP4A16")
    monkeypatch.setattr(memory, "BLOCK_ELEMENTS", 3000)
    monkeypatch.setattr(memory, "MIN_READ_BYTES", 5000)
    monkeypatch.setattr(memory, "MAX_READ_BYTES", 9000)
    monkeypatch.setattr(memory, "MAX_KEEP_BYTES", 1000)
    streamquant.convert(source, tmp_path / "odd", scheme="NVFP4A16", threads=threads)
    usual, odd = read_tensors(tmp_path / "usual"), read_tensors(tmp_path / "odd")
    assert all(torch.equal(bits(usual[name]), bits(odd[name])) for name in usual)


# --- any shape, any read -----------------------------------------------------------------------------------------------

FORMATS: dict[str, tuple[int, int, Callable[..., Stored], Mapping[str, Any]]] = {  # steps of rows and columns
    "FP8 blocks": (3, 13, partial(sources.fp8_block, block=(8, 16)), sources.quantization_config("fp8", weight_block_size=[8, 16])),
    "FP8 blocks with e8m0 scales": (23, 41, partial(sources.fp8_block, scale_dtype=torch.float8_e8m0fnu), FP8_CONFIG),
    "FP8 per row": (3, 13, sources.fp8_rows, {}),
    "FP8 per tensor": (3, 13, sources.fp8_tensor, {}),
    "ModelOpt NVFP4": (1, 16, sources.modelopt_nvfp4, {}),
    "DeepSeek-V4 MXFP4": (1, 32, sources.deepseek_v4_mxfp4, {}),
    "AutoAWQ": (8, 32, sources.awq, AWQ_CONFIG),
    "AutoAWQ without zero points": (8, 16, partial(sources.awq, group=16, zeros=False), AWQ_CONFIG),
} | {
    f"GPTQ int{width}{', desc_act' * order}": (
        32,
        32,
        partial(sources.gptq, bits=width, sym=False, order=order),
        gptq_config(bits=width, sym=False, desc_act=order),
    )
    for width in (2, 3, 4, 8)
    for order in (True, False)
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(FORMATS)),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 2**32),
    st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 8000)),
)
def test_any_shape_read_in_any_pieces_gives_the_values_of_the_format(
    tmp_path: Path, name: str, rows: int, columns: int, seed: int, sizes: tuple[int, int, int]
) -> None:
    row_step, column_step, write, config = FORMATS[name]
    stored = write(rows * row_step, columns * column_step, seed=seed)
    with TemporaryDirectory(dir=tmp_path) as folder, pytest.MonkeyPatch.context() as patch:
        for setting, size in zip(("BLOCK_ELEMENTS", "MIN_READ_BYTES", "MAX_READ_BYTES"), sizes, strict=True):
            patch.setattr(memory, setting, size)
        source = write_checkpoint(Path(folder, "source"), named(stored) | NORM, config=config)
        scheme = {torch.bfloat16: "BF16", torch.float16: "FP16"}[stored.values_NK.dtype]
        streamquant.convert(source, Path(folder, "out"), scheme=scheme)
        assert torch.equal(bits(read_tensors(Path(folder, "out"))[f"{MODULE}.weight"]), bits(stored.values_NK))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["W4A16", "W4A16_ASYM", "W3A16", "NVFP4A16", "MXFP4A16", "MXFP8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"]),
    st.integers(1, 40),
    st.integers(1, 3),
    st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 8000)),
)
def test_our_own_formats_of_any_shape_read_in_any_pieces_give_what_their_schemes_decode(
    tmp_path: Path, preset: str, rows: int, columns: int, sizes: tuple[int, int, int]
) -> None:
    with TemporaryDirectory(dir=tmp_path) as folder, pytest.MonkeyPatch.context() as patch:
        plain = write_checkpoint(Path(folder, "plain"), {f"{MODULE}.weight": weight(rows, 128 * columns, seed=rows)} | NORM)
        streamquant.convert(plain, Path(folder, "source"), scheme=preset)
        written = read_tensors(Path(folder, "source"))
        stored = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in written.items() if name.startswith(MODULE)}
        expected = find_scheme(preset).decode(stored, 128 * columns).bfloat16()
        for setting, size in zip(("BLOCK_ELEMENTS", "MIN_READ_BYTES", "MAX_READ_BYTES"), sizes, strict=True):
            patch.setattr(memory, setting, size)
        streamquant.convert(Path(folder, "source"), Path(folder, "out"), scheme="BF16")
        assert torch.equal(bits(read_tensors(Path(folder, "out"))[f"{MODULE}.weight"]), bits(expected))
