import gzip
import json
import os
from itertools import chain

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn

from fdl.datamodules.digits import Digits
from fdl.datamodules.partition import ByGroup, ClassSplit
from fdl.datamodules.python_docstrings import PythonDocstrings
from fdl.datamodules.text_files import TextFiles
from fdl.datamodules.text_table import TextTable
from fdl.errors import UserError

SPLITS = ("train", "proxy", "validation", "test")


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def documents(data, samples):
    """The documents in windows: those of a group are joined, and cut at the end-of-text token."""
    tokens, groups = samples.batch(torch.arange(len(samples)))[0].numpy(), samples.groups
    groups = np.zeros(len(samples)) if groups is None else groups
    found = []
    for group in dict.fromkeys(groups.tolist()):
        own = tokens[groups == group].flatten()
        own = own[own >= 0]
        parts = np.split(own, np.flatnonzero(own == data.tokenizer.eos) + 1)
        found += [text for text in map(data.tokenizer.decode, parts) if text]
    return found


def table(path, count=40):
    """Documents of 1 to 40 letters, all different, of three roles."""
    rows = [
        {"text": f"{i}:" + chr(97 + i % 26) * (i % 40), "role": ("king", "fool", "queen")[i % 3]} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), rows


# -- files -------------------------------------------------------------------------------------------------------


def test_a_file_in_windows(tmp_path):
    text = "One line – \tand\r\nanother.\n\n\nA paragraph.\n \nThe last\none"
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.md").write_text("for the test")
    for how, expected in (
        ("file", [text]),
        ("paragraph", ["One line – \tand\r\nanother.", "A paragraph.", "The last\none"]),
        ("line", ["One line – \tand\r", "another.", "A paragraph.", "The last", "one"]),
    ):
        public = TextFiles(str(path), context=8, document=how)
        data = ready(TextFiles(str(tmp_path), context=8, proxy=public, test=1))
        assert documents(data, data.proxy) == expected
        assert data.proxy.batch(torch.arange(len(data.proxy)))[0].shape == (len(data.proxy), 8)


