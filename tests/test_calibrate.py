"""The calibrated mode as a whole: what it writes is better, complete, and the same after a kill."""

import gc
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamquant
from streamquant.calibrate import budget, heap, layers, scales, solve
from streamquant.calibrate.gptq import Solution
from streamquant.calibrate.run import find_compute_dtype
from streamquant.calibrate.statistics import Statistics
from streamquant.checkpoint.journal import Journal
from streamquant.errors import CheckpointError, RequestError
from streamquant.stream import Progress
from tests.checkpoints import WIKI_LLAMA, file_bytes, read_tensors, write_model, write_wiki_llama
from tests.test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

DEFAULT_TEXT = Path(layers.__file__).parent / "default_text.txt"
OTHER_TEXT = Path(__file__).parent / "data" / "wikitext2-sample.txt"
SMALL: dict[str, Any] = {"samples": 12, "sequence_length": 64, "seed": 3}
METHODS = ("gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")


@pytest.fixture(scope="module", autouse=True)
def short_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A part of the text, which takes less time to tokenize."""
    SMALL["calibration_data"] = tmp_path_factory.mktemp("text") / "text.txt"
    SMALL["calibration_data"].write_text(DEFAULT_TEXT.read_text()[:80_000])


def convert(source: Path, out: Path, **arguments: Any) -> streamquant.Conversion:
    return streamquant.convert(source, out, **({"scheme": "W4A16"} | SMALL | arguments))


def logits(folder: Path, input_ids_BT: Tensor) -> Tensor:
    """What transformers computes with an output, in float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {}
    if getattr(config, "quantization_config", None) is not None:
        options["quantization_config"] = transformers.utils.quantization_config.CompressedTensorsConfig(run_compressed=False)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).float().eval()
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=input_ids_BT, use_cache=False).logits).log_softmax(-1)


def divergence(folder: Path, input_ids_BT: Tensor, reference: Tensor) -> float:
    """Mean KL divergence from the model that was not quantized, in nats a token."""
    return float((reference.exp() * (reference - logits(folder, input_ids_BT))).sum(-1).mean())


