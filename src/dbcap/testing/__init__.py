"""Public test support: pytest fixtures with tiny real models, a hub on loopback and an isolated home.

Import the fixtures that you want into your `conftest.py`: `from dbcap.testing import home, hub, published_model`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dbcap.testing.hub import Hub

__all__ = ["Hub", "blip_captioner", "git_captioner", "home", "hub", "published_model", "tiny_captioner"]

_OURS = ("DBCAP_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_")


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of its own for one test, in this process and its children; returns what `DBCAP_HOME` names.

    Nothing of the machine's configuration, caches, tokens, proxies or plugins' switches shows through.
    """
    root = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(_OURS) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    places = {
        "HOME": root,
        "DBCAP_HOME": root / "dbcap",
        "HF_HOME": root / "huggingface",
        "XDG_CACHE_HOME": root / "cache",
        "XDG_CONFIG_HOME": root / "config",
        "XDG_DATA_HOME": root / "data",
    }
    for name, path in places.items():
        path.mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(path))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    source = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))))
    _isolate_huggingface_hub(places["HF_HOME"], monkeypatch)
    if "dbcap.plugins.loader" in sys.modules:
        sys.modules["dbcap.plugins.loader"].reset()
    return places["DBCAP_HOME"]


def _isolate_huggingface_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat what huggingface_hub read from the environment when it was imported."""
    from huggingface_hub import close_session, constants

    for name, value in {
        "HF_HOME": folder,
        "HF_HUB_CACHE": folder / "hub",
        "HF_TOKEN_PATH": folder / "token",
        "HF_STORED_TOKENS_PATH": folder / "stored_tokens",
        "HF_XET_CACHE": folder / "xet",
        "AGENT_HARNESSES_PATH": folder / ".agent_harnesses.json",
    }.items():
        monkeypatch.setattr(constants, name, str(value))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()  # a client remembers the proxies of its time


@pytest.fixture
def hub(
    home: Path,  # noqa: ARG001 - what is fetched must not land in the user's cache
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[HubFactory]:
    """Start hubs on loopback: `hub()` serves a new empty folder, `hub(root)` that one, and `HF_ENDPOINT` names it."""
    with ExitStack() as stack:

        def start(root: Path | None = None) -> Hub:
            started = stack.enter_context(Hub(root or tmp_path_factory.mktemp("hub")))
            monkeypatch.setenv("HF_ENDPOINT", started.url)
            return started

        yield start


HubFactory = Callable[..., Hub]


@pytest.fixture(scope="session")
def published_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the layout of nlpconnect/vit-gpt2-image-captioning. Shared by all tests: copy it to change it."""
    from dbcap.testing.models import write_published_layout

    return write_published_layout(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT and GPT-2 in safetensors, for images of 32x32. Shared by all tests: copy it to change it."""
    from dbcap.testing.models import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def blip_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP. Shared by all tests: copy it to change it."""
    from dbcap.testing.models import write_tiny_blip

    return write_tiny_blip(tmp_path_factory.mktemp("blip") / "model")


@pytest.fixture(scope="session")
def git_captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GIT. Shared by all tests: copy it to change it."""
    from dbcap.testing.models import write_tiny_git

    return write_tiny_git(tmp_path_factory.mktemp("git") / "model")
