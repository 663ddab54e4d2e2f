"""What a calibration is said to take of memory: enough, not much too much, and known before anything is written."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import streamquant
from streamquant.calibrate import layers, run
from streamquant.calibrate.budget import FLOAT_BYTES, Needs, hidden_budget
from streamquant.calibrate.statistics import Statistics
from streamquant.errors import RequestError
from streamquant.memory import Container
from tests.checkpoints import WIKI_LLAMA, file_bytes, read_tensors, write_model, write_wiki_llama
from tests.test_calibrate_skeleton import MLA

ROOT = Path(streamquant.__file__).parent.parent
SETTINGS: dict[str, Any] = {"scheme": "W4A16", "samples": 8, "sequence_length": 256}
TEXT = Path(__file__).parent / "data" / "wikitext2-sample.txt"
# Prints what the process has when the layers begin, the most that it has from then on, and what was said of it.
SAMPLED = """
import json, sys, threading, time
from streamquant.calibrate import run
from streamquant.cli import main
from streamquant.container import process_memory
calibrate, found = run.Preparation.calibrate, {}
def sample():
    while True:
        found["most"] = max(found["most"], process_memory().anonymous)
        time.sleep(0.002)
def sampled(preparation, *arguments, **options):
    found["before"] = found["most"] = process_memory().anonymous
    threading.Thread(target=sample, daemon=True).start()
    result = calibrate(preparation, *arguments, **options)
    hidden = run.hidden_bytes(preparation.skeleton, preparation.data.num_tokens)
    print(json.dumps(found | {"predicted": preparation.needs.of_layer + hidden}))
    return result
