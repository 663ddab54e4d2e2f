"""Which kind of source a SOURCE is."""

import os

from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.source import Source
from streamquant.errors import RequestError


def open_source(source: str | os.PathLike[str], *, revision: str | None = None, cache: bool = False) -> Source:
    """The source that a SOURCE argument means, to be closed by whoever opened it."""
    if revision is not None or cache:
        raise RequestError(f"{source} is on a file system; --revision and --cache are for sources that are not")
    return LocalSource(source)
