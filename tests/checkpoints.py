"""Tiny real checkpoints."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamquant.checkpoint.journal import RECORD_NAME
from streamquant.schemes import SCHEMES

DATA_FREE = [preset for preset, scheme in SCHEMES.items() if not scheme.needs_data]
WIKI_LLAMA = Path(__file__).parent.parent / "examples" / "wiki-llama"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def with_data(preset: str) -> dict[str, Any]:
    """The arguments of `convert` for a preset, with a little data if it needs some."""
    return {"scheme": preset} | ({"samples": 8, "sequence_length": 64} if SCHEMES[preset].needs_data else {})


def weight(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers of the usual size of weights."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def write_checkpoint(
    folder: Path,
    *shards: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    side_files: Mapping[str, str] | None = None,
    stem: str = "model",
) -> Path:
    """A folder with these shards (an index too, if there are several), a config and side files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    )
    for name, tensors in zip(names, shards, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
        total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2} | dict(config or {})))
    for name, text in (side_files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """Give a checkpoint the tokenizer of wiki-llama."""
    for name in TOKENIZER:
        (folder / name).write_bytes((WIKI_LLAMA / name).read_bytes())
    return folder


def write_wiki_llama(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """wiki-llama with other weights."""
    return add_tokenizer(write_checkpoint(folder, tensors, config=json.loads((WIKI_LLAMA / "config.json").read_text())))


def write_model(folder: Path, model_type: str, *, change: Callable[[Any], None] | None = None, **settings: Any) -> Path:
    """A tiny model of transformers, random and in bfloat16, with the tokenizer of wiki-llama; `change` may change its weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes | {"num_key_value_heads": 2} | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    return add_tokenizer(folder)


def write_mistral(folder: Path, *shards: Mapping[str, Tensor], params: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint in Mistral's own layout, with params.json."""
    write_checkpoint(folder, *shards, stem="consolidated")
    (folder / "config.json").unlink()
    (folder / "params.json").write_text(json.dumps({"dim": 128, "n_layers": 2, "head_dim": 32} | dict(params or {})))
    return folder


def mistral_layer(layer: int = 0, *, seed: int = 60) -> dict[str, Tensor]:
    """A layer under Mistral's names, w3 with much larger weights than w1."""
    prefix = f"layers.{layer}"
    attention = {f"{prefix}.attention.w{role}.weight": weight(128, 128, seed=seed + index) for index, role in enumerate("qkvo")}
    return attention | {
        f"{prefix}.feed_forward.w1.weight": weight(384, 128, seed=seed + 4),
        f"{prefix}.feed_forward.w2.weight": weight(128, 384, seed=seed + 5),
        f"{prefix}.feed_forward.w3.weight": weight(384, 128, seed=seed + 6) * 5,
        f"{prefix}.attention_norm.weight": weight(128, seed=seed + 7),
    }


def attention(layer: int = 0, *, columns: int = 128, seed: int = 1) -> dict[str, Tensor]:
    """q, k, v and o of a layer, k with much larger weights than q."""
    prefix = f"model.layers.{layer}.self_attn"
    return {
        f"{prefix}.q_proj.weight": weight(128, columns, seed=seed),
        f"{prefix}.k_proj.weight": weight(128, columns, seed=seed + 1) * 5,
        f"{prefix}.v_proj.weight": weight(128, columns, seed=seed + 2),
        f"{prefix}.o_proj.weight": weight(columns, 128, seed=seed + 3),
    }


def mlp(prefix: str, *, columns: int = 128, rows: int = 128, seed: int = 10) -> dict[str, Tensor]:
    """gate, up and down below `prefix`, up with much larger weights than gate."""
    return {
        f"{prefix}.gate_proj.weight": weight(rows, columns, seed=seed),
        f"{prefix}.up_proj.weight": weight(rows, columns, seed=seed + 1) * 5,
        f"{prefix}.down_proj.weight": weight(columns, rows, seed=seed + 2),
    }


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def require_same_output(folder: Path, other: Path) -> None:
    """Two outputs are the same, but for what the record says of the files of the source."""
    files, expected = file_bytes(folder), file_bytes(other)
    record, expected_record = json.loads(files.pop(RECORD_NAME)), json.loads(expected.pop(RECORD_NAME))
    del record["job"]["source files"], expected_record["job"]["source files"]
    assert record == expected_record
    assert files == expected
