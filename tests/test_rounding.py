import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamquant.schemes.rounding import (
    divide,
    e2m1_nibble,
    e2m1_value,
    e8m0_exponent,
    e8m0_value,
    floor_power_of_two,
    power_2_4,
    power_of_two_multiple,
    round_to_e2m1,
    round_to_e4m3,
    tree_sum,
)
from tests import oracles


def around(table: oracles.Array) -> Tensor:
    """Every number of a table, every middle between two and beyond the last, their float32 neighbours, and all negatives."""
    last_step = table[-1] - table[-2]
    exact = np.concatenate([table, (table[1:] + table[:-1]) / 2, [table[-1] + last_step / 2, table[-1] + last_step, 1e9, 3e38]])
    exact = exact.astype(np.float32)
    near = [np.nextafter(exact, np.float32(0)), exact, np.nextafter(exact, np.float32(np.inf))]
    every = np.concatenate([*near, [np.float32(1e-45), np.float32(1e-38), np.inf]]).astype(np.float32)
    return torch.from_numpy(np.concatenate([every, -every]))


def floats(count: int, *, low_exponent: int, high_exponent: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator) * torch.exp2(torch.randint(low_exponent, high_exponent, (count,), generator=generator))


@pytest.mark.parametrize("value", [around(oracles.E4M3), floats(100_000, low_exponent=-14, high_exponent=10)], ids=["around", "random"])
def test_e4m3_is_the_nearest_ties_to_even_and_saturates(value: Tensor) -> None:
    before = value.clone()
    assert round_to_e4m3(value).view(torch.uint8).tolist() == oracles.e4m3(value.double().numpy()).tolist()
    assert torch.equal(value, before)


@pytest.mark.parametrize("value", [around(oracles.E2M1), floats(100_000, low_exponent=-6, high_exponent=5)], ids=["around", "random"])
def test_e2m1_is_the_nearest_ties_to_even_and_saturates(value: Tensor) -> None:
    before = value.clone()
    rounded = round_to_e2m1(value)
    nibble = oracles.e2m1(value.double().numpy())
    assert e2m1_nibble(rounded).tolist() == nibble.tolist()
    assert rounded.abs().double().tolist() == oracles.E2M1[nibble & 7].tolist()
    assert torch.equal(value, before)


def test_e2m1_keeps_the_sign_of_what_rounds_to_zero_but_not_of_zero() -> None:
    assert e2m1_nibble(round_to_e2m1(torch.tensor([-1e-45, -0.25, -0.0, 0.0, 0.25]))).tolist() == [8, 8, 0, 0, 0]


def test_every_nibble_has_its_value_and_every_value_its_nibble() -> None:
    nibble = torch.arange(16, dtype=torch.uint8)
    value = e2m1_value(nibble)
    assert value[:8].tolist() == oracles.E2M1.tolist()
    assert (-value[8:]).tolist() == oracles.E2M1.tolist()
    assert value.signbit().tolist() == [False] * 8 + [True] * 8
    assert e2m1_nibble(value).tolist() == nibble.tolist()


@pytest.mark.parametrize("max_exponent", [2, 8])
def test_an_e8m0_exponent_moves_up_at_a_significand_of_seven_quarters(max_exponent: int) -> None:
    significand = torch.tensor([1.0, 1.5, 1.7499999, 1.75, 1.7500001, 1.9999999])
    powers = (2.0 ** torch.arange(-126, 128, dtype=torch.float64)).float()
    subnormal = torch.tensor([0.0, 1e-45, 0.74 * 2.0**-126, 0.75 * 2.0**-126, 2.0**-126 - 1e-45])
    amax = torch.cat([(powers[:, None] * significand).flatten(), subnormal])
    exponent = e8m0_exponent(amax, max_exponent)
    assert exponent.tolist() == oracles.mx_exponent(amax.double().numpy(), torch.float32, max_exponent).tolist()
    ratio = (amax.double() / e8m0_value(exponent).double())[exponent > 0]
    assert ratio.min() == 1.75 * 2 ** (max_exponent - 1)
    assert ratio.max() < 1.75 * 2**max_exponent


