"""Our bytes against those that llm-compressor wrote once (golden/make_golden.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from streamquant.schemes import SCHEMES, find_scheme
from tests import against_peer
from tests.checkpoints import DATA_FREE

GOLDEN = load_file(Path(__file__).parent / "golden" / "golden.safetensors")
OBSERVERS = {theirs or "minmax": ours for ours, theirs in against_peer.OBSERVERS.items()}


def answers() -> dict[str, dict[str, Tensor]]:
    """The stored tensors by preset, observer, dtype and weight, and by the last part of their name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in GOLDEN.items():
        if not name.startswith("weight/"):
            title, _, suffix = name.rpartition("/")
            found.setdefault(title, {})[suffix] = tensor
    return found


ANSWERS = answers()


def test_every_preset_has_a_golden_answer_for_every_weight() -> None:
    weights = {name.removeprefix("weight/") for name in GOLDEN if name.startswith("weight/")}
    assert {f"{preset}/minmax/{weight}" for preset in DATA_FREE for weight in weights} == {
        title for title in ANSWERS if "/minmax/" in title
    }


@pytest.mark.parametrize("title", ANSWERS)
def test_the_golden_answer_is_ours(title: str) -> None:
    preset, observer, dtype, kind = title.split("/")
    scheme = find_scheme(preset, observer=OBSERVERS[observer])
    weight, theirs = GOLDEN[f"weight/{dtype}/{kind}"], dict(ANSWERS[title])
    if observer != "minmax":
        differing, _, worse = against_peer.worse_bounds(scheme, weight, theirs.pop("low"), theirs.pop("high"))
        assert worse == 0
        if differing:
            assert kind != "plain" or differing <= 0.05 * scheme.observe(weight).numel()
            return
    assert against_peer.differences(scheme, weight, theirs) == {}


def test_a_golden_answer_that_is_not_ours_is_noticed() -> None:
    theirs = dict(ANSWERS["W4A16/minmax/float32/plain"])
    theirs["weight_packed"] = theirs["weight_packed"] ^ torch.eye(*theirs["weight_packed"].shape, dtype=torch.int32)
    assert list(against_peer.differences(SCHEMES["W4A16"], GOLDEN["weight/float32/plain"], theirs)) == ["weight_packed"]
