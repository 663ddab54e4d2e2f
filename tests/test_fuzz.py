"""Damaged checkpoints by the thousand: planning one gives a plan that the safetensors library agrees with, or one line of error.

python -m tests.test_fuzz 20000 [SEED]      more of them; a case that fails names itself and leaves its folder behind
"""

import json
import math
import os
import random
import shutil
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save_file

import streamquant
from streamquant.checkpoint.header import DTYPE_BITS
from streamquant.plan import Copy, Encode

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
TRACED = 8  # every so many cases the memory is watched, which is slow
MEMORY_PER_BYTE, MEMORY_BASE = 20, 16 << 20

Files = dict[str, bytes | Callable[[Path], object]]  # the content of a file, or what makes something else of that name
Random = random.Random

DEEP = "nested very deeply"  # stands for what json.dumps cannot write
NAMES = (
    *("", "weight", ".weight", "a.weight", "__metadata__", "lm_head.weight", "重み.weight"),
    *("a\n.weight", "\u202e\0.weight", "\ud800.weight", "x" * 5000 + ".weight", f"model.layers.{'9' * 5000}.mlp.up_proj.weight"),
    *("model.layers.0.mlp.experts.up_proj", "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"),
    *("model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight_scale"),
)
SHAPES = ([], [0], [1], [16], [16, 16], [16, 8], [0, 16], [16, 0], [1, 1], [3, 5], [2, 16, 16], [1] * 65, [2**62, 2**62, 0], [2**63 - 1, 0])
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan),
    *([], {}, [[]], [1] * 100, [-1], [2**63, 2], DEEP, "", "1", "x" * 5000, "\ud800", "a\nb", "BF16", "F8_E4M3", "F4", "U8", "F64"),
    *("..", "model.safetensors", "/etc/passwd", "../x.safetensors", {"num_hidden_layers": 1}, {"num_experts": 16}),
    *({"quant_method": "fp8"}, {"quant_method": ["x"] * 1000}, {"quantization_config": "a\nb"}),
)
CONFIG_KEYS = ("num_hidden_layers", "num_experts", "text_config", "quantization_config", "compression_config", "model_type")
BYTES = (*(bytes([byte]) for byte in b'"{}[],:-09\\ \n\0\xff'), b"\\u", b"\\ud800", b"\xed\xa0\x80", b"e9")


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(files: Files, rng: Random) -> None:
    """Change a checkpoint in one to three ways."""
    ways = (damage_bytes, damage_text, damage_header, damage_tensors, damage_folder)
    for way in rng.choices(ways, (2, 2, 2, 4, 1), k=rng.choice((1, 1, 2, 3))):
        way(files, rng)


def damage_bytes(files: Files, rng: Random) -> None:
    """Flip, cut, insert, repeat, mostly near the start, where headers are."""
    name, content = pick(files, rng)
    at = int(len(content) * rng.random() ** 3)
    end = at + rng.randint(0, 16)
    head, middle, tail = content[:at], content[at:end], content[end:]
    claim = rng.choice((0, 1, 7, len(content) - 8, len(content), 2**31, 100_000_001, 2**40, 2**63, 2**64 - 1)) % 2**64
    files[name] = rng.choice(
        (
            head + bytes(byte ^ (1 << rng.randrange(8)) for byte in middle[:1]) + middle[1:] + tail,
            head + rng.choice(BYTES) + middle[1:] + tail,
            head + rng.choice(BYTES) + middle + tail,
            head + rng.randbytes(rng.randint(1, 8)) + middle + tail,
            head + tail,
            head + middle + middle + tail,
            head,
            content + middle,
            claim.to_bytes(8, "little") + content[8:],
            rng.randbytes(rng.randint(0, 40)),
        )
    )


def damage_text(files: Files, rng: Random) -> None:
    """Change the JSON of the index or the config."""
    name = rng.choice((INDEX, CONFIG))
    value = read_json(files.get(name))
    if value is None:
        return
    if name == CONFIG and rng.random() < 0.5:
        value = {**value, rng.choice(CONFIG_KEYS): rng.choice(VALUES)} if isinstance(value, dict) else value
    else:
        value = damage_json(value, rng)
    files[name] = write_json(value, rng)


def damage_header(files: Files, rng: Random) -> None:
    """Change the JSON of a header; the data stay."""
    name, content = pick_shard(files, rng)
    length = int.from_bytes(content[:8], "little")
    header = read_json(content[8 : 8 + length])
    if header is not None:
        text = write_json(damage_json(header, rng), rng)
        files[name] = len(text).to_bytes(8, "little") + text + content[8 + length :]


