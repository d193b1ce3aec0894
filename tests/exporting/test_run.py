"""What an export is called where nobody says."""

import pytest

from dbcap.exporting.run import _name_of
from dbcap.models.specs import parse


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("starter", "starter"),
        ("org/name@main", "name"),
        ("run:dog", "dog"),
        ("run:dog@80", "dog-80"),
        ("run:dog@best", "dog-best"),
        ("./a@b c/l@2.safetensors", "l@2"),
        ("a@b c/", "a@b c"),
        ("./a@b c/../other", "other"),
        (".", "here"),
    ],
)
def test_an_export_is_called_as_its_model(tmp_path, monkeypatch, address, name):
    here = tmp_path / "here"
    (here / "a@b c").mkdir(parents=True)
    (here / "other").mkdir()
    (here / "a@b c" / "l@2.safetensors").touch()
    monkeypatch.chdir(here)
    assert _name_of(parse(address)) == name
