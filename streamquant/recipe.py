"""Recipes: ordered rules that say which module gets which scheme.

The first rule whose pattern matches a module decides. Patterns are roles (`experts`; names.py has them all), names of modules
(`model.layers.3`), globs (`*.self_attn`; `*` crosses dots), both of which stand for the modules below as well, or regular expressions
(`re:.*q_proj`, matched from the start as compressed-tensors does). Modules that are kept by default (names.py) stay kept, whatever a
rule says, unless `include` names them; a rule that gives a scheme to a role which is kept by default includes it.

A recipe is one line, `experts=NVFP4A16,*.layers.0=keep,FP8_DYNAMIC`, where the bare scheme is for what no rule matches, or a TOML file:

    scheme = "FP8_DYNAMIC"                # for what no rule matches, or a line; without it, that is kept
    ignore = ["lm_head"]
    include = []                          # quantize these although they are kept by default

    [[rule]]
    match = "*.mlp.experts.*"             # a pattern or a list
    scheme = "NVFP4A16"
    observer = "mse"                      # also: group_size, symmetric, strategy, scale_dtype

    [[rule]]
    match = ["*.layers.0.*", "re:.*down_proj"]
    keep = true
"""

import fnmatch
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamquant.errors import RequestError
from streamquant.names import KEPT_ROLES, ROLES
from streamquant.schemes import Scheme, find_scheme

SCHEME_SETTINGS = ("observer", "group_size", "symmetric", "strategy", "scale_dtype")
_SETTING_TYPES = {"observer": str, "group_size": int, "symmetric": bool, "strategy": str, "scale_dtype": str}


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to the modules that `pattern` matches, unless an earlier rule matches them."""

    pattern: str
    scheme: Scheme | None  # None: keep
    origin: str  # where the user wrote it
    is_default: bool = False  # for what no other rule matches


@dataclass(frozen=True, slots=True)
class Recipe:
    """Ordered rules, and the modules that are quantized although they are kept by default."""

    rules: tuple[Rule, ...]
    include: tuple[str, ...] = ()

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes that rules ask for, each once."""
        return list(dict.fromkeys(rule.scheme for rule in self.rules if rule.scheme is not None))


