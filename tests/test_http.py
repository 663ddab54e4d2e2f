"""Ranges by HTTP, over TLS and through proxies, against a few lines of server each."""

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from streamquant.checkpoint.http import HttpReader, Location
from streamquant.checkpoint.retry import Transient
from streamquant.errors import NetworkError, StreamquantError

CONTENT = bytes(range(256)) * 1000


class Ranges(BaseHTTPRequestHandler):
    """Serves CONTENT by ranges; a path that begins with /to/ leads to what follows."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.seen.append(dict(self.headers))  # type: ignore[attr-defined]
        start, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(CONTENT)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : end + 1])

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Ranges)
        self.seen: list[dict[str, str]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that break off are part of the tests."""


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start(opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    monkeypatch.setenv("NO_PROXY", "*")

    def start(context: ssl.SSLContext | None = None) -> Server:
        server = opened.enter_context(Server())
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        opened.callback(thread.join)
        opened.callback(server.shutdown)
        return server

    return start


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate")
    file = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(file), "-out", str(tmp_path / "public.pem")]
    subprocess.run([*command, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    with file.open("a") as both:
        both.write((tmp_path / "public.pem").read_text())
    return file


def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def fetch(reader: HttpReader, url: str, start: int = 1000, end: int = 200_000, headers: dict[str, str] | None = None) -> bytes:
    buffer = bytearray(end - start)
    assert sum(reader.read(Location(url, headers or {}, len(CONTENT)), start, memoryview(buffer))) == len(buffer)
    return bytes(buffer)


def test_a_connection_is_used_again_and_opened_anew_when_the_server_closed_it(start: Callable[..., Server]) -> None:
    server, reader = start(), HttpReader()
    url = f"http://localhost:{server.server_port}/x"
    for _ in range(2):
        assert fetch(reader, url) == CONTENT[1000:200_000]
        (connections,) = reader._idle.values()
        assert len(connections) == 1
        assert connections[0].sock is not None
        connections[0].sock.shutdown(socket.SHUT_RDWR)  # as a server does that waited long enough
    reader.close()


def test_headers_go_to_the_first_host_only(start: Callable[..., Server]) -> None:
    first, second, reader = start(), start(), HttpReader()
    url = f"http://localhost:{first.server_port}/to/http://localhost:{second.server_port}/x"
    assert fetch(reader, url, headers={"Authorization": "secret"}) == CONTENT[1000:200_000]
    assert "Authorization" not in second.seen[0]
    assert fetch(reader, f"http://localhost:{first.server_port}/to//x", headers={"Authorization": "secret"}) == CONTENT[1000:200_000]
    assert first.seen[0]["Authorization"] == "secret"
    for target, said in (
        ("file:///etc/passwd", "not of http or https"),
        ("http://a..b/", "not of http"),
        ("http://[/", "not of http"),
        ("https:///x", "not of http"),
        ("", "redirects to nowhere"),
        ("//localhost:1/", "refused"),
    ):
        with pytest.raises((StreamquantError, Transient), match=said):
            fetch(reader, f"http://localhost:{first.server_port}/to/{target}")
    reader.close()


def test_redirects_in_a_circle_end(start: Callable[..., Server]) -> None:
    server, reader = start(), HttpReader()
    circle = "".join("/to/" for _ in range(20))
    with pytest.raises(NetworkError, match="localhost redirects more than 5 times"):
        fetch(reader, f"http://localhost:{server.server_port}{circle}/x")
    reader.close()


def test_a_certificate_must_be_trusted(start: Callable[..., Server], certificate: Path) -> None:
    server = start(server_context(certificate))
    url = f"https://localhost:{server.server_port}/x"
    reader = HttpReader(lambda: ssl.create_default_context(cafile=certificate))
    assert fetch(reader, url) == CONTENT[1000:200_000]
    reader.close()
    with pytest.raises(NetworkError, match=r"localhost has a certificate that is not trusted: self.signed certificate"):
        fetch(HttpReader(), url)


def answer_once(opened: ExitStack, answer: Callable[[socket.socket], None]) -> int:
    """The port of a server that hands its first connection to `answer`."""
    listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))

    def accept() -> None:
        with suppress(OSError):  # of a client that went away
            connection, _ = listener.accept()
            with connection:
                answer(connection)

    thread = threading.Thread(target=accept)
    thread.start()
    opened.callback(thread.join)
    return int(listener.getsockname()[1])