def damage_tensors(files: Files, rng: Random) -> None:
    """Give a shard other tensors, in their places where that is possible, and tell the index."""
    name, content = pick_shard(files, rng)
    header = read_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if not isinstance(header, dict):
        return
    header.pop("__metadata__", None)
    for _ in range(rng.randint(1, 3)):
        tensor = rng.choice((*NAMES, *header))
        dtype, shape = rng.choice(("BF16", rng.choice(list(DTYPE_BITS)))), rng.choice((rng.choice(SHAPES), [16, 16], [8, 16]))
        header[tensor] = {"dtype": dtype, "shape": list(shape)}
        if rng.random() < 0.3:
            header.pop(rng.choice(list(header)))
    if not all(isinstance(entry, dict) for entry in header.values()):
        return
    end = 0
    for entry in header.values():
        shape, bits = entry.get("shape"), DTYPE_BITS.get(str(entry.get("dtype")), 8)
        right = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        num_bytes = min(math.prod(shape) * bits // 8, 1 << 16) if right else 0
        entry["data_offsets"] = [end, end + num_bytes]
        end += num_bytes
    text = write_json(header, rng)
    files[name] = len(text).to_bytes(8, "little") + text + bytes(end)
    index = read_json(files.get(INDEX))
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict) and rng.random() < 0.9:
        others = {tensor: shard for tensor, shard in index["weight_map"].items() if shard != name}
        files[INDEX] = write_json({"weight_map": others | dict.fromkeys(header, name)}, rng)


def damage_folder(files: Files, rng: Random) -> None:
    """Take a file away, swap two, put something else in its place or another beside it."""
    first, second = rng.sample(sorted(files), 2)
    action = rng.randrange(4)
    if action == 0:
        del files[first]
    elif action == 1:
        files[first], files[second] = files[second], files[first]
    elif action == 2:
        added = rng.choice(("model.safetensors", "consolidated.safetensors", "tokenizer.json", "a.gguf", "sub/a.safetensors"))
        files[added] = files[second]
    else:
        files[first] = rng.choice((Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path.name)))


def pick(files: Files, rng: Random) -> tuple[str, bytes]:
    """A file that has content."""
    whole = [(name, content) for name, content in sorted(files.items()) if isinstance(content, bytes)]
    return rng.choice(whole or [("a.safetensors", b"")])


def pick_shard(files: Files, rng: Random) -> tuple[str, bytes]:
    """A safetensors file that has content."""
    return pick({name: content for name, content in files.items() if name.endswith(".safetensors")}, rng)


def damage_json(value: Any, rng: Random) -> Any:
    """Change one node of a JSON value."""
    nodes: list[tuple[Any, Any]] = []  # (container, key)
    stack = [value]
    while stack:
        node = stack.pop()
        items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
        nodes += [(node, key) for key, _ in items]
        stack += [child for _, child in items]
    if not nodes or rng.random() < 0.02:
        return rng.choice(VALUES)
    container, key = rng.choice(nodes)
    other, other_key = rng.choice(nodes)
    action = rng.randrange(6)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[rng.choice((*NAMES, other_key))] = container.pop(key)
    elif action == 2:
        container[key] = json.loads(json.dumps(other[other_key]))  # a copy, or it would hold itself
    elif action == 3 and isinstance(container[key], int):
        container[key] += rng.choice((-1, 1))
    elif action == 4:
        container[key] = rng.choice(SHAPES) if isinstance(container[key], list) else [container[key]]
    else:
        container[key] = rng.choice(VALUES)
    return value


def read_json(content: object) -> Any:
    """The JSON value of a file, None where it is none any more."""
    try:
        return json.loads(content) if isinstance(content, bytes) else None
    except (ValueError, RecursionError):
        return None


