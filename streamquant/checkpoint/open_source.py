"""Which kind of source a SOURCE is."""

import os
import re
from pathlib import Path

from streamquant.checkpoint.layout import SUFFIX
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.source import Source
from streamquant.errors import RequestError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_URL = re.compile(r"([A-Za-z][\w+.:-]*)://")


def open_source(source: str | os.PathLike[str], *, revision: str | None = None, cache: bool = False) -> Source:
    """The source that a SOURCE argument means, to be closed by whoever opened it: a URL, what exists here, or else a model on the Hub.

    Raises RequestError for `revision` and `cache` where they mean nothing, CheckpointError if there is no such source, NetworkError if it
    cannot be reached.
    """
    said = os.fspath(source)
    if url := _URL.match(said):
        return _open_url(said, url[1], revision=revision, cache=cache)
    if not Path(said).exists() and _REPOSITORY.fullmatch(said) and not said.endswith(SUFFIX):
        # Only here: local sources need no client of the Hub, which takes longer to import than all else but torch.
        from streamquant.checkpoint.hub import HubSource

        return HubSource(said, revision=revision, cache=cache)
    _refuse_hub_options(said, revision=revision, cache=cache)
    return LocalSource(source)


def _open_url(url: str, scheme: str, *, revision: str | None, cache: bool) -> Source:
    from huggingface_hub import constants

    from streamquant.checkpoint.url import UrlSource, without_secrets

    if url.startswith(("hf://", f"{constants.ENDPOINT}/")):
        from streamquant.checkpoint.hub import HubSource

        return HubSource.from_url(url, revision=revision, cache=cache)
    _refuse_hub_options(without_secrets(url), revision=revision, cache=cache)
    if scheme in {"file", "local"}:
        return LocalSource(url.partition("://")[2])
    if scheme in {"http", "https"}:
        from streamquant.checkpoint.web import WebFolder

        return UrlSource(WebFolder(url))
    from streamquant.checkpoint.driver import DriverFolder

    return UrlSource(DriverFolder(url))


def _refuse_hub_options(name: str, *, revision: str | None, cache: bool) -> None:
    if revision is not None or cache:
        raise RequestError(f"{name} is no model on the Hub, which is what --revision and --cache are for")