@pytest.fixture(scope="module")
def input_ids_BT() -> Tensor:
    transformers = pytest.importorskip("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(WIKI_LLAMA)(OTHER_TEXT.read_text())["input_ids"]
    return torch.tensor(tokens[: 8 * 128]).view(8, 128)


@pytest.fixture(scope="module")
def reference(input_ids_BT: Tensor) -> Tensor:
    return logits(WIKI_LLAMA, input_ids_BT)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_is_nearer_to_the_model_than_rounding(method: str, tmp_path: Path, input_ids_BT: Tensor, reference: Tensor) -> None:
    """Of weights with outliers in the channels that inputs have them in, which is what these methods exist for."""
    source = with_outliers(tmp_path / "source")
    more = {"samples": 48, "sequence_length": 128}
    report = convert(source, tmp_path / "out", method=method, **more)
    rounded = streamquant.convert(source, tmp_path / "rounded", scheme="W4A16")
    assert rounded.calibration is None
    ours, theirs = (divergence(tmp_path / name, input_ids_BT, reference) for name in ("out", "rounded"))
    assert ours < 0.75 * theirs
    assert report.calibration is not None
    assert report.calibration.fallbacks == []
    told = report.to_json()["calibration"]
    assert (told["method"], told["samples"], told["tokens"]) == (method, 48, 48 * 128)
    assert {record["name"] for record in told["weights"]} == set(report.to_json()["quantized"])
    assert all(record["tokens"] == 48 * 128 and 0 < record["error_after"] <= record["error_before"] < 1 for record in told["weights"])
    if "gptq" in method:
        assert sum(r["error_after"] for r in told["weights"]) < 0.8 * sum(r["error_before"] for r in told["weights"])
    if "awq" in method:
        moved = [record for record in told["pairs"] if not record["fallback"]]
        assert len(moved) >= 2 * 6
        everything = report.to_json()
        assert "model.layers.0.input_layernorm.weight" in everything["rescaled"]
        assert "model.norm.weight" in everything["kept"]
        assert everything["kept"].keys().isdisjoint(everything["rescaled"])
        assert all(record["error_after"] < record["error_before"] for record in moved)


def with_outliers(target: Path) -> Path:
    """The function of wiki-llama, with some channels of each norm made larger and the columns that read them smaller."""
    tensors = read_tensors(WIKI_LLAMA)
    generator = torch.Generator().manual_seed(5)
    readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
               "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        layer, kind, _ = name.rsplit(".", 2)
        scale_K = torch.ones(len(tensors[name]))
        scale_K[torch.randperm(len(scale_K), generator=generator)[:16]] = 16.0
        tensors[name] = (tensors[name].float() * scale_K).bfloat16()
        for reader in readers[kind]:
            weight = f"{layer}.{reader}.weight"
            tensors[weight] = (tensors[weight].float() / scale_K).bfloat16()
    return write_wiki_llama(target, tensors)


@pytest.mark.parametrize("preset", ["W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4"])
def test_gptq_for_other_schemes(preset: str, tmp_path: Path) -> None:
    report = convert(WIKI_LLAMA, tmp_path / "out", scheme=preset, method="gptq").to_json()
    weights = report["calibration"]["weights"]
    assert len(weights) == 42
    assert [record["fallback"] for record in weights if record["fallback"]] == []
    assert sum(record["error_after"] for record in weights) < 0.9 * sum(record["error_before"] for record in weights)
    assert streamquant.verify(tmp_path / "out", against=WIKI_LLAMA).problems == []


def test_errors_are_told_of_all_rows_though_only_some_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors_before(name: str) -> dict[str, float]:
        told = convert(WIKI_LLAMA, tmp_path / name, method="awq").to_json()["calibration"]
        return {record["name"]: record["error_before"] for record in told["pairs"] if not record["fallback"]}

    every = errors_before("every")
    monkeypatch.setattr(scales, "SEARCHED_ROWS", 32)
    assert errors_before("some") == pytest.approx(every, rel=0.3)  # one row in 8 of those of q, one in 4 of those of k


def test_smoothquant_takes_the_largest_weights_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a search may look at some of them."""
    convert(WIKI_LLAMA, tmp_path / "out", scheme="W8A8", method="smoothquant")
    monkeypatch.setattr(scales, "SEARCHED_ROWS", 8)
    convert(WIKI_LLAMA, tmp_path / "again", scheme="W8A8", method="smoothquant")
    ours, again = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def test_what_is_in_no_layer_is_as_without_data(tmp_path: Path) -> None:
    convert(WIKI_LLAMA, tmp_path / "gptq", method="gptq", include=["lm_head"])
    streamquant.convert(WIKI_LLAMA, tmp_path / "rtn", scheme="W4A16", include=["lm_head"])
    ours, theirs = read_tensors(tmp_path / "gptq"), read_tensors(tmp_path / "rtn")
    assert ours.keys() == theirs.keys()
    outside = [name for name in ours if ".layers." not in name]
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(outside)
    assert all(torch.equal(ours[name], theirs[name]) for name in outside)
    assert not torch.equal(ours["model.layers.3.mlp.up_proj.weight_packed"], theirs["model.layers.3.mlp.up_proj.weight_packed"])
    assert (tmp_path / "gptq" / "config.json").read_bytes() == (tmp_path / "rtn" / "config.json").read_bytes()


# --- killed and run again --------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_a_run_that_was_killed_goes_on_with_the_same_bytes(tmp_path: Path, method: str, num_layers: int) -> None:
    seen = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len({each.done_bytes for each in seen}) > num_layers:
            raise Killed

    arguments = {"method": method, "max_shard_size": "1MB"}
    with pytest.raises(Killed):
        convert(WIKI_LLAMA, tmp_path / "out", on_progress=stop, **arguments)
    again: list[Progress] = []
    resumed = convert(WIKI_LLAMA, tmp_path / "out", on_progress=again.append, **arguments)
    whole = convert(WIKI_LLAMA, tmp_path / "whole", **arguments)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")
    assert resumed.calibration is not None
    assert whole.calibration is not None
    assert resumed.calibration.to_json() == whole.calibration.to_json()
    assert again[0].total_bytes < seen[0].total_bytes
    assert again[-1].done_bytes == again[-1].total_bytes
    assert [progress.done_bytes for progress in again] == sorted(progress.done_bytes for progress in again)
    assert "layer 1 of 6, batch 1 of 1" in {progress.tensor for progress in seen}
    assert "model.layers.0.mlp.down_proj.weight" in {progress.tensor for progress in seen}


@pytest.mark.parametrize("num_notes", [1, 3])
def test_a_layer_of_which_only_some_shards_were_noted_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_notes: int
) -> None:
    """The norms, too, whose scales have moved."""
    arguments = {"method": "awq", "max_shard_size": "150kB"}
    record, notes = Journal.record_steps, []

    def stop(*arguments: Any, **options: Any) -> None:
        if len(notes) == num_notes:
            raise Killed
        notes.append(record(*arguments, **options))

    monkeypatch.setattr(Journal, "record_steps", stop)
    with pytest.raises(Killed):
        convert(WIKI_LLAMA, tmp_path / "out", **arguments)
    monkeypatch.setattr(Journal, "record_steps", record)
    resumed = convert(WIKI_LLAMA, tmp_path / "out", **arguments)
    whole = convert(WIKI_LLAMA, tmp_path / "whole", **arguments)
    assert resumed.calibration == whole.calibration
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


def test_a_kill_after_the_last_layer_calibrates_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(progress: Progress) -> None:
        if "embed_tokens" in progress.tensor or "lm_head" in progress.tensor:
            raise Killed

    with pytest.raises(Killed):
        convert(WIKI_LLAMA, tmp_path / "out", method="gptq", on_progress=stop)
    monkeypatch.setattr(layers.LayerCalibration, "_first_states", None)
    assert convert(WIKI_LLAMA, tmp_path / "out", method="gptq").calibration is not None
    assert streamquant.verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("change", [{"packed": False}, {"samples": 11}, {"sequence_length": 65}, {"seed": 4}, {"method": "awq"}], ids=str)
def test_another_calibration_is_another_job(tmp_path: Path, change: Mapping[str, Any]) -> None:
    convert(WIKI_LLAMA, tmp_path / "out", method="gptq")
    with pytest.raises(RequestError, match="another job: its calibration"):
        convert(WIKI_LLAMA, tmp_path / "out", **({"method": "gptq"} | dict(change)))


def test_hidden_states_in_a_file_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_file = []
    make = layers.HiddenStates

    def spy(*arguments: Any, **options: Any) -> layers.HiddenStates:
        states = make(*arguments, **options)
        in_file.append(states.in_file)
        return states

    monkeypatch.setattr(layers, "HiddenStates", spy)
    for memory in ("16MiB", "256MiB"):
        convert(WIKI_LLAMA, tmp_path / memory, method="gptq", max_memory=memory, samples=80, sequence_length=256)
    assert in_file == [True, False]
    assert file_bytes(tmp_path / "16MiB") == file_bytes(tmp_path / "256MiB")
    states = layers.HiddenStates([(2, 5, 3), (1, 4, 3)], dtype=torch.float32, max_bytes=10, file=tmp_path / "states")
    assert states.in_file
    assert list(tmp_path.glob("states")) == []
    states.put(1, torch.arange(12.0).view(1, 4, 3))
    states.put(0, torch.ones(2, 5, 3))
    assert torch.equal(states.get(1, torch.device("cpu")), torch.arange(12.0).view(1, 4, 3))


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A small model with experts and the tokenizer of the example."""
    return write_model(tmp_path / "experts", "qwen3_moe", moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("few_tokens", [0, 10**6, 384])
def test_experts_are_calibrated_with_their_tokens_or_if_those_are_few_with_all(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, few_tokens: int
) -> None:
    monkeypatch.setattr(layers, "FEW_TOKENS", few_tokens)
    report = convert(experts, tmp_path / "out", method=method, group_size=16)
    assert report.calibration is not None
    of_experts = [record for record in report.calibration.records if ".experts." in record.name and not record.is_pair]
    assert len(of_experts) == 3 * 4 * 2
    assert [record.name for record in of_experts if record.fallback] == []
    routed = [(record.tokens, record.routed_tokens or 0) for record in of_experts]
    assert sum(to_expert for _, to_expert in routed) == 12 * 64 * 2 * 3 * 2  # two experts a token, three weights each, two layers
    assert all(tokens == (12 * 64 if to_expert < few_tokens else to_expert) for tokens, to_expert in routed)
    assert len({tokens == 12 * 64 for tokens, _ in routed}) == (2 if few_tokens == 384 else 1)
    assert streamquant.verify(tmp_path / "out", against=experts).problems == []


def test_hessians_of_experts_that_would_be_too_large_are_shared(experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_EXPERT_BYTES", 4 * (4 * 64**2 + 4 * 48**2) - 1)
    made = []
    make = Statistics.of_nothing
    monkeypatch.setattr(Statistics, "of_nothing", lambda *arguments, **options: made.append(arguments) or make(*arguments, **options))
    report = convert(experts, tmp_path / "out", method="gptq", group_size=16)
    assert report.calibration is not None
    assert all(record.tokens == 12 * 64 for record in report.calibration.records)
    assert len(made) <= 2 * (2 + 2 + 4)  # of a layer: q, k and v; o; the router; gate and up of all experts; down of each


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_stacks_of_experts_that_are_kept_stay_as_they_are(tmp_path: Path, method: str) -> None:
    source = write_model(tmp_path / "source", "gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    report = convert(source, tmp_path / "out", scheme="attention=W8A16", group_size=16, method=method)
    assert report.calibration is not None
    assert {record.name.rpartition(".self_attn.")[2] for record in report.calibration.records if not record.is_pair} == {
        f"{leaf}_proj.weight" for leaf in "qkvo"
    }
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    stacks = [name for name, tensor in before.items() if ".experts." in name and tensor.ndim == 3]
    assert stacks
    assert all(torch.equal(before[name], after[name]) for name in stacks)
    assert streamquant.verify(tmp_path / "out", against=source).problems == []


# --- what cannot be --------------------------------------------------------------------------------------------------


def fallen(*arguments: Any, **options: Any) -> Solution:
    solution = solve.round_to_nearest(*arguments[:1], *arguments[2:], **options)
    return solution._replace(fallback="the Hessian is not positive definite")


def test_too_many_weights_that_could_not_be_calibrated_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "gptq", fallen)
    with pytest.raises(RequestError, match=r"7 of 42 weights could not be calibrated.*not positive definite; give more --samples"):
        convert(WIKI_LLAMA, tmp_path / "out", method="gptq")
    with pytest.raises(RequestError, match="7 of 42"):  # nor does running it again get any further
        convert(WIKI_LLAMA, tmp_path / "out", method="gptq")
    with pytest.raises(RequestError, match="42 of 42"):
        convert(WIKI_LLAMA, tmp_path / "last", method="gptq", max_fallback=41 / 42)
    with pytest.raises(RequestError, match="42 of 42"):
        convert(WIKI_LLAMA, tmp_path / "last", method="gptq", max_fallback=41 / 42)
    report = convert(WIKI_LLAMA, tmp_path / "other", method="gptq", max_fallback=1.0)
    assert report.calibration is not None
    assert len(report.calibration.fallbacks) == 42
    rounded = streamquant.convert(WIKI_LLAMA, tmp_path / "rtn", scheme="W4A16")
    ours, theirs = read_tensors(tmp_path / "other"), read_tensors(tmp_path / "rtn")
    assert rounded.calibration is None
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tensors = read_tensors(WIKI_LLAMA)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = math.nan
    source = write_wiki_llama(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        convert(source, tmp_path / "out", method="gptq")
    report = convert(source, tmp_path / "out", method="gptq", allow_nonfinite=True, restart=True)
    assert report.nonfinite == ("model.layers.2.mlp.up_proj.weight",)


def test_kernels_of_shapes_that_do_not_come_again_are_not_kept(experts: Path, tmp_path: Path) -> None:
    """Unless somebody has said how many; in a process of its own, for they ask once."""
    code = """
import os, sys, streamquant
streamquant.convert(*sys.argv[1:], scheme="W4A16", group_size=16, method="gptq", samples=2, sequence_length=16)
print(os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""
    few = str(heap.KEPT_KERNELS)
    for by_user, expected in (({}, [few, few]), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "700"}, [few, "700"])):
        command = [sys.executable, "-c", code, experts, tmp_path / expected[1]]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | by_user)
        assert result.stdout.split() == expected


@pytest.mark.parametrize("large", [3e38, -3e38])
def test_a_layer_that_overflows_is_named(tmp_path: Path, large: float) -> None:
    tensors = read_tensors(WIKI_LLAMA)
    tensors["model.layers.3.mlp.down_proj.weight"][7] = large
    with pytest.raises(CheckpointError, match="layer 3 gives numbers that are not finite for the calibration data"):
        convert(write_wiki_llama(tmp_path / "source", tensors), tmp_path / "out", method="gptq")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "rtn", "--samples", "5"], "--samples: method rtn takes no data; choose another --method: gptq, awq"),
        (["--method", "rtn", "--per-sample", "--no-clip"], "--per-sample, --no-clip: method rtn takes no data"),
        (["--method", "gptq", "--max-fallback", "7"], "--max-fallback 7.0 is no part"),
        (["--method", "gptq", "--calibration-data", "nowhere.txt"], "nowhere.txt"),
        (["--method", "gptq", "--sequence-length", "1"], "--sequence-length 1"),
    ],
)
def test_wishes_that_make_no_sense_are_refused_in_a_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = run("convert", WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("Error") + result.stderr.count("error") <= 1
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_tokenizer_or_a_config_is_refused(tmp_path: Path) -> None:
    for missing, said in (("tokenizer.json", "has no tokenizer"), ("config.json", "no config.json, and calibration runs the model")):
        source = tmp_path / missing
        source.mkdir()
        for path in WIKI_LLAMA.iterdir():
            if path.name not in (missing, "tokenizer_config.json"):
                (source / path.name).write_bytes(path.read_bytes())
        with pytest.raises(RequestError, match=said):
            convert(source, tmp_path / "out", method="gptq")


def test_a_dry_run_with_a_method_plans(tmp_path: Path) -> None:
    result = run("convert", WIKI_LLAMA, tmp_path / "out", "--scheme", "W4A16", "--method", "gptq", "--dry-run")
    assert result.returncode == 0
    assert "W4A16" in result.stdout


def test_layers_run_in_the_dtype_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which changes some codes, and what is known of all of them by little."""
    errors = {}
    for dtype in ("float32", "bfloat16", "auto"):
        report = convert(WIKI_LLAMA, tmp_path / dtype, method="gptq", compute_dtype=dtype).calibration
        assert report is not None
        errors[dtype] = torch.tensor([record.error_after for record in report.records])
    same = {dtype: file_bytes(tmp_path / dtype)["model.safetensors"] for dtype in errors}
    assert same["float32"] != same["bfloat16"]
    assert same["auto"] in (same["float32"], same["bfloat16"])
    torch.testing.assert_close(errors["float32"], errors["bfloat16"], rtol=0.1, atol=0)
    with pytest.raises(RequestError, match="another job"):
        convert(WIKI_LLAMA, tmp_path / "auto", method="gptq", compute_dtype="float32")
    with pytest.raises(RequestError, match="unknown compute dtype 'int8'; known are auto, float32, bfloat16"):
        convert(WIKI_LLAMA, tmp_path / "none", method="gptq", compute_dtype="int8")
    for capabilities, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities, raising=False)
        assert find_compute_dtype("auto", torch.device("cpu")) == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions
    assert find_compute_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant+gptq"])
def test_what_a_layer_needed_is_freed_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """By counting references: a cycle would hold factors of Hessians until the collector runs, which is after gigabytes."""
    left: list[int] = []
    layer = layers.LayerCalibration._layer

    def counted(*arguments: Any) -> Any:
        gc.collect()
        gc.disable()
        result = layer(*arguments)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left.append(sum(isinstance(kept, Tensor) and not kept.is_meta for kept in gc.garbage))
        return result

    monkeypatch.setattr(layers.LayerCalibration, "_layer", counted)
    try:
        convert(WIKI_LLAMA, tmp_path / "out", method=method)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == [0] * 6
