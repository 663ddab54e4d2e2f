"""What is in a checkpoint, from its headers and its config. Imports no torch."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamquant.checkpoint.checkpoint import Checkpoint, read_checkpoint
from streamquant.checkpoint.open_source import open_source


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found."""

    checkpoint: Checkpoint

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.checkpoint.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(spec.num_elements for spec in self.checkpoint.tensors.values())

    @property
    def bytes_by_dtype(self) -> Mapping[str, int]:
        """Bytes of the tensors of each dtype, most first."""
        counter: Counter[str] = Counter()
        for spec in self.checkpoint.tensors.values():
            counter[spec.dtype] += spec.num_bytes
        return dict(counter.most_common())

    @property
    def quant_method(self) -> str | None:
        """The kind of quantization that the config names, if it names one."""
        stated = self.checkpoint.quantization
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        return method if isinstance(method, str) else None

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain values."""
        config = self.checkpoint.config or {}
        return {
            "source": self.checkpoint.source,
            "revision": self.checkpoint.revision,
            "model_type": config.get("model_type"),
            "architectures": config.get("architectures"),
            "quant_method": self.quant_method,
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "bytes_by_dtype": dict(self.bytes_by_dtype),
            "shards": list(self.checkpoint.shards),
            "side_files": list(self.checkpoint.side_files),
            "left_out": dict(self.checkpoint.left_out),
            "tensors": [
                {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "file": spec.file, "bytes": spec.num_bytes}
                for spec in self.checkpoint.tensors.values()
            ],
        }


def inspect(source: str | os.PathLike[str], *, revision: str | None = None) -> Inspection:
    """Read headers and config of any source. Raises CheckpointError if they are damaged or contradict each other."""
    with open_source(source, revision=revision) as opened:
        return Inspection(read_checkpoint(opened))