run.Preparation.calibrate = sampled
sys.argv = ["streamquant", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    "settings",
    [["--method", "gptq"], ["--method", "smoothquant+gptq", "--scheme", "W8A8"], ["--scheme", "NVFP4"]],
    ids=["gptq", "scales moved", "inputs measured"],
)
def test_what_layers_take_is_a_little_less_than_predicted(tmp_path: Path, settings: list[str]) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 128}
    source = write_model(tmp_path / "source", "llama", **wide)
    settings = ["--device", "cpu", "--quiet", "--scheme", "W4A16", "--samples", "8", "--sequence-length", "512", *settings]
    command = [sys.executable, "-c", SAMPLED, "convert", str(source), str(tmp_path / "out"), "--calibration-data", str(TEXT), *settings]
    threads = os.environ | {"OMP_NUM_THREADS": "2"}  # of which each has buffers of its own
    done = subprocess.run(command, cwd=ROOT, env=threads, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done
    figures = json.loads(done.stdout)
    taken, predicted = figures["most"] - figures["before"], figures["predicted"]
    assert taken <= predicted <= 2 * taken


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {}),
        ("gemma3_text", {}),
        ("phi3", {"pad_token_id": 0}),
        ("qwen3_moe", {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}),
        ("mixtral", {"num_local_experts": 4}),
        ("deepseek_v3", MLA | {"first_k_dense_replace": 0, "moe_intermediate_size": 48}),
    ],
)
def test_hessians_are_as_large_as_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, settings: dict[str, Any]) -> None:
    """Linears that share an input are known by their names before they run."""
    source = write_model(tmp_path / "source", model, **settings)
    made: list[int] = []
    needs: list[Needs] = []
    of_nothing, calibrate = Statistics.of_nothing, run.Preparation.calibrate

    def counted(num_columns: int, *arguments: Any, **options: Any) -> Statistics:
        made.append(num_columns)
        return of_nothing(num_columns, *arguments, **options)

    def noted(preparation: run.Preparation, *arguments: Any, **options: Any) -> Any:
        needs.append(preparation.needs)
        return calibrate(preparation, *arguments, **options)

    monkeypatch.setattr(Statistics, "of_nothing", counted)
    monkeypatch.setattr(run.Preparation, "calibrate", noted)
    monkeypatch.setattr(layers, "FEW_TOKENS", 0)
    report = streamquant.convert(source, tmp_path / "out", method="gptq", group_size=8, calibration_data=TEXT, **SETTINGS)
    assert report.calibration is not None
    last = made[-len(made) // len({record.layer for record in report.calibration.records}) :]
    assert needs[0].hessians == pytest.approx(FLOAT_BYTES * sum(size**2 for size in last), rel=0.05)


def container_of(limit: int) -> Container:
    return Container(limit, used_bytes=200 << 20, reserve_bytes=100 << 20)


def test_hidden_states_take_what_a_layer_leaves_of_the_container() -> None:
    needs = Needs(100 << 20, 50 << 20, 150 << 20, reading=400 << 20)
    assert needs.of_layer == 500 << 20
    assert str(needs) == "105 MB for weights, 52.4 MB for Hessians, 157 MB for work"
    assert hidden_budget(needs, max_bytes=1 << 30) == 1 << 30
    assert hidden_budget(needs, max_bytes=1 << 30, container=container_of(5000 << 20)) == 1 << 30
    assert hidden_budget(needs, max_bytes=1 << 30, container=container_of(850 << 20)) == 50 << 20
    with pytest.raises(
        RequestError, match=r"limit of 799MiB is too small for calibrating a layer \(105 MB for weights.*200MiB are"
    ) as error:
        hidden_budget(needs, max_bytes=1, container=container_of(799 << 20))
    found = re.search(r"a limit of (\d+)MiB works", str(error.value))
    assert found is not None
    assert hidden_budget(needs, max_bytes=1 << 30, container=container_of(int(found[1]) << 20)) > 0


def test_a_layer_that_a_gpu_has_no_room_for_is_refused() -> None:
    """Its weights are on the GPU; on the host is only what is being read."""
    needs = Needs(100 << 20, 50 << 20, 150 << 20, reading=20 << 20)
    assert hidden_budget(needs, max_bytes=1 << 30, gpu_bytes=300 << 20) == 1 << 30
    assert hidden_budget(needs, max_bytes=1 << 30, gpu_bytes=300 << 20, container=container_of(330 << 20)) == 10 << 20
    with pytest.raises(RequestError, match=r"takes 300MiB of a GPU's memory .*and there are 299MiB.*--max-gpu-memory 300MiB"):
        hidden_budget(needs, max_bytes=1 << 30, gpu_bytes=299 << 20)


def test_in_a_small_container_hidden_states_are_in_a_file_and_the_bytes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_file = []

    def converted(name: str) -> dict[str, bytes]:
        streamquant.convert(WIKI_LLAMA, tmp_path / name, method="gptq", calibration_data=TEXT, **SETTINGS)
        return file_bytes(tmp_path / name)

    class Spy(layers.HiddenStates):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            in_file.append(self.in_file)

    monkeypatch.setattr(layers, "HiddenStates", Spy)
    roomy = converted("roomy")
    needed = [0]
    monkeypatch.setattr(run, "container_for", lambda *_, **__: container_of((300 << 20) + needed[0]))
    with pytest.raises(RequestError, match="too small for calibrating a layer"):
        converted("none")
    assert not (tmp_path / "none").exists()
    preparation: list[run.Preparation] = []
    calibrate = run.Preparation.calibrate
    monkeypatch.setattr(
        run.Preparation, "calibrate", lambda self, *rest, **options: preparation.append(self) or calibrate(self, *rest, **options)
    )
    needed[0] = 1 << 40
    assert converted("again") == roomy
    needed[0] = preparation[0].needs.of_layer + 1
    assert converted("tight") == roomy
    assert in_file == [False, False, True]


def test_no_more_of_a_layer_is_read_than_is_asked_for_soon() -> None:
    """A remote layer of experts, read whole, is twice in memory."""
    asked, begun = 0, []

    def read(name: str) -> torch.Tensor:
        begun.append(name)
        assert len(begun) <= asked + 3
        return torch.tensor(int(name))

    with ThreadPoolExecutor(2) as threads:
        found = layers._read_ahead(read, map(str, range(20)), threads, 2)
        for expected in range(20):
            assert int(next(found)) == expected
            asked += 1


def test_a_model_that_transformers_does_not_know_leaves_no_folder(tmp_path: Path) -> None:
    source = write_wiki_llama(tmp_path / "source", read_tensors(WIKI_LLAMA))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(RequestError, match="does not know this model"):
        streamquant.convert(source, tmp_path / "out", method="gptq", calibration_data=TEXT, **SETTINGS)
    assert not (tmp_path / "out").exists()
