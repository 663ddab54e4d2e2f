"""A Hugging Face Hub on this machine: it serves a folder to the real client, and fails when it is asked to.

    python -m tests.fakehub FOLDER --port 8080
    export HF_ENDPOINT=http://127.0.0.1:8080      in another shell; then e.g. `hf download org/name`

FOLDER holds one folder per repository, `org/name/`, or `name/` where files lie directly in it. Folders and files may be symlinks; hidden
folders are left out. Each repository is a model whose branch `main` is what lies there now: a changed file makes a new commit, and the old
one is gone. Files are hashed on their first use, and again when they change.

As on the real Hub, small files come from the Hub itself, after a redirect within it; *.safetensors and whatever exceeds 10 MiB come from
another host, the CDN, by a signed URL that expires. A token gates files, but not listings; a private Hub hides both. Not here: writing,
Xet, datasets and spaces, branches and tags.

Tests start it as `with FakeHub(folder) as hub:`, say what fails by `hub.fail`, and count in `hub.requests`. Standard library only.
"""

import argparse
import contextlib
import functools
import hashlib
import hmac
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints
from urllib.parse import parse_qs, quote, unquote, urlencode

RANDOM_FAULTS = {
    "429": "429 with Retry-After",
    "500": "500",
    "503": "503",
    "reset": "half of the body, then a TCP reset",
    "truncate": "half of the body, then the end of the connection",
    "stall": "half of the body, silence, then the rest",
    "expire": "403 of the CDN, for a URL that is still good",
}
SCRIPTED_FAULTS = {
    "norange": "200 of the CDN with the whole file, whatever Range asks for",
    "length": "a Content-Range of the CDN with another total",
    "etag": "another ETag",
    "missing": "404 for a file that is listed",
}
CDN_FAULTS = ("expire", "norange", "length")

LARGE_BYTES = 10 << 20  # the real Hub takes larger files only in Git LFS
SEND_BYTES = 1 << 20

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)??)"
_HUB_ROUTES = (
    re.compile(rf"/api/models/{_REPO}(?:/(?P<verb>revision|tree|paths-info|refs|auth-check)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"),
    re.compile(rf"/api/(?P<verb>resolve-cache)/models/{_REPO}/(?P<revision>[0-9a-f]{{40}})/(?P<path>.+)"),
    re.compile(rf"/{_REPO}/(?P<verb>resolve)/(?P<revision>[^/]+)/(?P<path>.+)"),
)
_CDN_ROUTE = re.compile(r"/(?P<repo>.+?)/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)")

