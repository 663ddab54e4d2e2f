"""Scales moved between what gives an input and what reads it: found as by the papers' formulas, and the function stays the same."""

from functools import partial

import pytest
import torch
from torch import Tensor

from streamquant.calibrate.awq import GRID, Reader, Steps, search_scale, smooth_scale
from streamquant.calibrate.pairs import Pair, linear_pairs, move_scale
from streamquant.calibrate.scales import _rounded
from streamquant.calibrate.statistics import Collector, Statistics
from streamquant.schemes import Scheme, find_scheme
from streamquant.schemes.kernels import TORCH

SCHEMES = {preset: find_scheme(preset) for preset in ("W4A16", "W4A16_ASYM", "W8A8", "NVFP4A16", "FP8_DYNAMIC")}


def inputs_with_outliers(num_tokens: int = 300, num_columns: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    input_TK = torch.randn(num_tokens, num_columns, generator=generator)
    return input_TK * torch.rand(num_columns, generator=generator).pow(-1.5).clamp(max=40)


def statistics_of(input_TK: Tensor) -> Statistics:
    statistics = Statistics.of_nothing(input_TK.shape[1], input_TK.device)
    for part_TK in input_TK.split(64):
        statistics.add(part_TK)
    statistics.finish()
    return statistics


def weights(*num_rows: int, num_columns: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, num_columns, generator=generator) * 0.05).bfloat16().float() for rows in num_rows]


def rounding(scheme: Scheme) -> partial[Tensor]:
    return partial(_rounded, scheme=scheme, dtype=torch.bfloat16, kernels=TORCH)


@pytest.mark.parametrize("num_columns", [40, 256, 300, 1100])
def test_statistics_are_sums_over_all_tokens(num_columns: int) -> None:
    input_TK = inputs_with_outliers(num_columns=num_columns)
    statistics = statistics_of(input_TK)
    exact_KK = input_TK.double().T @ input_TK.double()
    assert statistics.num_tokens == 300
    torch.testing.assert_close(statistics.hessian_KK.double(), exact_KK, rtol=1e-5, atol=1e-3 * float(exact_KK.abs().mean()))
    torch.testing.assert_close(statistics.mean_K, input_TK.abs().mean(0))
    assert torch.equal(statistics.amax_K, input_TK.abs().amax(0))


