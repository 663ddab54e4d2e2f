"""A repository on the Hugging Face Hub, pinned to a commit, read by ranges and never stored.

Listing, access and the cache are the business of huggingface_hub, with its settings (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE ...). A
file that its cache has is read from there; any other is resolved once to the address of its bytes, and again when that expires.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Self, TypeVar
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from streamquant.checkpoint.http import BUSY, Expired, HttpReader, Location
from streamquant.checkpoint.layout import SUFFIX, parts_of_file
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.retry import Attempts, Transient, persist, seconds_to_wait
from streamquant.errors import CheckpointError, NetworkError, RequestError, StreamquantError
from streamquant.version import __version__

NUM_CONNECTIONS = 8
# What huggingface_hub is built on: httpx, and httpx2 from its version 2 on.
CLIENT = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
OTHER_KINDS = {"datasets", "spaces", "buckets"}
T = TypeVar("T")


class _File(NamedTuple):
    num_bytes: int
    content: str  # hash of what is in it: SHA-256 of large files, git's of small ones


class HubSource:
    """A repository of a model, or a folder or a file in one. Pins the revision to its commit, and lists the files, when it is made.

    `cache`: `prepare` downloads files into the cache of huggingface_hub, which otherwise is only read.
    """

    def __init__(self, repository: str, *, path: str = "", revision: str | None = None, cache: bool = False):
        self.name = "/".join(filter(None, (repository, path)))
        self.is_file = path.endswith(SUFFIX)
        self._repository, self._file, self._asked, self._downloads = repository, path.rpartition("/")[2], revision, cache
        folder = path.rpartition("/")[0] if self.is_file else path
        self._prefix = f"{folder}/" if folder else ""
        self._api = HfApi(library_name="streamquant", library_version=__version__)
        self._stop = threading.Event()
        self._http = HttpReader(CLIENT.create_ssl_context)
        self._locations: dict[str, Location] = {}
        self._resolving: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._open = ExitStack()
        self._cached: LocalSource | None = None
        self._cached_files: set[str] = set()
        self.revision: str | None = None
        if constants.HF_HUB_OFFLINE:
            self.revision, self._files = self._list_cache()
        else:
            self.revision, self._files = self._call(self._list, f"listing {self.name}")
            self._look_into_cache()

    @classmethod
    def from_url(cls, url: str, *, revision: str | None = None, cache: bool = False) -> Self:
        """`hf://org/model[@revision][/path]`, where slashes in the revision are written %2F, or the address of a page of the Hub."""
        parts = url.removeprefix("hf://").removeprefix(f"{constants.ENDPOINT}/").removeprefix("models/").strip("/").split("/")
        if parts[0] in OTHER_KINDS or len(parts) < 2:
            raise RequestError(f"{url} names no model; write hf://org/model, hf://org/model@revision or hf://org/model/folder")
        organization, model, *path = parts
        if "://" in url and not url.startswith("hf://") and path[:1] in (["tree"], ["blob"], ["resolve"]):
            model, path = "@".join((model, *path[1:2])), path[2:]
        model, _, pinned = model.partition("@")
        if pinned and revision:
            raise RequestError(f"{url} has a revision, and --revision {revision} is another; leave out one")
        return cls(f"{organization}/{model}", path="/".join(path), revision=unquote(pinned) or revision, cache=cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()
        self._open.close()

    @property
    def num_connections(self) -> int:
        """Several, unless all is in the cache."""
        return NUM_CONNECTIONS if self._files.keys() - self._cached_files else 0

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, as listed when the source was opened."""
        names = parts_of_file(self._file, self._files) if self.is_file else self._files
        return {name: self._files[name].num_bytes for name in names}

    def stamp(self, file: str) -> str:
        """The hash of what is in it."""
        return self._files[file].content

    def prepare(self, files: Sequence[str]) -> None:
        """Download these files into the cache, if that is wanted."""
        if self._downloads and not constants.HF_HUB_OFFLINE:
            names = [f"{self._prefix}{file}" for file in files]
            # By the name of the branch, which the cache is then going to know.
            download = partial(self._api.snapshot_download, self._repository, revision=self._asked, allow_patterns=names)
            folder = self._call(download, f"downloading {self.name}")
            if Path(folder).name != self.revision:
                raise CheckpointError(f"{self.name} has moved on from {self.revision} while it was downloaded; run the same command again")
            self._look_into_cache()

    def interrupt(self) -> None:
        """Make every read that waits fail soon. For good."""
        self._stop.set()
        self._http.stop()

    def read(self, file: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on, with as many requests as it takes."""
        if self._cached is not None and file in self._cached_files:
            self._cached.read(file, start, buffer)
            return
        what = f"{file} of {self.name}"
        attempts = Attempts(what, self._stop)
        filled = 0
        while filled < len(buffer):
            location = self._locate(file)
            try:
                for count in self._http.read(location, start + filled, buffer[filled:]):
                    filled += count
                    attempts.progress()
            except Transient as failure:
                if isinstance(failure, Expired) and self._locations.get(file) is location:
                    del self._locations[file]
                attempts.wait(failure)
            except StreamquantError as error:
                raise type(error)(f"{what}: {error}") from None

    # --- what the Hub says -------------------------------------------------------------------------------------------

    def _list(self) -> tuple[str, dict[str, _File]]:
        """The commit, and the files of the folder."""
        info = self._api.model_info(self._repository, revision=self._asked, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if info.sha is None or info.siblings is None:
            raise NetworkError(f"{constants.ENDPOINT} lists {self._repository} without a commit or files")
        files = {}
        for sibling in info.siblings:
            content = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
            if sibling.size is None or content is None:
                raise NetworkError(f"{constants.ENDPOINT} lists {sibling.rfilename} of {self._repository} without its size or hash")
            if sibling.rfilename.startswith(self._prefix):
                files[sibling.rfilename.removeprefix(self._prefix)] = _File(sibling.size, content)
        if not files or (self.is_file and self._file not in files):
            raise CheckpointError(f"there is no {self.name} at revision {info.sha}")
        return info.sha, files

    def _list_cache(self) -> tuple[str, dict[str, _File]]:
        """The same, from the cache alone."""
        try:
            folder = Path(snapshot_download(self._repository, revision=self._asked, local_files_only=True))
        except LocalEntryNotFoundError as error:
            if not hasattr(error, "snapshot_path"):
                raise CheckpointError(f"{self.name} is neither here nor in the cache of the Hub, and HF_HUB_OFFLINE is set") from None
            folder = Path(error.snapshot_path)  # some files are not there; whether those matter is not known yet
        self._cached = self._open.enter_context(LocalSource(folder / self._prefix))
        sizes = self._cached.sizes()
        self._cached_files = set(sizes)
        hash_of = {name: (folder / self._prefix / name).resolve().name for name in sizes}  # in the cache, that is the name of the file
        return folder.name, {name: _File(size, hash_of[name]) for name, size in sizes.items()}

    def _look_into_cache(self) -> None:
        for file, (num_bytes, _) in self._files.items():
            path = try_to_load_from_cache(self._repository, f"{self._prefix}{file}", revision=self.revision)
            if isinstance(path, str) and Path(path).stat().st_size == num_bytes:
                if self._cached is None:
                    self._cached = self._open.enter_context(LocalSource(path.removesuffix(file)))
                self._cached_files.add(file)

    def _locate(self, file: str) -> Location:
        with self._resolving[file]:  # once, however many threads wait for it
            if file not in self._locations:
                self._locations[file] = self._call(partial(self._resolve, file), f"{file} of {self.name}")
            return self._locations[file]

    def _resolve(self, file: str) -> Location:
        url = hf_hub_url(self._repository, f"{self._prefix}{file}", revision=self.revision)
        metadata = self._api.get_hf_file_metadata(url=url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        found, expected = _File(metadata.size or 0, metadata.etag or ""), self._files[file]
        if found != expected:
            raise CheckpointError(
                f"{file} of {self.name}: the source changed: {found.num_bytes} bytes with the hash {found.content}, "
                f"not {expected.num_bytes} with {expected.content}"
            )
        location = Location(metadata.location, {}, expected.num_bytes)
        if urlsplit(metadata.location)[:2] == urlsplit(constants.ENDPOINT)[:2]:
            location.headers = build_hf_headers()  # with the token, which no other host gets to see
        return location

    def _call(self, function: Callable[[], T], what: str) -> T:
        """What a function that calls the Hub returns, tried again where that makes sense, with errors as ours."""
        name, endpoint = self._repository, constants.ENDPOINT

        def attempt() -> T:
            try:
                return function()
            except GatedRepoError:
                raise CheckpointError(
                    f"{name} is gated: accept its conditions at {endpoint}/{name}, and log in with `hf auth login` or HF_TOKEN"
                ) from None
            except (RepositoryNotFoundError, HFValidationError):
                raise CheckpointError(
                    f"{name} is neither here nor on {endpoint}; check the name, or log in with `hf auth login` or HF_TOKEN if it is private"
                ) from None
            except RevisionNotFoundError:
                revision = self.revision or self._asked or "main"
                raise CheckpointError(f"{name} has no revision {revision}, or no longer; see {endpoint}/{name}") from None
            except HfHubHTTPError as error:
                status = error.response.status_code
                said = f"{endpoint} answers {status} {error.response.reason_phrase}"
                if status not in BUSY:
                    raise NetworkError(f"{what}: {said}") from None
                raise Transient(said, after=seconds_to_wait(error.response.headers.get("Retry-After"))) from None
            except (CLIENT.TransportError, LocalEntryNotFoundError) as error:
                raise Transient(f"{endpoint}: {str(error) or type(error).__name__}") from None
            except ValueError:  # of json
                raise NetworkError(f"{what}: {endpoint} answers with something that is no JSON") from None

        return persist(attempt, what, self._stop)
