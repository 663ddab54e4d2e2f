"""Sources in object stores, with the real drivers: s3:// in moto's server, gs:// in a few lines that answer as its JSON API does.

Run by `pytest -m drivers` where `streamquant[s3,gs]` and `moto[server]` are installed.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

import streamquant
from streamquant.checkpoint import retry
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.open_source import open_source
from streamquant.errors import CheckpointError, NetworkError, RequestError, StreamquantError
from tests.checkpoints import WIKI_LLAMA, require_same_output
from tests.fileserver import Answer, FileServer, Relay, Server

pytestmark = pytest.mark.drivers

SECRET = "wJalrXUtnFEMI"
SHARD = "model-00002-of-00006.safetensors"
LAST = "model-00005-of-00006.safetensors"


@pytest.fixture(autouse=True)
def nothing_but_loopback_and_short_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retry, "MAX_WAIT_SECONDS", 0.002)


def refusal(kind: type[StreamquantError], source: str) -> str:
    """The message with which a source is refused."""
    with pytest.raises(kind) as caught, open_source(source) as opened:
        read_checkpoint(opened)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def changing(change: Callable[[], None]) -> Callable[[streamquant.Progress], None]:
    """A progress callback that changes something once."""
    changes = iter([change])

    def on_progress(progress: streamquant.Progress) -> None:
        next(changes, lambda: None)()

    return on_progress


# --- s3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of moto's server."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def relay(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """What stands between the driver and moto."""
    for name, value in {
        "ACCESS_KEY_ID": "AKIDEXAMPLE",
        "SECRET_ACCESS_KEY": SECRET,
        "REGION": "us-east-1",
        "EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with Relay(moto) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        yield relay


@pytest.fixture
def bucket(moto: str, relay: Relay) -> Iterator[Any]:
    """A client of a bucket with the example model, straight to moto."""
    import boto3

    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket="bucket")
    for path in WIKI_LLAMA.iterdir():
        client.put_object(Bucket="bucket", Key=f"models/wiki llama/{path.name}", Body=path.read_bytes())
    yield client
    for entry in client.list_objects_v2(Bucket="bucket")["Contents"]:
        client.delete_object(Bucket="bucket", Key=entry["Key"])
    client.close()


URL = "s3://bucket/models/wiki llama"


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_s3_gives_the_bytes_of_the_folder(
    bucket: Any, relay: Relay, wiki_llama_in: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    streamquant.convert(f"{URL}/", tmp_path / "out", scheme=scheme)
    require_same_output(tmp_path / "out", wiki_llama_in(scheme))
    read = [request for request in relay.requests if request.path.endswith(".safetensors")]
    assert all(request.range and request.status == 206 for request in read)
    assert sum(request.num_bytes for request in read) < 1.05 * sum(path.stat().st_size for path in WIKI_LLAMA.glob("*.safetensors"))


def test_a_file_in_s3_is_read_with_the_config_beside_it(bucket: Any, tmp_path: Path) -> None:
    streamquant.convert(f"{URL}/{SHARD}", tmp_path / "url", scheme="W4A16")
    streamquant.convert(WIKI_LLAMA / SHARD, tmp_path / "local", scheme="W4A16")
    require_same_output(tmp_path / "url", tmp_path / "local")


def test_keys_that_stand_for_folders_are_no_files(bucket: Any) -> None:
    for key in ("", "/", "/sub", "/sub/", "/sub/a b?c#d.txt", "/sub/deep/", "/void/"):
        bucket.put_object(Bucket="bucket", Key=f"models/wiki llama{key}", Body=b"x" * key.endswith(".txt"))
    with open_source(URL) as source:
        assert set(source.sizes()) - {path.name for path in WIKI_LLAMA.iterdir()} == {"sub/a b?c#d.txt"}
        source.read("sub/a b?c#d.txt", 0, memoryview(bytearray(1)))
    bucket.put_object(Bucket="bucket", Key="models/wiki llama//config.json", Body=b"x")
    assert refusal(CheckpointError, URL).startswith(f"{URL} has keys with two slashes in a row")


@pytest.mark.parametrize("kind", ["500", "503", "reset", "truncate"])
def test_faults_of_s3_do_not_change_a_byte(
    bucket: Any, relay: Relay, wiki_llama_in: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    for pattern in ("/bucket", "*.safetensors", "*/tokenizer.json"):
        relay.fail(pattern, kind, times=7)
    streamquant.convert(URL, tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_faults_of_s3_without_end_end_the_run(bucket: Any, relay: Relay, tmp_path: Path, kind: str) -> None:
    on_progress = changing(lambda: relay.fail("*.safetensors", kind, times=10_000))
    with pytest.raises(NetworkError, match="11 times in a row; the same command goes on where it was") as caught:
        streamquant.convert(URL, tmp_path / "out", scheme="W4A16", on_progress=on_progress, max_memory="60MB")
    assert SECRET not in str(caught.value)
    assert len([request for request in relay.requests if request.status == 503]) < 11 * 9  # no one else tries again


@pytest.mark.parametrize("change", ["content", "length", "removal"])
def test_an_object_that_changes_in_mid_run_is_an_error(bucket: Any, tmp_path: Path, change: str) -> None:
    content = bytearray((WIKI_LLAMA / LAST).read_bytes())
    content[-1] ^= 1
    key = f"models/wiki llama/{LAST}"

    def replace() -> None:
        if change == "removal":
            bucket.delete_object(Bucket="bucket", Key=key)
        else:
            bucket.put_object(Bucket="bucket", Key=key, Body=bytes(content[: len(content) // (2 if change == "length" else 1)]))

    with pytest.raises(CheckpointError, match=r": the source changed$") as caught:
        streamquant.convert(URL, tmp_path / "out", scheme="W4A16", on_progress=changing(replace), max_memory="60MB")
    assert str(caught.value).startswith(f"{LAST} of {URL}: ")
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_is_not_in_s3_is_refused_by_its_name(bucket: Any) -> None:
    assert refusal(CheckpointError, f"{URL}2") == f"there is no {URL}2"
    assert refusal(CheckpointError, f"{URL}/none.safetensors") == f"there is no {URL}/none.safetensors"
    assert refusal(CheckpointError, "s3://another/model") == "there is no s3://another/model"
    assert refusal(RequestError, "s3://") == "s3: names no bucket; write s3://bucket/folder"
    assert refusal(RequestError, "s3://In_valid!/model").endswith("the driver cannot ask for s3://In_valid!/model")


def test_without_credentials_s3_is_refused_with_the_way_out(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    assert refusal(RequestError, URL).startswith("s3: NoCredentialsError: there are no credentials; set AWS_PROFILE, or ")
    monkeypatch.setitem(_fsspec_config(), "s3", {"anon": "true"})
    with open_source(URL) as source:
        assert SHARD in source.sizes()


def test_a_profile_that_is_not_there_is_refused(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "none")
    assert refusal(RequestError, URL).startswith("s3: ProfileNotFound: there are no credentials; set AWS_PROFILE")


def test_without_permission_s3_is_refused(bucket: Any, relay: Relay) -> None:
    relay.fail("/bucket*", "403", times=100)
    assert refusal(CheckpointError, URL).startswith(f"s3 answers 403: {URL} may not be read; set AWS_PROFILE")
    assert refusal(CheckpointError, f"{URL}/{SHARD}").startswith(f"s3 answers 403: {URL}/{SHARD} may not be read; set AWS_PROFILE")


def test_a_config_that_may_not_be_read_is_none(bucket: Any, relay: Relay) -> None:
    relay.fail("*.json", "403", times=100)
    with open_source(f"{URL}/{SHARD}") as source:
        assert list(source.sizes()) == [SHARD]


def _fsspec_config() -> dict[str, Any]:
    from fsspec.config import conf

    config: dict[str, Any] = conf
    return config


# --- gs --------------------------------------------------------------------------------------------------------------


class Bucket(Server):
    """A bucket of Google's with the files of a folder, as https://cloud.google.com/storage/docs/json_api has it."""

    def __init__(self, folder: Path, name: str):
        self._files = FileServer(folder)
        self._folder, self._prefix = folder, f"/storage/v1/b/{name}/o"
        super().__init__()

    def close(self) -> None:
        super().close()
        self._files.close()

    def answer(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> Answer:
        asked = {name: values[0] for name, values in parse_qs(query).items()}
        if path.startswith("/download"):
            file = path.removeprefix(f"/download{self._prefix}/")
            if not (self._folder / file).is_file() or asked.get("generation") != self._item(file)["generation"]:
                return Answer(404, {}, b"No such object")
            return self._files.answer(method, f"/{file}", "", headers)
        if path == self._prefix:
            prefix = asked.get("prefix", "")
            below = [name for name in self._names() if name.startswith(prefix)]
            folders = {prefix + name.removeprefix(prefix).partition("/")[0] + "/" for name in below if "/" in name.removeprefix(prefix)}
            items = [self._item(name) for name in below if "/" not in name.removeprefix(prefix)]
            return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})
        file = path.removeprefix(f"{self._prefix}/")
        return _json(self._item(file)) if file in self._names() else Answer(404, {}, b"{}")

    def _names(self) -> list[str]:
        return sorted(path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file())

    def _item(self, name: str) -> dict[str, Any]:
        status = (self._folder / name).stat()
        times = dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")
        return {"name": name, "size": str(status.st_size), "generation": str(status.st_mtime_ns), "etag": "CJ=", **times}


