"""Fused partners and default keeps, on names of real models."""

from typing import Any

import pytest

from streamquant.names import EMBEDDING, KEPT_ROLES, ModelFacts, fused_groups, name_in_vllm, reason_to_keep, role_of

LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("modules", "groups"),
    [
        (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"], [["q_proj", "k_proj", "v_proj"]]),
        (["self_attn.k_proj", "self_attn.q_proj"], [["q_proj", "k_proj"]]),  # no v: k serves as v
        (["mlp.experts.7.up_proj", "mlp.experts.7.gate_proj", "mlp.experts.8.gate_proj"], [["gate_proj", "up_proj"]]),
        (["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"], [["gate_proj", "up_proj"]]),
        (["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w2", "block_sparse_moe.experts.0.w3"], [["w1", "w3"]]),
        (["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj"], [["q_a_proj", "kv_a_proj_with_mqa"]]),
        (["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"], [["in_proj_qkv", "in_proj_z"]]),
        (["attn.to_q", "attn.to_k", "attn.to_v"], [["to_q", "to_k", "to_v"]]),
        (["attention.wq", "attention.wk", "attention.wv", "attention.wo"], [["wq", "wk", "wv"]]),
        (["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"], [["w1", "w3"]]),
        (["indexer.wk", "indexer.weights_proj", "indexer.wq_b"], [["wk", "weights_proj"]]),
        (["attn.wq_a", "attn.wkv"], [["wq_a", "wkv"]]),
        (["attn.wq_a", "attn.wkv_a_with_mqa"], [["wq_a", "wkv_a_with_mqa"]]),
        (["linear_attn.q_proj", "linear_attn.k_proj", "linear_attn.g_proj"], [["q_proj", "k_proj", "g_proj"]]),
        (["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.g_proj"], [["q_a_proj", "kv_a_proj_with_mqa", "g_proj"]]),
        (["mlp.c_fc_0", "mlp.c_fc_1"], [["c_fc_0", "c_fc_1"]]),
        (["mlp.w1"], []),  # a partner that is missing, or ignored
        (["a.gate_proj", "b.up_proj"], []),
    ],
)
def test_partners_are_found_by_parent_and_role(modules: list[str], groups: list[list[str]]) -> None:
    found = fused_groups((LAYER + module, 64) for module in modules)
    assert [[module.rpartition(".")[2] for module in group] for group in found] == groups


def test_weights_that_cannot_be_stacked_are_no_partners() -> None:
    assert fused_groups([("cross.q_proj", 64), ("cross.k_proj", 128), ("cross.v_proj", 128)]) == [("cross.k_proj", "cross.v_proj")]


FACTS = ModelFacts(num_layers=61, num_experts=512)


@pytest.mark.parametrize(
    ("module", "part_of_reason"),
    [
        ("lm_head", "lm_head"),
        ("output", "lm_head"),
        ("tok_embeddings", EMBEDDING),
        ("layers.3.gate", "router"),
        ("layers.3.attention.wkv_b", "MLA"),
        ("layers.3.attention.wk", "Mistral's order of rows"),
        ("layers.61.feed_forward.w1", "multi-token"),
        ("vision_encoder.transformer.layers.0.feed_forward.w1", "tower"),
        ("vision_language_adapter.w_in", "tower"),
        ("patch_merger.merging_layer", "tower"),
        ("mm_whisper_embeddings.whisper_encoder.transformer.layers.0.attention.wq", "tower"),
        ("embed_out", "lm_head"),
        ("language_model.lm_head", "lm_head"),
        ("model.embed_tokens", EMBEDDING),
        ("transformer.wte", EMBEDDING),
        ("bert.embeddings.word_embeddings", EMBEDDING),
        (LAYER + "mlp.gate", "router"),
        (LAYER + "block_sparse_moe.gate", "router"),
        (LAYER + "router.proj", "router"),
        (LAYER + "mlp.gate.wg", "router"),
        (LAYER + "mixer.gate", "router"),
        (LAYER + "mlp.shared_expert_gate", "router"),
        (LAYER + "ffn.chooser", "router (as many rows as experts)"),
        (LAYER + "linear_attn.in_proj_ba", "state space"),
        (LAYER + "mamba.x_proj", "state space"),
        (LAYER + "self_attn.kv_b_proj", "MLA"),
        (LAYER + "self_attn.indexer.weights_proj", "indexer"),
        ("visual.blocks.0.attn.qkv", "tower"),
        ("model.vision_tower.encoder.layers.0.mlp.gate_proj", "tower"),
        ("model.vision_tower.linear.up_proj", "tower"),
        ("model.embed_vision.embedding_projection", "tower"),
        ("multi_modal_projector.linear_1", "tower"),
        ("mm_projector.gate_proj", "tower"),
        ("audio_tower.layers.0.self_attn.q_proj", "tower"),
        ("vision_tower.encoder.layers.70.mlp.fc1", "tower"),  # more layers than the language model
        ("mtp.fc", "multi-token"),
        ("model.layers.61.eh_proj", "multi-token"),
        ("model.layers.61.mlp.experts.0.up_proj", "multi-token"),
        ("model.nextn_predict.up_proj", "multi-token"),
    ],
)
def test_what_is_kept_by_default(module: str, part_of_reason: str) -> None:
    assert part_of_reason in str(reason_to_keep(module, role_of(module, 512, FACTS)))


