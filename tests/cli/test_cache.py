"""`dbcap cache`."""

from __future__ import annotations

import json

import pytest

from dbcap.config.paths import cache_dir, config_file


@pytest.fixture
def filled(home):
    """A cache of two parts, and something that is no part of it."""
    root = cache_dir()
    (root / "converted" / "deep").mkdir(parents=True)
    (root / "converted" / "deep" / "model.safetensors").write_bytes(bytes(1_500_000))
    (root / "converted" / "a.json").write_bytes(bytes(500))
    (root / "latents").mkdir()
    (root / "latents" / "x").write_bytes(bytes(20))
    config_file().write_text("quiet = false\n")
    return root


def test_an_empty_cache(cli):
    assert cli("cache", "info") == (0, "", f"{cache_dir()}: 0 bytes\n")
    assert json.loads(cli("cache", "info", "--json").out) == {"path": str(cache_dir()), "parts": {}}
    assert cli("cache", "clear") == (0, "", f"0 bytes freed in {cache_dir()}\n")


def test_what_is_in_it(cli, filled):
    assert cli("cache", "info") == (0, "converted\t2\t1.5 MB\nlatents\t1\t20 bytes\n", f"{filled}: 1.5 MB\n")
    assert json.loads(cli("cache", "info", "--json").out)["parts"] == {
        "converted": {"files": 2, "bytes": 1_500_500},
        "latents": {"files": 1, "bytes": 20},
    }


def test_clear_empties_it_and_nothing_else(cli, filled, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (filled / "link").symlink_to(outside)
    (filled / "loose").touch()
    assert cli("cache", "clear") == (0, "", f"1.5 MB freed in {filled}\n")
    assert list(filled.iterdir()) == []
    assert (outside / "kept").exists()
    assert config_file().exists()
