from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest
from huggingface_hub import constants

from dbcap.models import cpu, doctor
from dbcap.models.device import choose
from dbcap.models.doctor import Doctor, Row, examine

KEYS = ["versions", "dependencies", "extras", "device", "cpu", "folders", "hub"]


@pytest.fixture(autouse=True)
def quiet_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own hub settings, and no network: an address where nobody listens."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.getbasetemp() / "no-token"))
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Start a hub that answers everything with one status; gives what it was asked: path and authorization."""
    servers = []

    def start(status: int) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(" ".join([self.path, *self.headers.get_all("Authorization", [])]))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the metadata of an installed dbcap with these requirements first on the path."""

    def install(*requirements: str) -> None:
        folder = tmp_path / "site" / "dbcap-0.0.1.dist-info"
        folder.mkdir(parents=True)
        lines = [
            "Metadata-Version: 2.4",
            "Name: dbcap",
            "Version: 0.0.1",
            *(f"Requires-Dist: {one}" for one in requirements),
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(folder.parent))

    return install


def row(report: Doctor, section: str, key: str) -> Row:
    return next(one for part in report.sections if part.key == section for one in part.rows if one.key == key)


def of(report: Doctor, section: str) -> dict[str, Any]:
    value = report.as_dict()[section]
    assert isinstance(value, dict)
    return value


def test_a_sound_machine(tmp_path: Path, installed: Callable[..., None], serve: Callable[[int], list[str]]) -> None:
    installed(
        "numpy>=2", 'pillow-heif>=1; extra == "heif"', 'wandb>=0.24; extra == "wandb"', 'pytest>=999; extra == "dev"'
    )
    asked = serve(200)
    home = {name: tmp_path / name for name in ("config", "data", "cache")}
    report = examine(offline=False, home=home)
    assert report.problems == ()
    assert not report.broken
    assert [one.key for one in report.sections] == KEYS
    assert all(one.good for part in report.sections for one in part.rows)
    assert asked == ["/api/models?limit=1"]
    assert of(report, "dependencies") == {"numpy": numpy.__version__}
    assert set(of(report, "extras")) == {"pillow-heif", "wandb"}
    folders = of(report, "folders")
    assert list(folders) == ["config", "data", "cache"]
    assert folders["cache"]["path"] == str(tmp_path / "cache")
    assert folders["cache"]["writable"] is True
    assert folders["cache"]["exists"] is False
    assert not (tmp_path / "cache").exists()


def test_device_and_processor_are_what_the_other_modules_say(tmp_path: Path) -> None:
    report = examine(offline=True, home={}, model_parameters=239_195_904)
    choice = choose(parameters=239_195_904)
    found = of(report, "device")
    assert (found["device"], found["dtype"], found["threads"]) == (choice.device, choice.dtype, choice.threads)
    assert found["why"] == list(choice.why)
    assert of(report, "cpu") == {
        "name": cpu.cpu_name(),
        "class": cpu.cpu_class(),
        "cores": cpu.cores(),
        "memory_bytes": cpu.memory_bytes(),
    }
    assert of(examine(offline=True, home={}, model_parameters=1000), "device")["dtype"] == "float32"


def test_the_report_is_json(tmp_path: Path) -> None:
    report = examine(offline=True, home={"cache": tmp_path})
    again = json.loads(json.dumps(report.as_dict()))
    assert list(again) == [*KEYS, "problems", "broken"]
    assert again == report.as_dict()


def test_dependencies_that_are_missing_or_of_another_version(installed: Callable[..., None]) -> None:
    installed(
        "numpy<1",
        "no-such-thing-at-all>=2,<3",
        "no-such-thing-on-windows; sys_platform == 'atari'",
        'no-such-extra>=1; extra == "magic"',
    )
    report = examine(offline=True, home={})
    assert report.broken
    assert report.problems == (
        f"numpy {numpy.__version__} is not a version that dbcap is made for; run `pip install 'numpy<1'`",
        "no-such-thing-at-all is missing; run `pip install 'no-such-thing-at-all>=2,<3'`",
    )
    assert of(report, "dependencies") == {"numpy": numpy.__version__, "no-such-thing-at-all": None}
    assert not row(report, "dependencies", "numpy").good
    assert row(report, "dependencies", "no-such-thing-at-all").text == "missing"
    assert row(report, "extras", "no-such-extra").text == "not installed: `pip install 'dbcap[magic]'`"


def test_another_version_alone_breaks_nothing(installed: Callable[..., None]) -> None:
    installed("numpy<1")
    report = examine(offline=True, home={})
    assert len(report.problems) == 1
    assert not report.broken


