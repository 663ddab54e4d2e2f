"""What sources at URLs have in common: shown with memory://, which needs no driver, and with drivers that fail."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import streamquant
from streamquant.checkpoint import driver, retry
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.local import LocalSource
from streamquant.checkpoint.open_source import open_source
from streamquant.checkpoint.url import UrlSource, without_secrets
from streamquant.errors import CheckpointError, NetworkError, RequestError, StreamquantError
from tests.checkpoints import WIKI_LLAMA, require_same_output

SECRET = "wJalrXUtnFEMI"
SHARD = "model-00002-of-00006.safetensors"


@pytest.fixture(autouse=True)
def waits_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retry, "MAX_WAIT_SECONDS", 0.002)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """The files of memory://."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def stored(memory: MemoryFileSystem) -> str:
    """The example model, with a folder."""
    for path in WIKI_LLAMA.iterdir():
        memory.pipe_file(f"/models/wiki/{path.name}", path.read_bytes())
    return "memory://models/wiki"


def refusal(kind: type[StreamquantError], source: str, **options: Any) -> str:
    """The message with which a source is refused."""
    with pytest.raises(kind) as caught, open_source(source, **options) as opened:
        read_checkpoint(opened)
    assert SECRET not in str(caught.value)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_a_url_gives_the_bytes_of_the_folder(stored: str, wiki_llama_in: Callable[[str], Path], tmp_path: Path, scheme: str) -> None:
    streamquant.convert(stored + "/", tmp_path / "out", scheme=scheme)
    require_same_output(tmp_path / "out", wiki_llama_in(scheme))
    assert not streamquant.verify(tmp_path / "out", against=stored).problems


def test_a_file_is_read_with_the_config_beside_it(stored: str, tmp_path: Path) -> None:
    streamquant.convert(f"{stored}/{SHARD}", tmp_path / "url", scheme="W4A16")
    streamquant.convert(WIKI_LLAMA / SHARD, tmp_path / "local", scheme="W4A16")
    require_same_output(tmp_path / "url", tmp_path / "local")


def test_a_run_that_was_stopped_goes_on(
    stored: str, memory: MemoryFileSystem, wiki_llama_in: Callable[[str], Path], tmp_path: Path
) -> None:
    def stop(progress: streamquant.Progress) -> None:
        if progress.done_bytes > 5_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamquant.convert(stored, tmp_path / "out", scheme="W4A16", on_progress=stop)
    streamquant.convert(stored, tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


def test_empty_folders_and_those_of_tools_are_left_out(stored: str, memory: MemoryFileSystem) -> None:
    memory.mkdir("/models/wiki/void")
    for name in ("sub/deep/a.txt", "sub/.git/config", ".cache/huggingface/x.metadata", "empty.txt"):
        memory.pipe_file(f"/models/wiki/{name}", b"" if name == "empty.txt" else b"x")
    with open_source(stored) as source:
        assert set(source.sizes()) - {path.name for path in WIKI_LLAMA.iterdir()} == {"empty.txt", "sub/deep/a.txt"}


def test_a_file_that_is_a_folder_is_refused(stored: str, memory: MemoryFileSystem) -> None:
    memory.pipe_file("/models/wiki/sub/a.txt", b"x")
    memory.store["/models/wiki/sub"] = memory.store["/models/wiki/sub/a.txt"]
    assert refusal(CheckpointError, stored) == f"{stored}/sub is a file, and a folder at the same time"


def test_a_file_url_is_a_folder_on_disk(tmp_path: Path) -> None:
    with open_source(f"file://{WIKI_LLAMA}") as source:
        assert isinstance(source, LocalSource)
    with pytest.raises(RequestError, match="is inside SOURCE"):
        streamquant.convert(f"file://{WIKI_LLAMA}", WIKI_LLAMA / "out", scheme="W4A16")


def test_sizes_and_stamps_are_those_of_now(stored: str, memory: MemoryFileSystem) -> None:
    with open_source(stored) as source:
        assert source.sizes()["config.json"] == (WIKI_LLAMA / "config.json").stat().st_size
        before = source.stamp("config.json")
        memory.pipe_file("/models/wiki/config.json", b"{}")
        assert source.sizes()["config.json"] == 2
        assert source.stamp("config.json") not in ("", before)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused_by_its_name(stored: str, memory: MemoryFileSystem) -> None:
    assert refusal(CheckpointError, "memory://models/none") == "there is no memory://models/none"
    assert refusal(CheckpointError, f"{stored}/none.safetensors") == f"there is no {stored}/none.safetensors"
    assert refusal(CheckpointError, f"{stored}/config.json") == f"{stored}/config.json is a file, and not a .safetensors file"
    memory.mkdir("/void")
    assert refusal(CheckpointError, "memory://void") == "there is nothing at memory://void"


@pytest.mark.parametrize("options", [{"revision": "main"}, {"cache": True}])
@pytest.mark.parametrize("url", ["memory://models/wiki", f"https://user:{SECRET}@host/wiki?signature={SECRET}", "file:///tmp"])
def test_options_of_the_hub_are_refused(url: str, options: dict[str, Any]) -> None:
    assert "is no model on the Hub, which is what --revision and --cache are for" in refusal(RequestError, url, **options)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")])
def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    said = refusal(RequestError, f"{scheme}://bucket/model?key={SECRET}")
    assert said == f"the driver for {scheme}:// is not installed: pip install 'streamquant[{extra}]'"


def test_a_driver_that_is_no_extra_of_ours_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    assert "Install adlfs to access Azure" in refusal(RequestError, f"az://container/model?sig={SECRET}")


def test_a_scheme_that_nobody_knows_is_refused() -> None:
    assert refusal(RequestError, f"s4://bucket/{SECRET}").startswith("s4:// is not known; there are hf, http, https, s3, gs")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://user:pass@host:8080/a/b.safetensors?X-Amz-Signature=1#x", "https://host:8080/a/b.safetensors"),
        ("s3://bucket/folder/", "s3://bucket/folder"),
        ("sftp://me@host/~/a@b", "sftp://host/~/a@b"),
        ("https://host?token=a/b@c", "https://host"),
        ("https://user:pass@[::1]:8080/x?token=1", "https://[::1]:8080/x"),
        ("simplecache::s3://bucket/x?token=1", "simplecache::s3://bucket/x"),
        ("/a/path?/with#all::of@it/", "/a/path?/with#all::of@it/"),
        ("zip://a::https://user:pass@host/x.zip?sig=1", "zip://a::https://host/x.zip"),
    ],
)
def test_names_have_no_secrets(url: str, name: str) -> None:
    assert without_secrets(url) == name


