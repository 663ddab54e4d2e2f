"""Damaged checkpoints of every kind by the thousand: one line of error, or a plan that the safetensors library agrees with.

Now and then the plan is carried out: an error again, or an output that passes its verification against the damaged source. And now and
then a listing holds names that no folder could: an error, or nothing but names that stay in the folder.

python -m tests.test_fuzz 20000 [SEED]      more of them; a case that fails names itself and leaves its folder behind
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file

import streamquant
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.header import DTYPE_BITS
from streamquant.checkpoint.local import LocalSource
from streamquant.errors import one_line
from streamquant.plan import Copy, Encode
from streamquant.report import inspection_lines, summary_lines
from tests.fuzz_sources import CONFIG, INDEX, write_models

TRACED = 8  # every so many cases the memory is watched, which is slow
CONVERTED = 3  # every so many plans are carried out
LISTED = 4  # every so many checkpoints are read again with other names in their listing
SECONDS = 60  # more than any case may take
MEMORY_PER_BYTE, MEMORY_BASE = 20, 16 << 20

Files = dict[str, bytes | Callable[[Path], object]]  # the content of a file, or what makes something else of that name
Random = random.Random

PLAUSIBLE = b"\x38"  # twice or four times over a small positive number in every dtype
DEEP = "nested very deeply"  # stands for what json.dumps cannot write
HIDDEN = ("\x1b]0;x\x07", "\r", "\x7f", "\x9b1m", "\u200b", "\u200d", "\u2028", "\u202e", "\u2066", "\ufeff", "\ud800", "\udce9")
NAMES = (
    *("", "weight", ".weight", "a.weight", "__metadata__", "lm_head.weight", "重み.weight"),
    *(
        "a'; rm -rf ~ #.weight",
        "../../a.weight",
        "a b\u3000.weight",
        "x" * 1017 + ".weight",
        "1." * 500 + "weight",
        "mtp.1.mlp.up_proj.weight",
    ),
    *("a\n.weight", "\u202e\0.weight", "\ud800.weight", "x" * 5000 + ".weight", f"model.layers.{'9' * 5000}.mlp.up_proj.weight"),
    *("model.layers.0.mlp.experts.up_proj", "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"),
    *("model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight_scale"),
)
ROLES = (
    *("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_shape", "weight_g_idx", "qweight", "qzeros", "scales", "scale", "g_idx", "input_scale", "k_scale", "pre_quant_scale", "bias"),
    *("gate_up_proj", "down_proj", "fc1", "down_proj_scale_inv", "gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_bias", "absmax"),
    *("0.gate_proj.weight", "1.down_proj.weight", "0.down_proj.bias", "gate_up_proj.weight", "down_proj.weight_blocks"),
)
SHAPES = (
    *([], [0], [1], [16], [16, 16], [16, 8], [0, 16], [16, 0], [1, 1], [3, 5], [2, 16, 16], [1] * 65, [2**62, 2**62, 0], [2**63 - 1, 0]),
    *([2], [2, 1], [1, 16], [0, 16, 16], [2, 0, 16], [2, 16, 0], [2**62, 0, 16], [2, 32, 16], [2, 16, 16, 16], [2, 64, 1, 16]),
    *([300, 2, 1], [20000, 2, 1], [2, 16, 16, 16, 1], [2**62, 0], [0, 2**62]),
)
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 64, 128)
VALUES = (
    *(
        *HIDDEN,
        10**18,
        10**4299,
        -(10**4299),
        [10**4299, 10**4299],
        "..\\x.safetensors",
        ".cache/x.safetensors",
        "x" * 300 + ".safetensors",
    ),
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan),
    *([], {}, [[]], [1] * 100, [-1], [2**63, 2], DEEP, "", "1", "x" * 5000, "\ud800", "a\nb", "BF16", "F8_E4M3", "F4", "U8", "F64"),
    *("..", "model.safetensors", "/etc/passwd", "../x.safetensors", {"num_hidden_layers": 1}, {"num_experts": 16}),
    *({"quant_method": "fp8"}, {"quant_method": ["x"] * 1000}, {"quantization_config": "a\nb"}),
    *(
        "gptq",
        "gptq_v2",
        "awq",
        "compressed-tensors",
        "gemv",
        "gpt_oss",
        "llama4",
        "qwen3_moe",
        "aria",
        "float16",
        "group",
        "channel",
        "tensor",
    ),
    *(
        "block",
        "pack-quantized",
        "int-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "re:(",
        "re:" + "(" * 5000,
        "re:a{99999999999}",
    ),
    *(3, 4, 8, 16, 32, 128, 4.0, 32.0, "4", "32", [4], {"4": 4}, [16, 16], [1, 16], [16, 1], [2**31, 8], [10**400, 1], [0, 0], [16.0, 16]),
)
CONFIG_KEYS = (
    *("num_key_value_heads", "tie_word_embeddings", "moe", "architectures", "dtype"),
    *("num_hidden_layers", "num_experts", "text_config", "quantization_config", "compression_config", "model_type", "torch_dtype"),
)
QUANTIZATION_KEYS = (
    *("quant_method", "bits", "group_size", "version", "checkpoint_format", "sym", "desc_act", "weight_block_size", "config_groups"),
    *("format", "ignore", "kv_cache_scheme", "transform_config", "modules_to_not_convert"),
)
REQUESTS: tuple[dict[str, Any], ...] = (
    *({"scheme": "FP8_DYNAMIC"},) * 6,
    *({"scheme": "BF16"},) * 3,
    *({"scheme": "NVFP4A16"}, {"scheme": "MXFP4A16"}, {"scheme": "MXFP8A16"}, {"scheme": "W8A8"}, {"scheme": "FP8_BLOCK"}),
    *({"scheme": "W4A16", "group_size": 32}, {"scheme": "W4A16_ASYM", "group_size": 32}, {"scheme": "W3A16", "strategy": "channel"}),
    *({"scheme": "FP8_BLOCK", "format": "fp8"}, {"scheme": "FP8_DYNAMIC", "strategy": "tensor"}, {"scheme": "experts=NVFP4A16,FP8A16"}),
    *({"scheme": "FP8_DYNAMIC", "ignore": [pattern]} for pattern in ("*.experts", "*.layers.0", "*down_proj", "*gate_up_proj")),
    *({"scheme": "FP8_DYNAMIC", "expert_layout": layout} for layout in ("rows", "columns", "interleaved")),
)
# A plan cannot know that values in the source are no numbers, nor that codes which are kept were meant to have scales.
SOURCE_IS_WRONG = ("scales that are not finite and positive", "has no scale", "relative error of nan", "relative error of inf")
TINY, HUGE = 1e-30, 1e5  # a larger weight destroys those that share a scale with it, a smaller one has no scale
# Beside a file, or in its place.
FILES = (
    *("model.safetensors", "consolidated.safetensors", "tokenizer.json", "a.gguf", "sub/a.safetensors", "params.json", ".git", ".cache/a"),
    *("model-00001-of-00000.safetensors", "model-99999-of-99999.safetensors", "streamquant.json/a", "model.safetensors/a", "a'b\\c.txt"),
    *("\x1b[31m.txt", "\u202etxt.exe", "\udce9.txt", "a\u3000b.txt", "\u0661-of.safetensors"),
)
LINKS = ("nowhere", CONFIG, INDEX, "../dense/config.json", "/etc/hostname", "/dev/zero", ".", "..", "/")
PARTS = (
    *HIDDEN,
    "",
    "/",
    "//",
    "\\",
    ".",
    "..",
    "...",
    "a",
    "ü",
    "重み",
    ".git",
    ".cache",
    ".streamquant",
    CONFIG,
    ".safetensors",
    " ",
    "\u202f",
    "'",
    "x" * 130,
)
BYTES = (*(bytes([byte]) for byte in b'"{}[],:-09\\ \n\0\xff'), b"\\u", b"\\ud800", b"\xed\xa0\x80", b"e9")


# --- damage ----------------------------------------------------------------------------------------------------------


def damage(files: Files, rng: Random) -> None:
    """Change a checkpoint in one to three ways."""
    ways = (damage_bytes, damage_values, damage_text, damage_header, damage_tensors, damage_folder)
    for way in rng.choices(ways, (2, 2, 2, 1, 4, 1), k=rng.choice((1, 1, 2, 3))):
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


def damage_values(files: Files, rng: Random) -> None:
    """Change codes and scales, as bytes and as what they could be."""
    name, content = pick_shard(files, rng)
    start = 8 + int.from_bytes(content[:8], "little")
    values = (b"\0" * 4, b"\xff" * 4, b"\x7f" * 4, b"\0\0\x80\x7f", b"\x80\x7f", b"\0\x7c", b"\1\0\0\0", b"\0\0\0\x80", PLAUSIBLE * 4)
    for _ in range(rng.randint(1, 4)):
        if start < len(content):
            at, value = rng.randrange(start, len(content)), rng.choice((*values, rng.randbytes(4)))
            content = (content[:at] + value + content[at + len(value) :])[: len(content)]
    files[name] = content


def damage_text(files: Files, rng: Random) -> None:
    """Change the JSON of the index or the config."""
    name = rng.choice((INDEX, CONFIG, CONFIG))
    value = read_json(files.get(name))
    if value is None:
        return
    said = value.get("quantization_config") if isinstance(value, dict) else None
    if name == CONFIG and isinstance(said, dict) and rng.random() < 0.6:
        if rng.random() < 0.3:
            said[rng.choice(QUANTIZATION_KEYS)] = rng.choice(VALUES)
        else:
            value["quantization_config"] = damage_json(said, rng)
    elif name == CONFIG and rng.random() < 0.5:
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
    header_bytes = int.from_bytes(content[:8], "little")
    header = read_json(content[8 : 8 + header_bytes])
    if not isinstance(header, dict):
        return
    header.pop("__metadata__", None)
    if not header or not all(map(is_entry, header.values())):
        return
    for _ in range(rng.randint(1, 3)):
        damage_tensor(header, rng)
    parts = []
    end = 0
    for entry in header.values():
        shape, bits = entry["shape"], DTYPE_BITS[entry["dtype"]]
        num_bytes = min(math.prod(shape) * bits // 8, 1 << 18)
        begin, old_end = (8 + header_bytes + offset for offset in entry.get("data_offsets", (0, 0)))
        parts.append(content[begin:old_end] if old_end - begin == num_bytes <= len(content) - begin else PLAUSIBLE * num_bytes)
        entry["data_offsets"] = [end, end + num_bytes]
        end += num_bytes
    text = write_json(header, rng)
    files[name] = len(text).to_bytes(8, "little") + text + b"".join(parts)
    index = read_json(files.get(INDEX))
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict) and rng.random() < 0.9:
        others = {tensor: shard for tensor, shard in index["weight_map"].items() if shard != name}
        files[INDEX] = write_json({"weight_map": others | dict.fromkeys(header, name)}, rng)


def is_entry(value: object) -> bool:
    """Whether this is what a header may say of a tensor."""
    return (
        isinstance(value, dict)
        and value.get("dtype") in list(DTYPE_BITS)
        and all(isinstance(value.get(key), list) for key in ("shape", "data_offsets"))
        and all(type(size) is int and size >= 0 for size in value["shape"] + value["data_offsets"])
        and len(value["data_offsets"]) == 2
    )


def damage_tensor(header: dict[str, Any], rng: Random) -> None:
    """Change the dtype or the shape of a tensor, rename it, take it away or add one."""
    old = rng.choice(list(header))
    entry = header[old]
    module = old.rpartition(".")[0]
    beside = f"{module}.{rng.choice(ROLES)}"
    action = rng.randrange(8)
    if action == 0:
        del header[old]
        if not header:
            header["a"] = {"dtype": "U8", "shape": [0]}
    elif action == 1:
        header[beside] = header.pop(old)
    elif action == 2:
        dtype, shape = rng.choice(("BF16", rng.choice(list(DTYPE_BITS)))), rng.choice((rng.choice(SHAPES), [16, 16], [8, 16]))
        header[rng.choice((beside, *NAMES, *header))] = {"dtype": dtype, "shape": list(shape)}
    elif action == 3:
        header[beside] = {"dtype": entry["dtype"], "shape": list(entry["shape"])}
    elif action == 4:
        header[old] = entry | {"dtype": rng.choice(list(DTYPE_BITS))}
    elif action == 5:
        header[old] = entry | {"shape": list(rng.choice(SHAPES))}
    else:
        shape = list(entry["shape"])
        at = rng.randrange(len(shape) + 1)
        if action == 6 and at < len(shape):
            shape[at] = rng.choice((*SIZES, shape[at] + 1, max(shape[at] - 1, 0), shape[at] * 2, shape[at] // 2, 2**62))
        elif rng.random() < 0.5:
            shape.insert(at, 1)
        else:
            shape[at : at + 1] = []
        header[old] = entry | {"shape": shape}


def damage_folder(files: Files, rng: Random) -> None:
    """Take a file away, swap two, put something else in its place or another beside it."""
    first, second = rng.sample(sorted(files), 2)
    action = rng.randrange(5)
    if action == 0:
        del files[first]
    elif action == 1:
        files[first], files[second] = files[second], files[first]
    elif action == 2:
        files[rng.choice(FILES)] = files[second]
    elif action == 3:
        target = rng.choice((*LINKS, first, second))
        files[rng.choice((first, *FILES))] = lambda path: path.symlink_to(target)
    else:
        files[first] = rng.choice((Path.mkdir, os.mkfifo))


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


def outcome(folder: Path, request: Mapping[str, Any], out: Path | None = None) -> str:
    """Plan the checkpoint in `folder`, and carry that out: "planned", or the class of the error. Anything else raises."""
    try:
        plan = streamquant.plan(folder, **request)
    except streamquant.StreamquantError as error:
        return named(error)
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
    return "planned" if out is None else carried_out(folder, request, out)


def carried_out(folder: Path, request: Mapping[str, Any], out: Path) -> str:
    """Convert, and verify what comes out: "verified", or the class of the error. Verifying the source itself may find what it likes."""
    try:
        streamquant.verify(folder)
    except streamquant.StreamquantError as error:
        named(error)
    try:
        plan = streamquant.convert(folder, out, **request, threads=1).plan
        lines = summary_lines(plan) + inspection_lines(streamquant.inspect(folder))
        assert all(one_line(line).isprintable() for line in lines)
        streamquant.engines.check(plan, engine="vllm", tp=2)
        problems = streamquant.verify(out, against=folder, expert_layout=request.get("expert_layout")).problems
        assert all(map(source_is_wrong, problems)) or is_absurd(folder), problems
    except streamquant.VerificationError as error:
        assert source_is_wrong(str(error)), error
        return named(error)
    except streamquant.StreamquantError as error:
        return named(error)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return "verified"


class Listing(LocalSource):
    """A source whose listing holds more names than there are files."""

    names: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """The files, and 1 byte of each other name."""
        return super().sizes() | dict.fromkeys(self.names, 1)

    def stamp(self, file: str) -> str:
        """Those of files that are there."""
        return super().stamp(file) if (self.folder / file).exists() else ""


def listed(folder: Path, rng: Random) -> str:
    """Read a checkpoint with hostile names in its listing: "listed", or the class of the error."""
    with Listing(folder) as source:
        source.names = tuple("".join(rng.choices(PARTS, k=rng.randint(1, 5))) for _ in range(rng.choice((1, 1, 2, 4))))
        try:
            checkpoint = read_checkpoint(source)
        except streamquant.StreamquantError as error:
            return named(error)
    for file in (*checkpoint.side_files, *checkpoint.shards, *checkpoint.left_out):
        path = os.path.normpath(folder / file)
        assert path == f"{folder}/{file}", file
        assert not any(hidden in file for hidden in HIDDEN), ascii(file)
        assert not {".git", ".cache", ".streamquant"}.intersection(Path(file).parts), file
        assert all(parent.as_posix() not in checkpoint.side_files for parent in Path(file).parents), file
        assert max(len(os.fsencode(part)) for part in Path(file).parts) < 256, file
    return "listed"


def source_is_wrong(problem: str) -> bool:
    """Whether this says what the source is to blame for, and verification alone can see."""
    return any(said in problem for said in SOURCE_IS_WRONG)


def is_absurd(folder: Path) -> bool:
    """Whether weights and scales in the source are beyond what verification can tell from nonsense."""
    tensors = [tensor for shard in folder.glob("*.safetensors") if shard.is_file() for tensor in load_file(shard).values()]
    values = [tensor.double().abs() for tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float8_e4m3fn]
    return any(not bool(((value == 0) | ((value > TINY) & (value < HUGE))).all()) for value in values)


def named(error: streamquant.StreamquantError) -> str:
    """The class of an error that is one short line."""
    message = str(error)
    assert message, type(error)
    assert message.isprintable(), message[:2000]  # so it is one line
    assert len(message) < 2000, message[:2000]
    return type(error).__name__


def peak_memory(folder: Path, request: Mapping[str, Any]) -> tuple[str, int]:
    """The outcome of planning, and the most memory that Python held for it."""
    tracemalloc.start()
    try:
        return outcome(folder, request), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fuzz(num_cases: int, seed: int, folder: Path) -> Counter[str]:
    """Damage checkpoints `num_cases` times, each time anew; returns how often each outcome came out.

    Raises AssertionError naming the first case that fails, with its checkpoint left in `folder`.
    """
    whole: dict[str, Files] = {
        name: {path.name: path.read_bytes() for path in model.iterdir()} for name, model in write_models(folder).items()
    }
    outcomes: Counter[str] = Counter()
    for name in whole:
        request = {"scheme": "FP8_DYNAMIC"} | ({"expert_layout": "columns"} if name == "unknown" else {})
        assert outcome(folder / name, request, folder / "out") == "verified", name
    signal.signal(signal.SIGALRM, too_long)
    for case in range(num_cases):
        rng = Random(f"{seed} {case}")
        name = rng.choice(sorted(whole))
        files = dict(whole[name])
        request = rng.choice(REQUESTS)
        damage(files, rng)
        changed = {file for file in files.keys() | whole[name].keys() if files.get(file) is not whole[name].get(file)}
        signal.alarm(SECONDS)
        try:
            if case % LISTED == 0:
                outcomes[f"{listed(folder / name, rng)} of a listing"] += 1
            place(folder / name, changed, files)
            if case % TRACED:
                outcomes[outcome(folder / name, request, None if case % CONVERTED else folder / "out")] += 1
            else:
                result, peak = peak_memory(folder / name, request)
                outcomes[result] += 1
                total = sum(len(content) for content in files.values() if isinstance(content, bytes))
                assert peak < MEMORY_PER_BYTE * total + MEMORY_BASE, f"{peak} bytes of memory for files of {total}"
        except Exception as error:
            where = f"case {case} of seed {seed}, {request}, in {folder / name}"
            raise AssertionError(f"{where}: {type(error).__name__}: {str(error)[:2000]}") from error
        finally:
            signal.alarm(0)
        place(folder / name, changed, whole[name])
    return outcomes


def too_long(number: int, frame: object) -> None:
    """A case that does not end is one that fails."""
    raise TimeoutError(f"not done in {SECONDS} s")


def place(folder: Path, names: set[str], files: Files) -> None:
    """Make what is in `folder` under these names what it is in `files`."""
    for name in sorted(names):
        path = folder / name
        if not path.parent.is_dir():
            path.parent.unlink(missing_ok=True)
            path.parent.mkdir()
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        content = files.get(name)
        if callable(content):
            content(path)
        elif content is not None:
            path.write_bytes(content)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_gives_a_plan_or_one_line_of_error(tmp_path):
    outcomes = fuzz(2000, seed=1, folder=tmp_path)
    assert outcomes["planned"] + outcomes["verified"] > 200  # or the damage would stop too early to reach the planning
    assert outcomes["verified"] > 50
    assert outcomes["CheckpointError"] > 200
    assert outcomes["RequestError"] > 20
    assert outcomes["listed of a listing"] > 20


if __name__ == "__main__":
    num_cases, seed = (int(argument) for argument in [*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]])
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    sys.stdout.write(f"{dict(fuzz(num_cases, seed, folder))}\n")
    shutil.rmtree(folder)