Host = Literal["hub", "cdn"]


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and in the log how it was answered. A reset or truncated answer without a body is not sent at all, nor is its `status`."""

    method: str
    host: Host
    path: str  # without the query
    query: Mapping[str, list[str]]  # with the fields of a form
    range: str | None
    authorization: str | None
    status: int = 0
    fault: str | None = None

    def get(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def asks(self, name: str) -> bool:
        return self.get(name).lower() in ("1", "true")


@dataclass(frozen=True, slots=True)
class Reply:
    """What to send: the bytes from `start` to `end` of `body`, or of the file that it names. `cut` is a fault that comes halfway."""

    status: int
    headers: Mapping[str, str]
    body: bytes | Path
    start: int
    end: int
    cut: str | None = None


@dataclass(frozen=True, slots=True)
class File:
    """A file of a repository. `blob_id` is the SHA-1 of what git has: the file, or the pointer to a large one, which has a `sha256`."""

    path: Path
    size: int
    modified: float
    blob_id: str
    sha256: str | None
    pointer_size: int


@dataclass(frozen=True, slots=True)
class _Script:
    """A fault for one request to come, as `FakeHub.fail` has it."""

    pattern: str
    kind: str
    host: Host | None
    method: str | None

    def matches(self, request: Request) -> bool:
        here = self.host in (None, request.host) and self.method in (None, request.method)
        return here and fnmatchcase(request.path, self.pattern)


@dataclass(eq=False)
class FakeHub:
    """The Hub and its CDN, which serve from the start until `close`.

    A share of `faults` of all requests fails, each in one of `kinds`. Which ones depends on `seed` and on how often that method, path and
    range was asked for before, not on the order of threads. `endpoint` is the HF_ENDPOINT, `requests` the log of both hosts, `bytes_sent`
    the sum of all bodies.
    """

    folder: str | Path
    _: KW_ONLY
    port: Annotated[int, "port of the Hub, 0 for a free one"] = 0
    cdn_port: Annotated[int, "port of the CDN, 0 for a free one"] = 0
    token: Annotated[str, "token without which files are gated, if any"] = ""
    private: Annotated[bool, "hide all without the token"] = False
    faults: Annotated[float, "share of requests that fail"] = 0.0
    kinds: tuple[str, ...] = tuple(RANDOM_FAULTS)
    seed: Annotated[int, "which requests fail"] = 0
    retry_after: Annotated[int, "seconds in Retry-After of a 429"] = 0
    stall_seconds: Annotated[float, "seconds of silence in a stall"] = 10.0
    url_seconds: Annotated[float, "seconds until a URL of the CDN expires"] = 3600.0
    url_requests: Annotated[float, "requests until a URL of the CDN expires"] = math.inf
    page_entries: Annotated[int, "files and folders on a page of a listing"] = 1000
    latency: Annotated[float, "seconds before every answer"] = 0.0
    bandwidth: Annotated[float, "bytes per second of a connection"] = math.inf

    def __post_init__(self) -> None:
        _check_kinds(self.kinds, RANDOM_FAULTS)
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.closing = threading.Event()
        self._scripts: list[_Script] = []
        self._times_asked: Counter[tuple[str | None, ...]] = Counter()
        self._url_serials = itertools.count()
        self._url_requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._hash_lock = threading.Lock()  # one thread hashes, the others wait for what it finds
        with contextlib.ExitStack() as servers:
            hub = servers.enter_context(_Server(self, "hub", self.port))
            cdn = servers.enter_context(_Server(self, "cdn", self.cdn_port))
            self._servers = servers.pop_all()
        self.endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
        self.cdn = f"http://localhost:{cdn.server_address[1]}"  # the client tells hosts apart by name, not by port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End all connections, also in the middle of an answer."""
        self._servers.close()

    def fail(self, pattern: str, kind: str, *, times: int = 1, host: Host | None = None, method: str | None = None) -> None:
        """Give this fault to the next `times` requests whose path matches the glob `pattern`."""
        _check_kinds([kind], RANDOM_FAULTS | SCRIPTED_FAULTS)
        script = _Script(pattern, kind, "cdn" if kind in CDN_FAULTS else host, method)
        with self._lock:
            self._scripts += [script] * times

    @property
    def leaked_tokens(self) -> list[str]:
        """The Authorization headers that reached the CDN."""
        return [request.authorization for request in self.requests if request.host == "cdn" and request.authorization]

    def count_sent(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_sent += num_bytes

    # --- the folder --------------------------------------------------------------------------------------------------

    def repositories(self) -> list[str]:
        """The ids of all repositories: `name` where files lie directly in it, else `org/name`."""
        ids = []
        for folder in _folders(Path(self.folder)):
            alone = any(path.is_file() for path in folder.iterdir())
            ids += [folder.name] if alone else [f"{folder.name}/{path.name}" for path in _folders(folder)]
        return ids

    def files(self, repo: str) -> dict[str, File]:
        """The files of a repository, by name."""
        root, paths = Path(self.folder, repo), []
        for folder, subfolders, names in os.walk(root, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths += [Path(folder, name) for name in names]
        return {path.relative_to(root).as_posix(): self._file(path) for path in sorted(paths)}

    def commit(self, repo: str) -> str:
        """The commit that `main` is."""
        return _commit(self.files(repo))

    def _file(self, path: Path) -> File:
        stat = path.stat()
        with self._hash_lock:
            return _hashed(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Reply:
        """The answer to a request, which is written to the log."""
        fault = self._next_fault(request)
        served = replace(request, range=None) if fault == "norange" else request
        reply = self._with_fault(self._answer_hub(served) if request.host == "hub" else self._answer_cdn(served), fault)
        with self._lock:
            self.requests.append(replace(request, status=reply.status, fault=fault))
        return reply

    def _answer_hub(self, request: Request) -> Reply:
        route = next(filter(None, (route.fullmatch(request.path) for route in _HUB_ROUTES)), None)
        if route is None:
            return _error(404, "There is no such page")
        repo, verb = unquote(route["repo"]), route["verb"]
        revision, path = unquote(route["revision"] or "main"), unquote(route["path"] or "")
        stranger = self.token and request.authorization != f"Bearer {self.token}"
        if repo not in self.repositories() or (self.private and stranger):
            return _error(401, "Repository not found", "RepoNotFound")
        if stranger and verb in ("resolve", "resolve-cache", "auth-check"):
            return _error(403 if request.authorization else 401, f"Access to model {repo} is restricted", "GatedRepo")
        files = self.files(repo)
        commit = _commit(files)
        if revision not in ("main", commit):
            return _error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

        match verb:
            case "resolve" | "resolve-cache":
                return self._resolve(request, repo, commit, path, files.get(path))
            case "tree":
                return self._tree(request, _entries(files, commit, expand=request.asks("expand")), folder=path)
            case "paths-info":
                entries = _entries(files, commit, expand=request.asks("expand"))
                return _json([entries[name] for name in request.query.get("paths", ()) if name in entries])
            case "refs":
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
                return _json({"branches": [main], "converts": [], "tags": [], "pullRequests": []})
        siblings = [_sibling(name, file, blobs=request.asks("blobs")) for name, file in files.items()]
        access = {"private": self.private, "gated": "auto" if self.token else False}
        return _json({"id": repo, "modelId": repo, "sha": commit, "tags": [], "siblings": siblings} | access)

    def _resolve(self, request: Request, repo: str, commit: str, name: str, file: File | None) -> Reply:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file is None:
            return _error(404, "Entry not found", "EntryNotFound", headers)
        if file.sha256 is not None:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
            return _redirect(302, self._signed_url(f"/{quote(repo)}/{file.sha256}/{quote(name)}"), headers)
        cached = f"/api/resolve-cache/models/{quote(repo)}/{commit}/{quote(name)}"
        if request.path != cached:
            return _redirect(307, cached, headers)
        return _content(file, request.range, headers | {"ETag": f'"{file.blob_id}"'})

    def _tree(self, request: Request, entries: dict[str, dict[str, Any]], *, folder: str) -> Reply:
        if folder and entries.get(folder, {}).get("type") != "directory":
            return _error(404, f"There is no folder {folder}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        names = [name for name in entries if name.startswith(prefix)]
        if not request.asks("recursive"):
            names = [name for name in names if "/" not in name.removeprefix(prefix)]
        start = int(request.get("cursor", "0"))
        end = start + min(self.page_entries, int(request.get("limit", str(self.page_entries))))
        query = urlencode({**request.query, "cursor": end}, doseq=True)
        link = {"Link": f'<{self.endpoint}{request.path}?{query}>; rel="next"'} if end < len(names) else {}
        return _json([entries[name] for name in names[start:end]], link)

    def _answer_cdn(self, request: Request) -> Reply:
        if request.authorization is not None:
            return _error(400, "Only one auth mechanism allowed")  # as S3 says
        expires, serial, signature = request.get("Expires"), request.get("Id"), request.get("Signature")
        if not hmac.compare_digest(signature.encode(), self._signature(request.path, expires, serial).encode()):
            return _error(403, "The signature does not match")
        with self._lock:
            self._url_requests[serial] += 1
            spent = self._url_requests[serial] > self.url_requests
        if spent or time.time() >= float(expires):
            return _error(403, "Request has expired")
        route = _CDN_ROUTE.fullmatch(request.path)
        assert route, "only such paths are signed"
        path = Path(self.folder, unquote(route["repo"]), unquote(route["path"]))
        if not path.is_file() or (file := self._file(path)).sha256 != route["sha256"]:
            return _error(404, "The file is no longer the one that was signed")
        # The real CDN has an ETag of its own, which looks like the SHA-256 and is another hash.
        return _content(file, request.range, {"ETag": f'"{hashlib.sha256(file.blob_id.encode()).hexdigest()}"', "Accept-Ranges": "bytes"})

    def _signed_url(self, path: str) -> str:
        expires, serial = f"{time.time() + self.url_seconds:.3f}", str(next(self._url_serials))
        return f"{self.cdn}{path}?Expires={expires}&Id={serial}&Signature={self._signature(path, expires, serial)}"

    def _signature(self, path: str, expires: str, serial: str) -> str:
        return hmac.new(b"known to the Hub and its CDN", f"{path} {expires} {serial}".encode(), "sha256").hexdigest()

    # --- faults ------------------------------------------------------------------------------------------------------

    def _next_fault(self, request: Request) -> str | None:
        key = (request.host, request.method, request.path, request.range)
        with self._lock:
            self._times_asked[key] += 1
            for script in self._scripts:
                if script.matches(request):
                    self._scripts.remove(script)
                    return script.kind
            chance = random.Random(f"{self.seed} {key} {self._times_asked[key]}")
        kinds = [kind for kind in self.kinds if request.host == "cdn" or kind not in CDN_FAULTS]
        return chance.choice(kinds) if kinds and chance.random() < self.faults else None

    def _with_fault(self, reply: Reply, fault: str | None) -> Reply:
        headers = dict(reply.headers)
        match fault:
            case "429":
                return _error(429, "Too many requests", headers={"Retry-After": str(self.retry_after)})
            case "500" | "503":
                return _error(int(fault), "A fault, as asked for")
            case "expire":
                return _error(403, "Request has expired")
            case "missing":
                return _error(404, "Entry not found", "EntryNotFound")
            case "etag":
                return replace(reply, headers=headers | {name: f'"{0:064x}"' for name in ("ETag", "X-Linked-ETag") if name in headers})
            case "length" if "Content-Range" in headers:
                span, total = headers["Content-Range"].split("/")
                return replace(reply, headers=headers | {"Content-Range": f"{span}/{int(total) + 1}"})
            case "reset" | "truncate" | "stall":
                return replace(reply, cut=fault)
        return reply


def _check_kinds(kinds: Iterable[str], known: Mapping[str, str]) -> None:
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"no fault {kind!r} here; there are {', '.join(known)}")


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))


@functools.cache
def _hashed(path: Path, size: int, modified_ns: int, inode: int) -> File:
    """The file with its hashes; with any other argument it is another file."""
    with path.open("rb") as stream:
        if size > LARGE_BYTES or path.suffix == ".safetensors":
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            in_git = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        else:
            sha256, in_git = None, stream.read()
    blob_id = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()
    return File(path, size, modified_ns / 1e9, blob_id, sha256, len(in_git))


def _commit(files: Mapping[str, File]) -> str:
    return hashlib.sha1("".join(f"{name} {file.blob_id}\n" for name, file in files.items()).encode()).hexdigest()


def _sibling(name: str, file: File, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": name}
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}} if file.sha256 else {}
    return {"rfilename": name, "size": file.size, "blobId": file.blob_id} | lfs


