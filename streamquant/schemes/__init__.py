"""Quantization schemes: tensor in, tensors out. Pure numerics; works on any device, the meta device included.

    scheme = find_scheme("W4A16", observer="mse")
    stored = scheme.encode_whole(weight_NK)       # {"weight_packed": ..., "weight_scale": ..., "weight_shape": ...}
    weight_NK = scheme.decode(stored, num_columns)

Names and meaning of the presets are those of compressed-tensors (`quantization/quant_scheme.py`), plus FP8A16 (FP8 weights, inputs
untouched), which has no name there. W4A8 and W4AFP8 are stored packed, which is what vLLM reads; the experts of W4A8 as bytes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from streamquant.errors import CheckpointError, RequestError
from streamquant.schemes.fp8 import Fp8, NativeFp8
from streamquant.schemes.integer import ByteInt, PackedInt
from streamquant.schemes.mx import MxFp4, MxFp8
from streamquant.schemes.nvfp4 import NvFp4
from streamquant.schemes.observers import OBSERVERS
from streamquant.schemes.plain import Plain
from streamquant.schemes.scheme import Activations, Scheme

__all__ = ["FORMATS", "NATIVE_FP8", "PLAIN", "SCHEMES", "WITHOUT_DATA", "Scheme", "find_scheme", "scheme_from_config"]

FP8_TOKEN = Activations(num_bits=8, type="float", strategy="token")
FP8_TENSOR = Activations(num_bits=8, type="float", strategy="tensor", dynamic=False)
FP8_GROUP = Activations(num_bits=8, type="float", strategy="group", group_size=128)
INT8_TOKEN = Activations(num_bits=8, type="int", strategy="token")
NVFP4_GROUP = Activations(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local")
MXFP4_GROUP = Activations(num_bits=4, type="float", strategy="group", group_size=32)
MXFP8_GROUP = Activations(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")

SCHEMES: dict[str, Scheme] = {
    "FP8": Fp8(preset="FP8", strategy="tensor", activations=FP8_TENSOR),
    "FP8_DYNAMIC": Fp8(preset="FP8_DYNAMIC", activations=FP8_TOKEN),
    "FP8_BLOCK": Fp8(preset="FP8_BLOCK", strategy="block", activations=FP8_GROUP),
    "FP8A16": Fp8(preset="FP8A16"),
    "W8A8": ByteInt(preset="W8A8", num_bits=8, strategy="channel", activations=INT8_TOKEN),
    "INT8": ByteInt(preset="INT8", num_bits=8, strategy="channel", activations=INT8_TOKEN),
    "W8A16": PackedInt(preset="W8A16", num_bits=8),
    "W7A16": PackedInt(preset="W7A16", num_bits=7),
    "W6A16": PackedInt(preset="W6A16", num_bits=6),
    "W5A16": PackedInt(preset="W5A16", num_bits=5),
    "W4A16": PackedInt(preset="W4A16", num_bits=4),
    "W4A16_ASYM": PackedInt(preset="W4A16_ASYM", num_bits=4, symmetric=False),
    "W3A16": PackedInt(preset="W3A16", num_bits=3),
    "W2A16": PackedInt(preset="W2A16", num_bits=2),
    "W4A8": PackedInt(preset="W4A8", num_bits=4, activations=INT8_TOKEN),
    "W4AFP8": PackedInt(preset="W4AFP8", num_bits=4, activations=FP8_TOKEN),
    "NVFP4": NvFp4(preset="NVFP4", activations=NVFP4_GROUP),
    "NVFP4A16": NvFp4(preset="NVFP4A16"),
    "MXFP4A16": MxFp4(preset="MXFP4A16"),
    "MXFP4": MxFp4(preset="MXFP4", activations=MXFP4_GROUP),
    "MXFP8A16": MxFp8(preset="MXFP8A16"),
    "MXFP8": MxFp8(preset="MXFP8", activations=MXFP8_GROUP),
}

# Not quantized: what quantized sources are unpacked to, by the dtype's name in a file and by that of the command line.
PLAIN: dict[str, Plain] = {
    "BF16": Plain(preset="BF16", dtype_name="bfloat16"),
    "F16": Plain(preset="FP16", dtype_name="float16"),
    "F32": Plain(preset="FP32", dtype_name="float32"),
}

NATIVE_FP8 = NativeFp8(preset="FP8_BLOCK", activations=FP8_GROUP)

WITHOUT_DATA = {"FP8": "FP8_DYNAMIC", "NVFP4": "NVFP4A16"}  # schemes that need data -> the nearest that need none

FORMATS = ("compressed-tensors", "fp8")

# Of what a config says of weights and activations.
_CONFIG_TYPES = {"num_bits": int, "type": str, "strategy": str, "group_size": int, "symmetric": bool, "scale_dtype": str}


def find_scheme(
    preset: str,
    *,
    observer: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    strategy: str | None = None,
    scale_dtype: str | None = None,
    format: str = "compressed-tensors",
) -> Scheme:
    """The preset (case does not matter) with the given settings in place of its own; None leaves a setting as it is.

    Raises RequestError for an unknown preset, a setting that the preset does not have, or a value that it does not allow.
    """
    name = preset.upper()
    plain = {scheme.preset: scheme for scheme in PLAIN.values()}
    known: dict[str, Scheme] = SCHEMES | plain
    if name not in known:
        raise RequestError(f"unknown scheme {preset!r}; known are {', '.join(known)}")
    if observer is not None and observer not in OBSERVERS:
        raise RequestError(f"unknown observer {observer!r}; known are {', '.join(OBSERVERS)}")
    if format not in FORMATS:
        raise RequestError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    scheme = known[name]
    if format == "fp8":
        if name != "FP8_BLOCK":
            raise RequestError(f"format fp8 stores FP8_BLOCK and no other scheme, not {name}")
        scheme = NATIVE_FP8
    if group_size is not None and strategy is None and "group_size" in scheme.settings:
        strategy = "group"
    wanted = {"group_size": group_size, "symmetric": symmetric, "strategy": strategy, "scale_dtype": scale_dtype}
    given = {setting: value for setting, value in wanted.items() if value is not None}
    for setting in given:
        if setting not in scheme.settings:
            can = ", ".join(sorted(scheme.settings)) or "none"
            raise RequestError(f"{name} has no {setting.replace('_', ' ')} to choose; settings it has: {can}")
    if strategy == "channel" and group_size is not None:
        raise RequestError(f"a group size of {group_size} and strategy channel exclude each other")
    if observer == "nvfp4_expanded_mse" and not isinstance(scheme, NvFp4):
        raise RequestError(f"observer nvfp4_expanded_mse is made for NVFP4; for {name} use mse")
    if observer not in {None, "minmax"} and isinstance(scheme, Plain):
        raise RequestError(f"{name} has no scales, so no observer {observer}")
    if observer is not None:
        given["observer"] = observer
    found = dataclasses.replace(scheme, **given)  # type: ignore[arg-type]
    if observer == "power_of_two":
        _ = found.largest_code  # raises where scales are no powers of two, or always are
    return found


def scheme_from_config(format: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> Scheme:
    """The scheme that a config group of a compressed-tensors checkpoint describes.

    Raises CheckpointError for a group that none of our schemes stores.
    """
    for args in (weights, activations or {}):
        for key, kind in _CONFIG_TYPES.items():
            if args.get(key) is not None and type(args[key]) is not kind:
                raise CheckpointError(f"quantization_config: {key} is {args[key]!r}, which should be of type {kind.__name__}")
    inputs = None
    if activations is not None:
        fields = [field.name for field in dataclasses.fields(Activations)]
        inputs = Activations(**{name: activations[name] for name in fields if activations.get(name) is not None})
    strategy = str(weights["strategy"])
    scheme: Scheme
    try:
        match format:
            case "pack-quantized" | "int-quantized":
                kind = PackedInt if format == "pack-quantized" else ByteInt
                scheme = kind(
                    preset=format,
                    num_bits=weights["num_bits"],
                    strategy=strategy,
                    group_size=weights.get("group_size") or 128,
                    symmetric=weights.get("symmetric") is not False,
                    activations=inputs,
                )
            case "float-quantized" | "naive-quantized":
                scheme = Fp8(preset=format, strategy=strategy, activations=inputs)
            case "nvfp4-pack-quantized":
                scheme = NvFp4(preset=format, activations=inputs)
            case "mxfp4-pack-quantized":
                scheme = MxFp4(preset=format, activations=inputs)
            case "mxfp8-quantized":
                scheme = MxFp8(preset=format, activations=inputs)
            case _:
                raise CheckpointError(f"quantization_config: format {format!r} is none that streamquant reads")
    except RequestError as error:
        raise CheckpointError(f"quantization_config: {error}") from None
    said = {key: value for key, value in weights.items() if key in scheme.weights_config}
    if said != scheme.weights_config:
        raise CheckpointError(f"quantization_config: {format} with weights {dict(weights)} is nothing that streamquant stores")
    named = [preset.preset for preset in SCHEMES.values() if preset == scheme]
    return dataclasses.replace(scheme, preset=named[0]) if named else scheme
