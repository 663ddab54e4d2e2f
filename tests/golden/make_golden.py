"""Writes golden.safetensors: weights, and what llm-compressor makes of them. Runs in the peer's environment (see run_peer.py).

    python tests/golden/make_golden.py

Tensors are named SCHEME/OBSERVER/DTYPE/WEIGHT/SUFFIX, the weights themselves weight/DTYPE/WEIGHT. SCHEME is a preset; the preset of
FP8A16, which the peer has not, is spelled out below.
"""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests import oracles, run_peer  # noqa: E402

PRESETS = [
    *("FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "INT8", "W8A16", "W7A16", "W6A16", "W5A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16"),
    *("W4A8", "W4AFP8", "NVFP4A16", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8"),
]
FP8A16 = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}}
SEARCHED = ["FP8_DYNAMIC", "FP8_BLOCK", "W8A8", "W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4", "MXFP8"]
EXTREME = ("huge", "tiny", "subnormal")
BEYOND = ("any bits", "largest")  # for which the peer has no answer


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """One weight with two rows of each distribution; those that would drown it stand alone."""
    every = oracles.weights_to_try((2, 256), dtype)
    plain = [weight for name, weight in every.items() if name not in EXTREME + BEYOND]
    return {"plain": torch.cat(plain)} | {name: every[name] for name in EXTREME}


def main() -> None:
    golden: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            golden |= {f"weight/{name}/{kind}": weight for kind, weight in weights(dtype).items()}
            save_file({f"model.{kind}.down_proj.weight": weight for kind, weight in weights(dtype).items()}, source)
            runs = [(preset, preset, None) for preset in PRESETS] + [("FP8A16", FP8A16, None)]
            if dtype == torch.float32:
                runs += [(preset, preset, "memoryless_mse") for preset in SEARCHED] + [("NVFP4A16", "NVFP4A16", "nvfp4_expanded_mse")]
            for preset, scheme, observer in runs:
                run_peer.convert(source, target, scheme, observer)
                for full_name, tensor in load_file(target).items():
                    _, kind, _, suffix = full_name.split(".")
                    golden[f"{preset}/{observer or 'minmax'}/{name}/{kind}/{suffix}"] = tensor
    versions = {package: importlib.metadata.version(package) for package in ("llmcompressor", "compressed-tensors", "torch")}
    save_file(golden, HERE / "golden.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