def _entries(files: Mapping[str, File], commit: str, *, expand: bool) -> dict[str, dict[str, Any]]:
    """All files and folders, as listings have them, by path."""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        for folder in (parent.as_posix() for parent in Path(name).parents[:-1]):
            tree_id = hashlib.sha1(f"{commit} {folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": tree_id, "size": 0}
        entries[name] = {"type": "file", "path": name, "oid": file.blob_id, "size": file.size}
        if file.sha256:
            entries[name]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        if expand:
            date = datetime.fromtimestamp(file.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            entries[name]["lastCommit"] = {"id": commit, "title": "What lies in the folder", "date": date}
    return dict(sorted(entries.items()))


def _text(status: int, text: str, headers: Mapping[str, str]) -> Reply:
    body = text.encode()
    return Reply(status, headers, body, 0, len(body))


def _json(content: object, headers: Mapping[str, str] | None = None) -> Reply:
    return _text(200, json.dumps(content), {"Content-Type": "application/json", **(headers or {})})


def _redirect(status: int, url: str, headers: Mapping[str, str]) -> Reply:
    return _text(status, f"Redirecting to {url}", {"Location": url, **headers})


def _error(status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> Reply:
    return _text(status, message, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})})


def _content(file: File, byte_range: str | None, headers: Mapping[str, str]) -> Reply:
    """A file or one range of it; anything else that Range may ask for is ignored, as by S3."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", byte_range or "")
    if asked is None:
        return Reply(200, headers, file.path, 0, file.size)
    first, last, suffix = asked.groups()
    start = int(first) if first else max(file.size - int(suffix), 0)
    end = min(int(last) + 1, file.size) if last else file.size
    if start >= end:
        return _error(416, "The range is not in the file", headers={"Content-Range": f"bytes */{file.size}"})
    return Reply(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{file.size}"}, file.path, start, end)


class _Server(socketserver.ThreadingTCPServer):
    """One of the two hosts: a thread that accepts, and one for each connection."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, hub: FakeHub, host: Host, port: int) -> None:
        self.hub, self.host = hub, host
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Connection)
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while not self.hub.closing.is_set():  # serve_forever would look for the end only every so often
            self.handle_request()

    def __exit__(self, *exc_info: object) -> None:
        self.hub.closing.set()
        self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._accepting.join()
        for connection in tuple(self.connections):
            with contextlib.suppress(OSError):  # its client has left
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()  # waits for the threads

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave before the end of an answer
            super().handle_error(request, client_address)