def make_recipe(
    *,
    scheme: str | None = None,
    recipe: Path | str | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    format: str = "compressed-tensors",
    **settings: Any,
) -> Recipe:
    """The recipe that the arguments of `convert` describe. `settings` (SCHEME_SETTINGS) are those of each scheme in `scheme`.

    Order: `ignore`, the rules of the file, then `scheme`. Raises RequestError for anything that could not be obeyed.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    document = {} if recipe is None else _read_document(Path(recipe))
    file_scheme = document.pop("scheme", None)
    if file_scheme is not None and not isinstance(file_scheme, str):
        raise RequestError(f"{recipe}: scheme must be a name, not {file_scheme!r}")
    if scheme is None and given:
        raise RequestError(f"{_option(next(iter(given)))} needs --scheme; rules of a recipe carry their own settings")
    if scheme is not None and file_scheme is not None:
        raise RequestError(f"both --scheme {scheme} and scheme = {file_scheme!r} in {recipe}; leave one away")
    rules = [Rule(pattern, None, "--ignore") for pattern in ignore]
    rules += [Rule(pattern, None, f"ignore in {recipe}") for pattern in _patterns(document.pop("ignore", []), f"{recipe}: ignore")]
    include = [*include, *_patterns(document.pop("include", []), f"{recipe}: include")]
    entries = document.pop("rule", [])
    if not isinstance(entries, list):
        raise RequestError(f"{recipe}: rules must be tables, written [[rule]]")
    for number, entry in enumerate(entries, start=1):
        rules += _read_rule(entry, where=f"{recipe}: rule {number}", format=format)
    if document:
        raise RequestError(f"{recipe}: unknown key {next(iter(document))!r}; known are scheme, ignore, include, rule")
    line = scheme or file_scheme
    if line is not None:
        rules += _read_line(line, origin="--scheme" if scheme else f"scheme in {recipe}", format=format, settings=given)
    if all(rule.scheme is None for rule in rules):
        raise RequestError("nothing to do: give --scheme or a recipe with at least one scheme")
    include += [rule.pattern for rule in rules if rule.scheme is not None and rule.pattern in KEPT_ROLES]
    # Roles last: who names a module that is kept even within an included tower means it.
    return Recipe(tuple(rules), tuple(sorted(dict.fromkeys(include), key=lambda pattern: pattern in KEPT_ROLES)))


def _read_line(line: str, *, origin: str, format: str, settings: Mapping[str, Any]) -> list[Rule]:
    """The rules of `SCHEME`, or of entries `PATTERN=SCHEME`, `PATTERN=keep` and at most one bare SCHEME, which is for the rest."""
    rules: dict[str, Rule] = {}
    default = None
    for entry in line.split(","):
        pattern, equals, name = (part.strip() for part in entry.rpartition("="))
        if not name or bool(equals) != bool(pattern):
            raise RequestError(f"{origin}: {entry.strip()!r} in {line!r} is neither PATTERN=SCHEME, PATTERN=keep nor SCHEME")
        scheme = None if equals and name.lower() == "keep" else find_scheme(name, format=format, **settings)
        if pattern in rules:
            raise RequestError(f"{origin}: {pattern!r} is in {line!r} twice, and the first decides; leave one away")
        if pattern:
            rules[pattern] = Rule(pattern, scheme, origin)
        elif default is not None:
            raise RequestError(f"{origin}: {line!r} has two schemes for the rest; give one of them a pattern: PATTERN={name}")
        else:
            default = Rule("*", scheme, origin, is_default=True)
    return [*rules.values(), *([] if default is None else [default])]


def _read_document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid TOML: {error}") from None


def _read_rule(entry: object, *, where: str, format: str) -> list[Rule]:
    if not isinstance(entry, dict):
        raise RequestError(f"{where} must be a table, written [[rule]]")
    patterns = _patterns(entry.get("match"), f"{where}: match")
    settings = {name: entry[name] for name in SCHEME_SETTINGS if name in entry}
    unknown = entry.keys() - {"match", "scheme", "keep"} - settings.keys()
    if unknown:
        raise RequestError(f"{where}: unknown key {min(unknown)!r}; known are match, scheme, keep, {', '.join(SCHEME_SETTINGS)}")
    for name, value in settings.items():
        if type(value) is not _SETTING_TYPES[name]:
            raise RequestError(f"{where}: {name} must be of type {_SETTING_TYPES[name].__name__}, not {value!r}")
    if ("scheme" in entry) == ("keep" in entry):
        raise RequestError(f"{where} needs either a scheme or keep = true")
    if "keep" in entry:
        if entry["keep"] is not True or settings:
            raise RequestError(f"{where}: keep can only be true, and goes with no other setting")
        return [Rule(pattern, None, where) for pattern in patterns]
    if not isinstance(entry["scheme"], str):
        raise RequestError(f"{where}: scheme must be a name, not {entry['scheme']!r}")
    scheme = find_scheme(entry["scheme"], format=format, **settings)
    return [Rule(pattern, scheme, where) for pattern in patterns]


def _patterns(value: object, where: str) -> list[str]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise RequestError(f"{where} must be a pattern or a list of patterns")
    return patterns


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class Matcher:
    """Finds the first of many patterns that matches a module, with one compiled expression for all of them."""

    def __init__(self, patterns: Sequence[str]):
        self.patterns = tuple(patterns)
        self._roles: dict[str | None, int] = {}
        self._exact: dict[str, int] = {}
        alternatives = []
        for index, pattern in enumerate(self.patterns):
            if not pattern:
                raise RequestError("an empty pattern matches nothing")
            if pattern.startswith("re:") or any(mark in pattern for mark in "*?["):
                alternatives.append(f"(?P<p{index}>{_expression(pattern)})")
            else:
                plain = self._roles if pattern in ROLES else self._exact
                plain.setdefault(pattern, index)
        try:
            self._expression = re.compile("|".join(alternatives)) if alternatives else None
        except re.error as error:
            raise RequestError(f"patterns do not combine into one regular expression: {error}") from None

    def first(self, name: str, role: str | None) -> int | None:
        """The index of the first pattern that matches the module of this name and role, or None."""
        found = [self._roles[role]] if role in self._roles else []
        if self._exact:
            end = len(name)
            while end > 0:  # the module itself, then each module around it
                if (index := self._exact.get(name[:end])) is not None:
                    found.append(index)
                end = name.rfind(".", 0, end)
        if self._expression is not None and (match := self._expression.match(name)):
            found.append(int(str(match.lastgroup)[1:]))
        return min(found, default=None)

    def unmatched(self, roles: Mapping[str, str | None], *, used: Iterable[int]) -> list[int]:
        """The indices of the patterns that match none of the modules in `roles`; those `used` are known to be the first match of one."""
        suspects = sorted(set(range(len(self.patterns))).difference(used))
        return [index for index in suspects if not Matcher([self.patterns[index]]).matches_any(roles)]

    def matches_any(self, roles: Mapping[str, str | None]) -> bool:
        """Whether any pattern matches any of these modules, given with their roles."""
        return any(self.first(name, role) is not None for name, role in roles.items())


def _expression(pattern: str) -> str:
    """One pattern as a regular expression. Compiled here by itself, so that an error names it."""
    if pattern.startswith("re:"):
        expression = pattern.removeprefix("re:")
    else:
        expression = f"{fnmatch.translate(pattern)}|{fnmatch.translate(pattern + '.*')}"
    if re.search(r"\\[1-9]", expression):
        raise RequestError(f"pattern {pattern!r} refers back to a group, which is not supported")
    try:
        re.compile(expression)
    except re.error as error:
        raise RequestError(f"pattern {pattern!r} is not a valid regular expression: {error}") from None
    return expression
