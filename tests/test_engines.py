"""What engines load of a plan, and what the table says of itself. That the table is right: test_vllm.py and test_transformers.py."""

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import streamquant
from streamquant.engines import Finding, check, load_engines, loads_in, table_name
from streamquant.errors import RequestError
from streamquant.report import inspection_lines
from streamquant.schemes import NATIVE_FP8, SCHEMES
from tests.checkpoints import WIKI_LLAMA, attention, mlp, weight, write_checkpoint

TABLE = Path(streamquant.__file__).with_name("engines.toml")
README = TABLE.parent.parent / "README.md"
EXPERTS = "model.layers.{}.mlp.experts"
ALL = [*SCHEMES.values(), NATIVE_FP8]


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """Attention and two experts in each of two layers, all matrices 256 x 256 but for q, k and v of 128 rows."""
    tensors = {}
    for layer in (0, 1):
        tensors |= attention(layer, columns=256)
        for expert in (0, 1):
            tensors |= mlp(f"{EXPERTS.format(layer)}.{expert}", columns=256, rows=256)
    return write_checkpoint(tmp_path / "moe", tensors, config={"num_experts": 2})


def dense(folder: Path, **config: Any) -> Path:
    """A layer of attention with 384 columns, and an mlp of 384 by 768."""
    tensors = attention(columns=384) | mlp("model.layers.0.mlp", columns=384, rows=768)
    return write_checkpoint(folder / "dense", tensors, config=config)


def found(source: Path, engine: str, *, tp: int = 1, **options: Any) -> list[Finding]:
    return check(streamquant.plan(source, **options), engine=engine, tp=tp)


def test_any_config_may_be_asked_about(tmp_path: Path) -> None:
    source = dense(tmp_path, model_type={"a": 1}, architectures=[1, None], num_key_value_heads=-3)
    assert found(source, "vllm", tp=2, scheme="FP8_DYNAMIC") == []
    assert any("(1, None)" in line for line in inspection_lines(streamquant.inspect(source)))


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


# --- what loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W8A16", "W4A16", "W4A16_ASYM", "NVFP4A16"])
def test_the_common_schemes_of_a_dense_model_load_everywhere(engine: str, preset: str) -> None:
    assert found(WIKI_LLAMA, engine, scheme=preset) == []


@pytest.mark.parametrize("preset", set(SCHEMES) - {"FP8A16", "W4A8"})
def test_vllm_loads_experts_of_nearly_every_scheme(moe: Path, preset: str) -> None:
    assert [finding for finding in found(moe, "vllm", scheme=preset) if not finding.conditional] == []


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("sglang", {"scheme": "W4A16"}),
        ("sglang", {"scheme": "NVFP4A16"}),
        ("sglang", {"scheme": "FP8_BLOCK"}),
        ("transformers", {"scheme": "MXFP4"}),
        ("transformers", {"scheme": "W4AFP8"}),
        ("transformers", {"scheme": "FP8_DYNAMIC", "strategy": "tensor"}),
        ("transformers", {"scheme": "FP8_BLOCK", "format": "fp8"}),
    ],
)
def test_experts_that_sglang_and_transformers_load(moe: Path, engine: str, options: dict[str, Any]) -> None:
    assert found(moe, engine, **options) == []


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "options", "problem", "instead"),
    [
        ("vllm", {"scheme": "FP8A16"}, "vLLM has no method for experts with FP8 weights and unquantized inputs", "FP8_DYNAMIC"),
        ("sglang", {"scheme": "W8A8"}, "SGLang runs INT8 experts on Ascend NPUs only", "FP8_DYNAMIC"),
        ("transformers", {"scheme": "W8A8"}, "transformers does not read experts stored as bytes", "W8A16"),
        ("transformers", {"scheme": "W4A8"}, "transformers does not read experts stored as bytes", "W4A16"),
        ("transformers", {"scheme": "MXFP8"}, "transformers does not dequantize MXFP8 experts", "FP8_DYNAMIC"),
        ("transformers", {"scheme": "NVFP4A16"}, "ignores the global scale of experts, which gives wrong weights", "MXFP4A16"),
    ],
)
def test_experts_that_an_engine_refuses_are_named_with_another_scheme(
    moe: Path, engine: str, options: dict[str, Any], problem: str, instead: str
) -> None:
    down, up = found(moe, engine, **options)
    assert (up.layers, up.count) == ("model.layers.*.mlp.experts.*.gate_proj+up_proj", 4)
    assert (down.layers, down.count) == ("model.layers.*.mlp.experts.*.down_proj", 4)
    assert problem in up.problem
    assert up.remedy == f"{instead} in its place or --ignore '*.mlp.experts'"
    assert found(moe, engine, **options, ignore=["*.mlp.experts"]) == []


