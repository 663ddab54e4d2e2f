"""What happens to every tensor, and what is refused before a weight is read."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streamquant
from streamquant.checkpoint.header import DTYPE_BITS
from streamquant.convert import plan_memory, resolve_devices
from streamquant.errors import CheckpointError, RequestError
from streamquant.memory import GPU_WORKING_BYTES, Gpus, Memory, budget_gpu_memory, budget_memory, row_blocks
from streamquant.plan import Copy, Encode, Plan
from tests.checkpoints import attention, mlp, weight, write_checkpoint

EXPERTS = "model.layers.0.mlp.experts"


def fates(plan: Plan) -> dict[str, str]:
    """Source tensor -> scheme, or why it is kept."""
    found = {}
    for step in plan.steps:
        if isinstance(step, Copy):
            found[step.source.name] = step.reason
        else:
            found |= {member.weight.name: step.scheme.title for member in step.members}
    return found


def groups(plan: Plan) -> list[list[str]]:
    return [[m.module for m in step.members] for step in plan.steps if isinstance(step, Encode) and len(step.members) > 1]


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """Attention, experts, a shared expert, a router, embeddings, norms; partners lie in different shards."""
    gates = mlp(f"{EXPERTS}.0") | mlp(f"{EXPERTS}.1", seed=20) | mlp("model.layers.0.mlp.shared_expert", seed=30) | attention()
    first = {name: tensor for name, tensor in gates.items() if "up_proj" not in name and "k_proj" not in name and "v_proj" not in name}
    second = {name: tensor for name, tensor in gates.items() if name not in first}
    others = {
        "model.embed_tokens.weight": weight(256, 128),
        "lm_head.weight": weight(256, 128),
        "model.layers.0.mlp.gate.weight": weight(2, 128),
        "model.layers.0.mlp.shared_expert_gate.weight": weight(1, 128),
        "model.layers.0.input_layernorm.weight": weight(128),
        "model.layers.0.norm1.weight": weight(128),
        "model.layers.0.self_attn.q_proj.bias": weight(128),
        "model.layers.0.step": torch.tensor(3),
    }
    return write_checkpoint(tmp_path / "moe", first, others, second, config={"num_experts": 2})


def test_every_tensor_is_accounted_for_and_no_default_needs_an_ignore_list(moe: Path) -> None:
    """llm-compressor quantizes embeddings, lm_head and routers unless they are listed, and trips over a norm named norm1 (E12)."""
    plan = streamquant.plan(moe, scheme="NVFP4A16")
    found = fates(plan)
    assert len(found) == len(streamquant.inspect(moe).checkpoint.tensors)
    assert {name: reason for name, reason in found.items() if reason != "NVFP4A16"} == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "lm_head",
        "model.layers.0.mlp.gate.weight": "router",
        "model.layers.0.mlp.shared_expert_gate.weight": "router",
        "model.layers.0.input_layernorm.weight": "not a 2-D weight",
        "model.layers.0.norm1.weight": "not a 2-D weight",
        "model.layers.0.self_attn.q_proj.bias": "not a 2-D weight",
        "model.layers.0.step": "not a 2-D weight",
    }
    assert plan.quantization_config["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"]


def test_fused_partners_are_found_across_shards_and_land_in_one(moe: Path) -> None:
    plan = streamquant.plan(moe, scheme="NVFP4A16", max_shard_size=20_000)
    assert [[module.rpartition(".")[2] for module in group] for group in groups(plan)] == [
        ["gate_proj", "up_proj"],
        ["gate_proj", "up_proj"],
        ["gate_proj", "up_proj"],
        ["q_proj", "k_proj", "v_proj"],
    ]
    assert len(plan.shards) > 4
    for step in plan.steps:
        assert len({spec.file for spec in step.outputs}) == 1


def test_outputs_tile_their_shards(moe: Path) -> None:
    for scheme in ("W4A16_ASYM", "FP8_BLOCK", "NVFP4A16"):
        assert_tiled(streamquant.plan(moe, scheme=scheme, max_shard_size=30_000))


def assert_tiled(plan: Plan) -> None:
    for shard in plan.shards:
        specs = sorted((spec for step in shard.steps for spec in step.outputs), key=lambda spec: (spec.start, spec.end))
        position = len(shard.header)
        for spec in specs:
            assert (spec.file, spec.start) == (shard.file, position)
            assert spec.start % (DTYPE_BITS[spec.dtype] // 8) == 0
            position = spec.end
        assert position == shard.num_bytes


@given(
    shapes=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([32, 64, 96, 416])), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    scheme=st.sampled_from(["FP8_DYNAMIC", "W8A8", "MXFP4", "MXFP8", "NVFP4A16"]),
    max_shard_size=st.integers(1, 200_000),
)
@settings(max_examples=40, deadline=None)
def test_any_shapes_are_laid_out_without_gap_or_overlap(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], dtype: torch.dtype, scheme: str, max_shard_size: int
) -> None:
    tensors = {f"m.{index}.w.weight": torch.zeros(shape, dtype=dtype) for index, shape in enumerate(shapes)}
    folder = write_checkpoint(tmp_path_factory.mktemp("any"), tensors)
    plan = streamquant.plan(folder, scheme=scheme, max_shard_size=max_shard_size)
    assert_tiled(plan)
    assert sum(shard.num_bytes for shard in plan.shards) == plan.output_bytes
    assert all(shard.num_bytes - len(shard.header) <= max_shard_size or len(shard.steps) == 1 for shard in plan.shards)


def test_a_layer_without_v_proj_is_fused_as_far_as_it_goes(tmp_path: Path) -> None:
    """llm-compressor raises 'Dependency weight not found' (E2)."""
    tensors = {name: tensor for name, tensor in attention().items() if "v_proj" not in name}
    plan = streamquant.plan(write_checkpoint(tmp_path / "k_eq_v", tensors), scheme="NVFP4A16")
    assert groups(plan) == [["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]]


def test_partners_are_sought_after_what_is_ignored(tmp_path: Path) -> None:
    """llm-compressor looks for w3 beside the w1 of an ignored vision tower and raises (E3)."""
    tensors = mlp("model.layers.0.mlp") | {"vision_tower.blocks.0.w1.weight": weight(64, 64), "side.0.w1.weight": weight(64, 64)}
    plan = streamquant.plan(write_checkpoint(tmp_path / "vlm", tensors), scheme="NVFP4A16", ignore=["side"])
    assert groups(plan) == [["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]]
    assert plan.quantization_config["ignore"] == ["lm_head", "side.0.w1", "vision_tower.blocks.0.w1"]


def test_a_partner_kept_by_default_keeps_its_partners(tmp_path: Path) -> None:
    indexer = "model.layers.0.self_attn.indexer"
    tensors = mlp("model.layers.0.mlp") | {f"{indexer}.wk.weight": weight(64, 64), f"{indexer}.weights_proj.weight": weight(64, 64)}
    plan = streamquant.plan(write_checkpoint(tmp_path / "indexer", tensors), scheme="W8A8")
    assert fates(plan)[f"{indexer}.wk.weight"] == f"fused with {indexer}.weights_proj, which is kept: indexer weights"


@pytest.mark.parametrize("rule", ["scheme = 'FP8_DYNAMIC'", "keep = true", "scheme = 'NVFP4A16'\nobserver = 'mse'"])
def test_partners_of_different_fate_are_refused_by_name(moe: Path, tmp_path: Path, rule: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[[rule]]\nmatch = '*.k_proj'\n{rule}")
    with pytest.raises(RequestError, match=r"one scheme: .*self_attn.q_proj NVFP4A16, .*self_attn.k_proj"):
        streamquant.plan(moe, scheme="NVFP4A16", recipe=recipe)


@pytest.mark.parametrize(
    ("line", "differs"),
    [
        ("*.experts.1=FP8_DYNAMIC,NVFP4A16", r"experts.0.down_proj NVFP4A16, .*experts.1.down_proj FP8_DYNAMIC"),
        ("*.experts.1=keep,NVFP4A16", r"experts.0.down_proj NVFP4A16, .*experts.1.down_proj kept"),
        ("*.experts.*.down_proj=keep,NVFP4A16", r"experts.0.down_proj kept, .*experts.0.gate_proj NVFP4A16"),
        ("*.experts.*.down_proj=W8A16,W4A16", r"experts.0.down_proj W8A16, .*experts.0.gate_proj W4A16"),
    ],
)
def test_experts_of_a_layer_in_more_than_one_scheme_are_refused_by_name(moe: Path, line: str, differs: str) -> None:
    with pytest.raises(RequestError, match=rf"{EXPERTS}: engines load .* one scheme: .*{differs} \(.*--ignore '{EXPERTS}'\)"):
        streamquant.plan(moe, scheme=line)
    plan = streamquant.plan(moe, scheme=line, ignore=[EXPERTS])
    assert all(".experts." not in member.module for step in plan.steps if isinstance(step, Encode) for member in step.members)


def test_experts_of_a_layer_may_differ_in_the_observer_and_between_layers(moe: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[rule]]\nmatch = '*.experts.1'\nscheme = 'NVFP4A16'\nobserver = 'mse'")
    found = fates(streamquant.plan(moe, scheme="NVFP4A16", recipe=recipe))
    assert found[f"{EXPERTS}.1.up_proj.weight"] == "NVFP4A16 (mse)"
    layers = mlp(f"{EXPERTS}.0") | mlp("model.layers.1.mlp.experts.0")
    streamquant.plan(write_checkpoint(tmp_path / "layers", layers), scheme="*.layers.1=W8A16,W4A16")


def test_an_expert_that_cannot_be_stored_is_named_with_a_way_out_that_works(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "odd", mlp(f"{EXPERTS}.0") | mlp(f"{EXPERTS}.1", rows=96) | attention())
    with pytest.raises(RequestError, match=rf"experts.1.down_proj.weight has 96 columns.*--ignore '{EXPERTS}'\)"):
        streamquant.plan(source, scheme="W4A16")
    streamquant.plan(source, scheme="W4A16", ignore=[EXPERTS])


def test_include_overrides_a_default_and_only_that(moe: Path) -> None:
    plan = streamquant.plan(moe, scheme="W8A16", include=["lm_head", "model.embed_tokens"])
    found = fates(plan)
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == "W8A16"
    assert found["model.layers.0.mlp.gate.weight"] == "router"
    assert plan.quantization_config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    ("role", "kept"),
    [
        ("experts", ["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj"]),
        ("shared_experts", ["mlp.shared_expert.gate_proj"]),
        ("attention", ["self_attn.q_proj", "self_attn.o_proj"]),
    ],
)
def test_a_role_to_ignore_stands_for_its_modules(moe: Path, role: str, kept: list[str]) -> None:
    found = fates(streamquant.plan(moe, scheme="W4A16", ignore=[role]))
    assert {name for name, fate in found.items() if fate == f"asked for by --ignore {role}"} >= {f"model.layers.0.{k}.weight" for k in kept}


def test_a_role_to_include_stands_for_its_modules(moe: Path) -> None:
    found = fates(streamquant.plan(moe, scheme="W8A16", include=["lm_head", "routers"]))
    assert found["lm_head.weight"] == found["model.layers.0.mlp.gate.weight"] == "W8A16"


def test_a_line_mixes_schemes_by_role_and_keeps_the_rest(moe: Path) -> None:
    found = fates(streamquant.plan(moe, scheme="experts=NVFP4A16, attention=FP8_BLOCK"))
    quantized = {"FP8_BLOCK": 4, "NVFP4A16": 6}
    assert {scheme: list(found.values()).count(scheme) for scheme in quantized} == quantized
    assert found["model.layers.0.mlp.shared_expert.up_proj.weight"] == "no rule asks for it"
    assert found["lm_head.weight"] == "lm_head"


def test_a_scheme_for_a_role_that_is_kept_by_default_is_obeyed(moe: Path) -> None:
    found = fates(streamquant.plan(moe, scheme="lm_head=W8A16,NVFP4A16"))
    assert found["lm_head.weight"] == "W8A16"
    assert found["model.embed_tokens.weight"] == "embedding"
    assert fates(streamquant.plan(moe, scheme="*=NVFP4A16,routers=keep"))["lm_head.weight"] == "lm_head"


def test_a_tower_or_prediction_layer_asked_for_keeps_what_is_no_linear_in_it(tmp_path: Path) -> None:
    mtp, tower = "model.layers.2", "model.visual"
    odd = ["self_attn.kv_b_proj", "mlp.gate", "embed_tokens", "eh_proj", "shared_head.head"]
    tensors = attention() | mlp(f"{mtp}.mlp.experts.0") | mlp(f"{tower}.blocks.0.mlp") | {f"{tower}.pos_embed.weight": weight(64, 128)}
    tensors |= {f"{mtp}.{name}.weight": weight(64, 128) for name in odd}
    source = write_checkpoint(tmp_path / "mtp", tensors)
    plan = streamquant.plan(source, scheme="mtp=W8A16,vision=FP8_DYNAMIC,W4A16")
    found = fates(plan)
    assert found[f"{mtp}.mlp.experts.0.up_proj.weight"] == "W8A16"
    assert found[f"{tower}.blocks.0.mlp.up_proj.weight"] == "FP8_DYNAMIC"
    assert found[f"{tower}.pos_embed.weight"] == "vision: embedding"
    assert {name: found[f"{mtp}.{name}.weight"] for name in odd} == {
        "self_attn.kv_b_proj": "mtp: MLA projection that engines absorb",
        "mlp.gate": "mtp: router",
        "embed_tokens": "mtp: embedding",
        "eh_proj": "mtp: what engines do not quantize there",
        "shared_head.head": "mtp: what engines do not quantize there",
    }
    named = streamquant.plan(source, scheme="mtp=W8A16,W4A16", include=["*.eh_proj"])
    assert fates(named)[f"{mtp}.eh_proj.weight"] == "W8A16"


@pytest.mark.parametrize("router", ["mlp.gate", "block_sparse_moe.gate", "router.proj", "mlp.shared_expert_gate", "mixer.gate"])
def test_routers_are_kept_and_ignored_by_their_full_names(tmp_path: Path, router: str) -> None:
    """auto-round knew only mlp.gate (#1486), llm-compressor quantizes router.proj (#2714)."""
    module = f"model.layers.1.{router}"
    plan = streamquant.plan(write_checkpoint(tmp_path / "moe", attention() | {f"{module}.weight": weight(8, 128)}), scheme="FP8_DYNAMIC")
    assert fates(plan)[f"{module}.weight"] == "router"
    assert plan.quantization_config["ignore"] == ["lm_head", module]


@pytest.mark.parametrize(
    "tower",
    ["visual.blocks.0.mlp", "vision_tower.encoder.layers.0.mlp.linear", "model.embed_vision", "mm_projector", "model.vision_tower.9"],
)
def test_towers_are_kept_although_their_projections_are_named_like_those_of_the_model(tmp_path: Path, tower: str) -> None:
    """Patterns such as *mlp.*_proj sweep them in (Model-Optimizer#2312)."""
    plan = streamquant.plan(write_checkpoint(tmp_path / "vlm", attention() | mlp(tower)), scheme="FP8_DYNAMIC")
    names = [f"{tower}.{leaf}_proj" for leaf in ("down", "gate", "up")]
    assert {fates(plan)[f"{name}.weight"] for name in names} == {"vision or audio tower, or projector"}
    assert plan.quantization_config["ignore"] == ["lm_head", *names]


@pytest.mark.parametrize(
    ("block", "engine_names"),
    [
        ("mtp.layers.0", ["mtp.layers.0.mlp.gate_up_proj"]),
        ("model.mtp_layers.0", ["model.layers.2.mlp.gate_up_proj", "model.layers.2.mtp_block.mlp.gate_up_proj"]),
        ("model.layers.2", ["model.layers.2.mtp_block.mlp.gate_up_proj", "model.layers.2.head"]),
        ("model.language_model.layers.2", ["language_model.model.layers.2.mlp.gate_up_proj"]),
        ("model.predictor.0", ["model.predictor.0.mlp.gate_up_proj"]),  # told by eh_proj and the norms beside the MLP
    ],
)
def test_prediction_layers_are_kept_and_ignored_by_their_own_and_the_engines_names(
    tmp_path: Path, block: str, engine_names: list[str]
) -> None:
    """Names that vLLM and SGLang build for their modules, from model_executor/models/*_mtp.py; fused without a mapping."""
    tensors = attention() | mlp(f"{block}.mlp") | {f"{block}.eh_proj.weight": weight(128, 256), f"{block}.enorm.weight": weight(128)}
    plan = streamquant.plan(write_checkpoint(tmp_path / "mtp", tensors), scheme="FP8_DYNAMIC")
    own = [name.removesuffix(".weight") for name in tensors if name.startswith(block) and "norm" not in name]
    assert {fates(plan)[f"{name}.weight"] for name in own} == {"multi-token prediction"}
    ignore = plan.quantization_config["ignore"]
    assert set(own) <= set(ignore)
    patterns = [re.compile(entry.removeprefix("re:")) for entry in ignore if entry.startswith("re:")]
    assert all(any(pattern.match(name) for pattern in patterns) for name in engine_names)
    assert not any(pattern.match(f"model.layers.{layer}.self_attn.qkv_proj") for pattern in patterns for layer in (0, 1, 20))


def test_no_pattern_for_prediction_layers_matches_what_is_quantized(tmp_path: Path) -> None:
    tensors = attention() | mlp("model.layers.2.mlp") | mlp("visual.layers.2.mlp")
    source = write_checkpoint(tmp_path / "both", tensors)
    kept = [f"model.layers.2.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")]
    ignore = streamquant.plan(source, scheme="vision=W8A16,FP8_DYNAMIC").quantization_config["ignore"]
    assert ignore == ["lm_head", *kept]
    assert streamquant.plan(source, scheme="mtp=W8A16,attention=W8A16").quantization_config["ignore"] == [
        "lm_head",
        *(f"visual.layers.2.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")),
    ]


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("stored", "config"),
    [
        ([EMBEDDING], {}),
        ([EMBEDDING], {"tie_word_embeddings": True}),
        ([EMBEDDING, HEAD], {"tie_word_embeddings": True}),
        ([EMBEDDING, HEAD], {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        {"include": ["lm_head"]},
        {"scheme": "lm_head=W8A16,W8A16"},
        {"include": ["re:lm_h"]},
        {"include": ["model.embed_tokens"]},
        {"scheme": "embeddings=W8A16,W8A16"},
    ],
)
def test_a_tied_head_is_refused_and_so_is_the_embedding_that_it_reads(
    tmp_path: Path, stored: list[str], config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    tensors = attention() | {name: weight(64, 128) for name in stored}
    source = write_checkpoint(tmp_path / "tied", tensors, config=config)
    with pytest.raises(RequestError, match=r"^(lm_head|re:lm_h|model.embed_tokens) cannot be quantized: the model ties .* \(do not ask"):
        streamquant.plan(source, **{"scheme": "W8A16"} | arguments)
    assert "lm_head" in streamquant.plan(source, scheme="W8A16").quantization_config["ignore"]


@pytest.mark.parametrize(
    ("stored", "config", "include"),
    [
        ([EMBEDDING, HEAD], {}, ["lm_head", "embeddings"]),
        ([EMBEDDING], {"tie_word_embeddings": False}, ["embeddings"]),
        ([EMBEDDING, "transformer.wpe.weight"], {}, ["transformer.wpe"]),
    ],
)
def test_what_is_not_tied_can_be_asked_for(tmp_path: Path, stored: list[str], config: dict[str, Any], include: list[str]) -> None:
    source = write_checkpoint(tmp_path / "untied", attention() | {name: weight(64, 128) for name in stored}, config=config)
    assert fates(streamquant.plan(source, scheme="W8A16", include=include))[stored[-1]] == "W8A16"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            "*.mlp.gate=FP8_DYNAMIC",
            r"pattern '\*.mlp.gate' gets FP8_DYNAMIC nowhere: .* by default, router \(.*--include 'model.layers.0.mlp.gate'",
        ),
        ("attention=FP8_DYNAMIC", r"role 'attention' gets .* engines absorb \(.*--include 'model.layers.0.self_attn.kv_b_proj'"),
        ("*.wk=W8A16", r"'\*.wk' gets .* fused with .*weights_proj, .*--include 'model.layers.0.indexer.weights_proj'"),
    ],
)
def test_a_rule_whose_matches_are_all_kept_by_default_is_refused_with_the_way_out(tmp_path: Path, rule: str, said: str) -> None:
    names = ["mlp.gate", "self_attn.kv_b_proj", "indexer.wk", "indexer.weights_proj"]
    tensors = mlp("model.layers.0.mlp") | {f"model.layers.0.{name}.weight": weight(64, 128) for name in names}
    source = write_checkpoint(tmp_path / "kept", tensors)
    with pytest.raises(RequestError, match=said) as error:
        streamquant.plan(source, scheme=f"{rule},W8A16")
    way_out = str(error.value).partition("--include '")[2].partition("'")[0]
    streamquant.plan(source, scheme=f"{rule},W8A16", include=[way_out])


