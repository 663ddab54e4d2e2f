"""A model run layer by layer gives bit for bit what transformers gives with the whole of it, and the tap sees what its linears see."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from streamquant.calibrate import skeleton as skeleton_module
from streamquant.calibrate.skeleton import Read, Site, Skeleton, build_skeleton, shapes_of
from streamquant.calibrate.tap import Linear, Tap, norm_has_offset
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource
from streamquant.errors import RequestError
from streamquant.inputs import Stack, find_weights
from tests.checkpoints import read_tensors, write_checkpoint, write_model

pytestmark = pytest.mark.transformers

E, VOCAB = 4, 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
MOE = {"moe_intermediate_size": 24, "num_experts": E, "num_experts_per_tok": 2}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "head_dim": 8, "n_routed_experts": E, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": GEMMA,
    "mistral": {"sliding_window": 4},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "starcoder2": {"sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 3, "n_head": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
}
KIMI = {
    "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_heads": 4, "linear_head_dim": 8,
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": E, "num_experts_per_tok": 2},
    "deepseek_v3": MLA,
    "gpt_oss": {"num_local_experts": E, "num_experts_per_tok": 2, "sliding_window": 4},
    "qwen3_next": MOE | LINEAR_ATTENTION,
    "qwen3_5_moe_text": MOE | LINEAR_ATTENTION,
    "granitemoe": {"num_local_experts": E, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    "kimi_linear": MOE | MLA | KIMI,
    "minimax_m2": {"num_local_experts": E, "num_experts_per_tok": 2},
}
LLAMA4 = {"llama4_text": {"num_local_experts": E, "intermediate_size_mlp": 48, "attention_chunk_size": 8}}
STACKED = {f"{model_type} in stacks": EXPERTS[model_type] for model_type in ("qwen3_moe", "mixtral", "deepseek_v3")}
WRAPPED = {
    "qwen3_vl_moe": {
        "text_config": SIZES | MOE,
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    },
    "gemma3": {
        "text_config": SIZES | {"model_type": "gemma3_text"} | GEMMA,
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28},
    },
    "mistral3": {
        "text_config": SIZES | {"model_type": "mistral", "sliding_window": None},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "head_dim": 8,
        },
    },
}  # fmt: skip
MODELS = DENSE | EXPERTS | LLAMA4 | STACKED | WRAPPED
ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


class Made(NamedTuple):
    """A model of transformers, and ours from its files."""

    theirs: PreTrainedModel
    folder: Path


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Random models, made once."""
    made: dict[str, Made] = {}

    def model(title: str) -> Made:
        if title not in made:
            made[title] = _make(title, tmp_path_factory.mktemp("models") / title.replace(" ", "-"))
        return made[title]

    return model


def _make(title: str, folder: Path) -> Made:
    model_type, _, stacked = title.partition(" ")
    sizes = MODELS[title] if title in WRAPPED else SIZES | MODELS[title]
    auto = AutoModelForImageTextToText if title in WRAPPED else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "position_ids" not in name:
                tensor.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder, save_original_format=not stacked)
    assert any(tensor.ndim == 3 and ".experts." in name for name, tensor in read_tensors(folder).items()) >= bool(stacked)
    return Made(load(folder, auto), folder)


def load(folder: Path, auto: Any = AutoModelForCausalLM, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """As transformers loads it, but in memory of torch's own: in that of a file, which is not aligned, products may round differently."""
    model = auto.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def open_skeleton(folder: Path, **settings: Any) -> tuple[Skeleton, Read]:
    """The skeleton, and what reads from its folder, as a conversion would."""
    source = LocalSource(folder)
    inventory = find_weights(read_checkpoint(source), source)
    assert not inventory.problems
    skeleton = build_skeleton(folder, shapes_of(inventory), device="cpu", **settings)
    tensors = read_tensors(folder)
    parts = {part.name: part for item in inventory.items if isinstance(item, Stack) for part in (*item.weights, *item.biases)}

    def read(name: str) -> Tensor:
        if name not in parts:
            return tensors[name]
        return parts[name].decode(parts[name].read(source, 0, parts[name].shape[0]))

    return skeleton, read


def random_ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))


def their_layers(model: PreTrainedModel, prefix: str) -> nn.ModuleList:
    layers = model.get_submodule(prefix.removesuffix("."))
    assert isinstance(layers, nn.ModuleList)
    return layers