@pytest.mark.parametrize(
    "module",
    [
        "self_attn.k_proj", "mlp.experts.0.gate_proj", "mlp.shared_expert.up_proj", "mlp.gate_proj", "mlp.gate_up_proj", "mlp.c_fc",
        "self_attn.q_a_proj", "linear_attn.in_proj_qkvz", "linear_attn.out_proj", "block_sparse_moe.experts.3.w1", "self_attn.qkv_proj",
    ],
)  # fmt: skip
def test_projections_are_not_mistaken_for_routers_even_with_as_many_rows_as_experts(module: str) -> None:
    """Qwen3-Next has 512 experts, k_proj of 512 rows and experts of 512 rows."""
    role = role_of(LAYER + module, 512, FACTS)
    assert role not in KEPT_ROLES
    assert reason_to_keep(LAYER + module, role) is None


@pytest.mark.parametrize(
    ("role", "modules"),
    [
        ("experts", ["mlp.experts.0.gate_proj", "block_sparse_moe.experts.3.w1", "feed_forward.experts.1.down_proj",
                     "mixer.experts.0.up_proj", "ffn.experts.mlp.w1"]),
        ("shared_experts", ["mlp.shared_expert.up_proj", "mlp.shared_experts.down_proj", "mixer.shared_experts.up_proj", "shared_mlp.w1",
                            "feed_forward.shared_expert.gate_proj", "share_expert.up_proj"]),
        ("attention", ["self_attn.qkv_proj", "attention.wqkv", "attn.c_attn", "linear_attn.in_proj_qkvz", "linear_attn.out_proj",
                       "self_attention.query_key_value", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.indexer.wk",
                       "cross_attn.q_proj", "mixer.k_proj", "attn.wq_a", "self_attn.kv_b_proj", "SelfAttention.q", "self_attn.0.o_proj"]),
        ("mlp", ["mlp.gate_proj", "mlp.c_fc", "feed_forward.w1", "ffn.w2", "mixer.down_proj", "residual_mlp.w1", "mlps.0.up_proj",
                 "mlp.gate_up_proj"]),
        ("routers", ["mlp.gate", "mlp.shared_expert_gate", "mixer.gate", "router.proj", "mlp.router.classifier"]),
        (None, ["fc1", "conv.in_proj", "mixer.in_proj", "mamba.out_proj", "mixer.fc1_latent_proj", "per_layer_input_gate"]),
    ],
)  # fmt: skip
def test_the_parts_of_a_name_tell_the_role(role: str | None, modules: list[str]) -> None:
    assert {module: role_of(LAYER + module, 64, FACTS) for module in modules} == dict.fromkeys(modules, role)


@pytest.mark.parametrize(
    ("role", "module"),
    [
        ("vision", "model.visual.blocks.0.attn.qkv"),
        ("vision", "vision_tower.encoder.layers.70.mlp.fc1"),
        ("vision", "audio_tower.embed_tokens"),
        ("mtp", "mtp.layers.0.mlp.experts.3.up_proj"),
        ("mtp", "model.layers.61.self_attn.q_proj"),
        ("mtp", "model.layers.61.embed_tokens"),
        ("mtp", "model.layers.61.shared_head.head"),
    ],
)
def test_towers_and_prediction_layers_win_over_the_role_within(role: str, module: str) -> None:
    assert role_of(module, 512, FACTS) == role


def test_facts_come_from_the_language_model_of_a_nested_config() -> None:
    config = {"model_type": "vlm", "num_hidden_layers": 2, "text_config": {"num_hidden_layers": 40, "n_routed_experts": 64}}
    assert ModelFacts.from_config(config) == ModelFacts(num_layers=40, num_experts=64)
    assert ModelFacts.from_config(None) == ModelFacts()


def test_facts_come_from_params_json() -> None:
    params = {"dim": 7168, "n_layers": 61, "moe": {"num_experts": 128}, "vision_encoder": {"num_hidden_layers": 24}}
    assert ModelFacts.from_config(params) == ModelFacts(num_layers=61, num_experts=128)
    assert ModelFacts.from_config({"n_layers": 32, "moe": None}) == ModelFacts(num_layers=32)


@pytest.mark.parametrize("module", ["attention.wo", "attention.wq_b", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"])
def test_the_layers_of_mistrals_own_layout_are_quantized(module: str) -> None:
    name = f"layers.3.{module}"
    assert reason_to_keep(name, role_of(name, 512, FACTS)) is None


@pytest.mark.parametrize(
    ("module", "in_vllm"),
    [
        ("layers.3.attention.wq", "model.layers.3.self_attn.q_proj"),
        ("layers.3.attention.wkv_a_with_mqa", "model.layers.3.self_attn.kv_a_proj_with_mqa"),
        ("layers.3.feed_forward.w2", "model.layers.3.mlp.down_proj"),
        ("layers.3.gate", "model.layers.3.mlp.gate"),
        ("layers.3.experts.17.w3", "model.layers.3.mlp.experts.17.up_proj"),
        ("layers.3.shared_experts.w1", "model.layers.3.mlp.shared_experts.gate_proj"),
        ("output", "lm_head"),
        ("tok_embeddings", None),
        ("lm_head", None),
        ("layers.3.attn.wq_a", None),  # DeepSeek-V4
        ("model.layers.3.self_attn.q_proj", None),
        ("vision_encoder.transformer.layers.0.attention.wq", None),
    ],
)
def test_modules_of_mistrals_own_layout_have_other_names_in_vllm(module: str, in_vllm: str | None) -> None:
    assert name_in_vllm(module) == in_vllm


@pytest.mark.parametrize(
    ("config", "ties"),
    [
        ({}, None),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": "yes"}, None),
    ],
)
def test_a_tie_is_told_by_the_config_or_the_one_nested_in_it(config: dict[str, Any], ties: bool | None) -> None:
    assert ModelFacts.from_config(config).ties_embeddings is ties