def test_sglang_refuses_what_it_has_no_scheme_for() -> None:
    for preset in ("W3A16", "W4A8", "W4AFP8", "MXFP4A16", "MXFP8A16"):
        findings = found(WIKI_LLAMA, "sglang", scheme=preset)
        assert {finding.layers.rpartition(".")[2] for finding in findings} == {
            "q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj",
        }  # fmt: skip
        assert {finding.count for finding in findings} == {6}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_experts_with_one_fp8_scale_a_tensor_need_another_strategy(moe: Path, engine: str) -> None:
    findings = found(moe, engine, scheme="FP8_DYNAMIC", strategy="tensor")
    assert {finding.problem.partition(" ")[2] for finding in findings} == {"loads them with a scale per channel, not per tensor"}
    assert findings[0].remedy == "--strategy channel or --ignore '*.mlp.experts'"
    assert found(WIKI_LLAMA, engine, scheme="FP8_DYNAMIC", strategy="tensor") == []


@pytest.mark.parametrize("engine", ["sglang", "transformers"])
def test_zero_points_of_experts_are_named_whichever_preset_has_them(moe: Path, engine: str) -> None:
    for options in ({"scheme": "W4A16_ASYM"}, {"scheme": "W8A16", "symmetric": False}):
        findings = found(moe, engine, **options)
        assert all("zero points" in finding.problem and "--symmetric" in finding.remedy for finding in findings)
        assert len(findings) == 2


def test_sglang_has_kernels_for_three_group_sizes() -> None:
    findings = found(WIKI_LLAMA, "sglang", scheme="W4A16", group_size=16)
    assert findings[0].problem == "SGLang loads groups of 32, 64, 128, not 16"
    assert findings[0].remedy.startswith("--group-size 32 or ")
    assert found(WIKI_LLAMA, "sglang", scheme="W4A16", strategy="channel") == []


def test_w4afp8_experts_need_multiples_of_256_in_vllm(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "moe", mlp(f"{EXPERTS.format(0)}.0", columns=384, rows=256))
    down, up = found(source, "vllm", scheme="W4AFP8")
    assert up.problem == "gate_proj has 384 columns; vLLM needs a multiple of 256 there"
    assert down.problem == "down_proj has 384 rows; vLLM needs a multiple of 256 there"
    assert up.remedy == "--ignore '*.mlp.experts'"


def test_w4afp8_linears_need_multiples_of_128_rows_together(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.self_attn.{name}.weight": weight(rows, 128) for name, rows in (("q_proj", 192), ("k_proj", 64))}
    fits = write_checkpoint(tmp_path / "fits", tensors)
    assert [finding.conditional for finding in found(fits, "vllm", scheme="W4AFP8")] == [True]
    tensors["model.layers.0.self_attn.v_proj.weight"] = weight(64, 128)
    condition, problem = found(write_checkpoint(tmp_path / "does-not", tensors), "vllm", scheme="W4AFP8")
    assert condition.problem == "vLLM loads them only on GPUs of compute capability 9.0"
    assert problem.problem == "has 320 rows; vLLM needs a multiple of 128 there"


def test_where_experts_load_on_some_machines_only_it_is_a_condition(moe: Path) -> None:
    findings = found(moe, "vllm", scheme="W4A8")
    assert {(finding.problem, finding.conditional) for finding in findings} == {("vLLM loads them only on Arm CPUs", True)}
    assert findings[0].remedy == "elsewhere W4A16 in its place or --ignore '*.mlp.experts'"


# --- experts among themselves and with others ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "rule", "num_findings"),
    [
        ("vllm", "keep = true", 0),
        ("vllm", "scheme = 'W8A16'", 0),
        ("vllm", "scheme = 'W4A16'\nobserver = 'mse'", 0),
        ("transformers", "keep = true", 1),
        ("transformers", "scheme = 'W8A16'", 1),
        ("transformers", "scheme = 'W4A16'\nobserver = 'mse'", 0),
    ],
)
def test_transformers_reads_packed_experts_of_all_layers_by_one_scheme(
    moe: Path, tmp_path: Path, engine: str, rule: str, num_findings: int
) -> None:
    file = recipe(tmp_path, f"scheme = 'W4A16'\n[[rule]]\nmatch = '*.layers.0.mlp.experts'\n{rule}\n")
    findings = found(moe, engine, recipe=file)
    assert [finding.problem for finding in findings] == ["transformers reads all experts of a model by one scheme"] * num_findings