def test_a_share_that_rounds_to_no_document_is_told(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("one\n\ntwo\n" * 20)
    with pytest.raises(UserError, match=r"test 0\.05 of 4 documents rounds to 0; set .* document: paragraph or line"):
        ready(TextFiles(str(tmp_path), context=8, test=0.05))
    assert len(ready(TextFiles(str(tmp_path), context=8, test=0.05, document="paragraph")).test) > 0


def test_files_of_another_encoding(tmp_path):
    text = "café, naïve\n" * 8
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    with pytest.raises(UserError, match=r"a\.txt: line 1: not UTF-8 text .*; set encoding to .* cp1252"):
        TextFiles(str(tmp_path / "a.txt"), context=8).documents()
    for written, said in (("cp1252", "cp1252"), ("utf-16", None), ("utf-8-sig", None)):
        (tmp_path / "a.txt").write_bytes(text.encode(written))
        data = TextFiles(str(tmp_path / "a.txt"), context=8, encoding=said)
        assert data.documents()["train"].texts == [text]


def test_folders_are_groups_and_splits(tmp_path):
    for place in ("train/law/a", "train/law/deep/b", "train/poems/c", "val/poems/d"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{place}.txt").write_text(f"text of {place}")
    (tmp_path / "train" / ".hidden.txt").write_text("not this one")
    data = ready(TextFiles(str(tmp_path), context=64))
    assert documents(data, data.train) == ["text of train/law/a", "text of train/law/deep/b", "text of train/poems/c"]
    assert data.groups.tolist() == ["law", "poems"]
    assert documents(data, data.test) == ["text of val/poems/d"]
    (tmp_path / "train" / "poems" / "e.md").write_text("another")
    flat = TextFiles(str(tmp_path / "train" / "poems"), context=64).documents()["train"]
    assert flat.groups == ["c", "e"]


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt: no such file or folder"):
        TextFiles(str(tmp_path / "absent.txt"), context=8)
    with pytest.raises(UserError, match=r"no text in this folder \(\.txt"):
        ready(TextFiles(str(tmp_path), context=8, test=1))
    (tmp_path / "a.txt").write_bytes(b"a\n\xff")
    with pytest.raises(UserError, match=r"a\.txt: line 2: not UTF-8 text \(invalid start byte\); set encoding"):
        ready(TextFiles(str(tmp_path), context=8, test=1))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"a\.txt: the file is empty"):
        ready(TextFiles(str(tmp_path), context=8, test=1))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a\.pdf: expected a file of \.txt, \.md"):
        ready(TextFiles(str(tmp_path / "a.pdf"), context=8, test=1))
    with pytest.raises(UserError, match="context must be at least 2 tokens, got 1"):
        TextFiles(str(tmp_path), context=1)


# -- tables ------------------------------------------------------------------------------------------------------


def test_every_document_is_in_one_set_and_whole(tmp_path):
    path, rows = table(tmp_path / "a.jsonl")
    data = ready(TextTable(path, context=16, group="role", proxy=0.25, validation=4, test=6))
    held = {split: documents(data, getattr(data, split)) for split in SPLITS}
    assert {split: len(texts) for split, texts in held.items()} == {
        "train": 20,
        "proxy": 10,
        "validation": 4,
        "test": 6,
    }
    assert sorted(chain(*held.values())) == sorted(row["text"] for row in rows)
    again = ready(TextTable(path, context=16, group="role", proxy=0.25, validation=4, test=6))
    assert data.fingerprint() == again.fingerprint()
    other = ready(TextTable(path, context=16, group="role", proxy=0.25, validation=4, test=6, seed=1))
    assert data.fingerprint() != other.fingerprint()


def test_clients_are_whole_groups(tmp_path):
    path, rows = table(tmp_path / "a.jsonl")
    data = ready(TextTable(path, context=16, group="role", test=6))
    parts = data.partition(ByGroup(), 3, 0)
    role = {row["text"]: row["role"] for row in rows}
    held = [documents(data, data.train.subset(part)) for part in parts]
    assert sorted(sorted({role[text] for text in texts}) for texts in held) == [["fool"], ["king"], ["queen"]]
    assert sum(map(len, held)) == 34
    # the test set can be looked at group by group, too
    for group in np.unique(data.test.groups):
        own = data.test.subset(np.flatnonzero(data.test.groups == group))
        assert {role[text] for text in documents(data, own)} == {group}
    with pytest.raises(UserError, match="text_table has no labels to split by"):
        data.partition(ClassSplit(), 3, 0)
    plain = ready(TextTable(path, context=16, test=6))
    with pytest.raises(UserError, match="by_group needs data with a natural client"):
        plain.partition(ByGroup(), 3, 0)


def test_public_groups(tmp_path):
    path, rows = table(tmp_path / "a.jsonl")
    data = ready(TextTable(path, context=16, group="role", proxy_groups=["fool"], test=6))
    assert documents(data, data.proxy) == [row["text"] for row in rows if row["role"] == "fool"]
    assert data.proxy.groups is None
    assert set(data.groups) == {"king", "queen"}
    assert "fool" not in data.test.groups
    with pytest.raises(UserError, match=r"proxy_groups: text_table has no group 'foul'; did you mean 'fool'\?"):
        ready(TextTable(path, context=16, group="role", proxy_groups=["foul"], test=6))
    with pytest.raises(UserError, match="leave nothing to train on"):
        ready(TextTable(path, context=16, group="role", proxy_groups=["fool", "king", "queen"], test=6))
    with pytest.raises(UserError, match="proxy must not be set beside it"):
        TextTable(path, context=16, group="role", proxy_groups=["fool"], proxy=3)


def test_another_data_set_as_the_proxy_set(tmp_path):
    path, _ = table(tmp_path / "a.jsonl")
    (tmp_path / "public.txt").write_text("first\n\nsecond")
    public = TextFiles(str(tmp_path / "public.txt"), context=99, document="paragraph")
    data = ready(TextTable(path, context=16, test=6, proxy=public))
    assert documents(data, data.proxy) == ["first", "second"]
    assert data.proxy.input_shape == (16,)
    assert len(documents(data, data.train)) == 34
    with pytest.raises(UserError, match="proxy: digits has no text, and text_table needs some"):
        ready(TextTable(path, context=16, test=6, proxy=Digits()))


def test_proxy_sets_need_the_same_tokenizer(tmp_path):
    from fdl.modules.tokenizers import train_bpe

    path, rows = table(tmp_path / "a.jsonl")
    train_bpe([row["text"] for row in rows], 300, tmp_path / "bpe")
    public = TextTable(path, context=16, tokenizer=str(tmp_path / "bpe"))
    with pytest.raises(UserError, match="proxy: text_table and text_table have different tokenizers"):
        ready(TextTable(path, context=16, test=6, proxy=public))
    data = ready(TextTable(path, context=16, test=6, proxy=public, tokenizer=str(tmp_path / "bpe")))
    assert documents(data, data.proxy) == [row["text"] for row in rows]


def test_lists_of_texts_and_what_is_wrong_with_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"text": ["one", "two"]}', '{"text": "three"}']
    path.write_text("\n".join(lines))
    data = ready(TextTable(str(path), context=16, test=1))
    assert len(documents(data, data.train)) == 2
    for line, message in (
        ('{"text": ["a", ""]}', r"line 3: 'text'\[1\] is an empty text"),
        ('{"text": " "}', "line 3: 'text' is an empty text; set skip_empty: true"),
        ('{"text": 5}', "line 3: 'text' must be a text, got 5"),
        ('{"txt": "a"}', "line 3: no key 'text'; there are 'txt'"),
        (r'{"text": "\ud800"}', "line 3: 'text' has half of a surrogate pair"),
    ):
        path.write_text("\n".join([*lines, line]))
        with pytest.raises(UserError, match=message):
            ready(TextTable(str(path), context=16, test=1))
    path.write_text('{"text": " "}\n{"text": "one"}\n{"text": "two"}')
    assert len(documents(data, ready(TextTable(str(path), context=16, test=1, skip_empty=True)).train)) == 1


