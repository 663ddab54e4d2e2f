"""Kernels for GPUs give the bits of the reference: run by Triton's interpreter, and compiled as far as can be without a GPU."""

import importlib.util
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from streamquant.errors import RequestError
from streamquant.kernels import find_kernels
from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers
from streamquant.schemes.kernels import TORCH
from streamquant.schemes.scheme import round_scale
from streamquant.schemes.units import Scales
from tests import oracles
from tests.test_kernels import assert_same, numbers_of_every_size, stored
from tests.test_observers import SEARCHES
from tests.test_schemes import each_dtype

triton = pytest.importorskip("triton", reason="kernels for GPUs are tried where triton is installed")
CPU = torch.device("cpu")
GPU_ARCHITECTURES = (80, 90, 120)
KINDS_OF_CODES = [E4m3(), E2m1(), ByteIntegers(8), *(PackedIntegers(num_bits) for num_bits in (3, 4, 8))]
INTERPRETED_TILE = 1 << 14  # elements that the interpreter works on at a time


def load(*, interpreted: bool) -> ModuleType:
    """The module of the kernels. Triton decides when it sees a kernel whether it will be interpreted."""
    spec = importlib.util.find_spec("streamquant.kernels.fused")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> Any:
    module = load(interpreted=True)
    vars(module).update(TILE=INTERPRETED_TILE, MAX_ELEMENTS=INTERPRETED_TILE)
    return module.TritonKernels()


def weights_of_all_kinds(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows of many distributions, all finite, each of them in a unit of its own."""
    return torch.cat(list(oracles.weights_to_try(shape, dtype).values()))


def scales_to_try(codes: Codes, weight_NK: Tensor, unit: tuple[int, int]) -> list[Scales]:
    """Scales under which codes use their range, or saturate, or use half of it."""
    amax_RC = TORCH.extremes(weight_NK, unit, symmetric=True)[0]
    zero_RC = torch.randint(-8, 8, amax_RC.shape).float() if isinstance(codes, PackedIntegers) else None
    largest = {E4m3(): 448.0, E2m1(): 6.0}.get(codes) or getattr(codes, "largest", 1.0) + 0.5
    scales_RC = [amax_RC / largest * factor for factor in (1.0, 0.83, 1.8)]
    return [Scales(scale_RC, round_scale(scale_RC, weight_NK.dtype).float(), zero_RC) for scale_RC in scales_RC]


def errors(kernels: Any, codes: Codes, weight_NK: Tensor, unit: tuple[int, int], candidates: list[Scales]) -> Tensor:
    zeros = [scales.zero_RC for scales in candidates if scales.zero_RC is not None]
    scale_QRC = torch.stack([scales.scale_RC for scales in candidates])
    errors_QRC: Tensor = kernels.errors(codes, weight_NK, unit, scale_QRC, torch.stack(zeros) if zeros else None)
    return errors_QRC


@each_dtype
@pytest.mark.parametrize("unit", [(1, 16), (1, 96), (1, 128), (1, 480), (1, 8), (128, 128)], ids=str)
@pytest.mark.parametrize("codes", KINDS_OF_CODES, ids=str)
def test_they_give_the_bits_of_the_reference(codes: Codes, unit: tuple[int, int], dtype: torch.dtype, interpreted: Any) -> None:
    weight_NK = weights_of_all_kinds((9 if unit[0] > 1 else 1, unit[1] if unit[1] > 200 else 2 * unit[1]), dtype)
    candidates = scales_to_try(codes, weight_NK, unit)
    assert_same(interpreted.codes(codes, weight_NK, unit, candidates[0]), TORCH.codes(codes, weight_NK, unit, candidates[0]))
    assert_same(*(errors(kernels, codes, weight_NK, unit, candidates) for kernels in (interpreted, TORCH)))


@pytest.mark.parametrize("name", ["W4A16_ASYM mse", "FP8_BLOCK mse", "NVFP4A16 mse", "FP8_DYNAMIC mse"])
def test_schemes_store_the_same_with_them(name: str, interpreted: Any) -> None:
    weight_NK = weights_of_all_kinds((8, 256), torch.bfloat16)
    reference, ours = (stored(SEARCHES[name], weight_NK, kernels) for kernels in (TORCH, interpreted))
    assert ours.keys() == reference.keys()
    for suffix, tensor in ours.items():
        assert_same(tensor, reference[suffix])


def test_lines_that_are_no_multiple_of_16_are_left_to_the_reference(interpreted: Any) -> None:
    weight_NK = weights_of_all_kinds((1, 37), torch.float16)
    for codes in KINDS_OF_CODES[2:]:
        for unit in ((1, 37), (1, 32)):
            candidates = scales_to_try(codes, weight_NK, unit)
            assert_same(interpreted.codes(codes, weight_NK, unit, candidates[0]), TORCH.codes(codes, weight_NK, unit, candidates[0]))
            assert_same(*(errors(kernels, codes, weight_NK, unit, candidates) for kernels in (interpreted, TORCH)))


@pytest.mark.parametrize("codes", KINDS_OF_CODES, ids=str)
def test_every_number_is_rounded_as_in_the_reference(codes: Codes, interpreted: Any) -> None:
    weight_NK = numbers_of_every_size().flatten()[: 1 << 18].view(32, -1)
    unit = (1, weight_NK.shape[1])
    scales = Scales(torch.ones(1), torch.ones(len(weight_NK), 1))
    assert_same(interpreted.codes(codes, weight_NK, unit, scales), TORCH.codes(codes, weight_NK, unit, scales))
    small_NK = weight_NK.clamp(-1e6, 1e6)  # power_2_4 is for distances below 2**24
    assert_same(*(errors(kernels, codes, small_NK, unit, [scales]) for kernels in (interpreted, TORCH)))


def compiled(kernel: Any, architecture: int, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    """PTX of a kernel. Arguments that are neither pointers nor constants are integers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    text: str = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=load(interpreted=False).EXACT).asm["ptx"]
    return text


