"""Sources on web servers, read from one on loopback."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import streamquant
from streamquant.checkpoint import retry, web
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.open_source import open_source
from streamquant.errors import CheckpointError, NetworkError, RequestError, StreamquantError
from tests.checkpoints import WIKI_LLAMA, require_same_output
from tests.fileserver import Answer, FileServer, Server

SECRET = "wJalrXUtnFEMI"
SHARD = "model-00002-of-00006.safetensors"
SHARDS = {path.name for path in WIKI_LLAMA.glob("*.safetensors")}


@pytest.fixture(autouse=True)
def no_proxy_and_short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retry, "MAX_WAIT_SECONDS", 0.002)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example model in a folder whose name wants escapes, with a folder and a hidden one."""
    folder = tmp_path / "served" / "wiki llama & co (100%)"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for path in WIKI_LLAMA.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with FileServer(folder.parent) as server:
        yield server


def url_of(server: Server, file: str = "") -> str:
    return f"{server.url}/wiki%20llama%20&%20co%20(100%25)/{file}"


def name_of(server: Server, file: str = "") -> str:
    return url_of(server, file).rstrip("/")


def refusal(kind: type[StreamquantError], source: str) -> str:
    """The message with which a source is refused."""
    with pytest.raises(kind) as caught, open_source(source) as opened:
        read_checkpoint(opened)
    assert SECRET not in str(caught.value)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_a_web_server_gives_the_bytes_of_the_folder(
    server: FileServer, wiki_llama_in: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    streamquant.convert(url_of(server), tmp_path / "out", scheme=scheme)
    require_same_output(tmp_path / "out", wiki_llama_in(scheme))
    assert not streamquant.verify(tmp_path / "out", against=name_of(server)).problems


def test_shards_are_read_by_ranges_and_hardly_a_byte_twice(server: FileServer, tmp_path: Path) -> None:
    streamquant.convert(url_of(server), tmp_path / "out", scheme="W4A16")
    read = [request for request in server.requests if request.path.endswith(".safetensors")]
    assert {Path(request.path).name for request in read} == SHARDS
    assert all(request.status == 206 for request in read)
    assert sum(request.num_bytes for request in read) < 1.05 * sum((WIKI_LLAMA / shard).stat().st_size for shard in SHARDS)


def test_a_file_is_read_with_the_config_beside_it(server: FileServer, tmp_path: Path) -> None:
    streamquant.convert(url_of(server, SHARD), tmp_path / "url", scheme="W4A16")
    streamquant.convert(WIKI_LLAMA / SHARD, tmp_path / "local", scheme="W4A16")
    require_same_output(tmp_path / "url", tmp_path / "local")


def test_folders_below_are_listed_too(server: FileServer, folder: Path) -> None:
    for name in ("sub/deep/a b.txt", "sub/100%25.txt", ".git/config", "sub/größe?.txt"):
        (folder / name).write_text(name)
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "sub" / "empty.txt").touch()
    with open_source(url_of(server)) as source:
        sizes = source.sizes()
        new = {file: sizes[file] for file in sizes if "/" in file}
        assert new == {"sub/deep/a b.txt": 16, "sub/100%25.txt": 14, "sub/größe?.txt": 16, "sub/empty.txt": 0}
        content = bytearray(16)
        source.read("sub/größe?.txt", 0, memoryview(content))
        assert content.decode() == "sub/größe?.txt"


@pytest.mark.parametrize("etags", [True, False])
def test_the_stamp_is_the_etag_or_the_time(folder: Path, etags: bool) -> None:
    with FileServer(folder.parent, etags=etags) as server, open_source(url_of(server)) as source:
        source.sizes()
        before = source.stamp(SHARD)
        assert before.startswith('"' if etags else "at ")
        content = bytearray((folder / SHARD).read_bytes())
        content[-1] ^= 1
        (folder / SHARD).write_bytes(content)
        source.sizes()
        assert source.stamp(SHARD) != before


def test_a_password_opens_what_it_protects_and_is_not_shown(folder: Path, wiki_llama_in: Callable[[str], Path], tmp_path: Path) -> None:
    with FileServer(folder.parent, password=f"{SECRET}/@") as server:
        url = url_of(server).replace("://", f"://user:{SECRET}%2F%40@")
        conversion = streamquant.convert(url, tmp_path / "out", scheme="W4A16")
        assert conversion.plan.checkpoint.source == name_of(server)
        require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))
        assert SECRET not in (tmp_path / "out" / "streamquant.json").read_text()
        said = refusal(CheckpointError, url.replace("user", "another"))
        assert said.startswith(f"127.0.0.1 answers 403 Forbidden for {name_of(server)}; it may need a user and a password")


def test_a_signature_goes_with_every_request_and_is_not_shown(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder.parent, signature=SECRET) as server:
        for file in ("", SHARD):
            url = url_of(server, file)
            with open_source(f"{url}?signature={SECRET}") as source:
                assert source.name == url.rstrip("/")
                assert read_checkpoint(source).config is not None
            assert "answers 403 Forbidden" in refusal(CheckpointError, f"{url}?signature=another-{SECRET}")


