from __future__ import annotations

import base64
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

from dbcap import __version__, web
from dbcap.errors import InputError

BODY = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, dict[str, str]]]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        name, _, rest = self.path[1:].partition("/")
        getattr(self, f"get_{name.partition('?')[0]}", self.get_data)(rest)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def get_data(self, _: str) -> None:
        self.answer(BODY)

    def get_status(self, rest: str) -> None:
        self.answer(b"\x1b[31mno", int(rest))

    def get_chunked(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(0, len(BODY), 1000):
            part = BODY[at : at + 1000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def get_endless(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            self.close_connection = True

    def get_short(self, _: str) -> None:
        self.answer(BODY[:100], **{"Content-Length": str(len(BODY))})
        self.close_connection = True

    def get_to(self, rest: str) -> None:
        self.answer(b"", 302, Location=unquote(rest).encode().decode("latin-1"))

    def get_nowhere(self, _: str) -> None:
        self.answer(b"", 302)

    def get_loop(self, _: str) -> None:
        self.answer(b"", 301, Location="/loop/")

    def get_hops(self, rest: str) -> None:
        self.answer(b"", 307, Location=f"/hops/{int(rest) - 1}" if int(rest) > 1 else "/data/")

    def get_drip(self, rest: str) -> None:
        """Send a byte each 50 ms: within the `head` (header lines) or the `body`."""
        try:
            if rest == "body":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(400):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def get_silent(self, _: str) -> None:
        time.sleep(1.5)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.seen = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def at(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def problem(url: str, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        web.fetch(url, **options)  # type: ignore[arg-type]
    assert str(caught.value).isprintable()
    return caught.value


def test_fetches(at: str, server: ThreadingHTTPServer) -> None:
    assert web.fetch(f"{at}/data/") == BODY
    assert web.fetch(f"{at}/chunked/") == BODY
    path, headers = server.seen[0]  # type: ignore[attr-defined]
    assert path == "/data/"
    assert headers["User-Agent"] == f"dbcap/{__version__}"


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("", "/"),
        ("/a b/ü.jpg?q=ä&r=1%20#part", "/a%20b/%C3%BC.jpg?q=%C3%A4&r=1%20"),
        ("/50%.jpg", "/50%25.jpg"),
        ("/caf\udce9.jpg", "/caf%E9.jpg"),  # a byte of a command line that is not UTF-8
    ],
)
def test_urls_are_quoted_once(at: str, server: ThreadingHTTPServer, asked: str, sent: str) -> None:
    assert web.fetch(at + asked) == BODY
    assert server.seen[0][0] == sent  # type: ignore[attr-defined]


def test_host_name_outside_ascii(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo
    asked: list[object] = []

    def local(host: object, *rest: object, **options: object) -> object:
        asked.append(host)
        return look_up("127.0.0.1", *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", local)
    assert web.fetch(f"http://bücher.example:{at.rpartition(':')[2]}/data/") == BODY
    assert asked == ["xn--bcher-kva.example"]


def test_every_address_of_a_host_is_tried(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def two(host: str, port: int, **options: object) -> list[object]:
        dead = look_up("127.0.0.1", free_port(), type=socket.SOCK_STREAM)
        return [*dead, *look_up(host, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert web.fetch(f"{at}/data/") == BODY


# ---- redirects


def test_redirects_are_followed(at: str, server: ThreadingHTTPServer) -> None:
    assert web.fetch(f"{at}/to//data/") == BODY
    assert web.fetch(f"{at}/to/{at}/data/ü") == BODY
    assert server.seen[-1][0] == "/data/%C3%BC"  # type: ignore[attr-defined]
    assert web.fetch(f"{at}/hops/5") == BODY


def test_too_many_redirects(at: str, server: ThreadingHTTPServer) -> None:
    for path in ("/hops/6", "/loop/"):
        server.seen.clear()  # type: ignore[attr-defined]
        error = problem(at + path)
        assert (error.kind, error.message) == ("url", "redirects more than 5 times")
        assert len(server.seen) == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "javascript:1"]
)
def test_redirect_to_another_scheme_is_refused(at: str, target: str) -> None:
    error = problem(f"{at}/to/{target}")
    assert error.kind == "url"
    assert "not http or https" in error.message


def test_redirect_to_nothing(at: str) -> None:
    assert problem(f"{at}/nowhere/").kind == "url"
    assert problem(f"{at}/to/http://[bad/").kind == "url"


# ---- refusals


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/x.jpg", "file:///etc/passwd", "data:,x", "x.jpg", "", "http:///x", "//host/x"]
)
def test_only_http_and_https(url: str) -> None:
    assert problem(url).kind == "url"


@pytest.mark.parametrize("url", ["http://host:99999/", "http://host:port/", "http://[::1/", f"http://{'a' * 70}.org/"])
def test_malformed_urls(url: str) -> None:
    assert problem(url).kind == "url"


def test_status(at: str) -> None:
    error = problem(f"{at}/status/404")
    assert (error.kind, error.message) == ("url-status", "the server answered 404 Not Found")
    assert problem(f"{at}/status/599").message == "the server answered 599"


def test_too_large(at: str, server: ThreadingHTTPServer) -> None:
    for path in ("/data/", "/chunked/", "/endless/"):
        error = problem(at + path, max_bytes=len(BODY) - 1)
        assert (error.kind, error.message) == ("too-large", "has more than 10,239 bytes")
    assert web.fetch(f"{at}/data/", max_bytes=len(BODY)) == BODY
    assert web.fetch(f"{at}/chunked/", max_bytes=len(BODY)) == BODY


def test_cut_off(at: str) -> None:
    error = problem(f"{at}/short/")
    assert error.kind == "url-unreachable"
    assert "ended before the end" in error.message


@pytest.mark.parametrize("path", ["/drip/head", "/drip/body", "/silent/"])
def test_time_limit_is_for_the_whole_transfer(at: str, path: str) -> None:
    start = time.monotonic()
    error = problem(at + path, timeout=0.4)
    assert time.monotonic() - start < 1.2
    assert (error.kind, error.message) == ("url-timeout", "was not fetched within 0.4 seconds")


def test_time_limit_holds_for_a_chain_of_redirects(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Handler.get_loop

    def slowly(self: Handler, rest: str) -> None:
        time.sleep(0.15)
        slow(self, rest)

    monkeypatch.setattr(Handler, "get_loop", slowly)
    assert problem(f"{at}/loop/", timeout=0.4).kind == "url-timeout"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_connection_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    error = problem(f"http://127.0.0.1:{free_port()}/x.jpg")
    assert (error.kind, error.message) == ("url-unreachable", "cannot be fetched: Connection refused")


@pytest.mark.parametrize(
    "answer", [b"", b"\x1b[31mnot http\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n"]
)
def test_answer_that_is_not_http(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            sock, _ = server.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        error = problem(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()
    assert error.kind == "url-unreachable"
    assert ("not HTTP" if answer else "ended before") in error.message


def test_https_to_a_plain_server(at: str) -> None:
    error = problem(at.replace("http", "https") + "/data/", timeout=5)
    assert error.kind == "url-unreachable"


def test_tls_handshake_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.monotonic()
        error = problem(f"https://127.0.0.1:{server.getsockname()[1]}/", timeout=0.4)
    assert error.kind == "url-timeout"
    assert time.monotonic() - start < 1.2


# ---- credentials


def test_credentials_are_sent_to_that_host_only(at: str, server: ThreadingHTTPServer) -> None:
    host = at.removeprefix("http://")
    assert web.fetch(f"http://me:pass%20w%C3%B6rd@{host}/to//data/") == BODY
    expected = "Basic " + base64.b64encode("me:pass wörd".encode()).decode()
    assert [headers.get("Authorization") for _, headers in server.seen] == [expected, expected]  # type: ignore[attr-defined]
    server.seen.clear()  # type: ignore[attr-defined]
    assert web.fetch(f"http://me:secret@{host}/to/http://localhost:{server.server_port}/data/") == BODY
    assert [("Authorization" in headers) for _, headers in server.seen] == [True, False]  # type: ignore[attr-defined]


def test_credentials_are_in_no_message(at: str) -> None:
    host = at.removeprefix("http://")
    urls = [
        f"http://me:secret@{host}/status/403",
        f"http://me:secret@{host}/to/ftp://me:secret@x/",
        f"http://me:secret@{host}/loop/",
        f"http://me:secret@127.0.0.1:{free_port()}/",
        "http://me:secret@host:port/",
        "ftp://me:secret@host/",
        "http://me:secret@/",
    ]
    for url in urls:
        assert "secret" not in str(problem(url)), url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:secret@host/a@b", "http://***@host/a@b"),
        ("https://me@host", "https://***@host"),
        ("http://me:p@ss@host:8/x", "http://***@host:8/x"),
        ("http://host/a@b", "http://host/a@b"),
        ("http://host?mail=me@home", "http://host?mail=me@home"),
        ("plain@name.jpg", "plain@name.jpg"),
    ],
)
def test_without_credentials(url: str, shown: str) -> None:
    assert web.without_credentials(url) == shown


def test_proxy_of_the_environment(at: str, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", at)
    assert web.fetch("http://host.example/data/") == BODY
    assert server.seen[0][0] == "http://host.example/data/"  # type: ignore[attr-defined]
