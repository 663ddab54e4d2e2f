"""Slow, obvious answers, written from the descriptions of the formats: tables, bits one by one, float64. Imports nothing of ours.

A number is a float64, which holds every bfloat16, float16 and float32; rounding its sums, products and quotients once more, to
one of these, gives what exact arithmetic would (53 >= 2 * 24 + 2 bits). Schemes are described as compressed-tensors does it: the
name of a wire format and the `weights` entry of a config group.

Legend: N out_features, K in_features, R rows of units, C units in a row of units, L lines, n codes in a line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([(m if e == 0 else 8 + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:-1])  # the last is NaN


# --- rounding -------------------------------------------------------------------------------------------------------------------


def round_to(value: Array, dtype: torch.dtype) -> Array:
    """The nearest number of a dtype, ties to even; infinite beyond the largest."""
    limits = torch.finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(value), limits.tiny))[1] - 1
    step = np.ldexp(limits.eps, exponent)
    rounded = np.rint(value / step) * step
    return np.where(np.abs(rounded) > limits.max, np.copysign(np.inf, value), rounded)


def nearest(value: Array, table: Array) -> NDArray[np.uint8]:
    """The index of the magnitude in the table nearest to |value|, of two equally near the even one."""
    middle = (table[1:] + table[:-1]) / 2
    middles_below = np.searchsorted(middle, np.abs(value), side="left")
    middles_up_to = np.searchsorted(middle, np.abs(value), side="right")
    return np.where(middles_below % 2, middles_up_to, middles_below).astype(np.uint8)


def e4m3(value: Array) -> NDArray[np.uint8]:
    """Bytes of e4m3fn, saturating."""
    return nearest(value, E4M3) + np.uint8(128) * np.signbit(value)


def e2m1(value: Array) -> NDArray[np.uint8]:
    """Nibbles of e2m1, saturating. An exact -0.0 counts as positive."""
    return nearest(value, E2M1) + np.uint8(8) * (value < 0)


def mx_exponent(amax: Array, dtype: torch.dtype, max_exponent: int) -> NDArray[np.uint8]:
    """Bytes of e8m0. A significand of 1.75 or more belongs to the next power of two; what stays below the normal numbers of the
    dtype of the weights has the smallest exponent, and scale 1 in float16, which has no number that small."""
    tiny = torch.finfo(dtype).tiny
    binade = np.ldexp(1.0, np.frexp(np.maximum(amax, tiny))[1] - 1)
    raised = amax + binade / 4
    exponent = np.clip(127 + np.frexp(raised)[1] - 1 - max_exponent, 0, 254)
    return np.where(raised < tiny, 127 if dtype == torch.float16 else 0, exponent).astype(np.uint8)


# --- packing --------------------------------------------------------------------------------------------------------------------


def pack_bits(code_Ln: NDArray[Any], num_bits: int) -> NDArray[np.int32]:
    """Codes plus 2**(num_bits-1) as one stream of bits a line, low bits first, cut into words of 32."""
    lines, count = code_Ln.shape
    num_words = -(-count * num_bits // 32)
    stream = np.zeros((lines, num_words * 32), dtype=np.uint64)
    for bit in range(num_bits):
        stream[:, bit : count * num_bits : num_bits] = ((code_Ln.astype(np.int64) + 2 ** (num_bits - 1)) >> bit) & 1
    words = np.zeros((lines, num_words), dtype=np.uint64)
    for bit in range(32):
        words |= stream[:, bit::32] << np.uint64(bit)
    return words.astype(np.uint32).view(np.int32)


def pack_nibbles(nibble_Ln: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The even column is the low half of the byte."""
    return nibble_Ln[:, 0::2] + 16 * nibble_Ln[:, 1::2]


# --- units and their scales -----------------------------------------------------------------------------------------------------