def test_transformers_loads_fp8_experts_beside_kept_ones(moe: Path) -> None:
    assert found(moe, "transformers", scheme="FP8_DYNAMIC", ignore=["*.layers.0.mlp.experts"]) == []


def test_kept_prediction_layers_do_not_mix_experts(tmp_path: Path) -> None:
    tensors = {name: tensor for layer in (0, 1, 2) for name, tensor in mlp(f"{EXPERTS.format(layer)}.0").items()}
    source = write_checkpoint(tmp_path / "mtp", tensors, config={"num_hidden_layers": 2})
    assert found(source, "transformers", scheme="W4A16") == []


def test_sglang_loads_packed_experts_only_where_all_layers_are_packed(moe: Path, tmp_path: Path) -> None:
    text = "scheme = '{}'\n[[rule]]\nmatch = '*.mlp.experts'\nscheme = 'W4A16'\n"
    assert found(moe, "sglang", recipe=recipe(tmp_path, text.format("W8A16"))) == []
    findings = found(moe, "sglang", recipe=recipe(tmp_path, text.format("FP8_DYNAMIC")))
    assert {finding.problem for finding in findings} == {
        "SGLang loads these experts only where all quantized layers are pack-quantized"
    }  # fmt: skip
    assert found(moe, "vllm", recipe=recipe(tmp_path, text.format("FP8_DYNAMIC"))) == []


def test_sglang_loads_w4afp8_experts_where_nothing_else_is_quantized(moe: Path, tmp_path: Path) -> None:
    assert found(moe, "sglang", scheme="W4AFP8", ignore=["*.self_attn"]) == []
    file = recipe(tmp_path, "scheme = 'W4A16'\n[[rule]]\nmatch = '*.mlp.experts'\nscheme = 'W4AFP8'\n")
    assert {finding.problem for finding in found(moe, "sglang", recipe=file)} == {
        "SGLang loads these experts only where no layer is quantized in another way"
    }  # fmt: skip


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def test_groups_of_row_parallel_layers_must_not_cross_ranks(tmp_path: Path) -> None:
    source = dense(tmp_path)
    assert found(source, "vllm", scheme="W4A16", tp=2)[0] == Finding(
        layers="model.layers.*.self_attn.o_proj",
        count=1,
        scheme="W4A16",
        problem="o_proj has 128 columns, 64 on each of 2 ranks; vLLM needs a multiple of 128 there",
        remedy="--tp 1, --group-size 64 or --ignore '*.self_attn.o_proj'",
    )
    assert found(source, "vllm", scheme="W4A16", tp=2, group_size=64) == []
    assert found(source, "vllm", scheme="W4A16", tp=2, strategy="channel") == []
    assert found(source, "vllm", scheme="FP8_DYNAMIC", tp=8) == []


