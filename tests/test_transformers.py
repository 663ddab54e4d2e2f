"""transformers loads what we write, and computes with exactly the weights that `dequantize` gives, rounded once to its dtype.

Where a scheme quantizes inputs too, transformers does so on the fly; that is switched off to compare weights alone.
A mixture of experts is loaded too if STREAMQUANT_MOE_MODEL names the folder of one (Qwen3-MoE, all columns multiples of 64).
transformers 5.17 stacks experts of the formats in EXPERTS only. It refuses experts of int-quantized, MXFP8, block FP8 and zero
points, and dequantizes those of NVFP4 without their global scale: to wrong weights, and without a word. engines.toml says so.

Quantized sources and stacks of experts are read by transformers as well: what we read from them are the weights it computes with.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import disable_quantization
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamquant
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource
from streamquant.inputs import Stack, find_weights
from streamquant.schemes import SCHEMES
from streamquant.verify import dequantize
from tests import quantized_sources as sources
from tests.checkpoints import WIKI_LLAMA, read_tensors, with_data, write_checkpoint

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
    **{preset: with_data(preset) for preset in SCHEMES},
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
DEQUANTIZING = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config, "compressed-tensors": CompressedTensorsConfig}
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
        settings["quantization_config"] = DEQUANTIZING[stated["quant_method"]](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings).eval()


def load_with_our_weights(source: Path, out: Path, folder: Path) -> PreTrainedModel:
    """The unquantized model `source`, with the weights that we dequantize from `out`."""
    folder.mkdir()
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in dequantize(out)}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return load(folder)


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
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
    convert(WIKI_LLAMA, tmp_path, with_data(preset))
    model = load(tmp_path / "out")
    with_quantized_inputs = logits(model).float()
    without = logits(model.apply(disable_quantization)).float()
    noise = float((with_quantized_inputs - without).norm() / without.norm())
    # 4-bit inputs are coarse. Noise as large as the logits would mean that the config asks for something else than it should.
    assert 0 < noise < (0.5 if preset in ("MXFP4", "NVFP4") else 0.1)


# --- sources that are quantized, or have stacks of experts -------------------------------------------------------------

NUM_EXPERTS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
MLA_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
STACKED: dict[str, dict[str, Any]] = {
    **{model_type: {"num_local_experts": NUM_EXPERTS} for model_type in ("gpt_oss", "granitemoe", "llama4_text", "openai_privacy_filter")},
    **{model_type: {"num_experts": NUM_EXPERTS} for model_type in ("qwen3_5_moe_text", "qwen3_moe", "qwen3_vl_moe_text")},
    "aria_text": {"moe_num_experts": NUM_EXPERTS, "moe_topk": 1},
    "qwen3_vl_moe": {  # saved with stacks transposed, as they are published
        "text_config": SIZES | {"num_experts": NUM_EXPERTS},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64},
    },
}
SWAPPED = {f"{one}_proj.{role}": f"{other}_proj.{role}" for one, other in (("gate", "up"), ("up", "gate")) for role in ("weight", "bias")}
CLAMPED = {"gpt_oss", "openai_privacy_filter"}  # with the gate of gpt-oss, and biases
_EXPERT = re.compile(r".*\.experts\.(\d+)\.(.*)")


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """In bfloat16, and so large that activations are far from linear and gpt-oss clamps some."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model.bfloat16().eval()