# --- drivers that fail -----------------------------------------------------------------------------------------------


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int, code: str):
        super().__init__(f"An error occurred: https://bucket/key?X-Amz-Signature={SECRET}")
        self.response = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As of gcsfs and aiohttp."""

    def __init__(self, code: int):
        super().__init__(f"https://host/?token={SECRET}")
        self.code = code


class BotoCoreError(Exception):
    """As botocore's."""


class NoCredentialsError(BotoCoreError):
    """As botocore's."""


class ParamValidationError(BotoCoreError):
    """As botocore's."""


class HTTPClientError(BotoCoreError):
    """As botocore's."""


def caused(error: Exception, by: Exception) -> Exception:
    """As a driver raises it that translates errors."""
    error.__cause__ = by
    return error


TRANSIENT = [
    ConnectionResetError(104, SECRET),
    TimeoutError(SECRET),
    OSError(SECRET),
    EOFError(SECRET),
    caused(HTTPClientError(SECRET), HttpError(400)),
    HttpError(429),
    ClientError(400, "RequestTimeout"),
    caused(OSError(16, SECRET), ClientError(503, "SlowDown")),
    ClientError(500, "InternalError"),
]
FINAL = [
    (PermissionError(SECRET), CheckpointError, "memory: PermissionError: memory://models/wiki may not be read"),
    (caused(PermissionError(SECRET), ClientError(403, "InvalidAccessKeyId")), CheckpointError, "memory answers 403 InvalidAccessKeyId: "),
    (OSError(f"Forbidden: https://host/?token={SECRET}"), CheckpointError, "may not be read"),
    (caused(OSError(SECRET), ClientError(400, "ExpiredToken")), NetworkError, "the credentials have expired; renew them"),
    (ClientError(412, "PreconditionFailed"), CheckpointError, "memory answers 412 PreconditionFailed: the source changed"),
    (ClientError(301, "PermanentRedirect"), NetworkError, "memory answers 301 PermanentRedirect"),
    (ClientError(404, SECRET + "?"), NetworkError, "memory answers 404"),
    (FileNotFoundError(SECRET), CheckpointError, "it is no longer there: the source changed"),
    (NoCredentialsError(SECRET), RequestError, "memory: NoCredentialsError: there are no credentials"),
    (ParamValidationError(SECRET), RequestError, "the driver cannot ask for memory://models/wiki"),
    (ValueError(SECRET), NetworkError, "memory: ValueError"),
]