def _json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "stored" / "models" / "wiki llama"
    folder.mkdir(parents=True)
    for path in WIKI_LLAMA.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def google(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC what kind of bucket it is
    pytest.importorskip("gcsfs")
    with Bucket(folder.parent.parent, "bucket") as google:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.url)
        monkeypatch.setitem(_fsspec_config(), "gs", {"token": "anon", "endpoint_url": google.url})
        yield google


def test_gs_gives_the_bytes_of_the_folder(google: Bucket, wiki_llama_in: Callable[[str], Path], tmp_path: Path) -> None:
    streamquant.convert("gs://bucket/models/wiki llama", tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))
    read = [request for request in google.requests if request.path.endswith(".safetensors")]
    assert all(request.range and request.status == 206 for request in read)


@pytest.mark.parametrize("kind", ["503", "reset"])
def test_faults_of_gs_do_not_change_a_byte(google: Bucket, wiki_llama_in: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    google.fail("/download/*", kind, times=3)
    streamquant.convert("gs://bucket/models/wiki llama", tmp_path / "out", scheme="W4A16")
    require_same_output(tmp_path / "out", wiki_llama_in("W4A16"))


def test_an_object_of_gs_that_changes_in_mid_run_is_an_error(google: Bucket, folder: Path, tmp_path: Path) -> None:
    on_progress = changing(lambda: (folder / LAST).write_bytes((folder / LAST).read_bytes()) and None)
    with pytest.raises(CheckpointError, match=f"{LAST} of gs://bucket/models/wiki llama: it is no longer there: the source changed"):
        streamquant.convert("gs://bucket/models/wiki llama", tmp_path / "out", scheme="W4A16", on_progress=on_progress, max_memory="60MB")


def test_what_is_not_in_gs_or_may_not_be_read_is_refused(google: Bucket, capfd: pytest.CaptureFixture[str]) -> None:
    assert refusal(CheckpointError, "gs://bucket/none") == "there is no gs://bucket/none"
    google.fail("*", "403", times=100)
    said = refusal(CheckpointError, "gs://bucket/models/wiki llama")
    assert said.startswith(
        "gs: OSError: gs://bucket/models/wiki llama may not be read; log in with `gcloud auth application-default login`"
    )
    assert capfd.readouterr().err == ""
