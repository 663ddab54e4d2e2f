"""The methods of the calibrated mode, and what a user may ask of it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from streamquant.calibrate.data import CalibrationOptions
from streamquant.errors import RequestError

DEFAULT_MAX_FALLBACK = 0.05


@dataclass(frozen=True, slots=True)
class Method:
    """What moves scales between norms and linears, and what finds codes."""

    scaling: str  # "", "awq" or "smoothquant"
    solver: str  # "rtn" or "gptq"


METHODS: dict[str, Method | None] = {
    "rtn": None,  # without data
    "gptq": Method("", "gptq"),
    "awq": Method("awq", "rtn"),
    "awq+gptq": Method("awq", "gptq"),
    "smoothquant": Method("smoothquant", "rtn"),
    "smoothquant+gptq": Method("smoothquant", "gptq"),
}


@dataclass(frozen=True, slots=True)
class CalibrationWish:
    """A method that needs data, the data, and what is tolerated."""

    name: str
    method: Method
    options: CalibrationOptions
    max_fallback: float  # the part of all weights that may be left to plain rounding

    def to_json(self) -> dict[str, Any]:
        """What the output depends on, but for the tokens themselves."""
        return {"method": self.name} | {key: value for key, value in asdict(self.options).items() if key != "data"}


def make_calibration_wish(method: str, *, max_fallback: float | None, **options: Any) -> CalibrationWish | None:
    """The wish that the arguments of `convert` express; options that are None take their default. None for a method without data.

    Raises RequestError for an unknown method, and for options that the method would ignore.
    """
    if method not in METHODS:
        raise RequestError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    given = {name: value for name, value in options.items() if value is not None}
    found = METHODS[method]
    if found is None:
        ignored = [*given, *(() if max_fallback is None else ("max_fallback",))]
        if ignored:
            flags = ", ".join("--calibration-data" if name == "data" else f"--{name.replace('_', '-')}" for name in ignored)
            raise RequestError(f"{flags}: method {method} takes no data; choose another --method: {', '.join(list(METHODS)[1:])}")
        return None
    most = DEFAULT_MAX_FALLBACK if max_fallback is None else max_fallback
    if not 0 <= most <= 1:
        raise RequestError(f"--max-fallback {most} is no part of all weights, from 0 to 1")
    return CalibrationWish(method, found, CalibrationOptions(**given), most)
