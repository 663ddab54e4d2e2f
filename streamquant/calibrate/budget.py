"""How much of a model is worked on at a time while it is calibrated, and what memory that takes, told before anything is written.

Of a layer its weights are there, float32, and the Hessians of their inputs. On top of that comes whatever takes more: running a batch
through it, moving a scale, or solving some of its weights. The numbers of copies are measured (`benchmarks/README.md`), and rounded up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from streamquant.calibrate.method import Method
from streamquant.calibrate.skeleton import Site, Skeleton
from streamquant.errors import RequestError
from streamquant.inputs import Weight
from streamquant.memory import Container
from streamquant.names import fused_groups
from streamquant.sizes import enough_mebibytes, format_bytes

Matrices = Mapping[str, tuple[Site, Weight]]  # of a layer, by name

BATCH_TOKENS = 4096  # of sequences that are run together, at most
BATCH_ELEMENTS = 1 << 24  # of the widest that a layer makes of them, if that is more than one sequence
STACK_ELEMENTS = 1 << 24  # of weights with one input that are solved together, if that is more than one
SEARCHED_ROWS = 1024  # of a weight, to find a scale for its input: with 256 the outputs of wiki-llama are worse by 1.5 % (divergence)
MAX_EXPERT_BYTES = 2 << 30  # of the Hessians of all experts of a layer

FLOAT_BYTES = 4
RUN_COPIES = 5  # of the widest that a layer makes of a batch
EAGER_COPIES = 3  # of the scores of attention, where the model computes them one by one
SOLVE_COPIES = 7  # of a stack of weights
CLIP_COPIES = 2  # more, if its bounds are clipped
SEARCH_COPIES = 6  # of the rows that are looked at
LIBRARY_BYTES = 96 << 20  # of kernels that libraries make for the shapes of products, their threads, and whatever else is always there
READ_COPIES = 3  # of a weight: as it is stored, decoded, and in float32


class Needs(NamedTuple):
    """Memory that a calibration takes, in bytes."""

    weights: int  # of the layer that takes most
    hessians: int
    working: int
    reading: int  # on the host, for weights that are on the way into a layer

    @property
    def of_layer(self) -> int:
        """For a layer, where it is run."""
        return self.weights + max(self.hessians + self.working, self.reading)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "Hessians": self.hessians, "work": self.working}
        return ", ".join(f"{format_bytes(size)} for {part}" for part, size in parts.items() if size)


def hidden_budget(needs: Needs, *, max_bytes: int, container: Container | None = None, gpu_bytes: int | None = None) -> int:
    """How much of `max_bytes` the hidden states may take of the memory; past it they are in a file.

    `gpu_bytes`: what may be used of the GPU that layers run on, if it is no CPU. Raises RequestError if a layer does not fit.
    """
    if gpu_bytes is not None and needs.of_layer > gpu_bytes:
        least = enough_mebibytes(needs.of_layer)
        raise RequestError(
            f"calibrating a layer takes {least} of a GPU's memory ({needs}), and there are {gpu_bytes >> 20}MiB for it; "
            f"give --max-gpu-memory {least}, or --device cpu"
        )
    if container is None:
        return max_bytes
    taken = needs.of_layer if gpu_bytes is None else needs.reading
    if taken > container.free_bytes:
        raise RequestError(container.refusal(taken, f"calibrating a layer ({needs})"))
    return min(max_bytes, container.free_bytes - taken)


def hidden_bytes(skeleton: Skeleton, num_tokens: int) -> int:
    """What the hidden states of so many tokens take."""
    return num_tokens * skeleton.hidden_size * skeleton.dtype.itemsize * (2 if keeps_inputs(skeleton) else 1)


def keeps_inputs(skeleton: Skeleton) -> bool:
    """Whether what a layer was given stays there until it is finished: experts that starve are shown all of it."""
    return skeleton.has_experts


def tokens_of_batch(widest: int) -> int:
    """How many tokens run through a layer together, whose widest matrix has so many rows or columns."""
    return min(BATCH_TOKENS, BATCH_ELEMENTS // widest)


def widest_of(weights: Collection[Weight]) -> int:
    """The most that matrices make of a token, or take."""
    return max((max(weight.shape) for weight in weights), default=1)


def shows_every_expert(expert_columns: Collection[int]) -> bool:
    """Whether experts, whose inputs have so many columns, share Hessians of all tokens, for those of each would be too large."""
    return sum(FLOAT_BYTES * num_columns**2 for num_columns in expert_columns) > MAX_EXPERT_BYTES


def needs_of(
    skeleton: Skeleton,
    weights: Mapping[str, Weight],
    method: Method,
    lengths: Sequence[int],
    *,
    quantized: Set[str],
    outside: int = 0,
    num_ahead: int = 0,
) -> Needs:
    """What calibrating with samples of these lengths takes, besides the hidden states.

    `weights`: what the checkpoint has as matrices, by name; `quantized`: names of some. `outside`: bytes of what is outside of the layers,
    which is there before they are. `num_ahead`: weights that are being read before they are asked for.
    """
    most = Needs(outside, 0, 0, 0)
    for index in range(skeleton.num_layers):
        sites = skeleton.sites(index)
        matrices = {name: (site, weights[name]) for name, site in sites.items() if name in weights and not weights[name].is_vector}
        if matrices:
            largest = sorted(weight.decoded_bytes for _, weight in matrices.values())[-num_ahead - 1 :]
            needs = Needs(
                FLOAT_BYTES * sum(weight.num_elements * (1 + _is_copied(site)) for site, weight in matrices.values()),
                FLOAT_BYTES * _hessians(matrices, skeleton.hidden_size, method, quantized),
                FLOAT_BYTES * _working(matrices, skeleton, method, quantized, lengths) + LIBRARY_BYTES,
                READ_COPIES * sum(largest),
            )
            most = max(most, needs, key=lambda each: each.of_layer)
    return most


def _is_copied(site: Site) -> bool:
    """Whether a matrix does not lie in one piece in its parameter."""
    return site.transposed or site.step > 1


def _hessians(matrices: Matrices, hidden_size: int, method: Method, quantized: Set[str]) -> int:
    """Elements. What partners by their names are given is one input, whatever else is given is another."""
    if not method.uses_hessians:
        return 0
    chosen = {name: matrix for name, matrix in matrices.items() if method.scaling or name in quantized}
    groups = fused_groups((name.removesuffix(".weight"), weight.shape[1]) for name, (_, weight) in chosen.items())
    followers = {f"{module}.weight" for group in groups for module in group[1:]}
    leaders = [matrix for name, matrix in chosen.items() if name not in followers]
    others = [weight.shape[1] for site, weight in leaders if site.expert is None]
    experts = [weight.shape[1] for site, weight in leaders if site.expert is not None]
    if shows_every_expert(experts):
        experts = [hidden_size, *(num_columns for num_columns in experts if num_columns != hidden_size)]
    return sum(num_columns**2 for num_columns in (*others, *experts))


def _working(matrices: Matrices, skeleton: Skeleton, method: Method, quantized: Set[str], lengths: Sequence[int]) -> int:
    """Elements, of whatever takes most."""
    weights = [weight for _, weight in matrices.values()]
    tokens = min(max(tokens_of_batch(widest_of(weights)), *lengths), sum(lengths))
    running = RUN_COPIES * tokens * widest_of(weights) + EAGER_COPIES * tokens * max(lengths) * skeleton.eager_heads
    working = [running, *_solving([weight for name, (_, weight) in matrices.items() if name in quantized], method)]
    if method.scaling:
        working.append(running + 2 * _largest_pair(matrices, skeleton.hidden_size))
        working.append(SEARCH_COPIES * SEARCHED_ROWS * max(weight.shape[1] for weight in weights))
    return max(working)


def _solving(weights: Collection[Weight], method: Method) -> Iterator[int]:
    """Elements for the largest stack of weights with so many columns, one number after the other."""
    copies = SOLVE_COPIES + CLIP_COPIES * method.clips
    for num_columns in {weight.shape[1] for weight in weights}:
        sizes = [weight.num_elements for weight in weights if weight.shape[1] == num_columns]
        factor = num_columns**2 if method.solver == "gptq" else 0
        yield factor + copies * max(*sizes, min(sum(sizes), STACK_ELEMENTS))


def _largest_pair(matrices: Matrices, hidden_size: int) -> int:
    """Elements of the weights between which a scale is moved: what reads a norm, or a linear and the one that reads it."""
    readers: defaultdict[str, int] = defaultdict(int)
    for site, weight in matrices.values():
        if weight.shape[1] == hidden_size:
            readers[site.parameter.partition(".")[0]] += weight.num_elements
    two = sum(sorted(weight.num_elements for _, weight in matrices.values())[-2:])
    return max(two, *readers.values()) if readers else two