def unit(args: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the elements that share a scale."""
    match args["strategy"]:
        case "tensor":
            return shape
        case "channel":
            return 1, shape[1]
        case "block":
            return args["block_structure"]
        case _:
            return 1, args["group_size"]


def reduce_units(ufunc: np.ufunc, weight_NK: Array, args: Mapping[str, Any]) -> Array:
    rows, columns = unit(args, weight_NK.shape)
    by_rows = ufunc.reduceat(weight_NK, range(0, weight_NK.shape[0], rows), axis=0)
    return ufunc.reduceat(by_rows, range(0, weight_NK.shape[1], columns), axis=1)


def spread_units(value_RC: Array, shape: tuple[int, int], args: Mapping[str, Any]) -> Array:
    """To each element the value of its unit."""
    rows, columns = unit(args, shape)
    return value_RC[np.arange(shape[0]) // rows][:, np.arange(shape[1]) // columns]


@dataclass
class Scales:
    stored: Tensor
    scale_RC: Array  # weight ~ (code - zero) * scale
    zero_RC: Array | None = None
    global_scale: Array | None = None


def symmetric_scale(amax: Array, half: float, dtype: torch.dtype, *, of_zero: float | None = None) -> Array:
    scale = round_to(amax / half, dtype)
    return np.where(scale == 0, torch.finfo(dtype).eps if of_zero is None else of_zero, scale)


def integer_zero(low_RC: Array, high_RC: Array, num_bits: int, dtype: torch.dtype) -> tuple[Array, Array]:
    """Asymmetric scale and zero point."""
    code_min, code_max = -(2.0 ** (num_bits - 1)), 2.0 ** (num_bits - 1) - 1
    width = round_to(high_RC - low_RC, dtype)
    in_float32 = np.minimum(high_RC - low_RC, torch.finfo(torch.float32).max)  # ours alone: the peer lets it become infinite
    scale = round_to(np.where(np.isinf(width), in_float32, width) / (code_max - code_min), dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        zero = round_to(code_min - round_to(low_RC / scale, dtype), dtype)
    zero = np.where(np.isnan(zero), 0.0, np.rint(np.clip(zero, code_min, code_max)))
    return np.where(scale == 0, torch.finfo(dtype).eps, scale), zero


def nvfp4_global_scale(amax: Array, dtype: torch.dtype) -> Array:
    """An inverse scale. In float16 the peer overflows, so float32 there."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    inv_scale = round_to(round_to(1 / np.maximum(amax, torch.finfo(dtype).tiny), dtype) * 2688, dtype)
    return np.where(np.isfinite(inv_scale), inv_scale, 1.0)


def scales(
    low_RC: Array,
    high_RC: Array,
    dtype: torch.dtype,
    format: str,
    args: Mapping[str, Any],
    *,
    scale_dtype: torch.dtype | None = None,
    amax: float | None = None,
    search: bool = False,
) -> Scales:
    """Scales for the bounds of units. `amax`: the largest magnitude in all fused weights. `search`: as an observer compares them."""
    low_RC, high_RC = np.minimum(low_RC, 0.0), np.maximum(high_RC, 0.0)
    amax_RC = np.maximum(-low_RC, high_RC)
    match format:
        case "nvfp4-pack-quantized":
            group_dtype = torch.float32 if dtype == torch.float16 else dtype
            if search:
                scale_RC = symmetric_scale(amax_RC, 6, group_dtype)
                return Scales(torch.empty(0), scale_RC)
            global_scale = nvfp4_global_scale(np.array([amax_RC.max() if amax is None else amax]), dtype)
            byte_RC = e4m3(round_to(round_to(amax_RC / 6, group_dtype) * global_scale, torch.float32))
            scale_RC = np.where(byte_RC == 0, 0.125, E4M3[byte_RC])
            stored = torch.from_numpy(nearest(scale_RC, E4M3)).view(torch.float8_e4m3fn)
            return Scales(stored, round_to(scale_RC / global_scale, torch.float32), global_scale=global_scale)
        case "mxfp4-pack-quantized" | "mxfp8-quantized":
            byte_RC = mx_exponent(amax_RC, dtype, 2 if args["num_bits"] == 4 else 8)
            return Scales(torch.from_numpy(byte_RC), np.ldexp(1.0, byte_RC.astype(int) - 127))
        case "fp8":
            scale_RC = symmetric_scale(amax_RC, 448, torch.float32, of_zero=1.0)
            return Scales(torch.from_numpy(scale_RC).float(), scale_RC)
    zero_RC = None
    dtype = scale_dtype or dtype
    if not args["symmetric"]:
        scale_RC, zero_RC = integer_zero(low_RC, high_RC, args["num_bits"], dtype)
    else:
        scale_RC = symmetric_scale(amax_RC, 448 if args["type"] == "float" else (2 ** args["num_bits"] - 1) / 2, dtype)
    return Scales(torch.from_numpy(scale_RC.reshape(-1) if args["strategy"] == "tensor" else scale_RC).to(dtype), scale_RC, zero_RC)


# --- elements -------------------------------------------------------------------------------------------------------------------


def quotient(weight_NK: Array, of: Scales, args: Mapping[str, Any]) -> Array:
    """What is rounded to a code, as a float32."""
    quotient_NK = round_to(weight_NK / spread_units(of.scale_RC, weight_NK.shape, args), torch.float32)
    if of.zero_RC is not None:
        quotient_NK = round_to(quotient_NK + spread_units(of.zero_RC, weight_NK.shape, args), torch.float32)
    return quotient_NK


def round_integer(value: Array, num_bits: int) -> Array:
    return np.clip(np.rint(value), -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)


def code_values(quotient_NK: Array, args: Mapping[str, Any]) -> Array:
    """The number nearest to each quotient that has a code."""
    if args["type"] == "int":
        return round_integer(quotient_NK, args["num_bits"])
    table = E2M1 if args["num_bits"] == 4 else E4M3
    return np.copysign(table[nearest(quotient_NK, table)], quotient_NK)


def encode(weight: Tensor, format: str, args: Mapping[str, Any], **settings: Any) -> dict[str, Tensor]:
    """Every stored tensor of a weight, by the last part of its name. Scales follow from the extremes, `settings` as for `scales`."""
    weight_NK = weight.double().numpy()
    low_RC, high_RC = (reduce_units(ufunc, weight_NK, args) for ufunc in (np.minimum, np.maximum))
    of = scales(low_RC, high_RC, weight.dtype, format, args, **settings)
    quotient_NK = quotient(weight_NK, of, args)
    stored = {"weight_scale_inv" if format == "fp8" else "weight_scale": of.stored}
    if format == "pack-quantized":
        stored["weight_packed"] = torch.from_numpy(pack_bits(round_integer(quotient_NK, args["num_bits"]), args["num_bits"]))
        stored["weight_shape"] = torch.tensor(weight.shape)
        if of.zero_RC is not None:
            stored["weight_zero_point"] = torch.from_numpy(pack_bits(of.zero_RC.T, args["num_bits"]).T)
    elif args["type"] == "int":
        stored["weight"] = torch.from_numpy(round_integer(quotient_NK, args["num_bits"])).to(torch.int8)
    elif args["num_bits"] == 8:
        stored["weight"] = torch.from_numpy(e4m3(quotient_NK)).view(torch.float8_e4m3fn)
    else:
        stored["weight_packed"] = torch.from_numpy(pack_nibbles(e2m1(quotient_NK)))
        if of.global_scale is not None:
            stored["weight_global_scale"] = torch.from_numpy(of.global_scale).float()
    return stored


def search_error(weight: Tensor, bounds_BRC: Array, format: str, args: Mapping[str, Any]) -> Array:
    """The sum of |dequantized - weight| ** 2.4 over each unit, for bounds (1: the largest magnitude; 2: minimum, maximum) [R, C].

    NaN where the scale overflows.
    """
    weight_NK = weight.double().numpy()
    low_RC, high_RC = (-bounds_BRC[0], bounds_BRC[0]) if len(bounds_BRC) == 1 else bounds_BRC
    of = scales(low_RC, high_RC, weight.dtype, format, args, search=True)
    value_NK = code_values(quotient(weight_NK, of, args), args)
    if of.zero_RC is not None:
        value_NK = value_NK - spread_units(of.zero_RC, weight_NK.shape, args)
    with np.errstate(invalid="ignore"):
        distance_NK = np.abs(value_NK * spread_units(of.scale_RC, weight_NK.shape, args) - weight_NK)
    return reduce_units(np.add, distance_NK**2.4, args)


def exact_codes(weight: Tensor, scale_RC: Tensor, zero_RC: Tensor | None, args: Mapping[str, Any]) -> Array:
    """The nearest code of each exact quotient: a bfloat16 or float16 quotient that is no tie is further from one than 2**-24."""
    weight_NK = weight.double().numpy()
    quotient_NK = weight_NK / spread_units(scale_RC.double().numpy(), weight_NK.shape, args)
    if zero_RC is not None:
        quotient_NK = quotient_NK + spread_units(zero_RC.double().numpy(), weight_NK.shape, args)
    return code_values(quotient_NK, args)


# --- comparing and trying -------------------------------------------------------------------------------------------------------


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """What is not the same in two sets of tensors: names, dtypes, shapes and bits."""
    found = dict.fromkeys(ours.keys() ^ theirs.keys(), "only in one")
    for name in ours.keys() & theirs.keys():
        our, their = ours[name], theirs[name]
        if (our.dtype, our.shape) != (their.dtype, their.shape):
            found[name] = f"{our.dtype} {list(our.shape)} against {their.dtype} {list(their.shape)}"
        elif differing := (bits(our) != bits(their)).any(-1).nonzero().flatten().tolist():
            where = differing[0]
            example = f"{our.flatten()[where].item()} against {their.flatten()[where].item()}"
            found[name] = f"{len(differing)} of {our.numel()} differ, first {example} at {where} of {list(our.shape)}"
    return found


def bits(tensor: Tensor) -> Tensor:
    """The bytes of each element."""
    return tensor.contiguous().flatten().unsqueeze(-1).view(torch.uint8)


SETTINGS_TO_TRY: list[dict[str, Any]] = [
    {"preset": "W4A16", "group_size": 32},
    {"preset": "W4A16", "group_size": 64},
    {"preset": "W4A16", "strategy": "channel"},
    {"preset": "W4A16_ASYM", "strategy": "channel"},
    {"preset": "W8A16", "strategy": "channel"},
    {"preset": "W8A16", "symmetric": False},
    {"preset": "W3A16", "symmetric": False, "group_size": 32},
    {"preset": "FP8_DYNAMIC", "strategy": "tensor"},
    {"preset": "FP8A16", "strategy": "tensor"},
    {"preset": "FP8A16", "strategy": "block"},
]
"""Besides the presets: arguments of find_scheme for what llm-compressor can store too."""


def weights_to_try(shape: tuple[int, int], dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights of many distributions, all finite."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator)

    half = torch.arange(shape[1]) < shape[1] // 2
    limits = torch.finfo(dtype)
    bytes_of_any = torch.randint(256, (shape[0], shape[1] * dtype.itemsize), generator=generator, dtype=torch.uint8).view(dtype)
    huge, tiny = (5e4, 3e-7) if dtype == torch.float16 else (1e30, 1e-30)
    weights = {
        "normal": normal() * 0.02,
        "heavy tail": normal() / (uniform() + 1e-3),
        "positive": uniform() + 0.1,
        "negative": -uniform() - 0.1,
        "zeros": torch.zeros(shape),
        "zero rows": torch.where(torch.arange(shape[0])[:, None] % 3 == 0, 0.0, normal()),
        "zero halves": torch.where(half & (uniform() > 0.5), 0.0, normal() * 0.05),
        "negative zeros": torch.where(uniform() > 0.5, -0.0, normal() * 0.01),
        "ties": torch.randint(-64, 65, shape, generator=generator) / 16,
        "huge": (uniform() * 2 - 1) * huge,
        "tiny": normal() * tiny,
        "subnormal": (uniform() * 2 - 1) * limits.tiny,
        "outlier": torch.where((torch.arange(shape[0])[:, None] == 0) & (torch.arange(shape[1]) == 0), 37.0, normal() * 0.02),
        "many magnitudes": normal() * torch.exp2(torch.randint(-20, 8, shape, generator=generator)),
        "any bits": torch.where(bytes_of_any.isfinite(), bytes_of_any, 0.0),
        "largest": torch.where(uniform() > 0.5, limits.max, limits.min),
    }
    return {name: weight.to(dtype) for name, weight in weights.items()}


# --- codes chosen for inputs ----------------------------------------------------------------------------------------------------


def hessian_error(error_NK: Array, hessian_KK: Array) -> float:
    """What inputs with this Hessian, X^T X, make of errors of a weight: the sum of the squares of X d for each row d."""
    return float(np.einsum("nk,kl,nl->", error_NK, hessian_KK, error_NK, optimize=True))


def gptq(
    weight: Tensor,
    hessian_KK: Array,
    format: str,
    args: Mapping[str, Any],
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    **settings: Any,
) -> tuple[Array, Array]:
    """Values of codes by GPTQ, and the weight that they stand for; scales follow from the extremes, `settings` as for `scales`.

    Optimal Brain Surgeon (arXiv 2210.17323, section 3 equation 2): a column is rounded, and the others are moved by what the inverse of
    the Hessian of those that are still to be rounded says. A column that no input reaches is taken as 0.
    """
    weight_NK, hessian_KK = weight.double().numpy().copy(), hessian_KK.copy()
    low_RC, high_RC = (reduce_units(ufunc, weight_NK, args) for ufunc in (np.minimum, np.maximum))
    of = scales(low_RC, high_RC, weight.dtype, format, args, **settings)
    scale_NK = spread_units(of.scale_RC, weight_NK.shape, args)
    zero_NK = np.zeros_like(weight_NK) if of.zero_RC is None else spread_units(of.zero_RC, weight_NK.shape, args)
    dead_K = hessian_KK.diagonal() == 0
    mean = hessian_KK.diagonal()[~dead_K].mean()
    order = np.argsort(-hessian_KK.diagonal(), kind="stable") if activation_order else np.arange(len(dead_K))
    hessian_KK += np.diag(np.where(dead_K, mean, 0.0) + damping * mean)
    weight_NK[:, dead_K] = 0.0
    code_NK, value_NK = np.zeros_like(weight_NK), np.zeros_like(weight_NK)
    for step, column in enumerate(order):
        code_NK[:, column] = code_values(weight_NK[:, column] / scale_NK[:, column] + zero_NK[:, column], args)
        value_NK[:, column] = (code_NK[:, column] - zero_NK[:, column]) * scale_NK[:, column]
        left = order[step:]
        inverse = np.linalg.inv(hessian_KK[np.ix_(left, left)])
        moved = (value_NK[:, column] - weight_NK[:, column])[:, None] * inverse[0] / inverse[0, 0]
        weight_NK[:, left] += moved
    return code_NK, value_NK
