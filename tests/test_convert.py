"""The whole job on small real checkpoints: the same bytes whatever the machine does, whole or not at all, nothing lost."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import streamquant
from streamquant import memory, stream
from streamquant.checkpoint.header import build_header
from streamquant.checkpoint.limits import MAX_JSON_DEPTH
from streamquant.errors import CheckpointError, RequestError, StorageError
from streamquant.plan import Copy, Encode
from tests.checkpoints import (
    DATA_FREE,
    WIKI_LLAMA,
    attention,
    file_bytes,
    mistral_layer,
    mlp,
    read_config,
    read_tensors,
    weight,
    write_checkpoint,
    write_mistral,
)

ROOT = Path(streamquant.__file__).parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards with partners in both, side files, weights in other formats."""
    layers = attention() | mlp("model.layers.0.mlp", rows=384) | mlp("model.layers.0.mlp.experts.0", seed=40)
    first = {name: tensor for index, (name, tensor) in enumerate(layers.items()) if index % 2}
    second = {name: tensor for name, tensor in layers.items() if name not in first}
    others = {"model.embed_tokens.weight": weight(300, 128), "model.norm.weight": weight(128), "model.step": torch.tensor(7)}
    side_files = {
        "tokenizer.json": "{}",
        "modeling_x.py": "print('never run')",
        "chat/template.jinja": "{{ }}",
        "pytorch_model.bin": "pickle",
    }
    return write_checkpoint(tmp_path / "source", first, second | others, side_files=side_files)


def test_an_output_holds_what_was_planned_and_everything_else_of_the_source(source: Path, tmp_path: Path) -> None:
    conversion = streamquant.convert(source, tmp_path / "out", scheme="W4A16", ignore=["*.o_proj"], max_shard_size=60_000)
    out, written = tmp_path / "out", read_tensors(tmp_path / "out")
    before = read_tensors(source)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.step", "model.layers.0.self_attn.o_proj.weight"):
        assert torch.equal(written[name], before[name])
    assert "model.layers.0.self_attn.q_proj.weight" not in written
    assert list(written["model.layers.0.self_attn.q_proj.weight_shape"]) == [128, 128]
    assert {spec.name for step in conversion.plan.steps for spec in step.outputs} == written.keys()
    for file in ("tokenizer.json", "modeling_x.py", "chat/template.jinja"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / ".streamquant").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    config = json.loads((out / "config.json").read_text())
    assert list(config)[:-1] == list(json.loads((source / "config.json").read_text()))
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "W4A16_ASYM", "W3A16", "NVFP4A16", "MXFP4", "FP8A16"])
def test_threads_blocks_and_budget_change_no_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    wish: dict[str, Any] = {"scheme": scheme, "max_shard_size": 100_000}
    if scheme == "FP8A16":
        wish["strategy"] = "tensor"
    streamquant.convert(source, tmp_path / "one", threads=1, **wish)
    expected = file_bytes(tmp_path / "one")
    monkeypatch.setattr(memory, "BLOCK_ELEMENTS", 5 * 128)
    monkeypatch.setattr(memory, "MAX_KEEP_BYTES", 0)  # what shares a scale is read twice
    monkeypatch.setattr("streamquant.stream.TASK_BYTES", 9 * 256)
    streamquant.convert(source, tmp_path / "many", threads=4, **wish)
    assert file_bytes(tmp_path / "many") == expected