def test_the_scheme_for_the_rest_may_find_nothing_to_quantize(moe: Path) -> None:
    found = fates(streamquant.plan(moe, scheme="attention=W4A16,experts=W8A16,shared_experts=W8A16,FP8_DYNAMIC"))
    assert "FP8_DYNAMIC" not in found.values()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scheme": "W4A16", "group_size": 96}, r"_proj.weight has 128 columns.*group size 96 \(128 would fit\).*--ignore"),
        ({"scheme": "W4A16", "ignore": ["no.such"]}, "pattern 'no.such' matches no module"),
        ({"scheme": "W4A16", "ignore": ["up_proj"]}, r"did you mean '\*.up_proj'"),
        ({"scheme": "W4A16", "ignore": ["mlp"]}, "--ignore: role 'mlp' matches no module"),
        ({"scheme": "W4A16", "include": ["vision"]}, "--include: role 'vision' matches no weight that can be quantized"),
        ({"scheme": "W4A16", "include": ["*.norm1"]}, "--include: pattern .* matches no weight that can be quantized"),
        ({"scheme": "FP8_BLOCK", "include": ["lm_head"]}, "lm_head.weight is a head or an embedding, where engines load no blocks"),
        ({"scheme": "W4A16", "ignore": ["*"]}, "nothing in .* would be quantized"),
        ({"scheme": "W4A16", "max_shard_size": "5 apples"}, "'5 apples' is no size"),
        ({"scheme": "W4A16", "max_shard_size": 0}, "less than a byte"),
    ],
)
def test_an_impossible_wish_fails_here_with_the_way_out(moe: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        streamquant.plan(moe, **arguments)


@pytest.mark.parametrize(
    ("tensors", "arguments", "said"),
    [
        ({"a.0.up_proj.weight": weight(64, 100)}, {"scheme": "NVFP4A16"}, "100 columns; NVFP4A16 needs a multiple of 16"),
        ({"a.0.up_proj.weight": weight(64, 48)}, {"scheme": "MXFP8"}, "48 columns; MXFP8 needs a multiple of 32"),
        ({"a.0.up_proj.weight": weight(64, 192)}, {"scheme": "FP8_BLOCK"}, "192 columns; FP8_BLOCK needs a multiple of 128"),
        (
            mlp("a.0", rows=192),
            {"scheme": "FP8_BLOCK", "ignore": ["*.down_proj"]},
            "gate_proj.weight has 192 rows and engines stack a fused partner below it",
        ),
        (mlp("a.0", rows=132), {"scheme": "W4A16_ASYM", "ignore": ["*.down_proj"]}, "gate_proj.weight has 132 rows and fused partners"),
        (
            {"a.0.gate_proj.weight": weight(64, 64), "a.0.up_proj.weight": weight(64, 64).half()},
            {"scheme": "FP8_DYNAMIC", "strategy": "tensor"},
            "up_proj.weight is F16 and its fused partner BF16: their one scale needs --scale-dtype float32",
        ),
        ({"a.0.up_proj.weight": weight(64, 64).double()}, {"scheme": "W8A8"}, "a.0.up_proj.weight is F64; only BF16, F16, F32"),
    ],
)
def test_a_weight_that_cannot_be_stored_is_named(tmp_path: Path, tensors: dict[str, Tensor], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((RequestError, CheckpointError), match=said):
        streamquant.plan(write_checkpoint(tmp_path / "odd", tensors), **arguments)


def test_a_block_with_fewer_rows_is_fine_below_its_partners(tmp_path: Path) -> None:
    """kv_a_proj_with_mqa of DeepSeek-V3 has 576 rows and is the last of its set."""
    prefix = "model.layers.0.self_attn"
    tensors = {f"{prefix}.q_a_proj.weight": weight(256, 128), f"{prefix}.kv_a_proj_with_mqa.weight": weight(192, 128)}
    assert len(groups(streamquant.plan(write_checkpoint(tmp_path / "mla", tensors), scheme="FP8_BLOCK"))) == 1


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"m.layers.0.mlp.experts.gate_up_proj": weight(2, 64, 64)},
            "in a layout that is not known for llama: state it with --expert-layout",
        ),
        ({"m.layers.0.mlp.experts.w13": weight(2, 64, 64)}, "in a layout that is not known for llama"),
        (
            {"a.weight": weight(64, 64), "a.weight_scale_inv": weight(1, 1).float()},
            r"a: weight_scale_inv F32 \[1, 1\] do not make up a weight",
        ),
        (
            {"a.weight": torch.zeros(64, 1, dtype=torch.uint8), "a.weight.absmax": weight(1)},
            r"absmax BF16 \[1\] of bitsandbytes do not make up",
        ),
    ],
)
def test_sources_that_are_not_supported_are_refused(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        streamquant.plan(write_checkpoint(tmp_path / "source", tensors), scheme="FP8_DYNAMIC")


def test_codes_without_a_scale_are_kept_only_if_asked_for(tmp_path: Path) -> None:
    tensors = attention() | {"a.weight": weight(64, 64).to(torch.float8_e4m3fn)}
    source = write_checkpoint(tmp_path / "source", tensors)
    with pytest.raises(RequestError, match=r"a.weight is F8_E4M3; only BF16, F16, F32 can be quantized .*--ignore 'a'"):
        streamquant.plan(source, scheme="FP8_DYNAMIC")
    assert fates(streamquant.plan(source, scheme="FP8_DYNAMIC", ignore=["a"]))["a.weight"] == "asked for by --ignore a"


def test_the_plan_as_json_names_every_byte_and_depends_on_nothing_else(moe: Path) -> None:
    plan = streamquant.plan(moe, scheme="W4A16")
    read = json.loads("".join(plan.json_parts()))
    assert read == plan.to_json()
    steps = [step for shard in read["shards"] for step in shard["steps"]]
    outputs = [spec for step in steps for member in step.get("members", []) for spec in member["outputs"]]
    outputs += [step["output"] for step in steps if step["action"] == "copy"]
    assert sum(spec["bytes"] for spec in outputs) + sum(len(shard.header) for shard in plan.shards) == read["output_bytes"]
    assert plan.digest == streamquant.plan(str(moe) + "/.", scheme="w4a16").digest
    assert plan.digest != streamquant.plan(moe, scheme="W4A16", observer="mse").digest


@given(st.integers(1, 2000), st.integers(1, 3000), st.sampled_from([1, 8, 128]), st.integers(1, 1 << 18))
def test_row_blocks_cover_all_rows_once(num_rows: int, num_columns: int, row_multiple: int, max_elements: int) -> None:
    blocks = list(row_blocks(num_rows, num_columns, row_multiple=row_multiple, max_elements=max_elements))
    assert [row for start, end in blocks for row in range(start, end)] == list(range(num_rows))
    assert all(start % row_multiple == 0 for start, _ in blocks)
    assert all((end - start) * num_columns <= max(max_elements, row_multiple * num_columns) for start, end in blocks)


def test_a_budget_too_small_is_refused_with_the_one_that_works(moe: Path) -> None:
    plan = streamquant.plan(moe, scheme="FP8_BLOCK")
    with pytest.raises(RequestError, match=r"give --max-memory (\d+)") as error:
        budget_memory(plan, max_bytes=1000, num_workers=8)
    enough = int(str(error.value).rpartition(" ")[2])
    memory = budget_memory(plan, max_bytes=enough, num_workers=8)
    assert memory.num_workers == 1
    assert memory.peak_bytes <= enough


# --- GPUs ------------------------------------------------------------------------------------------------------------


def gpu_memory(plan: streamquant.Plan, *, gib: float = 16.0, num_gpus: int = 1, num_workers: int = 8, **settings: Any) -> Memory:
    gpus = Gpus(num_gpus, int(gib * 2**30))
    return budget_gpu_memory(plan, **{"max_bytes": 2 << 30, "num_workers": num_workers, "gpus": gpus} | settings)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> streamquant.Plan:
    tensors = {f"model.layers.0.self_attn.{role}_proj.weight": weight(64, 300_000) for role in "qkv"}
    return streamquant.plan(write_checkpoint(tmp_path_factory.mktemp("wide"), tensors), scheme="NVFP4A16")


@pytest.mark.parametrize("num_gpus", [1, 2])
@pytest.mark.parametrize("gib", [0.2, 0.5, 1.0, 2.0, 16.0, 100.0])
@pytest.mark.parametrize("max_bytes", [100 << 20, 300 << 20, 2 << 30])
def test_work_on_gpus_keeps_both_budgets(wide: streamquant.Plan, gib: float, num_gpus: int, max_bytes: int) -> None:
    memory = gpu_memory(wide, gib=gib, num_gpus=num_gpus, max_bytes=max_bytes)
    assert 1 <= memory.num_workers <= 8
    assert memory.peak_bytes <= max_bytes
    assert memory.gpu_peak_bytes <= gib * 2**30
    block_bytes = max(memory.block_elements // 300_000, 1) * 300_000 * GPU_WORKING_BYTES
    assert -(-memory.num_workers // num_gpus) * (block_bytes + memory.keep_bytes) <= gib * 2**30
    assert memory.num_workers * (memory.to_gpu_bytes + memory.from_gpu_bytes) <= max_bytes


def test_gpus_with_room_get_large_blocks_and_many_workers(wide: streamquant.Plan) -> None:
    roomy, tight = gpu_memory(wide), gpu_memory(wide, gib=0.5)
    assert (roomy.num_workers, roomy.block_elements) == (8, 1 << 23)
    assert roomy.to_gpu_bytes == 1 << 24  # a task of bfloat16
    assert (tight.num_workers, tight.block_elements) == (6, 1 << 20)
    assert gpu_memory(wide, gib=0.5, num_gpus=2).num_workers == 8
    members = next(step.members for step in wide.steps if isinstance(step, Encode))
    assert roomy.keep_bytes >= sum(member.weight.decoded_bytes for member in members) > tight.keep_bytes


def test_gpus_too_small_for_a_block_are_refused_with_what_works(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": weight(128, 20_480)}
    plan = streamquant.plan(write_checkpoint(tmp_path / "source", tensors), scheme="FP8_BLOCK")
    with pytest.raises(RequestError, match=r"up_proj.weight: its smallest block .* give --max-gpu-memory \d+, or --device cpu") as error:
        gpu_memory(plan, gib=0.1)
    enough = int(re.search(r"--max-gpu-memory (\d+)", str(error.value))[1])  # type: ignore[index]
    assert gpu_memory(plan, gib=enough / 2**30).num_workers == 1
    with pytest.raises(RequestError, match=r"up_proj.weight: its smallest block .* give --max-memory \d+") as error:
        gpu_memory(plan, max_bytes=1 << 20)
    enough = int(str(error.value).rpartition(" ")[2])
    assert gpu_memory(plan, max_bytes=enough).num_workers == 1


def test_devices_are_the_cpu_or_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_devices("cpu") == (torch.device("cpu"),)
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert resolve_devices("auto") == resolve_devices("cuda") == (torch.device("cuda:1"),)
    assert resolve_devices("cuda:0,cuda:1") == (torch.device("cuda:0"), torch.device("cuda:1"))
    for device, said in {
        "cuda:0,cuda:2": "cuda:2 is not there",
        "cuda,cuda:1": "names a GPU twice",
        "cpu,cuda:0": "unknown device 'cpu'",
        "cuda:": "unknown device 'cuda:'",
    }.items():
        with pytest.raises(RequestError, match=said):
            resolve_devices(device)


def test_memory_of_a_gpu_is_what_is_free_there(wide: streamquant.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ([5 << 30, 3 << 30][device.index], 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    planned = partial(plan_memory, wide, devices=devices)
    assert planned().gpu_peak_bytes <= (4 << 30) * 4 // 5
    assert planned(threads=1).num_workers == 1
    with pytest.raises(RequestError, match=r"--max-gpu-memory 5GiB is more than the 4294967296 bytes that are free on cuda:1"):
        planned(max_gpu_memory="5GiB")
    with pytest.raises(RequestError, match="--max-gpu-memory 5GiB is for GPUs"):
        plan_memory(wide, devices=[torch.device("cpu")], max_gpu_memory="5GiB")
