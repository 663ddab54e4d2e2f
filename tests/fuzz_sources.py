"""Small checkpoints of every kind that is read, three shards each, to be damaged by test_fuzz.py."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import streamquant
from tests import quantized_sources as sources
from tests.checkpoints import read_tensors, weight, write_checkpoint
from tests.quantized_sources import AWQ_CONFIG, Stored, gptq_config, mxfp4, quantization_config

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]

Model = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and config
LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"
BESIDE = {"model.embed_tokens.weight": torch.ones(20, 16), "model.norm.weight": torch.ones(16)}
CONFIG_OF_ALL = {"model_type": "mixtral", "num_hidden_layers": 20, "num_experts": 2}


def dense() -> Model:
    """A mixture of experts that is not quantized."""
    linear = [f"self_attn.{role}_proj" for role in "qkvo"] + [
        f"mlp.experts.{e}.{role}_proj" for e in (0, 1) for role in ("gate", "up", "down")
    ]
    tensors = {f"{LAYER}.{name}.weight": torch.ones(16, 16, dtype=torch.bfloat16) for name in linear}
    tensors |= BESIDE | {f"{LAYER}.scale": torch.tensor(1.0)}
    tensors |= {f"{LAYER}.mlp.gate.weight": torch.ones(2, 16), f"{LAYER}.steps": torch.zeros(0, dtype=torch.int64)}
    return tensors, {}


def layers(*stored: Stored) -> dict[str, Tensor]:
    """A layer with one linear for each."""
    return {
        f"model.layers.{layer}.self_attn.o_proj.{role}": tensor
        for layer, each in enumerate(stored)
        for role, tensor in each.tensors.items()
    }


def fp8() -> Model:
    """FP8 of every kind, and what tells itself by its tensors."""
    block = sources.fp8_block(40, 48, block=16)
    flat = block.tensors["weight_scale_inv"]
    modelopt = Stored({"weight": block.tensors["weight"], "weight_scale": flat[:, None, :, None].contiguous()}, block.values_NK)
    tensors = layers(
        block,
        sources.fp8_block(40, 48, block=16, scale_dtype=torch.float8_e8m0fnu),
        modelopt,
        sources.fp8_rows(16, 32),
        sources.fp8_rows(16, 32, flat=True, scale_dtype=torch.float32),
        sources.fp8_tensor(16, 32),
        sources.modelopt_nvfp4(16, 32),
        sources.deepseek_v4_mxfp4(16, 64),
    )
    fused = {f"{LAYER}.mlp.{leaf}": sources.modelopt_nvfp4(16, 32, scale_2=2.0**-13) for leaf in ("gate_proj", "up_proj")}
    tensors |= {f"{module}.{role}": tensor for module, stored in fused.items() for role, tensor in stored.tensors.items()}
    tensors |= BESIDE | {f"{LAYER}.self_attn.k_scale": torch.ones(1)}
    return tensors, quantization_config("fp8", weight_block_size=[16, 16], activation_scheme="dynamic")


def awq() -> Model:
    """AutoAWQ's, with and without zero points."""
    return layers(sources.awq(16, 64), sources.awq(16, 64, zeros=False)) | BESIDE, AWQ_CONFIG


def gptq(*, order: bool) -> Model:
    """GPTQ's, of several widths."""
    each = [sources.gptq(32, 64, bits=bits, sym=not order, order=order) for bits in (2, 3, 4, 8)]
    without_index = sources.gptq(32, 64)
    without_index.tensors.pop("g_idx")
    return layers(*each, without_index) | BESIDE, gptq_config(sym=not order, desc_act=order)


SCHEMES = {
    "W4A16": 'group_size = 32', "W4A16_ASYM": 'group_size = 32', "W3A16": 'strategy = "channel"', "W8A16": 'group_size = 32',
    "W8A8": "", "NVFP4A16": "", "MXFP4A16": "", "MXFP8A16": "", "FP8_DYNAMIC": "", "FP8_BLOCK": "",
}  # fmt: skip


