"""streamquant: model-free, streaming conversion of safetensors checkpoints into quantized ones.

    import streamquant

    streamquant.convert("path/to/model", "out", scheme="W4A16")
    streamquant.verify("out", against="path/to/model").errors

Scheme functions on plain tensors: `streamquant.schemes`.
"""

from streamquant import engines
from streamquant.convert import Conversion, convert, plan
from streamquant.errors import CheckpointError, NetworkError, RequestError, StorageError, StreamquantError, VerificationError
from streamquant.inspect import Inspection, inspect
from streamquant.plan import Plan
from streamquant.stream import Progress
from streamquant.verify import Verification, verify
from streamquant.version import __version__

__all__ = [
    "CheckpointError",
    "Conversion",
    "Inspection",
    "NetworkError",
    "Plan",
    "Progress",
    "RequestError",
    "StorageError",
    "StreamquantError",
    "Verification",
    "VerificationError",
    "__version__",
    "convert",
    "engines",
    "inspect",
    "plan",
    "verify",
]
