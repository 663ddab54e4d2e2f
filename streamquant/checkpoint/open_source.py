"""Which kind of source a SOURCE is."""

import os
import re
from pathlib import Path

from streamquant.checkpoint.layout import SUFFIX
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.source import Source
from streamquant.errors import RequestError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_source(source: str | os.PathLike[str], *, revision: str | None = None, cache: bool = False) -> Source:
    """The source that a SOURCE argument means, to be closed by whoever opened it: what exists here, or else a model on the Hub.

    Raises RequestError for `revision` and `cache` where they mean nothing, CheckpointError if there is no such source, NetworkError if it
    cannot be reached.
    """
    said = os.fspath(source)
    if not Path(said).exists():
        # Only here: local sources need neither client, which take longer to import than all else but torch.
        from huggingface_hub import constants

        from streamquant.checkpoint.hub import HubSource

        if said.startswith(("hf://", f"{constants.ENDPOINT}/")):
            return HubSource.from_url(said, revision=revision, cache=cache)
        if _REPOSITORY.fullmatch(said) and not said.endswith(SUFFIX):
            return HubSource(said, revision=revision, cache=cache)
    if revision is not None or cache:
        raise RequestError(f"{source} is no model on the Hub, which is what --revision and --cache are for")
    return LocalSource(source)
