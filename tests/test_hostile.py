"""Sources that nobody made by accident: names, links, sizes and numbers that are chosen to do harm."""

import json
import shlex
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import streamquant
from streamquant import cli
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource
from streamquant.errors import CheckpointError, RequestError
from tests.checkpoints import attention, weight, write_checkpoint

INDEX = "model.safetensors.index.json"
ESCAPE = "\x1b]0;pwned\x07\x1b[31m"
HIDDEN = {
    "a terminal's escapes": ESCAPE, "a line feed": "a\nb", "NUL": "a\0b", "a tab": "\t", "DEL": "\x7f", "C1": "\x9b31m",
    "right to left": "\N{RIGHT-TO-LEFT OVERRIDE}fdp.exe", "isolates": "\N{RIGHT-TO-LEFT ISOLATE}a", "no width": "a\N{ZERO WIDTH SPACE}b",
    "a joiner": "a\N{ZERO WIDTH JOINER}", "a mark of order": "\N{ZERO WIDTH NO-BREAK SPACE}a", "a soft hyphen": "a\N{SOFT HYPHEN}",
    "a line separator": "a\N{LINE SEPARATOR}b", "tags": "a\U000e0041", "half a pair": "\udc80",
}  # fmt: skip
ESCAPING = {
    "a parent": "../x.json", "a parent within": "a/../../x.json", "an absolute path": "/etc/x.json", "an empty part": "a//x.json",
    "a point": "./x.json", "a folder": "a/", "nothing": "", "backslashes": "..\\x.json", "a drive": "C:\\x.json",
}  # fmt: skip
GIVE_ANOTHER = "give it another name or take it away"
TOO_LONG = {"a part": "a" * 256, "a part in bytes": "ü" * 128, "a path": "/".join(["a" * 100] * 11)}


class Listing(LocalSource):
    """A source whose listing holds more names than there are files."""

    def __init__(self, path: Path, *names: str):
        super().__init__(path)
        self.names = names

    def sizes(self) -> dict[str, int]:
        """The files, and 1 byte of each other name."""
        return super().sizes() | dict.fromkeys(self.names, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model in one file."""
    return write_checkpoint(tmp_path / "source", attention())


def refusal(opened: LocalSource | Path) -> str:
    """The message with which a source is refused."""
    with pytest.raises(CheckpointError) as caught, opened if isinstance(opened, LocalSource) else LocalSource(opened) as reader:
        read_checkpoint(reader)
    message = str(caught.value)
    assert message.isprintable()  # one line, which steers nothing
    assert len(message) < 2000
    return message


def write_config(folder: Path, config: Mapping[str, Any] | str) -> None:
    """Another config.json."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")


@pytest.fixture
def no_hanging() -> Iterator[None]:
    """Whatever takes 20 seconds never ends."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_what_a_config_says_does_not_reach_the_terminal_raw(folder: Path) -> None:
    config = {"model_type": f"x{ESCAPE}\ny" + "z" * 10_000, "architectures": [ESCAPE, 5]}
    write_config(folder, config | {"quantization_config": {"quant_method": ESCAPE}})
    for command in (["inspect", folder], ["plan", folder, "--scheme", "W8A8"], ["verify", folder]):
        output = CliRunner().invoke(cli.cli, list(map(str, command))).output
        assert all(line.isprintable() and len(line) < 2000 for line in output.splitlines()), output
        assert "\\x1b]0;pwned\\x07" in output or command[0] == "plan"


def test_what_the_system_says_does_not_reach_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._fail(f"{ESCAPE}: Permission denied", 4)
    assert capsys.readouterr().err == "error: \\x1b]0;pwned\\x07\\x1b[31m: Permission denied\n"


def test_a_way_out_may_be_pasted_into_a_shell(tmp_path: Path) -> None:
    module = "a'; rm -rf ~; echo '$(x)`y`"
    folder = write_checkpoint(tmp_path / "source", {f"{module}.weight": weight(16, 100)})
    with pytest.raises(RequestError) as caught:
        streamquant.plan(folder, scheme="W4A16")
    option = str(caught.value).partition("to leave it as it is: ")[2].removesuffix(")")
    assert shlex.split(option) == ["--ignore", module]
