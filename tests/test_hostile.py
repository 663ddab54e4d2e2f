"""Sources that nobody made by accident: names, links, sizes and numbers that are chosen to do harm."""

import json
import os
import pickle
import re
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import streamquant
from streamquant import cli
from streamquant.checkpoint import checkpoint, journal, limits, source
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.header import TensorSpec, build_header
from streamquant.checkpoint.limits import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, MAX_JSON_DEPTH, MAX_TENSOR_NAME
from streamquant.checkpoint.local import LocalSource
from streamquant.errors import CheckpointError, RequestError, StreamquantError
from streamquant.inputs.experts import find_stacks
from streamquant.inputs.weight import Hints, no_scheme
from streamquant.names import ModelFacts
from streamquant.output import is_finished
from tests.checkpoints import attention, file_bytes, weight, write_checkpoint

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


# --- names of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HIDDEN.values(), ids=HIDDEN)
def test_a_listed_name_that_shows_other_than_it_is_is_refused(folder: Path, name: str) -> None:
    for file in (name, f"sub/{name}", f"{name}/x.json", f"model-{name}.safetensors"):
        assert refusal(Listing(folder, file)).endswith("which has control or invisible characters in its name; " + GIVE_ANOTHER)


@pytest.mark.parametrize("name", ESCAPING.values(), ids=ESCAPING)
def test_a_listed_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    assert refusal(Listing(folder, name)) == f"{folder} holds {name!r}, which leaves the folder; {GIVE_ANOTHER}"


@pytest.mark.parametrize("name", TOO_LONG.values(), ids=TOO_LONG)
def test_a_listed_name_that_no_file_system_takes_is_refused(folder: Path, name: str) -> None:
    assert "which is longer than 1024 bytes, or a part of it than 255" in refusal(Listing(folder, name))


def test_names_that_are_merely_unusual_are_taken(folder: Path) -> None:
    files = ["a b/ü.txt", "图片\u30001.png", "Screenshot 3.00.00\u202fPM.png", "...", "..a", "'$(x)'", "a" * 255, "😀.md", "\ue000"]
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(file)
    with LocalSource(folder) as opened:
        assert set(read_checkpoint(opened).side_files) == set(files)


def test_a_hostile_name_on_a_disk_is_refused_too(folder: Path) -> None:
    (folder / f"{ESCAPE}.txt").touch()
    assert "\\x1b]0;pwned\\x07\\x1b[31m.txt" in refusal(folder)


