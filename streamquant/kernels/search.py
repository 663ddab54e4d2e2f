"""Which of an observer's candidates fits each unit best, for processors: the result of the full grid, bit for bit, for a part of the work.

The error of a candidate is S * power_2_4(scale / first scale), S the sum of |code - quotient| ** 2.4 over the unit. S is first
computed roughly, for every candidate: the weight is multiplied by a reciprocal, the power is left after one correction, products and
sums are fused. Candidates whose rough error is more than a bound above the least one cannot win. What is left, seldom two for a unit,
is computed as in the reference.

The bound. With p = 2.4 and q the quotient, d = |code - q| is the distance of q from the set of codes, so if the rough quotient is off
by x, d is off by no more than |x|. Here |x| <= QUOTIENT_ERROR * (|w / scale| + |zero|). Over a unit S ** (1/p) is the p-norm of d, so by
Minkowski's inequality it is off by no more than the p-norm of x. A unit is *clear* if for all candidates the norm of d is CLEAR times
that of x; then S is off by p / CLEAR, relatively, and by POWER_ERROR and the rounding of the sum. In units that are not clear, as
those whose weights are codes already, every candidate is computed as in the reference.

Legend: compiled.py; J jobs, which are pairs of a unit and a candidate.
"""

import numpy as np

from streamquant.kernels.instructions import ROUNDER, compiled, contracted, fifth_root_guess, nearest_e2m1, nearest_e4m3, widened
from streamquant.schemes.codes import ByteIntegers, Codes, E2m1, E4m3, PackedIntegers

LANES = 64  # four vectors of float32 numbers; a loop over 16 LLVM would unroll before it thinks of vectors
EXACT_LANES = 32  # of long lines, which must fit the cache
PIECE = 128
UNITS = 512  # are looked through before what is left of them is computed exactly, all lanes full
E4M3, E2M1, INTEGER = range(3)
SMALLEST_SQUARE = np.float32(1e-18)

