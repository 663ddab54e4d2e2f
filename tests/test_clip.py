"""Bounds of groups made smaller: the best of the grid by the outputs themselves, and what that does for a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamquant
from streamquant.calibrate.clip import FACTORS, clip_bounds, may_clip
from streamquant.schemes import Scheme, find_scheme
from streamquant.schemes.kernels import Kernels
from tests.checkpoints import WIKI_LLAMA, read_tensors
from tests.test_awq import inputs_with_outliers, statistics_of, weights
from tests.test_gptq import each_kernels

PRESETS = ("W4A16", "W4A16_ASYM", "W2A16", "NVFP4A16", "MXFP4A16")


def decoded(weight_NK: Tensor, scheme: Scheme, bounds_BRC: Tensor, shared: Tensor | None) -> Tensor:
    """What engines make of the weight with these bounds."""
    bfloat16_NK = weight_NK.bfloat16()
    stored = scheme.encode(bfloat16_NK, bounds_BRC, shared=shared)
    return scheme.decode(stored | scheme.once((weight_NK.shape[0], weight_NK.shape[1]), torch.bfloat16, shared), weight_NK.shape[1])


@each_kernels
@pytest.mark.parametrize("preset", PRESETS)
def test_each_group_has_the_factor_that_is_best_for_its_part_of_the_outputs(preset: str, kernels: Kernels, monkeypatch: Any) -> None:
    """In float64, by the inputs and not by their Hessian, with one group's columns alone."""
    monkeypatch.setattr("streamquant.calibrate.clip.ELEMENTS_AT_ONCE", 256 * 20)  # some rows at a time
    scheme, input_TK, (weight_NK,) = find_scheme(preset), inputs_with_outliers(), weights(48)
    bounds_BRC = scheme.observe(weight_NK.bfloat16())
    shared = scheme.share(bounds_BRC.abs().amax().view(1), torch.bfloat16) if scheme.shares_amax else None
    hessian_KK = statistics_of(input_TK).hessian_KK
    chosen_BRC = clip_bounds(weight_NK, bounds_BRC, hessian_KK, scheme, dtype=torch.bfloat16, shared=shared, kernels=kernels)

    group_size = scheme.unit(256)[1]
    inputs_GTk = input_TK.double().unflatten(1, (-1, group_size)).transpose(0, 1)

    def errors(candidate_BRC: Tensor) -> Tensor:
        lost_NK = decoded(weight_NK, scheme, candidate_BRC, shared).double() - weight_NK.double()
        lost_GkN = lost_NK.unflatten(1, (-1, group_size)).permute(1, 2, 0)
        return (inputs_GTk @ lost_GkN).square().sum(1).T  # [N, G]

    of_factors = torch.stack([errors(bounds_BRC * factor) for factor in (1.0, *FACTORS)])
    torch.testing.assert_close(errors(chosen_BRC), of_factors.amin(0), rtol=1e-4, atol=0)
    assert not torch.equal(chosen_BRC, bounds_BRC)


@pytest.mark.parametrize(
    ("scheme", "clips"),
    [
        (find_scheme("W4A16"), True),
        (find_scheme("W8A8"), False),  # a scale for a row
        (find_scheme("FP8_DYNAMIC"), False),
        (find_scheme("FP8_BLOCK"), False),
        (find_scheme("NVFP4A16"), True),
    ],
    ids=lambda value: value.preset if isinstance(value, Scheme) else "",
)
def test_scales_of_groups_are_clipped_and_no_others(scheme: Scheme, clips: bool) -> None:
    assert may_clip(scheme, 256) == clips


def converted(out: Path, **settings: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    done = streamquant.convert(WIKI_LLAMA, out, samples=12, sequence_length=64, **settings).to_json()
    return read_tensors(out), done["calibration"]["weights"]


@pytest.mark.parametrize(("method", "without", "clipping"), [("gptq", None, True), ("awq", False, None), ("awq+gptq", False, None)])
def test_clipping_makes_the_outputs_better(tmp_path: Path, method: str, without: bool | None, clipping: bool | None) -> None:
    """With its default on one side: AWQ clips."""
    _, unclipped = converted(tmp_path / "unclipped", scheme="W4A16", method=method, clip=without)
    _, clipped = converted(tmp_path / "clipped", scheme="W4A16", method=method, clip=clipping)
    after, before = (sum(record["error_after"] for record in records) for records in (clipped, unclipped))
    assert after < 0.97 * before
    assert all(record["error_after"] <= record["error_before"] for record in clipped)
    assert streamquant.verify(tmp_path / "clipped").problems == []


def test_awq_without_scales_of_groups_clips_nothing_and_is_not_asked_to(tmp_path: Path) -> None:
    tensors, _ = converted(tmp_path / "without", scheme="FP8_DYNAMIC", method="awq", clip=False)
    by_default, _ = converted(tmp_path / "default", scheme="FP8_DYNAMIC", method="awq")
    assert all(torch.equal(by_default[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items())
    with pytest.raises(streamquant.RequestError, match=r"--clip needs scales of groups .* asked for: FP8_DYNAMIC"):
        converted(tmp_path / "clipped", scheme="FP8_DYNAMIC", method="awq", clip=True)


@pytest.mark.parametrize("settings", [{}, {"scheme": "FP8", "samples": 4}])
def test_rounding_without_outputs_clips_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(streamquant.RequestError, match="--clip: method rtn"):
        streamquant.convert(WIKI_LLAMA, tmp_path / "out", **({"scheme": "W4A16"} | settings), clip=True)
