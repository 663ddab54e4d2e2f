"""A checkpoint at a URL, read by ranges and never stored.

What differs between kinds of URLs is a `Folder`: web.py for http and https, driver.py for whatever fsspec has a driver for. Such files have
no version that could be asked for. So what is read must be what was listed first, and `sizes` lists anew each time it is called.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol, Self

from streamquant.checkpoint.layout import CONFIG_NAMES, parts_of_file
from streamquant.checkpoint.retry import Attempts, Transient, persist
from streamquant.errors import CheckpointError, StreamquantError

NUM_CONNECTIONS = 8
CHANGED = "the source changed"
_CHAIN = re.compile("::(?=[A-Za-z][A-Za-z0-9+.-]*://)")  # as fsspec writes one in another, such as zip://folder::s3://bucket/file.zip


class Found(NamedTuple):
    """A file, as it was found."""

    num_bytes: int
    stamp: str  # what changes when it is replaced; empty if nothing is known
    etag: str | None = None  # of HTTP, if it has one


class Folder(Protocol):
    """The files of one kind of URL. Every method raises Transient for what another attempt may not meet, and else our errors."""

    @property
    def name(self) -> str:
        """The URL without its secrets."""

    @property
    def file(self) -> str:
        """The name of the file if the URL is that of one, whose folder this then is; else empty."""

    @property
    def num_connections(self) -> int:
        """Reads at a time that pay."""

    def list(self) -> Mapping[str, Found | None]:
        """Every file, by name relative to the folder; None where only `look` can tell what it is."""

    def look(self, file: str) -> Found | None:
        """One file, None if it is not there. Raises CheckpointError if it may not be read."""

    def read(self, file: str, found: Found, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill `buffer` with the bytes from `start` on; yields how many more there are each time.

        Raises CheckpointError if the file is not what was found, as far as its folder can tell.
        """

    def stop(self) -> None:
        """Make every read that is under way fail."""

    def close(self) -> None:
        """Close its connections."""


class UrlSource:
    """A folder at a URL, or one safetensors file with the config beside it."""

    def __init__(self, folder: Folder):
        self.name = folder.name
        self.is_file = bool(folder.file)
        self.revision: str | None = None
        self.num_connections = folder.num_connections
        self._folder = folder
        self._stop = threading.Event()
        self._pinned: Mapping[str, Found] = {}  # as listed first
        self._files: Mapping[str, Found] = {}  # as listed last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.close()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, as they are now."""
        self._files = self._look_beside() if self.is_file else self._list()
        self._pinned = self._pinned or self._files
        return {file: found.num_bytes for file, found in self._files.items()}

    def stamp(self, file: str) -> str:
        """A hash, a version or a time, whichever is known of it, as of the last call of `sizes`."""
        return self._files[file].stamp

    def prepare(self, files: Sequence[str]) -> None:
        """Nothing to do."""

    def interrupt(self) -> None:
        """Make every read that waits fail soon. For good."""
        self._stop.set()
        self._folder.stop()

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on, with as many requests as it takes."""
        what = f"{file} of {self.name}"
        attempts = Attempts(what, self._stop)
        filled = 0
        while filled < len(buffer):
            try:
                for count in self._folder.read(file, self._pinned[file], start + filled, buffer[filled:]):
                    filled += count
                    attempts.progress()
            except Transient as failure:
                attempts.wait(failure)
            except StreamquantError as error:
                raise type(error)(f"{what}: {error}") from None

    def _list(self) -> dict[str, Found]:
        listed = persist(self._folder.list, f"listing {self.name}", self._stop)
        unknown = [file for file, found in listed.items() if found is None]
        with ThreadPoolExecutor(NUM_CONNECTIONS, "streamquant-look") as threads:
            looked = dict(zip(unknown, threads.map(self._look, unknown), strict=True))
        return {file: found for file in listed if (found := listed[file] or looked[file]) is not None}

    def _look_beside(self) -> dict[str, Found]:
        """The one file, and its config."""
        file = self._folder.file
        found = self._look(file)
        if found is None:
            raise CheckpointError(f"there is no {self.name}")
        files = {file: found}
        for name in CONFIG_NAMES:
            with suppress(CheckpointError):  # where names may not be listed, one that is not there is one that may not be read
                if (config := self._look(name)) is not None:
                    files[name] = config
        return {name: files[name] for name in parts_of_file(file, files)}

    def _look(self, file: str) -> Found | None:
        return persist(partial(self._folder.look, file), f"{file} of {self.name}", self._stop)


def without_secrets(source: str) -> str:
    """A SOURCE as people may see it: if it is a URL, without user and password, and without a query, which may be a signature."""
    return "::".join(map(_without_secrets, _CHAIN.split(source))) if "://" in source else source


def _without_secrets(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    authority, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return (scheme + separator + authority.rpartition("@")[2] + slash + path).rstrip("/")