def their_states(model: PreTrainedModel, prefix: str, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What enters each layer, what leaves the last one, and the logits."""
    states: list[Tensor] = []
    layers = their_layers(model, prefix)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return states, logits


def assert_same_run(made: Made, skeleton: Skeleton, read: Read, batches: list[Tensor]) -> None:
    skeleton.load_outer(read)
    recorded = [skeleton.record(batch) for batch in batches]
    skeleton.drop_outer()
    expected = [their_states(made.theirs, skeleton.layer_prefix, batch)[0] for batch in batches]
    states = [hidden for hidden, _ in recorded]
    for index in range(skeleton.num_layers):
        layer = skeleton.load_layer(index, read)
        for number, (_, calls) in enumerate(recorded):
            assert torch.equal(states[number], expected[number][index]), index
            states[number] = skeleton.run(layer, states[number], calls[index])
        skeleton.drop_layer(index)
        assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(torch.equal(found, wanted[-1]) for found, wanted in zip(states, expected, strict=True))


@pytest.mark.parametrize("title", MODELS)
def test_a_model_run_layer_by_layer_is_the_whole_model_bit_for_bit(title, make):
    made = make(title)
    skeleton, read = open_skeleton(made.folder)
    batches = [random_ids(), random_ids(1), random_ids(2)[:1, :9]]
    assert_same_run(made, skeleton, read, batches)
    if title == "llama":  # and nothing is done with it but this
        states, logits = their_states(made.theirs, skeleton.layer_prefix, batches[0])
        assert torch.equal(made.theirs.lm_head(made.theirs.model.norm(states[-1])), logits)


@pytest.mark.parametrize("title", ["llama", "gemma3_text", "deepseek_v3"])
def test_it_is_so_in_bfloat16_too(title, make):
    theirs = load(make(title).folder, dtype=torch.bfloat16)
    skeleton, read = open_skeleton(make(title).folder, dtype=torch.bfloat16)
    assert_same_run(Made(theirs, make(title).folder), skeleton, read, [random_ids()])


@pytest.mark.parametrize(("model_type", "held"), [("llama", torch.bfloat16), ("gemma3_text", torch.float32)])
def test_embeddings_are_held_as_stored_unless_the_model_computes_with_them(model_type, held, tmp_path):
    folder = write_model(tmp_path / "model", model_type)
    skeleton, read = open_skeleton(folder)
    assert read("model.embed_tokens.weight").dtype == torch.bfloat16
    skeleton.load_outer(read)
    assert skeleton._decoder.embed_tokens.weight.dtype == held
    input_ids = random_ids()
    hidden, _ = skeleton.record(input_ids)
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, their_states(load(folder), skeleton.layer_prefix, input_ids)[0][0])


@pytest.mark.parametrize("title", MODELS)
def test_products_in_bfloat16_change_little(title, make):
    skeleton, read = open_skeleton(make(title).folder)
    skeleton.load_outer(read)
    hidden, calls = skeleton.record(random_ids())
    layer = skeleton.load_layer(1, read)
    exact = skeleton.run(layer, hidden, calls[1])
    seen: dict[Linear, Tensor] = {}
    with torch.autocast("cpu", torch.bfloat16), Tap(layer, seen.__setitem__, every_expert=True):
        rounded = skeleton.run(layer, hidden, calls[1])
    assert seen
    assert not torch.equal(exact, rounded)
    assert (rounded - exact).norm() < 0.1 * (exact - hidden).norm()


@pytest.mark.parametrize("title", MODELS)
def test_every_tensor_of_a_layer_has_a_site_and_putting_it_there_again_changes_nothing(title, make):
    made = make(title)
    skeleton, read = open_skeleton(made.folder)
    of_layers = [name for index in range(skeleton.num_layers) for name in skeleton.sites(index)]
    known = {*of_layers, *skeleton.outer_names}
    source = LocalSource(made.folder)
    left = {name for name in shapes_of(find_weights(read_checkpoint(source), source)) if name not in known}
    assert not [
        name for name in left if "vis" not in name and "projector" not in name and name not in {"lm_head.weight", "embed_out.weight"}
    ]
    assert len(of_layers) == len(set(of_layers))
    for index in range(skeleton.num_layers):
        layer = skeleton.load_layer(index, read)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        theirs = their_layers(made.theirs, skeleton.layer_prefix)[index].state_dict()
        assert before.keys() == theirs.keys()
        for name, site in skeleton.sites(index).items():
            skeleton.set_weight(layer, site, read(name))
        assert all(torch.equal(tensor, before[name]) and torch.equal(tensor, theirs[name]) for name, tensor in layer.state_dict().items())
        name, site = next((name, site) for name, site in reversed(skeleton.sites(index).items()) if len(read(name).shape) == 2)
        skeleton.set_weight(layer, site, read(name) + 1)
        changed = {parameter for parameter, tensor in layer.state_dict().items() if not torch.equal(tensor, before[parameter])}
        assert changed == {site.parameter}
        difference = layer.state_dict()[site.parameter] - before[site.parameter]
        assert int((difference != 0).sum()) == read(name).numel()


def test_what_is_read_may_be_written_to_afterwards(make):
    skeleton, read = open_skeleton(make("llama").folder)
    layer = skeleton.load_layer(0, read)
    site = skeleton.sites(0)["model.layers.0.mlp.up_proj.weight"]
    before = read("model.layers.0.mlp.up_proj.weight").clone()
    skeleton.set_weight(layer, site, torch.zeros(48, 32))
    assert torch.equal(read("model.layers.0.mlp.up_proj.weight"), before)


def test_what_layers_and_batches_have_in_common_is_kept_once(make):
    skeleton, read = open_skeleton(make("gemma3_text").folder)
    skeleton.load_outer(read)
    (_, first), (_, second) = skeleton.record(random_ids()), skeleton.record(random_ids(1))
    assert len(first) == 3
    tensors = [{id(value) for value in call.kwargs.values() if isinstance(value, Tensor)} for call in (*first, *second)]
    assert tensors[0] == tensors[2] == tensors[3] == tensors[5] != tensors[1]
    assert all(call.kwargs.get("past_key_values") is None for call in first)
    assert not any(kwarg == "hidden_states" for call in first for kwarg in call.kwargs)


# --- the tap --------------------------------------------------------------------------------------------------------


def tapped(
    skeleton: Skeleton, read: Read, index: int, *, every_expert: bool = False
) -> tuple[Tap, nn.Module, dict[Linear, list[Tensor]], Tensor]:
    """A run of a layer on the states that enter the first, with what the tap shows."""
    seen: defaultdict[Linear, list[Tensor]] = defaultdict(list)
    skeleton.load_outer(read)
    hidden, calls = skeleton.record(random_ids())
    layer = skeleton.load_layer(index, read)
    with Tap(layer, lambda linear, input_TK: seen[linear].append(input_TK.clone()), every_expert=every_expert) as tap:
        output = skeleton.run(layer, hidden, calls[index])
    assert torch.equal(output, skeleton.run(layer, hidden, calls[index]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    return tap, layer, dict(seen), hidden


@pytest.mark.parametrize("title", DENSE)
def test_the_tap_sees_what_hooks_on_linears_see(title, make):
    skeleton, read = open_skeleton(make(title).folder)
    hooked: dict[str, Tensor] = {}
    for name, module in skeleton.layer(1).named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: hooked.__setitem__(f"{name}.weight", args[0].clone()))
    seen: dict[Linear, Tensor] = {}
    skeleton.load_outer(read)
    hidden, calls = skeleton.record(random_ids())
    layer = skeleton.load_layer(1, read)
    with Tap(layer, seen.__setitem__, every_expert=True):
        skeleton.run(layer, hidden, calls[1])
    assert len(hooked) >= 4
    assert seen.keys() == {(name, None) for name in hooked}
    assert all(torch.equal(seen[Linear(name, None)], value.reshape(-1, value.shape[-1])) for name, value in hooked.items())
    sites = [site for name, site in skeleton.sites(1).items() if read(name).ndim == 2]
    assert {(site.parameter, site.expert) for site in sites} == seen.keys()


def test_what_is_given_to_several_is_one_tensor(make):
    skeleton, read = open_skeleton(make("llama").folder)
    seen: dict[Linear, Tensor] = {}
    skeleton.load_outer(read)
    hidden, calls = skeleton.record(random_ids())
    layer = skeleton.load_layer(0, read)
    with Tap(layer, seen.__setitem__, every_expert=True):
        skeleton.run(layer, hidden, calls[0])
    assert len({id(seen[Linear(name, None)]) for name in ATTENTION}) == 1


def is_matrix(name: str, site: Site) -> bool:
    return name.endswith(".weight") and "norm" not in name and "conv1d" not in name


@pytest.mark.parametrize("title", [*EXPERTS, *STACKED])
def test_every_expert_is_given_every_token_and_the_output_stays_the_same(title, make):
    skeleton, read = open_skeleton(make(title).folder)
    tap, layer, seen, _ = tapped(skeleton, read, 1, every_expert=True)
    routed_tap, _, routed, _ = tapped(skeleton, read, 1)
    sites = {name: site for name, site in skeleton.sites(1).items() if is_matrix(name, site)}
    assert {(site.parameter, site.expert) for site in sites.values()} == seen.keys()
    experts = [site for site in sites.values() if site.expert is not None]
    assert len(experts) == 3 * E
    total = 0
    for site in experts:
        (every,) = seen[Linear(site.parameter, site.expert)]
        assert every.shape == (24, site.view(layer.get_parameter(site.parameter)).shape[1])
        num_routed = tap.routed_tokens(site)
        assert num_routed == routed_tap.routed_tokens(site)
        total += num_routed
        chosen = routed.get(Linear(site.parameter, site.expert), [torch.zeros(0, every.shape[1])])[0]
        assert len(chosen) == num_routed
        # Rows of other batch sizes may round differently, but they are the same tokens.
        assert all(bool(torch.isclose(every, row, rtol=1e-4, atol=1e-5).all(1).any()) for row in chosen)
    assert total == 3 * 2 * 24
    assert tap.routed_tokens(next(site for site in sites.values() if site.expert is None)) is None


def test_all_experts_are_shown_the_same_tensor(make):
    """So that a Hessian for all of them is computed once."""
    skeleton, read = open_skeleton(make("gpt_oss").folder)
    seen: dict[Linear, Tensor] = {}
    skeleton.load_outer(read)
    hidden, calls = skeleton.record(random_ids())
    layer = skeleton.load_layer(0, read)
    with Tap(layer, seen.__setitem__, every_expert=True):
        skeleton.run(layer, hidden, calls[0])
    assert len({seen[Linear("mlp.experts.gate_up_proj", expert)].data_ptr() for expert in range(E)}) == 1


def test_experts_that_are_run_at_once_are_shown_what_is_routed_to_them(make):
    skeleton, read = open_skeleton(make("llama4_text").folder)
    tap, _, seen, _ = tapped(skeleton, read, 1, every_expert=True)
    sites = [site for name, site in skeleton.sites(1).items() if site.expert is not None]
    assert len(sites) == 3 * E
    assert sum(tap.routed_tokens(site) for site in sites if "down" in site.parameter) == 24
    for site in sites:
        assert [len(each) for each in seen[Linear(site.parameter, site.expert)]] == [tap.routed_tokens(site)]


def test_counts_add_up_over_batches(make):
    skeleton, read = open_skeleton(make("qwen3_moe").folder)
    skeleton.load_outer(read)
    batches = [skeleton.record(random_ids(seed)) for seed in range(3)]
    layer = skeleton.load_layer(0, read)
    with Tap(layer, lambda *_: None, every_expert=False) as tap:
        for hidden, calls in batches:
            skeleton.run(layer, hidden, calls[0])
    gates = [site for name, site in skeleton.sites(0).items() if name.endswith("gate_proj.weight")]
    assert sum(tap.routed_tokens(site) for site in gates) == 3 * 24 * 2


EXPERT_STACK = "mlp.experts.gate_up_proj"
READERS: dict[str, dict[str, set[str]]] = {
    "llama": {"input_layernorm": {*ATTENTION}, "post_attention_layernorm": {"mlp.gate_proj.weight", "mlp.up_proj.weight"}},
    "phi3": {"input_layernorm": {"self_attn.qkv_proj.weight"}, "post_attention_layernorm": {"mlp.gate_up_proj.weight"}},
    "gemma3_text": {"input_layernorm": {*ATTENTION}, "pre_feedforward_layernorm": {"mlp.gate_proj.weight", "mlp.up_proj.weight"}},
    "starcoder2": {"input_layernorm": {*ATTENTION}, "post_attention_layernorm": {"mlp.c_fc.weight"}},
    "olmo2": {},
    "qwen3_moe": {"input_layernorm": {*ATTENTION}, "post_attention_layernorm": {"mlp.gate.weight", EXPERT_STACK}},
    "mixtral": {"input_layernorm": {*ATTENTION}, "post_attention_layernorm": {"mlp.gate.weight", EXPERT_STACK}},
    "gpt_oss": {"input_layernorm": {*ATTENTION}, "post_attention_layernorm": {"mlp.router.weight", EXPERT_STACK}},
    "deepseek_v3": {
        "input_layernorm": {"self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"},
        "self_attn.q_a_layernorm": {"self_attn.q_b_proj.weight"},
        "self_attn.kv_a_layernorm": {"self_attn.kv_b_proj.weight"},
        "post_attention_layernorm": {
            "mlp.gate.weight", EXPERT_STACK, "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight",
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("every_expert", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("title", READERS)
def test_norms_are_followed_to_all_that_reads_them(title, dtype, every_expert, make):
    skeleton, read = open_skeleton(make(title).folder, dtype=dtype)
    tap, layer, _, _ = tapped(skeleton, read, 1, every_expert=every_expert)
    assert {norm: set(readers) for norm, readers in tap.norm_readers.items()} == {
        f"{norm}.weight": readers for norm, readers in READERS[title].items()
    }
    # Whatever else is a norm has outputs of which other things are made: heads that are rotated, and what is added to the residual.
    norms = {name for name in layer.state_dict() if name.endswith("norm.weight")}
    assert tap.other_readers.keys() == norms - tap.norm_readers.keys()


def test_a_norm_that_is_the_residual_is_not_one_to_move_scales_from(make):
    skeleton, read = open_skeleton(make("opt").folder)
    layer = skeleton.layer(1)
    layer.do_layer_norm_before = False
    tap, *_ = tapped(skeleton, read, 1)
    assert not tap.norm_readers
    assert "output of the layer" in tap.other_readers["final_layer_norm.weight"]
    assert "__add__" in tap.other_readers["self_attn_layer_norm.weight"] or "add" in tap.other_readers["self_attn_layer_norm.weight"]


@pytest.mark.parametrize(
    ("title", "norm", "offset"),
    [
        ("llama", "input_layernorm", 0.0),
        ("gemma2", "input_layernorm", 1.0),
        ("gemma3_text", "self_attn.q_norm", 1.0),
        ("qwen3_next", "input_layernorm", 1.0),
        ("qwen3_next", "linear_attn.norm", 0.0),
        ("starcoder2", "input_layernorm", 0.0),
    ],
)
def test_norms_that_add_one_to_their_weight_are_told_from_those_that_do_not(title, norm, offset, make):
    skeleton, read = open_skeleton(make(title).folder)
    layer = skeleton.load_layer(0, read)
    assert norm_has_offset(layer.get_submodule(norm)) == bool(offset)
    assert Tap(layer, lambda *_: None, every_expert=False).norm_offset(f"{norm}.weight") == offset


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError) as error:
        build_skeleton(folder, shapes or {}, device="cpu")
    message = str(error.value)
    assert "\n" not in message
    return message


def test_models_that_are_no_decoders_or_not_known_are_refused(tmp_path):
    assert "does not know this model: " in refused(tmp_path, {"model_type": "newest_model"})
    assert "does not know this model: " in refused(tmp_path, {"hidden_size": 32})
    assert refused(tmp_path, {"model_type": "t5"}).startswith("t5 is an encoder and a decoder")
    assert "has no language model for vit" in refused(tmp_path, {"model_type": "vit"})


def test_a_config_that_brings_its_own_code_is_refused_and_not_run(tmp_path):
    config = {"model_type": "newest_model", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "code.py").write_text("raise SystemExit('was run')")
    assert "does not know this model: " in refused(tmp_path, config)


@pytest.mark.parametrize(
    ("title", "name", "message"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj\.weight \[48, 32\] of the model: .* has nothing"),
        ("llama", "model.embed_tokens.weight", r"model\.embed_tokens\.weight .* has nothing"),
        ("llama", "model.layers.2.input_layernorm.weight", r"model\.layers\.2\.input_layernorm\.weight .* has nothing"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", r"1\.mlp\.experts\.gate_up_proj .* only a part of it"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", r"mlp\.gate\.e_score_correction_bias .* has nothing"),
    ],
)
def test_a_parameter_that_the_checkpoint_lacks_is_named(title, name, message, make):
    source = LocalSource(make(title).folder)
    shapes = shapes_of(find_weights(read_checkpoint(source), source))
    del shapes[name]
    with pytest.raises(RequestError, match=message):
        build_skeleton(make(title).folder, shapes, device="cpu")


def test_tensors_of_another_shape_and_too_many_experts_are_refused(make):
    source = LocalSource(make("qwen3_moe").folder)
    shapes = shapes_of(find_weights(read_checkpoint(source), source))
    up = "model.layers.0.mlp.experts.1.up_proj.weight"
    with pytest.raises(
        RequestError, match=r"up_proj\.weight has shape \[24, 31\] in the checkpoint; .*gate_up_proj of the model takes \[24, 32\]"
    ):
        build_skeleton(make("qwen3_moe").folder, shapes | {up: (24, 31)}, device="cpu")
    with pytest.raises(RequestError, match=r"experts\.4\.up_proj\.weight: the model has 4 experts"):
        build_skeleton(make("qwen3_moe").folder, shapes | {up.replace(".1.", ".4."): (24, 32)}, device="cpu")
    with pytest.raises(RequestError, match=r"has parts of it twice"):
        build_skeleton(make("qwen3_moe").folder, shapes | {"model.layers.0.mlp.experts.gate_up_proj": (4, 48, 32)}, device="cpu")


def test_models_whose_layers_pass_on_more_than_hidden_states_are_refused(tmp_path):
    config = AutoConfig.for_model("glm_moe_dsa", **SIZES | MLA, index_n_heads=2, index_head_dim=8, index_topk=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    skeleton, read = open_skeleton(tmp_path)
    skeleton.load_outer(read)
    with pytest.raises(RequestError, match="hands more than hidden states from layer to layer"):
        skeleton.record(random_ids())


def test_a_matrix_whose_rows_are_its_inputs_is_not_taken_for_one_whose_columns_are(tmp_path):
    """GPT-2 has its weights transposed, and square ones among them."""
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    skeleton, read = open_skeleton(tmp_path)
    tap, _, seen, _ = tapped(skeleton, read, 1)
    assert not seen
    assert not tap.norm_readers


def test_without_transformers_the_way_to_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(RequestError, match=r"pip install 'streamquant\[calibrate\]'"):
        build_skeleton(tmp_path, {}, device="cpu")


def test_an_old_transformers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(__import__("transformers"), "__version__", "4.57.1")
    with pytest.raises(RequestError, match=r"needs transformers 5\.0 or newer, and not 4\.57\.1"):
        build_skeleton(tmp_path, {}, device="cpu")


def test_parameters_take_no_memory_and_buffers_are_real(make):
    skeleton, read = open_skeleton(make("gemma3_text").folder)
    assert all(parameter.is_meta for index in range(3) for parameter in skeleton.layer(index).parameters())
    assert not skeleton_module._state(skeleton.layer(0), "rotary")
    skeleton.load_outer(read)
    hidden, _ = skeleton.record(random_ids())
    assert torch.equal(hidden, F.embedding(random_ids(), read("model.embed_tokens.weight")) * torch.tensor(32**0.5))


def test_a_quantized_source_is_built_as_the_model_that_it_was_made_from(make, tmp_path):
    made = make("llama")
    stated = json.loads((made.folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}
    }
    folder = write_checkpoint(tmp_path / "fp8", read_tensors(made.folder), config=stated)
    skeleton, read = open_skeleton(folder)
    assert_same_run(made, skeleton, read, [random_ids()])


def test_all_of_it_works_in_inference_mode(make):
    with torch.inference_mode():
        skeleton, read = open_skeleton(make("gpt_oss").folder)
        tap, layer, seen, _ = tapped(skeleton, read, 1, every_expert=True)
        assert len(seen) == 5 + 2 * E
        assert len(tap.norm_readers) == 2
        assert tap.norm_offset("input_layernorm.weight") == 0
        skeleton.load_layer(1, read)
        name, site = next(iter(skeleton.sites(1).items()))
        skeleton.set_weight(layer, site, read(name))
        assert_same_run(make("gpt_oss"), skeleton, read, [random_ids()])
