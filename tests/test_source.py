"""Folders and files as people have them: what is read, what is left out and why, what is refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamquant.checkpoint.source import COPY_CHUNK_BYTES, Checkpoint, LocalSource, read_checkpoint
from streamquant.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_sharded(folder: Path) -> Path:
    """Two shards, their index and a config."""
    folder.mkdir(parents=True)
    save_file({"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}, folder / FIRST)
    save_file({"c": torch.arange(5, dtype=torch.int64)}, folder / SECOND)
    write_json(folder / INDEX, {"metadata": {"total_size": 72}, "weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}})
    write_json(folder / "config.json", CONFIG)
    return folder


def write_single(folder: Path, name: str = "model.safetensors") -> Path:
    """One file of weights and a config."""
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(4)}, folder / name)
    write_json(folder / "config.json", CONFIG)
    return folder


def read(path: Path) -> Checkpoint:
    with LocalSource(path) as source:
        return read_checkpoint(source)


def refusal(path: Path) -> str:
    """The message with which a source is refused."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value).isprintable()  # one line
    return str(caught.value)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208, it is a count


@pytest.fixture
def sharded(tmp_path):
    return write_sharded(tmp_path / "model")


@pytest.fixture
def single(tmp_path):
    return write_single(tmp_path / "model")


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_folder_with_an_index_is_read_shard_by_shard(sharded):
    with LocalSource(sharded) as source:
        checkpoint = read_checkpoint(source)
        assert checkpoint.shards == (FIRST, SECOND)
        assert checkpoint.config == CONFIG
        assert checkpoint.side_files == ()
        assert checkpoint.left_out == {}
        theirs = {name: (tensor, shard) for shard in checkpoint.shards for name, tensor in load_file(sharded / shard).items()}
        assert checkpoint.tensors.keys() == theirs.keys()
        for name, spec in checkpoint.tensors.items():
            tensor, shard = theirs[name]
            content = bytearray(spec.num_bytes)
            source.read(spec.file, spec.start, memoryview(content))
            assert (spec.file, spec.shape) == (shard, tuple(tensor.shape))
            assert content == tensor.view(-1).view(torch.uint8).numpy().tobytes(), name
    places = [(spec.file, spec.start) for spec in checkpoint.tensors.values()]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_a_folder_with_one_file_needs_no_index(tmp_path, name):
    checkpoint = read(write_single(tmp_path / "model", name))
    assert checkpoint.shards == (name,)
    assert checkpoint.config == CONFIG


@pytest.mark.parametrize("config", [CONFIG, None])
def test_a_file_is_read_with_the_config_beside_it_and_nothing_else(sharded, config):
    if config is None:
        (sharded / "config.json").unlink()
    checkpoint = read(sharded / SECOND)
    assert checkpoint.shards == (SECOND,)
    assert list(checkpoint.tensors) == ["c"]
    assert checkpoint.config == config
    assert checkpoint.side_files == ()
    assert checkpoint.left_out == {}


def test_a_folder_without_a_config_has_none(single):
    (single / "config.json").unlink()
    assert read(single).config is None


def test_tensors_that_the_index_forgot_are_read_all_the_same(sharded):
    write_json(sharded / INDEX, {"weight_map": {"a": FIRST, "c": SECOND}})
    assert set(read(sharded).tensors) == {"a", "b", "c"}


def test_shards_may_lie_in_subfolders(tmp_path):
    write_single(tmp_path / "model" / "weights")
    write_json(tmp_path / "model" / INDEX, {"weight_map": {"a": "weights/model.safetensors"}})
    assert read(tmp_path / "model").tensors["a"].file == "weights/model.safetensors"


def test_the_layout_of_the_hub_cache_is_read_through_its_links(tmp_path, sharded):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    checkpoint = read(snapshot)
    assert checkpoint.shards == (FIRST, SECOND)
    assert checkpoint.config == CONFIG
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert set(read(snapshot / SECOND).tensors) == {"c"}


