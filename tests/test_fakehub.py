"""The fake Hub, as the real client and a plain one see it."""

import hashlib
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from huggingface_hub import HfApi, HfFileSystem, close_session, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from tests.checkpoints import file_bytes
from tests.fakehub import RANDOM_FAULTS, FakeHub

REPO, WEIGHTS = "org/name", "model.safetensors"
WEIGHT_BYTES = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path):
    """A repository with small and large files and a folder."""
    repo = tmp_path / "served" / REPO
    (repo / "part" / "deep").mkdir(parents=True)
    (repo / WEIGHTS).write_bytes(WEIGHT_BYTES)
    (repo / "README.md").write_text("hello\n")
    (repo / "part" / "deep" / "a name with spaces.txt").write_text("deep")
    (repo / "part" / "two.safetensors").write_bytes(b"two")
    return tmp_path / "served"


@pytest.fixture
def hub(folder):
    with FakeHub(folder) as hub:
        yield hub


@pytest.fixture
def client():
    with httpx.Client(trust_env=False) as client:
        yield client


@pytest.fixture(autouse=True)
def no_proxy_and_no_open_connections(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield
    close_session()


def api(hub: FakeHub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def file_url(hub: FakeHub, name: str = WEIGHTS, revision: str = "main") -> str:
    return f"{hub.endpoint}/{REPO}/resolve/{revision}/{name}"


def cdn_url(hub: FakeHub, client: httpx.Client) -> str:
    return client.head(file_url(hub)).headers["Location"]


def first_kilobyte(client: httpx.Client, url: str) -> httpx.Response:
    return client.get(url, headers={"Range": "bytes=0-999"})


# --- the real client -------------------------------------------------------------------------------------------------


def test_files_have_the_hashes_that_git_and_lfs_give_them(hub):
    info = api(hub).model_info(REPO, files_metadata=True)
    assert info.sha == hub.commit(REPO)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert list(siblings) == ["README.md", WEIGHTS, "part/deep/a name with spaces.txt", "part/two.safetensors"]
    assert siblings["README.md"].size == 6
    assert siblings["README.md"].lfs is None
    assert siblings["README.md"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object of hello
    assert siblings[WEIGHTS].size == siblings[WEIGHTS].lfs.size == len(WEIGHT_BYTES)
    assert siblings[WEIGHTS].lfs.sha256 == hashlib.sha256(WEIGHT_BYTES).hexdigest()
    files = {entry.path: entry for entry in api(hub).list_repo_tree(REPO, recursive=True) if isinstance(entry, RepoFile)}
    assert files.keys() == siblings.keys()
    assert all((files[name].blob_id, files[name].lfs) == (siblings[name].blob_id, siblings[name].lfs) for name in files)


def test_info_without_metadata_has_names_alone(hub):
    assert {(sibling.size, sibling.blob_id) for sibling in api(hub).model_info(REPO).siblings} == {(None, None)}


def test_listings_come_in_pages(folder):
    with FakeHub(folder, page_entries=2) as hub:
        top = [entry.path for entry in api(hub).list_repo_tree(REPO)]
        everything = [entry.path for entry in api(hub).list_repo_tree(REPO, recursive=True, expand=True)]
        below = [entry.path for entry in api(hub).list_repo_tree(REPO, "part")]
    assert top == ["README.md", WEIGHTS, "part"]
    assert everything == [*top, "part/deep", "part/deep/a name with spaces.txt", "part/two.safetensors"]
    assert below == ["part/deep", "part/two.safetensors"]
    assert len(hub.requests) == 2 + 3 + 1


def test_a_snapshot_has_the_same_bytes_and_is_complete(hub, folder, tmp_path):
    snapshot = snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert file_bytes(Path(snapshot)) == file_bytes(folder / REPO)
    cdn_bytes = len(WEIGHT_BYTES) + len(b"two")
    assert [request.status for request in hub.requests if request.host == "cdn"] == [200, 200]
    assert hub.bytes_sent > cdn_bytes
    snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert sum(request.host == "cdn" for request in hub.requests) == 2


def test_a_broken_download_is_resumed_by_the_real_client(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # it resumes after the last whole chunk
    hub.fail("*", "truncate", host="cdn")
    path = hf_hub_download(REPO, WEIGHTS, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert Path(path).read_bytes() == WEIGHT_BYTES
    assert [(request.range, request.status) for request in hub.requests if request.host == "cdn"] == [
        (None, 200),
        (f"bytes={len(WEIGHT_BYTES) // 2}-", 206),
    ]


def test_metadata_and_ranges_are_enough_to_read_a_part(hub, client):
    metadata = get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS, endpoint=hub.endpoint), token=False)
    assert metadata.commit_hash == hub.commit(REPO)
    assert metadata.etag == hashlib.sha256(WEIGHT_BYTES).hexdigest()
    assert metadata.size == len(WEIGHT_BYTES)
    assert urlsplit(metadata.location).hostname != urlsplit(hub.endpoint).hostname
    assert metadata.xet_file_data is None
    assert client.get(metadata.location, headers={"Range": "bytes=100-199"}).content == WEIGHT_BYTES[100:200]


def test_a_small_file_comes_from_the_hub_itself(hub, client):
    redirect = client.get(file_url(hub, "README.md"))
    assert (redirect.status_code, redirect.headers["X-Repo-Commit"]) == (307, hub.commit(REPO))
    assert redirect.headers["Location"].startswith("/api/resolve-cache/")
    reply = client.get(file_url(hub, "README.md"), headers={"Range": "bytes=1-3"}, follow_redirects=True)
    assert (reply.status_code, reply.content, reply.headers["Content-Range"]) == (206, b"ell", "bytes 1-3/6")
    assert reply.headers["ETag"] == '"ce013625030ba8dba906f756967f9e9ca394464a"'
    assert reply.headers["X-Repo-Commit"] == hub.commit(REPO)


def test_the_file_system_of_the_client_reads_files(hub):
    files = HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
    assert files.cat_file(f"{REPO}/README.md") == b"hello\n"
    assert files.cat_file(f"{REPO}/{WEIGHTS}", start=100, end=200) == WEIGHT_BYTES[100:200]
    assert sorted(files.find(f"{REPO}/part")) == [f"{REPO}/part/deep/a name with spaces.txt", f"{REPO}/part/two.safetensors"]
    assert files.modified(f"{REPO}/README.md").year >= 2024


def test_a_repository_may_lie_directly_in_the_folder_and_be_a_symlink(hub, folder, tmp_path):
    (folder / "alone").symlink_to(folder / REPO)
    (folder / REPO / ".cache").mkdir()
    (folder / REPO / ".cache" / "hidden").touch()
    assert hub.repositories() == ["alone", REPO]
    assert ".cache/hidden" not in hub.files("alone")
    assert api(hub).model_info("alone").sha == api(hub).model_info(REPO).sha
    path = hf_hub_download("alone", "part/two.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert Path(path).read_bytes() == b"two"
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("alone/part")


def test_a_changed_file_is_a_new_commit_and_the_old_one_is_gone(hub, folder, client):
    old_commit, old_url = hub.commit(REPO), cdn_url(hub, client)
    (folder / REPO / WEIGHTS).write_bytes(b"other")
    assert api(hub).model_info(REPO).sha != old_commit
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(REPO, revision=old_commit)
    assert client.get(old_url).status_code == 404
    assert client.get(cdn_url(hub, client)).content == b"other"


def test_what_is_not_there_raises_what_the_real_hub_raises(hub, tmp_path):
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("org/other")
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("org")
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(REPO, revision="refs/pr/1")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "other.json", endpoint=hub.endpoint, cache_dir=tmp_path, token=False)
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree(REPO, "other"))
    assert [ref.target_commit for ref in api(hub).list_repo_refs(REPO).branches] == [hub.commit(REPO)]


def test_paths_cannot_leave_the_folder(hub, folder, client):
    (folder.parent / "secret").write_text("secret")
    for path in ("/../resolve/main/secret", "/org/../resolve/main/secret", f"/{REPO}/resolve/main/..%2F..%2F..%2Fsecret"):
        assert client.get(hub.endpoint + path.replace("..", "%2E%2E")).status_code in (401, 404)


# --- access ----------------------------------------------------------------------------------------------------------


def test_a_gated_repository_is_listed_and_not_read_without_its_token(folder, tmp_path):
    with FakeHub(folder, token="hf_right") as hub:
        for token, status in ((False, 401), ("hf_wrong", 403)):
            assert api(hub, token).model_info(REPO).gated == "auto"
            with pytest.raises(GatedRepoError) as caught:
                hf_hub_download(REPO, WEIGHTS, endpoint=hub.endpoint, cache_dir=tmp_path, token=token)
            assert caught.value.response.status_code == status
        path = hf_hub_download(REPO, WEIGHTS, endpoint=hub.endpoint, cache_dir=tmp_path, token="hf_right")
        assert Path(path).read_bytes() == WEIGHT_BYTES
        assert hub.leaked_tokens == []


def test_a_private_hub_hides_everything_without_its_token(folder):
    with FakeHub(folder, token="hf_right", private=True) as hub:
        with pytest.raises(RepositoryNotFoundError):
            api(hub).model_info(REPO)
        assert api(hub, "hf_right").model_info(REPO).private


def test_a_token_that_reaches_the_cdn_is_refused_and_noted(hub, client):
    reply = client.get(cdn_url(hub, client), headers={"Authorization": "Bearer hf_right"})
    assert reply.status_code == 400
    assert hub.leaked_tokens == ["Bearer hf_right"]


# --- the CDN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("byte_range", "expected"),
    [
        ("bytes=0-0", WEIGHT_BYTES[:1]),
        ("bytes=5-999", WEIGHT_BYTES[5:1000]),
        ("bytes=255000-", WEIGHT_BYTES[255000:]),
        ("bytes=255000-999999", WEIGHT_BYTES[255000:]),
        ("bytes=-10", WEIGHT_BYTES[-10:]),
        ("bytes=-999999", WEIGHT_BYTES),
    ],
)
def test_a_range_is_that_part_of_the_file(hub, client, byte_range, expected):
    url = cdn_url(hub, client)
    reply = client.get(url, headers={"Range": byte_range})
    assert (reply.status_code, reply.content) == (206, expected)
    start = WEIGHT_BYTES.rindex(expected) if byte_range.startswith("bytes=-") else int(byte_range[6:].split("-")[0])
    assert reply.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(WEIGHT_BYTES)}"
    head = client.head(url, headers={"Range": byte_range})
    assert (head.status_code, head.headers["Content-Length"], head.content) == (206, str(len(expected)), b"")


