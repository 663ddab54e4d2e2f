"""transformers loads what we write, and computes with exactly the weights that `dequantize` gives, rounded once to its dtype.

Where a scheme quantizes inputs too, transformers does so on the fly; that is switched off to compare weights alone.
A mixture of experts is loaded too if STREAMQUANT_MOE_MODEL names the folder of one (Qwen3-MoE, all columns multiples of 64).
transformers 5.17 stacks experts of the formats in EXPERTS only. It refuses experts of int-quantized, MXFP8, block FP8 and zero
points, and dequantizes those of NVFP4 without their global scale: to wrong weights, and without a word. engines.toml says so.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import disable_quantization
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, PreTrainedModel

import streamquant
from streamquant.schemes import SCHEMES
from streamquant.verify import dequantize
from tests.checkpoints import WIKI_LLAMA, read_tensors

MOE_MODEL = os.environ.get("STREAMQUANT_MOE_MODEL")

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),  # that weights are wanted dense is not in the file
]
needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
needs_moe_model = pytest.mark.skipif(MOE_MODEL is None, reason="STREAMQUANT_MOE_MODEL is not set")

NVFP4_AND_FP8 = """
[[rule]]
match = "*.mlp.*"
scheme = "NVFP4A16"

[[rule]]
match = "*.layers.0.*"
keep = true

[[rule]]
match = "*.self_attn.*"
scheme = "FP8_DYNAMIC"
"""
INT4_EXPERTS = """
scheme = "FP8_DYNAMIC"

[[rule]]
match = "*.experts.*"
scheme = "W4A16"
group_size = 64
"""
SETTINGS: dict[str, dict[str, Any]] = {
    **{preset: {"scheme": preset} for preset in SCHEMES},
    "FP8_DYNAMIC, one scale a tensor": {"scheme": "FP8_DYNAMIC", "strategy": "tensor"},
    "W8A16, one scale a channel": {"scheme": "W8A16", "strategy": "channel"},
    "W4A16_ASYM, one scale a channel": {"scheme": "W4A16_ASYM", "strategy": "channel"},
    "W3A16, with zero points": {"scheme": "W3A16", "symmetric": False, "group_size": 64},
    "W4A16, with lm_head": {"scheme": "W4A16", "include": ["lm_head"]},
    "NVFP4A16 mlp, FP8_DYNAMIC attention, a kept layer": {"recipe": NVFP4_AND_FP8},
    "FP8_BLOCK as native fp8": {"scheme": "FP8_BLOCK", "format": "fp8"},
}
TITLES = [pytest.param(title, marks=[needs_accelerate] if "native" in title else []) for title in SETTINGS]
EXPERTS: dict[str, dict[str, Any]] = {
    **{preset: {"scheme": preset} for preset in ("FP8_DYNAMIC", "FP8A16", "MXFP4A16", "MXFP4")},
    **{preset: {"scheme": preset, "group_size": 64} for preset in ("W8A16", "W4A16", "W3A16")},
    "W4A16 experts, FP8_DYNAMIC attention": {"recipe": INT4_EXPERTS},
}
REFUSED_EXPERTS = ("W8A8", "W4A16_ASYM", "W4A8", "NVFP4A16", "MXFP8A16", "MXFP8")
WITH_INPUTS = [preset for preset, scheme in SCHEMES.items() if scheme.activations is not None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from more, and on a busy machine threads that wait for each other take minutes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def convert(source: Path, folder: Path, settings: dict[str, Any]) -> streamquant.Conversion:
    """Into `folder`/out. `recipe` in the settings is the text of one."""
    if "recipe" in settings:
        recipe = folder / "recipe.toml"
        recipe.write_text(settings["recipe"])
        settings = {**settings, "recipe": recipe}
    return streamquant.convert(source, folder / "out", threads=1, device="cpu", **settings)


def load(folder: Path) -> PreTrainedModel:
    """The model in bfloat16, as its config says, with quantized weights dequantized."""
    settings = {}
    stated = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if stated is not None:
        dequantizing = FineGrainedFP8Config if stated["quant_method"] == "fp8" else CompressedTensorsConfig
        settings["quantization_config"] = dequantizing(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()


def load_with_our_weights(source: Path, out: Path, folder: Path) -> PreTrainedModel:
    """The unquantized model `source`, with the weights that we dequantize from `out`."""
    folder.mkdir()
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in dequantize(out)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return load(folder)


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, 4096, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def assert_computes_with_our_weights(source: Path, folder: Path, conversion: streamquant.Conversion) -> None:
    theirs, ours = load(folder / "out"), load_with_our_weights(source, folder / "out", folder / "dense")
    loaded, expected = theirs.state_dict(), ours.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), f"{name} differs in {int((loaded[name] != tensor).sum())} elements"
    # `loaded` may hold more, such as scales; it must not play a part.
    assert torch.equal(logits(theirs.apply(disable_quantization)), logits(ours))

    kept, originals = conversion.to_json()["kept"], read_tensors(source)
    assert kept
    for name in kept:
        assert torch.equal(loaded[name].view(torch.int16), originals[name].view(torch.int16)), f"{name} is not the source's"


@pytest.mark.parametrize("title", TITLES)
def test_transformers_computes_with_exactly_our_dequantized_weights(title, tmp_path):
    conversion = convert(WIKI_LLAMA, tmp_path, SETTINGS[title])
    assert_computes_with_our_weights(WIKI_LLAMA, tmp_path, conversion)


@needs_moe_model
@pytest.mark.parametrize("title", EXPERTS)
def test_transformers_stacks_experts_of_exactly_our_dequantized_weights(title, tmp_path):
    source = Path(str(MOE_MODEL))
    assert_computes_with_our_weights(source, tmp_path, convert(source, tmp_path, EXPERTS[title]))


@needs_moe_model
@pytest.mark.parametrize("preset", REFUSED_EXPERTS)
def test_transformers_does_not_load_the_experts_that_the_table_refuses(preset, tmp_path):
    """Should one pass, engines.toml can say so."""
    source, group = Path(str(MOE_MODEL)), {"group_size": 64} if "group_size" in SCHEMES[preset].settings else {}
    conversion = convert(source, tmp_path, {"scheme": preset, **group})
    with pytest.raises((RuntimeError, AssertionError), match=r"automatic conversion of the weights|differs in"):
        assert_computes_with_our_weights(source, tmp_path, conversion)


def test_transformers_gives_every_module_of_a_recipe_its_scheme_and_leaves_the_kept_layer_alone(tmp_path):
    convert(WIKI_LLAMA, tmp_path, {"recipe": NVFP4_AND_FP8})
    found = {name: getattr(module, "quantization_scheme", None) for name, module in load(tmp_path / "out").named_modules()}
    for name, scheme in found.items():
        if name.endswith("_proj"):
            fp8 = None if ".layers.0." in name else "float-quantized"
            assert (scheme and scheme.format.value) == ("nvfp4-pack-quantized" if ".mlp." in name else fp8), name
        else:
            assert scheme is None, name


@pytest.mark.parametrize("preset", WITH_INPUTS)
def test_transformers_quantizes_inputs_where_the_scheme_says_so(preset, tmp_path):
    convert(WIKI_LLAMA, tmp_path, {"scheme": preset})
    model = load(tmp_path / "out")
    with_quantized_inputs = logits(model).float()
    without = logits(model.apply(disable_quantization)).float()
    noise = float((with_quantized_inputs - without).norm() / without.norm())
    # 4-bit inputs are coarse. Noise as large as the logits would mean that the config asks for something else than it should.
    assert 0 < noise < (0.5 if preset == "MXFP4" else 0.1)
