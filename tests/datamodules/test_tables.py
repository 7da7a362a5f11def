import codecs
import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pyarrow
import pyarrow.parquet as pyarrow_parquet
import pytest

from fdl.datamodules.tables import TableLayout
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
    table = TableLayout(jsonl(tmp_path / name)).read()
    assert numbers(table) == {"train": [0, 1, 2, 3], "test": [4, 5]}
    assert table.splits["test"][0].place.endswith(f"{name}: line 5")


def test_chosen_splits_and_records(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": "u", "n": 6, "split": "extra"}])
    with pytest.raises(UserError, match="unknown split 'extra'; set splits"):
        TableLayout(path).read()
    assert numbers(TableLayout(path, splits={"train": "dev", "test": "extra"}).read()) == {"train": [4, 5], "test": [6]}
    kept = TableLayout(path, splits={"train": "train", "validation": "dev"}).read()
    assert numbers(kept) == {"train": [0, 1, 2, 3], "validation": [4, 5]}
    with pytest.raises(UserError, match="no split 'eval'; there are dev, extra, train"):
        TableLayout(path, splits={"train": "train", "test": "eval"}).read()
    with pytest.raises(UserError, match="splits: 'dev' is none of train, validation, test"):
        TableLayout(path, splits={"dev": "dev"})
    chosen = TableLayout(jsonl(tmp_path / "b.jsonl"), where={"n": [0, 2, 5], "split": "train"}).read()
    assert numbers(chosen) == {"train": [0, 2]}
    with pytest.raises(UserError, match=r"no training records; splits are dev"):
        TableLayout(path, where={"split": "dev"}).read()
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: no key 'colour'; there are 'text', 'n', 'split'"):
        TableLayout(path, where={"colour": 1}).read()


def test_a_file_a_split_and_columns(tmp_path):
    (tmp_path / "train.csv").write_text('text,n\n"one, with ""quotes""",0\n"two\nlines",1\n')
    (tmp_path / "test.tsv").write_text('text\tn\n"not quoted\t2\n')
    table = TableLayout(str(tmp_path)).read()
    assert [record["text"] for record in table.splits["train"]] == ['one, with "quotes"', "two\nlines"]
    assert [record["text"] for record in table.splits["test"]] == ['"not quoted']
    assert set(table.splits) == {"train", "test"}


def test_records_with_empty_texts_can_be_left_out(tmp_path, caplog):
    path = jsonl(tmp_path / "a.jsonl", [{"text": " ", "n": 0}, {"text": "x", "n": 1}, {"text": "", "n": 2}])
    assert numbers(TableLayout(path, full=("text",)).read()) == {"train": [1]}
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
        TableLayout(str(path)).read()
    assert str(path) in str(caught.value)


def test_damaged_and_missing_files(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    jsonl(packed, ROWS * 50)
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        TableLayout(str(packed)).read()
    (tmp_path / "b.csv").write_text("text,n\nx\n")
    with pytest.raises(UserError, match=r"b\.csv: line 2: expected 2 columns"):
        TableLayout(str(tmp_path / "b.csv")).read()
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file or folder"):
        TableLayout(str(tmp_path / "absent.jsonl"))
    (tmp_path / "c.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"c\.xlsx: expected a file of \.jsonl"):
        TableLayout(str(tmp_path / "c.xlsx"))
    with pytest.raises(UserError, match=r"cannot be read .*File name too long"):
        TableLayout("x" * 300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no file of \.jsonl"):
        TableLayout(str(tmp_path / "empty")).read()


# -- formats -----------------------------------------------------------------------------------------------------


def columns(delimiter=",", quoting=csv.QUOTE_MINIMAL, rows=ROWS):
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def parquet(rows=ROWS):
    stream = io.BytesIO()
    pyarrow_parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def written(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(path, **options):
    table = TableLayout(path, **options).read()
    return {split: [(r["text"], str(r["n"])) for r in records] for split, records in table.splits.items()}


EXPECTED = {"train": [(f"t{i}", str(i)) for i in range(4)], "test": [("t4", "4"), ("t5", "5")]}


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("comma.csv", columns()),
        ("semicolon.csv", columns(";")),
        ("bar.csv", columns("|")),
        ("tab.csv", columns("\t")),
        ("tab.tsv", columns("\t")),
        ("quoted.tsv", columns("\t", csv.QUOTE_ALL)),
        ("semicolon.tsv", columns(";")),
        ("semicolon.csv.gz", gzip.compress(columns(";").encode(), mtime=0)),
        ("excel.csv", "sep=;\r\n" + columns(";")),
        ("mark.csv", b"\xef\xbb\xbf" + columns().encode()),
        ("mark.csv.gz", gzip.compress(b"\xef\xbb\xbf" + columns().encode(), mtime=0)),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES),
        ("mark.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + LINES, mtime=0)),
        ("utf16.csv", columns().encode("utf-16")),
        ("utf16.csv", codecs.BOM_UTF16_BE + columns().encode("utf-16-be")),
        ("utf32.csv", columns().encode("utf-32")),
        ("list.json", json.dumps(ROWS)),
        ("list.jsonl", json.dumps(ROWS, indent=1)),
        ("lines.json", "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("list.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("some.parquet", parquet()),
    ],
)
def test_every_format_gives_the_same_records(tmp_path, name, content):
    assert texts(written(tmp_path / name, content)) == EXPECTED


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_fields_of_any_length(tmp_path, suffix):
    """The library's limit on fields is the process's; it is as before afterwards."""
    long = "very long document " * 8000
    rows = [{"text": long, "n": 1}, {"text": "x", "n": 2}]
    make = {"csv": columns, "tsv": lambda rows: columns("\t", rows=rows), "parquet": parquet}
    make |= {"jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows), "json": json.dumps}
    before = csv.field_size_limit()
    found = texts(written(tmp_path / f"a.{suffix}", make[suffix](rows=rows) if suffix == "csv" else make[suffix](rows)))
    assert found == {"train": [(long, "1"), ("x", "2")]}
    assert csv.field_size_limit() == before == 131072


def test_delimiters_that_are_found_or_given(tmp_path):
    """A semicolon within a comma's columns is text, and so is a comma within a semicolon's."""
    assert texts(written(tmp_path / "a.csv", "text,n\na;b;c,1\nd;e,2\n")) == {"train": [("a;b;c", "1"), ("d;e", "2")]}
    assert texts(written(tmp_path / "b.csv", "text;n\na, b;1\nc;2\n")) == {"train": [("a, b", "1"), ("c", "2")]}
    assert texts(written(tmp_path / "c.csv", "text~n\na~1\n"), delimiter="~") == {"train": [("a", "1")]}
    only = TableLayout(written(tmp_path / "d.csv", "text\nno columns; just text\n")).read()
    assert [r["text"] for r in only.splits["train"]] == ["no columns; just text"]
    with pytest.raises(UserError, match=r"e\.csv: line 3: expected 2 columns, as in the first line, with ';' between"):
        TableLayout(written(tmp_path / "e.csv", "text;n\na;1\nb;2;3\n")).read()
    with pytest.raises(UserError, match="delimiter must be one character"):
        TableLayout(str(tmp_path / "a.csv"), delimiter=", ")


def test_a_quote_that_never_ends(tmp_path):
    """What follows it would all be one text."""
    with pytest.raises(UserError, match=r"a\.csv: line 3: a quotation mark is opened here and never closed"):
        TableLayout(written(tmp_path / "a.csv", 'n,text\n1,a\n2,"b\n3,c\n4,d\n')).read()
    assert texts(written(tmp_path / "b.csv", 'n,text\n1,a\n2,"b\nc"')) == {"train": [("a", "1"), ("b\nc", "2")]}


def test_encodings(tmp_path):
    path = written(tmp_path / "a.csv", columns(rows=[*ROWS[:2], {"text": "café", "n": 2}]).encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv: line 4: not UTF-8 text .*; set encoding to .* cp1252 .* or latin-1"):
        TableLayout(path).read()
    assert texts(path, encoding="latin-1")["train"][2] == ("café", "2")
    with pytest.raises(UserError, match="there is no encoding of text 'latin-11'; did you mean 'latin-1'"):
        TableLayout(path, encoding="latin-11")
    with pytest.raises(UserError, match="there is no encoding of text 'base64'"):
        TableLayout(path, encoding="base64")
    bare = written(tmp_path / "b.csv", columns().encode("utf-16-le"))
    with pytest.raises(UserError, match=r"looks like UTF-16 without the mark .* set encoding: utf-16-le"):
        TableLayout(bare).read()
    assert texts(bare, encoding="utf-16-le") == EXPECTED
    # a mark at the start goes before what is set
    assert texts(written(tmp_path / "c.csv", columns().encode("utf-16")), encoding="cp1252") == EXPECTED


def test_json_that_is_no_table(tmp_path):
    with pytest.raises(UserError, match=r"a\.json: record 1: expected a JSON object, got 3"):
        TableLayout(written(tmp_path / "a.json", '[{"text": "a"}, 3]')).read()
    with pytest.raises(UserError, match=r"b\.json: line 2: not valid JSON .*expected a list of objects, or one object"):
        TableLayout(written(tmp_path / "b.json", "[1, 2]\n[3]\n")).read()
    with pytest.raises(UserError, match=r"c\.json: line 1: not valid JSON .*; expected one object a line"):
        TableLayout(written(tmp_path / "c.json", json.dumps(ROWS[0], indent=1))).read()
    with pytest.raises(UserError, match=r"d\.json: expected a list of objects.*orient='records'"):
        TableLayout(written(tmp_path / "d.json", '{"text": {"0": "a"}, "n": {"0": 1}}')).read()


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", None, "dev.parquet"),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"),
        ("train-00000-of-00002-1a2b3c4d5e.parquet", "train-00001-of-00002-1a2b3c4d5e.parquet", "dev.parquet"),
        ("train_0.parquet", "train_1.parquet", "dev.parquet"),
        ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"),
        ("split=train/part-0.parquet", "split=train/part-1.parquet", "split=test/part-0.parquet"),
    ],
)
def test_a_folder_of_shards(tmp_path, names):
    rows = [{"text": row["text"], "n": row["n"]} for row in ROWS]
    first, second, held_out = names
    written(tmp_path / first, parquet(rows[: 2 if second else 4]))
    if second:
        written(tmp_path / second, parquet(rows[2:4]))
    written(tmp_path / held_out, parquet(rows[4:]))
    (tmp_path / "info.json").write_text('{"about": "these files"}')
    assert texts(str(tmp_path)) == EXPECTED


def test_parts_have_the_split_that_their_records_say(tmp_path):
    for i in range(3):
        written(tmp_path / f"part-0000{i}-5f3e.snappy.parquet", parquet(ROWS[2 * i : 2 * i + 2]))
    assert texts(str(tmp_path)) == EXPECTED
    assert texts(str(tmp_path), splits={"train": "dev"}) == {"train": EXPECTED["test"]}


def test_shards_that_are_missing(tmp_path):
    written(tmp_path / "train-00000-of-00003.parquet", parquet())
    with pytest.raises(UserError, match="1 of the 3 files train-…-of-00003 are there"):
        TableLayout(str(tmp_path)).read()


def test_parquet_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        TableLayout(written(tmp_path / "a.parquet", "text")).read()
    table = pyarrow.Table.from_pylist([{"text": "a", "label": 1}])
    features = {"text": {"dtype": "string"}, "label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    noted = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow_parquet.write_table(noted, tmp_path / "b.parquet")
    assert TableLayout(str(tmp_path / "b.parquet")).read().names == {"label": ["bad", "good"]}
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r'b\.parquet: needs the library pyarrow; pip install "fdl\[parquet\]"'):
        TableLayout(str(tmp_path / "b.parquet")).read()


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
    table = TableLayout("hub:somebody/reviews:small").read()
    assert library.asked == [("somebody/reviews", "small")]
    assert {split: [r["text"] for r in records] for split, records in table.splits.items()} == {
        "train": ["a"],
        "test": ["b"],
    }
    assert table.names == {"label": ["bad", "good"]}
    with pytest.raises(UserError, match=r"nobody/nothing: the library datasets cannot load it \(Couldn't find it"):
        TableLayout("hub:nobody/nothing").read()


def test_a_data_set_that_the_library_has_saved(library, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [r["text"] for r in TableLayout(str(tmp_path)).read().splits["train"]] == [str(tmp_path)]


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'needs the library datasets; pip install "fdl\[datasets\]"'):
        TableLayout("hub:somebody/reviews").read()


def test_a_folder_called_as_the_library_is_no_library(tmp_path, monkeypatch):
    """Python imports any folder of the name; where the library is not installed, that is what it finds."""
    (tmp_path / "datasets").mkdir()
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if not (Path(p) / "datasets").exists())])
    with pytest.raises(
        UserError, match=r'needs the library datasets; pip install "fdl\[datasets\]" .*/datasets has its'
    ):
        TableLayout("hub:glue:sst2").read()
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
