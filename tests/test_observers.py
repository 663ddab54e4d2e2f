import numpy as np
import pytest
import torch
from torch import Tensor

from streamquant.errors import RequestError
from streamquant.schemes import Scheme, find_scheme
from streamquant.schemes.observers import OBSERVERS
from streamquant.schemes.observers import candidates as candidates_of_grid
from tests import oracles

NEAR_TIE = 1 + 1e-5
NOISE = 1e-6  # of the largest magnitude: what float32 knows of a distance
GRIDS = {  # by observer: the factor by which extremes are expanded, and those by which they are then shrunk
    "mse": (1.0, [1 - i / 100 for i in range(20)]),
    "nvfp4_expanded_mse": (1.8, [1 - i / 200 for i in range(111)]),
}  # llm-compressor's observers/mse.py
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SETTINGS = [
    *({"preset": preset, "observer": "mse"} for preset in ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "W2A16")),
    *({"preset": preset, "observer": "mse"} for preset in ("NVFP4A16", "MXFP4", "MXFP8")),
    {"preset": "W8A16", "symmetric": False, "observer": "mse"},
    {"preset": "W4A16", "group_size": 32, "observer": "mse"},
    {"preset": "FP8_BLOCK", "format": "fp8", "observer": "mse"},
    {"preset": "NVFP4A16", "observer": "nvfp4_expanded_mse"},
]
SEARCHES = {" ".join(str(value) for value in setting.values()): find_scheme(**setting) for setting in SETTINGS}

