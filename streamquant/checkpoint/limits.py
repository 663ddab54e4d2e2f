"""How far a source is believed: bounds on names and numbers that no honest checkpoint comes near.

The bounds of one header, which the format sets, are in header.py; that of experts in a stack is in inputs/experts.py.
"""

import unicodedata

MAX_FILES = 100_000
# The largest checkpoints known have 280,000. Planning takes some 3 kB for each.
MAX_TENSORS = 1_000_000
MAX_HEADERS_BYTES = 200_000_000  # of all shards: MAX_TENSORS with names of 100 characters
MAX_INDEX_BYTES = MAX_HEADERS_BYTES  # a line takes no more than the entry in a header
MAX_CONFIG_BYTES = 16 << 20  # one that names each of 100,000 modules has 10 MB
MAX_JSON_DEPTH = 100  # of config and index, so that whatever walks through them by recursion, here or in json, comes to an end
MAX_PATTERN_CHARS = 1_000_000  # of the regular expressions in a config, 100 bytes of memory each

MAX_TENSOR_NAME = 1024  # characters; the experts of a stack, in thousands, all repeat it
MAX_PATH_BYTES = 1024  # of the name of a file with its folders, so that there is room for that of OUT in the 4096 of Linux
MAX_PART_BYTES = 255  # what file systems allow

# Control characters (terminals obey them), half surrogates (no UTF-8), separators of lines and paragraphs, and format characters
# (without width, or they turn the direction of what follows). Unusual spaces are none: macOS puts one into the names of its screenshots.
_UNFIT = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def fault_of_tensor_name(name: str) -> str | None:
    """What is wrong with a tensor of this name, or None."""
    if len(name) > MAX_TENSOR_NAME:
        return f"has a name of more than {MAX_TENSOR_NAME} characters"
    return _fault_of_text(name)


def fault_of_file_name(name: str) -> str | None:
    """What is wrong with a file of this name (with its folders and forward slashes), or None if it is one that stays in its folder."""
    if fault := _fault_of_text(name):
        return fault
    if "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "leaves the folder"
    if len(name.encode()) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in name.split("/")):
        return f"is longer than {MAX_PATH_BYTES} bytes, or a part of it than {MAX_PART_BYTES}"
    return None


def _fault_of_text(name: str) -> str | None:
    if name.isprintable() or _UNFIT.isdisjoint(map(unicodedata.category, name)):
        return None
    return "has control or invisible characters in its name"
