"""`quantization_config` of config.json: written from the modules that were quantized, and read back.

compressed-tensors resolves a module by its name first (exact or `re:`), then by its class; `ignore` wins over both. With one scheme
`Linear` is the target and every linear that was left alone is in `ignore` by its full name. With several, each has targets that
match its modules and no other scheme's, so that the order in which an engine tries them does not matter. Modules of Mistral's own
layout are listed by their names in vLLM as well, which renames tensors on loading but not what is said about them here.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from streamquant.checkpoint.limits import MAX_PATTERN_CHARS
from streamquant.errors import CheckpointError
from streamquant.names import name_in_vllm
from streamquant.schemes import NATIVE_FP8, Scheme, scheme_from_config
from streamquant.schemes.fp8 import BLOCK, NativeFp8

CLASS_TARGET = "Linear"
NUMBER = r"\d+"
# Modules of these names are no `Linear` to vLLM, which finds them by name only.
_NAMED_ONLY = re.compile(r"(.*\.)?(lm_head|output|embed_out|embed_tokens|embed_in|wte|wpe)")


def is_named_only(module: str) -> bool:
    """Whether engines find the module by its name only: a head or an embedding, not a linear layer."""
    return _NAMED_ONLY.fullmatch(module) is not None


def stored_like(scheme: Scheme) -> str:
    """Equal for schemes that are one to an engine: what is stored and computed, whatever observer chose the scales."""
    return repr((scheme.format, scheme.weights_config, scheme.activations))


def describe_quantization(
    quantized: Mapping[str, Scheme], kept: Iterable[str], *, absent_lm_head: bool, kept_patterns: Iterable[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` for modules with their schemes and the linear modules that were kept as they are.

    `kept_patterns`: regular expressions for other names of the kept modules; native FP8 has only names.
    `absent_lm_head`: the checkpoint stores no lm_head, for it is tied to the embedding; readers that build one shall leave it alone.
    """
    kept = set(kept)
    in_vllm = _in_vllm(quantized)
    ignore = kept | set(_name_targets(_in_vllm(kept), in_vllm))
    if absent_lm_head and "lm_head" not in in_vllm:
        ignore.add("lm_head")
    by_args: dict[str, tuple[Scheme, list[str]]] = {}
    for module, scheme in quantized.items():
        by_args.setdefault(stored_like(scheme), (scheme, []))[1].append(module)
    groups = list(by_args.values())
    if groups and isinstance(groups[0][0], NativeFp8):
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "fmt": "e4m3",
            "modules_to_not_convert": sorted(ignore),
        }
    config_groups = {}
    for number, (scheme, modules) in enumerate(groups):
        others = [module for _, members in groups for module in members if members is not modules]
        config_groups[f"group_{number}"] = {
            "targets": _targets(modules + _in_vllm(modules), others + _in_vllm(others)),
            "format": scheme.format,
            "weights": scheme.weights_config,
            "input_activations": None if scheme.activations is None else scheme.activations.config,
        }
    formats = {scheme.format for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",  # without it transformers loads wrong weights and says nothing
        "config_groups": config_groups,
        "ignore": [*sorted(ignore), *sorted(f"re:{pattern}" for pattern in kept_patterns)],
    }


def quantized_modules(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    """A function from the name of a module to the scheme that a `quantization_config` gives it, None where it gives none.

    Raises CheckpointError for a config that is not of compressed-tensors or native FP8, or describes what we do not store.
    """
    method = config.get("quant_method")
    try:
        if method == "fp8":
            return _native_reader(config)
        if method == "compressed-tensors":
            return _reader(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config lacks what {method} needs: {error!r}") from None
    raise CheckpointError(f"quantization_config has quant_method {method!r}; known are compressed-tensors and fp8")


def _native_reader(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    if config["weight_block_size"] != [BLOCK, BLOCK]:
        raise CheckpointError(f"quantization_config: weight_block_size {config['weight_block_size']} is not [{BLOCK}, {BLOCK}]")
    dense = set(config.get("modules_to_not_convert") or ())
    return lambda module: None if module in dense else NATIVE_FP8


def _reader(config: Mapping[str, Any]) -> Callable[[str], Scheme | None]:
    groups = [
        (scheme_from_config(group.get("format") or config["format"], group["weights"], group.get("input_activations")), group["targets"])
        for group in config["config_groups"].values()
    ]
    ignored = _NameSet(config.get("ignore") or ())
    named = [(_NameSet(targets), scheme) for scheme, targets in groups]
    by_class = next((scheme for scheme, targets in groups if CLASS_TARGET in targets), None)

    def resolve(module: str) -> Scheme | None:
        if module in ignored:
            return None
        by_name = next((scheme for names, scheme in named if module in names), None)
        if by_name is not None or is_named_only(module):
            return by_name
        return by_class

    return resolve


class _NameSet:
    """Names and `re:` patterns as compressed-tensors reads them: equality, or a match from the start."""

    def __init__(self, entries: Iterable[str]):
        entries = list(entries)
        self._names = {entry for entry in entries if not entry.startswith("re:")}
        patterns = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
        if sum(map(len, patterns)) > MAX_PATTERN_CHARS:
            raise CheckpointError(f"quantization_config holds regular expressions of more than {MAX_PATTERN_CHARS} characters")
        try:
            self._pattern = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"quantization_config holds an invalid regular expression: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._names or (self._pattern is not None and self._pattern.match(name) is not None)


def _in_vllm(modules: Iterable[str]) -> list[str]:
    """The names of modules that have another one in vLLM."""
    return [name for name in map(name_in_vllm, modules) if name is not None]


def _targets(modules: list[str], others: list[str]) -> list[str]:
    """Targets that match these modules and none of `others`; modules in `ignore` may match, for `ignore` wins."""
    return _name_targets(modules, others) if others else [CLASS_TARGET, *sorted(filter(is_named_only, modules))]


def _name_targets(modules: list[str], others: list[str]) -> list[str]:
    """Names and `re:` patterns that match these modules and none of `others`."""
    foreign = [{_template(other, level) for other in others} for level in (0, 1)]
    safe: dict[tuple[str, ...], bool] = {}
    targets = set()
    for module in modules:
        target = module
        for level in (0, 1):  # all numbers open, then all but the first (the layer)
            suffix = _from_first_number(_template(module, level))
            if suffix not in safe:
                safe[suffix] = bool(suffix) and not any(_ends_with(template, suffix) for template in foreign[level])
            if safe[suffix]:
                target = "re:(.*[.])?" + "[.]".join(suffix) + "$"
                break
        targets.add(target)
    return sorted(targets)


def _ends_with(template: tuple[str, ...], suffix: tuple[str, ...]) -> bool:
    """Whether a name of this template could end in `suffix`."""
    end = template[-len(suffix) :]
    return len(end) == len(suffix) and all(part in {wanted, NUMBER} for part, wanted in zip(end, suffix, strict=True))


def _template(module: str, level: int) -> tuple[str, ...]:
    r"""The parts of a name with its numbers, but for the first `level` of them, replaced by `\d+`."""
    parts, seen = [], 0
    for part in module.split("."):
        seen += part.isdecimal()
        parts.append(NUMBER if part.isdecimal() and seen > level else re.escape(part))
    return tuple(parts)


def _from_first_number(template: tuple[str, ...]) -> tuple[str, ...]:
    """From the part before the first number on. What precedes it is renamed by engines for multimodal models."""
    for index, part in enumerate(template):
        if part == NUMBER or part.isdecimal():
            return template[max(index - 1, 0) :]
    return ()
