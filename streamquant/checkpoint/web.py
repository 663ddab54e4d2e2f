"""A folder on a web server, whose files are those that its page links to: the index pages of Apache, nginx, Caddy and others.

No driver of fsspec is in between. Its own takes a busy server for a missing file, anything in a page that looks like an address for a file,
and reads whatever is at the address by then.
"""

import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from html import unescape
from http.client import HTTPResponse
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from streamquant.checkpoint.http import BUSY, Expired, HttpReader, Location
from streamquant.checkpoint.layout import SUFFIX
from streamquant.checkpoint.limits import MAX_FILES
from streamquant.checkpoint.retry import Transient, seconds_to_wait
from streamquant.checkpoint.source import SKIPPED
from streamquant.checkpoint.url import CHANGED, NUM_CONNECTIONS, Found, without_secrets
from streamquant.errors import CheckpointError, NetworkError, RequestError

MAX_PAGES = 1000  # a checkpoint has fewer folders; more are a server that links in circles
MAX_PAGE_BYTES = 16 << 20
NOT_ESCAPED = "/%~!$&'()*+,;=:@?"  # in paths and queries: what stands for itself, or is an escape already (RFC 3986, section 3)
_LINK = re.compile(r"""<a\s(?:[^<>]*?\s)?href\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>]+))""", re.IGNORECASE)


class WebFolder:
    """The files below an address of http or https. A query, such as a signature, goes with every request; user and password too."""

    def __init__(self, url: str):
        self.name = without_secrets(url)
        self.num_connections = NUM_CONNECTIONS
        try:
            parts = urlsplit(url)
            self._host = parts.hostname or ""
            is_address = bool(self._host.encode("idna")) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise RequestError(f"{self.name} is no address of a web server")
        path, file = parts.path.rpartition("/")[::2] if parts.path.endswith(SUFFIX) else (parts.path.rstrip("/"), "")
        self.file = unquote(file)
        self._address = SplitResult(
            scheme=parts.scheme,
            netloc=parts.netloc.rpartition("@")[2],
            path=quote(path, safe=NOT_ESCAPED) + "/",
            query=quote(parts.query, safe=NOT_ESCAPED),
            fragment="",
        )
        self._headers = {}
        if parts.username is not None:
            credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers = {"Authorization": f"Basic {b64encode(credentials).decode()}"}
        self._http = HttpReader()
        self._locations: dict[str, Location] = {}

    def list(self) -> dict[str, Found | None]:
        """The links to what is below the folder, and those of the folders there."""
        files: dict[str, Found | None] = {}
        folders = [""]
        known = set(folders)
        for num_pages, folder in enumerate(folders):
            if num_pages == MAX_PAGES or len(files) > MAX_FILES:
                raise CheckpointError(
                    f"{self.name} has more than {MAX_PAGES} folders or {MAX_FILES} files; give the folder that holds the checkpoint"
                )
            for name in self._links(folder):
                if not name.endswith("/"):
                    files[name] = None
                elif name not in known and SKIPPED.isdisjoint(name.split("/")):
                    known.add(name)
                    folders.append(name)
        if not files:
            raise CheckpointError(
                f"the page at {self.name} links to no file below it; give one that lists a checkpoint, or a {SUFFIX} file"
            )
        return files

    def look(self, file: str) -> Found | None:
        """Ask for one byte. Not by HEAD, for which an address that was signed for GET is not good."""
        with self._get(file, "bytes=0-0") as (response, _):
            if response.status == 404:
                return None
            total = response.getheader("Content-Range", "").rpartition("/")[2]
            if (response.status, total) != (416, "0"):  # it is empty
                self._require_content(response, file)
            if response.status == 200:
                total = response.getheader("Content-Length", "")
                if file.endswith(SUFFIX) and total != "0":
                    raise CheckpointError(
                        f"{self._host} sends {file} as a whole only, and not ranges of bytes of it; "
                        "download the checkpoint, or serve it with a server that does, such as nginx, Apache or Caddy"
                    )
            if not total.isdecimal():
                raise CheckpointError(f"{self._host} does not tell the size of {file}")
            response.read(1)
            etag = response.getheader("ETag")
            return Found(int(total), etag or response.getheader("Last-Modified") or "", etag)

    def read(self, file: str, found: Found, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill `buffer` with the bytes from `start` on; yields how many more there are each time."""
        location = self._locations.setdefault(file, Location(self._url(file), self._headers, found.num_bytes, found.etag))
        try:
            yield from self._http.read(location, start, buffer)
        except Expired as refusal:
            raise NetworkError(f"{refusal}; if the address was signed and has expired, the run goes on with a new one") from None
        except NetworkError:
            if self.look(file) is None:
                raise CheckpointError(f"it is no longer on {self._host}: {CHANGED}") from None
            raise

    def stop(self) -> None:
        """Make every read that is under way fail."""
        self._http.stop()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _links(self, folder: str) -> Sequence[str]:
        """What the page of a folder links to below it, named from the top; names of folders end in a slash."""
        with self._get(folder) as (response, page):
            if response.status == 404:
                raise CheckpointError(f"there is no {self._name(folder)}")
            self._require_content(response, folder)
            kind = response.getheader("Content-Type", "").partition(";")[0]
            if "html" not in kind:
                raise CheckpointError(
                    f"{self.name} is no page that lists files, but of type {kind or 'unknown'}; give a {SUFFIX} file or a folder"
                )
            text = response.read(MAX_PAGE_BYTES)
            if len(text) == MAX_PAGE_BYTES:
                raise CheckpointError(f"the page at {self.name} has {MAX_PAGE_BYTES} bytes or more, which is no list of files")
            if response.length:
                raise Transient(f"{self._host} sent {len(text)} of {len(text) + response.length} bytes")
        names = set()
        above = unquote(urlsplit(page).path)
        for match in _LINK.finditer(text.decode(errors="replace")):
            with suppress(ValueError):  # of what is no address at all
                link = urlsplit(urljoin(page, unescape(match[match.lastindex or 0])))
                path = unquote(link.path)
                if link.hostname == urlsplit(page).hostname and path.startswith(above) and path != above:
                    names.add(folder + path.removeprefix(above))
        return sorted(names)

    def _name(self, file: str) -> str:
        return self.name if file == self.file else f"{self.name}/{file}".rstrip("/")

    def _url(self, file: str) -> str:
        return urlunsplit(self._address._replace(path=self._address.path + quote(file)))

    @contextmanager
    def _get(self, file: str, wanted: str | None = None) -> Iterator[tuple[HTTPResponse, str]]:
        """The answer to a request, and the address that it came from."""
        with self._http.get(Location(self._url(file), self._headers, 0), wanted) as (response, url):
            if response.status in BUSY:
                after = seconds_to_wait(response.getheader("Retry-After"))
                raise Transient(f"{self._host} answers {response.status} {response.reason}", after=after)
            yield response, url

    def _require_content(self, response: HTTPResponse, file: str) -> None:
        said = f"{self._host} answers {response.status} {response.reason}"
        if response.status in {401, 403}:
            raise CheckpointError(
                f"{said} for {self._name(file)}; it may need a user and a password (https://user:password@host/...), "
                "have been signed for a time that is over, or be a folder whose files are not to be listed"
            )
        if response.status not in {200, 206}:
            raise NetworkError(said)
