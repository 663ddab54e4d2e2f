import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamquant.calibrate.gptq import MEASURED_ROWS, GptqOptions, Solution, gptq, hessian_error, round_to_nearest
from streamquant.errors import RequestError
from streamquant.kernels import find_kernels
from streamquant.schemes import SCHEMES, Scheme, find_scheme
from streamquant.schemes.kernels import Kernels
from streamquant.schemes.units import dequantize
from tests import oracles

PEER_PYTHON = os.environ.get("PEER_PYTHON")

SETTINGS: list[dict[str, Any]] = [
    {"preset": "W4A16", "group_size": 32},
    {"preset": "W4A16_ASYM", "group_size": 32},
    {"preset": "W3A16", "strategy": "channel", "symmetric": False},
    {"preset": "W2A16", "group_size": 64},
    {"preset": "W8A8"},
    {"preset": "FP8_DYNAMIC"},
    {"preset": "FP8A16", "strategy": "tensor"},
    {"preset": "FP8_BLOCK"},
    {"preset": "NVFP4A16"},
    {"preset": "MXFP4A16"},
    {"preset": "MXFP8A16"},
]
CASES = {" ".join(map(str, setting.values())): find_scheme(**setting) for setting in SETTINGS}
KERNELS = {name: find_kernels(name, torch.device("cpu")) for name in ("torch", "numba")}
SHAPE = (130, 192)  # blocks of 128 by 128 have an edge on both sides
TIES = 0.002  # of codes: float32 against float64, a rare tie may fall the other way

each_scheme = pytest.mark.parametrize("scheme", CASES.values(), ids=CASES.keys())
each_kernels = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())


