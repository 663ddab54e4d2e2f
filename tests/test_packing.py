import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamquant.schemes.packing import flat, pack_int32, pack_nibbles, unpack_int32, unpack_nibbles
from streamquant.schemes.rounding import e2m1_value
from tests import oracles

NUM_BITS = range(1, 9)


def codes(lines: int, count: int, num_bits: int, seed: int = 0) -> Tensor:
    half = 2 ** (num_bits - 1)
    return torch.randint(-half, half, (lines, count), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(num_bits=st.sampled_from(NUM_BITS), lines=st.integers(1, 5), count=st.integers(1, 140), seed=st.integers(0, 99))
def test_packed_codes_are_a_stream_of_bits(num_bits: int, lines: int, count: int, seed: int) -> None:
    code_Ln = codes(lines, count, num_bits, seed)
    before = code_Ln.clone()
    word_LW = pack_int32(code_Ln, num_bits)
    assert word_LW.is_contiguous()
    assert oracles.differences({"": word_LW}, {"": torch.from_numpy(oracles.pack_bits(code_Ln.numpy(), num_bits))}) == {}
    assert oracles.differences({"": word_LW}, {"": pack_to_int32(code_Ln, num_bits)}) == {}
    assert torch.equal(unpack_int32(word_LW, num_bits, count), before)
    assert torch.equal(unpack_from_int32(word_LW, num_bits, code_Ln.shape), before)
    assert torch.equal(code_Ln, before)


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_the_smallest_and_the_largest_code_fill_words_with_zeros_and_ones(num_bits: int) -> None:
    half = 2 ** (num_bits - 1)
    assert pack_int32(torch.full((1, 64), -half, dtype=torch.int8), num_bits).tolist() == [[0] * (2 * num_bits)]
    assert pack_int32(torch.full((1, 64), half - 1, dtype=torch.int8), num_bits).tolist() == [[-1] * (2 * num_bits)]


def test_the_first_code_is_in_the_lowest_bits() -> None:
    nibbles = torch.tensor([[0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0xF]], dtype=torch.int8) - 8
    assert pack_int32(nibbles, 4).tolist() == [[0xF7654321 - 2**32]]
    assert pack_int32(nibbles[:, :3], 4).tolist() == [[0x321]]  # the rest of the word is 0, and not the code 0


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_a_line_may_be_a_column(num_bits: int) -> None:
    for shape in ((40, 7), (40, 1), (1, 40)):
        code_nL = codes(*shape, num_bits)
        word_LW = pack_int32(code_nL.T, num_bits)
        assert torch.equal(word_LW.T, pack_to_int32(code_nL, num_bits, packed_dim=0))
        assert torch.equal(unpack_int32(word_LW.T.contiguous().T, num_bits, shape[0]).T, code_nL)


@pytest.mark.parametrize("num_bits", NUM_BITS)
def test_packing_on_the_meta_device_gives_the_same_shape(num_bits: int) -> None:
    word_LW = pack_int32(torch.empty((3, 37), dtype=torch.int8, device="meta"), num_bits)
    assert (word_LW.dtype, word_LW.shape) == (torch.int32, (3, -(-37 * num_bits // 32)))


@given(lines=st.integers(1, 5), pairs=st.integers(1, 40), seed=st.integers(0, 99))
def test_two_nibbles_share_a_byte_and_the_even_column_is_low(lines: int, pairs: int, seed: int) -> None:
    nibble_Ln = torch.randint(16, (lines, 2 * pairs), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    byte_Lm = pack_nibbles(nibble_Ln)
    assert np.array_equal(byte_Lm.numpy(), oracles.pack_nibbles(nibble_Ln.numpy()))
    assert torch.equal(byte_Lm, pack_fp4_to_uint8(e2m1_value(nibble_Ln)))
    assert torch.equal(unpack_nibbles(byte_Lm), nibble_Ln)
    assert torch.equal(unpack_fp4_from_uint8(byte_Lm, lines, 2 * pairs, torch.float32), e2m1_value(nibble_Ln))


@pytest.mark.parametrize(
    ("shape", "stride"), [((1, 1), (2, 2)), ((1, 1), (7, 3)), ((1, 4), (9, 1)), ((3, 1), (1, 5)), ((0, 2), (2, 1)), ((2, 0), (0, 1))]
)
def test_odd_strides_of_single_elements_do_not_matter(shape: tuple[int, int], stride: tuple[int, int]) -> None:
    word_LW = torch.arange(100, dtype=torch.int32).as_strided(shape, stride)
    assert torch.equal(
        unpack_int32(word_LW, 4, 8 * shape[1]), unpack_int32(word_LW.clone(memory_format=torch.contiguous_format), 4, 8 * shape[1])
    )
    assert flat(word_LW).view(torch.uint8).shape == (4 * word_LW.numel(),)