def write_json(value: Any, rng: Random) -> bytes:
    """A JSON value as text, now and then in an unusual form."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    text = text.replace(f'"{DEEP}"'.encode(), b"[" * 3000 + b"]" * 3000)
    form = rng.randrange(80)
    if form == 0 and isinstance(value, dict) and len(value) > 1:  # a name twice
        first, second = rng.sample([json.dumps(key).encode() for key in value], 2)
        return text.replace(first, second, 1)
    return {1: b"\xef\xbb\xbf" + text, 2: b" " + text + b"\n ", 3: text + b"\0", 4: text.decode(errors="replace").encode("utf-16")}.get(
        form, text
    )


# --- what must hold --------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> str:
    """Plan the checkpoint in `folder`: "planned", or the class of the error. Anything else than these two raises."""
    try:
        plan = streamquant.plan(folder, scheme="FP8_DYNAMIC")
    except streamquant.StreamquantError as error:
        message = str(error)
        assert message, type(error)
        assert message.isprintable(), message[:2000]  # so it is one line
        assert len(message) < 2000, message[:2000]
        return type(error).__name__
    ours = plan.checkpoint.tensors
    for shard in plan.checkpoint.shards:
        try:
            theirs = {name: (info["dtype"], tuple(info["shape"])) for name, info in deserialize((folder / shard).read_bytes())}
        except SafetensorError as error:
            assert "`-0.0`" in str(error), f"{shard}: {error}"  # the integer -0, which the library takes for a fraction
        else:
            assert theirs == {name: (spec.dtype, spec.shape) for name, spec in ours.items() if spec.file == shard}
    encoded = [member.weight for step in plan.steps if isinstance(step, Encode) for member in step.members]
    read = {spec.name for weight in encoded for spec in weight.tensors.values()}
    assert read | {step.source.name for step in plan.steps if isinstance(step, Copy)} | plan.dropped.keys() == ours.keys()
    for shard in plan.shards:
        written = {spec.name for step in shard.steps for spec in step.outputs}
        assert {name for name, _ in deserialize(shard.header + bytes(shard.num_bytes - len(shard.header)))} == written
    assert len(plan.digest) == 64
    return "planned"


def peak_memory(folder: Path) -> tuple[str, int]:
    """The outcome, and the most memory that Python held for it."""
    tracemalloc.start()
    try:
        return outcome(folder), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fuzz(num_cases: int, seed: int, folder: Path) -> Counter[str]:
    """Damage a checkpoint `num_cases` times, each time anew; returns how often each outcome came out.

    Raises AssertionError naming the first case that fails, with its checkpoint left in `folder`.
    """
    write_model(folder)
    whole: Files = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcomes = Counter([outcome(folder)])
    assert outcomes["planned"] == 1
    for case in range(num_cases):
        files = dict(whole)
        damage(files, Random(f"{seed} {case}"))
        changed = {name for name in files.keys() | whole.keys() if files.get(name) is not whole.get(name)}
        place(folder, changed, files)
        try:
            if case % TRACED:
                outcomes[outcome(folder)] += 1
            else:
                result, peak = peak_memory(folder)
                outcomes[result] += 1
                total = sum(len(content) for content in files.values() if isinstance(content, bytes))
                assert peak < MEMORY_PER_BYTE * total + MEMORY_BASE, f"{peak} bytes of memory for files of {total}"
        except Exception as error:
            raise AssertionError(f"case {case} of seed {seed}, in {folder}: {type(error).__name__}: {str(error)[:2000]}") from error
        place(folder, changed, whole)
    return outcomes


def write_model(folder: Path) -> None:
    """Three shards of a tiny mixture of experts, with their index and config."""
    layer, shape = "model.layers.0", (16, 16)
    linear = [f"self_attn.{role}_proj" for role in "qkvo"] + [
        f"mlp.experts.{e}.{role}_proj" for e in (0, 1) for role in ("gate", "up", "down")
    ]
    tensors = {f"{layer}.{name}.weight": torch.ones(shape, dtype=torch.bfloat16) for name in linear}
    tensors |= {"model.embed_tokens.weight": torch.ones(20, 16), "model.norm.weight": torch.ones(16), f"{layer}.scale": torch.tensor(1.0)}
    tensors |= {f"{layer}.mlp.gate.weight": torch.ones(2, 16), f"{layer}.steps": torch.zeros(0, dtype=torch.int64)}
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        names = sorted(tensors)[number :: len(SHARDS)]
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps({"model_type": "mixtral", "num_hidden_layers": 1, "num_experts": 2}), encoding="utf-8")


def place(folder: Path, names: set[str], files: Files) -> None:
    """Make what is in `folder` under these names what it is in `files`."""
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        content = files.get(name)
        if callable(content):
            content(path)
        elif content is not None:
            path.write_bytes(content)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_gives_a_plan_or_one_line_of_error(tmp_path):
    outcomes = fuzz(2000, seed=1, folder=tmp_path)
    assert outcomes["planned"] > 200  # or the damage would stop too early to reach the planning
    assert outcomes["CheckpointError"] > 200
    assert outcomes["RequestError"] > 20


if __name__ == "__main__":
    num_cases, seed = (int(argument) for argument in [*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    sys.stdout.write(f"{dict(fuzz(num_cases, seed, folder))}\n")
    shutil.rmtree(folder)