def test_a_proxy_is_asked_for_whole_addresses_and_gets_its_password(opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 206 x\r\nContent-Range: bytes 2-4/10\r\nContent-Length: 3\r\n\r\ncde")

    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("http_proxy", f"http://user:pass%21@127.0.0.1:{answer_once(opened, answer)}")
    reader, buffer = HttpReader(), bytearray(3)
    assert sum(reader.read(Location("http://elsewhere.invalid/x?y=1", {}, 10), 2, memoryview(buffer))) == 3
    reader.close()
    assert buffer == b"cde"
    assert asked[0].startswith(b"GET http://elsewhere.invalid/x?y=1 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNzIQ==\r\n" in asked[0]


def test_a_tunnel_is_dug_through_a_proxy_for_https(
    opened: ExitStack, start: Callable[..., Server], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(server_context(certificate))
    asked: list[bytes] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while received := source.recv(65536):
                target.sendall(received)

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        with socket.create_connection(("127.0.0.1", server.server_port)) as beyond:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=pump, args=(beyond, connection))
            back.start()
            pump(connection, beyond)
            beyond.shutdown(socket.SHUT_RDWR)
            back.join()

    port = answer_once(opened, answer)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("https_proxy", f"user:pass@127.0.0.1:{port}")
    reader = HttpReader(lambda: ssl.create_default_context(cafile=certificate))
    assert fetch(reader, "https://localhost:1/x", headers={"Authorization": "secret"}) == CONTENT[1000:200_000]
    reader.close()
    assert asked[0].startswith(b"CONNECT localhost:1 HTTP/1.")
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNz" in asked[0]
    assert b"secret" not in asked[0]
    assert "Proxy-Authorization" not in server.seen[0]


HEAD_OF_LAST_ANSWER = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 199000\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("head", [b"", HEAD_OF_LAST_ANSWER], ids=["for an answer", "for the rest of the last answer"])
def test_stopping_wakes_whoever_waits(opened: ExitStack, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    """Also where http.client has given the socket away to the answer, since the connection ends with it."""
    asked, done = threading.Event(), threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head)
        asked.set()
        done.wait(60)

    monkeypatch.setenv("NO_PROXY", "*")
    port = answer_once(opened, answer)
    opened.callback(done.set)
    reader = HttpReader()

    def stop() -> None:
        asked.wait(20)
        time.sleep(0.2)  # for the answer to be parsed
        reader.stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    started = time.monotonic()
    with pytest.raises(Transient), reader.get(Location(f"http://localhost:{port}/x", {}, 199_000)) as (response, _):
        response.read()
    assert time.monotonic() - started < 20
    stopper.join()
    with pytest.raises(NetworkError, match="localhost: stopped"):
        fetch(reader, f"http://localhost:{port}/x")


def test_a_connection_made_while_stopping_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, opened: ExitStack) -> None:
    done = threading.Event()

    def answer(connection: socket.socket) -> None:
        del connection
        done.wait(60)

    port = answer_once(opened, answer)
    opened.callback(done.set)
    monkeypatch.setenv("NO_PROXY", "*")
    reader = HttpReader()
    connect = http.client.HTTPConnection.connect

    def stopped_meanwhile(connection: http.client.HTTPConnection) -> None:
        connect(connection)
        reader.stop()

    monkeypatch.setattr(http.client.HTTPConnection, "connect", stopped_meanwhile)
    with pytest.raises(Transient, match="stopped"):
        fetch(reader, f"http://localhost:{port}/x")