def test_a_checkpoint_of_a_terabyte_is_read_from_its_header(tmp_path):
    num_bytes = 1 << 40
    header = json.dumps({"a.weight": {"dtype": "U8", "shape": [1 << 20, 1 << 20], "data_offsets": [0, num_bytes]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)  # sparse
    assert read(tmp_path).tensors["a.weight"].num_bytes == num_bytes


def test_the_identity_changes_with_the_header_and_with_the_time_of_a_shard(sharded):
    before = read(sharded).identity
    assert read(sharded).identity == before
    os.utime(sharded / FIRST, ns=(0, 1))
    touched = read(sharded).identity
    assert {shard for shard in before if before[shard] != touched[shard]} == {FIRST}
    save_file({"c": torch.arange(5, dtype=torch.int64)}, sharded / SECOND, metadata={"note": "saved again"})
    saved = read(sharded).identity
    assert {shard for shard in touched if touched[shard] != saved[shard]} == {SECOND}


# --- side files and what is left out ---------------------------------------------------------------------------------


def test_side_files_are_listed_but_not_what_a_conversion_writes_anew(single):
    side_files = ["README.md", "chat_template.jinja", "generation_config.json", "modeling_x.py", "tokenizer.json", "tokenizer.model"]
    side_files += ["1_Pooling/config.json", "original/deep/params.json", ".gitattributes", "empty.txt", "Größe\n.txt"]
    anew = ["streamquant.json", ".git/config", ".cache/huggingface/download/a.lock"]
    for file in side_files + anew:
        (single / file).parent.mkdir(parents=True, exist_ok=True)
        (single / file).write_text("" if file == "empty.txt" else "x", encoding="utf-8")
    checkpoint = read(single)
    assert sorted(checkpoint.side_files) == sorted(side_files)
    assert checkpoint.left_out == {}


def test_other_weights_are_left_out_with_a_reason(sharded):
    """llm-compressor takes every .safetensors file for a shard and fails on Mistral's folders (E4)."""
    save_file({"a": torch.ones(9)}, sharded / "consolidated.safetensors")  # the same names again
    (sharded / "broken.safetensors").write_bytes(b"")
    others = ["pytorch_model-00001-of-00002.bin", "model.Q4_K_M.gguf", "original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5"]
    for file in others:
        (sharded / file).parent.mkdir(parents=True, exist_ok=True)
        (sharded / file).write_bytes(b"no weights at all")
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    checkpoint = read(sharded)
    assert checkpoint.shards == (FIRST, SECOND)
    assert checkpoint.side_files == ()
    assert checkpoint.left_out == {
        "broken.safetensors": "not a shard of this checkpoint",
        "consolidated.safetensors": "not a shard of this checkpoint",
        "pytorch_model.bin.index.json": "index of other weights",
        **dict.fromkeys(others, "weights in another format"),
    }


def test_a_model_safetensors_wins_over_files_beside_it_where_no_index_decides(single):
    save_file({"a": torch.ones(9)}, single / "consolidated.safetensors")
    checkpoint = read(single)
    assert checkpoint.shards == ("model.safetensors",)
    assert list(checkpoint.left_out) == ["consolidated.safetensors"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_source_that_is_neither_a_folder_nor_a_safetensors_file_is_refused(tmp_path, single):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "is not a .safetensors file" in refusal(single / "config.json")
    (single / "gone.safetensors").symlink_to("nowhere")
    assert "does not exist" in refusal(single / "gone.safetensors")


def test_a_folder_without_weights_is_refused(single):
    (single / "model.safetensors").unlink()
    assert refusal(single) == f"{single} holds no .safetensors file"


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert refusal(sharded) == f"{sharded} holds 2 .safetensors files and no {INDEX} that says which belong together"


def test_a_missing_shard_is_refused(sharded):
    (sharded / SECOND).unlink()
    assert refusal(sharded) == f"{INDEX} names {SECOND}, which is not in {sharded}; is the download complete?"


def test_a_truncated_shard_is_refused(sharded):
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    assert f"{SECOND}: truncated" in refusal(sharded)
    os.truncate(sharded / SECOND, 0)
    assert f"{SECOND}: 0 bytes are too few" in refusal(sharded)


@pytest.mark.parametrize("shard", [FIRST, SECOND])
def test_an_index_entry_that_its_shard_lacks_is_refused(sharded, shard):
    write_json(sharded / INDEX, {"weight_map": {"a": FIRST, "c": SECOND, "d": shard}})
    assert refusal(sharded) == f"{INDEX} places d in {shard}, which does not have it"


def test_an_index_entry_in_the_wrong_shard_is_refused(sharded):
    write_json(sharded / INDEX, {"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}})
    assert refusal(sharded) == f"{INDEX} places b in {SECOND}, which does not have it"


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, sharded / SECOND)
    assert refusal(sharded) == f"a is in both {FIRST} and {SECOND}"


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "x/../../other/model.safetensors", "/abs.safetensors", "..\\x.safetensors", "a\0.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, single, shard):
    write_single(tmp_path / "other")
    write_json(single / INDEX, {"weight_map": {"a": shard}})
    assert refusal(single) == f"{INDEX} names {shard!r}, which leaves the folder"


@pytest.mark.parametrize("shard", ["model.bin", "config.json", "", "."])
def test_an_index_of_other_files_is_refused(single, shard):
    write_json(single / INDEX, {"weight_map": {"a": shard}})
    assert refusal(single) == f"{INDEX} names {shard!r}, which is not a .safetensors file"


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        (INDEX, b'{"weight_map": {"a": "model.saf', "valid JSON"),
        (INDEX, b"", "valid JSON"),
        (INDEX, b"[]", "does not hold a JSON object"),
        (INDEX, b"{}", "weight_map must map tensor names to file names"),
        (INDEX, b'{"weight_map": ["a"]}', "weight_map must map tensor names to file names"),
        (INDEX, b'{"weight_map": {"a": 1}}', "weight_map must map tensor names to file names"),
        (INDEX, b'{"weight_map": {}}', "weight_map is empty"),
        (INDEX, b'{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}', "'a' appears twice"),
        ("config.json", b'{"model_type": ', "valid JSON"),
        ("config.json", b'"llama"', "does not hold a JSON object"),
        ("config.json", b"\xff{}", "valid JSON"),
        ("config.json", b'{"model_type": "\\ud83d"}', "valid JSON"),
    ],
)
def test_a_broken_index_or_config_is_refused(single, file, content, fault):
    (single / file).write_bytes(content)
    message = refusal(single)
    assert message.startswith(file)
    assert fault in message


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("loop", [False, True], ids=["to nothing", "to itself"])
def test_a_link_that_leads_nowhere_is_refused(single, name, loop):
    (single / name).unlink(missing_ok=True)
    (single / name).symlink_to(name if loop else "nowhere")
    assert str(single / name) in refusal(single)


def test_a_pipe_is_refused_and_not_waited_for(single):
    os.mkfifo(single / "pipe")
    assert refusal(single) == f"{single / 'pipe'} is not a regular file"
    (single / "pipe").rename(single / "pipe.safetensors")
    assert "pipe.safetensors" in refusal(single / "pipe.safetensors")


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    """A file of more than one chunk, with content that tells where it is from."""
    content = torch.arange(COPY_CHUNK_BYTES // 4 + 5, dtype=torch.int32).view(torch.uint8).numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(content)
    return LocalSource(tmp_path), content


def test_threads_may_read_the_same_file_at_once(large):
    source, content = large
    starts = range(0, len(content) - 1000, 99_991)

    def read_at(start: int) -> bytes:
        buffer = bytearray(1000)
        source.read("a.safetensors", start, memoryview(buffer))
        return bytes(buffer)

    before = num_open_files()
    with source, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(read_at, starts)) == [content[start : start + 1000] for start in starts]
        assert num_open_files() == before + 1
    assert num_open_files() == before


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize(("start", "cut", "target_start"), [(0, 0, 0), (13, 7, 1001), (5, COPY_CHUNK_BYTES, 3)])
def test_a_copy_equals_the_bytes_on_the_same_file_system_and_on_another(large, tmp_path, kind, start, cut, target_start):
    source, content = large
    num_bytes = len(content) - start - cut
    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT) if kind == "file" else os.memfd_create("copy")
    try:
        with source:
            source.copy("a.safetensors", start, num_bytes, target, target_start)
        assert os.pread(target, len(content) + target_start, 0) == bytes(target_start) + content[start : start + num_bytes]
    finally:
        os.close(target)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_file_that_shrank_since_its_header_was_read_is_an_error(large, tmp_path, kind):
    source, content = large
    target = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT) if kind == "file" else os.memfd_create("copy")
    message = f"a.safetensors ends at byte {len(content)}; it was longer when its header was read"
    try:
        with source:
            with pytest.raises(CheckpointError, match=message):
                source.copy("a.safetensors", 10, len(content), target, 0)
            with pytest.raises(CheckpointError, match=message):
                source.read("a.safetensors", len(content) - 5, memoryview(bytearray(6)))
    finally:
        os.close(target)
