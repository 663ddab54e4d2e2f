"""A conversion straight from the Hub ends with the bytes of one from disk, whatever the network does, or says what is wrong."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import streamquant
from streamquant.checkpoint import http, retry
from streamquant.checkpoint.checkpoint import read_checkpoint
from streamquant.checkpoint.hub import HubSource, _File
from streamquant.checkpoint.open_source import open_source
from streamquant.errors import CheckpointError, NetworkError, RequestError
from tests.checkpoints import WIKI_LLAMA, attention, file_bytes, mlp, weight, write_checkpoint
from tests.fakehub import FakeHub
from tests.test_experts import gpt_oss
from tests.test_experts import source as stacked_experts

ROOT = Path(streamquant.__file__).parent.parent
TOKEN = "hf_a_secret_that_nobody_may_see"
REPO = "org/model"
Start = Callable[..., FakeHub]


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Short waits, an empty cache, no token, no proxy."""
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.002)
    monkeypatch.setattr(http, "STALL_SECONDS", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a Hub that has a folder as org/model, and is the Hub from then on."""
    hubs = []

    def start(folder: Path, **settings: Any) -> FakeHub:
        link = tmp_path / f"served{len(hubs)}" / REPO
        link.parent.mkdir(parents=True)
        link.symlink_to(folder)
        hub = FakeHub(link.parent.parent, **settings)
        hubs.append(hub)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        return hub

    yield start
    for hub in hubs:
        hub.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards with partners in both, and files beside them."""
    layers = attention() | mlp("model.layers.0.mlp", rows=384)
    first = {name: tensor for index, (name, tensor) in enumerate(layers.items()) if index % 2}
    second = {name: tensor for name, tensor in layers.items() if name not in first}
    others = {"model.embed_tokens.weight": weight(3000, 128), "model.norm.weight": weight(128)}
    side_files = {"tokenizer.json": "{}" * 5000, "modeling_x.py": "raise SystemExit", "chat/a template.jinja": "{{ }}", "empty": ""}
    return write_checkpoint(tmp_path / "model", first, second | others, side_files=side_files)


def converted(source: Path | str, out: Path, **wish: Any) -> dict[str, bytes]:
    """The files of a conversion, but for the record, which tells where the source was."""
    streamquant.convert(source, out, **({"scheme": "NVFP4A16"} | wish))
    return {file: content for file, content in file_bytes(out).items() if file != "streamquant.json"}


def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}


def command(*args: str) -> list[str]:
    """The command line, with short waits."""
    code = "import sys; from streamquant.checkpoint import retry; retry.FIRST_WAIT_SECONDS = 0.001; "
    code += "from streamquant.cli import main; sys.argv[0] = 'streamquant'; main()"
    return [sys.executable, "-c", code, *args]


def run(hub: FakeHub, tmp_path: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    known = environment(hub, tmp_path) | settings
    return subprocess.run(command(*args), cwd=ROOT, env=known, capture_output=True, text=True, check=False)


def bodies(hub: FakeHub, suffix: str) -> list[tuple[int, int]]:
    """The ranges that were asked for of files with this suffix."""
    ranges = [request.range for request in hub.requests if request.range is not None and request.path.endswith(suffix)]
    return [(int(start), int(end) + 1) for start, end in (str(text).removeprefix("bytes=").split("-") for text in ranges)]


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "NVFP4A16"])
def test_the_hub_and_the_disk_give_the_same_bytes(serve: Start, tmp_path: Path, scheme: str) -> None:
    hub = serve(WIKI_LLAMA)
    expected = converted(WIKI_LLAMA, tmp_path / "local", scheme=scheme)
    assert converted(REPO, tmp_path / "remote", scheme=scheme) == expected
    record = json.loads((tmp_path / "remote" / "streamquant.json").read_text())
    assert record["job"]["source revision"] == hub.commit(REPO)
    assert hub.leaked_tokens == []


def test_nothing_of_the_source_is_stored_and_no_byte_is_fetched_twice(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model)
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and args[1] not in ("r", "rb", None) else None)
    converted(REPO, tmp_path / "out")
    written = {path for path in opened if "safetensors" in path}
    assert all("/out/.streamquant/" in path for path in written)
    assert not (tmp_path / "cache").exists()
    for file in model.glob("*.safetensors"):
        counts = Counter(byte for start, end in bodies(hub, file.name)[1:] for byte in range(start, end))
        assert set(counts.values()) == {1}  # but for what was read with the header


