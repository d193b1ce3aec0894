"""`dbcap doctor`; what it finds out is tested with dbcap.models.doctor."""

from __future__ import annotations

import json
import os

import pytest

PARTS = {"versions", "dependencies", "extras", "device", "cpu", "folders", "hub"}


def test_json_has_every_part(process, hub):
    server = hub()
    result = process("doctor", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert set(found) >= PARTS
    assert found["hub"]["endpoint"] == server.url
    assert found["hub"]["reachable"] is True
    assert found["device"]["dtype"] in ("float32", "bfloat16", "float16")
    assert found["folders"]["config"]["path"] == os.environ["DBCAP_HOME"]


def test_without_json_it_is_a_table(cli, hub):
    server = hub()
    code, out, _ = cli("doctor")
    assert code == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert {len(row) for row in rows} == {3}
    assert ["Hub", "Endpoint", server.url] in rows
    assert ["Hub", "Reachable", "yes"] in rows


def test_a_hub_out_of_reach_is_a_warning_and_offline_does_not_ask(cli, hub):
    server = hub()
    server.stop()
    code, _, err = cli("doctor")
    assert code == 0
    assert f"warning: the hub at {server.url} cannot be reached" in err
    code, out, err = cli("doctor", "--offline")
    assert code == 0
    assert "Hub\tReachable\tnot asked (--offline)\n" in out
    assert "cannot be reached" not in err


def test_a_home_that_cannot_be_written_is_code_1(cli, hub, monkeypatch, tmp_path):
    hub()
    (tmp_path / "file").touch()
    monkeypatch.setenv("DBCAP_HOME", str(tmp_path / "file" / "home"))
    code, _, err = cli("doctor")
    assert code == 1
    assert "warning: the config folder" in err


@pytest.mark.parametrize("words", [["extra"], ["--jason"]])
def test_wrong_usage(cli, words):
    result = cli("doctor", *words)
    assert result.code == 2
    assert result.error.startswith("dbcap doctor: ")