def test_an_e8m0_value_is_the_power_of_two() -> None:
    exponent = torch.arange(255, dtype=torch.int32)
    assert e8m0_value(exponent).double().tolist() == np.ldexp(1.0, np.arange(255) - 127).tolist()


def test_a_quotient_is_correctly_rounded() -> None:
    numerator = floats(20_000, low_exponent=-130, high_exponent=100)
    for denominator in (1.5, 3.5, 7.5, 15.0, 31.5, 127.5, 255.0, 448.0, 6.0):
        exact = oracles.round_to(numerator.double().numpy() / denominator, torch.float32)
        assert np.array_equal(divide(numerator, denominator).numpy(), exact)


def test_power_2_4_is_right_to_two_millionths() -> None:
    value = torch.logspace(-9, 24 * np.log10(2), 200_000, dtype=torch.float64).clamp(1e-9, 2**24).float()
    exact = value.double() ** 2.4
    assert ((power_2_4(value).double() - exact).abs() / exact).max() < 2e-6


def test_power_2_4_counts_the_tiny_as_zero_and_ignores_signs() -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-45, 1e-30, 1e-12])
    assert power_2_4(tiny).max() < 1e-21
    assert power_2_4(torch.zeros(3)).tolist() == [0.0] * 3
    value = floats(1000, low_exponent=-20, high_exponent=20)
    assert torch.equal(power_2_4(value), power_2_4(value.abs()))


@given(start=st.integers(0, 70), count=st.integers(1, 70))
def test_power_2_4_does_not_depend_on_the_place_in_a_vector(start: int, count: int) -> None:
    value = floats(140, low_exponent=-20, high_exponent=20)
    assert torch.equal(power_2_4(value)[start : start + count], power_2_4(value[start : start + count].clone()))
    assert torch.equal(power_2_4(value)[::3], power_2_4(value[::3]))


def add_halves(values: list[np.float32]) -> np.float32:
    """The documented order of additions: halves onto each other, an odd one at the end waits."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return add_halves([a + b for a, b in zip(values[:half], values[half : 2 * half], strict=True)] + values[2 * half :])


@given(count=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_tree_sum_adds_halves(count: int, seed: int) -> None:
    value = torch.randn((3, count), generator=torch.Generator().manual_seed(seed))
    assert tree_sum(value).tolist() == [add_halves(list(row.numpy())) for row in value]
    assert torch.equal(tree_sum(value)[1:], tree_sum(value[1:].clone()))
    assert (tree_sum(value).double() - value.double().sum(1)).abs().max() < 1e-6 * count


@pytest.mark.parametrize("factor", [448.0, 6.0, 1.0])
def test_the_smallest_power_of_two_times_a_factor_that_is_not_below(factor: float) -> None:
    exact = (factor * torch.exp2(torch.arange(-100.0, 100.0))).float()
    near = [exact, exact.nextafter(torch.zeros(())), exact.nextafter(torch.full((), torch.inf))]
    value = torch.cat([*near, floats(20_000, low_exponent=-90, high_exponent=90).abs()])
    expected = factor * 2.0 ** np.ceil(np.log2(value.double().numpy() / factor) - 1e-12)
    assert power_of_two_multiple(value, factor).double().tolist() == expected.tolist()
    kept = torch.tensor([0.0, torch.finfo(torch.float32).max])
    assert torch.equal(power_of_two_multiple(kept, 448.0), kept)


def test_the_power_of_two_below() -> None:
    value = floats(20_000, low_exponent=-90, high_exponent=90).abs().clamp(min=1e-30)
    assert floor_power_of_two(value).double().tolist() == (2.0 ** np.floor(np.log2(value.double().numpy()))).tolist()