def test_divided_statistics_are_those_of_divided_inputs() -> None:
    input_TK, scale_K = inputs_with_outliers(), torch.linspace(0.1, 8.0, 256)
    ours, direct = statistics_of(input_TK), statistics_of(input_TK / scale_K)
    ours.divide(scale_K)
    for one, other in ((ours.hessian_KK, direct.hessian_KK), (ours.mean_K, direct.mean_K), (ours.amax_K, direct.amax_K)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_linears_with_the_same_input_share_statistics() -> None:
    collector, one_TK, other_TK = Collector(), inputs_with_outliers(), inputs_with_outliers().flip(0)
    for _ in range(2):
        for linear, input_TK in (("q", one_TK), ("k", one_TK), ("o", other_TK), ("v", one_TK), ("gate", one_TK.clone())):
            collector.add(linear, input_TK)
    collector.finish()
    assert collector.of("q") is collector.of("k") is collector.of("v")
    assert len({id(collector.of(linear)) for linear in ("q", "o", "gate")}) == 3
    seen = collector.of("k")
    assert seen is not None
    assert seen.num_tokens == 600
    torch.testing.assert_close(seen.hessian_KK, 2 * one_TK.T @ one_TK, rtol=1e-4, atol=1e-1)
    assert collector.of("up") is None


@pytest.mark.parametrize("preset", ["W4A16", "W8A8"])
def test_a_row_counts_as_often_as_it_stands_for_others(preset: str) -> None:
    """Of q and k only every few rows are looked at, of q fewer: neither is to count for more than it has rows."""
    input_TK, (query_NK, key_NK) = inputs_with_outliers(), weights(24, 16)
    statistics, scheme = statistics_of(input_TK), SCHEMES[preset]
    steps = Steps(127.0, 256) if preset == "W8A8" else None
    some = [Reader(query_NK, statistics, rounding(scheme), steps, stride=4), Reader(key_NK, statistics, rounding(scheme), steps)]
    every = [Reader(query_NK.repeat_interleave(4, 0), statistics, rounding(scheme), steps), some[1]]
    found, expected = (search_scale(readers, statistics, group_size=128) for readers in (some, every))
    torch.testing.assert_close(found.scale_K, expected.scale_K)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_the_scale_is_the_best_of_the_grid_by_the_outputs_themselves(scheme: Scheme) -> None:
    """By the formulas of the paper, in float64, on the inputs and not on their Hessian."""
    input_TK, several = inputs_with_outliers(), weights(48, 16)
    group_size, statistics = scheme.unit(256)[1], statistics_of(input_TK)
    readers = [Reader(weight_NK, statistics, rounding(scheme)) for weight_NK in several]
    found = search_scale(readers, statistics, group_size=group_size)
    x_TK = input_TK.double()
    mean_K = x_TK.abs().mean(0)
    stacked_NK = torch.cat(several).double().abs()
    group_NGk = stacked_NK.unflatten(1, (-1, group_size))
    weight_K = (group_NGk / group_NGk.amax(2, keepdim=True)).flatten(1).mean(0)

    def error_of(scale_K: Tensor) -> float:
        rounded = [rounding(scheme)(weight_NK * scale_K.float()).double() / scale_K for weight_NK in several]
        return sum(float((x_TK @ (r_NK - w_NK.double()).T).square().sum()) for r_NK, w_NK in zip(rounded, several, strict=True))

    ratios = [step / GRID for step in range(GRID)]
    grid = [scale_K for r in ratios for scale_K in (mean_K**r / (weight_K ** (1 - r) + 1e-4), mean_K**r)]
    errors = [error_of(scale_K / (scale_K.max() * scale_K.min()).sqrt()) for scale_K in grid]
    assert found.error_before == pytest.approx(error_of(torch.ones(256, dtype=torch.float64)), rel=1e-3)
    assert found.error_after == pytest.approx(min(*errors, found.error_before), rel=2e-3)
    assert error_of(found.scale_K.double()) == pytest.approx(found.error_after, rel=1e-3)


@pytest.mark.parametrize("preset", ["W4A16", "NVFP4A16"])
def test_a_scale_helps_inputs_with_outliers(preset: str) -> None:
    scheme = SCHEMES[preset]
    statistics = statistics_of(inputs_with_outliers())
    readers = [Reader(weight_NK, statistics, rounding(scheme)) for weight_NK in weights(64)]
    found = search_scale(readers, statistics, group_size=scheme.unit(256)[1])
    assert found.helps
    assert found.error_after < 0.8 * found.error_before


def test_a_scale_that_does_not_help_is_left_at_1() -> None:
    """Weights that are codes already have no error that could become less."""
    scheme = SCHEMES["W4A16"]
    [weight_NK] = weights(8)
    coded_NK = rounding(scheme)(weight_NK)
    statistics = statistics_of(inputs_with_outliers())
    found = search_scale([Reader(coded_NK, statistics, lambda each_NK: each_NK)], statistics, group_size=128)
    assert not found.helps
    assert torch.equal(found.scale_K, torch.ones(256))


@pytest.mark.parametrize("search", ["awq", "smoothquant"])
def test_powers_of_two_on_request(search: str) -> None:
    statistics = statistics_of(inputs_with_outliers())
    readers = [Reader(weight_NK, statistics, rounding(SCHEMES["W4A16"])) for weight_NK in weights(16)]
    if search == "awq":
        found = search_scale(readers, statistics, group_size=128, powers_of_two=True)
    else:
        found = smooth_scale(readers, statistics, strength=0.5, powers_of_two=True)
    assert torch.equal(found.scale_K.frexp().mantissa, torch.full((256,), 0.5))
    assert len(found.scale_K.unique()) > 1


def test_smoothquant_is_the_papers_formula() -> None:
    input_TK, several = inputs_with_outliers(), weights(24, 40)
    statistics = statistics_of(input_TK)
    readers = [Reader(weight_NK, statistics, rounding(SCHEMES["W8A8"])) for weight_NK in several]
    found = smooth_scale(readers, statistics, strength=0.5)
    expected_K = (input_TK.abs().amax(0) / torch.cat(several).abs().amax(0)).sqrt()
    ratio_K = found.scale_K / expected_K
    torch.testing.assert_close(ratio_K, ratio_K[0].expand(256), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("largest_code", "group_size"), [(127.0, 256), (127.0, 64), (7.0, 32)])
def test_inputs_that_are_rounded_too_add_to_the_error(largest_code: float, group_size: int) -> None:
    """As much as rounding them does."""
    input_TK, [weight_NK] = inputs_with_outliers(), weights(48)
    reader = Reader(weight_NK, statistics_of(input_TK), lambda each_NK: each_NK, Steps(largest_code, group_size))
    for strength in (0.0, 0.5):
        found = smooth_scale([reader], reader.statistics, strength=strength)
        given_TGk = (input_TK.double() / found.scale_K).unflatten(1, (-1, group_size))
        step_Gk = given_TGk.abs().amax((0, 2))[:, None] / largest_code
        lost_TK = ((given_TGk / step_Gk).round() * step_Gk - given_TGk).flatten(1)
        expected = float((lost_TK @ (weight_NK.double() * found.scale_K).T).square().sum())
        assert found.error_after == pytest.approx(expected, rel=0.2)
    assert found.error_after < 0.5 * found.error_before


# --- moving a scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_scale_moved_into_a_norm_changes_no_output(offset: float) -> None:
    norm_K = (torch.randn(256, generator=torch.Generator().manual_seed(2)) * 0.3 + 1 - offset).bfloat16()
    norm_K[5] = -offset  # gives nothing
    several, input_TK, scale_K = weights(32, 16), torch.randn(20, 256), torch.rand(256) * 4 + 0.1
    tensors, norms = dict(zip(("q", "k"), several, strict=True)), {"norm": norm_K}
    moved_K = move_scale(Pair("norm", ("q", "k"), is_norm=True), scale_K, tensors, norms, offset=offset)
    assert norms["norm"].dtype == torch.bfloat16
    torch.testing.assert_close(moved_K, scale_K, rtol=0.02, atol=0.02)  # what bfloat16 rounds
    for name, before_NK in zip(("q", "k"), several, strict=True):
        before = (input_TK * (norm_K.float() + offset)) @ before_NK.T
        after = (input_TK * (norms["norm"].float() + offset)) @ tensors[name].T
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_scale_moved_into_the_rows_of_a_linear_changes_no_output() -> None:
    gate_up_NK, down_NK = weights(128)[0], weights(32, num_columns=64)[0]
    input_TK, scale_K = torch.randn(20, 256), torch.rand(64) + 0.2
    tensors = {"m.gate_up_proj.weight": gate_up_NK, "m.down_proj.weight": down_NK}
    [pair] = linear_pairs({name: (weight.shape[0], weight.shape[1]) for name, weight in tensors.items()})
    assert (pair.giver, pair.readers, pair.first_row) == ("m.gate_up_proj.weight", ("m.down_proj.weight",), 64)

    def output() -> Tensor:
        gate_TK, up_TK = (input_TK @ tensors["m.gate_up_proj.weight"].T).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate_TK) * up_TK) @ tensors["m.down_proj.weight"].T

    before = output()
    move_scale(pair, scale_K, tensors, {})
    assert not torch.equal(tensors["m.down_proj.weight"], down_NK)
    assert torch.equal(gate_up_NK, weights(128)[0])  # arguments are not written to
    torch.testing.assert_close(output(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [Pair("g.weight", ("r",)), Pair("g.weight", ("r",), is_norm=True)], ids=["linear", "norm"])
def test_a_bias_of_what_gives_the_input_is_scaled_with_it(pair: Pair) -> None:
    input_TK, scale_K = torch.randn(20, 64), torch.randint(-2, 3, (64,)).float().exp2()
    tensors = {"r": torch.randn(16, 64)} | ({} if pair.is_norm else {"g.weight": torch.randn(64, 64)})
    vectors = {"g.bias": torch.randn(64).bfloat16()} | ({"g.weight": torch.randn(64).bfloat16()} if pair.is_norm else {})

    def output() -> Tensor:
        given = input_TK * vectors["g.weight"] if pair.is_norm else input_TK @ tensors["g.weight"].T
        return (given + vectors["g.bias"]) @ tensors["r"].T

    before = output()
    move_scale(pair, scale_K, tensors, vectors)
    torch.testing.assert_close(output(), before, rtol=1e-4, atol=1e-4)


def test_pairs_of_linears_are_found_by_names_and_shapes() -> None:
    shapes = {
        "l.self_attn.v_proj.weight": (64, 128), "l.self_attn.o_proj.weight": (128, 128),  # heads share values
        "l.mlp.up_proj.weight": (256, 128), "l.mlp.down_proj.weight": (128, 256),
        "l.block.experts.3.w3.weight": (96, 128), "l.block.experts.3.w2.weight": (128, 96),
        "l.block.experts.4.w2.weight": (128, 96),
    }  # fmt: skip
    assert [(pair.giver, pair.readers) for pair in linear_pairs(shapes)] == [
        ("l.mlp.up_proj.weight", ("l.mlp.down_proj.weight",)),
        ("l.block.experts.3.w3.weight", ("l.block.experts.3.w2.weight",)),
    ]