def test_the_smaller_tp_that_is_offered_fits(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", mlp("model.layers.0.mlp", rows=768))
    (finding,) = found(source, "vllm", scheme="FP8_BLOCK", tp=12, ignore=["*.gate_proj", "*.up_proj"])
    assert finding.problem == "down_proj has 768 columns, 64 on each of 12 ranks; vLLM needs a multiple of 128 there"
    assert finding.remedy == "--tp 6 or --ignore '*.mlp.down_proj'"
    assert found(source, "vllm", scheme="FP8_BLOCK", tp=6) == []


def test_blocks_must_divide_the_rows_that_a_rank_gets(tmp_path: Path) -> None:
    for engine in ("vllm", "sglang"):
        findings = found(dense(tmp_path), engine, scheme="FP8_BLOCK", tp=4)
        (merged,) = [finding for finding in findings if finding.layers.endswith("gate_proj+up_proj")]
        assert merged.problem.startswith("gate_proj has 768 rows, 192 on each of 4 ranks; ")
        assert merged.remedy == "--tp 2 or --ignore '*.mlp.gate_proj' --ignore '*.mlp.up_proj'"


def test_zero_points_must_not_cross_ranks(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.weight": weight(24, 128)}
    source = write_checkpoint(tmp_path / "q", tensors)
    (finding,) = found(source, "vllm", scheme="W4A16_ASYM", tp=2)
    assert finding.problem == "q_proj has 24 rows, 12 on each of 2 ranks; vLLM needs a multiple of 8 there"
    assert found(source, "vllm", scheme="W4A16", tp=2) == []


def test_key_and_value_heads_are_repeated_where_there_are_more_ranks(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.self_attn.{name}.weight": weight(rows, 128) for name, rows in (("q_proj", 1024), ("k_proj", 256))}
    few = write_checkpoint(tmp_path / "few", tensors, config={"num_key_value_heads": 2})
    unknown = write_checkpoint(tmp_path / "unknown", tensors)
    assert found(few, "vllm", scheme="FP8_BLOCK", tp=8) == []
    assert found(unknown, "vllm", scheme="FP8_BLOCK", tp=8)[0].problem.startswith("k_proj has 256 rows, 32 on each of 8 ranks")


def test_rows_that_ranks_cannot_share_are_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "odd", {"model.layers.0.self_attn.q_proj.weight": weight(129, 128)})
    (finding,) = found(source, "vllm", scheme="FP8_DYNAMIC", tp=2)
    assert finding.problem == "q_proj has 129 rows, which 2 ranks cannot share evenly"


def test_layers_that_are_not_split_fit_on_any_number_of_ranks(tmp_path: Path) -> None:
    names = ("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk")
    tensors = {f"model.layers.0.self_attn.{name}.weight": weight(128, 128) for name in names}
    assert found(write_checkpoint(tmp_path / "mla", tensors), "vllm", scheme="FP8_BLOCK", tp=8) == []


def test_experts_are_split_along_their_intermediate_width(moe: Path) -> None:
    findings = found(moe, "sglang", scheme="NVFP4A16", tp=8)
    assert [finding.problem for finding in findings if "experts" in finding.layers] == [
        "down_proj has 256 columns, 32 on each of 8 ranks; SGLang needs a multiple of 64 there",
        "gate_proj has 256 rows, 32 on each of 8 ranks; SGLang needs a multiple of 64 there",
    ]


@pytest.mark.parametrize(
    ("engine", "tp", "said"),
    [
        ("tensorrt", 1, "unknown engine 'tensorrt'; known are vllm, sglang, transformers"),
        ("vllm", 0, "--tp 0: an engine has at least one"),
        ("transformers", 2, "not in the table; leave it away .it is for vllm, sglang"),
    ],
)
def test_engines_and_ranks_that_are_not_in_the_table_are_refused(engine: str, tp: int, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        found(WIKI_LLAMA, engine, tp=tp, scheme="W4A16")


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", load_engines())
def test_every_scheme_is_in_the_table_of_every_engine_once(engine: str) -> None:
    table = tomllib.loads(TABLE.read_text())
    named = [name for entry in table[engine]["entries"] for name in entry["schemes"]]
    assert sorted(named) == sorted(table_name(scheme) for scheme in ALL)


@pytest.mark.parametrize("engine", load_engines().values(), ids=lambda engine: engine.title)
def test_every_engine_has_a_version_a_date_and_sources(engine: Any) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", engine.version)
    assert type(engine.checked) is datetime.date
    assert datetime.date(2026, 1, 1) <= engine.checked <= datetime.date.today()
    assert engine.sources
    assert all(engine.sources)


@pytest.mark.parametrize("engine", load_engines().values(), ids=lambda engine: engine.title)
def test_what_is_offered_in_place_of_a_scheme_loads(engine: Any) -> None:
    for supports in (engine.linears, engine.experts):
        for support in supports.values():
            assert (support.instead is None) == (support.refused is None and support.only is None)
            if support.instead is not None:
                other = supports[support.instead]
                assert (other.refused, other.only) == (None, None)
            assert support.rest in {None, "format", "scheme"}


def test_the_readme_says_of_every_scheme_what_the_table_says() -> None:
    rows = [line.strip("|").split("|") for line in README.read_text().splitlines() if line.startswith("| ") and line.count("|") == 6]
    said = {name.strip(): row[-1].strip() for row in rows[1:] for name in row[0].split(",")}
    schemes = SCHEMES | {"FP8_BLOCK with `--format fp8`": NATIVE_FP8}
    assert said == {name: loads_in(scheme) for name, scheme in schemes.items()}


def test_the_check_of_a_plan_reads_no_weight(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": torch.full((128, 128), torch.nan)})
    assert found(source, "vllm", scheme="W4A16") == []
