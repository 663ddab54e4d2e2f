"""What the weights of a layer are multiplied with, seen where it happens: in calls of torch, whatever the modules are called.

A weight is known by the memory it lies in, so a slice of a stack of experts counts as the expert's own. Norms are followed to what reads
their output, through copies that keep its columns as they are; whatever else is done with it is remembered as well, for then a scale
cannot be moved from the norm into what reads it.
Legend: T tokens, K in_features, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from streamquant.calibrate.skeleton import Site


class Linear(NamedTuple):
    """A matrix that inputs are multiplied with: a parameter of a layer, or an expert in it."""

    parameter: str
    expert: int | None


OnInput = Callable[[Linear, Tensor], None]

# Products, and where among the arguments the input and the weight are.
PRODUCTS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm), (0, 1)),
    torch.Tensor.__matmul__: (0, 1),
    **dict.fromkeys((torch.addmm, torch.baddbmm), (1, 2)),
}
# What copies without a change to the values of a column. What makes no copy is known by its memory.
COPIES = {"to", "type", "type_as", "float", "bfloat16", "half", "contiguous", "clone", "reshape", "flatten", "repeat", "repeat_interleave",
          "__getitem__", "index_select", "split", "chunk", "unbind"}  # fmt: skip
CASTS = {"to", "type", "type_as", "float", "bfloat16", "half", "contiguous"}
UNREAD = {"zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full"}
LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # of another tensor they take no values
WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"}
OUTPUT = "output of the layer"


class Tap(TorchFunctionMode):
    """While it is entered, hands on the input of every product with a parameter of a layer, as [T, K] and as it is given.

    With `every_expert`, each expert is given all tokens once beforehand, for the tap alone, and what then is routed to it is only
    counted. Experts of Llama 4, which are all run at once, show only what is routed to them. With `cache` the keys and values of
    attention are looked at as well.
    """

    def __init__(self, layer: nn.Module, on_input: OnInput, *, every_expert: bool, cache: bool = False):
        super().__init__()
        self._cache = cache
        self.cache_amax: tuple[float, float] | None = None  # the largest magnitudes of keys, with their positions, and of values
        self._layer, self._on_input, self._every_expert = layer, on_input, every_expert
        self._norms = {f"{name}.weight": module for name, module in layer.named_modules() if _is_norm(module)}
        self._experts = {name: module for name, module in layer.named_modules() if _num_experts(module)}
        self._parameter_at: dict[int, tuple[str, Tensor]] = {}  # by the address of its memory
        self._casts = WeakTensorKeyDictionary()  # copy of a parameter, or of an expert's -> which
        self._norm_of = WeakTensorKeyDictionary()  # output of a norm, or copy of that -> name of its weight
        self._readers: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._others: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._routed: dict[str, Tensor] = {}  # by module: tokens of each expert
        self._silent: set[str] = set()  # parameters whose inputs are known already
        self._all_tokens_TK: Tensor | None = None  # which every expert is being given
        self._flat_of = WeakTensorKeyDictionary()  # input of a product -> the same as [T, K]
        self._handles: list[RemovableHandle] = []

    # --- what was seen ----------------------------------------------------------------------------------------------

    @property
    def norm_readers(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters that are multiplied with the output of a norm, by the name of its weight; of norms that nothing else reads."""
        return {norm: tuple(self._readers[norm]) for norm in self._norms if self._readers.get(norm) and not self._others.get(norm)}

    @property
    def other_readers(self) -> Mapping[str, tuple[str, ...]]:
        """What else is done with the outputs of the other norms, by names of torch."""
        return {norm: tuple(operations) for norm, operations in self._others.items() if operations}

    def norm_offset(self, norm: str) -> float:
        """What a norm adds to its weight before it multiplies with it."""
        return float(norm_has_offset(self._norms[norm]))

    def routed_tokens(self, site: Site) -> int | None:
        """How many tokens the router has sent to the expert; None for what is no expert."""
        counts = self._routed.get(site.parameter.rpartition(".")[0])
        return None if counts is None or site.expert is None else int(counts[site.expert])

    # --- hooks ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._parameter_at = {_address(parameter): (name, parameter) for name, parameter in self._layer.named_parameters()}
        for name, module in self._norms.items():
            self._handles.append(module.register_forward_hook(self._after_norm(name)))
        for name, module in self._experts.items():
            self._handles.append(module.register_forward_pre_hook(self._before_experts(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after_experts, always_call=True))
        self._handles.append(self._layer.register_forward_hook(self._after_layer))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._casts.clear()
        self._norm_of.clear()
        self._flat_of.clear()

    def _after_norm(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            if isinstance(output, Tensor):
                self._norm_of[output] = name

        return note

    def _after_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        for tensor in _tensors(output):
            if tensor in self._norm_of:
                self._others[self._norm_of[tensor]][OUTPUT] = None
        self._forget()

    def _before_experts(self, name: str) -> Callable[..., None]:
        def show_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            chosen = next((value for value in tensors if value.dtype in (torch.int64, torch.int32) and value.ndim == 2), None)
            if chosen is None:
                return
            num_experts = _num_experts(module)
            counts = torch.bincount(chosen[(chosen >= 0) & (chosen < num_experts)], minlength=num_experts)
            self._routed[name] = self._routed[name] + counts if name in self._routed else counts
            if self._every_expert:
                self._show_all(module, args, kwargs, chosen, num_experts)
                self._silent = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}

        return show_all

    def _show_all(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], chosen: Tensor, num_experts: int) -> None:
        """Run one expert after the other on all tokens; what they give is not used."""
        weights = [value for value in (*args, *kwargs.values()) if _is_weight_of(value, chosen)]
        one = torch.ones_like(weights[0][:, :1]) if weights else None
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()), None)
        self._all_tokens_TK = None if hidden is None else hidden.reshape(-1, hidden.shape[-1])

        def only(value: Any, expert: int) -> Any:
            if value is chosen:
                return torch.full_like(chosen[:, :1], expert)
            return one if any(value is weight for weight in weights) else value

        with torch.no_grad():
            for expert in range(num_experts):
                module.forward(*(only(value, expert) for value in args), **{key: only(value, expert) for key, value in kwargs.items()})
        self._all_tokens_TK = None

    def _after_experts(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        self._silent = set()

    # --- calls of torch ---------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._cache and func is F.scaled_dot_product_attention:
            self._note_cache(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        if tensors:
            self._observe(func, tensors, args, kwargs, result)
        return result

    def _observe(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", "")
        input_, weight = _product(func, args, kwargs)
        place = None if weight is None else self._multiplied(weight, in_features=-1 if func is F.linear else -2)
        if place is not None and input_ is not None and weight is not None:
            self._note_product(place, input_, weight)
        elif name in CASTS and isinstance(result, Tensor) and (cast := self._place(tensors[0])) is not None:
            self._casts[result] = cast
        for tensor in tensors:
            if tensor in self._norm_of and not (name in LIKE and tensor is not tensors[0]):
                parameter = place[0] if tensor is input_ and place is not None else None
                self._note_reader(self._norm_of[tensor], tensor, name, parameter, result)

    def _note_cache(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        del query, args, kwargs
        before = self.cache_amax or (0.0, 0.0)
        self.cache_amax = max(before[0], float(key.abs().amax())), max(before[1], float(value.abs().amax()))

    def _note_reader(self, norm: str, tensor: Tensor, name: str, parameter: str | None, result: Any) -> None:
        if parameter is not None:
            self._readers[norm][parameter] = None
        elif name in WRITES or (name.endswith("_") and not name.endswith("__")):
            self._others[norm][name] = None
        elif name not in UNREAD:
            for output in _tensors(result):
                if _keeps_columns(tensor, output, name):
                    self._norm_of[output] = norm
                else:
                    self._others[norm][name] = None

    def _place(self, weight: Tensor) -> tuple[str, int | None] | None:
        """The parameter, and the expert in it, that a tensor is; the expert is None for the whole."""
        if weight in self._casts:
            place: tuple[str, int | None] = self._casts[weight]
            return place
        name, parameter = self._parameter_at.get(_address(weight), ("", None)) if weight.is_floating_point() else ("", None)
        if parameter is None or not weight.numel():
            return None
        if parameter.ndim == 3 and weight.ndim == 2:
            return name, (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        return name, None

    def _multiplied(self, weight: Tensor, *, in_features: int) -> tuple[str, int | None] | None:
        """The same of one side of a product; None for a matrix whose rows are no out_features, as in GPT-2."""
        place = self._place(weight)
        is_turned = place is not None and self._layer.get_parameter(place[0]).ndim == 2 and weight.stride(in_features) != 1
        return None if is_turned else place

    def _note_product(self, place: tuple[str, int | None], input_: Tensor, weight: Tensor) -> None:
        name, expert = place
        if name in self._silent:
            return
        if weight.ndim == 3:
            if input_.ndim not in (2, 3) or (input_.ndim == 3 and len(input_) not in (1, len(weight))):
                return
            for number, input_TK in enumerate(input_.expand(len(weight), *input_.shape[-2:])):
                shown = input_TK.abs().amax(1) > 0  # of experts that are all run at once, tokens of others are zeros
                self._count(name, number, len(weight), int(shown.sum()))
                self._on_input(Linear(name, number), input_TK[shown])
            return
        if input_ not in self._flat_of:
            self._flat_of[input_] = self._flat(input_)
        self._on_input(Linear(name, expert), self._flat_of[input_])  # the same tensor for all that are given the same

    def _flat(self, input_: Tensor) -> Tensor:
        input_TK = input_.reshape(-1, input_.shape[-1])
        everything_TK = self._all_tokens_TK
        if everything_TK is not None and input_TK.shape == everything_TK.shape and torch.equal(input_TK, everything_TK):
            return everything_TK
        return input_TK

    def _count(self, name: str, expert: int, num_experts: int, num_tokens: int) -> None:
        """Tokens of an expert, where only its input tells: that of the first parameter of the module."""
        module = name.rpartition(".")[0]
        first = next(parameter for parameter, _ in self._layer.get_submodule(module).named_parameters(recurse=False))
        if name == f"{module}.{first}":
            self._routed.setdefault(module, torch.zeros(num_experts, dtype=torch.int64))[expert] += num_tokens


def norm_has_offset(module: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight: with a weight of zero it still gives something."""
    parameters = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    weight_K = parameters["weight"]
    input_TK = torch.linspace(-1.0, 2.0, 2 * len(weight_K), dtype=weight_K.dtype, device=weight_K.device).view(2, -1)
    with torch.no_grad():
        try:
            output_TK = torch.func.functional_call(module, parameters, (input_TK,))
        except (AttributeError, TypeError):  # of gated norms, which take two
            output_TK = torch.func.functional_call(module, parameters, (input_TK, input_TK))
    return bool(output_TK.abs().amax() > 0)


def _is_norm(module: nn.Module) -> bool:
    """Whether it may be a norm: all it has is a weight for each column, and perhaps a bias."""
    if any(True for _ in module.children()):
        return False
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return shapes.keys() in ({"weight"}, {"weight", "bias"}) and len(set(shapes.values())) == 1 and len(shapes["weight"]) == 1


def _num_experts(module: nn.Module) -> int:
    """The number of experts that a module holds in parameters of three dimensions, or 0."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0
    return next((len(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim == 3), 0)


def _is_weight_of(value: Any, chosen: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == chosen.shape


def _product(func: Any, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The input and the weight, if this multiplies two tensors."""
    if func not in PRODUCTS:
        return None, None
    first, second = PRODUCTS[func]
    if len(args) > second:
        input_, weight = args[first], args[second]
    else:
        input_, weight = (args[0] if args else kwargs.get("input")), kwargs.get("weight")
    return (input_, weight) if isinstance(input_, Tensor) and isinstance(weight, Tensor) and weight.ndim > 1 else (None, None)


def _keeps_columns(tensor: Tensor, output: Tensor, name: str) -> bool:
    """Whether a result has the columns of what it is made of, with their values."""
    if not output.ndim or output.shape[-1] != tensor.shape[-1]:
        return False
    if _address(output) == _address(tensor):
        return output.stride(-1) == tensor.stride(-1) == 1
    return name in COPIES


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
