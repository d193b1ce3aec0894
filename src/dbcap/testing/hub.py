"""A hub on loopback: serves folders in the protocol that huggingface_hub speaks, with faults on demand.

`ROOT/org/name/` is the branch `main` of `org/name`, `ROOT/org/name@rev/` another revision. What it serves is read from
disk at each request. Each revision has a commit of its own, made from its content.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import yaml

_LFS = {".bin", ".safetensors", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".ckpt", ".model"}
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+)|/tree/(?P<tree>[^/]+)(?:/(?P<under>.*))?)?"
)
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")
_CHUNK = 16384


class Request(NamedTuple):
    """One request that came in."""

    method: str
    path: str


@dataclass
class _Cut:
    after: int
    times: int | None


class Hub:
    """A hub that serves `root` on 127.0.0.1 while it is used as a context manager. Nothing needs a login unless gated.

    `requests` lists what was asked, in order. The methods that make faults may be called at any time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[Request] = []
        self.status: int | None = None
        """If set, the answer to every request."""
        self._cuts: dict[str, _Cut] = {}
        self._rates: dict[str, float] = {}
        self._corrupt: set[str] = set()
        self._gates: dict[str, int] = {}
        self._hashes: dict[tuple[str, int, int], tuple[str, str]] = {}
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Hub:
        self.root.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), type("_BoundHandler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Be out of reach from now on; connections that are open are closed. The port is free afterwards."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    # ---- what is there

    def repo(self, name: str, revision: str = "main") -> Path:
        """Return the folder that is served as this revision, made if it is missing: put files there."""
        folder = self.root / (name if revision == "main" else f"{name}@{revision}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, name: str, revision: str = "main") -> str:
        """Return the commit of a revision: 40 hexadecimal digits, made from the names and contents of its files."""
        folder = self.root / (name if revision == "main" else f"{name}@{revision}")
        listing = "".join(f"{file}\0{self.hashes(folder / file)[1]}\n" for file in _files(folder))
        return hashlib.sha1(f"{name}\0{listing}".encode()).hexdigest()

    def hashes(self, path: Path) -> tuple[str, str]:
        """Return the Git blob id and the SHA-256 of a file."""
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in self._hashes:
            data = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self._hashes[key] = git, hashlib.sha256(data).hexdigest()
        return self._hashes[key]

    # ---- faults

    def cut(self, file: str, after_bytes: int, times: int | None = None) -> None:
        """Close the connection when this many bytes of `file` (a name) are out: always, or only the first `times`."""
        self._cuts[file] = _Cut(after_bytes, times)

    def slow(self, file: str, bytes_per_second: float) -> None:
        """Send `file` at this rate."""
        self._rates[file] = bytes_per_second

    def corrupt(self, file: str) -> None:
        """Send `file` with its first byte changed; size and stated hash stay right."""
        self._corrupt.add(file)

    def gate(self, repo: str, status: int = 401) -> None:
        """Show `repo` but refuse its files: 401 as to someone without a login, 403 as to one without access."""
        self._gates[repo] = status

    def heal(self) -> None:
        """Take all faults back."""
        self.status = None
        for faults in (self._cuts, self._rates, self._corrupt, self._gates):
            faults.clear()

    def _folder(self, repo: str, revision: str) -> Path | None:
        """Return the folder of a branch, tag or commit."""
        parent = self.root / repo.split("/")[0]
        name = repo.split("/")[1]
        folders = [path for path in parent.glob(f"{name}*") if path.is_dir() and path.name.split("@")[0] == name]
        for folder in sorted(folders):
            branch = folder.name.partition("@")[2] or "main"
            if revision in (branch, self.commit(repo, branch)):
                return folder
        return None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what this hub is for."""

    def close_connections(self) -> None:
        for request in list(self._open):
            self.shutdown_request(request)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.hub.requests.append(Request(self.command, self.path))
        if self.hub.status is not None:
            self._reply(self.hub.status, b"{}")
        elif match := _API.fullmatch(url.path):
            parts = {key: urllib.parse.unquote(value) for key, value in match.groupdict().items() if value}
            self._api(urllib.parse.parse_qs(url.query), **parts)
        elif match := _RESOLVE.fullmatch(url.path):
            self._resolve(*map(urllib.parse.unquote, match.groups()))
        else:
            self._reply(404, b'{"error": "Not Found"}')

    def _find(self, repo: str, revision: str) -> tuple[Path, str] | None:
        """Return folder and commit, or None once the refusal is sent."""
        if not (self.hub.root / repo).is_dir():
            known = "authorization" in self.headers  # the hub tells a stranger that he may not, not that it is missing
            self._reply(404 if known else 401, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
            return None
        folder = self.hub._folder(repo, revision)
        if folder is None:
            self._reply(404, b'{"error": "Invalid rev id"}', X_Error_Code="RevisionNotFound")
            return None
        return folder, self.hub.commit(repo, folder.name.partition("@")[2] or "main")

    def _api(self, query: dict[str, list[str]], repo: str, rev: str = "", tree: str = "", under: str = "") -> None:
        found = self._find(repo, rev or tree or "main")
        if found is None:
            return
        folder, commit = found
        if tree:
            self._json(self._tree(folder, under, recursive=query.get("recursive", [""])[0].lower() in ("true", "1")))
            return
        blobs = "blobs" in query
        self._json(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": False,
                "gated": "auto" if repo in self.hub._gates else False,
                "tags": [],
                "downloads": 0,
                "cardData": _card(folder / "README.md"),
                "config": _brief_config(folder / "config.json"),
                "siblings": [
                    {"rfilename": file, **(self._blob(folder / file, "blobId") if blobs else {})}
                    for file in _files(folder)
                ],
            }
        )

    def _blob(self, path: Path, key: str) -> dict[str, Any]:
        git, sha256 = self.hub.hashes(path)
        size = path.stat().st_size
        lfs = (
            {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 134}} if path.suffix in _LFS else {}
        )
        return {"size": size, key: git, **lfs}

    def _tree(self, folder: Path, under: str, recursive: bool) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for path in sorted((folder / under).glob("**/*" if recursive else "*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                entries.append({"type": "directory", "path": name, "size": 0, "oid": "0" * 40})
            else:
                entries.append({"type": "file", "path": name, **self._blob(path, "oid")})
        return entries

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        folder, commit = found
        if repo in self.hub._gates:
            self._reply(self.hub._gates[repo], b'{"error": "gated"}', X_Error_Code="GatedRepo", X_Repo_Commit=commit)
            return
        path = folder / file
        if ".." in file.split("/") or not path.is_file():
            self._reply(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        git, sha256 = self.hub.hashes(path)
        size = path.stat().st_size
        headers = {"X_Repo_Commit": commit, "Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
        headers["ETag"] = f'"{git}"'
        if path.suffix in _LFS:
            headers |= {"ETag": f'"{sha256}"', "X_Linked_ETag": f'"{sha256}"', "X_Linked_Size": str(size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        end = int(wanted[2]) if wanted and wanted[2] else size - 1
        if wanted and start >= size:
            self._reply(416, b"", Content_Range=f"bytes */{size}", **headers)
            return
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{end}/{size}"
        self._head(206 if wanted else 200, Content_Length=str(end - start + 1), **headers)
        if self.command == "GET":
            self._body(path, start, end + 1)

    def _body(self, path: Path, position: int, end: int) -> None:
        """Send bytes `position` to `end` of a file, with the faults that were asked for."""
        cut = self.hub._cuts.get(path.name)
        if cut and cut.times is not None:
            cut.times -= 1
            cut = cut if cut.times >= 0 else None
        rate = self.hub._rates.get(path.name)
        with path.open("rb") as file:
            file.seek(position)
            while position < end:
                stop = min(end, position + (min(_CHUNK, max(1, int(rate / 20))) if rate else _CHUNK))
                if cut:
                    stop = min(stop, cut.after)
                    if position >= cut.after:
                        self.close_connection = True
                        return
                data = file.read(stop - position)
                if position == 0 and path.name in self.hub._corrupt:
                    data = bytes([data[0] ^ 255]) + data[1:]
                self.wfile.write(data)
                position = stop
                if rate:
                    time.sleep(len(data) / rate)

    def _json(self, body: object) -> None:
        self._reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, Content_Length=str(len(body)), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _card(path: Path) -> dict[str, Any]:
    """Return the front matter of a model card."""
    match = re.match(r"---\n(.*?)\n---", path.read_text() if path.is_file() else "", re.DOTALL)
    return dict(yaml.safe_load(match[1])) if match else {}


def _brief_config(path: Path) -> dict[str, Any]:
    """Return the part of `config.json` that the hub tells about a model."""
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    return {key: config[key] for key in ("architectures", "model_type") if key in config}
