"""The folder listing is the architecture: imports point down, nothing happens at import, flags are arguments."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import streamquant
from streamquant.cli import cli

ROOT = Path(streamquant.__file__).parent
ORDER = (
    "__main__", "cli", "progress", "report", "__init__", "convert", "verify", "inspect", "output", "calibrate", "stream", "read_ahead",
    "lane", "memory", "container", "kernels", "trace", "engines", "plan", "decide", "inputs", "quantization_config", "recipe", "names",
    "stored", "schemes", "checkpoint", "sizes", "version", "errors", "lazy",
)  # fmt: skip
NOT_ARGUMENTS = {"dry_run", "report_file", "log_json", "quiet", "help"}


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Own modules that a file imports, by their place in ORDER; imports for type checking do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for n in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only and (node.module or "").startswith("streamquant"):
            parts = str(node.module).split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found.update(name if name in ORDER else "__init__" for name in names)
        elif isinstance(node, ast.Import):
            found.update("__init__" for alias in node.names if alias.name.startswith("streamquant"))
    return found


def test_every_module_has_a_place() -> None:
    assert {module_of(path) for path in ROOT.rglob("*.py")} == set(ORDER)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    here = ORDER.index(module_of(path))
    assert all(ORDER.index(name) > here or name == module_of(path) for name in imports(path))


def test_the_data_free_path_imports_no_model_library() -> None:
    code = "import sys, streamquant.cli; assert not {'transformers', 'compressed_tensors', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def options(command: str) -> dict[str, click.Option]:
    return {str(option.name): option for option in cli.commands[command].params if isinstance(option, click.Option)}


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_flags_are_the_arguments_of_the_function(command: str) -> None:
    arguments = set(inspect.signature(getattr(streamquant, command)).parameters) - {"source", "out", "on_progress"}
    other = {"device", "max_memory", "max_gpu_memory", "threads", "kernels", "engine", "tp"} if command == "plan" else set()
    assert options(command).keys() - NOT_ARGUMENTS - {"as_json"} - other == arguments


def test_every_flag_and_command_is_in_the_readme() -> None:
    readme = (ROOT.parent / "README.md").read_text()
    for command in cli.commands:
        assert f"streamquant {command}" in readme
        for option in options(command).values():
            assert all(re.search(rf"{flag}\b", readme) for flag in option.opts), option.opts
