"""GPTQ: codes chosen column by column, so that later columns make good the errors of those before, and plain rounding beside it.

Source: Frantar et al., arXiv 2210.17323. For each row of a weight, with error d, d H d^T shall be small, H = X^T X of a layer's inputs.
With H = R R^T, R upper triangular, it is the sum of the squares of d R. Given the codes of the columns before, what makes an element of
d R zero, and what the paper computes by way of the inverse of H, is

    target_p = weight_p - sum over i before p of d_i * R_ip / R_pp,

and with a code near it the element is (value_p - target_p) * R_pp, which tells the error of the result without another product with H.
Columns are kept in the reverse of the order in which they are quantized: LAPACK's H = U^T U is there this R, transposed.

The weight is worked on transposed, so that a column lies in one piece. Rows do not depend on each other.
Legend: schemes/scheme.py; B columns of a block; columns are in reverse order in `*_BN`, `error_KN`, `factor_KK` and `order_K`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from streamquant.errors import RequestError
from streamquant.lazy import torch
from streamquant.schemes.codes import Codes
from streamquant.schemes.kernels import TORCH, Kernels
from streamquant.schemes.scheme import Scheme
from streamquant.schemes.units import Scales, dequantize

if TYPE_CHECKING:
    from torch import Tensor

MAX_DAMPING = 1.0
MEASURED_ROWS = 256  # to measure the error of a row takes as long as to quantize it
MAX_STRIDE = 8
TINY = 1e-30
COLUMNS_AT_ONCE = 256  # of the Hessian, when an error is measured


@dataclass(frozen=True, slots=True)
class GptqOptions:
    damping: float = 0.01  # of the mean of the Hessian's diagonal, which it is added to; the least that is tried
    block_size: int = 128
    activation_order: bool = True  # the columns with the largest inputs first; groups stay where they are, so nothing is stored of it

    def __post_init__(self) -> None:
        if not 0 < self.damping <= MAX_DAMPING:
            raise RequestError(f"damping is {self.damping}; it is more than 0 and at most {MAX_DAMPING}")
        if self.block_size < 1:
            raise RequestError(f"block size {self.block_size} is less than 1")


DEFAULTS = GptqOptions()


class Solution(NamedTuple):
    """Codes of a weight, and what inputs with the Hessian make of the error d of each row: d H d^T, float64.

    In large weights errors are measured for evenly spaced rows, and those in between are taken to have the same. NaN without a Hessian.
    """

    code_NK: Tensor  # values of codes, float32: `scheme.pack(scheme.codes.of_value(code_NK), scales)` is what is stored
    scales: Scales
    error_before_N: Tensor  # of plain rounding with the same scales
    error_after_N: Tensor
    damping: float  # the one that worked, 0 if none was needed or none did
    fallback: str  # why the weight is plainly rounded, or ""

    @property
    def error_before(self) -> float:
        return float(self.error_before_N.sum())

    @property
    def error_after(self) -> float:
        return float(self.error_after_N.sum())


def gptq(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    scheme: Scheme,
    *,
    bounds_BRC: Tensor | None = None,
    shared: Tensor | None = None,
    options: GptqOptions = DEFAULTS,
    kernels: Kernels = TORCH,
    dtype: torch.dtype | None = None,
) -> Solution:
    """Quantize a weight for inputs with this Hessian, a sum of x^T x over tokens; a factor before it does not matter.

    `weight_NK`: finite; of `dtype`, the checkpoint's, or float32 numbers that stand for such. `bounds_BRC`, `shared`: as for
    `Scheme.encode`. Scales are those of plain rounding. Columns that no input ever reaches (zeros on the diagonal) get the code of zero.
    Plain rounding is kept if its error is no larger, or if the Hessian is of no use.
    """
    plain = round_to_nearest(weight_NK, scheme, hessian_KK=hessian_KK, bounds_BRC=bounds_BRC, shared=shared, kernels=kernels, dtype=dtype)
    if fault := _fault(hessian_KK):
        return plain._replace(fallback=fault)
    diagonal_K = hessian_KK.diagonal()
    if options.activation_order:
        order_K = diagonal_K.argsort(descending=True, stable=True).flip(0)
    else:
        order_K = torch.arange(len(diagonal_K), device=diagonal_K.device).flip(0)
    factor = _factor(hessian_KK, order_K, options.damping)
    if factor is None:
        return plain._replace(fallback=f"the Hessian is not positive definite, damped by {MAX_DAMPING} or less")
    code_NK, after_N = _feed_back(weight_NK, diagonal_K != 0, order_K, factor, scheme, plain.scales, options.block_size, kernels)
    after_N.mul_(_mean_diagonal(hessian_KK))
    is_lost_N = ~after_N.isfinite()
    if is_lost_N.any():
        code_NK[is_lost_N], after_N[is_lost_N] = plain.code_NK[is_lost_N], plain.error_before_N[is_lost_N]
    after_N = _spread_rows(after_N[spaced_rows(len(after_N))], len(after_N))
    if not after_N.sum() < plain.error_before_N.sum():
        return plain._replace(damping=factor.damping, fallback="the error is no less than that of plain rounding")
    return Solution(code_NK, plain.scales, plain.error_before_N, after_N, factor.damping, "")


def round_to_nearest(
    weight_NK: Tensor,
    scheme: Scheme,
    *,
    hessian_KK: Tensor | None = None,
    bounds_BRC: Tensor | None = None,
    shared: Tensor | None = None,
    kernels: Kernels = TORCH,
    dtype: torch.dtype | None = None,
) -> Solution:
    """Plain rounding, as `Scheme.encode` does it, with its error under the Hessian. Arguments as for `gptq`."""
    dtype, unit = dtype or weight_NK.dtype, scheme.unit(weight_NK.shape[1])
    if bounds_BRC is None:
        bounds_BRC = scheme.observe(weight_NK.to(dtype), kernels=kernels)
    if scheme.shares_amax and shared is None:
        shared = scheme.share(bounds_BRC.abs().amax().view(1), dtype)
    scales = scheme.scales(bounds_BRC, dtype, shared)
    code_NK = scheme.codes.unpack(kernels.codes(scheme.codes, weight_NK, unit, scales), weight_NK.shape[1])
    if hessian_KK is None:
        error_N = torch.full_like(weight_NK[:, 0], torch.nan, dtype=torch.float64)
    else:
        rows = spaced_rows(len(weight_NK))
        value_NK = dequantize(code_NK, scales.scale_RC, unit=unit, zero_RC=scales.zero_RC)[rows]
        error_N = _spread_rows(hessian_error(value_NK - weight_NK[rows], hessian_KK), len(weight_NK))
    return Solution(code_NK, scales, error_N, error_N, 0.0, "")


def hessian_error(error_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """d H d^T of each row d, float64 [N]. Only what is left of the Hessian's diagonal is read, and the diagonal."""
    total_N = torch.zeros(len(error_NK), dtype=torch.float64, device=error_NK.device)
    mean = _mean_diagonal(hessian_KK)
    if mean == 0:
        return total_N
    for start in range(0, len(hessian_KK), COLUMNS_AT_ONCE):
        end = start + COLUMNS_AT_ONCE
        hessian_BK = (hessian_KK[start:end, :end] / mean).float()
        hessian_BK[:, start:].mul_(0.5)  # the others count twice
        total_N += (error_NK[:, :end] @ hessian_BK.T).mul_(error_NK[:, start:end]).sum(1, dtype=torch.float64)
    return total_N.mul_(2 * mean)


