"""Web servers on loopback that fail when they are asked to: one that serves a folder, and one that passes everything on to another server.

`FileServer` lists folders as Apache does, knows ranges and ETags, and wants a password or a signature if it is given one. `Relay` stands
before an object store. Both count in `requests`, and `fail` says what fails. Standard library only.
"""

import base64
import contextlib
import functools
import hashlib
import html
import http.client
import re
import socket
import struct
import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote, unquote, urlsplit

FAULTS = {
    "429": "429 with Retry-After",
    "500": "500",
    "503": "503",
    "reset": "half of the body, then a TCP reset",
    "truncate": "half of the body, then the end of the connection",
    "norange": "the whole file, whatever Range asks for",
    "etag": "another ETag",
    "403": "403",
}


class Request(NamedTuple):
    """A request, and how it was answered."""

    path: str  # without the query
    range: str | None
    status: int
    num_bytes: int  # of the body, had it not been cut


class Answer(NamedTuple):
    """What to send."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Server:
    """Answers from its start until `close`, on a free port of this machine."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._faults: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.daemon_threads = True
        self._accepting = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._accepting.start()
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections."""
        self._server.shutdown()
        self._accepting.join()
        self._server.server_close()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, pattern: str, kind: str, *, times: int = 1) -> None:
        """Give this fault to the next `times` requests whose path matches the glob `pattern`."""
        assert kind in FAULTS
        self._faults += [(pattern, kind)] * times

    def answer(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> Answer:
        raise NotImplementedError

    def answered(self, method: str, target: str, headers: Mapping[str, str]) -> tuple[Answer, str | None]:
        """The answer to a request, which is noted, and where to cut it."""
        path, _, query = target.partition("?")
        path = unquote(path)
        with self._lock:
            found = next((fault for fault in self._faults if fnmatchcase(path, fault[0])), None)
            if found is not None:
                self._faults.remove(found)
        kind = found[1] if found else None
        asked = {name: value for name, value in headers.items() if not (kind == "norange" and name == "Range")}
        answer = self.answer(method, path, query, asked)
        if kind is not None and kind.isdecimal():
            answer = Answer(int(kind), {"Retry-After": "0"}, b"")
        if kind == "etag":
            answer = answer._replace(headers={**answer.headers, "ETag": '"another"'})
        with self._lock:
            self.requests.append(Request(path, headers.get("Range"), answer.status, len(answer.body)))
        return answer, kind if kind in {"reset", "truncate"} else None

    def track(self, connection: socket.socket) -> None:
        """Close this one too."""
        self._connections.add(connection)


class FileServer(Server):
    """Serves a folder."""

    def __init__(self, folder: Path, *, password: str = "", signature: str = "", etags: bool = True, ranges: bool = True):
        self.folder, self.password, self.signature = folder, password, signature
        self.etags, self.ranges = etags, ranges
        super().__init__()

    def answer(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> Answer:
        del method
        expected = "Basic " + base64.b64encode(f"user:{self.password}".encode()).decode()
        if (self.password and headers.get("Authorization") != expected) or (self.signature and query != f"signature={self.signature}"):
            return Answer(403, {}, f"no {query}".encode())
        file = self.folder / path.strip("/")
        if file.is_dir():
            if not path.endswith("/"):
                return Answer(301, {"Location": f"{quote(path)}/?{query}"}, b"")
            return Answer(200, {"Content-Type": "text/html;charset=UTF-8"}, self._index(file).encode())
        if not file.is_file():
            return Answer(404, {}, b"no such file")
        content = file.read_bytes()
        sent = {"Last-Modified": f"at {file.stat().st_mtime_ns}"}
        if self.etags:
            sent["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if asked is None or not self.ranges:
            return Answer(200, sent, content)
        start, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        if start >= end:
            return Answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
        return Answer(206, {**sent, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}, content[start:end])

    def _index(self, folder: Path) -> str:
        """As Apache's, with links that are none to files."""
        links = ["?C=N;O=D", "?C=M;O=A", "/", "../", "https://httpd.apache.org/", "mailto:me@example.org", "#top"]
        links += [quote(path.name) + ("/" if path.is_dir() else "") for path in sorted(folder.iterdir())]
        rows = "\n".join(f'<tr><td><A class="x" HREF="{html.escape(link)}">{html.escape(link)[:23]}..&gt;</A></td></tr>' for link in links)
        return f"<!DOCTYPE html>\n<html><head><link href='style.css'></head><body><h1>Index</h1><table>\n{rows}</table></body></html>"


class Relay(Server):
    """Passes every request on to another server."""

    def __init__(self, url: str):
        self._target = urlsplit(url).netloc
        super().__init__()

    def answer(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection(self._target)
        try:
            connection.request(method, f"{quote(path)}?{query}", headers=dict(headers))
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        skipped = {"connection", "transfer-encoding", "server", "date"} | ({"content-length"} if body else set())
        return Answer(response.status, {name: value for name, value in response.getheaders() if name.lower() not in skipped}, body)


class _Handler(BaseHTTPRequestHandler):
    """Requests from one client, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, server: Server, *args: Any):
        self._owner = server
        super().__init__(*args)

    def do_GET(self) -> None:
        self._owner.track(self.connection)
        answer, cut = self._owner.answered(self.command, self.path, self.headers)  # type: ignore[arg-type]
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        if cut is not None:
            self.close_connection = True
        if cut == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    do_HEAD = do_GET

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may leave in the middle
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
