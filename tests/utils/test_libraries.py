import sys

import pytest

from fdl.errors import UserError
from fdl.utils.libraries import library


def test_a_library_that_is_there():
    assert library("json.decoder", "extra", "x", has="JSONDecoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize("name", ["no_such_library", "no_such_library.part"])
def test_one_that_is_not_installed(name):
    with pytest.raises(UserError) as caught:
        library(name, "some", "tuning: lora")
    assert str(caught.value) == 'tuning: lora: needs the library no_such_library; pip install "fdl[some]"'


@pytest.mark.parametrize(
    ("file", "name"),
    [("impostor/readme.txt", "impostor"), ("impostor/__init__.py", "impostor.part"), ("impostor.py", "impostor")],
)
def test_what_is_in_the_place_of_a_library_is_named(tmp_path, monkeypatch, file, name):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    place = str(tmp_path / file).replace("/__init__.py", "").replace("/readme.txt", "")
    with pytest.raises(
        UserError, match=rf'x: needs the library impostor; pip install "fdl\[some\]" \({place} has its name'
    ):
        library(name, "some", "x", has="wanted")
    sys.modules.pop("impostor", None)


def test_a_dependency_that_a_library_lacks_is_named(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "needy.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    with pytest.raises(UserError, match=r'pip install "fdl\[some\]" \(No module named .absent_dependency.\)$'):
        library("needy", "some", "x")