def test_without_packaging_only_presence_is_checked(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("numpy<1", "no-such-thing-at-all>=2", 'no-such-extra>=1; extra == "magic"')
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    report = examine(offline=True, home={})
    assert report.problems == ("no-such-thing-at-all is missing; run `pip install 'no-such-thing-at-all'`",)
    assert of(report, "extras") == {"no-such-extra": None}


def test_a_dbcap_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "dbcap-that-nobody-installed")
    report = examine(offline=True, home={})
    assert "pip install -e" in report.problems[0]
    assert not report.broken


def test_a_folder_that_cannot_be_made(tmp_path: Path, installed: Callable[..., None]) -> None:
    installed()
    (tmp_path / "file").write_text("in the way")
    report = examine(offline=True, home={"data": tmp_path / "file" / "dbcap", "cache": tmp_path})
    assert report.broken
    assert len(report.problems) == 1
    assert str(tmp_path / "file" / "dbcap") in report.problems[0]
    assert "DBCAP_HOME" in report.problems[0]
    assert of(report, "folders")["data"]["writable"] is False
    assert of(report, "folders")["cache"]["writable"] is True


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_a_folder_that_not_even_root_can_write() -> None:
    assert examine(offline=True, home={"cache": Path("/proc/dbcap")}).broken


def test_a_full_disk_is_one_problem_for_all_folders_on_it(
    tmp_path: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed()
    monkeypatch.setattr(doctor, "LEAST_FREE", 2**70)
    report = examine(offline=True, home={"data": tmp_path / "data", "cache": tmp_path / "cache"})
    assert len(report.problems) == 1
    assert "data (" in report.problems[0]
    assert "cache (" in report.problems[0]
    assert not report.broken
    assert not row(report, "folders", "cache").good


def test_examining_leaves_nothing_behind(tmp_path: Path) -> None:
    examine(offline=True, home={"cache": tmp_path, "data": tmp_path / "data"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "reachable"), [(404, True), (401, True), (503, False)])
def test_what_the_hub_answers(
    installed: Callable[..., None], serve: Callable[[int], list[str]], status: int, reachable: bool
) -> None:
    installed()
    serve(status)
    report = examine(offline=False, home={})
    assert of(report, "hub")["reachable"] is reachable
    assert [str(status) in one for one in report.problems] == ([] if reachable else [True])


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "ftp://127.0.0.1", "nonsense", "http://[::", "http://127.0.0.1:x"]
)
def test_a_hub_out_of_reach(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    installed()
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    report = examine(offline=False, home={})
    assert of(report, "hub") == {"endpoint": endpoint, "reachable": False, "token": False}
    assert len(report.problems) == 1
    assert "--profile starter" in report.problems[0]
    assert not report.broken


def test_a_hub_that_is_silent(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed()
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        report = examine(offline=False, home={})
    assert "timed out" in report.problems[0]


@pytest.mark.parametrize("by_environment", [False, True])
def test_offline_asks_nobody(
    installed: Callable[..., None],
    serve: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    by_environment: bool,
) -> None:
    installed()
    asked = serve(200)
    if by_environment:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = examine(offline=not by_environment, home={})
    assert asked == []
    assert report.problems == ()
    assert of(report, "hub")["reachable"] is None
    assert row(report, "hub", "reachable").text.startswith("not asked (")


def test_the_token_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert of(examine(offline=True, home={}), "hub")["token"] is False
    (tmp_path / "token").write_text("hf_private")
    report = examine(offline=True, home={})
    assert of(report, "hub")["token"] is True
    assert row(report, "hub", "token").text == f"set ({tmp_path / 'token'})"
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    in_environment = examine(offline=True, home={})
    assert row(in_environment, "hub", "token").text == "set (HF_TOKEN)"
    assert "hf_private" not in repr(report) + repr(in_environment)


def test_a_password_in_the_address_is_used_and_not_shown(
    serve: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve(200)
    address = os.environ["HF_ENDPOINT"].removeprefix("http://")
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:hf_private@{address}")
    report = examine(offline=False, home={})
    assert of(report, "hub")["reachable"] is True
    assert asked == ["/api/models?limit=1 Basic bWU6aGZfcHJpdmF0ZQ=="]
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hf_private@localhost:0")
    unreachable = examine(offline=False, home={})
    assert of(unreachable, "hub")["reachable"] is False
    assert "hf_private" not in repr(report) + repr(unreachable)


@pytest.mark.parametrize(
    ("code", "problems"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", 1),
        ("import no_such_module_at_all", 1),
        ("", 0),
    ],
)
def test_torchvision(
    tmp_path: Path, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, code: str, problems: int
) -> None:
    installed()
    (tmp_path / "site" / "torchvision.py").write_text(code)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    report = examine(offline=True, home={})
    sys.modules.pop("torchvision", None)
    assert len(report.problems) == problems
    assert all("pip uninstall torchvision" in one for one in report.problems)
    assert not report.broken