def test_without_a_range_that_makes_sense_the_whole_file_comes(hub, client):
    url = cdn_url(hub, client)
    for headers in ({}, {"Range": "bytes=0-1,5-6"}, {"Range": "lines=1-2"}):
        reply = client.get(url, headers=headers)
        assert (reply.status_code, reply.content, reply.headers["Accept-Ranges"]) == (200, WEIGHT_BYTES, "bytes")


@pytest.mark.parametrize("byte_range", ["bytes=256000-", "bytes=999999-9999999", "bytes=-0"])
def test_a_range_outside_of_the_file_is_refused(hub, client, byte_range):
    reply = client.get(cdn_url(hub, client), headers={"Range": byte_range})
    assert (reply.status_code, reply.headers["Content-Range"]) == (416, f"bytes */{len(WEIGHT_BYTES)}")


def test_the_etag_of_the_cdn_is_no_name_for_the_content(hub, client):
    linked = client.head(file_url(hub)).headers["X-Linked-ETag"]
    assert client.head(cdn_url(hub, client)).headers["ETag"] == client.head(cdn_url(hub, client)).headers["ETag"] != linked


def test_a_url_expires_by_time(folder, client):
    with FakeHub(folder, url_seconds=0.05) as hub:
        url = cdn_url(hub, client)
        time.sleep(0.1)
        assert client.get(url).status_code == 403
        assert client.get(cdn_url(hub, client)).status_code == 200