def compressed(folder: Path) -> Model:
    """What compressed-tensors stores: a layer of each of our schemes, and what only others write."""
    plain = {f"model.layers.{layer}.self_attn.{role}_proj.weight": weight(16, 128) for layer in range(len(SCHEMES)) for role in "vo"}
    plain["model.layers.5.self_attn.k_proj.weight"] = weight(16, 128)  # NVFP4, fused with v
    recipe = [f'[[rule]]\nmatch = "model.layers.{n}"\nscheme = "{name}"\n{more}\n' for n, (name, more) in enumerate(SCHEMES.items())]
    (folder / "recipe.toml").write_text("".join(recipe))
    source = write_checkpoint(folder / "plain", plain | BESIDE, config=CONFIG_OF_ALL)
    streamquant.convert(source, folder / "out", recipe=folder / "recipe.toml")
    tensors, config = read_tensors(folder / "out"), json.loads((folder / "out" / CONFIG).read_text())
    tensors[f"{LAYER}.self_attn.v_proj.weight_g_idx"] = torch.arange(128, dtype=torch.int32) % 4
    zeros = {"weight": torch.ones(16, 32, dtype=torch.int8), "weight_scale": weight(16, 2).abs() + 1e-4}
    zeros["weight_zero_point"] = torch.zeros(16, 2, dtype=torch.int8)
    tensors |= {f"{LAYER}.mlp.down_proj.{role}": tensor for role, tensor in zeros.items()}
    return tensors, config


def gpt_oss() -> Model:
    """MXFP4 in stacks, with biases."""
    tensors = {}
    for leaf, rows, columns in (("gate_up_proj", 64, 32), ("down_proj", 32, 32)):
        experts = [mxfp4(rows, columns, seed=seed) for seed in (0, 1)]
        tensors[f"{EXPERTS}.{leaf}_blocks"] = torch.stack([code.view(rows, -1, 16) for code, _, _ in experts])
        tensors[f"{EXPERTS}.{leaf}_scales"] = torch.stack([scale for _, scale, _ in experts])
        tensors[f"{EXPERTS}.{leaf}_bias"] = weight(2, rows)
    return tensors | BESIDE, {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


def stacks(model_type: str) -> Model:
    """Experts in 3-D: plain in one layer, in FP8 in the next where a model may have that."""
    by_rows = {"gate_up_proj": (2, 32, 16), "down_proj": (2, 16, 16)}
    tensors = {}
    for leaf, (experts, rows, columns) in by_rows.items():
        shape = (experts, rows, columns) if model_type == "qwen3_moe" else (experts, columns, rows)
        tensors[f"{EXPERTS}.{leaf}"] = weight(*shape)
    tensors[f"{EXPERTS}.down_proj_bias"] = weight(2, 16)
    if model_type == "qwen3_moe":
        for leaf, (_, rows, columns) in by_rows.items():
            each = [sources.fp8_block(rows, columns, seed=seed, block=16).tensors for seed in (0, 1)]
            for role, suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
                tensors[f"model.layers.1.mlp.experts.{leaf}{suffix}"] = torch.stack([stored[role] for stored in each])
        tensors |= {
            "model.layers.2.moe.input_linear.weight": weight(2, 32, 16),
            "model.layers.2.moe.output_linear.weight": weight(2, 16, 16),
        }
    more = quantization_config("fp8", weight_block_size=[16, 16]) if model_type == "qwen3_moe" else {}
    return tensors | BESIDE | {f"{LAYER}.self_attn.o_proj.weight": weight(16, 16)}, {"model_type": model_type} | more


def write_models(folder: Path) -> dict[str, Path]:
    """All of them, each in a folder of its own."""
    work = folder / "work"
    work.mkdir()
    models: Mapping[str, Callable[[], Model]] = {
        "dense": dense,
        "fp8": fp8,
        "awq": awq,
        "gptq": lambda: gptq(order=False),
        "gptq in another order": lambda: gptq(order=True),
        "compressed": lambda: compressed(work),
        "gpt-oss": gpt_oss,
        "rows": lambda: stacks("qwen3_moe"),
        "columns": lambda: stacks("llama4"),
        "unknown": lambda: stacks("nobody"),
    }
    written = {name: write_model(folder / name, *make()) for name, make in models.items()}
    shutil.rmtree(work)
    return written


def write_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Three shards with their index and config."""
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        names = sorted(tensors)[number :: len(SHARDS)]
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(CONFIG_OF_ALL | dict(config)), encoding="utf-8")
    return folder