def name_of(error: object) -> str | None:
    return type(error).__name__ if isinstance(error, Exception) else None


@pytest.mark.parametrize("error", TRANSIENT, ids=name_of)
def test_what_may_not_happen_again_is_tried_again(
    stored: str, monkeypatch: pytest.MonkeyPatch, wiki_llama_in: Callable[[str], Path], tmp_path: Path, error: Exception
) -> None:
    failing(monkeypatch, error, times=5)
    streamquant.convert(stored, tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


@pytest.mark.parametrize("error", TRANSIENT, ids=name_of)
def test_what_happens_again_and_again_ends_the_run(stored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    failing(monkeypatch, error, times=1000, after=10)
    with pytest.raises(NetworkError, match="11 times in a row; the same command goes on") as caught:
        streamquant.convert(stored, tmp_path / "out", scheme="W4A16", max_memory="60MB")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("error", "kind", "said"), FINAL, ids=name_of)
def test_what_is_final_ends_the_run_at_once(
    stored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[StreamquantError], said: str
) -> None:
    failing(monkeypatch, error, times=1, after=10)
    with pytest.raises(kind) as caught:
        streamquant.convert(stored, tmp_path / "out", scheme="W4A16", max_memory="60MB")
    assert said in str(caught.value)
    assert " of memory://models/wiki: " in str(caught.value)
    assert SECRET not in str(caught.value)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, *, times: int, after: int = 0) -> None:
    """Make memory:// raise an error `times` times, from read number `after` on."""
    failures, read = iter([None] * after + [error] * times), MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, *args: Any, **options: Any) -> bytes:
        if (failure := next(failures, None)) is not None:
            raise failure
        content: bytes = read(self, *args, **options)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_a_short_answer_is_asked_for_again(
    stored: str, monkeypatch: pytest.MonkeyPatch, wiki_llama_in: Callable[[str], Path], tmp_path: Path
) -> None:
    calls, read = iter(range(1000)), MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        content: bytes = read(self, path, start=start, end=end)
        return content[: len(content) // 2] if next(calls) % 3 else content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    streamquant.convert(stored, tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


def test_a_driver_that_knows_no_ranges_is_an_error(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **_: self.store[path].getvalue())
    assert refusal(NetworkError, stored).endswith("the driver for memory:// does not read ranges of bytes")


def test_reads_are_no_larger_than_what_a_driver_may_hold_twice(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "READ_BYTES", 1000)
    lengths, read = [], MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        lengths.append(end - start)
        content: bytes = read(self, path, start=start, end=end)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    buffer = bytearray(2500)
    with open_source(stored) as source:
        source.sizes()
        source.read(SHARD, 100, memoryview(buffer))
    assert lengths == [1000, 1000, 500]
    assert buffer == (WIKI_LLAMA / SHARD).read_bytes()[100:2600]


@pytest.mark.parametrize("content", [b"short", None])
def test_a_file_that_shrinks_or_goes_in_mid_run_is_an_error(
    stored: str, memory: MemoryFileSystem, tmp_path: Path, content: bytes | None
) -> None:
    last = f"/models/wiki/{SHARD.replace('2', '5', 1)}"

    def change(progress: streamquant.Progress) -> None:
        if content is None:
            memory.store.pop(last, None)
        else:
            memory.pipe_file(last, content)

    with pytest.raises(CheckpointError, match=r"of memory://models/wiki: it .* the source changed"):
        streamquant.convert(stored, tmp_path / "out", scheme="W4A16", on_progress=change, max_memory="60MB")


def test_a_file_that_is_replaced_in_mid_run_is_an_error(stored: str, memory: MemoryFileSystem, tmp_path: Path) -> None:
    def replace(progress: streamquant.Progress) -> None:
        memory.pipe_file(f"/models/wiki/{SHARD}", (WIKI_LLAMA / SHARD).read_bytes())

    with pytest.raises(CheckpointError, match=f"{SHARD} of {stored} changed while it was read"):
        streamquant.convert(stored, tmp_path / "out", scheme="W4A16", on_progress=replace)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_interrupt_ends_waiting(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 1000.0)
    with open_source(stored) as source:
        assert isinstance(source, UrlSource)
        source.sizes()
        failing(monkeypatch, TimeoutError(), times=1)
        source.interrupt()
        with pytest.raises(NetworkError, match="stopped"):
            source.read(SHARD, 0, memoryview(bytearray(8)))