# -- docstrings --------------------------------------------------------------------------------------------------

LONG = "a text that is long enough to be counted as documentation"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages that fail when they are imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "alpha_pkg/__init__.py": f'"""Alpha: {LONG}"""\nraise RuntimeError\n',
        "alpha_pkg/_inner.py": f'def f():\n    """Inner: {LONG}"""\n',
        "alpha_pkg/shapes.py": f'''
class A:
    """A: {LONG}"""
    def m(self):
        r"""M: {LONG}

        More.
        """
        def local():
            """Local: {LONG}"""
try:
    pass
except ImportError:
    async def g():
        """G: {LONG}"""
def short():
    """Short."""
''',
        "alpha_pkg/tests/test_a.py": f'"""Test: {LONG}"""\n',
        "alpha_pkg/broken.py": f'"""Broken: {LONG}"""\ndef (',
        "beta_pkg.py": f'"""Beta: {LONG}"""\ndef f():\n    """Inner: {LONG}"""\n',
        "empty_pkg.py": "x = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)


def heads(data, samples):
    return [text.partition(":")[0] for text in documents(data, samples)]


def test_docstrings_are_read_without_an_import(packages):
    data = ready(PythonDocstrings(["alpha_pkg", "beta_pkg"], context=32, test=1))
    found = documents(data, data.train) + documents(data, data.test)
    assert sorted(text.partition(":")[0] for text in found) == ["A", "Alpha", "Beta", "G", "Inner", "M"]
    assert f"M: {LONG}\n\nMore." in found  # indentation is taken off
    assert set(data.groups) | set(data.test.groups) == {"alpha_pkg", "beta_pkg"}


def test_public_packages_and_their_order(packages):
    data = ready(PythonDocstrings(["alpha_pkg"], context=32, proxy_packages=["beta_pkg"], test=1))
    assert heads(data, data.proxy) == ["Beta", "Inner"]
    # public modules first, then internal ones; what is public somewhere is not private elsewhere
    assert sorted(heads(data, data.train) + heads(data, data.test)) == ["A", "Alpha", "G", "M"]
    whole = ready(PythonDocstrings(["beta_pkg", "alpha_pkg.shapes"], context=32, test=1))
    assert sorted(heads(whole, whole.train) + heads(whole, whole.test)) == ["A", "Beta", "G", "Inner", "M"]


def test_a_package_s_limit_counts_bytes(packages):
    lengths = [len(f"{name}: {LONG}") for name in ("Alpha", "A")]
    for limit, expected in ((sum(lengths), ["Alpha", "A"]), (sum(lengths) - 1, ["Alpha"])):
        found = PythonDocstrings(["alpha_pkg"], context=32, limit_bytes=limit).documents()["train"]
        assert [text.partition(":")[0] for text in found.texts] == expected


