"""Our bytes against those that llm-compressor's model_free_ptq writes now, in its own environment.

Run by `PEER_PYTHON=... pytest -m peer`, with the interpreter of that environment.
"""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamquant.schemes import SCHEMES, Scheme, find_scheme
from tests import against_peer, oracles
from tests.checkpoints import DATA_FREE

PEER_PYTHON = os.environ.get("PEER_PYTHON")
pytestmark = [pytest.mark.peer, pytest.mark.skipif(PEER_PYTHON is None, reason="PEER_PYTHON is not set")]

SHAPES = [(24, 256), (130, 384)]
SHAPES_OF_UNIT = {16: [(5, 48)], 32: [(9, 96)], 64: [(3, 192)], 128: []}
ODD_SHAPES = [(131, 129), (13, 37)]
SEARCH_SHAPES = [(24, 256), (130, 128)]

SETTINGS = [*({"preset": preset} for preset in DATA_FREE), *oracles.SETTINGS_TO_TRY]
MINMAX = {
    f"{' '.join(map(str, settings.values()))} {dtype}": (find_scheme(**settings), dtype)
    for settings, dtype in itertools.product(SETTINGS, (torch.bfloat16, torch.float16, torch.float32))
    if not against_peer.peer_fails(find_scheme(**settings), torch.ones(1, dtype=dtype))
}
SEARCH = {
    " ".join(map(str, [*settings.values(), observer])): find_scheme(**settings, observer=observer)
    for settings, observer in [
        *((settings, "mse") for settings in SETTINGS if settings.get("strategy") != "tensor"),
        ({"preset": "NVFP4A16"}, "nvfp4_expanded_mse"),
    ]
}
QKV = [f"model.layers.0.self_attn.{projection}_proj" for projection in "qkv"]
FUSED = [*QKV, "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


def weights_of(scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the name of a module."""
    unit_columns = scheme.weights_config.get("group_size", 1)
    shapes = SEARCH_SHAPES if scheme.observer != "minmax" else SHAPES + SHAPES_OF_UNIT.get(unit_columns, ODD_SHAPES)
    return {
        f"model.{name.replace(' ', '_')}_{rows}_{columns}.down_proj": weight
        for rows, columns in shapes
        for name, weight in oracles.weights_to_try((rows, columns), dtype).items()
        if not against_peer.peer_fails(scheme, weight)
    }


def fused_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    weights = oracles.weights_to_try((24, 64), dtype)
    return dict(zip(FUSED, (weights[name] for name in ("normal", "positive", "heavy tail", "outlier", "zero rows")), strict=True))


def cases() -> Iterator[tuple[str, Scheme, torch.dtype, dict[str, Tensor]]]:
    for title, (scheme, dtype) in MINMAX.items():
        yield title, scheme, dtype, weights_of(scheme, dtype)
    for title, scheme in SEARCH.items():
        yield title, scheme, torch.float32, weights_of(scheme, torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        yield f"fused {dtype}", SCHEMES["NVFP4A16"], dtype, fused_weights(dtype)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the peer's answers, one file for each case."""
    folder = tmp_path_factory.mktemp("peer")
    jobs = []
    for case, scheme, _, weights in cases():
        source = folder / f"{case} source"
        save_file({f"{module}.weight": weight for module, weight in weights.items()}, source)
        observer = against_peer.OBSERVERS[scheme.observer]
        jobs.append(
            {"source": str(source), "target": str(folder / case), "scheme": against_peer.scheme_for_peer(scheme), "observer": observer}
        )
    job_file = folder / "jobs.json"
    job_file.write_text(json.dumps(jobs))
    subprocess.run([str(PEER_PYTHON), Path(__file__).with_name("run_peer.py"), job_file], check=True)
    return folder


def answers(file: Path) -> dict[str, dict[str, Tensor]]:
    """The stored tensors by module and last part of the name."""
    by_module: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        module, _, suffix = name.rpartition(".")
        by_module.setdefault(module, {})[suffix] = tensor
    return by_module


@pytest.mark.parametrize("title", MINMAX)
def test_the_peer_writes_the_same(peer: Path, title: str) -> None:
    theirs = answers(peer / title)
    scheme, dtype = MINMAX[title]
    found = {module: against_peer.differences(scheme, weight, theirs[module]) for module, weight in weights_of(scheme, dtype).items()}
    assert {module: what for module, what in found.items() if what} == {}


@pytest.mark.parametrize("title", SEARCH)
def test_a_search_is_as_good_as_the_peers(peer: Path, title: str) -> None:
    """Where bounds differ, most errors do not: in 115 of 138 units of MXFP4."""
    theirs, scheme = answers(peer / title), SEARCH[title]
    num_differing = num_units = 0
    for module, weight in weights_of(scheme, torch.float32).items():
        low, high = theirs[module].pop("low"), theirs[module].pop("high")
        bounds_differ, differing, worse = against_peer.worse_bounds(scheme, weight, low, high)
        assert worse == 0, f"{module}: {worse} of {differing} units that differ are worse"
        if bounds_differ == 0:
            assert against_peer.differences(scheme, weight, theirs[module]) == {}, module
        if 1e-6 < weight.abs().max() < 1e6:  # the peer's errors neither underflow nor overflow
            num_differing, num_units = num_differing + differing, num_units + low.numel()
    assert num_differing <= num_units * (0.01 if scheme.observer == "mse" else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_weights_share_a_global_scale_as_in_the_peer(peer: Path, dtype: torch.dtype) -> None:
    theirs, scheme = answers(peer / f"fused {dtype}"), SCHEMES["NVFP4A16"]
    weights = fused_weights(dtype)
    for modules in (QKV, FUSED[len(QKV) :]):
        amax = torch.stack([weights[module].abs().max() for module in modules]).max().float().view(1)
        shared = scheme.share(amax, dtype)
        for module in modules:
            weight = weights[module]
            ours = scheme.encode(weight, shared=shared) | scheme.once(tuple(weight.shape), dtype, shared)
            assert oracles.differences(ours, theirs[module]) == {}
            oracle = oracles.encode(weight, scheme.format, scheme.weights_config, amax=amax.item())
            assert oracles.differences(ours, oracle) == {}
