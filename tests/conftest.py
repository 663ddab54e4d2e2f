"""Names are checked shapes: in tests, every tensor handed to the numerics as `weight_NK` must have two dimensions.

Within a call, a letter means one size: `code_NK` beside `weight_NK` must agree in N and K. Lowercase letters count as well.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import streamquant
from streamquant.inputs import awq, compressed, gptq, modelopt, mxfp4
from streamquant.inputs import fp8 as fp8_input
from streamquant.inputs import weight as weight_input
from streamquant.schemes import fp8, integer, mx, nvfp4, observers, packing, plain, scheme
from tests.checkpoints import WIKI_LLAMA

torch.set_num_threads(1)  # on a busy machine, torch's threads wait for each other longer than they work on small tensors

DIMENSIONS = re.compile(r".*_([A-Z][A-Za-z]*)")
MODULES: tuple[ModuleType, ...] = (
    *(fp8, integer, mx, nvfp4, observers, packing, plain, scheme),
    *(awq, compressed, fp8_input, gptq, modelopt, mxfp4, weight_input),
)


@pytest.fixture(autouse=True, scope="session")
def names_are_checked_shapes() -> Iterator[None]:
    """Wrap every function and method of the numerics for the session."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            owners = [module, *(cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__)]
            for owner in owners:
                for name, function in list(vars(owner).items()):
                    if inspect.isfunction(function) and function.__module__ == module.__name__:
                        patch.setattr(owner, name, checked(function))
        yield


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its tensor arguments checked against their names."""
    signature = inspect.signature(function)
    if not any(DIMENSIONS.fullmatch(name) for name in signature.parameters):
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sizes: dict[str, int] = {}
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            match = DIMENSIONS.fullmatch(name)
            if match and isinstance(value, torch.Tensor):
                assert value.ndim == len(match[1]), f"{function.__qualname__}: {name} has shape {list(value.shape)}"
                for letter, size in zip(match[1], value.shape, strict=True):
                    assert sizes.setdefault(letter, size) == size, f"{function.__qualname__}: {name} has shape {list(value.shape)}, {sizes}"
        return function(*args, **kwargs)

    return call


@pytest.fixture(scope="session")
def wiki_llama_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The example model, converted from its folder into a scheme."""

    @functools.cache
    def convert(scheme: str) -> Path:
        out = tmp_path_factory.mktemp("wiki-llama") / scheme
        streamquant.convert(WIKI_LLAMA, out, scheme=scheme)
        return out

    return convert