def stack_folder(model_type: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A random model and its folder, with experts in 3-D."""
    model = random_weights(AutoModel.from_config(AutoConfig.for_model(model_type, **SIZES | STACKED[model_type])))
    # transformers takes the stacks of these two apart when it saves them as their authors do
    model.save_pretrained(folder / "source", save_original_format=model_type not in {"qwen3_moe", "qwen3_5_moe_text"})
    return model, folder / "source"


def read_experts(folder: Path) -> dict[int, dict[str, Tensor]]:
    """What we read of each expert, by the end of its name."""
    experts: dict[int, dict[str, Tensor]] = {}
    with LocalSource(folder) as source:
        inventory = find_weights(read_checkpoint(source), source)
        assert not inventory.problems
        stacks = [item for item in inventory.items if isinstance(item, Stack)]
        assert [len(stack.weights) for stack in stacks] in ([8, 4], [4, 8], [4, 4])
        for part in (part for stack in stacks for part in (*stack.weights, *stack.biases)):
            expert, leaf = _EXPERT.fullmatch(part.name).groups()
            value = part.decode(part.read(source, 0, part.shape[0]))
            experts.setdefault(int(expert), {})[leaf] = value.view(-1) if part.is_vector else value
    return experts


def expert_output(weights: dict[str, Tensor], input_TK: Tensor, *, clamped: bool) -> Tensor:
    """An expert as its model's paper has it, in float32, from 2-D matrices."""
    part = {leaf: weight.float() for leaf, weight in weights.items()}
    if "gate_up_proj.weight" in part:  # of aria, which vLLM takes unsplit
        part["gate_proj.weight"], part["up_proj.weight"] = part["gate_up_proj.weight"].chunk(2)
    gate, up = (F.linear(input_TK, part[f"{leaf}.weight"], part.get(f"{leaf}.bias")) for leaf in ("gate_proj", "up_proj"))
    if clamped:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        middle = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        middle = up * F.silu(gate)
    return F.linear(middle, part["down_proj.weight"], part.get("down_proj.bias"))


def their_expert_output(model: PreTrainedModel, expert: int, input_TK: Tensor) -> Tensor:
    """transformers' module of all experts, with every token sent to one of them."""
    (module,) = (module for module in model.float().modules() if type(module).__name__.endswith("Experts"))
    num_tokens = len(input_TK)
    with torch.inference_mode():
        match type(module).__name__:
            case "Llama4TextExperts":
                return module(input_TK.repeat(NUM_EXPERTS, 1)).view(NUM_EXPERTS, num_tokens, -1)[expert]
            case "AriaExperts":
                return module(input_TK, F.one_hot(torch.full((num_tokens,), expert), NUM_EXPERTS).float())
            case _:
                return module(input_TK, torch.full((num_tokens, 1), expert), torch.ones(num_tokens, 1))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", STACKED)
def test_experts_read_from_a_stack_compute_what_transformers_computes_with_the_stack(model_type, tmp_path):
    model, folder = stack_folder(model_type, tmp_path)
    input_TK = torch.randn(7, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    for expert, weights in read_experts(folder).items():
        expected = their_expert_output(model, expert, input_TK)
        assert relative_error(expert_output(weights, input_TK, clamped=model_type in CLAMPED), expected) < 1e-5
        # A gate that were taken for the up projection would show; aria's are not split.
        swapped = {SWAPPED.get(leaf, leaf): weight for leaf, weight in weights.items()}
        if model_type != "aria_text":
            assert relative_error(expert_output(swapped, input_TK, clamped=model_type in CLAMPED), expected) > 0.1


@pytest.mark.parametrize("model_type", STACKED)
def test_experts_of_a_stack_are_quantized_as_the_matrices_that_transformers_computes_with(model_type, tmp_path):
    _, folder = stack_folder(model_type, tmp_path)
    convert(folder, tmp_path, {"scheme": "FP8_DYNAMIC"})
    scheme, written = SCHEMES["FP8_DYNAMIC"], {}
    for name, tensor in dequantize(tmp_path / "out"):
        if match := _EXPERT.fullmatch(name):
            written[int(match[1]), match[2]] = tensor
    expected = {(expert, leaf): weight for expert, weights in read_experts(folder).items() for leaf, weight in weights.items()}
    assert written.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(written[key], scheme.decode(scheme.encode_whole(weight), weight.shape[1]) if weight.ndim == 2 else weight), key


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "NVFP4A16"])
@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_moe"])
def test_a_model_that_transformers_saves_with_stacks_becomes_what_it_becomes_without(model_type, scheme, tmp_path):
    sizes = SIZES | STACKED[model_type] | {"hidden_size": 256, "moe_intermediate_size": 128}
    model = random_weights(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)))
    outputs = []
    for stacked in (True, False):
        source = tmp_path / f"{stacked=}"
        model.save_pretrained(source / "source", save_original_format=not stacked)
        assert any(tensor.ndim == 3 for name, tensor in read_tensors(source / "source").items() if ".experts." in name) is stacked
        convert(source / "source", source, {"scheme": f"experts={scheme}"})
        outputs.append(read_tensors(source / "out"))
    stacks, singles = outputs
    assert stacks.keys() == singles.keys()
    for name, tensor in singles.items():
        assert torch.equal(stacks[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def assert_same_model(theirs: PreTrainedModel, ours: PreTrainedModel) -> None:
    """Bit for bit."""
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.int16), found[name].view(torch.int16)), name
    assert torch.equal(logits(theirs), logits(ours))


