import dataclasses
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamquant.errors import CheckpointError, RequestError
from streamquant.kernels import find_kernels
from streamquant.report import bits_per_weight
from streamquant.schemes import SCHEMES, Scheme, find_scheme, scheme_from_config
from streamquant.stored import dtype_name, stored_bytes, stored_tensors
from tests import oracles

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICES = [(CPU, "torch"), *([(GPU, "torch"), (GPU, "triton")] if torch.cuda.is_available() else [])]  # and kernels
SHAPES = [(24, 256), (131, 384), (1, 128)]
SHAPES_OF_UNIT = {16: [(5, 48)], 32: [(9, 96)], 64: [(3, 192)], 128: [(7, 128)]}
ODD_SHAPES = [(131, 129), (13, 37), (3, 1)]

SETTINGS = [
    *({"preset": preset} for preset in SCHEMES),
    *oracles.SETTINGS_TO_TRY,
    {"preset": "FP8_DYNAMIC", "scale_dtype": "float32"},
    {"preset": "FP8A16", "strategy": "tensor", "scale_dtype": "float32"},
    {"preset": "W8A8", "scale_dtype": "float32"},
    {"preset": "FP8_BLOCK", "format": "fp8"},
]
CASES = {" ".join(str(value) for value in setting.values()): find_scheme(**setting) for setting in SETTINGS}
CASES["W4A8 of an expert"] = SCHEMES["W4A8"].for_expert()
FOR_COMPRESSED_TENSORS = [name for name, scheme in CASES.items() if scheme.format != "fp8"]
PRESETS = sorted(SCHEMES.keys() & PRESET_SCHEMES.keys())