def layer(shape: tuple[int, int] = SHAPE, *, num_tokens: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight in bfloat16, and the Hessian of inputs that are correlated and some larger than others."""
    generator = torch.Generator().manual_seed(seed)
    num_columns = shape[1]
    mixing_KK = torch.eye(num_columns) + 0.1 * torch.randn(num_columns, num_columns, generator=generator)
    size_K = torch.randn(num_columns, generator=generator).exp()
    input_TK = torch.randn(num_tokens, num_columns, generator=generator) @ mixing_KK * size_K
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16(), input_TK.T @ input_TK


def solve(weight: Tensor, hessian_KK: Tensor, scheme: Scheme, **arguments: Any) -> Solution:
    return gptq(weight.float(), hessian_KK, scheme, dtype=weight.dtype, **arguments)


def decoded(solution: Solution, scheme: Scheme) -> Tensor:
    code_NK, scales = solution.code_NK, solution.scales
    return dequantize(code_NK, scales.scale_RC, unit=scheme.unit(code_NK.shape[1]), zero_RC=scales.zero_RC)


def exact_error(solution: Solution, scheme: Scheme, weight: Tensor, hessian_KK: Tensor) -> float:
    return oracles.hessian_error((decoded(solution, scheme).double() - weight.double()).numpy(), hessian_KK.double().numpy())


def differing(ours_NK: Tensor, theirs_NK: Tensor) -> float:
    return (ours_NK != theirs_NK).float().mean().item()


# --- the codes ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> Callable[..., tuple[Tensor, float]]:
    """Codes of the oracle and their error, for layer()."""
    known: dict[tuple[str, bool], tuple[Tensor, float]] = {}

    def answer(scheme: Scheme, *, activation_order: bool) -> tuple[Tensor, float]:
        key = scheme.preset + str(scheme.weights_config), activation_order
        if key not in known:
            weight, hessian_KK = layer()
            hessian = hessian_KK.double().numpy()
            code, value = oracles.gptq(weight, hessian, scheme.format, scheme.weights_config, activation_order=activation_order)
            known[key] = torch.from_numpy(code).float(), oracles.hessian_error(value - weight.double().numpy(), hessian)
        return known[key]

    return answer


@each_kernels
@each_scheme
@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("block_size", [1, 7, 32, 96, 128])
def test_codes_are_those_of_the_oracle(
    scheme: Scheme, block_size: int, activation_order: bool, kernels: Kernels, oracle: Callable[..., tuple[Tensor, float]]
) -> None:
    weight, hessian_KK = layer()
    options = GptqOptions(block_size=block_size, activation_order=activation_order)
    solution = solve(weight, hessian_KK, scheme, options=options, kernels=kernels)
    code_NK, error = oracle(scheme, activation_order=activation_order)
    assert differing(solution.code_NK, code_NK) < TIES
    assert solution.error_after == pytest.approx(error, rel=1e-3)
    assert (solution.damping, solution.fallback) == (0.01, "")


PEER_SCRIPT = """
import sys
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file
import torch
given = {name: tensor[None] for name, tensor in load_file(sys.argv[1]).items()}
args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True, actorder="static")
zero = torch.zeros_like(given["scale"], dtype=torch.int8)
value, _, failed = quantize_weight(given["weight"], given["hessian"], given["scale"], zero, None, args)
save_file({"value": value[0].contiguous(), "failed": failed}, sys.argv[2])
"""


@pytest.mark.peer
@pytest.mark.skipif(PEER_PYTHON is None, reason="PEER_PYTHON is not set")
def test_codes_are_those_of_llm_compressor(tmp_path: Path) -> None:
    weight, hessian_KK = layer((256, 512), num_tokens=2000)
    scheme = SCHEMES["W4A16"]
    solutions = [solve(weight, hessian_KK, scheme, kernels=kernels) for kernels in KERNELS.values()]
    # It is given the Hessian as it keeps it: of inputs times the root of 2, divided by the number of samples.
    given = {"weight": weight.float(), "hessian": hessian_KK * 2 / 16, "scale": solutions[0].scales.scale_RC}
    save_file(given, tmp_path / "given")
    subprocess.run([str(PEER_PYTHON), "-c", PEER_SCRIPT, tmp_path / "given", tmp_path / "answer"], check=True)
    answer = load_file(tmp_path / "answer")
    assert not answer["failed"].any()
    for solution in solutions:
        assert differing(decoded(solution, scheme), answer["value"]) < TIES


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_what_is_stored_decodes_to_what_was_solved(scheme: Scheme) -> None:
    for shape, dtype in [((130, 256), torch.bfloat16), ((8, 128), torch.float16), ((1, 256), torch.float32)]:
        weight, hessian_KK = layer(shape)
        weight = weight.to(dtype)
        for solution in (solve(weight, hessian_KK, scheme), round_to_nearest(weight.float(), scheme, dtype=dtype)):
            shared = None
            if scheme.shares_amax:
                shared = scheme.share(scheme.observe(weight).amax().view(1), dtype)
            stored = scheme.pack(scheme.codes.round(solution.code_NK.clone()), solution.scales) | scheme.once(shape, dtype, shared)
            assert torch.equal(scheme.decode(stored, shape[1]), decoded(solution, scheme))
            assert {name: tensor.shape for name, tensor in stored.items()} == {
                name: tensor.shape for name, tensor in scheme.encode_whole(weight).items()
            }


@each_kernels
@each_scheme
def test_plain_rounding_is_that_of_the_scheme(scheme: Scheme, kernels: Kernels) -> None:
    weight, hessian_KK = layer()
    solution = round_to_nearest(weight.float(), scheme, hessian_KK=hessian_KK, kernels=kernels, dtype=weight.dtype)
    assert torch.equal(decoded(solution, scheme), scheme.decode(scheme.encode_whole(weight), SHAPE[1]))
    assert solution.error_after == solution.error_before == pytest.approx(exact_error(solution, scheme, weight, hessian_KK), rel=1e-4)


def test_scales_are_those_the_observer_finds_for_the_checkpoint() -> None:
    weight, hessian_KK = layer()
    scheme = find_scheme("W4A16", group_size=32, observer="mse")
    solution = solve(weight, hessian_KK, scheme)
    assert torch.equal(solution.scales.stored_RC, scheme.encode_whole(weight)["weight_scale"])
    assert solution.error_after < solve(weight, hessian_KK, CASES["W4A16 32"]).error_after


def test_fused_weights_share_their_scale() -> None:
    weight, hessian_KK = layer()
    scheme = SCHEMES["NVFP4A16"]
    shared = scheme.share(torch.tensor([37.0]), weight.dtype)
    solution = solve(weight, hessian_KK, scheme, shared=shared)
    assert torch.equal(solution.scales.stored_RC, scheme.encode(weight, shared=shared)["weight_scale"])


# --- the errors -----------------------------------------------------------------------------------------------------------------


@each_kernels
@each_scheme
def test_the_error_falls_and_is_told_as_it_is(scheme: Scheme, kernels: Kernels) -> None:
    weight, hessian_KK = layer()
    solution = solve(weight, hessian_KK, scheme, kernels=kernels)
    plain = round_to_nearest(weight.float(), scheme, dtype=weight.dtype)
    assert solution.error_before == pytest.approx(exact_error(plain, scheme, weight, hessian_KK), rel=1e-4)
    assert solution.error_after == pytest.approx(exact_error(solution, scheme, weight, hessian_KK), rel=1e-4)
    assert solution.error_after < 0.7 * solution.error_before


def test_errors_of_many_rows_are_measured_on_some() -> None:
    weight, hessian_KK = layer((3 * MEASURED_ROWS + 1, 64))
    scheme = find_scheme("W4A16", group_size=32)
    solution = solve(weight, hessian_KK, scheme)
    plain = round_to_nearest(weight.float(), scheme, dtype=weight.dtype)
    assert solution.error_before == pytest.approx(exact_error(plain, scheme, weight, hessian_KK), rel=0.1)
    assert solution.error_after == pytest.approx(exact_error(solution, scheme, weight, hessian_KK), rel=0.1)


def test_the_error_of_a_row_needs_no_upper_half_of_the_hessian() -> None:
    weight, hessian_KK = layer((5, 600))
    expected = torch.einsum("nk,kl,nl->n", weight.double(), hessian_KK.double(), weight.double())
    assert torch.allclose(hessian_error(weight.float(), hessian_KK), expected, rtol=1e-4)
    assert torch.allclose(hessian_error(weight.float(), hessian_KK.double() * 1e60), expected * 1e60, rtol=1e-4)


def test_without_correlations_plain_rounding_is_kept() -> None:
    weight, _ = layer()
    scheme = CASES["W4A16 32"]
    solution = solve(weight, torch.eye(SHAPE[1]) * 3, scheme)
    assert torch.equal(decoded(solution, scheme), scheme.decode(scheme.encode_whole(weight), SHAPE[1]))
    assert solution.error_after == pytest.approx(solution.error_before)


# --- what does not matter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20, 1 / 3, 1e-20, 1e25])
def test_the_size_of_the_hessian_does_not_matter(factor: float) -> None:
    weight, hessian_KK = layer()
    scheme = CASES["W4A16 32"]
    one, other = solve(weight, hessian_KK, scheme), solve(weight, hessian_KK * factor, scheme)
    assert differing(one.code_NK, other.code_NK) < TIES
    assert other.error_before == pytest.approx(one.error_before * factor, rel=1e-4)
    assert other.error_after == pytest.approx(one.error_after * factor, rel=1e-3)


def test_the_dtype_of_the_hessian_does_not_matter() -> None:
    weight, hessian_KK = layer()
    scheme = CASES["NVFP4A16"]
    assert differing(solve(weight, hessian_KK, scheme).code_NK, solve(weight, hessian_KK.double(), scheme).code_NK) < TIES


@each_kernels
@each_scheme
def test_rows_do_not_depend_on_each_other(scheme: Scheme, kernels: Kernels) -> None:
    weight, hessian_KK = layer((384, 192))
    shared = None
    if scheme.shares_amax:
        shared = scheme.share(weight.abs().max().float().view(1), weight.dtype)
    stacked = solve(weight, hessian_KK, scheme, shared=shared, kernels=kernels)
    alone = [solve(part, hessian_KK, scheme, shared=shared, kernels=kernels).code_NK for part in weight.split([128, 256])]
    assert torch.equal(stacked.code_NK, torch.cat(alone))


@each_kernels
@pytest.mark.parametrize("num_rows", [1, 300])
def test_arguments_are_not_written_to(kernels: Kernels, num_rows: int) -> None:
    weight, hessian_KK = layer((num_rows, 192))
    weight_NK = weight.float()
    before_NK, before_KK = weight_NK.clone(), hessian_KK.clone()
    hessian_KK[0] = before_KK[0] = before_KK[:, 0] = hessian_KK[:, 0] = 0.0
    gptq(weight_NK, hessian_KK, CASES["W8A8"], kernels=kernels)
    assert torch.equal(weight_NK, before_NK)
    assert torch.equal(hessian_KK, before_KK)


# --- Hessians that give trouble -------------------------------------------------------------------------------------------------


@each_kernels
@pytest.mark.parametrize("preset", ["W4A16 32", "W4A16_ASYM 32", "FP8_BLOCK"])
def test_columns_that_no_input_reaches_count_as_zero(preset: str, kernels: Kernels) -> None:
    weight, hessian_KK = layer()
    dead = [0, 5, 100, 191]
    hessian_KK[dead] = 0.0
    hessian_KK[:, dead] = 0.0
    scheme = CASES[preset]
    solution = solve(weight, hessian_KK, scheme, kernels=kernels)
    code, _ = oracles.gptq(weight, hessian_KK.double().numpy(), scheme.format, scheme.weights_config)
    assert differing(solution.code_NK, torch.from_numpy(code).float()) < TIES
    assert (decoded(solution, scheme)[:, dead] == 0).all()
    assert solution.error_after < 0.7 * solution.error_before


@each_kernels
@pytest.mark.parametrize("num_tokens", [1, 20, 150])
def test_there_may_be_fewer_tokens_than_columns(num_tokens: int, kernels: Kernels) -> None:
    weight, hessian_KK = layer(num_tokens=num_tokens)
    scheme = CASES["W4A16 32"]
    solution = solve(weight, hessian_KK, scheme, kernels=kernels)
    code, value = oracles.gptq(weight, hessian_KK.double().numpy(), scheme.format, scheme.weights_config)
    error = oracles.hessian_error(value - weight.double().numpy(), hessian_KK.double().numpy())
    assert differing(solution.code_NK, torch.from_numpy(code).float()) < TIES
    assert solution.error_after == pytest.approx(error, rel=1e-2)  # small beside what the damping adds to it
    assert solution.error_after < 0.5 * solution.error_before


def test_what_float32_cannot_factor_is_factored_in_float64() -> None:
    weight, _ = layer()
    input_TK = 1.0 + 1e-3 * torch.randn(1000, SHAPE[1], generator=torch.Generator().manual_seed(0)).double()
    hessian_KK = input_TK.T @ input_TK
    damped_KK = hessian_KK / hessian_KK.diagonal().mean() + 1e-7 * torch.eye(SHAPE[1])
    assert torch.linalg.cholesky_ex(damped_KK.float()).info > 0
    solution = solve(weight, hessian_KK, CASES["W8A8"], options=GptqOptions(damping=1e-7))
    assert (solution.damping, solution.fallback) == (1e-7, "")
    assert solution.error_after < 0.1 * solution.error_before
    assert solution.error_after == pytest.approx(exact_error(solution, CASES["W8A8"], weight, hessian_KK), rel=1e-2)


@pytest.mark.parametrize(("lowest", "damping"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_rises_until_the_hessian_is_positive_definite(lowest: float, damping: float) -> None:
    weight, _ = layer()
    input_TK = torch.randn(1000, SHAPE[1], generator=torch.Generator().manual_seed(0))
    hessian_KK = input_TK.T @ input_TK
    least, direction_K = (each[..., 0] for each in torch.linalg.eigh(hessian_KK))
    hessian_KK += (lowest * hessian_KK.diagonal().mean() - least) * direction_K[:, None] * direction_K
    solution = solve(weight, hessian_KK, CASES["W4A16 32"])
    assert solution.damping == pytest.approx(damping)
    assert solution.fallback == ""


def spoiled(value: float) -> Tensor:
    _, hessian_KK = layer()
    hessian_KK[3, 7] = hessian_KK[7, 3] = value
    return hessian_KK


USELESS = {
    "the Hessian is not finite": [spoiled(float("nan")), spoiled(float("inf"))],
    "the Hessian is zero": [torch.zeros(SHAPE[1], SHAPE[1])],
    "the Hessian has negative numbers on its diagonal": [-torch.eye(SHAPE[1])],
    "the Hessian is not positive definite, damped by 1.0 or less": [spoiled(1e9)],
}


@pytest.mark.parametrize(("reason", "hessian_KK"), [(reason, each) for reason, some in USELESS.items() for each in some])
def test_weights_are_rounded_plainly_where_the_hessian_is_of_no_use(reason: str, hessian_KK: Tensor) -> None:
    weight, _ = layer()
    scheme = CASES["W4A16_ASYM 32"]
    solution = solve(weight, hessian_KK, scheme)
    assert (solution.fallback, solution.damping) == (reason, 0.0)
    assert torch.equal(decoded(solution, scheme), scheme.decode(scheme.encode_whole(weight), SHAPE[1]))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 1.5}, {"damping": float("nan")}, {"block_size": 0}], ids=str)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        GptqOptions(**options)