def test_a_model_on_the_hub_is_calibrated_like_one_on_the_disk(serve: Start, tmp_path: Path) -> None:
    """Layers are fetched over several connections, through faults, and what calibration has finished is not fetched again."""
    pytest.importorskip("transformers")
    wish: dict[str, Any] = {"scheme": "W4A16", "method": "gptq", "samples": 4, "sequence_length": 64}
    expected = converted(WIKI_LLAMA, tmp_path / "disk", **wish)
    hub = serve(WIKI_LLAMA)
    for kind in ("503", "reset"):
        hub.fail("*.safetensors", kind, times=2, host="cdn")
    assert converted(REPO, tmp_path / "hub", **wish) == expected
    sizes = sum(path.stat().st_size for path in WIKI_LLAMA.glob("*.safetensors"))
    assert sum(end - start for start, end in bodies(hub, ".safetensors")) < 1.5 * sizes


def test_small_tensors_are_fetched_together_and_large_ones_in_parts(serve: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"model.layers.{index}.norm.weight": weight(64, seed=index) for index in range(200)}
    tensors |= {"model.layers.0.mlp.up_proj.weight": weight(4096, 2048)}
    source = write_checkpoint(tmp_path / "model", tensors)
    hub = serve(source)
    converted(REPO, tmp_path / "out", scheme="W4A16")
    ranges = bodies(hub, "safetensors")
    assert 4 <= len(ranges) <= 10
    assert max(end - start for start, end in ranges) <= 4 << 20


def test_a_budget_of_few_megabytes_changes_no_byte(serve: Start, model: Path, tmp_path: Path) -> None:
    serve(model)
    assert converted(REPO, tmp_path / "remote", max_memory="15MB") == converted(model, tmp_path / "local")


@pytest.mark.parametrize("layout", ["columns", "interleaved"])
def test_stacks_of_experts_whose_rows_lie_apart_come_out_the_same(serve: Start, tmp_path: Path, layout: str) -> None:
    model_type = {"columns": "llama4_text", "interleaved": "gpt_oss"}[layout]
    folder = stacked_experts(tmp_path / "model", layout, model_type)
    serve(folder)
    for scheme in ("FP8_DYNAMIC", "NVFP4A16"):
        assert converted(REPO, tmp_path / f"r{scheme}", scheme=scheme) == converted(folder, tmp_path / f"l{scheme}", scheme=scheme)


def test_codes_of_gpt_oss_come_out_the_same(serve: Start, tmp_path: Path) -> None:
    folder, _ = gpt_oss(tmp_path / "model")
    serve(folder)
    assert converted(REPO, tmp_path / "remote") == converted(folder, tmp_path / "local")


def test_what_is_read_twice_and_fits_no_memory_is_fetched_once_and_kept_without_a_name(
    serve: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"model.layers.0.mlp.{role}_proj.weight": weight(4096, 1024, seed=seed) for seed, role in enumerate(("gate", "up"))}
    folder = write_checkpoint(tmp_path / "model", tensors)
    hub = serve(folder)
    names: set[str] = set()

    def look(_: object) -> None:
        names.update(path.name for path in (tmp_path / "remote" / ".streamquant").iterdir())

    remote = converted(REPO, tmp_path / "remote", max_memory="16MB", on_progress=look)
    assert remote == converted(folder, tmp_path / "local")
    assert names == {"journal.jsonl", "model.safetensors.part"}
    counts = Counter(byte for start, end in bodies(hub, "safetensors")[1:] for byte in range(start, end, 1024))
    assert set(counts.values()) == {1}


def test_a_conversion_that_needs_room_for_what_it_keeps_says_so(serve: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"model.layers.0.mlp.{role}_proj.weight": weight(4096, 1024, seed=seed) for seed, role in enumerate(("gate", "up"))}
    serve(write_checkpoint(tmp_path / "model", tensors))
    free = streamquant.plan(REPO, scheme="NVFP4A16").output_bytes + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": free}))
    with pytest.raises(streamquant.StorageError, match=r"needs \d+ bytes more"):
        converted(REPO, tmp_path / "out", max_memory="16MB")
    converted(REPO, tmp_path / "out")