def test_a_url_expires_by_use(folder, client):
    with FakeHub(folder, url_requests=2) as hub:
        url = cdn_url(hub, client)
        assert [client.get(url).status_code for _ in range(4)] == [200, 200, 403, 403]
        assert client.get(cdn_url(hub, client)).status_code == 200


def test_a_url_that_was_tampered_with_is_refused(hub, client):
    url = cdn_url(hub, client)
    for other in (url.replace(WEIGHTS, "README.md"), url.replace("Expires=", "Expires=9"), url.partition("?")[0]):
        assert client.get(other).status_code == 403


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "status"), [("429", 429), ("500", 500), ("503", 503), ("expire", 403), ("missing", 404)])
def test_a_fault_may_be_a_status(folder, client, kind, status):
    with FakeHub(folder, retry_after=7) as hub:
        url = cdn_url(hub, client)
        hub.fail(f"/{REPO}/*", kind, times=2, host="cdn", method="GET")
        replies = [client.head(url), *(first_kilobyte(client, url) for _ in range(3))]
    assert [reply.status_code for reply in replies] == [200, status, status, 206]
    assert replies[1].headers.get("Retry-After") == ("7" if kind == "429" else None)


def test_a_listed_file_may_be_missing(hub, tmp_path):
    hub.fail("*/resolve/*", "missing")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, WEIGHTS, endpoint=hub.endpoint, cache_dir=tmp_path, token=False)