def test_a_name_on_a_disk_that_is_no_utf_8_is_refused(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.txt")).touch()
    assert "caf\\udce9.txt" in refusal(folder)


def test_folders_nested_beyond_any_path_are_refused(folder: Path) -> None:
    here = Path.cwd()
    try:
        os.chdir(folder)
        for _ in range(1500):
            Path("a").mkdir()
            os.chdir("a")
        Path("x").touch()
    finally:
        os.chdir(here)
    try:
        assert "which is longer than 1024 bytes" in refusal(folder)
    finally:
        os.system(f"rm -rf {shlex.quote(str(folder / 'a'))}")  # shutil.rmtree, and so pytest, is too recursive for it


@pytest.mark.parametrize("file", [".git/config", "a/.git", ".cache/x.bin", ".streamquant/journal.jsonl", "a/.streamquant", "../.git/x"])
def test_what_belongs_to_tools_is_left_out_of_any_listing(folder: Path, file: str) -> None:
    with Listing(folder, file) as opened:
        assert read_checkpoint(opened).side_files == ()


def test_pipes_and_links_in_the_folders_of_tools_are_nobodys_business(folder: Path) -> None:
    for tool in (".git", "sub/.cache"):
        (folder / tool).mkdir(parents=True)
        os.mkfifo(folder / tool / "pipe")
        (folder / tool / "link").symlink_to("/etc")
    with LocalSource(folder) as opened:
        assert read_checkpoint(opened).side_files == ()


@pytest.mark.parametrize("files", [("a", "a/b"), ("a/b", "a/b/c/d"), ("README.md", "README.md/x")])
def test_a_listing_in_which_a_file_is_a_folder_is_refused(folder: Path, files: tuple[str, ...]) -> None:
    assert refusal(Listing(folder, *files)).startswith(f"{files[0]} is a folder, and the name of a file that is written")


@pytest.mark.parametrize("name", ["streamquant.json", INDEX, "model-00001-of-00002.safetensors"])
def test_a_folder_that_would_be_in_the_way_of_an_output_is_refused(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "x.txt").touch()
    assert refusal(folder).startswith(f"{name} is a folder")


def test_more_files_than_a_checkpoint_has_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_FILES", 5)
    assert "holds 6 files; a checkpoint has no more than 5" in refusal(Listing(folder, *"abcd"))


@pytest.mark.parametrize("name", [*HIDDEN.values(), "../model", "/model", "a//model", "..\\model"])
def test_a_hostile_name_in_an_index_is_refused(folder: Path, name: str) -> None:
    index = {"weight_map": {"model.layers.0.self_attn.q_proj.weight": f"{name}.safetensors"}}
    (folder / INDEX).write_bytes(json.dumps(index, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    said = refusal(folder)
    assert said.startswith(INDEX)
    assert "leaves the folder" in said or "control or invisible characters" in said or "valid JSON" in said


@pytest.mark.parametrize("number", ["00000", "00001"])
def test_shards_numbered_of_none_are_files_of_any_other_name(folder: Path, number: str) -> None:
    name = f"model-{number}-of-00000.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    with LocalSource(folder) as opened:
        assert read_checkpoint(opened).shards == (name,)


# --- names of tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HIDDEN.values() if name.isascii() or name.encode("utf-8", "ignore").decode() == name])
def test_a_tensor_of_a_hidden_name_is_refused(folder: Path, name: str) -> None:
    save_file({f"a.{name}.weight": torch.ones(2)}, folder / "model.safetensors")
    assert "which has control or invisible characters in its name" in refusal(folder)


def test_a_tensor_of_an_endless_name_is_refused(folder: Path) -> None:
    longest = "x" * MAX_TENSOR_NAME
    save_file({longest: torch.ones(2)}, folder / "model.safetensors")
    assert list(streamquant.inspect(folder).checkpoint.tensors) == [longest]
    save_file({longest + "x": torch.ones(2)}, folder / "model.safetensors")
    assert f"which has a name of more than {MAX_TENSOR_NAME} characters" in refusal(folder)


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_what_a_config_says_does_not_reach_the_terminal_raw(folder: Path) -> None:
    config = {"model_type": f"x{ESCAPE}\ny" + "z" * 10_000, "architectures": [ESCAPE, 5]}
    write_config(folder, config | {"quantization_config": {"quant_method": ESCAPE}})
    for command in (["inspect", folder], ["plan", folder, "--scheme", "W8A8"], ["verify", folder]):
        output = CliRunner().invoke(cli.cli, list(map(str, command))).output
        assert all(line.isprintable() and len(line) < 2000 for line in output.splitlines()), output
        assert "\\x1b]0;pwned\\x07" in output or command[0] == "plan"


def test_what_the_system_says_does_not_reach_the_terminal_raw() -> None:
    said = cli._failure(PermissionError(13, "Permission denied", f"{ESCAPE}/config.json"))
    assert said == ("\\x1b]0;pwned\\x07\\x1b[31m/config.json: Permission denied", 4)


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


def test_links_within_the_folder_and_by_which_it_is_given_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "real").mkdir()
    (folder / "model.safetensors").rename(folder / "real" / "weights")
    (folder / "model.safetensors").symlink_to("real/weights")
    (tmp_path / "link").symlink_to(folder)
    streamquant.convert(tmp_path / "link", tmp_path / "out", scheme="W8A8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.safetensors").symlink_to(folder / "model.safetensors")
    assert len(streamquant.inspect(tmp_path / "elsewhere" / "x.safetensors").checkpoint.tensors) == 4


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


# --- sizes and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "limit"), [("config.json", MAX_CONFIG_BYTES), (INDEX, MAX_INDEX_BYTES)])
def test_a_config_of_a_gigabyte_is_refused_unread(folder: Path, file: str, limit: int) -> None:
    (folder / file).touch()
    for num_bytes in (limit + 1, 1 << 30):
        os.truncate(folder / file, num_bytes)  # sparse
        assert refusal(folder) == f"{file} of {num_bytes} bytes is too large to be what its name says; the limit is {limit}"


def test_headers_of_a_size_that_no_checkpoint_has_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", attention(), attention(1))
    monkeypatch.setattr(checkpoint, "MAX_HEADERS_BYTES", 600)
    assert len(streamquant.inspect(folder).checkpoint.tensors) == 4
    said = r"the headers up to model-00002-of-00002\.safetensors have \d{3,4} bytes; 600 are read"
    assert re.fullmatch(said, refusal(sharded))


def test_more_tensors_than_any_checkpoint_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", attention(), attention(1))
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 7)
    assert refusal(sharded) == "the shards up to model-00002-of-00002.safetensors hold 8 tensors; 7 are read"


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"MAX_HEADER_BYTES": 500}, "model-00001-of-00002.safetensors would have a header of .* bytes; give a smaller --max-shard-size"),
        ({"MAX_HEADERS_BYTES": 1500}, "the output would have 16 tensors in .* bytes of headers; 1000000 in 1500 are read"),
        ({"MAX_TENSORS": 15}, "the output would have 16 tensors in .* bytes of headers; 15 in 200000000 are read"),
    ],
)
def test_an_output_that_would_not_be_read_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], said: str
) -> None:
    folder = write_checkpoint(tmp_path / "source", attention(), attention(1))
    wish: dict[str, Any] = {"scheme": "W8A8", "max_shard_size": 70_000}
    assert len(streamquant.plan(folder, **wish).shards) == 2
    for name, value in limit.items():
        monkeypatch.setattr(sys.modules["streamquant.plan"], name, value)
    with pytest.raises(RequestError, match=said):
        streamquant.plan(folder, **wish)