@needs_accelerate
def test_gpt_oss_in_mxfp4_is_unpacked_to_the_model_that_transformers_unpacks(tmp_path):
    config = AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=NUM_EXPERTS)
    random_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "plain")
    tensors = sources.gpt_oss_mxfp4(read_tensors(tmp_path / "plain"))
    stacks = {
        name.removesuffix("_blocks"): convert_moe_packed_tensors(blocks, tensors[name.replace("_blocks", "_scales")])
        for name, blocks in tensors.items()
        if name.endswith("_blocks")
    }
    assert len(stacks) == 2
    stated = json.loads((tmp_path / "plain" / "config.json").read_text()) | sources.quantization_config("mxfp4")
    source = write_checkpoint(tmp_path / "source", tensors, config=stated)
    convert(source, tmp_path, {"scheme": "BF16"})
    written = read_tensors(tmp_path / "out")
    assert all(torch.equal(written[name].view(torch.int16), stack.view(torch.int16)) for name, stack in stacks.items())
    assert_same_model(load(source), load(tmp_path / "out"))
    model = load(tmp_path / "plain")
    model.load_state_dict(stacks, strict=False)
    assert_same_model(model, load(tmp_path / "out"))


def test_every_code_under_every_exponent_of_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    """But for the three largest exponents, under which some codes are infinite in bfloat16."""
    code = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 253, 16, 16)
    exponents = torch.arange(253, dtype=torch.uint8).view(1, 253, 1).expand(1, 253, 16)
    tensors = {"model.layers.0.mlp.experts.down_proj_blocks": code, "model.layers.0.mlp.experts.down_proj_scales": exponents}
    convert(write_checkpoint(tmp_path / "source", tensors, config={"model_type": "gpt_oss"}), tmp_path, {"scheme": "BF16"})
    written = read_tensors(tmp_path / "out")["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(written.view(torch.int16), convert_moe_packed_tensors(code, exponents).view(torch.int16))


@needs_accelerate
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_fp8_in_blocks_is_unpacked_to_the_model_that_transformers_unpacks(scale_dtype, tmp_path):
    config = AutoConfig.for_model("deepseek_v3", **MLA_SIZES)
    random_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "plain")
    tensors = read_tensors(tmp_path / "plain")
    modules = [name.removesuffix(".weight") for name in tensors if re.search(r"_proj(_with_mqa)?\.weight$", name)]
    for seed, module in enumerate(modules):
        stored = sources.fp8_block(*tensors.pop(f"{module}.weight").shape, seed=seed, scale_dtype=scale_dtype)
        tensors |= {f"{module}.{role}": tensor for role, tensor in stored.tensors.items()}
    stated = json.loads((tmp_path / "plain" / "config.json").read_text()) | sources.FP8_CONFIG
    source = write_checkpoint(tmp_path / "source", tensors, config=stated)
    assert len(modules) == 28  # every linear layer but the routers and the lm_head
    convert(source, tmp_path, {"scheme": "BF16"})
    assert_same_model(load(source), load(tmp_path / "out"))


def test_stacks_in_fp8_are_unpacked_as_transformers_dequantizes_them(tmp_path):
    prefix, tensors, expected = "model.layers.0.mlp.experts", {}, {}
    for leaf, rows, columns in (("gate_up_proj", 512, 128), ("down_proj", 128, 256)):
        stored = [sources.fp8_block(rows, columns, seed=seed).tensors for seed in range(NUM_EXPERTS)]
        code, scale = (
            torch.stack([tensors[role].view(torch.uint8) if role == "weight" else tensors[role] for tensors in stored])
            for role in ("weight", "weight_scale_inv")
        )
        code = code.view(torch.float8_e4m3fn)
        tensors |= {f"{prefix}.{leaf}": code, f"{prefix}.{leaf}_scale_inv": scale}
        expected[f"{prefix}.{leaf}"] = Fp8Dequantize(None)._dequantize_one(code, scale, torch.bfloat16)
    source = write_checkpoint(tmp_path / "source", tensors, config={"model_type": "qwen3_5_moe_text"} | sources.FP8_CONFIG)
    convert(source, tmp_path, {"scheme": "BF16"})
    written = read_tensors(tmp_path / "out")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name].view(torch.int16), value.view(torch.int16)) for name, value in expected.items())