each_search = pytest.mark.parametrize("scheme", SEARCHES.values(), ids=SEARCHES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def extremes(scheme: Scheme, weight_NK: Tensor) -> oracles.Array:
    low_RC, high_RC = (oracles.reduce_units(ufunc, weight_NK.double().numpy(), scheme.weights_config) for ufunc in (np.minimum, np.maximum))
    low_RC, high_RC = np.minimum(low_RC, 0), np.maximum(high_RC, 0)
    return np.maximum(-low_RC, high_RC)[None] if scheme.symmetric else np.stack([low_RC, high_RC])


def candidates(scheme: Scheme, weight_NK: Tensor) -> list[oracles.Array]:
    """Bounds that the search may choose: the extremes, and those of the grid."""
    extremes_BRC = extremes(scheme, weight_NK)

    def times(bounds_BRC: oracles.Array, factor: float) -> oracles.Array:
        in_float32 = oracles.round_to(bounds_BRC * float(np.float32(factor)), torch.float32)  # as torch multiplies
        return oracles.round_to(in_float32, weight_NK.dtype)

    expand, factors = GRIDS[scheme.observer]
    return [extremes_BRC, *(times(times(extremes_BRC, expand), factor) for factor in factors)]


def errors(scheme: Scheme, weight_NK: Tensor, bounds_BRC: oracles.Array) -> oracles.Array:
    error_RC = oracles.search_error(weight_NK, bounds_BRC, scheme.format, scheme.weights_config)
    return np.where(np.isnan(error_RC), np.inf, error_RC)


def assert_best(scheme: Scheme, weight_NK: Tensor) -> None:
    bounds_BRC = scheme.observe(weight_NK).double().numpy()
    tried = candidates(scheme, weight_NK)
    assert np.any([(bounds_BRC == candidate_BRC).all(0) for candidate_BRC in tried], axis=0).all(), "bounds that are no candidate"
    error_RC = errors(scheme, weight_NK, bounds_BRC)
    every_RC = np.stack([errors(scheme, weight_NK, candidate_BRC) for candidate_BRC in tried])
    noise_RC = (NOISE * np.abs(extremes(scheme, weight_NK)).max(0)) ** 2.4
    assert (error_RC <= every_RC[0] * NEAR_TIE + noise_RC).all(), "worse than minmax"
    assert (error_RC <= every_RC.min(0) * NEAR_TIE + noise_RC).all(), "not the best of the grid"


@each_dtype
@each_search
def test_a_search_finds_the_best_of_its_grid_and_is_never_worse_than_minmax(scheme: Scheme, dtype: torch.dtype) -> None:
    if scheme.weights_config["strategy"] == "block":
        weights = oracles.weights_to_try((130, 256), dtype)
        for name in ("normal", "heavy tail", "zero halves", "tiny"):
            assert_best(scheme, weights[name])
    else:
        weights = oracles.weights_to_try((6, 256), dtype)
        del weights["largest"], weights["any bits"]  # beyond the range in which a float32 knows errors
        assert_best(scheme, torch.cat(list(weights.values())))


@each_dtype
@each_search
def test_a_search_survives_every_finite_weight(scheme: Scheme, dtype: torch.dtype) -> None:
    for name, weight_NK in oracles.weights_to_try((6, 256), dtype).items():
        bounds_BRC = scheme.observe(weight_NK)
        assert bounds_BRC.isfinite().all(), name
        stored = scheme.encode_whole(weight_NK)
        for suffix in stored.keys() & {"weight_scale", "weight_scale_inv", "weight_global_scale"}:
            scale = stored[suffix].float()
            assert (scale.isfinite() & (scale > 0) | (stored[suffix].dtype == torch.uint8)).all(), name


@each_search
def test_a_search_finds_better_bounds_than_minmax(scheme: Scheme) -> None:
    weight_NK = oracles.weights_to_try((128, 256), torch.bfloat16)["normal"]
    extremes_BRC, bounds_BRC = extremes(scheme, weight_NK), scheme.observe(weight_NK).double().numpy()
    if scheme.format not in {"mxfp4-pack-quantized", "mxfp8-quantized"}:  # for most groups the power of two stays
        assert (bounds_BRC != extremes_BRC).any()
        assert errors(scheme, weight_NK, bounds_BRC).sum() < errors(scheme, weight_NK, extremes_BRC).sum()


@each_dtype
@pytest.mark.parametrize("preset", ["MXFP4", "MXFP8"])
def test_a_grid_has_two_powers_of_two_at_most_the_first_and_the_last(preset: str, dtype: torch.dtype) -> None:
    """So that the others need not be tried. For every magnitude that there is, in 16 bits."""
    if dtype == torch.float32:
        magnitudes = torch.randint(0, 0x7F800000, (1 << 16,), generator=torch.Generator().manual_seed(1)).to(torch.int32).view(dtype)
    else:
        magnitudes = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    extremes_BRC = magnitudes[magnitudes.isfinite()].float()[None, :, None]
    grid = OBSERVERS["mse"]
    assert grid is not None
    bounds_QRC = candidates_of_grid(extremes_BRC, grid.expand, grid.factors, dtype)[0]
    scale_QR = torch.stack([find_scheme(preset).search_scales(bounds_RC[None], dtype).scale_RC[:, 0] for bounds_RC in bounds_QRC])
    assert ((scale_QR == scale_QR[0]) | (scale_QR == scale_QR[-1])).all()
    assert (scale_QR[0] != scale_QR[-1]).any()
    changes_QR = scale_QR[1:] != scale_QR[:-1]
    assert changes_QR.sum(0).max() == 1


@each_search
def test_units_of_zeros_keep_their_extremes(scheme: Scheme) -> None:
    weight_NK = oracles.weights_to_try((6, 256), torch.float32)["normal"]
    weight_NK[:4] = torch.tensor([0.0, -0.0]).repeat(128)
    if scheme.weights_config["strategy"] == "block":
        weight_NK[:, :128] = 0.0
        assert (scheme.observe(weight_NK)[..., 0] == 0).all()
    else:
        assert (scheme.observe(weight_NK)[:, :4] == 0).all()
        zeros = {suffix: tensor[:4] for suffix, tensor in scheme.encode(weight_NK, shared=torch.ones(1)).items()}
        plain = scheme.encode(weight_NK, torch.from_numpy(extremes(scheme, weight_NK)).float(), shared=torch.ones(1))
        assert oracles.differences(zeros, {suffix: tensor[:4] for suffix, tensor in plain.items()}) == {}


@each_dtype
@each_search
def test_the_result_of_a_unit_depends_on_no_other_unit(scheme: Scheme, dtype: torch.dtype) -> None:
    unit_rows, _ = scheme.unit(384)
    weight_NK = torch.cat(list(oracles.weights_to_try((2 * unit_rows, 384), dtype).values())[:8])
    bounds_BRC = scheme.observe(weight_NK)
    for start, end in ((0, 1), (1, 2), (3, 8), (8, 16)):
        assert torch.equal(scheme.observe(weight_NK[start * unit_rows : end * unit_rows]), bounds_BRC[:, start:end])
    if scheme.weights_config["strategy"] != "channel":
        assert torch.equal(scheme.observe(weight_NK[:, 128:256]), bounds_BRC.unflatten(2, (3, -1))[:, :, 1])


@pytest.mark.parametrize("name", ["FP8_DYNAMIC mse", "FP8_BLOCK mse", "W4A16_ASYM mse", "NVFP4A16 mse", "MXFP8 mse"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    scheme = SEARCHES[name]
    weight_NK = oracles.weights_to_try((128, 384), torch.bfloat16)["heavy tail"]  # more than torch leaves to one thread
    before = torch.get_num_threads()
    bounds = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            bounds.append(scheme.observe(weight_NK))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bounds[0], bounds[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4", "MXFP8"])
def test_bounds_are_not_finite_where_a_weight_is_not(preset: str, observer: str, bad: float) -> None:
    scheme = find_scheme(preset, observer=observer)
    for dtype in DTYPES:
        weight_NK = oracles.weights_to_try((5, 256), dtype)["normal"]
        weight_NK[2, 130] = bad
        unit_rows, unit_columns = scheme.unit(256)
        finite_RC = scheme.observe(weight_NK).isfinite().all(0)
        assert not finite_RC[2 // unit_rows, 130 // unit_columns]
        assert (~finite_RC).sum() == 1


@pytest.mark.parametrize(
    "setting",
    [{"preset": "FP8_DYNAMIC"}, {"preset": "FP8_DYNAMIC", "strategy": "tensor"}, {"preset": "FP8_BLOCK"}, {"preset": "NVFP4A16"}],
    ids=str,
)
@each_dtype
def test_scales_that_are_powers_of_two_are_the_smallest_that_clip_nothing(setting: dict[str, str], dtype: torch.dtype) -> None:
    for weight_NK in oracles.weights_to_try((256, 256), dtype).values():
        if not 2.0**-100 < float(weight_NK.abs().amax()) < 2.0**100:
            continue
        scheme = find_scheme(**setting, observer="power_of_two")
        stored = scheme.encode_whole(weight_NK)
        _, scales = scheme.unpack(stored, 256)
        amax_RC = torch.from_numpy(extremes(scheme, weight_NK)[0]).expand(scales.scale_RC.shape)
        if setting.get("strategy") == "tensor":
            amax_RC = amax_RC.amax().view(1, 1)
        ratio_RC = amax_RC / (scales.scale_RC.double() * scheme.largest_code)
        # Scales of float16 and of NVFP4's groups end at a smallest one; below they are what there is.
        usual_RC = (scales.scale_RC > scales.scale_RC.amax() * 2.0**-14) & (amax_RC > (2.0**-4 if dtype == torch.float16 else 2.0**-100))
        assert bool((torch.frexp(scales.scale_RC[usual_RC])[0] == 0.5).all())
        assert bool((ratio_RC[usual_RC] <= 1).all())
        assert bool((ratio_RC[usual_RC] > 0.5).all())


def test_only_floating_point_schemes_with_floating_point_scales_have_powers_of_two_to_choose() -> None:
    for preset in ("W4A16", "W8A8", "MXFP4", "MXFP8"):
        with pytest.raises(RequestError, match=f"observer power_of_two is made for floating point codes .* not for {preset}"):
            find_scheme(preset, observer="power_of_two")
