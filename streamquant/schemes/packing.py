"""Bit layouts of packed codes.

pack-quantized, N bits: a signed code q is stored as u = q + 2**(N-1). A line of codes is one little-endian bit stream:

    code i    = stream bits [N*i, N*i + N)        e.g. N = 4: |c7|c6|c5|c4|c3|c2|c1|c0|  <- bit 0
    word j    = stream bits [32*j, 32*j + 32)     N = 3: 32 codes fill exactly 3 words, code 10 straddles words 0 and 1

The unused high bits of the last word are 0. Weights are packed along columns, zero points along rows.
e2m1: two codes a byte, the even column in the low nibble.

Legend: L lines, n codes in a line, W int32 words in a line.
Source: compressed-tensors, `compressors/pack_quantized` and `nvfp4`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamquant.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


WORD_BITS = 32


def flat(tensor: Tensor) -> Tensor:
    """The elements in one dimension, a view where they are contiguous.

    A single element may have any stride in what torch calls contiguous, and then no view of another dtype.
    """
    line = tensor.contiguous().view(-1)
    return line.clone(memory_format=torch.contiguous_format) if line.stride(0) != 1 else line


def pack_int32(code_Ln: Tensor, num_bits: int) -> Tensor:
    """int8 codes in [-2**(num_bits-1), 2**(num_bits-1)) -> int32 words [L, ceil(n * num_bits / 32)]."""
    lines, count = code_Ln.shape
    num_words = -(-count * num_bits // WORD_BITS)
    unsigned_Ln = flat(code_Ln).view(lines, count).view(torch.uint8) + (1 << (num_bits - 1))  # wraps modulo 256
    if 8 % num_bits == 0:
        unsigned_Ln = F.pad(unsigned_Ln, (0, -count % (WORD_BITS // num_bits)))
        while num_bits < 8:
            unsigned_Ln = _join_pairs(unsigned_Ln, num_bits)
            num_bits *= 2
        return unsigned_Ln.view(torch.int32)
    run_LRc = F.pad(unsigned_Ln, (0, -count % WORD_BITS)).to(torch.int32).view(lines, -1, WORD_BITS)
    word_LRw = torch.zeros((lines, run_LRc.shape[1], num_bits), dtype=torch.int32, device=code_Ln.device)
    for i in range(WORD_BITS):
        word, shift = divmod(i * num_bits, WORD_BITS)
        word_LRw[..., word] |= run_LRc[..., i] << shift  # bits shifted out on the left belong to the next word
        if shift + num_bits > WORD_BITS:
            word_LRw[..., word + 1] |= run_LRc[..., i] >> (WORD_BITS - shift)
    return word_LRw.flatten(1)[:, :num_words].contiguous()


def unpack_int32(word_LW: Tensor, num_bits: int, count: int) -> Tensor:
    """The inverse of `pack_int32`: int8 codes [L, count]."""
    mask = (1 << num_bits) - 1
    if 8 % num_bits == 0:
        byte_Lm = flat(word_LW).view(torch.uint8).view(len(word_LW), 4 * word_LW.shape[1])
        parts = [(byte_Lm >> shift) & mask for shift in range(0, 8, num_bits)]
        unsigned_Ln = torch.stack(parts, dim=-1).flatten(1)[:, :count]
        return (unsigned_Ln - (1 << (num_bits - 1))).view(torch.int8)  # wraps modulo 256
    index = torch.arange(count, device=word_LW.device) * num_bits
    word, shift = index // WORD_BITS, index % WORD_BITS
    wide_LW = F.pad(word_LW.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    wide_Ln = wide_LW[:, word] | (wide_LW[:, word + 1] << WORD_BITS)
    return (((wide_Ln >> shift) & mask) - (1 << (num_bits - 1))).to(torch.int8)


def pack_nibbles(nibble_Ln: Tensor) -> Tensor:
    """uint8 codes 0..15, n even -> bytes [L, n/2]."""
    return _join_pairs(nibble_Ln, 4)


def _join_pairs(code_Ln: Tensor, num_bits: int) -> Tensor:
    """uint8 codes of `num_bits` <= 4 -> half as many of twice the bits; the even one becomes the low half."""
    pair = code_Ln.contiguous().view(torch.int16)  # little-endian: the odd column is the high byte
    return (pair | (pair >> (8 - num_bits))).to(torch.uint8)


def unpack_nibbles(byte_Lm: Tensor) -> Tensor:
    """Bytes [L, m] -> uint8 codes [L, 2m]."""
    return torch.stack([byte_Lm & 15, byte_Lm >> 4], dim=-1).flatten(1)
