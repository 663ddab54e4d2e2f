"""Synthetic checkpoints of any size, written to disk without being held in memory.

    python benchmarks/synthetic.py OUT --gigabytes 2.7 --shard-gigabytes 1

Names and shapes are those of Llama, or of mixtures of experts for the other scripts; weights are bfloat16, N(0, 0.02). A sparse
checkpoint has headers and holes: it reads as zeros and takes no room on the disk.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from streamquant.checkpoint.header import build_header
from streamquant.checkpoint.layout import Layout
from streamquant.checkpoint.writer import ShardWriter, StepWriter

BYTES_PER_WEIGHT = 2  # bfloat16
BLOCK_ELEMENTS = 1 << 24
VOCABULARY = 128256
SEED = 1
WIKI_LLAMA = Path(__file__).resolve().parents[1] / "examples" / "wiki-llama"


class Tensor(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * BYTES_PER_WEIGHT


def llama(num_bytes: int, *, hidden: int = 2048, intermediate: int = 8192) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and config of a Llama with tied embeddings and as many layers as come nearest to `num_bytes`."""
    embedding = Tensor("model.embed_tokens.weight", (VOCABULARY, hidden))
    layer_bytes = sum(tensor.num_bytes for tensor in _llama_layer(0, hidden, intermediate))
    num_layers = max(round((num_bytes - embedding.num_bytes) / layer_bytes), 1)
    layers = [tensor for layer in range(num_layers) for tensor in _llama_layer(layer, hidden, intermediate)]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    return [embedding, *layers, Tensor("model.norm.weight", (hidden,))], config


