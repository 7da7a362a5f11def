import gzip
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from fdl.datamodules.tables import Layout
from fdl.errors import UserError

ROWS = [{"text": f"t{i}", "n": i, "split": "train" if i < 4 else "dev"} for i in range(6)]


def jsonl(path, rows=ROWS):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def numbers(table):
    return {split: [record["n"] for record in records] for split, records in table.splits.items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_splits_of_one_file(tmp_path, name):
    """The only held-out split is the test split, whatever it is called."""
    table = Layout(jsonl(tmp_path / name)).read()
    assert numbers(table) == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert table.splits["test"][0].place.endswith(f"{name}: line 5")


def test_chosen_splits_and_records(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": "u", "n": 6, "split": "extra"}])
    with pytest.raises(UserError, match="unknown split 'extra'; set splits"):
        Layout(path).read()
    assert numbers(Layout(path, splits={"train": "dev", "test": "extra"}).read()) == {"train": [4, 5], "test": [6]}
    kept = Layout(path, splits={"train": "train", "validation": "dev"}).read()
    assert numbers(kept) == {"train": [0, 1, 2, 3], "validation": [4, 5]}
    with pytest.raises(UserError, match="no split 'eval'; there are dev, extra, train"):
        Layout(path, splits={"train": "train", "test": "eval"}).read()
    with pytest.raises(UserError, match="splits: 'dev' is none of train, validation, test"):
        Layout(path, splits={"dev": "dev"})
    chosen = Layout(jsonl(tmp_path / "b.jsonl"), where={"n": [0, 2, 5], "split": "train"}).read()
    assert numbers(chosen) == {"train": [0, 2]}
    with pytest.raises(UserError, match=r"no training records; splits are dev"):
        Layout(path, where={"split": "dev"}).read()
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: no key 'colour'; there are 'text', 'n', 'split'"):
        Layout(path, where={"colour": 1}).read()


def test_a_file_a_split_and_columns(tmp_path):
    (tmp_path / "train.csv").write_text('text,n\n"one, with ""quotes""",0\n"two\nlines",1\n')
    (tmp_path / "test.tsv").write_text('text\tn\n"not quoted\t2\n')
    table = Layout(str(tmp_path)).read()
    assert [record["text"] for record in table.splits["train"]] == ['one, with "quotes"', "two\nlines"]
    assert [record["text"] for record in table.splits["test"]] == ['"not quoted']
    assert set(table.splits) == {"train", "test"}


def test_records_with_empty_texts_can_be_left_out(tmp_path, caplog):
    path = jsonl(tmp_path / "a.jsonl", [{"text": " ", "n": 0}, {"text": "x", "n": 1}, {"text": "", "n": 2}])
    assert numbers(Layout(path, full=("text",)).read()) == {"train": [1]}
    assert "left out 2 records with empty texts" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "a"\n', r"line 2: not valid JSON \(Expecting ',' delimiter at character"),
        (b'{"text": "a"}\n\n[1, 2]\n', r"line 3: expected a JSON object, got \[1, 2\]"),
        (b"\n", "the file has no records"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Layout(str(path)).read()
    assert str(path) in str(caught.value)


def test_damaged_and_missing_files(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    jsonl(packed, ROWS * 50)
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        Layout(str(packed)).read()
    (tmp_path / "b.csv").write_text("text,n\nx\n")
    with pytest.raises(UserError, match=r"b\.csv: line 2: expected 2 columns"):
        Layout(str(tmp_path / "b.csv")).read()
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file or folder"):
        Layout(str(tmp_path / "absent.jsonl"))
    (tmp_path / "c.parquet").write_text("x")
    with pytest.raises(UserError, match=r"c\.parquet: expected a file of \.jsonl"):
        Layout(str(tmp_path / "c.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no file of \.jsonl"):
        Layout(str(tmp_path / "empty")).read()


# -- Hugging Face ------------------------------------------------------------------------------------------------


class Split(list):
    features: ClassVar = {"text": SimpleNamespace(dtype="string"), "label": SimpleNamespace(names=["bad", "good"])}


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the library `datasets`, which is not needed to run the tests."""
    fake = ModuleType("datasets")
    fake.asked = []

    def load_dataset(name, config):
        fake.asked.append((name, config))
        if name == "nobody/nothing":
            raise FileNotFoundError("Couldn't find it\nanywhere")
        return {"train": Split([{"text": "a", "label": 1}]), "validation": Split([{"text": "b", "label": 0}])}

    fake.load_dataset = load_dataset
    fake.load_from_disk = lambda folder: Split([{"text": folder, "label": 0}])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_data_set_of_the_hub(library):
    table = Layout("hub:somebody/reviews:small").read()
    assert library.asked == [("somebody/reviews", "small")]
    assert {split: [r["text"] for r in records] for split, records in table.splits.items()} == {
        "train": ["a"],
        "test": ["b"],
    }
    assert table.names == {"label": ["bad", "good"]}
    with pytest.raises(UserError, match=r"nobody/nothing: the library datasets cannot load it \(Couldn't find it"):
        Layout("hub:nobody/nothing").read()


def test_a_data_set_that_the_library_has_saved(library, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [r["text"] for r in Layout(str(tmp_path)).read().splits["train"]] == [str(tmp_path)]


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'needs the library datasets; pip install "fdl\[datasets\]"'):
        Layout("hub:somebody/reviews").read()