# --- what a SOURCE may be --------------------------------------------------------------------------------------------


def test_a_folder_or_a_file_of_a_repository_is_a_source(serve: Start, tmp_path: Path) -> None:
    part = write_checkpoint(tmp_path / "pipeline" / "transformer", {"blocks.0.attn.to_q.weight": weight(128, 128)}, side_files={"x": "y"})
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    hub = serve(tmp_path / "pipeline")
    local = converted(part, tmp_path / "local", scheme="W4A16")
    commit = hub.commit(REPO)
    for number, url in enumerate(
        (f"hf://{REPO}/transformer", f"hf://{REPO}@{commit}/transformer/", f"{hub.endpoint}/{REPO}/tree/main/transformer")
    ):
        assert converted(url, tmp_path / f"out{number}", scheme="W4A16") == local
    one_file = converted(f"hf://{REPO}/transformer/model.safetensors", tmp_path / "file", scheme="W4A16")
    assert one_file == {name: content for name, content in local.items() if name != "x"}
    with pytest.raises(CheckpointError, match=r"there is no org/model/vae at revision"):
        streamquant.plan(f"hf://{REPO}/vae", scheme="W4A16")


def test_every_command_takes_a_model_on_the_hub(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model)
    out = str(tmp_path / "out")
    for args in (
        ("plan", REPO, "--scheme", "W4A16", "--revision", "main"),
        ("inspect", REPO, "--revision", hub.commit(REPO)),
        ("convert", REPO, out, "--scheme", "W4A16", "--dry-run"),
        ("convert", REPO, out, "--scheme", "W4A16"),
        ("verify", out, "--against", REPO, "--revision", "main"),
    ):
        done = run(hub, tmp_path, *args)
        assert done.returncode == 0, done.stderr
        assert args[0] in {"inspect", "verify"} or f"source      {REPO} at {hub.commit(REPO)}\n" in done.stdout


def test_comparing_with_the_hub_reads_it_by_large_pieces(serve: Start, tmp_path: Path) -> None:
    converted(WIKI_LLAMA, tmp_path / "out")
    hub = serve(WIKI_LLAMA)
    report = streamquant.verify(tmp_path / "out", against=REPO)
    assert not report.problems
    assert report.num_copied == 15
    num_shards = len(list(WIKI_LLAMA.glob("*.safetensors")))
    assert len(bodies(hub, "safetensors")) < 4 * num_shards


@pytest.mark.parametrize(
    ("source", "settings", "error", "said"),
    [
        ("org/other", {}, CheckpointError, r"org/other is neither here nor on http://127.0.0.1:\d+; check the name, or log in"),
        (REPO, {"revision": "v9"}, CheckpointError, "org/model has no revision v9, or no longer"),
        ("./org/model", {}, CheckpointError, "org/model does not exist; SOURCE is a directory"),
        ("org/model/deeper", {}, CheckpointError, "org/model/deeper does not exist; SOURCE is a directory"),
        ("model.safetensors", {}, CheckpointError, "model.safetensors does not exist"),
        ("hf://datasets/org/model", {}, RequestError, "names no model; write hf://org/model"),
        ("hf://org/model@a", {"revision": "b"}, RequestError, "has a revision, and --revision b is another"),
        ("--bad--/name", {}, CheckpointError, "does not exist"),
        ("bad..name", {}, CheckpointError, "bad..name is neither here nor on"),
    ],
)
def test_a_source_that_is_not_there_is_told_in_a_line(
    serve: Start, model: Path, source: str, settings: dict[str, str], error: type[Exception], said: str
) -> None:
    serve(model)
    with pytest.raises(error, match=said):
        streamquant.inspect(source, **settings)


def test_revisions_and_the_cache_mean_nothing_to_a_local_source(model: Path, tmp_path: Path) -> None:
    for settings in ({"revision": "main"}, {"cache": True}):
        with pytest.raises(RequestError, match="is no model on the Hub, which is what --revision and --cache are for"):
            converted(model, tmp_path / "out", **settings)


# --- access ----------------------------------------------------------------------------------------------------------