class _Connection(BaseHTTPRequestHandler):
    """Requests from one client, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        fields = parse_qs(f"{query}&{form}")
        reply = hub.answer(Request(self.command, self.server.host, path, fields, self.headers["Range"], self.headers["Authorization"]))
        hub.closing.wait(hub.latency)
        end = reply.start if self.command == "HEAD" else reply.end
        middle = (reply.start + end) // 2 if reply.cut else end
        if middle > reply.start or reply.cut is None:
            self._send_head(reply)
            self._send_body(reply.body, reply.start, middle)
        if reply.cut == "stall":
            hub.closing.wait(hub.stall_seconds)
            if middle == reply.start:
                self._send_head(reply)
            self._send_body(reply.body, middle, end)
        elif reply.cut is not None:
            self.close_connection = True
            if reply.cut == "reset":
                self._reset()

    do_HEAD = do_POST = do_GET

    def _send_head(self, reply: Reply) -> None:
        self.send_response_only(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.end - reply.start))
        self.end_headers()

    def _send_body(self, body: bytes | Path, start: int, end: int) -> None:
        hub = self.server.hub
        if isinstance(body, bytes):
            hub.count_sent(end - start)
            self.wfile.write(body[start:end])
            return
        step = int(min(SEND_BYTES, max(hub.bandwidth / 50, 1)))
        began, first = time.monotonic(), start
        with body.open("rb") as stream:
            while start < end:
                wanted = min(step, end - start)
                hub.closing.wait(began + (start + wanted - first) / hub.bandwidth - time.monotonic())
                hub.count_sent(wanted)  # first, so that a client that has all finds all counted
                sent = os.sendfile(self.connection.fileno(), stream.fileno(), start, wanted)
                hub.count_sent(sent - wanted)
                if not sent:
                    raise ConnectionError(f"{body} has become shorter")
                start += sent

    def _reset(self) -> None:
        """Close at once and throw away what is not yet sent: the client reads a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds on to the socket
        self.connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fakehub",
        description=__doc__,
        epilog="faults:\n" + "\n".join(f"  {kind:10}{meaning}" for kind, meaning in RANDOM_FAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--kinds", nargs="+", choices=RANDOM_FAULTS, default=FakeHub.kinds, metavar="KIND", help="of faults (default: all)")
    for name, hint in get_type_hints(FakeHub, include_extras=True).items():
        if meaning := getattr(hint, "__metadata__", None):
            default = getattr(FakeHub, name)
            how = {"action": "store_true"} if default is False else {"type": type(default), "default": default, "metavar": "N"}
            parser.add_argument(f"--{name.replace('_', '-')}", help=f"{meaning[0]} (default: %(default)r)", **how)
    with FakeHub(**vars(parser.parse_args())) as hub:
        if not Path(hub.folder).is_dir() or not hub.repositories():
            parser.error(f"{hub.folder} has no folder org/name or name with files, which would be a repository")
        sys.stdout.write(f"export HF_ENDPOINT={hub.endpoint}\n")
        for repo in hub.repositories():  # hashes all files now, as clients wait no longer than 10 seconds
            sys.stdout.write(f"{repo} is at {hub.commit(repo)}\n")
            sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