def test_a_fault_of_the_hub_is_an_error_of_the_client(hub):
    hub.fail("/api/*", "503", host="hub")
    with pytest.raises(HfHubHTTPError, match="503"):
        api(hub).model_info(REPO)


@pytest.mark.parametrize(("kind", "error"), [("reset", httpx.ReadError), ("truncate", httpx.RemoteProtocolError)])
def test_a_body_may_break_off(hub, client, kind, error):
    url = cdn_url(hub, client)
    hub.fail("*", kind)
    received = 0
    with pytest.raises(error), client.stream("GET", url) as reply:
        assert reply.headers["Content-Length"] == str(len(WEIGHT_BYTES))
        for chunk in reply.iter_raw():
            received += len(chunk)
    assert received <= len(WEIGHT_BYTES) // 2
    assert client.get(url).content == WEIGHT_BYTES


@pytest.mark.parametrize(("kind", "error"), [("reset", httpx.ReadError), ("truncate", httpx.RemoteProtocolError)])
def test_an_answer_without_a_body_breaks_off_as_a_whole(hub, client, kind, error):
    hub.fail("*", kind, method="HEAD")
    with pytest.raises(error):
        client.head(file_url(hub))


def test_a_stalled_body_goes_on_after_a_while(folder, client):
    with FakeHub(folder, stall_seconds=0.2) as hub:
        url = cdn_url(hub, client)
        hub.fail("*", "stall", times=3)
        start = time.monotonic()
        assert client.get(url).content == WEIGHT_BYTES
        assert client.head(url).status_code == 200
        assert time.monotonic() - start >= 0.4
        with pytest.raises(httpx.ReadTimeout):
            client.get(url, timeout=0.05)


def test_closing_ends_a_stall_at_once(folder, client):
    threads = threading.active_count()
    with FakeHub(folder, stall_seconds=60) as hub:
        hub.fail("*", "stall", host="cdn")
        stalled = client.stream("GET", cdn_url(hub, client))
        with stalled as reply:
            assert reply.status_code == 200
            start = time.monotonic()
            hub.close()
            assert time.monotonic() - start < 5
    assert threading.active_count() == threads


def test_a_port_in_use_is_an_error_that_leaves_nothing_open(hub, folder):
    threads = threading.active_count()
    with pytest.raises(OSError, match="in use"):
        FakeHub(folder, cdn_port=urlsplit(hub.endpoint).port)
    assert threading.active_count() == threads


def test_a_range_may_be_ignored(hub, client):
    url = cdn_url(hub, client)
    hub.fail("*", "norange")
    reply = first_kilobyte(client, url)
    assert (reply.status_code, reply.content, "Content-Range" in reply.headers) == (200, WEIGHT_BYTES, False)


def test_a_total_length_may_change(hub, client):
    url = cdn_url(hub, client)
    hub.fail("*", "length")
    assert first_kilobyte(client, url).headers["Content-Range"] == "bytes 0-999/256001"
    assert first_kilobyte(client, url).headers["Content-Range"] == "bytes 0-999/256000"


