"""What `[V]` and `{class}` stand for: said by a folder, by headers of files, and by several that agree or not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dbcap.errors import ModelError, UsageError
from dbcap.models.identity import HEADER, Identity, agreed, of_folder, of_header
from dbcap.models.pipelines import IDENTITY

SAID = {"identifier": "sks", "class": "dog"}


def test_a_folder_and_a_header_say_the_same(tmp_path):
    (tmp_path / IDENTITY).write_text(json.dumps(SAID))
    save_file({"x": torch.zeros(1)}, tmp_path / "l.safetensors", {HEADER: json.dumps(SAID)})
    assert of_folder(tmp_path) == of_header(tmp_path / "l.safetensors") == Identity("sks", "dog")


def test_most_files_say_nothing(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "l.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"format": "pt"})
    assert of_folder(tmp_path) == Identity()
    assert {of_header(tmp_path / name) for name in ("l.safetensors", "m.safetensors")} == {Identity()}


@pytest.mark.parametrize("document", ["{", "[]", "3", '{"identifier": 3}', '{"class": ["dog"]}'])
def test_what_is_damaged_is_named(tmp_path, document):
    (tmp_path / IDENTITY).write_text(document)
    with pytest.raises(ModelError, match="of its identifier and class is damaged; fetch or copy it again"):
        of_folder(tmp_path)


def test_several_agree_or_are_named():
    nothing, dog, cat = Identity(), Identity("sks", "dog"), Identity("sks", "cat")
    assert agreed([("model", nothing), ("a", Identity("sks")), ("b", Identity(None, "dog")), ("c", dog)]) == dog
    assert agreed([("model", nothing)]) == nothing
    with pytest.raises(UsageError, match="the class word of a is 'dog', and that of b 'cat'; write the word itself"):
        agreed([("a", dog), ("model", nothing), ("b", cat)])
