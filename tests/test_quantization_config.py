"""What the config says resolves, by the rules of the readers, to what was written."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from streamquant.errors import CheckpointError
from streamquant.names import name_in_vllm
from streamquant.quantization_config import describe_quantization, quantized_modules
from streamquant.schemes import SCHEMES, Scheme, find_scheme

SCHEME_NAMES = ["W4A16", "FP8_BLOCK", "NVFP4A16", "MXFP8"]
LEAVES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.experts.11.up_proj", "mlp.1.0"]
MODULES = [f"{root}.{layer}.{leaf}" for root in ("model.layers", "model.side.layers") for layer in (0, 1, 10) for leaf in LEAVES] + [
    "lm_head"
]


def groups_that_match(config: Mapping[str, Any], module: str) -> list[str]:
    """Every group that a reader could choose for a module, written from compressed-tensors' rules: names first, then the class."""

    def named(entries: list[str]) -> bool:
        return any(re.match(entry[3:], module) if entry.startswith("re:") else entry == module for entry in entries)

    if named(config["ignore"]):
        return []
    by_name = [name for name, group in config["config_groups"].items() if named(group["targets"])]
    return by_name or [name for name, group in config["config_groups"].items() if "Linear" in group["targets"]]


@given(st.lists(st.sampled_from([None, *SCHEME_NAMES]), min_size=len(MODULES), max_size=len(MODULES)).filter(any))
@settings(max_examples=200, deadline=None)
def test_every_module_resolves_to_its_scheme_and_to_no_other(choices: list[str | None]) -> None:
    quantized = {module: find_scheme(name) for module, name in zip(MODULES, choices, strict=True) if name}
    kept = [module for module, name in zip(MODULES, choices, strict=True) if not name]
    config = describe_quantization(quantized, kept, absent_lm_head=False)
    scheme_of = quantized_modules(config)
    for module, name in zip(MODULES, choices, strict=True):
        groups = groups_that_match(config, module)
        assert len(groups) == (name is not None)
        resolved = scheme_of(module)
        assert (resolved.preset if resolved else None) == name
        if name:
            assert config["config_groups"][groups[0]]["weights"] == SCHEMES[name].weights_config


MISTRAL_LEAVES = ["attention.wq", "attention.wo", "feed_forward.w1", "gate", "experts.7.w1", "shared_experts.w1"]
MISTRAL_MODULES = [*(f"layers.{layer}.{leaf}" for layer in (0, 1, 10) for leaf in MISTRAL_LEAVES), "output"]


@given(st.lists(st.sampled_from([None, *SCHEME_NAMES]), min_size=len(MISTRAL_MODULES), max_size=len(MISTRAL_MODULES)).filter(any))
@settings(max_examples=200, deadline=None)
def test_modules_of_mistrals_own_layout_resolve_alike_by_their_own_names_and_by_those_in_vllm(choices: list[str | None]) -> None:
    quantized = {module: find_scheme(name) for module, name in zip(MISTRAL_MODULES, choices, strict=True) if name}
    kept = [module for module, name in zip(MISTRAL_MODULES, choices, strict=True) if not name]
    config = describe_quantization(quantized, kept, absent_lm_head=True)
    scheme_of = quantized_modules(config)
    for module, name in zip(MISTRAL_MODULES, choices, strict=True):
        in_vllm = name_in_vllm(module)
        assert in_vllm is not None
        prefixed = in_vllm if module == "output" else f"language_model.{in_vllm}"  # in a multimodal model
        for written in (module, in_vllm, prefixed):
            resolved = scheme_of(written)
            assert (resolved.preset if resolved else None) == name
            assert len(groups_that_match(config, written)) == (name is not None)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_reads_the_config_of_every_scheme(name: str) -> None:
    config = describe_quantization({"model.layers.0.up_proj": SCHEMES[name]}, ["lm_head"], absent_lm_head=False)
    read = QuantizationConfig.model_validate(config)
    assert read.quantization_status is not None
    assert read.ignore == ["lm_head"]
    assert read.format == SCHEMES[name].format == config["config_groups"]["group_0"]["format"]


def test_experts_of_one_scheme_and_attention_of_another_take_a_pattern_each() -> None:
    experts = [f"model.layers.{layer}.mlp.experts.{e}.{p}_proj" for layer in range(4) for e in range(8) for p in ("gate", "up", "down")]
    attention = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)]
    quantized: dict[str, Scheme] = dict.fromkeys(experts, SCHEMES["NVFP4A16"]) | dict.fromkeys(attention, SCHEMES["FP8_BLOCK"])
    config = describe_quantization(quantized, [], absent_lm_head=True)
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["nvfp4-pack-quantized", "float-quantized"]
    assert [len(group["targets"]) for group in config["config_groups"].values()] == [3, 1]
    assert config["ignore"] == ["lm_head"]


def test_lm_head_is_targeted_by_name_because_it_is_no_linear_to_vllm() -> None:
    config = describe_quantization(dict.fromkeys(["a.0.up_proj", "lm_head"], SCHEMES["W8A16"]), [], absent_lm_head=False)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]


def test_native_fp8_lists_what_is_dense() -> None:
    scheme = find_scheme("FP8_BLOCK", format="fp8")
    config = describe_quantization({"a.0.up_proj": scheme}, ["lm_head", "a.0.gate"], absent_lm_head=False)
    assert config["modules_to_not_convert"] == ["a.0.gate", "lm_head"]
    assert quantized_modules(config)("lm_head") is None
    assert quantized_modules(config)("a.0.up_proj") == scheme


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "gptq"},
        {"quant_method": "compressed-tensors"},
        {
            "quant_method": "compressed-tensors",
            "format": "x",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "x"}}},
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"targets": [], "weights": None}}},
        {"quant_method": "compressed-tensors", "format": "x", "config_groups": {}, "ignore": ["re:("]},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
    ],
)
def test_a_config_that_we_do_not_store_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="quantization_config"):
        quantized_modules(config)


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4.0},
        {"num_bits": True},
        {"group_size": 128.0},
        {"group_size": True},
        {"group_size": "128"},
        {"symmetric": "yes"},
        {"symmetric": None},
        {"strategy": ["group"]},
    ],
)
def test_a_value_of_another_type_is_refused(weights: dict[str, Any]) -> None:
    config = describe_quantization({"a.0.up_proj": SCHEMES["W4A16"]}, [], absent_lm_head=False)
    config["config_groups"]["group_0"]["weights"] |= weights
    with pytest.raises(CheckpointError, match=f"quantization_config: .*{next(iter(weights))}"):
        quantized_modules(config)
    config = describe_quantization({"a.0.up_proj": SCHEMES["W4A16"]}, [], absent_lm_head=False)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "group_size": [1]}
    with pytest.raises(CheckpointError, match="quantization_config: group_size is"):
        quantized_modules(config)


@pytest.mark.parametrize("pattern", ["re:(", "re:" + "(" * 5000, "re:a{99999999999}"])
def test_a_pattern_that_cannot_be_compiled_is_refused(pattern: str) -> None:
    config = describe_quantization({"a.0.up_proj": SCHEMES["W4A16"]}, [pattern], absent_lm_head=False)
    with pytest.raises(CheckpointError, match="invalid regular expression"):
        quantized_modules(config)