def test_a_gated_model_takes_a_token_which_nobody_else_sees(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model, token=TOKEN)
    with pytest.raises(
        CheckpointError, match=r"org/model is gated: accept its conditions at .*/org/model, and log in with `hf auth login`"
    ):
        streamquant.inspect(REPO)
    out, report, log = tmp_path / "out", tmp_path / "report.json", tmp_path / "log"
    hub.fail("*.safetensors", "reset", times=2, host="cdn")
    stopped = run(hub, tmp_path, "convert", REPO, str(out), "--scheme", "W4A16", "--threads", "x", HF_TOKEN=TOKEN)
    done = run(hub, tmp_path, "convert", REPO, str(out), "--scheme", "W4A16", "--report", str(report), HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert hub.leaked_tokens == []
    said = [stopped.stdout, stopped.stderr, done.stdout, done.stderr, report.read_text(), *(log.read_text() if log.exists() else "")]
    said += [content.decode("latin-1") for content in file_bytes(out).values()]
    assert not any(TOKEN in text or "Signature" in text for text in said)


def test_a_private_model_is_not_there_without_a_token(serve: Start, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(model, token=TOKEN, private=True)
    with pytest.raises(CheckpointError, match="is neither here nor on"):
        streamquant.inspect(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert streamquant.inspect(REPO).num_parameters > 0


def test_errors_of_the_network_hold_no_token_and_no_signed_address(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model, token=TOKEN)
    hub.fail("*", "503", times=10_000, host="cdn")
    failed = run(hub, tmp_path, "inspect", REPO, HF_TOKEN=TOKEN)
    assert failed.returncode == 5
    assert "localhost answers 503 Service Unavailable, 11 times in a row" in failed.stderr
    assert TOKEN not in failed.stderr
    assert "Signature" not in failed.stderr


# --- the network fails -----------------------------------------------------------------------------------------------

TRANSIENT = ["429", "500", "503", "reset", "truncate", "stall", "expire"]


@pytest.mark.parametrize("kind", TRANSIENT)
def test_what_passes_is_waited_for(serve: Start, model: Path, tmp_path: Path, kind: str) -> None:
    hub = serve(model, stall_seconds=3.0)
    expected = converted(model, tmp_path / "local")
    hub.fail("*/model-00002*", kind, times=2, host="cdn")
    if kind != "expire":
        hub.fail("*/resolve/*/model-00001*", kind, times=2, host="hub")
        hub.fail("/api/models/*", kind, times=2, host="hub")
        hub.fail("*/tokenizer.json", kind, times=2, host="hub")
    assert converted(REPO, tmp_path / "remote") == expected
    assert [request.fault for request in hub.requests].count(kind) >= (2 if kind == "expire" else 8)


def test_a_fifth_of_all_requests_may_fail(serve: Start, tmp_path: Path) -> None:
    serve(WIKI_LLAMA, faults=0.2, seed=3, stall_seconds=1.0)
    assert converted(REPO, tmp_path / "remote") == converted(WIKI_LLAMA, tmp_path / "local")


def test_a_broken_answer_is_gone_on_with_where_it_broke(serve: Start, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": weight(2048, 1024)})
    hub = serve(folder)
    hub.fail("*.safetensors", "truncate", host="cdn")
    with open_source(REPO) as source:
        buffer = bytearray(source.sizes()["model.safetensors"])
        source.read("model.safetensors", 0, memoryview(buffer))
    assert bytes(buffer) == (folder / "model.safetensors").read_bytes()
    (first, whole), (again, end) = bodies(hub, "safetensors")
    assert (first, whole, end) == (0, len(buffer), len(buffer))
    assert again == len(buffer) // 2


def test_addresses_may_expire_all_the_time(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model, url_requests=1)
    assert converted(REPO, tmp_path / "remote") == converted(model, tmp_path / "local")
    assert any(request.status == 403 for request in hub.requests)


def test_the_server_says_how_long_to_wait(serve: Start, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout)
        return False

    hub = serve(model, retry_after=7)
    hub.fail("*.safetensors", "429", host="cdn")
    monkeypatch.setattr(threading.Event, "wait", wait)
    streamquant.inspect(REPO)
    assert any(timeout is not None and 7 <= timeout < 7.5 for timeout in waits)


@pytest.mark.parametrize(("text", "seconds"), [("120", 120.0), (" 0 ", 0.0), (None, None), ("soon", None), ("-3", None)])
def test_retry_after_is_read_as_the_standard_has_it(text: str | None, seconds: float | None) -> None:
    assert retry.seconds_to_wait(text) == seconds


def test_retry_after_may_be_a_date() -> None:
    at = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert retry.seconds_to_wait(at) == pytest.approx(100, abs=2)
    assert retry.seconds_to_wait("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0


def test_waits_grow_with_jitter_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_SECONDS", 0.25)
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", waits.append)
    attempts = retry.Attempts("x", stop)
    for _ in range(retry.MAX_FAILURES):
        attempts.wait(retry.Transient("busy"))
    with pytest.raises(NetworkError, match="x: busy, 11 times in a row; the same command goes on"):
        attempts.wait(retry.Transient("busy"))
    assert all(2**n / 8 <= wait <= 2**n / 4 for n, wait in enumerate(waits[:7]))
    assert all(15 <= wait <= 30 for wait in waits[7:])
    assert 60 < sum(waits) < 160
    with pytest.raises(NetworkError, match="asks to wait 3600 s"):
        retry.Attempts("x", stop).wait(retry.Transient("busy", after=3600.0))


def test_a_tensor_that_cannot_be_fetched_ends_the_run_with_5_and_the_same_command_goes_on(
    serve: Start, model: Path, tmp_path: Path
) -> None:
    hub = serve(model)
    args = ("convert", REPO, str(tmp_path / "out"), "--scheme", "NVFP4A16", "--max-memory", "15MB", "--quiet")
    hub.fail("*/model-00002*", "503", times=10_000, host="cdn", method="GET")
    assert run(hub, tmp_path, "inspect", REPO).returncode == 5
    hub.close()
    hub = serve(model)
    assert run(hub, tmp_path, "plan", REPO, "--scheme", "NVFP4A16").returncode == 0
    out = tmp_path / "out"

    def break_it() -> None:
        while not (out / ".streamquant").exists():
            time.sleep(0.001)
        hub.fail("*", "503", times=10_000, host="cdn", method="GET")

    breaker = threading.Thread(target=break_it)
    breaker.start()
    failed = run(hub, tmp_path, *args)
    breaker.join()
    assert failed.returncode == 5, failed.stderr
    assert failed.stderr.count("\n") == 1
    assert "of org/model: localhost answers 503 Service Unavailable, 11 times in a row; the same command goes on" in failed.stderr
    assert not (out / "config.json").exists()
    hub.close()
    again = run(serve(model), tmp_path, *args)
    assert again.returncode == 0, again.stderr
    expected = converted(model, tmp_path / "local")
    assert {file: content for file, content in file_bytes(out).items() if file != "streamquant.json"} == expected


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("etag", CheckpointError, "its ETag on localhost changed while it was read: the source changed"),
        ("length", CheckpointError, "when it was listed: the source changed"),
        ("norange", NetworkError, "does not answer with the range of bytes that it was asked for; --cache downloads whole files"),
        ("missing", NetworkError, "answers 404 Not Found"),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(serve: Start, model: Path, kind: str, error: type[Exception], said: str) -> None:
    hub = serve(model)
    file = "model-00001-of-00002.safetensors"
    with open_source(REPO) as source:
        source.read(file, 0, memoryview(bytearray(8)))
        hub.fail("*.safetensors", kind, host="cdn", method="GET")
        num_requests = len(hub.requests)
        with pytest.raises(error, match=rf"{file} of org/model: .*{said}"):
            source.read(file, 8, memoryview(bytearray(8)))
        assert len(hub.requests) == num_requests + 1


def test_a_repository_that_changes_in_the_middle_is_not_mixed(serve: Start, model: Path, tmp_path: Path) -> None:
    serve(model)
    out = tmp_path / "out"
    with open_source(REPO) as source:
        first = source.revision
        (model / "README.md").write_text("a new commit")
        with pytest.raises(CheckpointError, match=rf"org/model has no revision {first}, or no longer"):
            source.read("model-00001-of-00002.safetensors", 0, memoryview(bytearray(8)))
    converted(REPO, out)
    with pytest.raises(RequestError, match=r"another job: its source revision is .*; choose another OUT"):
        (model / "README.md").write_text("another commit")
        converted(REPO, out)


def test_a_killed_job_whose_branch_moved_on_says_how_to_go_on(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model)
    out = tmp_path / "out"

    class Stop(BaseException):
        pass

    def stop(_: object) -> None:
        raise Stop

    before = hub.commit(REPO)
    with pytest.raises(Stop):
        converted(REPO, out, on_progress=stop)
    (model / "README.md").write_text("another commit")
    with pytest.raises(RequestError, match=rf"its source revision is \"{before}\".*; --revision {before} goes on with it, or choose"):
        converted(REPO, out)
    (model / "README.md").unlink()
    assert converted(REPO, out, revision=before) == converted(model, tmp_path / "local")


def test_sigterm_does_not_wait_for_the_network(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model, stall_seconds=300.0)
    out = tmp_path / "out"
    args = command("convert", REPO, str(out), "--scheme", "W4A16", "--quiet")
    process = subprocess.Popen(args, cwd=ROOT, env=environment(hub, tmp_path), stderr=subprocess.PIPE, text=True)
    while not (out / ".streamquant").exists() and process.poll() is None:
        time.sleep(0.001)
    hub.fail("*", "stall", times=10_000)
    while not any(request.fault == "stall" for request in hub.requests) and process.poll() is None:
        time.sleep(0.001)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 25  # after 30 s without a byte it would connect anew
    assert (process.returncode, said) == (75, "error: stopped by SIGTERM; the same command goes on where it was\n")


# --- the cache -------------------------------------------------------------------------------------------------------


def weights_fetched(hub: FakeHub) -> int:
    return sum(1 for request in hub.requests if request.host == "cdn" and request.method == "GET")


def test_files_in_the_cache_are_read_from_there(serve: Start, model: Path, tmp_path: Path) -> None:
    hub = serve(model)
    huggingface_hub.hf_hub_download(REPO, "model-00001-of-00002.safetensors", cache_dir=str(tmp_path / "cache"), endpoint=hub.endpoint)
    before = weights_fetched(hub)
    hub.requests.clear()
    remote = converted(REPO, tmp_path / "out")
    assert remote == converted(model, tmp_path / "local")
    assert before == 1
    assert bodies(hub, "model-00002-of-00002.safetensors")
    assert not bodies(hub, "model-00001-of-00002.safetensors")
    with open_source(REPO) as source:
        assert source.num_connections > 0


def test_the_cache_is_filled_when_that_is_asked_for_and_serves_without_a_network(
    serve: Start, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = serve(model)
    hub.fail("*/model-00002*", "503", host="cdn")
    first = converted(REPO, tmp_path / "out", cache=True)
    assert first == converted(model, tmp_path / "local")
    record = (tmp_path / "out" / "streamquant.json").read_bytes()
    fetched = weights_fetched(hub)
    assert converted(REPO, tmp_path / "again") == first
    assert weights_fetched(hub) == fetched
    hub.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert converted(REPO, tmp_path / "offline") == first
    assert (tmp_path / "offline" / "streamquant.json").read_bytes() == record
    with pytest.raises(CheckpointError, match="org/other is neither here nor in the cache of the Hub, and HF_HUB_OFFLINE is set"):
        streamquant.inspect("org/other")


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../x", "/etc/hostname", "a//b", "\x1b[31m", "a\0b", "\ud800", "\u202ea"])
def test_hostile_names_in_a_listing_are_refused(
    serve: Start, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hub = serve(model)
    huggingface_hub.hf_hub_download(REPO, "config.json", cache_dir=str(tmp_path / "cache"), endpoint=hub.endpoint)
    honest, entry = HubSource._list, _File(Path("/etc/hostname").stat().st_size, "0" * 40)
    monkeypatch.setattr(HubSource, "_list", lambda self: (honest(self)[0], {name: entry} | honest(self)[1]))
    with HubSource(REPO) as source, pytest.raises(CheckpointError, match=r"org/model holds .*, which (leaves the folder|has control)"):
        read_checkpoint(source)


def test_the_source_is_closed(serve: Start, model: Path) -> None:
    """A socket that is not closed is a warning when it is collected, which is an error here."""
    serve(model)
    with HubSource(REPO) as source:
        source.read("model-00001-of-00002.safetensors", 0, memoryview(bytearray(100)))
        assert sum(map(len, source._http._idle.values())) == 1
    assert not source._http._idle
    del source
    gc.collect()
