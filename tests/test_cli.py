"""The command line as a user meets it: what it prints, where, and how it exits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import streamquant
from tests.checkpoints import WIKI_LLAMA, attention, weight, write_checkpoint

ROOT = Path(streamquant.__file__).parent.parent


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamquant", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_plan_convert_verify_inspect_and_schemes_tell_what_they_did(tmp_path: Path) -> None:
    planned = run("plan", WIKI_LLAMA, "--scheme", "NVFP4A16")
    assert "NVFP4A16, fused q_proj+k_proj+v_proj" in planned.stdout
    assert "kept: lm_head" in planned.stdout
    converted = run("convert", WIKI_LLAMA, tmp_path / "out", "--scheme", "NVFP4A16", "--report", tmp_path / "report.json")
    assert converted.returncode == 0, converted.stderr
    assert "quantized   42 weights to NVFP4A16; 12 fused groups" in converted.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["quantized"]) == 42
    assert report["kept"]["lm_head.weight"] == "lm_head"
    verified = run("verify", tmp_path / "out", "--against", WIKI_LLAMA, "--json")
    assert json.loads(verified.stdout)["problems"] == []
    assert "6,819,072 parameters" in run("inspect", WIKI_LLAMA).stdout
    assert len(json.loads(run("inspect", WIKI_LLAMA, "--json").stdout)["tensors"]) == 57
    assert "quantized   compressed-tensors" in run("inspect", tmp_path / "out").stdout
    assert "NVFP4A16     4.50" in run("schemes").stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    arguments = (WIKI_LLAMA, "--scheme", "W4A16", "--group-size", "64", "--asymmetric")
    dry = run("convert", arguments[0], tmp_path / "out", *arguments[1:], "--dry-run")
    assert dry.stdout == run("plan", *arguments).stdout
    assert not (tmp_path / "out").exists()


def test_a_line_of_roles_is_a_recipe(tmp_path: Path) -> None:
    done = run("convert", WIKI_LLAMA, tmp_path / "out", "--scheme", "mlp=NVFP4A16, attention=FP8_DYNAMIC", "--observer", "mse")
    assert done.returncode == 0, done.stderr
    assert "quantized   42 weights to NVFP4A16 (mse), FP8_DYNAMIC (mse); 12 fused groups" in done.stdout


def test_a_plan_says_that_an_engine_loads_everything() -> None:
    planned = run("plan", WIKI_LLAMA, "--scheme", "W4A16", "--engine", "vllm", "--tp", "2")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert planned.stdout.splitlines()[-1].startswith("engine      vLLM 0.32.0 on 2 ranks: everything loads (table of ")
    assert planned.stdout.startswith(run("plan", WIKI_LLAMA, "--scheme", "W4A16").stdout)


def test_a_plan_names_what_an_engine_does_not_load_and_exits_with_2() -> None:
    planned = run("plan", WIKI_LLAMA, "--scheme", "W4A16", "--engine", "vllm", "--tp", "4")
    assert planned.returncode == 2
    *_, engine, down, o = planned.stdout.splitlines()
    assert engine.startswith("engine      vLLM 0.32.0 on 4 ranks (table of ")
    assert down == (
        "PROBLEM     6 x model.layers.*.mlp.down_proj (W4A16): down_proj has 768 columns, 192 on each of 4 ranks; "
        "vLLM needs a multiple of 128 there; way out: --tp 2, --group-size 64 or --ignore '*.mlp.down_proj'"
    )
    assert o.startswith("PROBLEM     6 x model.layers.*.self_attn.o_proj (W4A16): o_proj has 256 columns, 64 on each of 4 ranks")
    assert planned.stderr == (
        "error: vLLM 0.32.0 does not load model.layers.*.mlp.down_proj and 1 more "
        "(way out: --tp 2, --group-size 64 or --ignore '*.mlp.down_proj')\n"
    )


def test_what_loads_under_a_condition_is_no_failure() -> None:
    planned = run("plan", WIKI_LLAMA, "--scheme", "W4AFP8", "--engine", "vllm")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "condition   6 x model.layers.*.mlp.down_proj (W4AFP8): vLLM loads them only on GPUs of compute" in planned.stdout


def test_a_plan_as_json_has_the_findings_as_a_key_more() -> None:
    planned = run("plan", WIKI_LLAMA, "--scheme", "W3A16", "--engine", "sglang", "--json")
    assert planned.returncode == 2
    document = json.loads(planned.stdout)
    engine = document.pop("engine")
    assert document == json.loads(run("plan", WIKI_LLAMA, "--scheme", "W3A16", "--json").stdout)
    assert (engine["name"], engine["version"], engine["tp"]) == ("SGLang", "0.5.23", 1)
    assert [finding["count"] for finding in engine["findings"]] == [6, 6, 6, 6]
    assert engine["findings"][0]["problem"] == "SGLang reads packed integers of 4 and 8 bits only"


def test_quiet_is_quiet(tmp_path: Path) -> None:
    done = run("convert", WIKI_LLAMA, tmp_path / "out", "--scheme", "W8A8", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["convert", WIKI_LLAMA, "{tmp}/out"], 2, "nothing to do: give --scheme"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "W4A17"], 2, "unknown scheme 'W4A17'; known are FP8, FP8_DYNAMIC"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "experts=W4A16,W8A16"], 2, "role 'experts' matches no weight"),
        (["plan", WIKI_LLAMA, "--scheme", "mlp=W4A16", "--ignore", "mlp"], 2, "nothing in"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "FP8"], 2, "take calibration data; without data use FP8_DYNAMIC"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--schema", "W4A16"], 2, "No such option"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "W4A16", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "W4A16", "--device", "cuda:77"], 2, "device cuda:77 is not there"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "W4A16", "--max-memory", "1KB"], 2, "give --max-memory"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "W4A16", "--threads", "0"], 2, "0 threads are too few"),
        (
            ["plan", WIKI_LLAMA, "--scheme", "W4A16", "--tp", "2"],
            2,
            "--tp 2 says on how many ranks an engine runs; say which with --engine",
        ),
        (["plan", WIKI_LLAMA, "--scheme", "W4A16", "--engine", "vllm", "--tp", "0"], 2, "--tp 0: an engine has at least one"),
        (["plan", WIKI_LLAMA, "--scheme", "W4A16", "--engine", "triton"], 2, "unknown engine 'triton'; known are vllm, sglang, transf"),
        (["convert", "{tmp}/no", "{tmp}/out", "--scheme", "W4A16"], 3, "does not exist"),
        (["convert", "{tmp}", "{tmp}/out", "--scheme", "W4A16"], 3, "holds no .safetensors file"),
        (["convert", WIKI_LLAMA, "/proc/out", "--scheme", "W4A16", "--quiet"], 4, "/proc/out"),
        (["convert", WIKI_LLAMA, "{tmp}/out", "--scheme", "BF16"], 2, "is quantized, so nothing would be unpacked"),
        (["inspect", "pyproject.toml"], 3, "is not a .safetensors file"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_an_exit_code(tmp_path: Path, arguments: list[object], exit_code: int, said: str) -> None:
    failed = run(*(str(argument).format(tmp=tmp_path) for argument in arguments))
    assert failed.returncode == exit_code, failed
    assert said in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""
    if "No such option" not in said:
        assert failed.stderr.startswith("error: ")
        assert failed.stderr.count("\n") == 1


def test_damage_exits_with_6(tmp_path: Path) -> None:
    tensors = attention()
    source = write_checkpoint(tmp_path / "source", tensors)
    streamquant.convert(source, tmp_path / "out", scheme="W4A16")
    other = write_checkpoint(tmp_path / "other", tensors | {"model.norm.weight": weight(8)})
    failed = run("verify", tmp_path / "out", "--against", other)
    assert failed.returncode == 6
    assert "PROBLEM     model.norm.weight of the source is missing" in failed.stdout
