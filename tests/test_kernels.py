"""Kernels for particular hardware give the bits of the reference, which test_schemes.py and test_observers.py compare with the oracles."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

import streamquant
from streamquant.errors import RequestError
from streamquant.kernels import find_kernels, search
from streamquant.schemes import Scheme, find_scheme
from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.packing import flat
from streamquant.schemes.units import Scales
from tests import oracles
from tests.checkpoints import file_bytes
from tests.test_observers import SEARCHES
from tests.test_schemes import CASES, each_dtype, shapes_of

CPU = torch.device("cpu")
COMPILED = find_kernels("numba", CPU)
KINDS_OF_CODES = [E4m3(), E2m1(), ByteIntegers(8), ByteIntegers(4), *(PackedIntegers(num_bits) for num_bits in range(2, 9))]


def bits(tensor: Tensor) -> Tensor:
    return flat(tensor).view(torch.uint8)


def assert_same(ours: Tensor, reference: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (reference.dtype, reference.shape)
    assert torch.equal(bits(ours), bits(reference))


def stored(scheme: Scheme, weight_NK: Tensor, kernels: Kernels) -> dict[str, Tensor]:
    bounds_BRC = scheme.observe(weight_NK, kernels=kernels)
    shared = scheme.share(bounds_BRC.abs().amax().view(1), weight_NK.dtype) if scheme.shares_amax else None
    return {"bounds": bounds_BRC} | scheme.encode(weight_NK, bounds_BRC, shared=shared, kernels=kernels)


@each_dtype
@pytest.mark.parametrize("scheme", [*CASES.values(), *SEARCHES.values()], ids=[*CASES, *SEARCHES])
def test_compiled_kernels_give_the_bits_of_the_reference(scheme: Scheme, dtype: torch.dtype) -> None:
    for shape in shapes_of(scheme):
        for weight_NK in oracles.weights_to_try(shape, dtype).values():
            reference = stored(scheme, weight_NK, TORCH)
            ours = stored(scheme, weight_NK, COMPILED)
            assert torch.equal(ours.pop("bounds"), reference.pop("bounds"))  # a zero may have either sign
            assert ours.keys() == reference.keys()
            for suffix, tensor in ours.items():
                assert_same(tensor, reference[suffix])


def numbers_of_every_size() -> Tensor:
    """All of bfloat16, numbers of float32 of every size, and the neighbours of those halfway between two codes."""
    every_bfloat16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    halves = torch.arange(-1024, 1025) / 4.0 * torch.tensor([2.0**power for power in range(-12, 2)])[:, None]
    ties = torch.stack([halves, halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))]).flatten()
    numbers = torch.cat([every_bfloat16, any_bits.to(torch.int32).view(torch.float32), ties])
    numbers = numbers[numbers.isfinite()]
    return numbers[: len(numbers) // 320 * 320].view(-1, 320)


@pytest.mark.parametrize("codes", KINDS_OF_CODES, ids=str)
def test_every_number_is_rounded_as_in_the_reference(codes: Codes) -> None:
    weight_NK = numbers_of_every_size()
    scales = Scales(torch.ones(1), torch.ones(len(weight_NK), 1))
    unit = (1, weight_NK.shape[1])
    assert_same(COMPILED.codes(codes, weight_NK, unit, scales), TORCH.codes(codes, weight_NK, unit, scales))
    small_NK = weight_NK.clamp(-1e6, 1e6)  # power_2_4 is for distances below 2**24
    assert_same(*(kernels.errors(codes, small_NK, unit, scales.scale_RC[None], None) for kernels in (COMPILED, TORCH)))


def test_the_rough_power_is_as_near_as_the_bound_supposes() -> None:
    """Every number of five binades, over which the guess repeats, and some of every size."""
    of_squares = np.arange(1 << 23, 6 << 23, dtype=np.uint32) + np.uint32(60 << 23)
    value = np.sqrt(of_squares.view(np.float32))
    more = np.float32(2.0) ** np.arange(-28, 24, dtype=np.float32)[:, None] * np.linspace(1, 2, 999, dtype=np.float32)
    for values in (value, more.ravel()):
        rough, exact = np.empty_like(values), values.astype(np.float64) ** 2.4
        rough_powers(values, rough)
        assert (np.abs(rough - exact) <= search.POWER_ERROR * exact + 1e-20).all()


@numba.njit
def rough_powers(values, powers):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        powers[i] = search.rough_power_2_4(values[i])


NEIGHBOURS = [0.0, *(sign * 2.0**-power for power in range(2, 24) for sign in (1, -1))]
SETS_OF_SCALES = {
    "neighbours": [1 + each for each in NEIGHBOURS],
    "equal": [1.0] * 5,
    "some equal": [1.0, 1.0, 0.9, 0.9, 0.8, 1.0, 0.9],
    "one": [1.0],
    "no numbers": [float("nan"), 1.0, 0.9],
    "zero": [1.0, 0.0, 0.9],
    "too small": [1.0, 1e-45, 0.9],
    "too large": [1.0, float("inf"), 3e38, 0.9],
    "all too large": [float("inf"), 3e38],
    "shrinking": [1 - i / 200 for i in range(112)],
}
UNITS = {"group": (1, 16), "channel": (1, 384), "block": (128, 128)}


@pytest.mark.parametrize("scales_of", SETS_OF_SCALES.values(), ids=SETS_OF_SCALES.keys())
@pytest.mark.parametrize("codes", [E4m3(), E2m1(), ByteIntegers(8), PackedIntegers(4)], ids=str)
@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS.keys())
def test_the_best_candidate_is_that_of_the_full_grid(unit: tuple[int, int], codes: Codes, scales_of: list[float]) -> None:
    weights = oracles.weights_to_try((130, 384), torch.float32)
    weights["codes"] = codes.value(codes.round(torch.randn(130, 384, generator=torch.Generator().manual_seed(2)) * 4))
    weights["nearly codes"] = weights["codes"] * (1 + 2.0**-20)
    for with_zero in (False, True) if isinstance(codes, PackedIntegers) else (False,):
        for name, weight_NK in weights.items():
            amax_RC = TORCH.extremes(weight_NK, unit, symmetric=True)[0]
            largest_RC = amax_RC.clamp(1e-30, 1e30)
            base_RC = torch.ones_like(largest_RC) if "codes" in name else largest_RC / (4 if isinstance(codes, E2m1) else 7)
            scale_QRC = torch.stack([base_RC * scale for scale in scales_of])
            zero_QRC = torch.stack([torch.full_like(base_RC, float(i % 3)) for i in range(len(scales_of))]) if with_zero else None
            ours, reference = (kernels.best(codes, weight_NK, unit, scale_QRC, zero_QRC, amax_RC=amax_RC) for kernels in (COMPILED, TORCH))
            assert torch.equal(ours, reference), name


@pytest.mark.parametrize("num_columns", [1, 6, 37])
def test_rows_that_are_no_whole_words_are_searched_as_others(num_columns: int) -> None:
    """Two numbers of bfloat16 are read at a time."""
    weight_NK = torch.randn(70, num_columns, generator=torch.Generator().manual_seed(4)).bfloat16()
    for preset in ("W8A8", "FP8_DYNAMIC"):
        scheme = find_scheme(preset, observer="mse")
        assert torch.equal(scheme.observe(weight_NK, kernels=COMPILED), scheme.observe(weight_NK, kernels=TORCH))


@pytest.mark.parametrize(("num_columns", "largest", "most"), [(128, 7, 20), (2048, 127, 7)])
def test_most_candidates_are_ruled_out(num_columns: int, largest: int, most: int) -> None:
    """Or the search would be right, and slow. `most`: of which even a rough sum is needed; the rest cut off too much."""
    weight_NK = torch.randn(64, 2048, generator=torch.Generator().manual_seed(3))
    amax_U = weight_NK.view(-1, num_columns).abs().amax(1).numpy()
    scale_QU = np.stack([amax_U / largest * np.float32(1 - i / 100) for i in range(20)])
    zero_QU, limits = np.zeros_like(scale_QU), (np.float32(-largest - 1), np.float32(largest))
    words = weight_NK.view(torch.uint32).numpy().reshape(-1)
    weight = search.Weight(words, 1, 64, 2048, 1, num_columns, 2048 // num_columns)
    unit_U, last_U, count_U = np.arange(len(amax_U)), np.empty(len(amax_U), np.int32), np.empty(len(amax_U), np.int32)
    tiles = np.empty((len(amax_U) * num_columns // 128 // search.LANES, 128, search.LANES), np.float32)
    search._candidates_left(search.INTEGER, weight, unit_U, amax_U, scale_QU, zero_QU, *limits, tiles, last_U, count_U)
    assert count_U.min() == 1
    assert count_U.mean() < 1.3

    tried = np.ones(scale_QU.shape, np.int32)
    codes = PackedIntegers(4) if largest == 7 else ByteIntegers(8)
    first_RC = TORCH.errors(codes, weight_NK, (1, num_columns), torch.from_numpy(scale_QU[0]).view(1, 64, -1), None)[0]
    factor_QU, is_clear_U = (scale_QU / scale_QU[0]) ** np.float32(2.4), np.ones(len(amax_U), np.int32)
    bound_U = first_RC.flatten().numpy()
    search._rule_out_by_amax(search.INTEGER, amax_U, scale_QU, zero_QU, factor_QU, *limits, bound_U, is_clear_U, tried)
    assert tried.sum(0).max() <= most


@each_dtype
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_extremes_are_not_finite_where_a_weight_is_not(dtype: torch.dtype, symmetric: bool, number: float) -> None:
    for sign in (1, -1):  # of NaN, too
        weight_NK = torch.zeros((4, 64), dtype=dtype)
        weight_NK[1, 40] = torch.tensor(number).copysign(torch.tensor(float(sign))) if number != number else number
        bounds_BRC = COMPILED.extremes(weight_NK, (1, 32), symmetric=symmetric)
        finite_RC = bounds_BRC.isfinite().all(0)
        assert not finite_RC[1, 1]
        assert finite_RC.sum() == 7


def test_scales_that_are_not_of_the_units_are_an_error_and_no_memory_is_read() -> None:
    with pytest.raises(RuntimeError, match="expanded size"):
        COMPILED.codes(E4m3(), torch.ones(8, 64), (1, 32), Scales(torch.ones(1), torch.ones(4, 2)))


@pytest.mark.parametrize("wish", [{"scheme": "W4A16_ASYM"}, {"scheme": "NVFP4A16"}, {"scheme": "FP8_BLOCK", "observer": "mse"}], ids=str)
def test_kernels_change_no_byte_of_an_output(tmp_path: Path, wish: dict[str, str]) -> None:
    source = Path(__file__).parent.parent / "examples" / "wiki-llama"
    reports = [streamquant.convert(source, tmp_path / kernels, kernels=kernels, **wish) for kernels in ("torch", "numba")]
    assert [report.to_json()["kernels"] for report in reports] == ["torch", "numba"]
    assert file_bytes(tmp_path / "torch") == file_bytes(tmp_path / "numba")


def test_what_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert find_kernels("auto", CPU).name == "numba"
    assert find_kernels("torch", CPU) is TORCH
    assert find_kernels("auto", torch.device("meta")) is TORCH

    def no_numba(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr("streamquant.kernels.find_spec", no_numba)
    with caplog.at_level("INFO", logger="streamquant"):
        assert find_kernels("auto", CPU) is TORCH
    assert "pip install 'streamquant[fast]'" in caplog.text
    with pytest.raises(RequestError, match=r"pip install 'streamquant\[fast\]'"):
        find_kernels("numba", CPU)


def test_kernels_are_compiled_each_time_where_they_cannot_be_kept(tmp_path: Path) -> None:
    code = "import torch; from streamquant.kernels import find_kernels; k = find_kernels('numba', torch.device('cpu'));"
    code += "print(k.extremes(torch.ones(2, 64), (1, 32), symmetric=True).sum().item())"
    nowhere = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": ""}
    run = subprocess.run([sys.executable, "-c", code], env=nowhere, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("4.0\n", "")


@pytest.mark.parametrize(
    ("name", "device", "said"), [("cuda", "cpu", "known are auto, torch"), ("numba", "cuda", "for the CPU"), ("triton", "cpu", "for GPUs")]
)
def test_kernels_that_are_not_there_are_refused(name: str, device: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        find_kernels(name, torch.device(device))
