"""CRC-32 of a file that is written in pieces, in any order, by any number of threads, in several runs.

CRC-32 is linear: that of a file is the exclusive or of what each of its pieces adds, which is the piece's own CRC-32 moved by the
bytes that follow it in the file. So nothing is read twice, and how a file was cut into pieces leaves no trace in the sum.
The polynomial is zlib's, bits reflected: bit 31 is the coefficient of x**0. https://www.rfc-editor.org/rfc/rfc1952#section-8
"""

import zlib
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

POLYNOMIAL = 0xEDB88320
ONE = 1 << 31
EIGHTH_POWER = 1 << 23

# The same sum, ten times as fast, where the extra `fast` is installed.
crc32 = import_module("isal.isal_zlib").crc32 if find_spec("isal") else zlib.crc32


class Checksum:
    """What the pieces written so far add to the CRC-32 of a file of `num_bytes`."""

    def __init__(self, num_bytes: int):
        self._num_bytes = num_bytes
        self._crc_of_run: dict[int, int] = {}  # bytes without a gap between them, by where they end

    def add(self, start: int, buffer: memoryview) -> None:
        """Count in a piece. Safe to call from several threads for pieces that do not overlap."""
        crc: int = crc32(buffer, self._crc_of_run.pop(start, 0))
        self._crc_of_run[start + len(buffer)] = crc

    @property
    def value(self) -> int:
        """What they add: of all pieces together, the CRC-32 itself."""
        value = 0
        for end, crc in self._crc_of_run.items():
            value ^= _move(crc, self._num_bytes - end)
        return value


def _move(crc: int, num_bytes: int) -> int:
    """What bytes of this CRC-32 add with `num_bytes` behind them: times x**(8 * num_bytes)."""
    for bit in range(num_bytes.bit_length()):
        if num_bytes >> bit & 1:
            of_byte = _products(bit)
            crc = of_byte[0][crc & 255] ^ of_byte[1][crc >> 8 & 255] ^ of_byte[2][crc >> 16 & 255] ^ of_byte[3][crc >> 24]
    return crc


@lru_cache
def _products(bit: int) -> tuple[list[int], ...]:
    """The products of x**(8 * 2**bit) with all polynomials of which one byte, first to last, is not 0."""
    factor = _square(bit)
    tables = []
    for shift in (0, 8, 16, 24):
        products = [0] * 256
        for byte in range(1, 256):
            lowest = byte & -byte
            products[byte] = _multiply(factor, byte << shift) if byte == lowest else products[lowest] ^ products[byte - lowest]
        tables.append(products)
    return tuple(tables)


@lru_cache
def _square(times: int) -> int:
    """x**8, squared so many times."""
    return EIGHTH_POWER if times == 0 else _multiply(_square(times - 1), _square(times - 1))


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    while a:
        if a & ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product