def test_an_etag_may_change(hub, client):
    url = cdn_url(hub, client)
    etag, linked_etag = first_kilobyte(client, url).headers["ETag"], client.head(file_url(hub)).headers["X-Linked-ETag"]
    hub.fail("*", "etag", host="cdn")
    hub.fail("*", "etag", host="hub")
    assert first_kilobyte(client, url).headers["ETag"] != etag
    assert client.head(file_url(hub)).headers["X-Linked-ETag"] != linked_etag


def test_an_unknown_fault_is_refused_by_name(hub, folder):
    with pytest.raises(ValueError, match="no fault '418' here; there are 429, 500"):
        hub.fail("*", "418")
    with pytest.raises(ValueError, match="no fault 'norange' here"):
        FakeHub(folder, kinds=("norange",))


def faults_of_ranges(folder: Path, client: httpx.Client, seed: int, *, backwards: bool) -> dict[tuple[str | None, int], str | None]:
    """The fault of each attempt at each range."""
    ranges = [f"bytes={start}-{start + 9}" for start in range(0, 400, 10)]
    with FakeHub(folder, seed=seed, kinds=("429", "500", "503", "expire")) as hub:
        url = cdn_url(hub, client)
        hub.faults = 0.3
        for byte_range in reversed(ranges) if backwards else ranges:
            for _ in range(3):
                client.get(url, headers={"Range": byte_range})
        attempts: Counter[str | None] = Counter()
        faults = {}
        for request in hub.requests[1:]:
            attempts[request.range] += 1
            faults[request.range, attempts[request.range]] = request.fault
        return faults


def test_a_seed_decides_what_fails_whatever_the_order(folder, client):
    faults = faults_of_ranges(folder, client, 1, backwards=False)
    assert faults == faults_of_ranges(folder, client, 1, backwards=True)
    assert faults != faults_of_ranges(folder, client, 2, backwards=False)
    assert 20 < sum(fault is not None for fault in faults.values()) < 52  # 36 of 120, give or take three deviations
    assert set(faults.values()) == {None, "429", "500", "503", "expire"}
    assert any(faults[byte_range, 1] and not faults[byte_range, 2] for byte_range, _ in faults)  # another try, another chance


def test_the_hub_itself_never_says_that_a_url_expired(folder, client):
    with FakeHub(folder, faults=1.0, kinds=("expire",)) as hub:
        assert client.head(file_url(hub)).status_code == 302
        assert client.get(cdn_url(hub, client)).status_code == 403


# --- measuring -------------------------------------------------------------------------------------------------------


def test_the_log_has_every_request(hub, client):
    first_kilobyte(client, cdn_url(hub, client))
    assert [(line.method, line.host, line.range, line.status, line.fault) for line in hub.requests] == [
        ("HEAD", "hub", None, 302, None),
        ("GET", "cdn", "bytes=0-999", 206, None),
    ]
    assert hub.requests[0].path == f"/{REPO}/resolve/main/{WEIGHTS}"
    assert hub.requests[1].path.endswith(f"/{WEIGHTS}")
    assert hub.bytes_sent == 1000


def test_answers_take_their_time_when_asked_to(folder, client):
    with FakeHub(folder, latency=0.05, bandwidth=2_560_000) as hub:
        start = time.monotonic()
        assert client.get(cdn_url(hub, client)).content == WEIGHT_BYTES
        assert time.monotonic() - start >= 0.2


def test_it_runs_by_hand(folder, client):
    command = [sys.executable, "-m", "tests.fakehub", str(folder), "--faults", "1", "--kinds", "503"]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        endpoint = program.stdout.readline().strip().removeprefix("export HF_ENDPOINT=")
        assert program.stdout.readline().startswith(f"{REPO} is at ")
        assert client.get(f"{endpoint}/api/models/{REPO}").status_code == 503
        program.terminate()


def test_every_kind_of_fault_is_explained():
    command = [sys.executable, "-m", "tests.fakehub", "--help"]
    text = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout
    assert all(f"  {kind} " in text for kind in RANDOM_FAULTS)
    assert "HF_ENDPOINT" in text
