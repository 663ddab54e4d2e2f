"""A transformers model without its weights, run one decoder layer at a time.

The base model runs once with a stub in the place of every layer, which records what the model's own loop passes: masks, position
embeddings, whatever the architecture has. With that and the hidden states each layer can be run by itself, and gives bit for bit what
it gives in the whole model. Parameters are on the meta device until they are loaded; buffers are real, for rotary tables and embedding
scales are in no checkpoint.

Parameters need not be named as in the checkpoint: transformers' own tables rename, and the experts of a layer are parameters of three
dimensions, into which they are put one by one:

    rows         [E, 2I, H]  gate, then up; down [E, H, I]
    transposed   [E, H, 2I]  columns for rows; down [E, I, H]
    interleaved  gate and up take turns instead of following each other, in gpt-oss

Legend: B sequences, T tokens, H hidden size, N out_features, K in_features, E experts, I size of an expert.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from streamquant.errors import RequestError
from streamquant.inputs import Inventory, Stack

Read = Callable[[str], Tensor]  # a tensor of the checkpoint by name; of a stack of experts, the matrices of single ones
Shapes = Mapping[str, tuple[int, ...]]

INSTALL = "pip install 'streamquant[calibrate]'"
OLDEST = 5  # major version of transformers, from which experts are parameters of three dimensions

LARGE = 1 << 24  # elements, of parameters and of no buffer

SECOND = object()  # stands for what a layer returns besides the hidden states
FORMS: tuple[Callable[[Tensor], Any], ...] = (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, SECOND))

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.([^.]+)\.(weight|bias)")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_GATE_UP = ("gate_proj", "up_proj")


class Call(NamedTuple):
    """What a layer is given besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Site(NamedTuple):
    """Where in a module a tensor of the checkpoint is: the rows start, start + step ... of a parameter, or of one expert in it."""

    parameter: str  # or persistent buffer; by its name in the layer, or outside of the layers in the model
    expert: int | None = None
    start: int = 0
    stop: int | None = None
    step: int = 1
    transposed: bool = False  # the rows are columns there

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the parameter; [N, K] if it is a matrix."""
        part = parameter if self.expert is None else parameter[self.expert]
        return (part.T if self.transposed else part)[self.start : self.stop : self.step] if part.ndim else part


def shapes_of(inventory: Inventory) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that a checkpoint has: single experts in the place of their stack, their biases as columns [N, 1]."""
    shapes: dict[str, tuple[int, ...]] = {}
    for item in inventory.items:
        parts = (*item.weights, *item.biases) if isinstance(item, Stack) else ()
        tensors = parts or (item.tensors if isinstance(item, Stack) else (item,))
        shapes.update((part.name, tuple(part.shape)) for part in tensors)
    return shapes


