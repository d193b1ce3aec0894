"""Fetch a picture's bytes over http or https: limited in time and size, and nowhere but where the scheme allows.

Messages name neither the URL (the caller puts it before them, see `without_credentials`) nor anything the server wrote.
Kinds of `InputError`: `url` (no http(s) address, or a redirect to none), `url-status` (the server answered no),
`url-timeout`, `url-unreachable` (connection, certificate, broken answer), `too-large`.
"""

from __future__ import annotations

import base64
import functools
import http
import http.client
import io
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from dbcap import __version__
from dbcap.errors import InputError

MAX_REDIRECTS = 5
_CHUNK = 1 << 16
_UNRESERVED = "%/:=&?~+!$,;'@()*[]"


def fetch(url: str, *, timeout: float = 30.0, max_bytes: int = 64 * 1024 * 1024) -> bytes:
    """Return the body at `url`. `timeout` (seconds) is for all of it, redirects included; `max_bytes` for the body.

    Only the system's look-up of host names has limits of its own. Proxies are taken from the environment.
    """
    deadline = _Deadline(timeout)
    # No redirect, file, ftp or data handler: this opener knows two schemes, and every answer comes back as it is.
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _HttpHandler(deadline), _HttpsHandler(deadline)):
        opener.add_handler(handler)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with opener.open(_request(url), timeout=deadline.left()) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return _body(response, max_bytes)
                url = _redirected(url, response.headers.get("Location", ""))
    except TimeoutError as error:
        raise _timed_out(timeout) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _timed_out(timeout) from error
        raise _unreachable(error.reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(error) from error
    raise InputError(f"redirects more than {MAX_REDIRECTS} times", "use the address it leads to", kind="url")


def without_credentials(url: str) -> str:
    """Return `url` as it may be shown: a user and password in it are replaced by `***`."""
    return re.sub("^([a-zA-Z][a-zA-Z0-9+.-]*://)[^/?#]*@", r"\1***@", url)


def _request(url: str) -> urllib.request.Request:
    """Make the request: everything outside ASCII quoted, user and password moved from the URL into a header."""
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
        host = host and (f"[{host}]" if ":" in host else host.encode("idna").decode())
    except ValueError:  # a bad port, bracket or host name
        raise InputError("is no valid URL", "check its host and port", kind="url") from None
    if scheme not in ("http", "https"):
        raise InputError(f"has the scheme {scheme!r}", "only http and https URLs are fetched", kind="url")
    if not host:
        raise InputError("is no valid URL: it names no host", "check its spelling", kind="url")
    place = host if port is None else f"{host}:{port}"
    clean = urllib.parse.urlunsplit((scheme, place, _quoted(parts.path), _quoted(parts.query), ""))
    headers = {"User-Agent": f"dbcap/{__version__}", "Accept": "image/*,*/*;q=0.5"}
    if parts.username is not None:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode("utf-8", "surrogateescape")).decode()
    return urllib.request.Request(clean, headers=headers)


def _quoted(text: str) -> str:
    """Percent-encode what a URL cannot hold as it is; what is encoded already stays."""
    text = re.sub("%(?![0-9a-fA-F]{2})", "%25", text)
    return urllib.parse.quote(text, safe=_UNRESERVED, errors="surrogateescape")


def _redirected(url: str, location: str) -> str:
    """Return the URL that a redirect from `url` leads to; user and password are not taken along to another host."""
    if not location:
        raise InputError("redirects without saying where to", kind="url")
    try:
        # http.client reads headers as Latin-1, servers write UTF-8.
        target = urllib.parse.urljoin(url, location.encode("latin-1").decode("utf-8", "surrogateescape"))
        scheme = urllib.parse.urlsplit(target).scheme
    except ValueError:
        raise InputError("redirects to no valid URL", kind="url") from None
    if scheme not in ("http", "https"):
        raise InputError("redirects to something that is not http or https", "only these are fetched", kind="url")
    return target


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        known = response.status in http.HTTPStatus.__members__.values()
        phrase = f" {http.HTTPStatus(response.status).phrase}" if known else ""
        raise InputError(f"the server answered {response.status}{phrase}", "check the URL", kind="url-status")
    if response.getheader("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise InputError("the server compresses what it sends, unasked", "download the image first", kind="url")
    body = bytearray()
    expected = response.length  # None for a chunked answer, whose end is marked
    while expected is None or len(body) < expected:
        if max(expected or 0, len(body)) > max_bytes:
            raise InputError(f"has more than {max_bytes:,} bytes", "download and shrink it first", kind="too-large")
        chunk = response.read(_CHUNK)
        if not chunk:
            break
        body += chunk
    if expected is not None and len(body) < expected:
        raise http.client.IncompleteRead(b"", expected - len(body))
    return bytes(body)


def _timed_out(timeout: float) -> InputError:
    return InputError(f"was not fetched within {timeout:g} seconds", "try again later", kind="url-timeout")


def _unreachable(reason: BaseException | str) -> InputError:
    if isinstance(reason, http.client.IncompleteRead | http.client.RemoteDisconnected):
        reason = "the connection ended before the end of the data"
    elif isinstance(reason, OSError):
        reason = reason.strerror or type(reason).__name__
    elif isinstance(reason, BaseException):  # of http.client, whose text quotes what the server sent
        reason = "the server's answer is not HTTP"
    return InputError(f"cannot be fetched: {reason}", "check the URL and the connection", kind="url-unreachable")


# ---- the deadline
#
# A socket's timeout is for each receive, so a server that sends a byte now and then would hold us for ever. Here every
# receive, of headers and body alike, gets the time that is left. A TLS handshake as a whole keeps to its timeout.


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left. Raises `TimeoutError` when there are none."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def dial(self, address: tuple[str, int], *_unused: object) -> socket.socket:
        """Connect as `socket.create_connection` does, but with one time limit for all of a host's addresses."""
        error: OSError = OSError("the host has no address")
        for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self.left())
                sock.connect(place)
            except OSError as reason:
                sock.close()
                error = reason
            else:
                sock.settimeout(self.left())
                return sock
        raise error


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: _Deadline) -> None:
        self._raw, self._sock, self._deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, deadline: _Deadline, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline))


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, *args: Any, deadline: _Deadline, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._create_connection = deadline.dial
        self.response_class = functools.partial(_TimedResponse, deadline=deadline)  # type: ignore[assignment]


class _HttpsConnection(_HttpConnection, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._connection: Any = functools.partial(_HttpConnection, deadline=deadline)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._connection: Any = functools.partial(_HttpsConnection, deadline=deadline)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)