def test_weights_of_several_dtypes_share_a_scale(tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn"
    tensors = {
        f"{attention}.q_proj.weight": torch.randn(3, 5).bfloat16(),  # 30 bytes: the next one does not begin where a float32 may
        f"{attention}.k_proj.weight": torch.randn(1, 5),
        f"{attention}.v_proj.weight": torch.randn(1, 5).half(),
    }
    source = write_checkpoint(tmp_path / "model", tensors)
    streamquant.convert(source, tmp_path / "out", scheme="FP8A16", strategy="tensor", scale_dtype="float32")
    written = read_tensors(tmp_path / "out")
    largest = max(tensor.float().abs().max() for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert written[f"{name}_scale"] == largest / 448
        assert torch.equal(written[name].float(), (tensor.float() / (largest / 448)).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("scheme", ["NVFP4A16", "W4A16", "FP8_BLOCK"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_changes_no_byte(tmp_path: Path, scheme: str) -> None:
    every_gpu = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    wishes: dict[str, dict[str, Any]] = {
        "reference": {"device": "cuda", "kernels": "torch"},
        "triton": {"device": "cuda", "kernels": "triton"},
        "every GPU": {"device": every_gpu, "max_gpu_memory": "1GiB", "threads": 2 * torch.cuda.device_count()},
    }
    streamquant.convert(WIKI_LLAMA, tmp_path / "cpu", scheme=scheme, observer="mse", device="cpu")
    for name, wish in wishes.items():
        streamquant.convert(WIKI_LLAMA, tmp_path / name, scheme=scheme, observer="mse", **wish)
        assert file_bytes(tmp_path / name) == file_bytes(tmp_path / "cpu"), name


def test_fused_weights_share_one_global_scale_wherever_they_lie(source: Path, tmp_path: Path) -> None:
    """llm-compressor gives the gate and up of experts different ones (E1)."""
    streamquant.convert(source, tmp_path / "out", scheme="NVFP4A16")
    written, before = read_tensors(tmp_path / "out"), read_tensors(source)
    for prefix, roles in (
        ("model.layers.0.self_attn", ("q_proj", "k_proj", "v_proj")),
        ("model.layers.0.mlp", ("gate_proj", "up_proj")),
        ("model.layers.0.mlp.experts.0", ("gate_proj", "up_proj")),
    ):
        scales = {float(written[f"{prefix}.{role}.weight_global_scale"]) for role in roles}
        amax = max(before[f"{prefix}.{role}.weight"].abs().amax() for role in roles)
        assert len(scales) == 1
        assert scales.pop() == pytest.approx(2688 / float(amax), rel=2**-7)
    assert not streamquant.verify(tmp_path / "out", against=source).problems


@pytest.mark.parametrize("scheme", ["W4A8", "W4AFP8"])
def test_w4a8_is_stored_packed_as_vllm_wants_it(source: Path, tmp_path: Path, scheme: str) -> None:
    """llm-compressor stores int8 that the kernels do not load (E11). Only the experts of W4A8 are read as bytes."""
    streamquant.convert(source, tmp_path / "out", scheme=scheme)
    written = read_tensors(tmp_path / "out")
    assert written["model.layers.0.self_attn.q_proj.weight_packed"].dtype == torch.int32
    expert = "model.layers.0.mlp.experts.0.up_proj"
    groups = {group["format"]: group for group in read_config(tmp_path / "out")["config_groups"].values()}
    assert all(group["weights"]["num_bits"] == 4 and group["input_activations"]["num_bits"] == 8 for group in groups.values())
    if scheme == "W4A8":
        assert groups.keys() == {"pack-quantized", "int-quantized"}
        assert written[f"{expert}.weight"].dtype == torch.int8
        assert written[f"{expert}.weight"].abs().max() <= 8
    else:
        assert groups.keys() == {"pack-quantized"}
        assert f"{expert}.weight_packed" in written
    assert not streamquant.verify(tmp_path / "out", against=source).problems


def test_mixed_precision_is_one_recipe_file_and_disjoint_groups(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.experts.*"\nscheme = "NVFP4A16"\n[[rule]]\nmatch = "*.self_attn"\nscheme = "FP8_BLOCK"\n')
    streamquant.convert(source, tmp_path / "out", recipe=recipe)
    config = read_config(tmp_path / "out")
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"nvfp4-pack-quantized", "float-quantized"}
    assert "model.layers.0.mlp.down_proj" in config["ignore"]
    assert not streamquant.verify(tmp_path / "out", against=source).problems


def test_one_file_is_a_source_as_well(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", attention())
    (folder / "config.json").unlink()
    file = (folder / "model.safetensors").rename(folder / "anything.safetensors")
    streamquant.convert(file, tmp_path / "out", scheme="W8A8")
    assert list(json.loads((tmp_path / "out" / "config.json").read_text())) == ["quantization_config"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "streamquant.json"]


def test_mistrals_own_layout_is_kept_and_described_in_params_json(tmp_path: Path) -> None:
    ends = {"tok_embeddings.weight": weight(300, 128), "norm.weight": weight(128), "output.weight": weight(300, 128)}
    tower = {"vision_encoder.transformer.layers.0.attention.wq.weight": weight(128, 128), "patch_merger.w.weight": weight(128, 512)}
    shards = mistral_layer(0), mistral_layer(1, seed=80) | ends | tower
    source = write_mistral(tmp_path / "source", *shards, params={"quantization": {"stale": True}, "norm_eps": 1e-5})
    wish: dict[str, Any] = {"scheme": "NVFP4A16", "max_shard_size": 200_000}
    conversion = streamquant.convert(source, tmp_path / "out", **wish)
    out, num_shards = tmp_path / "out", len(conversion.plan.shards)
    assert num_shards > 1
    assert {path.name for path in out.iterdir()} == {
        *(f"consolidated-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)),
        "consolidated.safetensors.index.json", "params.json", "streamquant.json",
    }  # fmt: skip
    params = json.loads((out / "params.json").read_text())
    assert list(params) == list(json.loads((source / "params.json").read_text()))
    assert params["quantization"] == conversion.plan.quantization_config
    assert {member.module for step in conversion.plan.steps if isinstance(step, Encode) for member in step.members} == {
        f"layers.{layer}.{module}"
        for layer in (0, 1)
        for module in ("attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    }
    report = streamquant.verify(out, against=source)
    assert not report.problems
    assert report.num_quantized == 8
    assert streamquant.inspect(out).checkpoint.layout == conversion.plan.checkpoint.layout
    assert streamquant.convert(source, out, **wish).resumed_shards == num_shards


def test_one_file_in_mistrals_own_layout_stays_one_file_whatever_its_scheme(tmp_path: Path) -> None:
    source = write_mistral(tmp_path / "source", mistral_layer())
    for file in (source, source / "consolidated.safetensors"):
        out = tmp_path / f"out-{file.name}"
        streamquant.convert(file, out, scheme="FP8_DYNAMIC", include=["*.attention"])
        assert {path.name for path in out.iterdir()} == {"consolidated.safetensors", "params.json", "streamquant.json"}
        assert read_tensors(out)["layers.0.attention.wq.weight"].dtype == torch.float8_e4m3fn
        assert not streamquant.verify(out, against=source).problems
    with pytest.raises(RequestError, match=r"params.json describes compressed-tensors only; leave out --format fp8"):
        streamquant.convert(source, tmp_path / "native", scheme="FP8_BLOCK", format="fp8")


def test_a_part_of_a_pipeline_keeps_its_names(tmp_path: Path) -> None:
    layers = {f"blocks.{index}.attn.to_{role}.weight": weight(128, 128) for index in (0, 1) for role in "qkv"}
    source = write_checkpoint(tmp_path / "transformer", layers, config={"_class_name": "X"}, stem="diffusion_pytorch_model")
    streamquant.convert(source, tmp_path / "out", scheme="W4A16", max_shard_size=30_000)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert not streamquant.verify(tmp_path / "out", against=source).problems


def test_no_stale_description_of_a_quantization_stays_beside_ours(tmp_path: Path) -> None:
    stale = {"quant_method": "gptq"}
    thinker = {"model_type": "x", "text_config": {"a": 1, "quantization_config": {}, "b": 2}, "quantization_config": {}}
    config = {
        "text_config": {"num_hidden_layers": 2, "quantization_config": {}, "vocab_size": 9}, "thinker_config": thinker,
        "compression_config": {}, "quantization_config": {}, "vocab_size": 9,
    }  # fmt: skip
    files = {name: json.dumps(stale) for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json")}
    source = write_checkpoint(tmp_path / "source", attention(), config=config, side_files=files)
    conversion = streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert conversion.plan.checkpoint.left_out == dict.fromkeys(files, "describes another quantization")
    assert not any((tmp_path / "out" / file).exists() for file in files)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    keys = ["model_type", "num_hidden_layers", "text_config", "thinker_config", "quantization_config", "vocab_size"]
    assert list(written) == keys
    assert written["quantization_config"] == conversion.plan.quantization_config
    assert written["text_config"] == {"num_hidden_layers": 2, "vocab_size": 9}
    assert written["thinker_config"] == {"model_type": "x", "text_config": {"a": 1, "b": 2}}


def test_a_config_as_deep_as_is_read_is_written(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", attention())
    config = '{"a": ' * MAX_JSON_DEPTH + "1" + "}" * MAX_JSON_DEPTH
    (source / "config.json").write_text(config)
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert "".join((tmp_path / "out" / "config.json").read_text().split()).startswith(config.replace(" ", "")[:-1])


def test_tensors_of_rare_dtypes_are_listed_and_copied(tmp_path: Path) -> None:
    """llm-compressor fails on F8_E8M0 (E6); the safetensors library has no torch dtype for the F6 ones."""
    source = write_checkpoint(tmp_path / "source", attention())
    rare = {"F8_E8M0": 8, "F8_E5M2": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "F64": 64, "C64": 64}
    header, _ = build_header([(f"x.{name.lower()}", name, (4, 8)) for name in rare], file="x")
    content = torch.randint(0, 2, (sum(32 * bits // 8 for bits in rare.values()),), dtype=torch.uint8).numpy().tobytes()
    (source / "extra.safetensors").write_bytes(header + content)
    names = [*attention(), *(f"x.{name.lower()}" for name in rare)]
    weight_map = {name: "extra.safetensors" if name.startswith("x.") else "model.safetensors" for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {spec.dtype for spec in streamquant.inspect(source).checkpoint.tensors.values()} == {"BF16", *rare}
    conversion = streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    copied = {step.output.dtype: step for step in conversion.plan.steps if isinstance(step, Copy)}
    assert copied.keys() == rare.keys()
    for step in copied.values():
        theirs = (source / step.source.file).read_bytes()[step.source.start : step.source.end]
        assert (tmp_path / "out" / step.output.file).read_bytes()[step.output.start : step.output.end] == theirs
    assert not streamquant.verify(tmp_path / "out", against=source).problems


# --- whole or not at all ---------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for a kill at a chosen moment."""


@pytest.mark.parametrize("after", [1, 3, 5, 8])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(source: Path, tmp_path: Path, after: int) -> None:
    wish: dict[str, Any] = {"scheme": "NVFP4A16", "max_shard_size": 30_000, "threads": 1}
    whole = streamquant.convert(source, tmp_path / "whole", **wish)
    assert len(whole.plan.shards) > 4
    calls = 0

    def stop(_: streamquant.Progress) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop

    with pytest.raises(Stop):
        streamquant.convert(source, tmp_path / "out", on_progress=stop, **wish)
    assert not (tmp_path / "out" / "config.json").exists()
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    finished = len(list((tmp_path / "out").glob("*.safetensors")))
    assert streamquant.convert(source, tmp_path / "out", **wish).resumed_shards == finished
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15])
def test_kill_9_leaves_nothing_that_loads_and_the_same_command_finishes_it(tmp_path: Path, delay: float) -> None:
    tensors = {f"model.layers.{index}.mlp.up_proj.weight": weight(512, 1024, seed=index) for index in range(12)}
    source, out = write_checkpoint(tmp_path / "source", tensors), tmp_path / "out"
    wish = ["--scheme", "W4A16", "--observer", "mse", "--max-shard-size", "600KB", "--threads", "1"]
    command = [sys.executable, "-m", "streamquant", "convert", str(source), str(out), *wish, "--quiet"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_in_work = (out / ".streamquant").exists()
    assert killed_in_work != (out / "config.json").exists()
    subprocess.run(command, cwd=ROOT, check=True)
    streamquant.convert(source, tmp_path / "whole", scheme="W4A16", observer="mse", max_shard_size="600KB")
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_a_finished_output_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    first = streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert again.resumed_shards == len(first.plan.shards)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_the_output_of_another_job_is_refused_with_what_differs(source: Path, tmp_path: Path) -> None:
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    with pytest.raises(RequestError, match=r"another job: its recipe is .*W4A16.*now it is .*W8A8"):
        streamquant.convert(source, tmp_path / "out", scheme="W8A8")
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(RequestError, match="another job: its source files"):
        streamquant.convert(source, tmp_path / "out", scheme="W4A16")


def test_nothing_of_the_users_is_touched(source: Path, tmp_path: Path) -> None:
    before = file_bytes(source)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for out, said in (
        (source, "inside SOURCE"),
        (source / "quantized", "inside SOURCE"),
        (source.parent, "contains SOURCE"),
        (mine, "not empty"),
        (mine / "thesis.txt", "is a file"),
    ):
        with pytest.raises(RequestError, match=said):
            streamquant.convert(source, out, scheme="W4A16")
    assert file_bytes(source) == before
    assert file_bytes(mine) == {"thesis.txt": b"years of work"}


def test_nothing_is_written_when_planning_fails(source: Path, tmp_path: Path) -> None:
    """llm-compressor swallows the failed check and stops after the first shard is written (E10)."""
    with pytest.raises(RequestError, match="needs a multiple"):
        streamquant.convert(source, tmp_path / "out", scheme="W4A16", group_size=96)
    assert not (tmp_path / "out").exists()


def test_a_shard_beside_a_consolidated_copy_is_no_problem(source: Path, tmp_path: Path) -> None:
    """Every Mistral repository has both; llm-compressor raises (E4)."""
    (source / "consolidated.safetensors").write_bytes((source / "model-00001-of-00002.safetensors").read_bytes())
    conversion = streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert "consolidated.safetensors" in conversion.plan.checkpoint.left_out
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_a_full_disk_is_told_before_and_the_folder_can_be_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(StorageError, match=r"needs .* bytes more and its file system has 1000 free"):
        streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    monkeypatch.undo()
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")


# --- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "wish", [{"scheme": "W4A16"}, {"scheme": "NVFP4A16"}, {"scheme": "FP8_DYNAMIC", "observer": "mse"}, {"scheme": "MXFP4"}]
)
def test_weights_that_are_not_finite_stop_the_run_by_name_or_count_as_zeros(tmp_path: Path, bad: float, wish: dict[str, Any]) -> None:
    tensors = attention()
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name][3, 5] = bad
    source = write_checkpoint(tmp_path / "bad", tensors)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite weights; --allow-nonfinite"):
        streamquant.convert(source, tmp_path / "out", **wish)
    assert not (tmp_path / "out" / "config.json").exists()

    conversion = streamquant.convert(source, tmp_path / "allowed", allow_nonfinite=True, **wish)
    assert conversion.nonfinite == (name,)
    tensors[name][3, 5] = 0
    streamquant.convert(write_checkpoint(tmp_path / "zeroed", tensors), tmp_path / "expected", **wish)
    written, expected = read_tensors(tmp_path / "allowed"), read_tensors(tmp_path / "expected")
    assert all(torch.equal(written[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)


def test_progress_counts_every_byte_once(source: Path, tmp_path: Path) -> None:
    seen: list[streamquant.Progress] = []
    conversion = streamquant.convert(source, tmp_path / "out", scheme="NVFP4A16", on_progress=seen.append)
    assert [progress.done_bytes for progress in seen] == sorted(progress.done_bytes for progress in seen)
    assert seen[-1].done_bytes == seen[-1].total_bytes == conversion.plan.source_bytes


def test_what_is_done_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors that outlive large ones tear the heap apart; cycles wait for a collector that the command line hardly runs."""
    monkeypatch.setattr(memory, "MAX_KEEP_BYTES", 0)
    monkeypatch.setattr(stream, "TASK_BYTES", 4 * 256)
    source = write_checkpoint(tmp_path / "source", mlp("model.layers.0.mlp", rows=256))
    num_tensors = []

    def count(progress: streamquant.Progress) -> None:
        if progress.done_bytes % 8192 == 0:
            num_tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))

    gc.collect()
    gc.disable()
    try:
        streamquant.convert(source, tmp_path / "out", scheme="NVFP4A16", threads=1, on_progress=count)
        assert not [thing for thing in gc.get_objects() if type(thing) is stream._Task]
    finally:
        gc.enable()
    assert len(num_tensors) > 10
    assert max(num_tensors) - num_tensors[0] < 10  # of 128 that were scanned


def test_batches_leave_nothing_behind(source: Path, tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        streamquant.convert(source, tmp_path / "out", scheme="W4A16")
        assert not [thing for thing in gc.get_objects() if type(thing) in {stream._Task, stream._Batch, stream._StepInWork}]
    finally:
        gc.enable()


def test_torch_keeps_its_threads(source: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("scheme", DATA_FREE)
def test_the_example_converts_in_every_scheme_and_verifies_against_its_source(tmp_path: Path, scheme: str) -> None:
    streamquant.convert(WIKI_LLAMA, tmp_path / "out", scheme=scheme)
    report = streamquant.verify(tmp_path / "out", against=WIKI_LLAMA)
    assert not report.problems
    assert (report.num_quantized, report.num_copied, len(report.errors)) == (42, 15, 42)