each_scheme = pytest.mark.parametrize("scheme", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def shapes_of(scheme: Scheme) -> list[tuple[int, int]]:
    return SHAPES + SHAPES_OF_UNIT.get(scheme.weights_config.get("group_size", 1), ODD_SHAPES)


def oracle_settings(scheme: Scheme) -> dict[str, Any]:
    return {"scale_dtype": torch.float32} if getattr(scheme, "scale_dtype", None) == "float32" else {}


def join_blocks(scheme: Scheme, weight_NK: Tensor, starts: list[int]) -> dict[str, Tensor]:
    """A weight encoded block by block, as the stream does it."""
    num_rows, num_columns = weight_NK.shape
    blocks = list(itertools.pairwise([*starts, num_rows]))
    shared = None
    if scheme.shares_amax:
        amax = torch.stack([scheme.observe(weight_NK[start:end]).abs().amax() for start, end in blocks]).amax()
        shared = scheme.share(amax.view(1), weight_NK.dtype)
    once = scheme.once((num_rows, num_columns), weight_NK.dtype, shared)
    whole = scheme.encode(torch.empty_like(weight_NK, device="meta"), shared=None if shared is None else shared.to("meta"))
    joined = {suffix: torch.empty_like(tensor, device="cpu") for suffix, tensor in whole.items()}
    for start, end in blocks:
        for suffix, tensor in scheme.encode(weight_NK[start:end], shared=shared).items():
            joined[suffix][scheme.line(suffix, start) : scheme.line(suffix, end)] = tensor
    return joined | once


# --- the bytes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "kernels"), DEVICES, ids=str)
@each_dtype
@each_scheme
def test_codes_and_scales_are_those_of_the_oracle(scheme: Scheme, dtype: torch.dtype, device: torch.device, kernels: str) -> None:
    encode = partial(scheme.encode_whole, kernels=find_kernels(kernels, device))
    for shape in shapes_of(scheme):
        for name, weight_NK in oracles.weights_to_try(shape, dtype).items():
            before = weight_NK.clone()
            stored = {suffix: tensor.cpu() for suffix, tensor in encode(weight_NK.to(device)).items()}
            oracle = oracles.encode(weight_NK, scheme.format, scheme.weights_config, **oracle_settings(scheme))
            assert oracles.differences(stored, oracle) == {}, (name, shape)
            assert oracles.differences({"": weight_NK}, {"": before}) == {}, "the argument was written to"


@each_dtype
@each_scheme
def test_scales_are_positive_and_finite(scheme: Scheme, dtype: torch.dtype) -> None:
    for name, weight_NK in oracles.weights_to_try((131, 384), dtype, seed=1).items():
        stored = scheme.encode_whole(weight_NK)
        for suffix in stored.keys() & {"weight_scale", "weight_scale_inv", "weight_global_scale"}:
            scale = stored[suffix]
            if scale.dtype == torch.uint8:
                assert scale.max() < 255, name  # NaN in e8m0
            else:
                assert (scale.float() > 0).all(), (name, suffix)
                assert scale.float().isfinite().all(), (name, suffix)
        assert stored.get("weight", torch.zeros(1)).float().isfinite().all(), name


@each_dtype
@each_scheme
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_follow_from_the_header_alone(scheme: Scheme, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "meta":
        monkeypatch.setattr("streamquant.stored.MAX_SAMPLE_ELEMENTS", 0)
    for shape in shapes_of(scheme):
        planned = stored_tensors.__wrapped__(scheme, shape, dtype_name(torch.empty(0, dtype=dtype)))
        stored = scheme.encode_whole(torch.ones(shape, dtype=dtype))
        assert {suffix: (dtype_, shape_) for suffix, dtype_, shape_ in planned} == {
            suffix: (dtype_name(tensor), tensor.shape) for suffix, tensor in stored.items()
        }


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_as_many_bits_are_told_as_are_stored(scheme: Scheme) -> None:
    assert bits_per_weight(scheme) == pytest.approx(8 * stored_bytes(scheme, (4096, 4096), "BF16") / 4096**2, abs=1e-4)


@each_scheme
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_cutting_a_weight_into_blocks_of_rows_changes_no_bit(scheme: Scheme, data: st.DataObject) -> None:
    multiple = scheme.row_multiple
    num_rows = data.draw(st.integers(1, 3 * multiple + 7))
    num_columns = data.draw(st.sampled_from([shape[1] for shape in shapes_of(scheme)]))
    starts = {0} | data.draw(st.sets(st.integers(0, (num_rows - 1) // multiple).map(lambda block: block * multiple), max_size=4))
    distributions = oracles.weights_to_try((num_rows, num_columns), data.draw(st.sampled_from(DTYPES)))
    weight_NK = distributions[data.draw(st.sampled_from(sorted(distributions)))]
    assert oracles.differences(join_blocks(scheme, weight_NK, sorted(starts)), scheme.encode_whole(weight_NK)) == {}


@each_scheme
def test_the_strides_of_a_weight_do_not_matter(scheme: Scheme) -> None:
    whole_NK = oracles.weights_to_try((256, 256), torch.bfloat16)["normal"]
    for weight_NK in (whole_NK.T, whole_NK[:, 128:], whole_NK[::2], whole_NK.repeat(1, 2)[:, ::2]):
        assert oracles.differences(scheme.encode_whole(weight_NK), scheme.encode_whole(weight_NK.contiguous())) == {}


def test_a_float16_range_wider_than_float16_has_a_finite_scale() -> None:
    weight_NK = torch.tensor([[-6e4, 6e4] * 64], dtype=torch.float16)
    for preset in ("W4A16_ASYM", "W8A16"):
        scheme = find_scheme(preset, symmetric=False)
        decoded_NK = scheme.decode(scheme.encode_whole(weight_NK), 128)
        assert ((decoded_NK - weight_NK.float()).abs() < 6e4 / 10).all()


def test_small_float16_weights_survive_nvfp4() -> None:
    weight_NK = oracles.weights_to_try((8, 64), torch.float16)["normal"] / 64
    scheme = SCHEMES["NVFP4A16"]
    decoded_NK = scheme.decode(scheme.encode_whole(weight_NK), 64)
    assert (decoded_NK - weight_NK.float()).norm() < 0.12 * weight_NK.float().norm()


# --- what compressed-tensors makes of them --------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", FOR_COMPRESSED_TENSORS)
def test_compressed_tensors_reads_the_same_weights(name: str, dtype: torch.dtype) -> None:
    scheme = CASES[name]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    config = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.weights_config), format=scheme.format)
    for num_columns in {shape[1] for shape in shapes_of(scheme)}:
        distributions = oracles.weights_to_try((3, num_columns), dtype)
        for weight_NK in (distributions["normal"], torch.cat(list(distributions.values()))):
            stored = scheme.encode_whole(weight_NK)
            theirs_NK = compressor.decompress(stored, config)["weight"]
            ours_NK = scheme.decode(stored, num_columns)
            assert ours_NK.dtype == torch.float32
            assert oracles.differences({"": ours_NK.to(theirs_NK.dtype)}, {"": theirs_NK}) == {}, num_columns


@each_scheme
def test_compressed_tensors_accepts_the_config(scheme: Scheme) -> None:
    inputs = None if scheme.activations is None else scheme.activations.config
    args = QuantizationScheme(targets=["Linear"], weights=scheme.weights_config, input_activations=inputs)
    stated = args.model_dump()
    assert stated["weights"].items() >= QuantizationArgs(**scheme.weights_config).model_dump().items()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_means_what_it_means_in_compressed_tensors(preset: str) -> None:
    theirs = QuantizationScheme(targets=[], **PRESET_SCHEMES[preset])
    ours = SCHEMES[preset]
    left_out = {"scale_dtype", "zp_dtype", "observer"}  # readers infer them or need none, and old ones refuse the keys
    for config, args in (
        (ours.weights_config, theirs.weights),
        (None if ours.activations is None else ours.activations.config, theirs.input_activations),
    ):
        if config is None or args is None:
            assert config is None
            assert args is None
            continue
        stated = QuantizationArgs(**config)
        assert stated.model_dump(exclude=left_out) == args.model_dump(exclude=left_out)
        assert config.get("scale_dtype") in {None, str(args.scale_dtype)}


def test_the_presets_are_those_of_compressed_tensors_and_one_more() -> None:
    assert SCHEMES.keys() - PRESET_SCHEMES.keys() == {"FP8A16"}
    assert all(scheme.preset == name for name, scheme in SCHEMES.items())


# --- finding schemes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOR_COMPRESSED_TENSORS)
def test_a_config_describes_its_scheme(name: str) -> None:
    scheme = CASES[name]
    inputs = None if scheme.activations is None else scheme.activations.config
    found = scheme_from_config(scheme.format, scheme.weights_config, inputs)
    said_nowhere = {"scale_dtype": "weight"} if hasattr(scheme, "scale_dtype") else {}
    assert found == dataclasses.replace(scheme, **said_nowhere)
    if name in SCHEMES:
        assert found.preset == {"INT8": "W8A8"}.get(name, name)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_as_compressed_tensors_writes_it_describes_the_weights_of_its_preset(preset: str) -> None:
    args = QuantizationScheme(targets=[], **PRESET_SCHEMES[preset])
    weights = args.weights.model_dump(mode="json")
    inputs = None if args.input_activations is None else args.input_activations.model_dump(mode="json")
    found = scheme_from_config(SCHEMES[preset].format, weights, inputs)
    assert dataclasses.replace(found, activations=SCHEMES[preset].activations) == SCHEMES[preset]


INT4 = SCHEMES["W4A16"].weights_config
NOT_OURS = {
    "no format that we read": ("marlin-24", INT4),
    "zero points in int-quantized": ("int-quantized", INT4 | {"symmetric": False}),
    "integers with a scale per tensor": ("pack-quantized", INT4 | {"strategy": "tensor"}),
    "integers of 16 bits": ("pack-quantized", INT4 | {"num_bits": 16}),
    "dynamic weights": ("pack-quantized", INT4 | {"dynamic": True}),
    "FP8 in groups": ("float-quantized", INT4 | {"num_bits": 8, "type": "float"}),
    "blocks of another size": ("float-quantized", SCHEMES["FP8_BLOCK"].weights_config | {"block_structure": [64, 64]}),
    "FP4 in groups of 32": ("nvfp4-pack-quantized", SCHEMES["NVFP4A16"].weights_config | {"group_size": 32}),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_a_config_that_we_do_not_store_is_refused(case: str) -> None:
    with pytest.raises(CheckpointError):
        scheme_from_config(*NOT_OURS[case], None)


REFUSED = [
    ({"preset": "W4A17"}, "unknown scheme 'W4A17'; known are FP8, FP8_DYNAMIC"),
    ({"preset": "W4A16", "observer": "percentile"}, "unknown observer 'percentile'; known are minmax, power_of_two, mse"),
    ({"preset": "W4A16", "observer": "nvfp4_expanded_mse"}, "made for NVFP4; for W4A16 use mse"),
    ({"preset": "MXFP4", "observer": "nvfp4_expanded_mse"}, "made for NVFP4; for MXFP4 use mse"),
    ({"preset": "W4A16", "format": "gguf"}, "unknown format 'gguf'; known are compressed-tensors, fp8"),
    ({"preset": "FP8_DYNAMIC", "format": "fp8"}, "stores FP8_BLOCK and no other scheme, not FP8_DYNAMIC"),
    ({"preset": "FP8_BLOCK", "format": "fp8", "scale_dtype": "float32"}, "no scale dtype to choose; settings it has: none"),
    ({"preset": "FP8_DYNAMIC", "group_size": 128}, "FP8_DYNAMIC has no group size to choose"),
    ({"preset": "MXFP4", "group_size": 16}, "MXFP4 has no group size to choose; settings it has: none"),
    ({"preset": "NVFP4A16", "scale_dtype": "float32"}, "NVFP4A16 has no scale dtype to choose"),
    ({"preset": "W8A8", "symmetric": False}, "W8A8 has no symmetric to choose"),
    ({"preset": "W8A8", "strategy": "tensor"}, "W8A8 has no strategy to choose"),
    ({"preset": "W4A16", "scale_dtype": "float32"}, "W4A16 has no scale dtype to choose; settings it has: group_size, strategy, symmetric"),
    ({"preset": "W4A16", "strategy": "tensor"}, "W4A16 has strategy channel or group, not tensor"),
    ({"preset": "W4A16", "strategy": "channel", "group_size": 64}, "group size of 64 and strategy channel exclude each other"),
    ({"preset": "W4A16", "group_size": 0}, "group size 0 is less than 1; for one scale a row use strategy channel"),
    ({"preset": "W4AFP8", "symmetric": False}, "W4AFP8 has no symmetric to choose"),
    ({"preset": "W4A8", "symmetric": False}, "W4A8 has no symmetric to choose"),
    ({"preset": "FP8_DYNAMIC", "strategy": "block"}, "FP8_DYNAMIC has strategy channel or tensor, not block"),
    ({"preset": "FP8_BLOCK", "strategy": "channel"}, "FP8_BLOCK has strategy block, not channel"),
    ({"preset": "FP8A16", "strategy": "group"}, "FP8A16 has strategy block or channel or tensor, not group"),
    ({"preset": "FP8A16", "strategy": "tensor", "observer": "mse"}, "observer mse needs a scale per channel or block"),
    ({"preset": "FP8_DYNAMIC", "scale_dtype": "bfloat16"}, "bfloat16"),
    ({"preset": "W8A8", "scale_dtype": "bfloat16"}, "bfloat16"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED)
def test_a_scheme_that_cannot_be_is_refused_with_the_reason(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        find_scheme(**setting)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_case_does_not_matter_and_none_leaves_a_setting() -> None:
    assert find_scheme("w4a16_asym", observer=None, group_size=None, symmetric=None) is not None
    assert find_scheme("w4a16_asym", group_size=None, symmetric=None) == SCHEMES["W4A16_ASYM"]
    assert find_scheme("W4A16", symmetric=False) == SCHEMES["W4A16_ASYM"]
    assert find_scheme("W4A16", group_size=64) == dataclasses.replace(SCHEMES["W4A16"], group_size=64)
    assert find_scheme("W4A16_ASYM", strategy="channel", observer="mse").observer == "mse"


@pytest.mark.parametrize("preset", [name for name, scheme in SCHEMES.items() if "group_size" in scheme.weights_config])
def test_columns_that_groups_do_not_divide_are_a_problem(preset: str) -> None:
    scheme = SCHEMES[preset]
    group_size = scheme.weights_config["group_size"]
    assert scheme.problem((8, 3 * group_size), fused=True, last=False) is None or not scheme.symmetric
    for num_columns in (group_size // 2, group_size + group_size // 2, 3 * group_size - 1):
        problem = scheme.problem((8, num_columns), fused=False, last=True)
        assert problem is not None
        assert problem.startswith(f"has {num_columns} columns; {preset} needs a multiple of ")
        assert str(group_size) in problem


def test_rows_matter_where_engines_stack_blocks_or_packed_zero_points() -> None:
    blocks, zeros = SCHEMES["FP8_BLOCK"], SCHEMES["W4A16_ASYM"]
    assert blocks.problem((130, 128), fused=False, last=True) is None
    assert blocks.problem((130, 128), fused=True, last=True) is None
    assert "has 130 rows" in str(blocks.problem((130, 128), fused=True, last=False))
    assert "has 100 columns" in str(blocks.problem((128, 100), fused=False, last=True))
    assert zeros.problem((12, 128), fused=False, last=True) is None
    assert "has 12 rows" in str(zeros.problem((12, 128), fused=True, last=True))
    assert zeros.problem((16, 128), fused=True, last=False) is None