def _llama_layer(layer: int, hidden: int, intermediate: int) -> list[Tensor]:
    prefix = f"model.layers.{layer}"
    return [
        Tensor(f"{prefix}.input_layernorm.weight", (hidden,)),
        Tensor(f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)),
        Tensor(f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)),
        Tensor(f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)),
        Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        Tensor(f"{prefix}.self_attn.k_proj.weight", (hidden // 4, hidden)),
        Tensor(f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
        Tensor(f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
        Tensor(f"{prefix}.self_attn.v_proj.weight", (hidden // 4, hidden)),
    ]


def mixture(num_layers: int, num_experts: int, *, hidden: int = 4096, intermediate: int = 2048) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and config of a mixture of experts with a shared expert in each layer."""
    tensors = [Tensor("model.embed_tokens.weight", (VOCABULARY, hidden))]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        experts = [f"{prefix}.mlp.experts.{expert}" for expert in range(num_experts)]
        tensors += [tensor for expert in [*experts, f"{prefix}.mlp.shared_experts"] for tensor in _mlp(expert, hidden, intermediate)]
        tensors.append(Tensor(f"{prefix}.mlp.gate.weight", (num_experts, hidden)))
        tensors += _attention(f"{prefix}.self_attn", hidden)
        tensors += [Tensor(f"{prefix}.{norm}_layernorm.weight", (hidden,)) for norm in ("input", "post_attention")]
    tensors += [Tensor("model.norm.weight", (hidden,)), Tensor("lm_head.weight", (VOCABULARY, hidden))]
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "n_routed_experts": num_experts,
    }
    return tensors, config


def qwen3_moe(
    num_bytes: int, *, num_experts: int = 128, hidden: int = 2048, intermediate: int = 256
) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors and config of a Qwen3-MoE with as many layers as their experts come nearest to `num_bytes`; their weights have 1 MiB each."""
    expert_bytes = sum(tensor.num_bytes for tensor in _mlp("", hidden, intermediate))
    num_layers = max(round(num_bytes / num_experts / expert_bytes), 1)
    tensors = [Tensor("model.embed_tokens.weight", (VOCABULARY, hidden))]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for expert in range(num_experts):
            tensors += _mlp(f"{prefix}.mlp.experts.{expert}", hidden, intermediate)
        tensors.append(Tensor(f"{prefix}.mlp.gate.weight", (num_experts, hidden)))
        tensors += _attention(f"{prefix}.self_attn", hidden)
        tensors += [Tensor(f"{prefix}.self_attn.{role}_norm.weight", (128,)) for role in ("q", "k")]
        tensors += [Tensor(f"{prefix}.{norm}_layernorm.weight", (hidden,)) for norm in ("input", "post_attention")]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_experts": num_experts,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
        "head_dim": 128,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    return [*tensors, Tensor("model.norm.weight", (hidden,))], config


def _mlp(prefix: str, hidden: int, intermediate: int) -> list[Tensor]:
    return [
        Tensor(f"{prefix}.gate_proj.weight", (intermediate, hidden)),
        Tensor(f"{prefix}.up_proj.weight", (intermediate, hidden)),
        Tensor(f"{prefix}.down_proj.weight", (hidden, intermediate)),
    ]


def _attention(prefix: str, hidden: int) -> list[Tensor]:
    rows = {"q": hidden, "k": hidden // 4, "v": hidden // 4, "o": hidden}
    return [Tensor(f"{prefix}.{role}_proj.weight", (num_rows, hidden)) for role, num_rows in rows.items()]


def stacked(num_layers: int, *, num_experts: int = 16, hidden: int = 5120, intermediate: int = 8192) -> tuple[list[Tensor], dict[str, Any]]:
    """Layers of Llama 4 Scout: its experts in two 3-D tensors of 2.7 and 1.3 GB, transposed."""
    tensors = []
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        tensors.append(Tensor(f"{prefix}.feed_forward.experts.gate_up_proj", (num_experts, hidden, 2 * intermediate)))
        tensors.append(Tensor(f"{prefix}.feed_forward.experts.down_proj", (num_experts, intermediate, hidden)))
        tensors.append(Tensor(f"{prefix}.feed_forward.router.weight", (num_experts, hidden)))
        for role, rows in (("q", hidden), ("k", hidden // 5), ("v", hidden // 5), ("o", hidden)):
            tensors.append(Tensor(f"{prefix}.self_attn.{role}_proj.weight", (rows, hidden)))
    config = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_local_experts": num_experts,
    }
    return tensors, config


def write_checkpoint(folder: Path, tensors: Sequence[Tensor], config: dict[str, Any], *, shard_bytes: int, sparse: bool = False) -> None:
    """Write shards of at most `shard_bytes`, the index if there are several, and config.json."""
    folder.mkdir(parents=True)
    batches = list(_batches(tensors, shard_bytes))
    weight_map = {}
    for number, batch in enumerate(batches, start=1):
        file = Layout().shard_name(number, len(batches))
        weight_map.update(dict.fromkeys((tensor.name for tensor in batch), file))
        header, specs = build_header([(tensor.name, "BF16", tensor.shape) for tensor in batch], file=file)
        with ShardWriter(folder / file, header=header, num_bytes=specs[-1].end) as writer:
            if not sparse:
                for spec in specs:
                    _write_normal(StepWriter(writer), spec.start, spec.num_elements)
    if len(batches) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / Layout().index_name).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / Layout().config_name).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _batches(tensors: Sequence[Tensor], shard_bytes: int) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if batch and filled + tensor.num_bytes > shard_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(tensor)
        filled += tensor.num_bytes
    yield batch


def _write_normal(output: StepWriter, start: int, num_elements: int) -> None:
    generator = torch.Generator().manual_seed(SEED + start)
    for first in range(0, num_elements, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, num_elements - first)
        block = torch.empty(count).normal_(0.0, 0.02, generator=generator).to(torch.bfloat16)
        output.write(start + first * BYTES_PER_WEIGHT, block.view(torch.uint8).numpy().data)


def add_tokenizer(folder: Path) -> None:
    """Give a checkpoint the tokenizer of wiki-llama."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WIKI_LLAMA / name, folder / name)


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.7)
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 512; the MLP is four times as wide")
    parser.add_argument("--sparse", action="store_true", help="headers and holes")
    arguments = parser.parse_args()
    tensors, config = llama(int(arguments.gigabytes * 1e9), hidden=arguments.hidden, intermediate=4 * arguments.hidden)
    write_checkpoint(arguments.out, tensors, config, shard_bytes=int(arguments.shard_gigabytes * 1e9), sparse=arguments.sparse)
    total = sum(tensor.num_bytes for tensor in tensors)
    print(f"{arguments.out}: {total / 1e9:.2f} GB in {config['num_hidden_layers']} layers")


if __name__ == "__main__":
    main()