def output_size(weight_NK: Tensor, hessian_KK: Tensor) -> float:
    """The sum of squares of what a weight gives for inputs with this Hessian, by the rows of which errors are measured; more than zero."""
    rows = spaced_rows(len(weight_NK))
    size: float = hessian_error(weight_NK[rows], hessian_KK).sum().item() * rows.step
    return max(size, TINY)


def spaced_rows(num_rows: int, enough: int = MEASURED_ROWS) -> slice:
    """Evenly spaced rows of a weight that stand for all: `enough` at most, but no fewer than one in MAX_STRIDE."""
    return slice(None, None, min(-(-num_rows // enough), MAX_STRIDE))


def _spread_rows(measured_M: Tensor, num_rows: int) -> Tensor:
    """To each row what was measured for it, or for the last one above it that was."""
    return measured_M.repeat_interleave(spaced_rows(num_rows).step)[:num_rows]


# --- the Hessian -----------------------------------------------------------------------------------------------------


class _Factor(NamedTuple):
    """H = U^T U, of a Hessian in `order_K`, divided by the mean of its diagonal and damped."""

    factor_KK: Tensor  # rows of U divided by the diagonal; float32, only what is right of the diagonal counts
    diagonal_K: Tensor  # that of U
    damping: float


def _fault(hessian_KK: Tensor) -> str:
    """Why a Hessian cannot be factored whatever the damping, or ""."""
    if not hessian_KK.sum(dtype=torch.float64).isfinite():  # shows every number that is not, and needs no memory
        return "the Hessian is not finite"
    diagonal_K = hessian_KK.diagonal()
    if (diagonal_K < 0).any():
        return "the Hessian has negative numbers on its diagonal"
    return "" if diagonal_K.any() else "the Hessian is zero"


def _mean_diagonal(hessian_KK: Tensor) -> float:
    """Of columns that are not dead."""
    diagonal_K = hessian_KK.diagonal()
    return float(diagonal_K.sum(dtype=torch.float64) / diagonal_K.count_nonzero().clamp(min=1))


def _factor(hessian_KK: Tensor, order_K: Tensor, damping: float) -> _Factor | None:
    """The factor with the least damping that works: in float32, then in float64, then with ten times as much."""
    while True:
        for dtype in (torch.float32, torch.float64):
            if (factor := _try_factor(hessian_KK, order_K, damping, dtype)) is not None:
                return factor
        if damping >= MAX_DAMPING:
            return None
        damping = min(10 * damping, MAX_DAMPING)


def _try_factor(hessian_KK: Tensor, order_K: Tensor, damping: float, dtype: torch.dtype) -> _Factor | None:
    """The only matrix that is allocated is the result, besides one in the Hessian's dtype if that is another."""
    factor_KK = hessian_KK[order_K[:, None], order_K].to(dtype).div_(_mean_diagonal(hessian_KK))
    diagonal_K = factor_KK.diagonal()
    diagonal_K.masked_fill_(diagonal_K == 0, 1.0).add_(damping)
    # LAPACK goes by columns: for it the transpose of what we have is in place.
    by_columns_KK, failed = factor_KK.mT, torch.empty((), dtype=torch.int32, device=factor_KK.device)
    torch.linalg.cholesky_ex(by_columns_KK, out=(by_columns_KK, failed))
    if failed or not (diagonal_K.isfinite() & (diagonal_K > 0)).all():
        return None
    diagonal_K = diagonal_K.clone()
    return _Factor(factor_KK.div_(diagonal_K[:, None]).float(), diagonal_K.float(), damping)


# --- columns ---------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Columns to be quantized from the last to the first."""

    weight_BN: Tensor
    target_BN: Tensor  # the weight, with the errors of all blocks before made good
    factor_BB: Tensor
    scale_BN: Tensor
    zero_BN: Tensor | None


class Quantized(NamedTuple):
    code_BN: Tensor
    error_BN: Tensor  # (code - zero) * scale - weight
    residual_BN: Tensor  # (code - zero) * scale - target


def _feed_back(
    weight_NK: Tensor,
    live_K: Tensor,
    order_K: Tensor,
    factor: _Factor,
    scheme: Scheme,
    scales: Scales,
    block_size: int,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """Values of codes, and the error of each row in units of the mean of the Hessian's diagonal (float64 [N])."""
    num_rows, num_columns = weight_NK.shape
    unit = scheme.unit(num_columns)
    unit_K = order_K // unit[1]
    scale_CN = _by_columns(scales.scale_RC, unit, weight_NK.shape)
    zero_CN = None if scales.zero_RC is None else _by_columns(scales.zero_RC, unit, weight_NK.shape)
    quantize = _quantizer(kernels)
    code_KN = weight_NK.T.clone(memory_format=torch.contiguous_format).float()  # as in the weight: codes take the weights' place
    code_KN.mul_(live_K[:, None])
    error_KN = code_KN[order_K]  # first the targets
    total_N = torch.zeros(num_rows, dtype=torch.float64, device=weight_NK.device)

    for start, middle, end in _halves(0, num_columns, block_size):
        if middle < end:
            error_KN[start:middle].addmm_(factor.factor_KK[start:middle, middle:end], error_KN[middle:end], alpha=-1)
            continue
        here = slice(start, end)
        zero_BN = None if zero_CN is None else zero_CN[unit_K[here]]
        block = Block(code_KN[order_K[here]], error_KN[here], factor.factor_KK[here, here], scale_CN[unit_K[here]], zero_BN)
        code_BN, error_BN, residual_BN = quantize(scheme.codes, block)
        total_N.add_(residual_BN.mul_(factor.diagonal_K[here, None]).square_().sum(0))
        total_N.sub_(error_BN.square().sum(0), alpha=factor.damping)
        code_KN[order_K[here]], error_KN[here] = code_BN, error_BN
    return code_KN.T.contiguous(), total_N.clamp_(min=0.0)


def _halves(start: int, end: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """A block is start, end, end; start, middle, end is the time to make good in the lower half what the upper half lost.

    By halves, so that most products are of large matrices.
    """
    if end - start <= block_size:
        yield start, end, end
        return
    middle = start + -(-(end - start) // (2 * block_size)) * block_size
    yield from _halves(middle, end, block_size)
    yield start, middle, end
    yield from _halves(start, middle, block_size)


def _by_columns(value_RC: Tensor, unit: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """To each row the value of its unit, for units one below the other in memory: [C, N]."""
    num_rows, num_columns = shape
    value_CR = value_RC.expand(-(-num_rows // unit[0]), -(-num_columns // unit[1])).T
    return value_CR.repeat_interleave(unit[0], dim=1)[:, :num_rows].contiguous()


def _quantizer(kernels: Kernels) -> Callable[[Codes, Block], Quantized]:
    if kernels.name == "numba":
        from streamquant.kernels.feedback import quantize_block  # numba is optional

        return lambda codes, block: Quantized(*quantize_block(codes, *block))
    return quantize_columns


def quantize_columns(codes: Codes, block: Block) -> Quantized:
    """The reference, on every device that torch has. Overwrites `target_BN`."""
    weight_BN, target_BN, factor_BB, scale_BN, zero_BN = block
    code_BN, error_BN = torch.empty_like(weight_BN), torch.empty_like(weight_BN)
    for p in reversed(range(len(weight_BN))):
        target_N = target_BN[p]
        if p + 1 < len(weight_BN):
            target_N.sub_(factor_BB[p, p + 1 :] @ error_BN[p + 1 :])
        quotient_N = target_N / scale_BN[p]
        if zero_BN is not None:
            quotient_N.add_(zero_BN[p])
        code_N = codes.value(codes.round(quotient_N))
        code_BN[p] = code_N
        if zero_BN is not None:
            code_N = code_N - zero_BN[p]
        torch.mul(code_N, scale_BN[p], out=error_BN[p])
        target_N.sub_(error_BN[p]).neg_()
        error_BN[p].sub_(weight_BN[p])
    return Quantized(code_BN, error_BN, target_BN)
