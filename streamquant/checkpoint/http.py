"""Ranges of files by HTTP, read straight into the caller's memory over connections that stay open.

On the client of the standard library, which fills a buffer in place: with eight connections a GB takes it 0.3 s of CPU time, and httpx,
on which huggingface_hub is built, 1.6 to 2.1 s, in which its threads hold each other up (benchmarks/README.md).
"""

import http.client
import socket
import ssl
import threading
import urllib.request
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from streamquant.checkpoint.retry import Transient, seconds_to_wait
from streamquant.errors import CheckpointError, NetworkError

STALL_SECONDS = 30.0  # without a byte: reconnect
READ_BYTES = 256 << 10  # at most as much is read again after a stall
MAX_REDIRECTS = 5
BUSY = {408, 425, 429, 500, 502, 503, 504}
REDIRECTS = {301, 302, 303, 307, 308}
PORTS = {"http": 80, "https": 443}


class Expired(Transient):
    """The address has become invalid, as signed ones do."""


@dataclass(slots=True)
class Location:
    """Where the bytes of a file are at the moment."""

    url: str
    headers: Mapping[str, str]  # for the host of `url` and no other
    total_bytes: int
    etag: str | None = None  # as far as it is known

    @property
    def host(self) -> str:
        """For people: signed addresses are secrets."""
        return urlsplit(self.url).hostname or "nowhere"


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int


