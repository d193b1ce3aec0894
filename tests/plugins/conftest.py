"""What the tests of plugins share: installing a distribution is putting its folder on `sys.path`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from dbcap.plugins import loader
from dbcap.plugins.loader import LoadReport

HERE = Path(__file__).parent
PLUGIN = "from dbcap.plugins.api import Model, Plugin\nfrom pathlib import Path\n"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No DBCAP_PLUGINS, nothing cached before or after, and no module of a test plugin left imported."""
    monkeypatch.delenv(loader.SWITCH, raising=False)
    loader.reset()
    _forget_modules()
    yield
    loader.reset()
    _forget_modules()


def _forget_modules():
    for name in list(sys.modules):
        if name.startswith(("dbcap_good", "dbcap_broken", "dbcap_slow", "plug_")):
            del sys.modules[name]


@pytest.fixture
def add(monkeypatch):
    """Return a function that installs the test plugins of these names."""

    def add(*names):
        for name in names:
            monkeypatch.syspath_prepend(str(HERE / name))
        loader.reset()

    return add


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Return a function that writes and installs a distribution with one module and one entry point."""

    def make(distribution, source, group="plugins", name=None, attribute=":it"):
        module = "plug_" + distribution.replace("-", "_")
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-2.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[dbcap.{group}]\n{name or distribution} = {module}{attribute}\n")
        (folder / f"{module}.py").write_text(PLUGIN + textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(folder))
        loader.reset()

    return make


@pytest.fixture
def report():
    """Return a function that looks up the one report of this name."""

    def report(name: str, *, deep: bool) -> LoadReport:
        (found,) = [one for one in loader.reports(deep) if one.name == name]
        return found

    return report