def test_packages_that_are_not_there(packages):
    with pytest.raises(UserError, match="packages: 'no_such_pkg' is not installed here"):
        PythonDocstrings(["no_such_pkg.sub"], context=32)
    with pytest.raises(UserError, match=r"packages: 'alpha_pkg\.no' has no Python source"):
        PythonDocstrings(["alpha_pkg.no"], context=32)
    with pytest.raises(UserError, match="packages: 'sys' has no Python source"):
        PythonDocstrings(["sys"], context=32)
    with pytest.raises(UserError, match="packages: 'beta_pkg' is named twice"):
        PythonDocstrings(["alpha_pkg", "beta_pkg"], context=32, proxy_packages=["beta_pkg"])
    with pytest.raises(UserError, match="empty_pkg has no docstrings of 40 characters or more"):
        ready(PythonDocstrings(["empty_pkg"], context=32))


def test_docstrings_of_python_and_numpy():
    data = ready(PythonDocstrings(["numpy"], context=64, proxy_packages=["stdlib"], limit_bytes=20_000))
    texts = documents(data, data.train) + documents(data, data.test)
    assert 15_000 < sum(len(text.encode()) for text in texts) <= 20_000
    assert any("NumPy" in text for text in texts)
    assert set(texts).isdisjoint(documents(data, data.proxy))
    assert len(set(texts)) == len(texts)


# -- training ----------------------------------------------------------------------------------------------------


class Bigram(LightningModule):
    def __init__(self, vocabulary):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        nn.init.zeros_(self.table.weight)
        self.losses = []

    def nll(self, batch):
        tokens, labels = batch
        assert labels is None
        assert tokens.dtype == torch.int64
        logits = self.table(tokens[:, :-1].clamp(min=0)).transpose(1, 2)
        return nn.functional.cross_entropy(logits, tokens[:, 1:], ignore_index=-1)

    def training_step(self, batch, _):
        return self.nll(batch)

    def validation_step(self, batch, _):
        self.nll(batch)

    def test_step(self, batch, _):
        self.log("nll", self.nll(batch), batch_size=len(batch[0]))

    def predict_step(self, batch, _):
        return batch[0]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def test_a_plain_trainer_learns_from_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "abcd" * 20}) + "\n" for i in range(60)))
    data = ready(TextTable(str(path), context=16, proxy=10, validation=5, test=10))
    model = Bigram(data.tokenizer.vocab_size)
    run = Trainer(
        accelerator="cpu",
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(model, datamodule=data)
    # after a there is b, and so on: far better than guessing among 257 (5.5 nats)
    assert run.test(model, datamodule=data, verbose=False)[0]["nll"] < 1
    assert torch.equal(
        torch.cat(run.predict(model, datamodule=data)), data.proxy.batch(torch.arange(len(data.proxy)))[0]
    )


# -- real data ---------------------------------------------------------------------------------------------------

real = pytest.mark.skipif("FDL_DATA" not in os.environ, reason="needs the data sets that FDL_DATA points at")


@real
def test_shakespeare_by_role():
    path = os.path.join(os.environ["FDL_DATA"], "tinyshakespeare_by_role.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    data = ready(TextTable(path, context=64, text="speeches", group="role", test=0.1, proxy=0.1, validation=200))
    held = {split: documents(data, getattr(data, split)) for split in SPLITS}
    assert sorted(chain(*held.values())) == sorted(speech for row in rows for speech in row["speeches"])
    # a client's windows have its role's speeches only, in their order, less those that were held out
    speeches = {row["role"]: row["speeches"] for row in rows}
    for role in ("GLOUCESTER", "First Citizen", "ROMEO", "CAMILLO"):
        own = documents(data, data.train.subset(np.flatnonzero(data.groups == role)))
        places = iter(speeches[role])
        assert own
        assert all(speech in places for speech in own)
    assert len(speeches) == 298
    most = [row["role"] for row in rows if row["n_chars"] >= 2000]
    large = TextTable(path, context=64, text="speeches", group="role", where={"role": most})
    assert len(set(large.documents()["train"].groups)) == 99


@real
def test_shakespeare_decodes_to_its_text():
    path = os.path.join(os.environ["FDL_DATA"], "tinyshakespeare.txt.gz")
    public = TextFiles(path, context=128)
    folder = os.path.join(os.environ["FDL_DATA"], "wikitext2_valid.txt.gz")
    data = ready(TextFiles(folder, context=128, document="line", test=10, proxy=public))
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        assert documents(data, data.proxy) == [file.read()]
    assert len(data.proxy) == -(-(1_115_394 + 1) // 128)