class HttpReader:
    """Reads ranges over connections that it keeps. Safe to use from several threads. `trust` makes what tells good certificates."""

    def __init__(self, trust: Callable[[], ssl.SSLContext] = ssl.create_default_context):
        self._trust = trust
        self._idle: defaultdict[_Origin, list[http.client.HTTPConnection]] = defaultdict(list)
        self._busy: dict[http.client.HTTPConnection, socket.socket | None] = {}  # None until they are connected
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._stopped = False

    def read(self, location: Location, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill `buffer` with the bytes from `start` on; yields how many more there are each time.

        Raises Transient for what another attempt may not meet, Expired if that takes another address, CheckpointError if the file is
        not the one that was announced, NetworkError for the rest.
        """
        with self.get(location, f"bytes={start}-{start + len(buffer) - 1}") as (response, _):
            _check(response, location, start, start + len(buffer))
            filled = 0
            while filled < len(buffer):
                count = response.readinto(buffer[filled : filled + READ_BYTES])
                if not count:
                    raise Transient(f"{location.host} sent {filled} of {len(buffer)} bytes")
                filled += count
                yield count

    @contextmanager
    def get(self, location: Location, wanted: str | None = None) -> Iterator[tuple[http.client.HTTPResponse, str]]:
        """The answer to a request for a range or for everything, its body still to be read, and the address that it came from.

        Raises Transient and NetworkError as `read`; what its status means is left to the caller.
        """
        origin, connection, response, url = self._get(location, {} if wanted is None else {"Range": wanted})
        is_whole = False
        try:
            yield response, url
            is_whole = response.isclosed() and not response.will_close
        except (OSError, http.client.HTTPException) as error:
            raise Transient(_said(location, error)) from None
        finally:
            response.close()
            self._release(origin, connection, is_whole=is_whole)

    def stop(self) -> None:
        """Make every read that is under way fail."""
        self._stopped = True
        with self._lock:
            for sock in self._busy.values():
                if sock is not None:
                    with suppress(OSError):  # it may be closed by now
                        sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def _get(
        self, location: Location, wanted: Mapping[str, str]
    ) -> tuple[_Origin, http.client.HTTPConnection, http.client.HTTPResponse, str]:
        """The answer to a request, after redirects, and where they led."""
        url, headers, target = location.url, {**location.headers}, ""
        for _ in range(MAX_REDIRECTS):
            try:
                before, url = urlsplit(url), urljoin(url, target)
                parts = urlsplit(url)
                origin = _Origin(parts.scheme, parts.hostname or "", parts.port or PORTS[parts.scheme])
                if not origin.host.encode("idna"):  # which fails for what can be no name of a host
                    raise ValueError
            except (ValueError, KeyError):
                raise NetworkError(f"{location.host} leads to an address that is not of http or https") from None
            if parts[:2] != before[:2]:
                headers = {}
            connection, response = self._request(origin, parts, {**headers, **wanted, "Accept-Encoding": "identity"}, location)
            if response.status not in REDIRECTS:
                return origin, connection, response, url
            target = response.getheader("Location", "")
            response.close()
            self._release(origin, connection, is_whole=False)
            if not target:
                raise NetworkError(f"{location.host} redirects to nowhere")
        raise NetworkError(f"{location.host} redirects more than {MAX_REDIRECTS} times")

    def _request(
        self, origin: _Origin, parts: SplitResult, headers: Mapping[str, str], location: Location
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        while True:
            connection, is_reused = self._connection(origin)
            try:
                if connection.sock is None:
                    connection.connect()
                self._watch(connection)
                connection.request("GET", _target(parts), headers={**_proxy_headers(origin), **headers})
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self._release(origin, connection, is_whole=False)
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise NetworkError(f"{origin.host} has a certificate that is not trusted: {error.verify_message}") from None
                if not is_reused:  # one that was kept may just have been closed by the other side
                    raise Transient(_said(location, error)) from None

    def _connection(self, origin: _Origin) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._stopped:
                raise NetworkError(f"{origin.host}: stopped")
            is_reused = bool(self._idle[origin])
            connection = self._idle[origin].pop() if is_reused else self._new_connection(origin)
            self._busy[connection] = None
        return connection, is_reused

    def _watch(self, connection: http.client.HTTPConnection) -> None:
        """Let `stop` end what waits for this connection, also after it has given its socket to an answer."""
        with self._lock:
            if self._stopped:
                raise ConnectionAbortedError("stopped")
            self._busy[connection] = connection.sock

    def _new_connection(self, origin: _Origin) -> http.client.HTTPConnection:
        proxy = _proxy(origin)
        host, port = (origin.host, origin.port) if proxy is None else (str(proxy.hostname), proxy.port or PORTS["http"])
        if origin.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=STALL_SECONDS)
        if self._context is None:
            self._context = self._trust()
        connection = http.client.HTTPSConnection(host, port, timeout=STALL_SECONDS, context=self._context)
        if proxy is not None:
            connection.set_tunnel(origin.host, origin.port, headers=_proxy_authorization(proxy))
        return connection

    def _release(self, origin: _Origin, connection: http.client.HTTPConnection, *, is_whole: bool) -> None:
        with self._lock:
            self._busy.pop(connection, None)
            if is_whole and not self._stopped:
                self._idle[origin].append(connection)
            else:
                connection.close()


def _check(response: http.client.HTTPResponse, location: Location, start: int, end: int) -> None:
    """Raise unless the answer has exactly these bytes of that file."""
    status, host = response.status, location.host
    if status in BUSY:
        raise Transient(f"{host} answers {status} {response.reason}", after=seconds_to_wait(response.getheader("Retry-After")))
    if status in {401, 403}:
        raise Expired(f"{host} answers {status} {response.reason}")
    if status == 416:
        raise CheckpointError(f"it has no byte {start} on {host}, but {location.total_bytes} bytes when it was listed: the source changed")
    if status not in {200, 206}:
        raise NetworkError(f"{host} answers {status} {response.reason}")
    content_range = response.getheader("Content-Range", "").removeprefix("bytes ")
    found, _, total = content_range.partition("/")
    if status == 200:
        found, total = "whole", response.getheader("Content-Length", "*")
    if total not in {"*", str(location.total_bytes)}:
        raise CheckpointError(f"it has {total} bytes on {host}, and had {location.total_bytes} when it was listed: the source changed")
    if found != f"{start}-{end - 1}" and not (status == 200 and (start, end) == (0, location.total_bytes)):
        raise NetworkError(f"{host} does not answer with the range of bytes that it was asked for; --cache downloads whole files")
    etag = response.getheader("ETag")
    if location.etag is not None and etag != location.etag:
        raise CheckpointError(f"its ETag on {host} changed while it was read: the source changed")
    location.etag = etag


def _said(location: Location, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"{location.host} sent nothing for {STALL_SECONDS:.0f} s"
    return f"{location.host}: {error or type(error).__name__}"


# --- proxies, by the usual variables of the environment --------------------------------------------------------------


def _proxy(origin: _Origin) -> SplitResult | None:
    proxy = urllib.request.getproxies().get(origin.scheme)
    if not proxy or urllib.request.proxy_bypass(origin.host):
        return None
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return {"Proxy-Authorization": f"Basic {b64encode(credentials).decode()}"}


def _proxy_headers(origin: _Origin) -> dict[str, str]:
    """What a proxy wants with each request; through a tunnel it sees none."""
    proxy = _proxy(origin)
    return {} if proxy is None or origin.scheme == "https" else _proxy_authorization(proxy)


def _target(parts: SplitResult) -> str:
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    is_proxied = parts.scheme == "http" and _proxy(_Origin("http", str(parts.hostname), 0)) is not None
    return f"http://{parts.netloc}{path}" if is_proxied else path
