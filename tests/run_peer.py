"""Converts files of weights with llm-compressor's model_free_ptq. Runs in an environment that has it; imports nothing of ours.

    python run_peer.py JOBS.json

JOBS.json: a list of {"source": file, "target": file, "scheme": name of a preset or fields of a QuantizationScheme, "observer": name
or null}. Tensors in `source` have names as in a checkpoint. With an observer, `target` also has "MODULE.low" and "MODULE.high", the
bounds that it chose for each unit.
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"LOGURU_LEVEL": "ERROR", "LLM_COMPRESSOR_LOG_DISABLED": "true", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
warnings.filterwarnings("ignore")

import llmcompressor.entrypoints.model_free as model_free  # noqa: E402
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme  # noqa: E402
from llmcompressor.entrypoints.model_free.lifecycle import initialize_quantized_linear  # noqa: E402
from llmcompressor.modifiers.quantization.calibration import apply_calibration_status, initialize_observer, observe  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

# It hands views to save_file where a block or a packed word is not full, which then refuses them.
model_free.save_file = lambda tensors, path: save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def convert(source: Path, target: Path, scheme: str | dict[str, Any], observer: str | None = None) -> None:
    wanted = preset_name_to_scheme(scheme, ["Linear"]) if isinstance(scheme, str) else QuantizationScheme(targets=["Linear"], **scheme)
    wanted.weights.observer = observer
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, output = Path(folder, "checkpoint"), Path(folder, "output")
        checkpoint.mkdir()
        shutil.copy(source, checkpoint / "model.safetensors")
        (checkpoint / "config.json").write_text('{"model_type": "llama"}')
        model_free.model_free_ptq(checkpoint, output, scheme=wanted, device="cpu")
        converted = load_file(output / "model.safetensors")
        if observer is not None:
            converted |= bounds(source, wanted)
        save_file(converted, target)


def bounds(source: Path, scheme: QuantizationScheme) -> dict[str, Tensor]:
    found = {}
    for name, weight in load_file(source).items():
        linear = initialize_quantized_linear(weight, scheme, "cpu")
        initialize_observer(linear, "weight")
        apply_calibration_status(linear)
        observe(linear, base_name="weight")
        module = name.removesuffix(".weight")
        found[f"{module}.low"], found[f"{module}.high"] = linear.weight_observer.min_vals, linear.weight_observer.max_vals
    return found


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        convert(Path(job["source"]), Path(job["target"]), job["scheme"], job["observer"])
