"""Folders and files as people have them: what is read, what is left out and why, what is refused."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamquant.checkpoint.checkpoint import Checkpoint, read_checkpoint
from streamquant.checkpoint.layout import Layout
from streamquant.checkpoint.local import LocalSource
from streamquant.errors import CheckpointError
from tests.checkpoints import write_mistral

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


@pytest.mark.parametrize("stem", ["model", "consolidated", "pytorch_model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("indexed", [True, False])
def test_numbered_shards_are_read_under_any_name_with_an_index_and_without(sharded, stem, indexed):
    names = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for old, new in zip((FIRST, SECOND), names, strict=True):
        (sharded / old).rename(sharded / new)
    (sharded / INDEX).unlink()
    if indexed:
        write_json(sharded / f"{stem}.safetensors.index.json", {"weight_map": {"a": names[0], "b": names[0], "c": names[1]}})
    checkpoint = read(sharded)
    assert checkpoint.shards == tuple(names)
    assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert (checkpoint.side_files, checkpoint.left_out) == ((), {})
    expected = "model" if stem == "pytorch_model" and not indexed else stem  # a name that no program looks for
    assert checkpoint.layout == Layout(expected, "config.json")


def test_a_part_of_a_pipeline_is_an_ordinary_checkpoint(tmp_path):
    folder = write_single(tmp_path / "transformer", "diffusion_pytorch_model.safetensors")
    save_file({"a": torch.ones(9)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    write_json(folder / "diffusion_pytorch_model.safetensors.index.fp16.json", {"weight_map": {}})
    checkpoint = read(folder)
    assert checkpoint.shards == ("diffusion_pytorch_model.safetensors",)
    assert checkpoint.layout.shard_name(1, 1) == "diffusion_pytorch_model.safetensors"
    assert checkpoint.left_out == {
        "diffusion_pytorch_model.fp16.safetensors": "not a shard of this checkpoint",
        "diffusion_pytorch_model.safetensors.index.fp16.json": "index of other weights",
    }


@pytest.mark.parametrize("as_file", [True, False])
def test_mistrals_own_layout_has_its_config_in_params_json(tmp_path, as_file):
    folder = write_mistral(tmp_path / "model", {"norm.weight": torch.ones(4)})
    checkpoint = read(folder / "consolidated.safetensors" if as_file else folder)
    assert checkpoint.shards == ("consolidated.safetensors",)
    assert checkpoint.config == {"dim": 128, "n_layers": 2, "head_dim": 32}
    assert checkpoint.layout == Layout("consolidated", "params.json")
    assert checkpoint.side_files == ()


def test_with_both_configs_the_weights_decide_which_one_counts(single):
    write_json(single / "params.json", {"dim": 8})
    (single / "model.safetensors").rename(single / "consolidated.safetensors")
    checkpoint = read(single)
    assert (checkpoint.config, checkpoint.side_files) == ({"dim": 8}, ("config.json",))
    save_file({"a": torch.ones(4)}, single / "model.safetensors")
    checkpoint = read(single)
    assert (checkpoint.config, checkpoint.side_files) == (CONFIG, ("params.json",))
    assert checkpoint.shards == ("model.safetensors",)


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
    blobs, snapshot = (tmp_path / "models--org--name" / part for part in ("blobs", "snapshots/0123abcd"))
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
    side_files += ["1_Pooling/config.json", "original/deep/params.json", ".gitattributes", "empty.txt", "Größe\u202f.txt"]
    anew = ["streamquant.json", ".git/config", "vae/.git", ".cache/huggingface/download/a.lock"]
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


def test_an_adapter_beside_the_model_is_left_out(single):
    files = ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"]
    files += ["adapter_model.bin", "adapter_config.json", "vision-lora/adapter_model.safetensors", "vision-lora/adapter_config.json"]
    for file in files:
        (single / file).parent.mkdir(exist_ok=True)
        (single / file).write_bytes(b"never read")
    (single / "adapter_modeling.py").write_text("class Adapter: ...")
    checkpoint = read(single)
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.left_out == dict.fromkeys(files, "LoRA adapter")
    assert checkpoint.side_files == ("adapter_modeling.py",)


def test_descriptions_of_another_quantization_are_left_out(single):
    files = ["hf_quant_config.json", "quantize_config.json", "quant_config.json"]
    for file in files:
        write_json(single / file, {"quant_method": "gptq"})
    write_json(single / "params.json", {"dim": 8, "quantization": {"qformat_weight": "fp8_e4m3"}})
    checkpoint = read(single)
    assert checkpoint.left_out == dict.fromkeys([*files, "params.json"], "describes another quantization")
    assert checkpoint.side_files == ()


@pytest.mark.parametrize("content", ['{"dim": 8}', '{"dim": 8, "quantization": {}}', "[1]", "no JSON"])
def test_a_params_json_of_any_other_content_is_a_side_file(single, content):
    (single / "params.json").write_text(content)
    checkpoint = read(single)
    assert checkpoint.side_files == ("params.json",)
    assert (checkpoint.layout, checkpoint.config) == (Layout("model", "config.json"), CONFIG)


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


def test_several_files_without_an_index_are_refused(tmp_path):
    folder = write_single(tmp_path / "model", "one.safetensors")
    save_file({"b": torch.ones(4)}, folder / "two.safetensors")
    said = f"{folder} holds 2 .safetensors files and no {INDEX} that says which belong together; give one of them as SOURCE"
    assert refusal(folder) == said


@pytest.mark.parametrize("missing", [FIRST, SECOND])
def test_numbered_shards_of_which_one_is_missing_are_refused_by_its_name(sharded, missing):
    for file in (INDEX, missing):
        (sharded / file).unlink()
    save_file({"a": torch.ones(4)}, sharded / "consolidated.safetensors")  # no way out: it may be another model
    assert refusal(sharded) == f"{missing} is not in {sharded}, which holds 1 of the 2; is the download complete?"


def test_numbered_shards_of_two_counts_are_refused(sharded):
    (sharded / INDEX).unlink()
    extra = "model-00003-of-00003.safetensors"
    save_file({"d": torch.ones(4)}, sharded / extra)
    assert refusal(sharded) == f"{sharded} holds {extra} besides {FIRST} to {SECOND}; add {INDEX} or take it away"


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_pipeline_of_diffusers_is_refused_with_the_folders_to_point_at(tmp_path, pipeline):
    folder = tmp_path / "pipeline"
    write_single(folder / "transformer", "diffusion_pytorch_model.safetensors")
    write_single(folder / "text_encoder")
    if pipeline:
        write_json(folder / "model_index.json", {"_class_name": "FluxPipeline"})
        save_file({"a": torch.ones(4)}, folder / "flux1-dev.safetensors")
    said = f"{folder} has its weights in subfolders; give one as SOURCE: {folder}/text_encoder, {folder}/transformer"
    assert refusal(folder) == said


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_alone_are_refused_with_the_reason(single, file):
    (single / "model.safetensors").rename(single / file)
    said = f"{single} holds no .safetensors file, but pickles such as {file}, which can run code when opened and are not read; "
    assert refusal(single) == said + "save the model as safetensors first, as save_pretrained of transformers does"


def test_gguf_alone_is_refused_with_the_reason(single):
    (single / "model.safetensors").rename(single / "model-Q4_K_M.gguf")
    said = f"{single} holds only GGUF files, llama.cpp's own format; give the safetensors checkpoint they were made from as SOURCE"
    assert refusal(single) == said


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_refused(single, file):
    (single / "model.safetensors").rename(single / file)
    said = "holds nothing but a LoRA adapter; merge it into its base model first and give the merged model as SOURCE"
    assert refusal(single) == f"{single} {said}"
    if file.endswith(".safetensors"):
        assert refusal(single / file) == f"{file} {said}"


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
    "shard", ["../other/model.safetensors", "x/../../other/model.safetensors", "/abs.safetensors", "..\\x.safetensors"]
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
    """A file of 8 MB, with content that tells where it is from."""
    content = torch.arange((2 << 20) + 5, dtype=torch.int32).view(torch.uint8).numpy().tobytes()
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
        assert num_open_files() <= before + 16  # one for each thread
    assert num_open_files() == before


def test_a_file_that_shrank_since_its_header_was_read_is_an_error(large):
    source, content = large
    message = f"a.safetensors ends at byte {len(content)}; it was longer when its header was read"
    with source, pytest.raises(CheckpointError, match=message):
        source.read("a.safetensors", len(content) - 5, memoryview(bytearray(6)))
