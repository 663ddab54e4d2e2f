"""verify finds what engines do not notice. Each kind of damage is done to a good output, once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streamquant
from streamquant.errors import CheckpointError, RequestError
from tests.checkpoints import attention, mlp, read_tensors, weight, write_checkpoint

PREFIX = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    others = {
        "model.embed_tokens.weight": weight(64, 128),
        "model.norm.weight": weight(128),
        "model.layers.0.mlp.gate.weight": weight(4, 128),
    }
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "source", attention() | mlp("model.layers.0.mlp") | others)


@pytest.fixture(scope="module")
def good(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def convert(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("good") / scheme
            streamquant.convert(source, made[scheme], scheme=scheme)
        return made[scheme]

    return convert


@pytest.fixture
def damage(good: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def apply(scheme: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
        out = shutil.copytree(good(scheme), tmp_path / "out")
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "streamquant.json").unlink()  # as if another program had written it so
        return out

    return apply


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        (
            "W4A16",
            lambda t: t.pop(f"{PREFIX}.q_proj.weight_scale"),
            "q_proj: weight_packed I32 [128, 16], weight_shape I64 [2] do not make up a weight",
        ),
        (
            "W4A16",
            lambda t: t.pop(f"{PREFIX}.q_proj.weight_packed"),
            "q_proj: weight_scale BF16 [128, 1], weight_shape I64 [2] do not make up a weight",
        ),
        (
            "W4A16",
            lambda t: t.update({f"{PREFIX}.q_proj.weight": weight(128, 128)}),
            "q_proj.weight is stored twice",
        ),
        ("W4A16", lambda t: t[f"{PREFIX}.q_proj.weight_scale"].fill_(0), "q_proj.weight_scale holds 128 scales that are not finite"),
        ("W4A16", lambda t: t[f"{PREFIX}.q_proj.weight_scale"][5].fill_(float("nan")), "q_proj.weight_scale holds 1 scales"),
        ("FP8_BLOCK", lambda t: t[f"{PREFIX}.q_proj.weight_scale"].neg_(), "q_proj.weight_scale holds 1 scales"),
        ("MXFP4", lambda t: t[f"{PREFIX}.q_proj.weight_scale"][0].fill_(255), "q_proj.weight_scale holds 4 scales"),
        ("NVFP4A16", lambda t: t[f"{PREFIX}.q_proj.weight_global_scale"].mul_(2), "differ in the scale they share"),
        (
            "FP8_DYNAMIC",
            lambda t: t.update({f"{PREFIX}.q_proj.weight": weight(128, 128)}),
            "q_proj is stored as BF16, but quantization_config says",
        ),
        (
            "W8A8",
            lambda t: (t.pop(f"{PREFIX}.q_proj.weight_scale"), t.update({f"{PREFIX}.q_proj.weight": weight(128, 128)})),
            "stored as BF16",
        ),
        (
            "MXFP8",
            lambda t: t.update({f"{PREFIX}.q_proj.weight_scale": t[f"{PREFIX}.q_proj.weight_scale"].repeat(2, 1)}),
            "weight_scale U8 [256, 4] do not make up a weight",
        ),
    ],
)
def test_damage_that_the_headers_and_scales_show(damage: Callable[[str, Change], Path], scheme: str, change: Change, said: str) -> None:
    problems = streamquant.verify(damage(scheme, change)).problems
    assert any(said in problem for problem in problems), problems


def test_an_index_whose_metadata_is_no_object_is_a_problem(source: Path, tmp_path: Path) -> None:
    streamquant.convert(source, tmp_path / "out", scheme="W8A8", max_shard_size=60_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": []}))
    (problem,) = streamquant.verify(tmp_path / "out", checksums=False).problems
    assert "total_size is None, the tensors have" in problem


def test_weights_stored_otherwise_than_their_config_says_are_a_problem(source: Path, good: Callable[[str], Path], tmp_path: Path) -> None:
    """NVFP4 shares a scale among q, k and v; FP8 with a scale for each row has none to share."""
    out = shutil.copytree(good("FP8_DYNAMIC"), tmp_path / "out")
    shutil.copy(good("NVFP4A16") / "config.json", out / "config.json")
    problems = streamquant.verify(out).problems
    assert any("q_proj: weight is F8_E4M3 [128, 128], should be missing" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        (
            "W4A16",
            lambda t: t[f"{PREFIX}.o_proj.weight_packed"].copy_(t[f"{PREFIX}.o_proj.weight_packed"].roll(1, 0)),
            "zeros would be closer",
        ),
        ("NVFP4A16", lambda t: t[f"{PREFIX}.o_proj.weight_global_scale"].reciprocal_(), "zeros would be closer"),
        ("W4A16", lambda t: t["model.norm.weight"].add_(1), "model.norm.weight is neither quantized nor the same"),
        ("W4A16", lambda t: t.pop("model.norm.weight"), "model.norm.weight of the source is missing"),
        ("W4A16", lambda t: t.update({"model.extra": weight(3)}), "model.extra stems from no tensor"),
        (
            "W8A8",
            lambda t: t.update({"model.layers.0.mlp.gate.weight": t["model.layers.0.mlp.gate.weight"].char()}),
            "gate.weight dequantizes with a relative error",
        ),
    ],
)
def test_damage_that_takes_the_source_to_see(
    damage: Callable[[str, Change], Path], source: Path, scheme: str, change: Change, said: str
) -> None:
    out = damage(scheme, change)
    assert not streamquant.verify(out).problems
    problems = streamquant.verify(out, against=source).problems
    assert any(said in problem for problem in problems), problems


def edit(out: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((out / file).read_text())
    change(document)
    (out / file).write_text(json.dumps(document))


def test_damage_to_index_and_config_is_found(source: Path, tmp_path: Path) -> None:
    index = "model.safetensors.index.json"

    def problems(file: str, change: Callable[[dict[str, Any]], object]) -> str:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        streamquant.convert(source, out, scheme="W4A16", max_shard_size=20_000)
        edit(out, file, change)
        return "\n".join(streamquant.verify(out).problems)

    assert "total_size is 1" in problems(index, lambda d: d["metadata"].update(total_size=1))
    assert "does not list model.norm.weight" in problems(index, lambda d: d["weight_map"].pop("model.norm.weight"))
    assert "is not in" in problems(index, lambda d: d["weight_map"].update({"a": "model.safetensors"}))
    ignored = problems("config.json", lambda d: d["quantization_config"]["ignore"].append(f"{PREFIX}.q_proj"))
    assert "q_proj.weight_packed holds integers of how many bits? quantization_config in config.json has nothing for it" in ignored
    assert "stored as BF16" in problems("config.json", lambda d: d["quantization_config"]["ignore"].clear())
    assert "known are compressed-tensors" in problems("config.json", lambda d: d["quantization_config"].update(quant_method="gptq"))


def test_the_error_of_each_weight_is_that_of_its_dequantization(source: Path, good: Callable[[str], Path]) -> None:
    report = streamquant.verify(good("W8A8"), against=source)
    written, before = read_tensors(good("W8A8")), read_tensors(source)
    for error in report.errors:
        module = error.name.removesuffix(".weight")
        dequantized = written[error.name].double() * written[f"{module}.weight_scale"].double()
        original = before[error.name].double()
        relative = float((dequantized - original).norm() / original.norm())
        assert error.relative_error == pytest.approx(relative, rel=1e-6)
        assert error.sqnr_db == pytest.approx(-20 * torch.tensor(relative).log10().item(), rel=1e-5)


def test_a_weight_that_the_config_leaves_alone_is_found(good: Callable[[str], Path], tmp_path: Path) -> None:
    out = shutil.copytree(good("FP8_DYNAMIC"), tmp_path / "out")
    edit(out, "config.json", lambda d: d["quantization_config"]["ignore"].append(f"{PREFIX}.q_proj"))
    assert f"{PREFIX}.q_proj is stored quantized, but quantization_config leaves it alone" in streamquant.verify(out).problems


def test_a_checkpoint_that_is_not_quantized_is_checked_as_well(source: Path, tmp_path: Path) -> None:
    report = streamquant.verify(source, against=source)
    assert (report.problems, report.num_quantized, report.num_copied) == ([], 0, report.num_tensors)


def test_a_folder_that_is_not_finished_or_not_there_is_an_error(source: Path, tmp_path: Path) -> None:
    (shutil.copytree(source, tmp_path / "unfinished") / "config.json").unlink()
    with pytest.raises(RequestError, match=r"no config.json: not a finished output"):
        streamquant.verify(tmp_path / "unfinished")
    with pytest.raises(CheckpointError, match="does not exist"):
        streamquant.verify(tmp_path / "nowhere")
