"""The loop over the columns of a block in `calibrate/gptq.py`, compiled by numba.

A few rows of the weight are taken through the whole block before the next, so that their errors stay in the nearest cache. Here
a * b + c is rounded once, so that bits differ from those of the reference, and between processors.
Legend: calibrate/gptq.py.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from streamquant.kernels.instructions import ROUNDER, contracted, nearest_e2m1, nearest_e4m3
from streamquant.kernels.search import E2M1, E4M3, kind_of
from streamquant.schemes.codes import Codes

LANES = 256  # rows at a time
NO_ZERO = np.zeros((0, 0), dtype=np.float32)


def quantize_block(
    codes: Codes, weight_BN: Tensor, target_BN: Tensor, factor_BB: Tensor, scale_BN: Tensor, zero_BN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq.quantize_columns`, by as many threads as torch has."""
    kind, smallest, largest = kind_of(codes)
    code_BN, error_BN = torch.empty_like(weight_BN), torch.empty_like(weight_BN)
    zero = NO_ZERO if zero_BN is None else zero_BN.numpy()
    arrays = weight_BN.numpy(), target_BN.numpy(), factor_BB.contiguous().numpy(), scale_BN.numpy(), zero, code_BN.numpy(), error_BN.numpy()
    quantize = partial(_quantize_rows, kind, smallest, largest, *arrays)
    num_rows, num_threads = weight_BN.shape[1], torch.get_num_threads()
    rows_each = -(-num_rows // (LANES * num_threads)) * LANES
    if rows_each >= num_rows:
        quantize(0, num_rows)
    else:
        with ThreadPoolExecutor(num_threads) as threads:
            starts = range(0, num_rows, rows_each)
            list(threads.map(quantize, starts, [min(start + rows_each, num_rows) for start in starts]))
    return code_BN, error_BN, target_BN


@contracted
def _quantize_rows(kind, smallest, largest, weight, target, factor, scale, zero, code, error, first, last):  # type: ignore[no-untyped-def]
    """Of rows `first` to `last`, codes and errors; what is left of the targets takes their place."""
    num_columns = len(weight)
    errors = np.zeros((num_columns, LANES), np.float32)
    wanted, divisor, shift = np.zeros(LANES, np.float32), np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
    nearest = np.zeros(LANES, np.float32)
    for start in range(first, last, LANES):
        lanes = min(LANES, last - start)
        for p in range(num_columns - 1, -1, -1):
            for lane in range(lanes):
                wanted[lane] = target[p, start + lane]
                divisor[lane] = scale[p, start + lane]
            if len(zero):
                for lane in range(lanes):
                    shift[lane] = zero[p, start + lane]
            for i in range(p + 1, num_columns):
                share = factor[p, i]
                for lane in range(LANES):
                    wanted[lane] -= share * errors[i, lane]
            if kind == E4M3:
                for lane in range(LANES):
                    quotient = wanted[lane] / divisor[lane]
                    size = nearest_e4m3(quotient)
                    nearest[lane] = -size if quotient < 0 else size
            elif kind == E2M1:
                for lane in range(LANES):
                    quotient = wanted[lane] / divisor[lane]
                    size = nearest_e2m1(quotient)
                    nearest[lane] = -size if quotient < 0 else size
            else:
                for lane in range(LANES):
                    quotient = wanted[lane] / divisor[lane] + shift[lane]
                    quotient = smallest if quotient < smallest else quotient
                    quotient = largest if quotient > largest else quotient
                    nearest[lane] = (quotient + ROUNDER) - ROUNDER
            for lane in range(lanes):
                value = (nearest[lane] - shift[lane]) * divisor[lane]
                code[p, start + lane] = nearest[lane]
                target[p, start + lane] = value - wanted[lane]
                error[p, start + lane] = value - weight[p, start + lane]
                errors[p, lane] = error[p, start + lane]
