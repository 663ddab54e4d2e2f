"""Quantized weights as other programs store them, from random codes, with the values that their own formulas give.

Slow and obvious, in numpy, and sharing nothing with the package. Sources: FORMATS of DeepSeek-V3, gpt-oss, ModelOpt, AutoAWQ and
AutoGPTQ as in the docstrings of `streamquant.inputs`.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Stored(NamedTuple):
    """A weight in a quantized checkpoint."""

    tensors: dict[str, Tensor]  # by the last part of the name
    values_NK: Tensor  # what it stands for, in its own dtype


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """All finite codes."""
    code = rng.integers(0, 256, shape, dtype=np.uint8)
    code[(code & 0x7F) == 0x7F] = 0x31
    return torch.from_numpy(code).view(torch.float8_e4m3fn)


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.uniform(1e-4, 1e-2, shape)).to(dtype)


def wide(tensor: Tensor) -> NDArray[np.float64]:
    """Exact values."""
    return tensor.to(torch.float64).numpy()


def spread(scale_RC: NDArray[Any], shape: tuple[int, int], unit: tuple[int, int]) -> NDArray[Any]:
    """The scale of each element."""
    return np.repeat(np.repeat(scale_RC, unit[0], 0), unit[1], 1)[: shape[0], : shape[1]]


def rounded(value_NK: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    """Rounded to float32, as every dequantization does, then to `dtype`. The products here are exact in float64."""
    return torch.from_numpy(value_NK.astype(np.float32)).to(dtype)


def fp8_block(
    rows: int, columns: int, *, seed: int = 0, block: int | tuple[int, int] = 128, scale_dtype: torch.dtype = torch.float32
) -> Stored:
    """DeepSeek's."""
    rng = generator(seed)
    unit = (block, block) if isinstance(block, int) else block
    code = random_e4m3(rng, (rows, columns))
    scale = random_scales(rng, (-(-rows // unit[0]), -(-columns // unit[1])))
    if scale_dtype == torch.float8_e8m0fnu:
        scale = scale.to(scale_dtype).float()
    values = rounded(
        wide(code) * spread(wide(scale.to(scale_dtype).float()), (rows, columns), (min(unit[0], rows), min(unit[1], columns))),
        torch.bfloat16,
    )
    return Stored({"weight": code, "weight_scale_inv": scale.to(scale_dtype)}, values)


def fp8_rows(rows: int, columns: int, *, seed: int = 0, scale_dtype: torch.dtype = torch.bfloat16, flat: bool = False) -> Stored:
    """A scale for each row: [N, 1], or as ModelOpt's [N]."""
    rng = generator(seed)
    code, scale = random_e4m3(rng, (rows, columns)), random_scales(rng, (rows, 1), scale_dtype)
    values = rounded(wide(code) * wide(scale), torch.bfloat16)
    return Stored({"weight": code, "weight_scale": scale.view(-1) if flat else scale}, values)


def fp8_tensor(rows: int, columns: int, *, seed: int = 0, shape: tuple[int, ...] = (), name: str = "weight_scale") -> Stored:
    """One scale."""
    rng = generator(seed)
    code, scale = random_e4m3(rng, (rows, columns)), random_scales(rng, shape)
    values = rounded(wide(code) * float(scale), torch.bfloat16)
    return Stored({"weight": code, name: scale, "input_scale": torch.tensor(0.5)}, values)


def mxfp4(rows: int, columns: int, *, seed: int = 0, exponents: tuple[int, int] = (110, 127)) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes [N, K/2], exponents [N, K/32] and bfloat16 values."""
    rng = generator(seed)
    code = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    exponent = rng.integers(*exponents, (rows, columns // 32), dtype=np.uint8)
    values = E2M1[code] * spread(np.ldexp(1.0, exponent.astype(int) - 127), (rows, columns), (1, 32))
    packed = code[:, 0::2] | code[:, 1::2] << 4
    return torch.from_numpy(packed), torch.from_numpy(exponent), rounded(values, torch.bfloat16)


def deepseek_v4_mxfp4(rows: int, columns: int, *, seed: int = 0) -> Stored:
    packed, exponent, values = mxfp4(rows, columns, seed=seed)
    return Stored({"weight": packed.view(torch.int8), "scale": exponent.view(torch.float8_e8m0fnu)}, values)


def gpt_oss_mxfp4(plain: Mapping[str, Tensor], *, exponents: tuple[int, int] = (110, 127)) -> dict[str, Tensor]:
    """The tensors of a gpt-oss with random blocks for its plain stacks."""
    tensors = dict(plain)
    for seed, name in enumerate(name for name in plain if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))):
        num_experts, columns, rows = tensors.pop(name).shape
        packed, exponent, _ = mxfp4(num_experts * rows, columns, seed=seed, exponents=exponents)
        tensors[f"{name}_blocks"] = packed.view(num_experts, rows, columns // 32, 16)
        tensors[f"{name}_scales"] = exponent.view(num_experts, rows, columns // 32)
    return tensors


def modelopt_nvfp4(rows: int, columns: int, *, seed: int = 0, scale_2: float | None = None) -> Stored:
    rng = generator(seed)
    code = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    group_scale = random_e4m3(rng, (rows, columns // 16)).float().abs().clamp(min=2.0**-9).to(torch.float8_e4m3fn)
    scale = torch.tensor(rng.uniform(1e-5, 1e-3) if scale_2 is None else scale_2, dtype=torch.float32)
    each = wide((group_scale.float() * scale).float())  # rounded to float32 before the code is multiplied
    values = rounded(E2M1[code] * spread(each, (rows, columns), (1, 16)), torch.bfloat16)
    packed = torch.from_numpy(code[:, 0::2] | code[:, 1::2] << 4)
    return Stored({"weight": packed, "weight_scale": group_scale, "weight_scale_2": scale, "input_scale": torch.tensor(0.1)}, values)


def awq(rows: int, columns: int, *, seed: int = 0, group: int = 32, zeros: bool = True) -> Stored:
    rng = generator(seed)
    code_KN = rng.integers(0, 16, (columns, rows), dtype=np.int64)
    zero_GN = rng.integers(0, 16, (columns // group, rows), dtype=np.int64) if zeros else np.full((columns // group, rows), 8)
    scale_GN = random_scales(rng, (columns // group, rows), torch.float16)
    group_of = np.arange(columns) // group
    values = rounded(((code_KN - zero_GN[group_of]) * wide(scale_GN)[group_of]).T, torch.float16)
    tensors = {"qweight": awq_words(code_KN), "scales": scale_GN}
    return Stored(tensors | ({"qzeros": awq_words(zero_GN)} if zeros else {}), values)


def awq_words(code_LN: NDArray[np.int64]) -> Tensor:
    word = np.zeros((code_LN.shape[0], code_LN.shape[1] // 8), dtype=np.int64)
    for nibble, column in enumerate(AWQ_ORDER):
        word |= code_LN[:, column::8] << 4 * nibble
    return torch.from_numpy(word.astype(np.uint32).view(np.int32))


def gptq(
    rows: int, columns: int, *, seed: int = 0, bits: int = 4, group: int = 32, sym: bool = True, order: bool = False, v2: bool = False
) -> Stored:
    """`order`: with groups scattered over the columns, as desc_act makes them."""
    rng = generator(seed)
    code_KN = rng.integers(0, 1 << bits, (columns, rows), dtype=np.int64)
    zero_GN = rng.integers(1, 1 << bits, (columns // group, rows), dtype=np.int64)
    if sym:
        zero_GN[:] = 1 << (bits - 1)
    scale_GN = random_scales(rng, (columns // group, rows), torch.float16)
    group_of = np.arange(columns) // group
    if order:
        rng.shuffle(group_of)
    values = rounded(((code_KN - zero_GN[group_of]) * wide(scale_GN)[group_of]).T, torch.float16)
    tensors = {
        "qweight": bit_stream(code_KN.T, bits).T.contiguous(),
        "qzeros": bit_stream(zero_GN - (0 if v2 else 1), bits),
        "scales": scale_GN,
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return Stored(tensors, values)


def bit_stream(code_Ln: NDArray[np.int64], bits: int) -> Tensor:
    """Lines of codes as little-endian streams of bits, in words of 32."""
    each = (code_Ln[..., None] >> np.arange(bits)) & 1
    line = each.reshape(len(code_Ln), -1, 32)
    word = (line << np.arange(32)).sum(-1)
    return torch.from_numpy(word.astype(np.uint32).view(np.int32))


def quantization_config(method: str, **said: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method} | said}


Writer = Callable[..., Stored]
FP8_CONFIG = quantization_config("fp8", activation_scheme="dynamic", weight_block_size=[128, 128], fmt="e4m3")
AWQ_CONFIG = quantization_config("awq", bits=4, group_size=32, zero_point=True, version="gemm") | {"torch_dtype": "float16"}


def gptq_config(**said: Any) -> dict[str, Any]:
    settings = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"} | said
    return quantization_config("gptq", **settings) | {"torch_dtype": "float16"}


def fp8_modelopt_blocks(rows: int, columns: int, *, seed: int = 0) -> Stored:
    """FP8_PB_WO: scales [N/128, 1, K/128, 1]."""
    stored = fp8_block(rows, columns, seed=seed)
    scale = stored.tensors["weight_scale_inv"]
    return stored._replace(tensors={"weight": stored.tensors["weight"], "weight_scale": scale[:, None, :, None].contiguous()})


# --- a model in compressed-tensors, as other programs would have stored the same codes ---------------------------------


def awq_of(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AutoAWQ's tensors of asymmetric int4."""
    scale_NG, shape = parts["weight_scale"], torch.Size(parts["weight_shape"].tolist())
    code_NK = unpack_from_int32(parts["weight_packed"], 4, shape).numpy().astype(np.int64) + 8
    zero_NG = unpack_from_int32(parts["weight_zero_point"], 4, scale_NG.shape, packed_dim=0).numpy().astype(np.int64) + 8
    return {"qweight": awq_words(code_NK.T), "qzeros": awq_words(zero_NG.T), "scales": scale_NG.T.contiguous()}


def gptq_of(parts: Mapping[str, Tensor], *, desc_act: bool = False) -> dict[str, Tensor]:
    """AutoGPTQ's tensors of symmetric int4; `desc_act`: of a matrix whose columns were `in_order_of_activations`."""
    scale_NG, shape = parts["weight_scale"], torch.Size(parts["weight_shape"].tolist())
    code_NK = unpack_from_int32(parts["weight_packed"], 4, shape).numpy().astype(np.int64) + 8
    group_of = np.arange(shape[1], dtype=np.int32) // (shape[1] // scale_NG.shape[1])
    if desc_act:
        place = np.argsort(activation_order(shape[1]))
        code_NK, group_of = code_NK[:, place], group_of[place]
    return {
        "qweight": bit_stream(code_NK, 4).T.contiguous(),
        "qzeros": bit_stream(np.full(scale_NG.T.shape, 7), 4),
        "scales": scale_NG.T.contiguous(),
        "g_idx": torch.from_numpy(group_of),
    }


def activation_order(num_columns: int) -> NDArray[np.int64]:
    """The columns in an order as GPTQ would find it: some permutation."""
    return generator(num_columns).permutation(num_columns)


def in_order_of_activations(weight_NK: Tensor) -> Tensor:
    """The columns as they are when GPTQ forms groups of them."""
    return weight_NK[:, torch.from_numpy(activation_order(weight_NK.shape[1]))]


def modelopt_of(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ModelOpt's tensors of NVFP4."""
    scale_2 = (1 / parts["weight_global_scale"]).view(())
    return {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(0.1),
    }


def deepseek_v4_of(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek-V4's tensors of MXFP4."""
    return {"weight": parts["weight_packed"].view(torch.int8), "scale": parts["weight_scale"].view(torch.float8_e8m0fnu)}


class Program(NamedTuple):
    """Another program, or what it calls its format."""

    scheme: str  # of ours, that has the same codes and scales
    encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    quantization: dict[str, Any]


GPTQ_INT4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}
PROGRAMS = {
    "AutoAWQ": Program("W4A16_ASYM", awq_of, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
    "GPTQ": Program("W4A16", gptq_of, GPTQ_INT4),
    "GPTQ with desc_act": Program("W4A16", partial(gptq_of, desc_act=True), GPTQ_INT4 | {"desc_act": True}),
    "ModelOpt NVFP4": Program(
        "NVFP4A16",
        modelopt_of,
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    ),
    "DeepSeek-V4 MXFP4": Program("MXFP4A16", deepseek_v4_of, {"quant_method": "fp8"}),
}


def reencode(quantized: Path, folder: Path, program: str) -> Path:
    """An output of ours, as another program stores the same codes and scales. In one shard."""
    _, encode, said = PROGRAMS[program]
    tensors = {name: tensor for path in sorted(quantized.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    for module in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        roles = [name.rpartition(".")[2] for name in tensors if name.rpartition(".")[0] == module]
        parts = {role: tensors.pop(f"{module}.{role}") for role in roles}
        tensors |= {f"{module}.{role}": tensor for role, tensor in encode(parts).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    for path in quantized.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
