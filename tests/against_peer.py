"""What llm-compressor's answer for a weight (see run_peer.py) and ours must have in common.

Equal bits: float32 weights, NVFP4 and MX. For bfloat16 and float16 weights, integers and FP8: equal scales and zero points, but
codes that are nearest to the exact quotient, because the peer rounds the quotient to the dtype of the weight before it rounds it
to a code. Bounds that an observer chose: equal, or better by the norm of the search.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamquant.schemes import SCHEMES, Scheme
from tests import oracles

OBSERVERS = {"minmax": None, "mse": "memoryless_mse", "nvfp4_expanded_mse": "nvfp4_expanded_mse"}
NEAR_TIE = 1 + 1e-5


def scheme_for_peer(scheme: Scheme) -> str | dict[str, Any]:
    """The same scheme in the peer's words: a preset of its own if there is one."""
    if SCHEMES.get(scheme.preset) == dataclasses.replace(scheme, observer="minmax") and scheme.preset != "FP8A16":
        return scheme.preset
    inputs = {} if scheme.activations is None else {"input_activations": scheme.activations.config}
    return {"weights": scheme.weights_config, **inputs}


def peer_fails(scheme: Scheme, weight: Tensor) -> bool:
    """Where the peer is known to destroy the weight and we are not to follow."""
    if weight.dtype == torch.float16 and scheme.format == "nvfp4-pack-quantized":
        return True  # 2688 / amax is rounded to float16
    if scheme.format in {"mxfp4-pack-quantized", "mxfp8-quantized"}:
        return bool((weight.abs().max() / 1.75 * 2).isinf())  # the power of two next to it
    return not scheme.symmetric and bool((weight.max() - weight.min()).isinf())  # the width of the range


def differences(scheme: Scheme, weight: Tensor, theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """Where our encoding of a weight is not what the peer's demands."""
    ours = scheme.encode_whole(weight)
    code_NK, scales = scheme.unpack(ours, weight.shape[1])
    if scheme.format == "pack-quantized" and "weight" in theirs:  # the peer leaves the integers of W4A8 and W4AFP8 unpacked
        ours = {"weight": code_NK.to(torch.int8), "weight_scale": ours["weight_scale"]}
    found = oracles.differences(ours, theirs)
    if weight.dtype == torch.float32 or scheme.format == "nvfp4-pack-quantized":
        return found
    if scheme.format in {"mxfp4-pack-quantized", "mxfp8-quantized"}:
        their_code_NK, _ = scheme.unpack(theirs, weight.shape[1])
        if torch.equal(code_NK, their_code_NK):
            found.pop("weight_packed", None)  # the peer's zero has no sign where a negative quotient underflows the dtype of the weight
        return found
    for name in ("weight", "weight_packed"):
        found.pop(name, None)
    if not np.array_equal(code_NK.numpy(), oracles.exact_codes(weight, scales.scale_RC, scales.zero_RC, scheme.weights_config)):
        found["codes"] = "not the nearest to the exact quotients"
    return found


def worse_bounds(scheme: Scheme, weight: Tensor, their_low: Tensor, their_high: Tensor) -> tuple[int, int, int]:
    """In how many units our bounds differ from the peer's, in how many of these the error too, and in how many of these it is larger.

    Of bounds that give the same scale, a power of two, either may be found.
    """
    ours_BRC = scheme.observe(weight).double()
    low_RC, high_RC = (their.double().view(ours_BRC.shape[1:]) for their in (their_low.clamp(max=0), their_high.clamp(min=0)))
    theirs_BRC = torch.maximum(-low_RC, high_RC)[None] if scheme.symmetric else torch.stack([low_RC, high_RC])
    our_error, their_error = (
        oracles.search_error(weight, bounds_BRC.numpy(), scheme.format, scheme.weights_config) for bounds_BRC in (ours_BRC, theirs_BRC)
    )
    differ = (ours_BRC != theirs_BRC).any(0).numpy()
    errors_differ, is_worse = differ & (our_error != their_error), differ & (our_error > their_error * NEAR_TIE)
    return int(differ.sum()), int(errors_differ.sum()), int(is_worse.sum())
