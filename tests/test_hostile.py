"""Sources that nobody made by accident: names, links, sizes and numbers that are chosen to do harm."""

import json
import os
import resource
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
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


# --- links, pipes, devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "sub/x.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "id_rsa"
    (folder / "sub").mkdir()
    (folder / name).touch()
    (folder / name).rename(outside)
    for target in (outside, os.path.relpath(outside, (folder / name).parent)):
        (folder / name).symlink_to(target)
        said = f"{folder / name} is a link that leads out of {folder}; put a copy of what it leads to in its place"
        assert refusal(folder) == said
        (folder / name).unlink()


def test_a_config_beside_a_file_may_not_be_a_link_out_either(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert "leads out of" in refusal(folder / "model.safetensors")


def test_a_link_by_way_of_another_is_refused_where_it_ends_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("../secret")
    assert "leads out of" in refusal(folder)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "real").mkdir()
    (folder / "model.safetensors").rename(folder / "real" / "weights")
    (folder / "model.safetensors").symlink_to("real/weights")
    (tmp_path / "link").symlink_to(folder)
    streamquant.convert(tmp_path / "link", tmp_path / "out", scheme="W8A8")
    (tmp_path / "file.safetensors").symlink_to(folder / "model.safetensors")
    assert len(streamquant.inspect(tmp_path / "file.safetensors").checkpoint.tensors) == 4


def test_a_link_to_a_folder_is_refused_and_not_lost_silently(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "x").touch()
    (folder / "alias").symlink_to("real")
    assert refusal(folder).startswith(f"{folder / 'alias'} is a link to a folder, which is not followed")


def in_cache(folder: Path, tmp_path: Path, *, repository: str = "models--org--name") -> Path:
    """The folder as a snapshot in the Hub's cache."""
    blobs, snapshot = (tmp_path / repository / part for part in ("blobs", "snapshots/0123abcd"))
    blobs.mkdir(parents=True)
    (snapshot / "transformer").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
        (snapshot / "transformer" / path.name).symlink_to(f"../../../blobs/blob{number}")
    return snapshot


def test_a_snapshot_in_the_cache_of_the_hub_is_read_whole_in_part_and_through_a_link(folder: Path, tmp_path: Path) -> None:
    snapshot = in_cache(folder, tmp_path)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, snapshot / "transformer", tmp_path / "link", snapshot / "model.safetensors"):
        assert len(streamquant.inspect(path).checkpoint.tensors) == 4


def test_a_snapshot_reaches_no_file_but_the_blobs_of_its_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = in_cache(folder, tmp_path)
    other = tmp_path / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    for secret in (other / "0", snapshot.parent.parent / "refs", tmp_path / "token"):
        secret.write_text("secret")
        (snapshot / "tokenizer.json").symlink_to(secret)
        assert "leads out of" in refusal(snapshot)
        (snapshot / "tokenizer.json").unlink()


def test_a_folder_that_only_looks_like_a_cache_reaches_nothing_else(folder: Path, tmp_path: Path) -> None:
    assert "leads out of" in refusal(in_cache(folder, tmp_path, repository="name"))


@pytest.mark.usefixtures("no_hanging")
@pytest.mark.parametrize("replace", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_file_that_became_a_pipe_or_a_device_is_neither_waited_for_nor_read(folder: Path, replace: Callable[[Path], None]) -> None:
    with LocalSource(folder) as opened:
        opened.sizes()
        path = folder / "config.json"
        path.unlink()
        replace(path)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="is not a regular file any more"):
                opened.read("config.json", 0, memoryview(bytearray(8)))


def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path) -> None:
    shards = [{f"model.layers.{number}.mlp.up_proj.weight": weight(8, 128)} for number in range(60)]
    folder = write_checkpoint(tmp_path / "source", *shards)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limit[1]))  # noqa: PTH208, it is a count
    try:
        streamquant.convert(folder, tmp_path / "out", scheme="W8A8", threads=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