@pytest.mark.parametrize("architecture", GPU_ARCHITECTURES)
@pytest.mark.parametrize("codes", [E4m3(), E2m1(), PackedIntegers(4)], ids=str)
def test_compiled_for_a_gpu_they_use_exact_operations_alone(codes: Codes, architecture: int) -> None:
    module = load(interpreted=False)
    kind, num_bits = module._kind(codes)
    pointers = {"weight": "*u16", "scale": "*fp32", "zero": "*fp32", "sums": "*fp32", "packed": "*u8"}
    constants: dict[str, Any] = {"kind": kind, "num_bits": num_bits}
    if not isinstance(codes, PackedIntegers):
        constants["zero"] = None
    for kernel, more in (
        (module._codes_kernel, {"offset": 8, "per_byte": 2, "E": 1024}),
        (module._errors_kernel, {"T": 16, "P": 128}),
    ):
        own = {name: type for name, type in pointers.items() if name in kernel.arg_names}
        ptx = compiled(kernel, architecture, own, constants | more)
        assert "div.rn.f32" in ptx
        assert not re.search(r"\bfma|\bmad\S*\.f|\bdiv\.(full|approx)|\brcp|\.ftz|\.approx", ptx)
        assert all(rounding == "rn" for rounding in re.findall(r"\b(?:add|sub|mul|div)\.(?:(\w+)\.)?f32", ptx))


def test_they_are_tried_on_a_device_before_they_are_used(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted.fault(CPU) is None
    monkeypatch.setattr(type(interpreted), "codes", lambda _, *args: TORCH.codes(*args).view(torch.uint8) ^ 1)
    assert interpreted.fault(CPU) == "they give other bits than the reference for E4m3()"


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_where_they_do_not_work_the_reference_is_taken_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="streamquant"):
        assert find_kernels("auto", torch.device("cuda")) is TORCH
    assert "kernels triton do not work on cuda: " in caplog.text
    with pytest.raises(RequestError, match=r"do not work on cuda: .*; --kernels torch gives the same bytes"):
        find_kernels("triton", torch.device("cuda"))