QUOTIENT_ERROR = 6 * 2.0**-24  # roundings, of w / s and of the sum with z, here and in the reference
POWER_ERROR = 7.2e-4  # test_kernels.py tries all numbers
CLEAR = 2000.0
# |w / s| + |z| to the power of 2.4 is at most 2 ** 1.4 times the sum of the powers.
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

    With t = value**2, y a guess of t**(-1/5) and u = t * y**5 near 1, it is (t * y**2)**2 * u**(-4/5), and a parabola does for the last.
    """
    t = value * value + SMALLEST_SQUARE
    y = fifth_root_guess(t)
    y2 = y * y
    root = t * y2
    u = root * (y2 * y)
    return root * root * ((u * np.float32(0.62224) + np.float32(-2.05125)) * u + np.float32(2.42962))


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


@compiled
def _load_lane(weight, a, b, row_units, unit, line, column, lane, tile):  # type: ignore[no-untyped-def]
    """Numbers of a line of a unit, from a column of it on, into a lane of the tile; zeros below the weight."""
    row, start = unit // row_units * a + line, unit % row_units * b + column
    if row < len(weight):
        for j in range(len(tile)):
            tile[j, lane] = widened(weight[row, start + j])
    else:
        tile[:, lane] = 0


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
def exact_sums(kind, weight, a, b, row_units, unit_J, scale_J, zero_J, smallest, largest, sum_J):  # type: ignore[no-untyped-def]
    """The sum over the unit of what `_distances` gives, for each job."""
    tile, power, of_lines = (
        np.empty((b, EXACT_LANES), np.float32),
        np.empty((b, EXACT_LANES), np.float32),
        np.empty((a, EXACT_LANES), np.float32),
    )
    unit_lanes, scale_lanes, zero_lanes = (
        np.empty(EXACT_LANES, np.int64),
        np.empty(EXACT_LANES, np.float32),
        np.empty(EXACT_LANES, np.float32),
    )
    for first in range(0, len(unit_J), EXACT_LANES):
        for lane in range(EXACT_LANES):
            job = min(first + lane, len(unit_J) - 1)
            unit_lanes[lane], scale_lanes[lane], zero_lanes[lane] = unit_J[job], scale_J[job], zero_J[job]
        for line in range(a):
            for lane in range(EXACT_LANES):
                _load_lane(weight, a, b, row_units, unit_lanes[lane], line, 0, lane, tile)
            _distances(kind, tile, scale_lanes, zero_lanes, smallest, largest, power)
            _fold(power, b)
            of_lines[line] = power[0]
        _fold(of_lines, a)
        for lane in range(min(EXACT_LANES, len(unit_J) - first)):
            sum_J[first + lane] = of_lines[0, lane]


# --- roughly ---------------------------------------------------------------------------------------------------------


@contracted
def _sizes(tile, scale, part):  # type: ignore[no-untyped-def]
    """The sum of |weight / scale| ** 2.4 in each lane, roughly."""
    part[:] = 0
    reciprocal = np.float32(1) / scale
    for j in range(len(tile)):
        for lane in range(LANES):
            part[lane] += rough_power_2_4(tile[j, lane] * reciprocal[lane])


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
    """The number of the unit that is in each lane. Returns whether one differs from what was in `lanes`."""
    differs = False
    if unit[LANES - 1] - unit[0] == LANES - 1:
        of_lanes = of_units[unit[0] : unit[0] + LANES]
        for lane in range(LANES):
            differs |= lanes[lane] != of_lanes[lane]
            lanes[lane] = of_lanes[lane]
    else:
        for lane in range(LANES):
            differs |= lanes[lane] != of_units[unit[lane]]
            lanes[lane] = of_units[unit[lane]]
    return differs


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
    return PIECE if b % PIECE == 0 else b


@compiled
def _rough_totals(kind, weight, a, b, row_units, first, scale, zero, smallest, largest):  # type: ignore[no-untyped-def]
    """For units from `first` on the rough sum of each candidate, [Q, V], and for the smallest scale that of |weight / scale| ** 2.4.

    Lanes hold *pieces* of lines, so that there are enough of them whatever the unit is.
    """
    num_candidates, num_units = scale.shape
    smallest_scale = scale[0].copy()
    for q in range(1, num_candidates):
        for i in range(num_units):
            smallest_scale[i] = min(smallest_scale[i], scale[q, i])
    length = _piece_length(b)
    line_pieces = b // length
    unit_pieces = a * line_pieces
    num_pieces = num_units * unit_pieces
    tile, unit, part = np.empty((length, LANES), np.float32), np.empty(LANES, np.int64), np.empty(LANES, np.float32)
    scale_lanes, zero_lanes = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    total, size = np.zeros((num_candidates, num_units), np.float32), np.zeros(num_units, np.float32)
    for start in range(0, num_pieces, LANES):
        num_lanes = min(LANES, num_pieces - start)
        for lane in range(LANES):
            piece = min(start + lane, num_pieces - 1)
            unit[lane] = piece // unit_pieces
            line, column = piece % unit_pieces // line_pieces, piece % line_pieces * length
            _load_lane(weight, a, b, row_units, first + unit[lane], line, column, lane, tile)
        _load_lanes(smallest_scale, unit, scale_lanes)
        _sizes(tile, scale_lanes, part)
        _add_lanes(part, num_lanes, unit, size)
        for q in range(num_candidates):
            is_new = _load_lanes(scale[q], unit, scale_lanes) | _load_lanes(zero[q], unit, zero_lanes)
            if q == 0 or is_new:
                _rough_sums(kind, tile, scale_lanes, zero_lanes, smallest, largest, part)
            _add_lanes(part, num_lanes, unit, total[q])
    return total, size


@compiled
def _rule_out(a, b, scale, zero, total, size, last):  # type: ignore[no-untyped-def]
    """Which candidates may win in each unit, [Q, V], how many, and in `last` the last of them. Of equal ones the first may."""
    num_units = len(size)
    number = np.float32(a * b)
    num_additions = _piece_length(b) + a * b // _piece_length(b)
    margin = np.float32(1 + 2.1 * (SUM_ERROR + ROUNDING * num_additions))  # (1 + e) / (1 - e)
    largest_zero, least = np.zeros(num_units, np.float32), np.full(num_units, LARGEST)
    can_win, count, is_clear = np.empty(scale.shape, np.int32), np.zeros(num_units, np.int32), np.ones(num_units, np.int32)
    for q in range(len(scale)):
        for unit in range(num_units):
            largest_zero[unit] = max(largest_zero[unit], abs(zero[q, unit]))
    for unit in range(num_units):
        size[unit] = max((size[unit] + number * power_2_4(largest_zero[unit])) * CLEAR_POWER, number * LEAST_MEAN)
    for q in range(len(scale)):
        for unit in range(num_units):
            error = total[q, unit] * power_2_4(scale[q, unit] / scale[0, unit])
            is_clear[unit] &= (total[q, unit] >= size[unit]) & (error > SMALLEST) & (error < LARGEST)
            least[unit] = min(least[unit], error)
            total[q, unit] = error
    for q in range(len(scale)):
        before = max(q - 1, 0)
        for unit in range(num_units):
            is_new = (q == 0) | (scale[q, unit] != scale[before, unit]) | (zero[q, unit] != zero[before, unit])
            may = is_new & ((is_clear[unit] == 0) | (total[q, unit] <= least[unit] * margin))
            can_win[q, unit] = may
            count[unit] += may
            last[unit] = q if may else last[unit]
    return can_win, count


@compiled
def best_candidates(kind, weight, a, b, row_units, scale_QU, zero_QU, smallest, largest, index_U):  # type: ignore[no-untyped-def]
    """The candidate with the least error for each unit, the first of equals; the very first where its error is not a number."""
    num_candidates, num_units = scale_QU.shape
    most_jobs = num_candidates * min(num_units, UNITS)
    unit_J, candidate_J = np.empty(most_jobs, np.int64), np.empty(most_jobs, np.int64)
    scale_J, zero_J, sum_J = np.empty(most_jobs, np.float32), np.empty(most_jobs, np.float32), np.empty(most_jobs, np.float32)
    for first in range(0, num_units, UNITS):
        index = index_U[first : first + UNITS]
        # Copies, since a part of some lines is nothing that numba could vectorize.
        scale, zero = scale_QU[:, first : first + UNITS].copy(), zero_QU[:, first : first + UNITS].copy()
        total, size = _rough_totals(kind, weight, a, b, row_units, first, scale, zero, smallest, largest)
        can_win, count = _rule_out(a, b, scale, zero, total, size, index)
        num_jobs = 0
        for unit in range(len(index)):
            if count[unit] > 1:
                for q in range(num_candidates):
                    if can_win[q, unit]:
                        unit_J[num_jobs], candidate_J[num_jobs] = first + unit, q
                        scale_J[num_jobs], zero_J[num_jobs] = scale[q, unit], zero[q, unit]
                        num_jobs += 1
        exact_sums(kind, weight, a, b, row_units, unit_J[:num_jobs], scale_J[:num_jobs], zero_J[:num_jobs], smallest, largest, sum_J)
        before, least = -1, LARGEST
        for job in range(num_jobs):
            unit = unit_J[job]
            error = sum_J[job] * power_2_4(scale_J[job] / scale_QU[0, unit])
            if unit != before or error < least:
                index_U[unit], least, before = candidate_J[job], error, unit