def build_skeleton(folder: Path, shapes: Shapes, *, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The model that config.json in `folder` describes, for a checkpoint of tensors with these names and shapes.

    Reads no weights. Raises RequestError if transformers is not there or does not know the model, if it is no stack of decoder layers,
    or if the checkpoint lacks a parameter that is needed.
    """
    transformers = _transformers()
    config = _config(transformers, folder)
    with _parameters_on_meta():
        model = _from_config(transformers, config, dtype)
    return Skeleton(model.requires_grad_(False).eval(), config.get_text_config(), shapes, torch.device(device), dtype)


class Skeleton:
    """A model with the parameters of those layers that are loaded."""

    def __init__(self, model: Any, config: Any, shapes: Shapes, device: torch.device, dtype: torch.dtype):
        stack, self._layers = _only_stack(model, config.num_hidden_layers)
        self.layer_prefix = f"{stack}."  # in the model's own names
        decoder, self._decoder = _owner(model, stack)
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        is_eager = getattr(config, "_attn_implementation", None) == "eager"
        self.eager_heads: int = getattr(config, "num_attention_heads", 0) if is_eager else 0  # whose scores are all in memory
        self._model, self._device = model, device
        self._dtypes = _dtypes(model, dtype)
        self._forms = FORMS  # that what a layer returns may have; `record` finds out
        self.dtype = dtype  # of hidden states
        self._known: list[Tensor] = []  # tensors in the calls of the previous batch
        _move_buffers(self._decoder, device)
        sites = _Places(model, shapes).find()
        needed = _state(model, _dotted(decoder))
        outside = {parameter for parameter in needed if not parameter.startswith(self.layer_prefix)}
        self._outer = {name: site for name, site in sites.items() if site.parameter in outside}
        _check_cover({parameter: needed[parameter] for parameter in outside}, self._outer, shapes)
        self._as_stored = _cast_embeddings(model, outside, dtype)
        self._sites: list[dict[str, Site]] = [{} for _ in range(self.num_layers)]
        for name, site in sites.items():
            if site.parameter in needed and site.parameter not in outside:
                number, _, parameter = site.parameter.removeprefix(self.layer_prefix).partition(".")
                self._sites[int(number)][name] = site._replace(parameter=parameter)
        for index, of_layer in enumerate(self._sites):
            prefix = f"{self.layer_prefix}{index}."
            _check_cover(_state(self._layers[index], ""), of_layer, shapes, prefix=prefix)

    # --- what is where ----------------------------------------------------------------------------------------------

    @property
    def has_experts(self) -> bool:
        """Whether a layer has some."""
        return any(site.expert is not None for of_layer in self._sites for site in of_layer.values())

    @property
    def outer_names(self) -> tuple[str, ...]:
        """What `load_outer` reads: tensors of the checkpoint that are embeddings, and whatever else is outside of the layers."""
        return tuple(self._outer)

    def sites(self, index: int) -> Mapping[str, Site]:
        """What `load_layer` reads: all tensors of the checkpoint that make up a layer, in its order, and where in the layer they are."""
        return self._sites[index]

    def layer(self, index: int) -> nn.Module:
        """The module of a layer, loaded or not."""
        return self._layers[index]

    # --- weights ----------------------------------------------------------------------------------------------------

    def load_outer(self, read: Read) -> None:
        """Load what `record` needs."""
        self._load(self._model, "", self._outer, read)

    def drop_outer(self) -> None:
        """Free what `load_outer` has loaded."""
        for site in self._outer.values():
            _drop(self._model, site.parameter)

    def load_layer(self, index: int, read: Read) -> nn.Module:
        """Load a layer, or load it again, in the order of the checkpoint."""
        layer = self._layers[index]
        self._load(layer, f"{self.layer_prefix}{index}.", self._sites[index], read)
        return layer

    def weight(self, layer: nn.Module, site: Site) -> Tensor:
        """A matrix of a loaded layer: in the memory of its parameter if it lies there in one piece, else a copy."""
        return site.view(_get(layer, site.parameter).detach()).contiguous()

    def set_weight(self, layer: nn.Module, site: Site, weight_NK: Tensor) -> None:
        """Put a matrix into its place in a loaded layer."""
        with torch.no_grad():
            part = site.view(_get(layer, site.parameter))
            part.copy_(weight_NK.reshape(part.shape))

    def drop_layer(self, index: int) -> None:
        """Free the parameters of a layer."""
        for site in self._sites[index].values():
            _drop(self._layers[index], site.parameter)

    def _load(self, module: nn.Module, prefix: str, sites: Mapping[str, Site], read: Read) -> None:
        """Everything but embeddings is copied, so that what was read may be written to or freed, and parameters too."""
        loaded: dict[str, Tensor] = {}
        for name, site in sites.items():
            old = _get(module, site.parameter)
            if prefix + site.parameter in self._as_stored:
                loaded[site.parameter] = read(name).view(old.shape).to(self._device)
                continue
            if site.parameter not in loaded:
                dtype = self._dtypes.get(prefix + site.parameter, old.dtype)
                loaded[site.parameter] = torch.empty(old.shape, dtype=dtype, device=self._device) if old.is_meta else old.detach()
            part = site.view(loaded[site.parameter])
            part.copy_(read(name).reshape(part.shape))
        for parameter, tensor in loaded.items():
            _put(module, parameter, tensor)

    # --- running ----------------------------------------------------------------------------------------------------

    def record(self, input_ids_BT: Tensor) -> tuple[Tensor, list[Call]]:
        """What enters the first layer, and what every layer is given besides, for sequences without padding.

        Tensors that are those of other layers, or equal to those of the previous batch, are shared: nobody may write to them.
        """
        for form in self._forms:
            stubs = _Stubs(form)
            with torch.no_grad(), stubs.in_place_of(self._layers):
                try:
                    output = self._decoder(input_ids=input_ids_BT.to(self._device), use_cache=False)
                except _Changed:
                    continue
                except ValueError as error:
                    if "unpack" in str(error):  # a loop that takes apart what layers return
                        continue
                    raise
            if len(stubs.calls) != self.num_layers:
                raise RequestError(f"the model runs {len(stubs.calls)} of its {self.num_layers} layers")
            if output[0].shape == stubs.hidden_BTH.shape:
                self._forms = (form,)
                return stubs.hidden_BTH, self._share(stubs.calls)
        decoder = type(self._decoder).__name__
        raise RequestError(f"{decoder} changes hidden states between its layers, which cannot then be run one by one")

    def run(self, layer: nn.Module, hidden_BTH: Tensor, call: Call) -> Tensor:
        """What a loaded layer gives."""
        with torch.no_grad():
            output = layer(hidden_BTH, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _share(self, calls: Sequence[Call]) -> list[Call]:
        seen: dict[int, Tensor] = {}
        shared = [Call(*self._shared(tuple(call), seen)) for call in calls]
        self._known = list(seen.values())
        return shared

    def _shared(self, value: Any, seen: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen[id(value)] = next((known for known in self._known if _is_equal(known, value)), value)
            return seen[id(value)]
        if type(value) in (tuple, list):
            return type(value)(self._shared(part, seen) for part in value)
        if type(value) is dict and value:
            # One that layers hand something on in is empty here, and stays the same object.
            return {key: self._shared(part, seen) for key, part in value.items()}
        return value


class _Changed(Exception):
    """A layer was not given what the layer before it returned."""


class _Stubs:
    """Recorders in the place of the layers' own `forward`, so that all else of a layer, which loops look at, is as it was."""

    hidden_BTH: Tensor

    def __init__(self, form: Callable[[Tensor], Any]):
        self.calls: list[Call] = []
        self._form = form

    @contextmanager
    def in_place_of(self, layers: nn.ModuleList) -> Iterator[None]:
        """Put the recorders in, and take them out again."""
        for index, layer in enumerate(layers):
            layer.forward = self._stub(index)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _stub(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden_BTH, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if index != len(self.calls):
                raise RequestError(f"the model runs layer {index} after {len(self.calls)} others, and not one after another")
            if any(isinstance(value, _transformers().Cache) for value in (*rest, *others.values())):
                raise RequestError("the model keeps keys and values although it is told not to, which would be seen again in every run")
            if any(value is SECOND for value in (*rest, *others.values())):
                raise RequestError("the model hands more than hidden states from layer to layer, which cannot then be run one by one")
            if index == 0:
                self.hidden_BTH = hidden_BTH
            elif hidden_BTH is not self.hidden_BTH and not _is_equal(hidden_BTH, self.hidden_BTH):
                raise _Changed
            self.calls.append(Call(rest, others))
            return self._form(hidden_BTH)

        return forward


# --- the model ------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise RequestError(f"the calibrated mode runs the model's layers with transformers, which is not installed: {INSTALL}") from None
    version = str(transformers.__version__)
    if int(version.partition(".")[0]) < OLDEST:
        raise RequestError(f"the calibrated mode needs transformers {OLDEST}.0 or newer, and not {version}: {INSTALL}")
    return transformers


def _config(transformers: Any, folder: Path) -> Any:
    """The config, of a model that is not quantized."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        version = transformers.__version__
        raise RequestError(f"{folder / 'config.json'}: transformers {version} does not know this model: {_first_line(error)}") from None
    if config.is_encoder_decoder:
        raise RequestError(f"{config.model_type} is an encoder and a decoder; the calibrated mode runs decoders alone")
    text = config.get_text_config()
    for owner in (config, text):
        for key in ("quantization_config", "compression_config"):
            if getattr(owner, key, None) is not None:
                delattr(owner, key)
        owner.use_cache = False
    if not all(isinstance(getattr(text, key, None), int) for key in ("num_hidden_layers", "hidden_size")):
        raise RequestError(f"{config.model_type}: the config does not say how many layers there are, and of which hidden size")
    return config


def _from_config(transformers: Any, config: Any, dtype: torch.dtype) -> Any:
    problem = ""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        try:
            # Attention is left to transformers: it takes that which the whole model would run with.
            return auto.from_config(config, dtype=dtype, experts_implementation="eager", trust_remote_code=False)
        except ValueError as error:
            problem = problem or _first_line(error)
    raise RequestError(f"transformers {transformers.__version__} has no language model for {config.model_type}: {problem}")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register have a shape and no memory; buffers are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        del module, name
        return parameter if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type] # whose result it takes
    try:
        with _LargeOnMeta():
            yield
    finally:
        hook.remove()


class _LargeOnMeta(TorchFunctionMode):
    """Large memory without values is not even asked for: some systems refuse it although no page would be touched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros):
            shape = func(*args, **kwargs | {"device": "meta"})
            if shape.numel() >= LARGE:
                return shape
        return func(*args, **kwargs)


def _only_stack(model: Any, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder layers, which are not those of a tower beside the language model."""
    decoder = model.get_decoder()
    prefix = _dotted(next(name for name, module in model.named_modules() if module is decoder))
    lists = {prefix + name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    found = {name: module for name, module in lists.items() if len(module) == num_layers}
    outermost = {name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if len(outermost) != 1:
        names = f" ({', '.join(outermost)})" if outermost else ""
        raise RequestError(f"{type(decoder).__name__} has {len(outermost)} lists of {num_layers} layers{names}; one is needed")
    return outermost.popitem()


def _owner(model: Any, stack: str) -> tuple[str, nn.Module]:
    """The innermost model around the layers: the one that has no more around them than what enters the first, and a norm."""
    parts = stack.split(".")
    owners = [".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1)]
    base = _transformers().PreTrainedModel
    return next((name, model.get_submodule(name)) for name in owners if isinstance(model.get_submodule(name), base))


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parameters that transformers keeps in float32 whatever the dtype."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return {}
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(part)}(?:\.|$)" for part in plan))
    return {name: torch.float32 for name in _state(model, "") if pattern.search(name)}


def _cast_embeddings(model: Any, names: Set[str], dtype: torch.dtype) -> set[str]:
    """Have ordinary embeddings among these parameters, the largest of all, in the dtype they are stored in: what they give is cast."""

    def cast(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        return output.to(dtype)

    found = set()
    for name, module in model.named_modules():
        if type(module) is nn.Embedding and f"{name}.weight" in names:  # others may compute with their weights
            module.register_forward_hook(cast)
            found.add(f"{name}.weight")
    return found


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not (buffer.is_meta and name not in owner._non_persistent_buffers_set):
                owner._buffers[name] = buffer.to(device)


def _state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The parameters and persistent buffers whose names begin so."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name.startswith(prefix)}


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _drop(module: nn.Module, name: str) -> None:
    old = _get(module, name)
    if isinstance(old, nn.Parameter):
        _put(module, name, old.to("meta"))


def _is_equal(one: Any, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return one is other or torch.equal(one, other)


def _dotted(name: str) -> str:
    return f"{name}." if name else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- names ----------------------------------------------------------------------------------------------------------


class _Places:
    """Where in a model the tensors of a checkpoint are, by transformers' tables."""

    def __init__(self, model: Any, shapes: Shapes):
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        self._rename = loading.rename_source_key
        self._renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        self._base, self._state, self._shapes = model.base_model_prefix, _state(model, ""), shapes
        self._modules = dict(model.named_modules())
        joins = [entry for entry in self._converters if [type(step) for step in entry.operations] == [loading.Concatenate]]
        self._places_of_joined = {  # which of the tensors that are put one below the other
            pattern: place for entry in joins if entry.operations[0].dim == 0 for place, pattern in enumerate(entry.source_patterns)
        }
        self._joined: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)  # by parameter: such places, and names

    def find(self) -> dict[str, Site]:
        """The sites of all tensors that have one, by the names of the checkpoint."""
        found = {name: self._find(name) for name in self._shapes}
        for parameter, parts in self._joined.items():
            stops = accumulate(self._shapes[name][0] for _, name in sorted(parts))
            for (_, name), stop in zip(sorted(parts), stops, strict=True):
                found[name] = Site(parameter, None, stop - self._shapes[name][0], stop)
        return {name: site for name, site in found.items() if site is not None}

    def _find(self, name: str) -> Site | None:
        renamed, pattern = self._rename(name, self._renamings, self._converters, self._base, self._state)
        if pattern is None and renamed in self._state:
            return Site(renamed)
        if name in self._state:
            return Site(name)
        if renamed in self._state and pattern in self._places_of_joined:
            self._joined[renamed].append((self._places_of_joined[pattern], name))
            return None
        expert = _EXPERT.fullmatch(self._rename(name, self._renamings, [])[0])
        if expert is not None:
            module, number, leaf, role = expert.groups()
            owners = (module, f"{self._base}.{module}", module.removeprefix(f"{self._base}."))
            return next((self._in_stack(name, owner, int(number), leaf, role) for owner in owners if owner in self._modules), None)
        return None

    def _in_stack(self, name: str, owner: str, expert: int, leaf: str, role: str) -> Site | None:
        """The place of an expert's gate, up or down projection or bias in the parameters of all experts."""
        suffix, leaf = "" if role == "weight" else "_bias", _PARTS.get(leaf, leaf)
        module = self._modules[owner]
        parameters = dict(module.named_parameters(recurse=False))
        whole, pair = f"{leaf}{suffix}", f"gate_up_proj{suffix}"
        if whole not in parameters and (leaf not in _GATE_UP or pair not in parameters):
            return None
        chosen = whole if whole in parameters else pair
        transposed = role == "weight" and _is_transposed(module)
        if expert >= len(parameters[chosen]):
            raise RequestError(f"{name}: the model has {len(parameters[chosen])} experts in {owner}.{chosen}")
        if chosen == whole:
            return Site(f"{owner}.{whole}", expert, transposed=transposed)
        part, size = _GATE_UP.index(leaf), self._shapes[name][0]
        if getattr(module, "is_concatenated", True):
            return Site(f"{owner}.{pair}", expert, part * size, (part + 1) * size, transposed=transposed)
        return Site(f"{owner}.{pair}", expert, part, 2 * size, 2, transposed=transposed)


def _is_transposed(experts: nn.Module) -> bool:
    """Whether a module holds the matrices of its experts as columns."""
    stated = getattr(experts, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None:
        return False
    return bool(gate_up.shape[1] == down.shape[2] and gate_up.shape[2] == 2 * down.shape[1])


def _check_cover(needed: Mapping[str, Tensor], sites: Mapping[str, Site], shapes: Shapes, *, prefix: str = "") -> None:
    """Raise RequestError unless these tensors make up each of these parameters, every element once."""
    num_elements: defaultdict[str, int] = defaultdict(int)
    name_at: dict[tuple[str, int | None, int], str] = {}
    for name, site in sites.items():
        parameter = prefix + site.parameter
        part, shape = site.view(needed[site.parameter].detach()), shapes[name]
        if (*part.shape, 1) not in ((*shape, 1), shape):
            raise RequestError(f"{name} has shape {list(shape)} in the checkpoint; {parameter} of the model takes {list(part.shape)}")
        other = name_at.setdefault((site.parameter, site.expert, site.start), name)
        if other != name:
            raise RequestError(f"{name} and {other} of the checkpoint are both {parameter} of the model")
        num_elements[site.parameter] += math.prod(shape)
    for parameter, tensor in needed.items():
        if (found := num_elements[parameter]) != tensor.numel():
            some = "nothing" if not found else "only a part of it" if found < tensor.numel() else "parts of it twice"
            raise RequestError(
                f"{prefix}{parameter} {list(tensor.shape)} of the model: the checkpoint has {some} under the names known to transformers"
            )