def test_a_name_that_grows_too_long_in_the_output_is_refused_before(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", {"x" * (MAX_TENSOR_NAME - 7) + ".weight": weight(16, 128)})
    with pytest.raises(RequestError, match=f"the output would hold .* which has a name of more than {MAX_TENSOR_NAME} characters"):
        streamquant.plan(folder, scheme="W8A8")


def test_more_experts_than_any_checkpoint_has_are_refused_however_large_they_claim_to_be(folder: Path) -> None:
    num_experts = limits.MAX_TENSORS + 1
    header, (spec,) = build_header([("model.layers.0.mlp.experts.down_proj", "BF16", (num_experts, 64, 64))], file="x")
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", spec.end)  # sparse: 8 GB
    write_config(folder, {"model_type": "qwen3_moe"})
    with pytest.raises(CheckpointError, match=f"stack {num_experts} experts in {spec.num_bytes} bytes, which nobody does"):
        streamquant.plan(folder, scheme="FP8_DYNAMIC")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_config_that_nests_without_end_is_refused(folder: Path, opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    for levels in (MAX_JSON_DEPTH, 900, 100_000):
        write_config(folder, '{"a": ' + opening * levels + "1" + closing * levels + "}")
        assert "config.json: its JSON nests too deeply" in refusal(folder)
    write_config(folder, '{"a": ' + opening * (MAX_JSON_DEPTH - 1) + "1" + closing * (MAX_JSON_DEPTH - 1) + "}")
    streamquant.plan(folder, scheme="W8A8")


NUMBERS = {
    "a text": '"2"', "a fraction": "2.5", "infinite": "Infinity", "no number": "NaN", "too large for a double": "1e400", "below 0": "-5",
    "0": "0", "true": "true", "null": "null", "a list": "[2]", "10**18": str(10**18), "4300 digits": "9" * 4300,
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_a_number_of_layers_experts_or_heads_that_is_none_counts_as_not_said(tmp_path: Path, number: str) -> None:
    tensors = attention() | {f"mtp.layers.1.{name}.weight": weight(128, 128) for name in ("eh_proj", "mlp.up_proj")}
    folder = write_checkpoint(tmp_path / "source", tensors)
    write_config(folder, {})
    expected = streamquant.plan(folder, scheme="W8A8")
    write_config(folder, "{" + ", ".join(f'"{key}": {number}' for key in ("num_hidden_layers", "num_experts", "num_key_value_heads")) + "}")
    planned = streamquant.plan(folder, scheme="W8A8")
    assert planned.digest == expected.digest
    streamquant.engines.check(planned, engine="vllm", tp=2)


def test_an_integer_of_5000_digits_in_a_config_is_refused(folder: Path) -> None:
    write_config(folder, f'{{"vocab_size": {"1" * 5000}}}')
    assert "config.json does not hold valid JSON" in refusal(folder)


def test_what_json_does_not_have_but_configs_do_is_written_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Mamba's `time_step_limit` is [0.0, Infinity]."""
    write_config(folder, '{"time_step_limit": [0.0, Infinity], "x": NaN, "model_max_length": 1000000000000000019884624838656}')
    streamquant.convert(folder, tmp_path / "out", scheme="W8A8")
    written = (tmp_path / "out" / "config.json").read_text()
    assert all(said in written for said in ("Infinity", "NaN", "1000000000000000019884624838656"))


def test_regular_expressions_of_a_megabyte_are_refused(folder: Path) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}}
    stated = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": group}}
    write_config(folder, {"quantization_config": stated | {"ignore": ["re:" + "[a-z]*" * 100_000] * 2}})
    assert streamquant.verify(folder).problems == [
        f"quantization_config holds regular expressions of more than {limits.MAX_PATTERN_CHARS} characters"
    ]


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_prediction_layer_is_found_as_fast_among_many() -> None:
    facts = ModelFacts.from_config({}, (f"model.layers.{number}.eh_proj.weight" for number in range(50_000)))
    started = time.monotonic()
    found = [facts.prediction_layer(f"model.layers.{number}.mlp.up_proj") for number in range(40_000, 60_000)]
    assert time.monotonic() - started < 5  # it takes 0.05 s; one by one, 60 s
    assert found[:10_000] == [f"model.layers.{number}" for number in range(40_000, 50_000)]
    assert set(found[10_000:]) == {None}


def test_many_stacks_of_experts_are_found_as_fast_as_few() -> None:
    said = {"dtype": "BF16", "quantization": {}, "block": (128, 128), "scheme_of": no_scheme, "model_types": (), "expert_layout": "rows"}
    hints = Hints(**said, shape_of=lambda _: (1, 1))
    specs = [TensorSpec(f"m.{number}.experts.down_proj", "BF16", (1, 16, 16), "x", 0, 512) for number in range(15_000)]
    started = time.monotonic()
    assert len(find_stacks(specs, hints)) == 15_000
    assert time.monotonic() - started < 4  # it takes 0.3 s; each among all, 8 s


# --- code ------------------------------------------------------------------------------------------------------------


class Touch:
    """What creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_no_pickle_is_opened_and_no_code_of_the_source_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    armed = pickle.dumps(Touch(marker))
    pickle.loads(armed)
    assert marker.exists()  # so it would
    marker.unlink()
    left_out = ["pytorch_model.bin", "optimizer.pt", "consolidated.00.pth", "sub/model.ckpt", "broken.safetensors", "adapter_model.bin"]
    copied = ["scheduler.pkl", "x.pickle", "x.npy", "x.joblib", "x.json", "tokenizer.model"]
    for file in left_out + copied:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(armed)
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    scripts = ["modeling_evil.py", "configuration_evil.py", "__init__.py", "conftest.py", "sitecustomize.py", "setup.py", "sub/x.py"]
    for file in scripts:
        (folder / file).write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    write_config(folder, {"model_type": "evil", "auto_map": auto_map})
    modules = set(sys.modules)
    streamquant.inspect(folder)
    streamquant.convert(folder, tmp_path / "out", scheme="W4A16")
    assert streamquant.verify(tmp_path / "out", against=folder).problems == []
    assert not marker.exists()
    assert not [name for name in set(sys.modules) - modules if "evil" in name]
    written, sources = file_bytes(tmp_path / "out"), file_bytes(folder)
    assert {file: written[file] for file in copied + scripts} == {file: sources[file] for file in copied + scripts}
    assert not set(left_out) & written.keys()


@pytest.mark.parametrize("as_file", [True, False])
def test_a_pickle_by_the_name_of_a_shard_is_refused_unopened(folder: Path, tmp_path: Path, as_file: bool) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "marker")))
    with pytest.raises(StreamquantError):
        streamquant.plan(folder / "model.safetensors" if as_file else folder, scheme="W4A16")
    assert not (tmp_path / "marker").exists()


# --- outputs of others -----------------------------------------------------------------------------------------------

RECORDS = {
    "nothing": "", "no JSON": "[", "a list": "[]", "no end": "[" * 100_000, "no files": '{"job": {}}',
    "files in a list": '{"job": {}, "files": []}',
    "another entry": '{"shard": "a", "crc32": 1, "nonfinite": []}', "a job in a list": '{"job": [], "files": {}}',
    "no checksum": '{"job": {}, "files": {"a": {}}}', "a number": '{"job": {}, "files": {"a": 5}}',
    "a checksum in a list": '{"job": {}, "files": {"a": {"crc32": [1]}}}',
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_that_is_none_is_refused_in_one_line(folder: Path, record: str) -> None:
    (folder / "streamquant.json").write_text(record)
    said = f"{folder / 'streamquant.json'} is damaged, or not of streamquant; choose another OUT"
    with pytest.raises(RequestError, match=f"^{re.escape(said)}$"):
        streamquant.verify(folder)
    with pytest.raises(RequestError, match=f"^{re.escape(said)}$"):  # what a conversion into it begins with
        is_finished(folder, {})


def test_a_record_larger_than_any_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "streamquant.json").write_text('{"job": {}, "files": {}}')
    streamquant.verify(folder)
    monkeypatch.setattr(journal, "MAX_INDEX_BYTES", 20)
    with pytest.raises(RequestError, match="is damaged"):
        streamquant.verify(folder)


def test_a_record_reaches_no_file_outside_of_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    files = {name: {"bytes": 6, "crc32": "00000000"} for name in ("../secret", str(tmp_path / "secret"))}
    (folder / "streamquant.json").write_text(json.dumps({"job": {}, "files": files}))
    assert streamquant.verify(folder).problems[-2:] == [f"{name} is missing" for name in files]


@pytest.mark.parametrize("name", ["../precious", "{tmp}/precious", "a/../../precious", 5, ["../precious"], {}])
def test_to_restart_deletes_nothing_outside_of_the_folder(folder: Path, tmp_path: Path, name: Any) -> None:
    (tmp_path / "precious").write_text("precious")
    work = tmp_path / "out" / ".streamquant"
    work.mkdir(parents=True)
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    (work / "journal.jsonl").write_text(json.dumps({"job": {}, "files": ["model.safetensors", name]}) + "\n")
    with pytest.raises(RequestError, match="is damaged"):
        streamquant.convert(folder, tmp_path / "out", scheme="W8A8", restart=True)
    assert (tmp_path / "precious").read_text() == "precious"
