"""Numbers of bytes as people write them and read them."""

from streamquant.errors import RequestError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MEBIBYTE = 1 << 20


def parse_size(size: str | int) -> int:
    """Bytes in a size such as 5GB, 256MiB or 1000. Raises RequestError if it is none."""
    text = str(size).strip().upper()
    number = text.rstrip("KMGTIB ")
    unit = text[len(number) :].strip()
    unit = {"B": "", "K": "KB", "M": "MB", "G": "GB", "T": "TB"}.get(unit, unit)
    try:
        num_bytes = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise RequestError(f"{size!r} is no size; write for example 5GB or 256MiB") from None
    if num_bytes < 1:
        raise RequestError(f"size {size!r} is less than a byte")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """A size in decimal units with three digits: 13.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def enough_mebibytes(num_bytes: int) -> str:
    """A size that is no less, as a flag or a container takes it: 13MiB."""
    return f"{-(-num_bytes // MEBIBYTE)}MiB"