def test_a_signature_is_in_nothing_that_is_printed_or_written(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder.parent, signature=SECRET) as server:
        command = [sys.executable, "-m", "streamquant", "convert", f"{url_of(server)}?signature={SECRET}", "out", "--scheme", "W4A16"]
        command += ["--report", "report.json", "--log-json", "log.json"]
        environment = os.environ | {"PYTHONPATH": str(WIKI_LLAMA.parent.parent)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.json", "log.json", "streamquant.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert name_of(server) in (tmp_path / "log.json").read_text()


def test_a_signature_for_one_file_reads_it_without_the_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = FileServer.answer

    def for_one_file(self: FileServer, method: str, path: str, query: str, headers: Any) -> Answer:
        return answer(self, method, path, query, headers) if path.endswith(SHARD) else Answer(403, {}, b"")

    monkeypatch.setattr(FileServer, "answer", for_one_file)
    with FileServer(folder.parent) as server, open_source(url_of(server, SHARD)) as source:
        assert list(source.sizes()) == [SHARD]
        assert read_checkpoint(source).config is None


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused_by_its_name(server: FileServer) -> None:
    assert refusal(CheckpointError, f"{server.url}/none") == f"there is no {server.url}/none"
    assert refusal(CheckpointError, url_of(server, "none.safetensors")) == f"there is no {url_of(server, 'none.safetensors')}"
    assert refusal(CheckpointError, url_of(server, "sub")).startswith(f"the page at {url_of(server, 'sub')} links to no file below it")
    assert refusal(RequestError, f"https://user:{SECRET}@") == "https: is no address of a web server"
    assert refusal(RequestError, f"https://user:{SECRET}@host:port/") == "https://host:port is no address of a web server"


def test_a_page_that_lists_nothing_is_refused(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileServer, "answer", lambda *_: Answer(200, {"Content-Type": "application/json"}, b"{}"))
    assert "is no page that lists files, but of type application/json" in refusal(CheckpointError, url_of(server))
    monkeypatch.setattr(FileServer, "answer", lambda *_: Answer(200, {"Content-Type": "text/html"}, b"<a href='next/'>"))
    assert "has more than 1000 folders or 100000 files" in refusal(CheckpointError, url_of(server))
    monkeypatch.setattr(web, "MAX_PAGE_BYTES", 10)
    assert "has 10 bytes or more, which is no list of files" in refusal(CheckpointError, url_of(server))


def test_a_server_without_ranges_is_refused_at_once(folder: Path) -> None:
    with FileServer(folder.parent, ranges=False) as server:
        said = refusal(CheckpointError, url_of(server))
        assert "as a whole only, and not ranges of bytes of it; download the checkpoint, or serve it with" in said
        assert refusal(CheckpointError, url_of(server, SHARD)).startswith("127.0.0.1 sends")


def test_a_server_that_is_not_there_ends_the_run_after_some_attempts() -> None:
    with FileServer(WIKI_LLAMA) as server:
        url = server.url
    said = refusal(NetworkError, f"{url}/{SECRET}?token={SECRET}".replace(SECRET, "x", 1))
    assert said.startswith(f"listing {url}/x: 127.0.0.1: [Errno 111] Connection refused, 11 times in a row")


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["429", "500", "503", "reset", "truncate"])
def test_faults_on_the_way_do_not_change_a_byte(
    server: FileServer, wiki_llama_in: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    for pattern in ("*/", "*.safetensors", "*/tokenizer.json"):
        server.fail(pattern, kind, times=7)
    streamquant.convert(url_of(server), tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_faults_without_end_end_the_run(server: FileServer, tmp_path: Path, kind: str) -> None:
    def fail(progress: streamquant.Progress) -> None:
        server.fail("*.safetensors", kind, times=10_000)

    with pytest.raises(NetworkError, match="times in a row; the same command goes on where it was") as caught:
        streamquant.convert(f"{url_of(server)}?token={SECRET}", tmp_path / "out", scheme="W4A16", on_progress=fail, max_memory="60MB")
    assert SECRET not in str(caught.value)
    assert caught.value.exit_code == 5


def test_an_address_that_expires_in_mid_run_ends_it_and_a_new_one_goes_on(
    folder: Path, wiki_llama_in: Callable[[str], Path], tmp_path: Path
) -> None:
    with FileServer(folder.parent, signature=SECRET) as server:

        def expire(progress: streamquant.Progress) -> None:
            server.signature = "another"

        with pytest.raises(NetworkError, match="403 Forbidden; if the address was signed and has expired") as caught:
            streamquant.convert(
                f"{url_of(server)}?signature={SECRET}", tmp_path / "out", scheme="W4A16", on_progress=expire, max_memory="60MB"
            )
        assert SECRET not in str(caught.value)
        streamquant.convert(f"{url_of(server)}?signature=another", tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


@pytest.mark.parametrize("change", ["content", "length", "removal"])
def test_a_file_that_changes_in_mid_run_is_an_error(server: FileServer, folder: Path, tmp_path: Path, change: str) -> None:
    last = folder / "model-00005-of-00006.safetensors"

    def replace(progress: streamquant.Progress) -> None:
        if change == "removal":
            last.unlink(missing_ok=True)
        else:
            last.write_bytes(last.read_bytes()[: -1 if change == "length" else None] + b"x")

    with pytest.raises(CheckpointError, match=r": the source changed$") as caught:
        streamquant.convert(url_of(server), tmp_path / "out", scheme="W4A16", on_progress=replace, max_memory="60MB")
    assert str(caught.value).startswith(f"{last.name} of {name_of(server)}: it")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_file_without_an_etag_that_changes_is_found_out_in_the_end(folder: Path, tmp_path: Path) -> None:
    def replace(progress: streamquant.Progress) -> None:
        (folder / SHARD).write_bytes((folder / SHARD).read_bytes())

    with FileServer(folder.parent, etags=False) as server, pytest.raises(CheckpointError, match="changed while it was read"):
        streamquant.convert(url_of(server), tmp_path / "out", scheme="W4A16", on_progress=replace)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_interrupt_ends_reads(server: FileServer) -> None:
    with open_source(url_of(server)) as source:
        source.sizes()
        source.interrupt()
        with pytest.raises(NetworkError, match="stopped"):
            source.read(SHARD, 0, memoryview(bytearray(8)))
