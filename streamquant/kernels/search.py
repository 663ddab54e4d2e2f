"""Which of an observer's candidates fits each unit best, for processors: the result of the full grid, bit for bit, for a part of the work.

The error of a candidate is S * power_2_4(scale / first scale), S the sum of |code - quotient| ** 2.4 over the unit. S is first
computed roughly, for every candidate: the weight is multiplied by a reciprocal, the power is left after one correction, products and
sums are fused. Candidates whose rough error is more than a bound above the least one cannot win. Nor can those that cut off the largest
number of the unit and lose more by that alone than the first candidate does in all, which with 8 bits are most. What is left, seldom two
for a unit, is computed as in the reference. Units whose candidates are all equal, as many with powers of two are, are not looked at.

The bound. With p = 2.4 and q the quotient, d = |code - q| is the distance of q from the set of codes, so if the rough quotient is off
by x, d is off by no more than |x|. Here |x| <= QUOTIENT_ERROR * (|w / scale| + |zero|). Over a unit S ** (1/p) is the p-norm of d, so by
Minkowski's inequality it is off by no more than the p-norm of x. A unit is *clear* if for all candidates the norm of d is CLEAR times
that of x; then S is off by p / CLEAR, relatively, and by POWER_ERROR and the rounding of the sum. In units that are not clear, as
those whose weights are codes already, every candidate is computed as in the reference.

Legend: compiled.py; J jobs, which are pairs of a unit and a candidate.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamquant.kernels.instructions import ROUNDER, compiled, contracted, fifth_root_guess, nearest_e2m1, nearest_e4m3
from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers

LANES = 64  # four vectors of float32 numbers; a loop over 16 LLVM would unroll before it thinks of vectors
EXACT_LANES = 32  # of long lines, which must fit the cache
PIECE = 128
WORDS = 8  # of each lane that are loaded at a time
TILES = 8  # of units that are looked through at a time, unless one unit takes more
UNITS = 512  # of which what is left is computed exactly at a time, all lanes full
E4M3, E2M1, INTEGER = range(3)
SMALLEST_SQUARE = np.float32(1e-18)

QUOTIENT_ERROR = 6 * 2.0**-24  # roundings, of w / s and of the sum with z, here and in the reference
POWER_ERROR = 5.6e-5  # test_kernels.py tries all numbers
CLEAR = 5000.0
# |w / s| + |z| to the power of 2.4 is at most 2 ** 1.4 times the sum of the powers. That of |w / s| over a unit is at most the largest
# |w / s| to the power of 0.4 times the sum of squares.
SQUARES_ERROR = np.float32(1.001)
CLEAR_POWER = np.float32((CLEAR * QUOTIENT_ERROR) ** 2.4 * 2**1.4 * (1 + 2 * POWER_ERROR))
SUM_ERROR = POWER_ERROR + 2.4 / CLEAR * 1.001 + 1e-5  # of what is not clear; the last is for the exact sum, and for factors
ROUNDING = 2.0**-24  # of every addition
LEAST_MEAN = np.float32(1e-12)  # far above what SMALLEST_SQUARE stands for
LARGEST, SMALLEST = np.float32(1e30), np.float32(1e-30)  # no errors beyond can overflow or lose bits


def kind_of(codes: Codes) -> tuple[int, np.float32, np.float32]:
    """How the loops round to these codes, and the smallest and largest of integers."""
    match codes:
        case E4m3():
            return E4M3, np.float32(0), np.float32(0)
        case E2m1():
            return E2M1, np.float32(0), np.float32(0)
        case ByteIntegers() | PackedIntegers():
            return INTEGER, np.float32(codes.smallest), np.float32(codes.largest)
    raise AssertionError(f"no kernel for {codes}")


@compiled
def _newton_step(y, t):  # type: ignore[no-untyped-def]
    """`y` nearer to t ** (-1/5)."""
    y2 = y * y
    u = y2 * y2 * y * t
    return y * ((u * np.float32(0.12) + np.float32(-0.44)) * u + np.float32(1.32))


@compiled
def power_2_4(value):  # type: ignore[no-untyped-def]
    """`rounding.power_2_4`, operation by operation."""
    t = value * value
    y = fifth_root_guess(SMALLEST_SQUARE if t < SMALLEST_SQUARE else t)
    y = _newton_step(_newton_step(y, t), t)  # in a loop they would keep the caller's from being vectorized
    root = y * y * t
    return root * root


@contracted
def rough_power_2_4(value):  # type: ignore[no-untyped-def]
    """value ** 2.4 to a relative POWER_ERROR, plus at most 1e-20.

    With t = value**2, y a guess of t**(-1/5) and u = t * y**5 near 1, it is (t * y**2)**2 * u**(-4/5), and a cubic does for the last.
    """
    t = value * value + SMALLEST_SQUARE
    y = fifth_root_guess(t)
    y2 = y * y
    root = t * y2
    u = root * (y2 * y)
    cubic = ((u * np.float32(-0.5511197) + np.float32(2.3782752)) * u + np.float32(-3.9045211)) * u + np.float32(3.0773589)
    return root * root * cubic


@compiled
def _fold(numbers, count):  # type: ignore[no-untyped-def]
    """`rounding.tree_sum` of the first `count` lines, into the first."""
    while count > 1:
        half = count // 2
        for i in range(half):
            for lane in range(EXACT_LANES):
                numbers[i, lane] += numbers[half + i, lane]
        if count % 2:
            for lane in range(EXACT_LANES):
                numbers[half, lane] = numbers[2 * half, lane]
        count = half + count % 2


class Weight(NamedTuple):
    """A weight as the loops read it, and the units it consists of."""

    words: NDArray[np.uint32]  # its rows, one behind the other
    per_word: int  # 1 for float32 numbers, 2 for bfloat16: then b is even
    num_rows: int
    row_words: int
    a: int  # rows of a unit
    b: int  # columns of a unit
    row_units: int  # units in a row


@compiled
def _row_and_word(weight, unit):  # type: ignore[no-untyped-def]
    """The first row of a unit, and the word of a row with which it begins."""
    return unit // weight.row_units * weight.a, unit % weight.row_units * weight.b // weight.per_word


@compiled
def _start_of(weight, row, word):  # type: ignore[no-untyped-def]
    """The number of a word; -1 if its row is below the weight, which counts as zeros."""
    return row * weight.row_words + word if row < weight.num_rows else -1


def _loader(num_lanes: int) -> Callable[..., None]:
    """`_load` for so many lanes: loops of a length that is known are twice as fast."""

    @compiled
    def load(weight, start, tile, words):  # type: ignore[no-untyped-def]
        """As many numbers as `tile` has lines, from these words on, each into a lane.

        Through a buffer: with each lane written at once, lines of the cache would be fetched for four bytes.
        """
        bits, num_words = tile.view(np.uint32), len(tile) // weight.per_word
        for first in range(0, num_words, WORDS):
            count = min(WORDS, num_words - first)
            for lane in range(num_lanes):
                of_lane = max(start[lane], 0) + first
                if count == WORDS:
                    whole = weight.words[of_lane : of_lane + WORDS]
                    for i in range(WORDS):
                        words[i, lane] = whole[i]
                else:
                    for i in range(count):
                        words[i, lane] = weight.words[of_lane + i]
            for i in range(count):
                if weight.per_word == 2:
                    for lane in range(num_lanes):
                        bits[2 * (first + i), lane] = words[i, lane] << np.uint32(16)
                    for lane in range(num_lanes):
                        bits[2 * (first + i) + 1, lane] = words[i, lane] & np.uint32(0xFFFF0000)
                else:
                    for lane in range(num_lanes):
                        bits[first + i, lane] = words[i, lane]
        for lane in range(num_lanes):
            if start[lane] < 0:
                tile[:, lane] = 0

    return load


_load_tile, _load_lines = _loader(LANES), _loader(EXACT_LANES)


# --- exactly ---------------------------------------------------------------------------------------------------------


@compiled
def _distances(kind, tile, scale, zero, smallest, largest, power):  # type: ignore[no-untyped-def]
    """|code - quotient| ** 2.4 for a tile."""
    if kind == E4M3:
        for j in range(len(tile)):
            for lane in range(EXACT_LANES):
                quotient = tile[j, lane] / scale[lane]
                power[j, lane] = power_2_4(nearest_e4m3(quotient) - abs(quotient))
    elif kind == E2M1:
        for j in range(len(tile)):
            for lane in range(EXACT_LANES):
                quotient = tile[j, lane] / scale[lane]
                power[j, lane] = power_2_4(nearest_e2m1(quotient) - abs(quotient))
    else:
        for j in range(len(tile)):
            for lane in range(EXACT_LANES):
                quotient = tile[j, lane] / scale[lane] + zero[lane]
                nearest = smallest if quotient < smallest else quotient
                nearest = largest if nearest > largest else nearest
                power[j, lane] = power_2_4(((nearest + ROUNDER) - ROUNDER) - quotient)


@compiled
def exact_sums(kind, weight, unit_J, scale_J, zero_J, smallest, largest, sum_J):  # type: ignore[no-untyped-def]
    """The sum over the unit of what `_distances` gives, for each job."""
    tile, power = np.empty((weight.b, EXACT_LANES), np.float32), np.empty((weight.b, EXACT_LANES), np.float32)
    of_lines, words = np.empty((weight.a, EXACT_LANES), np.float32), np.empty((WORDS, EXACT_LANES), np.uint32)
    start, row, word = np.empty(EXACT_LANES, np.int64), np.empty(EXACT_LANES, np.int64), np.empty(EXACT_LANES, np.int64)
    scale, zero = np.empty(EXACT_LANES, np.float32), np.empty(EXACT_LANES, np.float32)
    for first in range(0, len(unit_J), EXACT_LANES):
        for lane in range(EXACT_LANES):
            job = min(first + lane, len(unit_J) - 1)
            row[lane], word[lane] = _row_and_word(weight, unit_J[job])
            scale[lane], zero[lane] = scale_J[job], zero_J[job]
        for line in range(weight.a):
            for lane in range(EXACT_LANES):
                start[lane] = _start_of(weight, row[lane] + line, word[lane])
            _load_lines(weight, start, tile, words)
            _distances(kind, tile, scale, zero, smallest, largest, power)
            _fold(power, weight.b)
            of_lines[line] = power[0]
        _fold(of_lines, weight.a)
        for lane in range(min(EXACT_LANES, len(unit_J) - first)):
            sum_J[first + lane] = of_lines[0, lane]


# --- roughly ---------------------------------------------------------------------------------------------------------


@contracted
def _squares(tile, scale, part):  # type: ignore[no-untyped-def]
    """The sum of (weight / scale) ** 2 in each lane, roughly."""
    part[:] = 0
    reciprocal = np.float32(1) / scale
    for j in range(len(tile)):
        for lane in range(LANES):
            quotient = tile[j, lane] * reciprocal[lane]
            part[lane] += quotient * quotient


@contracted
def _rough_sums(kind, tile, scale, zero, smallest, largest, part):  # type: ignore[no-untyped-def]
    """The sum in each lane of what `_distances` gives, roughly."""
    part[:] = 0
    reciprocal = np.float32(1) / scale
    if kind == E4M3:
        for j in range(len(tile)):
            for lane in range(LANES):
                quotient = tile[j, lane] * reciprocal[lane]
                part[lane] += rough_power_2_4(nearest_e4m3(quotient) - abs(quotient))
    elif kind == E2M1:
        for j in range(len(tile)):
            for lane in range(LANES):
                quotient = tile[j, lane] * reciprocal[lane]
                part[lane] += rough_power_2_4(nearest_e2m1(quotient) - abs(quotient))
    else:
        for j in range(len(tile)):
            for lane in range(LANES):
                quotient = tile[j, lane] * reciprocal[lane] + zero[lane]
                nearest = smallest if quotient < smallest else quotient
                nearest = largest if nearest > largest else nearest
                part[lane] += rough_power_2_4(((nearest + ROUNDER) - ROUNDER) - quotient)


@compiled
def _load_lanes(of_units, unit, lanes):  # type: ignore[no-untyped-def]
    """The number of the unit that is in each lane."""
    if unit[LANES - 1] - unit[0] == LANES - 1:
        lanes[:] = of_units[unit[0] : unit[0] + LANES]
    else:
        for lane in range(LANES):
            lanes[lane] = of_units[unit[lane]]


@compiled
def _add_lanes(lanes, num_lanes, unit, of_units):  # type: ignore[no-untyped-def]
    """Add to each unit what is in its lanes."""
    if unit[LANES - 1] - unit[0] == LANES - 1:
        of_lanes = of_units[unit[0] : unit[0] + LANES]
        for lane in range(LANES):
            of_lanes[lane] += lanes[lane]
    else:
        for lane in range(num_lanes):
            of_units[unit[lane]] += lanes[lane]


@compiled
def _piece_length(b):  # type: ignore[no-untyped-def]
    """Lanes hold *pieces* of lines, so that there are enough of them whatever the unit is."""
    return PIECE if b % PIECE == 0 else b


@compiled
def _load_pieces(weight, unit_V, tiles, unit_TL):  # type: ignore[no-untyped-def]
    """All pieces of some units into the lanes of tiles; in `unit_TL`, which of `unit_V` each belongs to. Returns how many tiles."""
    piece_words = tiles.shape[1] // weight.per_word
    start, words = np.zeros(LANES, np.int64), np.empty((WORDS, LANES), np.uint32)
    number = lane = 0
    for i in range(len(unit_V)):
        row, first_word = _row_and_word(weight, unit_V[i])
        for line in range(weight.a):
            for word in range(first_word, first_word + weight.b // weight.per_word, piece_words):
                start[lane], unit_TL[number, lane] = _start_of(weight, row + line, word), i
                lane += 1
                if lane == LANES:
                    _load_tile(weight, start, tiles[number], words)
                    number, lane = number + 1, 0
    if lane:
        start[lane:], unit_TL[number, lane:] = start[lane - 1], len(unit_V) - 1
        _load_tile(weight, start, tiles[number], words)
        number += 1
    return number


@compiled
def _first_totals(kind, num_pieces, tiles, unit_TL, scale, zero, smallest, largest, total):  # type: ignore[no-untyped-def]
    """For each unit the rough sum of the first candidate into `total`, [Q, V].

    Returns its smallest scale, and the rough sum of (weight / that) ** 2, [V].
    """
    smallest_scale = scale[0].copy()
    for q in range(1, len(scale)):
        for i in range(len(smallest_scale)):
            smallest_scale[i] = min(smallest_scale[i], scale[q, i])
    squares, part = np.zeros(len(smallest_scale), np.float32), np.empty(LANES, np.float32)
    scale_lanes, zero_lanes = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for number in range(len(tiles)):
        tile, unit, num_lanes = tiles[number], unit_TL[number], min(LANES, num_pieces - number * LANES)
        _load_lanes(smallest_scale, unit, scale_lanes)
        _squares(tile, scale_lanes, part)
        _add_lanes(part, num_lanes, unit, squares)
        _load_lanes(scale[0], unit, scale_lanes)
        _load_lanes(zero[0], unit, zero_lanes)
        _rough_sums(kind, tile, scale_lanes, zero_lanes, smallest, largest, part)
        _add_lanes(part, num_lanes, unit, total[0])
    return smallest_scale, squares


@compiled
def _other_totals(kind, num_pieces, tiles, unit_TL, scale, zero, smallest, largest, can_win, total):  # type: ignore[no-untyped-def]
    """The rough sum of the other candidates that can win, into `total`."""
    part, scale_lanes, zero_lanes = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for number in range(len(tiles)):
        unit = unit_TL[number]
        for q in range(1, len(scale)):
            if can_win[q, unit[0] : unit[LANES - 1] + 1].any():
                _load_lanes(scale[q], unit, scale_lanes)
                _load_lanes(zero[q], unit, zero_lanes)
                _rough_sums(kind, tiles[number], scale_lanes, zero_lanes, smallest, largest, part)
                _add_lanes(part, min(LANES, num_pieces - number * LANES), unit, total[q])


# --- what cannot win -------------------------------------------------------------------------------------------------


@compiled
def _is_new(scale, zero):  # type: ignore[no-untyped-def]
    """Which candidates are not the one before, [Q, V]: of equal ones only the first can win."""
    is_new = np.ones(scale.shape, np.int32)
    for q in range(1, len(scale)):
        for unit in range(scale.shape[1]):
            is_new[q, unit] = (scale[q, unit] != scale[q - 1, unit]) | (zero[q, unit] != zero[q - 1, unit])
    return is_new


@compiled
def _note_clear(factor, least, q, can_win, total, is_clear):  # type: ignore[no-untyped-def]
    """Make errors of the rough sums of a candidate, and note units in which such a sum is below the `least` for which the bound holds."""
    for unit in range(len(least)):
        error = total[q, unit] * factor[q, unit]
        is_clear[unit] &= ((total[q, unit] >= least[unit]) & (error > SMALLEST) & (error < LARGEST)) | (can_win[q, unit] == 0)
        total[q, unit] = error


@compiled
def _rule_out_by_amax(kind, amax_V, scale, zero, factor, smallest, largest, bound, is_clear, can_win):  # type: ignore[no-untyped-def]
    """Candidates whose error is above the bound for the number of the largest magnitude alone: those that cut it off.

    No sum is less than one of its terms, which is computed as in the reference, for both signs that the number may have. The last
    candidate, which as a rule cuts off most, comes first; where it could win in all units, no other is tried.
    """
    num_candidates, num_units = scale.shape
    tile, power = np.empty((2, EXACT_LANES), np.float32), np.empty((2, EXACT_LANES), np.float32)
    scale_lanes, zero_lanes = np.empty(EXACT_LANES, np.float32), np.empty(EXACT_LANES, np.float32)
    for first in range(0, num_units, EXACT_LANES):
        for lane in range(EXACT_LANES):
            unit = min(first + lane, num_units - 1)
            tile[0, lane], tile[1, lane] = amax_V[unit], -amax_V[unit]
        for q in range(num_candidates - 1, 0, -1):
            for lane in range(EXACT_LANES):
                unit = min(first + lane, num_units - 1)
                scale_lanes[lane], zero_lanes[lane] = scale[q, unit], zero[q, unit]
            _distances(kind, tile, scale_lanes, zero_lanes, smallest, largest, power)
            num_lost = 0
            for lane in range(min(EXACT_LANES, num_units - first)):
                unit = first + lane
                if is_clear[unit] and min(power[0, lane], power[1, lane]) * factor[q, unit] > bound[unit]:
                    can_win[q, unit] = 0
                    num_lost += 1
            if not num_lost:
                break


@compiled
def _candidates_left(kind, weight, unit_V, amax_V, scale, zero, smallest, largest, tiles, last_V, count_V):  # type: ignore[no-untyped-def]
    """Which candidates may win in each unit, [Q, V]; the last of them, and how many. `tiles` is memory for all pieces."""
    num_candidates, num_units = scale.shape
    unit_numbers, unit_pieces = np.float32(weight.a * weight.b), weight.a * weight.b // tiles.shape[1]
    margin = np.float32(1 + 2.1 * (SUM_ERROR + ROUNDING * (tiles.shape[1] + unit_pieces)))  # (1 + e) / (1 - e)
    factor, total = np.empty(scale.shape, np.float32), np.zeros(scale.shape, np.float32)
    largest_zero, is_clear = np.zeros(num_units, np.float32), np.ones(num_units, np.int32)
    for q in range(num_candidates):
        for unit in range(num_units):
            factor[q, unit] = power_2_4(scale[q, unit] / scale[0, unit])
            largest_zero[unit] = max(largest_zero[unit], abs(zero[q, unit]))
    can_win = _is_new(scale, zero)
    unit_TL = np.empty((len(tiles), LANES), np.int64)
    filled = tiles[: _load_pieces(weight, unit_V, tiles, unit_TL)]
    codes, num_pieces = (smallest, largest), num_units * unit_pieces
    smallest_scale, least_total = _first_totals(kind, num_pieces, filled, unit_TL, scale, zero, *codes, total)
    for unit in range(num_units):
        most = amax_V[unit] / smallest_scale[unit]
        size = power_2_4(most) / (most * most) * least_total[unit] * SQUARES_ERROR + unit_numbers * power_2_4(largest_zero[unit])
        least_total[unit] = max(size * CLEAR_POWER, unit_numbers * LEAST_MEAN)
    _note_clear(factor, least_total, 0, can_win, total, is_clear)
    if unit_pieces > 1 or tiles.shape[1] == PIECE:  # of smaller units so many are in a tile that no candidate loses in all
        _rule_out_by_amax(kind, amax_V, scale, zero, factor, *codes, total[0] * margin, is_clear, can_win)
    _other_totals(kind, num_pieces, filled, unit_TL, scale, zero, *codes, can_win, total)
    least = total[0].copy()
    for q in range(1, num_candidates):
        _note_clear(factor, least_total, q, can_win, total, is_clear)
        for unit in range(num_units):
            least[unit] = total[q, unit] if (can_win[q, unit] != 0) & (total[q, unit] < least[unit]) else least[unit]
    count_V[:] = 0
    for q in range(num_candidates):
        for unit in range(num_units):
            may = (can_win[q, unit] != 0) & ((is_clear[unit] == 0) | (total[q, unit] <= least[unit] * margin))
            can_win[q, unit] = may
            count_V[unit] += may
            last_V[unit] = q if may else last_V[unit]
    return can_win


@compiled
def _units_to_search(scale, zero):  # type: ignore[no-untyped-def]
    """The units in which not all candidates are one."""
    differs = np.zeros(scale.shape[1], np.bool_)
    for q in range(1, len(scale)):
        for unit in range(len(differs)):
            differs[unit] |= (scale[q, unit] != scale[0, unit]) | (zero[q, unit] != zero[0, unit])
    return np.flatnonzero(differs)


@compiled
def _gathered(of_units, unit_V):  # type: ignore[no-untyped-def]
    """[Q, V] of [Q, U]; not a part of some lines, which numba could not vectorize."""
    gathered, first = np.empty((len(of_units), len(unit_V)), np.float32), unit_V[0]
    for q in range(len(of_units)):
        if unit_V[-1] - first == len(unit_V) - 1:
            gathered[q] = of_units[q, first : first + len(unit_V)]
        else:
            for i in range(len(unit_V)):
                gathered[q, i] = of_units[q, unit_V[i]]
    return gathered


@compiled
def best_candidates(kind, weight, amax_U, scale_QU, zero_QU, smallest, largest, index_U):  # type: ignore[no-untyped-def]
    """The candidate with the least error for each unit, the first of equals; the very first where its error is not a number.

    `amax_U`: the largest magnitude in each unit.
    """
    unit_S = _units_to_search(scale_QU, zero_QU)
    can_win, last_S, count_S = (
        np.empty((len(scale_QU), len(unit_S)), np.bool_),
        np.empty(len(unit_S), np.int32),
        np.empty(len(unit_S), np.int32),
    )
    length = _piece_length(weight.b)
    unit_pieces = weight.a * weight.b // length
    at_once = max(TILES * LANES // unit_pieces, 1)
    tiles = np.empty((-(-at_once * unit_pieces // LANES), length, LANES), np.float32)
    for first in range(0, len(unit_S), at_once):
        part = slice(first, first + at_once)
        unit_V = unit_S[part]
        scale, zero = _gathered(scale_QU, unit_V), _gathered(zero_QU, unit_V)
        can_win[:, part] = _candidates_left(
            kind, weight, unit_V, amax_U[unit_V], scale, zero, smallest, largest, tiles, last_S[part], count_S[part]
        )
    index_U[:] = 0
    index_U[unit_S] = last_S
    _choose_exactly(kind, weight, unit_S, count_S, can_win, scale_QU, zero_QU, smallest, largest, index_U)


@compiled
def _choose_exactly(kind, weight, unit_S, count_S, can_win, scale_QU, zero_QU, smallest, largest, index_U):  # type: ignore[no-untyped-def]
    """The best of the candidates that are left, for each unit in which it is not the only one."""
    num_candidates = len(scale_QU)
    most_jobs = num_candidates * min(len(unit_S), UNITS)
    unit_J, candidate_J = np.empty(most_jobs, np.int64), np.empty(most_jobs, np.int64)
    scale_J, zero_J, sum_J = np.empty(most_jobs, np.float32), np.empty(most_jobs, np.float32), np.empty(most_jobs, np.float32)
    undecided = np.flatnonzero(count_S > 1)
    for first in range(0, len(undecided), UNITS):
        job = 0
        for i in undecided[first : first + UNITS]:
            for q in range(num_candidates):
                if can_win[q, i]:
                    unit = unit_S[i]
                    unit_J[job], candidate_J[job], scale_J[job], zero_J[job] = unit, q, scale_QU[q, unit], zero_QU[q, unit]
                    job += 1
        exact_sums(kind, weight, unit_J[:job], scale_J[:job], zero_J[:job], smallest, largest, sum_J)
        before, least = -1, LARGEST
        for j in range(job):
            unit = unit_J[j]
            error = sum_J[j] * power_2_4(scale_J[j] / scale_QU[0, unit])
            if unit != before or error < least:
                index_U[unit], least, before = candidate_J[j], error, unit
