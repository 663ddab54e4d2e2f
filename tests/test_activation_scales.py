"""Scales of activations, which only a calibration can know: those of what the model is given, the same for fused weights, never zero."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamquant
from streamquant.calibrate import layers
from streamquant.calibrate.data import CalibrationOptions, load_calibration, load_tokenizer
from streamquant.errors import RequestError
from tests.checkpoints import WIKI_LLAMA, add_tokenizer, read_tensors, write_checkpoint, write_model, write_wiki_llama
from tests.test_cli import run

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")]

DEFAULT_TEXT = Path(layers.__file__).parent / "default_text.txt"
SUFFIXES = {"FP8": "input_scale", "NVFP4": "input_global_scale"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(DEFAULT_TEXT.read_text()[:40_000])
    return {"calibration_data": text, "samples": 10, "sequence_length": 48, "compute_dtype": "float32"}


def input_scales(folder: Path) -> dict[str, Tensor]:
    """By module."""
    tensors = read_tensors(folder)
    return {name.rpartition(".")[0]: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in SUFFIXES.values()}


def largest_inputs(source: Path, layer: int, options: dict[str, Any]) -> dict[str, float]:
    """What the linears of a layer are given: seen by hooks in the whole model."""
    transformers = pytest.importorskip("transformers")
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: defaultdict[str, float] = defaultdict(float)

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = max(seen[name], float(args[0].double().abs().max()))

        return note

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(f"model.layers.{layer}."):
            module.register_forward_pre_hook(hook(name))
    wanted = {key: value for key, value in options.items() if key in ("samples", "sequence_length")}
    calibration = load_calibration(CalibrationOptions(data=str(options["calibration_data"]), **wanted), load_tokenizer(source))
    with torch.no_grad():
        for sample in calibration.samples:
            model(input_ids=sample[None], use_cache=False)
    return dict(seen)


@pytest.mark.parametrize(("preset", "method"), [("FP8", "rtn"), ("NVFP4", "rtn"), ("FP8", "smoothquant"), ("NVFP4", "gptq")])
def test_scales_are_those_of_what_linears_are_given(preset: str, method: str, tmp_path: Path, options: dict[str, Any]) -> None:
    report = streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme=preset, method=method, **options)
    assert report.calibration is not None
    assert (report.calibration.method, report.calibration.fallbacks) == (method, [])
    scales = input_scales(tmp_path / "out")
    assert len(scales) == 42
    assert {tuple(scale.shape) for scale in scales.values()} == {(1,)}
    assert {scale.dtype for scale in scales.values()} == {torch.bfloat16 if preset == "FP8" else torch.float32}
    for layer in (0, 3):
        if method == "smoothquant":
            continue  # there inputs are divided by a scale
        for name, amax in largest_inputs(WIKI_LLAMA, layer, options).items():
            wanted = amax / 448 if preset == "FP8" else 448 * 6 / amax
            assert float(scales[name]) == pytest.approx(wanted, rel=2**-8 if preset == "FP8" else 2**-7)
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({float(scales[f"model.layers.{layer}.{leaf}"]) for leaf in fused}) == 1
    assert streamquant.verify(tmp_path / "out", against=WIKI_LLAMA).problems == []
    assert streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme=preset, method=method, **options).calibration is None


def test_smoothing_moves_what_is_large_out_of_the_inputs(tmp_path: Path, options: dict[str, Any]) -> None:
    """Where that makes the inputs easier to round, though not the weights."""
    tensors = read_tensors(WIKI_LLAMA)
    for layer in range(6):
        tensors[f"model.layers.{layer}.input_layernorm.weight"][::32] *= 64
        for leaf in ("q_proj", "k_proj", "v_proj"):
            tensors[f"model.layers.{layer}.self_attn.{leaf}.weight"][:, ::32] /= 64
    source = write_wiki_llama(tmp_path / "source", tensors)
    for method in ("rtn", "smoothquant"):
        streamquant.convert(source, tmp_path / method, scheme="NVFP4", method=method, **options)
    plain, smooth = input_scales(tmp_path / "rtn"), input_scales(tmp_path / "smoothquant")
    assert all(smooth[name] > 2 * plain[name] for name in plain if name.endswith("q_proj"))  # these are inverse scales
    report = streamquant.convert(source, tmp_path / "w8a8", scheme="W8A8", method="smoothquant", **options)
    assert report.calibration is not None
    moved = {record.name.partition(" ")[0] for record in report.calibration.records if record.is_pair and not record.fallback}
    assert {f"model.layers.{layer}.input_layernorm.weight" for layer in range(6)} <= moved


def test_weights_are_those_of_plain_rounding(tmp_path: Path, options: dict[str, Any]) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "nvfp4", scheme="NVFP4", **options)
    streamquant.convert(WIKI_LLAMA, tmp_path / "weights", scheme="NVFP4A16")
    ours, theirs = read_tensors(tmp_path / "nvfp4"), read_tensors(tmp_path / "weights")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert ours.keys() - theirs.keys() == {f"{name}.input_global_scale" for name in input_scales(tmp_path / "nvfp4")}


@pytest.mark.parametrize("preset", SUFFIXES)
def test_what_transformers_computes_is_near_the_model(preset: str, tmp_path: Path, options: dict[str, Any]) -> None:
    from tests.test_calibrate import divergence, logits  # which quantize inputs as the config says

    transformers = pytest.importorskip("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(WIKI_LLAMA)(DEFAULT_TEXT.read_text()[50_000:60_000])["input_ids"]
    input_ids_BT = torch.tensor(tokens[:1024]).view(8, 128)
    streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme=preset, **options)
    assert divergence(tmp_path / "out", input_ids_BT, logits(WIKI_LLAMA, input_ids_BT)) < {"FP8": 0.002, "NVFP4": 0.02}[preset]


def test_an_expert_without_tokens_takes_the_scale_of_the_others(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[0] = 0
            layer.mlp.gate.weight.data[2] = -layer.mlp.gate.weight.data[1]  # of these two one is always above zero

    sizes = {"moe_intermediate_size": 48, "num_experts": 3, "num_experts_per_tok": 1}
    source = write_model(tmp_path / "source", "qwen3_moe", change=starve, **sizes)
    monkeypatch.setattr(layers, "FEW_TOKENS", 0)
    report = streamquant.convert(source, tmp_path / "out", scheme="FP8", max_fallback=1.0, **options)
    assert report.calibration is not None
    assert {record.name.split(".experts.")[1][0] for record in report.calibration.fallbacks} == {"0"}
    scales = input_scales(tmp_path / "out")
    for name, scale in scales.items():
        if ".experts.0." in name:
            others = [scales[name.replace(".experts.0.", f".experts.{other}.")] for other in (1, 2)]
            assert scale == max(others)
    assert streamquant.verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (torch.zeros(1), "is not finite and positive"),
        (torch.tensor([torch.inf]), "is not finite and positive"),
        (torch.tensor([3.0]), "differ in the scale of their inputs"),
        (None, "input_global_scale is missing, should be F32"),
    ],
)
def test_verification_finds_scales_that_are_wrong(changed: Tensor | None, said: str, tmp_path: Path, options: dict[str, Any]) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme="NVFP4", **options)
    tensors = read_tensors(tmp_path / "out")
    name = "model.layers.2.self_attn.k_proj.input_global_scale"
    tensors.pop(name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    write_checkpoint(tmp_path / "wrong", tensors if changed is None else tensors | {name: changed}, config=config)
    (problem,) = streamquant.verify(tmp_path / "wrong").problems
    assert said in problem
    assert "k_proj" in problem


def test_a_source_with_scales_of_activations_is_measured_anew(tmp_path: Path, options: dict[str, Any]) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "first", scheme="FP8", **options)
    streamquant.convert(tmp_path / "first", tmp_path / "second", scheme="FP8", **options | {"samples": 3})
    first, second = input_scales(tmp_path / "first"), input_scales(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(scale <= 1.02 * first[name] for name, scale in second.items())
    assert streamquant.verify(tmp_path / "second", against=tmp_path / "first").problems == []


def test_what_cannot_be_measured_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"lm_head\.weight is in no decoder layer, where FP8 could measure its inputs; --ignore lm_head"):
        streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme="FP8", include=["lm_head"], **options)
    for arguments in ([], ["--method", "rtn", "--max-fallback", "0.1"]):
        result = run("convert", WIKI_LLAMA, tmp_path / "none", "--scheme", "mlp=NVFP4,FP8_DYNAMIC", *arguments)
        assert result.returncode == 2
        assert "NVFP4 stores activation scales, which take calibration data; without data use NVFP4A16, else add" in result.stderr
        assert not (tmp_path / "none").exists()


# --- keys and values -------------------------------------------------------------------------------------------------


def test_scales_of_keys_and_values_are_those_of_what_the_cache_holds(tmp_path: Path, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    report = streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme="W8A16", kv_cache="fp8", **options)
    assert report.calibration is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    tensors = read_tensors(tmp_path / "out")
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(WIKI_LLAMA, dtype=torch.float32).eval()
    wanted = {key: value for key, value in options.items() if key in ("samples", "sequence_length")}
    calibration = load_calibration(CalibrationOptions(data=str(options["calibration_data"]), **wanted), load_tokenizer(WIKI_LLAMA))
    with torch.no_grad():
        caches = [model(input_ids=sample[None], use_cache=True).past_key_values for sample in calibration.samples]
    for layer in range(6):
        for name, held in (("k_scale", "keys"), ("v_scale", "values")):
            scale = tensors[f"model.layers.{layer}.self_attn.{name}"]
            assert (scale.dtype, scale.shape) == (torch.bfloat16, (1,))
            largest = max(float(getattr(cache.layers[layer], held).abs().max()) for cache in caches)
            assert float(scale) == pytest.approx(largest / 448, rel=2**-8)
    assert streamquant.verify(tmp_path / "out", against=WIKI_LLAMA).problems == []
    plain = streamquant.convert(WIKI_LLAMA, tmp_path / "plain", scheme="W8A16")
    assert plain.calibration is None
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(tmp_path / "plain").items())
    lines = run("plan", WIKI_LLAMA, "--scheme", "FP8", "--kv-cache", "fp8").stdout
    assert "with data   42 x scale of inputs: model.layers.*" in lines
    assert "with data   6 x scales of keys and values: model.layers.*.self_attn" in lines
    with pytest.raises(RequestError, match="the source has scales of its KV cache, which are kept"):
        streamquant.plan(tmp_path / "out", scheme="FP8_DYNAMIC", kv_cache="fp8")
    name = "model.layers.1.self_attn.v_scale"
    write_checkpoint(
        tmp_path / "wrong", tensors | {name: torch.zeros(1)}, config=json.loads((tmp_path / "out" / "config.json").read_text())
    )
    assert streamquant.verify(tmp_path / "wrong").problems == [f"{name} is not finite and positive"]


def test_the_cache_of_weights_that_keep_their_codes_is_measured_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "first", scheme="W8A16")
    add_tokenizer(tmp_path / "first")
    report = streamquant.convert(tmp_path / "first", tmp_path / "second", scheme="W8A16", kv_cache="fp8", **options)
    assert report.calibration is not None
    assert report.calibration.records == ()
    first, second = read_tensors(tmp_path / "first"), read_tensors(tmp_path / "second")
    assert len(second) == len(first) + 2 * 6
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_caches_that_cannot_be_measured_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    latent = {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
    }  # fmt: skip
    cases = {"gpt_oss": (experts, "were not seen: the model computes attention by itself"), "deepseek_v3": (latent, "nothing to measure")}
    for model_type, (settings, said) in cases.items():
        source = write_model(tmp_path / model_type, model_type, **settings)
        with pytest.raises(RequestError, match=said):
            streamquant.convert(
                source, tmp_path / "out", scheme="attention=FP8_DYNAMIC,FP8_DYNAMIC", kv_cache="fp8", restart=True, **options
            )
    more = {f"extra.self_attn.{role}_proj.weight": torch.ones(128, 256, dtype=torch.bfloat16) for role in "kv"}
    source = write_wiki_llama(tmp_path / "more", read_tensors(WIKI_LLAMA) | more)
    with pytest.raises(RequestError, match=r"extra\.self_attn is in no decoder layer, where its keys and values could be measured"):
        streamquant.convert(source, tmp_path / "none", scheme="W8A16", kv_cache="fp8", **options)
    with pytest.raises(RequestError, match="--kv-cache takes calibration data: add --calibration-data"):
        streamquant.convert(WIKI_LLAMA, tmp_path / "none", scheme="W4A16", kv_cache="fp8")
    with pytest.raises(RequestError, match="stated in the config of compressed-tensors, and there will be none"):
        streamquant.convert(WIKI_LLAMA, tmp_path / "none", scheme="FP8_BLOCK", format="fp8", kv_cache="fp8", **options)
    with pytest.raises(RequestError, match="unknown KV cache 'int4'; known are fp8"):
        streamquant.plan(WIKI_LLAMA, scheme="W4A16", kv_cache="int4")
