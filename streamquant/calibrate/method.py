"""The methods of the calibrated mode, and what a user may ask of it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from streamquant.calibrate.clip import may_clip
from streamquant.calibrate.data import CalibrationOptions
from streamquant.errors import RequestError
from streamquant.schemes import WITHOUT_DATA, Scheme

DEFAULT_MAX_FALLBACK = 0.05
WIDE = 1 << 20  # columns, more than any group has
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
NEGATIONS = {"clip": "no-clip", "packed": "per-sample"}


@dataclass(frozen=True, slots=True)
class Method:
    """What moves scales between norms and linears, what finds codes, and whether bounds of groups are made smaller before."""

    scaling: str  # "", "awq" or "smoothquant"
    solver: str  # "rtn" or "gptq"
    clips: bool = False

    @property
    def uses_hessians(self) -> bool:
        """Whether it looks at more of the inputs than how large they are."""
        return bool(self.scaling) or self.solver != "rtn"


METHODS: dict[str, Method | None] = {
    "rtn": None,  # without data, unless a scheme needs some
    "gptq": Method("", "gptq"),
    "awq": Method("awq", "rtn", clips=True),
    "awq+gptq": Method("awq", "gptq", clips=True),
    "smoothquant": Method("smoothquant", "rtn"),
    "smoothquant+gptq": Method("smoothquant", "gptq"),
}

MEASURING = Method("", "rtn")


@dataclass(frozen=True, slots=True)
class CalibrationWish:
    """A method that needs data, the data, and what is tolerated."""

    name: str
    method: Method
    options: CalibrationOptions
    max_fallback: float  # the part of all weights that may be left to plain rounding
    compute_dtype: str  # of products while layers are run; one of COMPUTE_DTYPES

    def to_json(self) -> dict[str, Any]:
        """What the output depends on, but for the tokens themselves."""
        return {"method": self.name, "clip": self.method.clips, "compute dtype": self.compute_dtype} | {
            key: value for key, value in asdict(self.options).items() if key != "data"
        }


def make_calibration_wish(
    method: str,
    schemes: Collection[Scheme],
    *,
    fp8_cache: bool = False,
    clip: bool | None = None,
    max_fallback: float | None = None,
    compute_dtype: str | None = None,
    **options: Any,
) -> CalibrationWish | None:
    """The wish that the arguments of `convert` express; options that are None take their default. None if nothing needs data.

    Raises RequestError for an unknown method, for options that would be ignored, and for schemes that need data if none is offered.
    """
    if method not in METHODS:
        raise RequestError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    given = {name: value for name, value in options.items() if value is not None}
    chosen = METHODS[method]
    if chosen is None:
        need = _need_of_data(schemes, fp8_cache=fp8_cache)
        if need and not given:
            raise RequestError(need)
        if not need:
            _refuse_settings(method, given | {"clip": clip, "max_fallback": max_fallback, "compute_dtype": compute_dtype})
            return None
        if clip is not None:
            raise RequestError(f"{_flag('clip', clip)}: method {method} does not look at outputs; choose another --method")
        chosen = MEASURING
    if clip is not None:
        if clip and not any(may_clip(scheme, WIDE) for scheme in schemes):
            raise RequestError(f"--clip needs scales of groups of columns, as W4A16 has; asked for: {', '.join(s.preset for s in schemes)}")
        chosen = replace(chosen, clips=clip)
    most = DEFAULT_MAX_FALLBACK if max_fallback is None else max_fallback
    if not 0 <= most <= 1:
        raise RequestError(f"--max-fallback {most} is no part of all weights, from 0 to 1")
    dtype = compute_dtype or COMPUTE_DTYPES[0]
    if dtype not in COMPUTE_DTYPES:
        raise RequestError(f"unknown compute dtype {dtype!r}; known are {', '.join(COMPUTE_DTYPES)}")
    return CalibrationWish(method, chosen, CalibrationOptions(**given), most, dtype)


def _need_of_data(schemes: Iterable[Scheme], *, fp8_cache: bool) -> str:
    """What takes data although the method takes none, and how data is given; or ""."""
    add = "add --calibration-data, or --samples of the text that comes with the package"
    measured = next((scheme.preset for scheme in schemes if scheme.needs_data), None)
    if measured is not None:
        return f"{measured} stores activation scales, which take calibration data; without data use {WITHOUT_DATA[measured]}, else {add}"
    return f"--kv-cache takes calibration data: {add}" if fp8_cache else ""


def _refuse_settings(method: str, settings: Mapping[str, Any]) -> None:
    """Raise RequestError if there are any, of a calibration that there will not be."""
    flags = [_flag(name, value) for name, value in settings.items() if value is not None]
    if flags:
        raise RequestError(f"{', '.join(flags)}: method {method} takes no data; choose another --method: {', '.join(list(METHODS)[1:])}")


def _flag(name: str, value: Any) -> str:
    """What a user has written for a setting."""
    flag = {"data": "calibration-data"}.get(name, name.replace("_", "-"))
    return f"--{NEGATIONS[name] if value is False else flag}"
