"""What commands import: who reads headers alone waits for no torch, and who plans for no compiler of torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

import streamquant
from streamquant import lazy
from streamquant.schemes import SCHEMES
from tests.checkpoints import WIKI_LLAMA
from tests.fakehub import FakeHub

ROOT = Path(streamquant.__file__).parent.parent
FOR_TENSORS = {"torch", "numpy", "transformers"}
FOR_REMOTE_SOURCES = {"huggingface_hub", "httpx", "fsspec", "ssl"}
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
MAIN = "from streamquant.cli import main; main()"
COMMANDS = ["--help", "--version", "schemes", "convert --help", "plan --help", "inspect --help", "verify --help"]


def imported(code: str, *arguments: str | Path, **environment: str) -> set[str]:
    """The modules that are imported when a run of Python ends."""
    told = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    command = [sys.executable, "-c", told + code, *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return set(run.stderr.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_what_reads_no_checkpoint_imports_no_torch(command: str) -> None:
    assert imported(MAIN, *command.split()).isdisjoint(FOR_TENSORS | FOR_REMOTE_SOURCES)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("scheme", [None, "NVFP4A16"])
def test_a_local_checkpoint_is_inspected_without_torch(
    wiki_llama_in: Callable[[str], Path], scheme: str | None, options: list[str]
) -> None:
    folder = WIKI_LLAMA if scheme is None else wiki_llama_in(scheme)
    assert imported(MAIN, "inspect", folder, *options).isdisjoint(FOR_TENSORS | FOR_REMOTE_SOURCES)


def test_a_checkpoint_on_the_hub_is_inspected_without_torch(tmp_path: Path) -> None:
    (tmp_path / "hub" / "org").mkdir(parents=True)
    (tmp_path / "hub" / "org" / "model").symlink_to(WIKI_LLAMA)
    with closing(FakeHub(tmp_path / "hub")) as hub:
        known = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
        modules = imported(MAIN, "inspect", "org/model", **known)
    assert "huggingface_hub" in modules
    assert modules.isdisjoint(FOR_TENSORS - {"numpy"})


def test_the_public_names_are_there_without_torch() -> None:
    code = "import streamquant; print([getattr(streamquant, name) for name in streamquant.__all__])"
    assert imported(code).isdisjoint(FOR_TENSORS | FOR_REMOTE_SOURCES)


def test_plans_take_no_compiler() -> None:
    code = f"import streamquant; [streamquant.plan({str(WIKI_LLAMA)!r}, scheme=scheme) for scheme in {list(SCHEMES)}]"
    modules = imported(code)
    assert "torch" in modules
    assert modules.isdisjoint(COMPILER)


def test_a_lazy_module_is_the_module() -> None:
    assert lazy.torch.float32 is torch.float32
    assert vars(lazy.torch) is vars(torch)
    assert lazy.F.pad is torch.nn.functional.pad
