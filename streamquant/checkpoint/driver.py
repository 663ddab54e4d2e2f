"""A folder in whatever fsspec has a driver for: s3, gs, az, sftp, memory ... with the settings that fsspec and the driver take.

Drivers raise what they like; `_as_ours` decides what of that is final. It shows nothing of their messages, which may have signed URLs or
keys in them, but types, statuses and the codes of S3.
"""

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

import fsspec  # type: ignore[import-untyped]
from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

from streamquant.checkpoint.http import BUSY
from streamquant.checkpoint.layout import SUFFIX
from streamquant.checkpoint.limits import MAX_FILES
from streamquant.checkpoint.retry import Transient
from streamquant.checkpoint.source import SKIPPED
from streamquant.checkpoint.url import CHANGED, NUM_CONNECTIONS, Found, without_secrets
from streamquant.errors import CheckpointError, NetworkError, RequestError, StreamquantError

READ_BYTES = 2 << 20  # by one `cat_file`, which has them in memory a second time, or a third
CHUNK_BYTES = 256 << 10
S3, GS = {"s3", "s3a"}, {"gs", "gcs"}
EXTRAS = dict.fromkeys(S3, "s3") | dict.fromkeys(GS, "gs")
WAYS_IN = {
    "s3": "; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "; log in with `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon for a public bucket",
}
# What drivers say of a file that changes with it, the surest first. (The etag of gs changes with mere metadata.)
STAMPS = ("generation", "ETag", "etag", "md5Hash", "sha", "mtime", "LastModified", "last_modified", "modify", "modificationTime", "created")

NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
NO_CREDENTIALS = re.compile(r".*Credential.*|.*SSO.*|ProfileNotFound|RefreshError")  # classes of botocore and google.auth
EXPIRED, BUSY_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}, {"SlowDown", "RequestTimeout"}  # codes of S3
UNTRUSTED = {"SSLCertVerificationError", "ClientConnectorCertificateError"}
# Of botocore's errors, those of the network; the others say that a request could not even be made.
BOTO, BOTO_NETWORK = "BotoCoreError", {"HTTPClientError", "ConnectionError", "IncompleteReadError", "ResponseParserError"}
FINAL = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
T = TypeVar("T")


class DriverFolder:
    """What is below a URL, listed and read by its driver."""

    def __init__(self, url: str):
        self.name = without_secrets(url)
        self._scheme = url.partition("://")[0]
        self._fs, path = _open(url, self.name, self._scheme)
        above, _, last = path.rpartition("/")
        self.file = last if last.endswith(SUFFIX) else ""
        self._root = above if self.file else path
        if self._scheme in EXTRAS and not self._root:
            raise RequestError(f"{self.name} names no bucket; write {self._scheme}://bucket/folder")
        self._is_async = isinstance(self._fs, AsyncFileSystem) and self._fs.async_impl
        self.num_connections = NUM_CONNECTIONS if self._is_async else 1
        self._one_at_a_time = threading.Lock()  # for drivers that say nothing of threads
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._is_stopped = False

    def list(self) -> dict[str, Found | None]:
        """Every file. By `ls`, as the `find` of most drivers passes over folders that it fails to list."""
        self._fs.invalidate_cache()
        files: dict[str, Found | None] = {}
        folders = [""]
        for folder in folders:
            path = self._path(folder)
            if len(files) > MAX_FILES:
                raise CheckpointError(f"{self.name} holds more than {MAX_FILES} files; give the folder that holds the checkpoint")
            try:
                entries = self._call(self._fs.ls, path, detail=True)
            except NOT_THERE:
                raise CheckpointError(f"there is no {self._name(folder)}") from None
            for entry in entries:
                name = _below(path, entry["name"])
                is_folder = entry["type"] == "directory"
                if not name:
                    self._look_at_itself(folder, entry, is_folder=is_folder)
                elif not is_folder:
                    files[folder + name] = None if entry["type"] == "link" else _found(entry)
                elif name not in SKIPPED:
                    folders.append(f"{folder}{name}/")
        for folder in folders:
            marker = files.get(folder.rstrip("/"))
            if marker is not None and marker.num_bytes == 0:  # an object of the same name that only stands for the folder
                del files[folder.rstrip("/")]
        if not files:
            raise CheckpointError(f"there is nothing at {self.name}")
        return files

    def look(self, file: str) -> Found | None:
        """What the driver says of one file."""
        self._fs.invalidate_cache()
        try:
            entry = self._call(self._fs.info, self._path(file))
        except NOT_THERE:
            return None
        if entry["type"] == "directory":
            raise CheckpointError(f"{self._name(file)} is a folder, or a link to one")
        return _found(entry)

    def read(self, file: str, found: Found, start: int, buffer: memoryview) -> Iterator[int]:
        """Fill `buffer` with the bytes from `start` on; yields how many more there are each time."""
        try:
            if self._scheme in S3:
                self._call(self._run, self._fill_from_s3(self._path(file), found, start, buffer))
                yield len(buffer)
                return
            for first in range(0, len(buffer), READ_BYTES):
                piece = buffer[first : first + READ_BYTES]
                content = self._cat(self._path(file), found, start + first, start + first + len(piece))
                if len(content) < len(piece):
                    self._require_size(file, found)
                    raise Transient(f"{self._scheme}: {len(content)} of {len(piece)} bytes came")
                if len(content) > len(piece):
                    raise NetworkError(f"the driver for {self._scheme}:// does not read ranges of bytes")
                piece[:] = content
                yield len(piece)
        except NOT_THERE:
            raise CheckpointError(f"it is no longer there: {CHANGED}") from None

    def stop(self) -> None:
        """Make every read that is under way fail, if the driver can."""
        with self._lock:
            self._is_stopped = True
            for future in self._running:
                future.cancel()

    def close(self) -> None:
        """Close the connections. (Drivers do so when they are collected, which may be never.)"""
        session, client = getattr(self._fs, "_session", None), getattr(self._fs, "_s3creator", None)
        for closing in (session and session.close(), client and client.__aexit__(None, None, None)):
            if asyncio.iscoroutine(closing):
                asyncio.run_coroutine_threadsafe(closing, self._fs.loop).result()

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._root, name.rstrip("/")) if part)

    def _name(self, folder: str) -> str:
        return f"{self.name}/{folder}".rstrip("/")

    def _look_at_itself(self, folder: str, entry: Mapping[str, Any], *, is_folder: bool) -> None:
        """Drivers may list a folder in itself, as an object that stands for it or otherwise."""
        if self._scheme in S3 and is_folder:
            raise CheckpointError(f"{self.name} has keys with two slashes in a row, which are no names of files; give them others")
        if not is_folder and not entry["name"].endswith("/"):
            what = "a folder at the same time" if folder else f"not a {SUFFIX} file"
            raise CheckpointError(f"{self._name(folder)} is a file, and {what}")

    def _require_size(self, file: str, found: Found) -> None:
        now = self.look(file)
        if now is None or now.num_bytes != found.num_bytes:
            has = "is no longer there" if now is None else f"has {now.num_bytes} bytes"
            raise CheckpointError(f"it {has}, and had {found.num_bytes} bytes when it was listed: {CHANGED}")

    # --- calling a driver --------------------------------------------------------------------------------------------

    def _cat(self, path: str, found: Found, start: int, end: int) -> bytes:
        content: bytes
        if self._is_async:
            version = {"generation": found.stamp} if self._scheme in GS and found.stamp.isdecimal() else {}
            content = self._call(self._run, self._fs._cat_file(path, start=start, end=end, **version))
        else:
            with self._one_at_a_time:
                content = self._call(self._fs.cat_file, path, start=start, end=end)
        return content

    async def _fill_from_s3(self, path: str, found: Found, start: int, buffer: memoryview) -> None:
        """What `cat_file` does, but straight into the caller's memory, and looking at the ETag."""
        bucket, key, version = self._fs.split_path(path)
        options = self._fs.req_kw | ({"VersionId": version} if version else {})
        wanted = f"{start}-{start + len(buffer) - 1}"
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={wanted}", **options)
        body = answer["Body"]
        try:
            if str(answer.get("ETag")).strip('"') != found.stamp.strip('"'):
                raise CheckpointError(f"its ETag is another than when it was listed: {CHANGED}")
            if answer.get("ContentRange") != f"bytes {wanted}/{found.num_bytes}":
                raise NetworkError(f"{self._scheme} does not answer with the range of bytes that it was asked for")
            filled = 0
            while filled < len(buffer):
                chunk = await body.read(min(CHUNK_BYTES, len(buffer) - filled))
                if not chunk:
                    raise Transient(f"{self._scheme}: {filled} of {len(buffer)} bytes came")
                buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        finally:
            body.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns, unless `stop` comes first."""
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop)
            self._running.add(future)
            if self._is_stopped:
                future.cancel()
        try:
            return future.result()
        except CancelledError:
            raise NetworkError("stopped") from None
        finally:
            with self._lock:
                self._running.discard(future)

    def _call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """What a function of the driver returns, with errors as ours; that there is no such file is left to the caller."""
        try:
            return function(*args, **options)
        except (StreamquantError, Transient, MemoryError, *NOT_THERE):
            raise
        except Exception as error:  # noqa: BLE001, see above
            raise self._as_ours(error) from None

    def _as_ours(self, error: Exception) -> StreamquantError | Transient:
        """What an error means: a StreamquantError for what is final, Transient for the rest."""
        said, way_in = _said(self._scheme, error), WAYS_IN.get(EXTRAS.get(self._scheme, ""), "")
        kinds = {kind for cause in _causes(error) for kind in _kinds(cause)}
        status, code = _answer(error)
        if code in EXPIRED:
            return NetworkError(f"{said}: the credentials have expired; renew them, and the same command goes on")
        if any(map(NO_CREDENTIALS.fullmatch, kinds)):
            return RequestError(f"{said}: there are no credentials{way_in}")
        if status in {401, 403} or isinstance(error, PermissionError) or str(error).startswith("Forbidden: "):  # the last of gcsfs
            return CheckpointError(f"{said}: {self.name} may not be read{way_in}")
        if status in {412, 416}:
            return CheckpointError(f"{said}: {CHANGED}")
        if status is not None:
            return Transient(said) if status in BUSY or code in BUSY_CODES else NetworkError(said)
        if BOTO in kinds and not kinds & BOTO_NETWORK:
            return RequestError(f"{said}: the driver cannot ask for {self.name}")
        if isinstance(error, FINAL) or kinds & UNTRUSTED:
            return NetworkError(said)
        return Transient(said)


def _open(url: str, name: str, scheme: str) -> tuple[Any, str]:
    """The driver, and what it calls the URL."""
    if scheme in GS:  # its errors would come to the terminal with tracebacks and all
        logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    try:
        driver, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError:
        said = known_implementations.get(scheme, {}).get("err", "install what it names")
        way_out = f"pip install 'streamquant[{EXTRAS[scheme]}]'" if scheme in EXTRAS else said
        raise RequestError(f"the driver for {scheme}:// is not installed: {way_out}") from None
    except Exception as error:  # noqa: BLE001, whatever a driver makes of the URL
        if scheme not in fsspec.available_protocols():
            raise RequestError(f"{scheme}:// is not known; there are hf, http, https, s3, gs, and what fsspec has drivers for") from None
        raise RequestError(f"{name} cannot be opened: {_said(scheme, error)}") from None
    if scheme in S3:  # how often to try is decided in retry.py
        driver.retries = 1
        driver.config_kwargs.setdefault("retries", {"total_max_attempts": 1})
    return driver, path.rstrip("/")


def _found(entry: Mapping[str, Any]) -> Found:
    if not isinstance(entry.get("size"), int):
        raise CheckpointError(f"{entry['name']}: the driver does not tell its size")
    return Found(entry["size"], next((str(entry[key]) for key in STAMPS if entry.get(key)), ""))


def _below(path: str, name: str) -> str:
    """The part of a name in a folder's listing that is below the folder. Some drivers begin names with a slash, some do not."""
    path, name = path.strip("/"), name.strip("/")
    return "" if name == path else name.removeprefix(f"{path}/")


def _said(scheme: str, error: Exception) -> str:
    status, code = _answer(error)
    return f"{scheme}: {type(error).__name__}" if status is None else f"{scheme} answers {status} {code}".strip()


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _kinds(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _answer(error: Exception) -> tuple[int | None, str]:
    """The status of the answer that an error stands for, if it does, and the code of S3. Libraries keep them in places of their own."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            return status, code if re.fullmatch(r"[A-Za-z]\w{0,63}", code) else ""
        if BOTO in _kinds(cause):  # no answer, although what it stems from may have a status: aiohttp gives one to what it cannot parse
            return None, ""
        places = [(cause, "status"), (cause, "status_code"), (response, "status_code")]  # aiohttp, azure, requests
        if type(cause).__name__ == "HttpError":
            places.append((cause, "code"))  # gcsfs
        for owner, name in places:
            if str(status := getattr(owner, name, None)).isdecimal():
                return int(str(status)), ""
    return None, ""
