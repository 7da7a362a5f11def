"""Tiny data sets written in the formats of the real ones, and read by torchvision with its checksums on."""

import hashlib
import pickle
import struct

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets

from fdl.datamodules import torchvision_sets as sets
from fdl.errors import UserError

RNG = np.random.default_rng(0)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def bytes_of(samples):
    return (samples.transformed(None, None).batch(torch.arange(len(samples)))[0] * 255).round().byte().numpy()


def write_cifar(root, cls, monkeypatch, key, names, coarse=False):
    """Batches of 20 images; the checksums torchvision expects become those of the files."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    pixels, labels = {}, {}
    for listing in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(cls, listing):
            pixels[file] = RNG.integers(0, 256, (20, 3072), dtype=np.uint8)
            labels[file] = RNG.integers(0, len(names), 20).tolist()
            with open(folder / file, "wb") as out:
                pickle.dump({"data": pixels[file], key: labels[file]}, out)
            entries.append([file, md5(folder / file)])
        monkeypatch.setattr(cls, listing, entries)
    meta = {**cls.meta}
    with open(folder / meta["filename"], "wb") as out:
        pickle.dump({meta["key"]: names}, out)
    monkeypatch.setattr(cls, "meta", {**meta, "md5": md5(folder / meta["filename"])})
    train = [file for file, _ in cls.train_list]
    return np.concatenate([pixels[f] for f in train]).reshape(-1, 3, 32, 32), np.concatenate([labels[f] for f in train])


@pytest.mark.parametrize(
    ("module", "cls", "key", "names"),
    [
        (sets.CIFAR10, datasets.CIFAR10, "labels", [f"c{i}" for i in range(10)]),
        (sets.CIFAR100, datasets.CIFAR100, "fine_labels", [f"f{i}" for i in range(100)]),
    ],
)
def test_cifar(tmp_path, monkeypatch, module, cls, key, names):
    x, y = write_cifar(tmp_path, cls, monkeypatch, key, names)
    data = ready(module(path=str(tmp_path)))
    assert data.classes == names
    assert data.input_shape == (3, 32, 32)
    np.testing.assert_array_equal(bytes_of(data.train), x)
    np.testing.assert_array_equal(data.train.labels, y)
    assert len(data.test) == 20
    assert data.train.mean == module.published[0]
    assert ready(module(path=str(tmp_path), normalize=False)).train.mean is None


def test_fashion_mnist(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    x, y = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8), RNG.integers(0, 10, 30, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        header = struct.pack(">4BIII", 0, 0, 8, 3, 30, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 30) + y.tobytes())
    data = ready(sets.FashionMNIST(path=str(tmp_path), proxy=10))
    assert data.input_shape == (1, 28, 28)
    assert data.classes[9] == "Ankle boot"
    assert [len(s) for s in (data.train, data.proxy, data.test)] == [20, 10, 30]
    np.testing.assert_array_equal(bytes_of(data.test)[:, 0], x)
    assert data.test.labels.tolist() == y.tolist()


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    listing, images = {}, {}
    for split, (url, file, _) in datasets.SVHN.split_list.items():
        images[split] = RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        scipy.io.savemat(tmp_path / file, {"X": images[split], "y": np.arange(1, 21)[:, None] % 10 + 1})
        listing[split] = [url, file, md5(tmp_path / file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", listing)
    return tmp_path, images


def test_svhn(svhn):
    root, images = svhn
    data = ready(sets.SVHN(path=str(root)))
    np.testing.assert_array_equal(bytes_of(data.train), images["train"].transpose(3, 2, 0, 1))
    # in the file 10 stands for the digit 0
    assert data.train.labels.tolist() == [*range(2, 10), 0, 1] * 2
    assert data.classes == [str(i) for i in range(10)]


def test_another_split_as_the_proxy_set(svhn):
    root, images = svhn
    data = ready(sets.SVHN(path=str(root), proxy=sets.SVHN(train_split="extra", path=str(root))))
    assert [len(s) for s in (data.train, data.proxy, data.test)] == [20, 20, 20]
    extra = {image.tobytes() for image in np.ascontiguousarray(images["extra"].transpose(3, 2, 0, 1))}
    assert {image.tobytes() for image in bytes_of(data.proxy)} == extra
    assert data.proxy.labels is None
    with pytest.raises(UserError, match="train_split must be 'train' or 'extra', got 'test'"):
        sets.SVHN(train_split="test", path=str(root))


def test_flowers(tmp_path, monkeypatch):
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for i in range(1, 13):
        Image.fromarray(np.full((30, 40, 3), 20 * i, np.uint8)).save(folder / "jpg" / f"image_{i:05d}.jpg")
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 13)[None] % 102 + 1})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [[1, 2, 3, 4]], "valid": [[5, 6]], "tstid": [[*range(7, 13)]]})
    files = dict(datasets.Flowers102._file_dict)
    for key in ("label", "setid"):
        files[key] = (files[key][0], md5(folder / files[key][0]))
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    data = ready(sets.Flowers102(path=str(tmp_path), size=16))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [4, 2, 6]
    assert data.num_classes == 102
    assert data.input_shape == (3, 16, 16)
    assert data.train.labels.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(bytes_of(data.train)[:, 0, 8, 8], [20, 40, 60, 80], atol=3)


ALL = [sets.CIFAR10, sets.CIFAR100, sets.FashionMNIST, sets.SVHN, sets.Flowers102]


@pytest.mark.parametrize("module", ALL)
def test_absent_files_say_where_and_how(module, tmp_path):
    data = module(path=str(tmp_path / "nowhere"))
    data.prepare_data()
    with pytest.raises(UserError, match=f"{module.name}: its train split is absent from .*nowhere.*download: true"):
        data.setup()
    assert not (tmp_path / "nowhere").exists()


def test_damaged_files_are_not_read(svhn):
    root, _ = svhn
    with open(root / "train_32x32.mat", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"svhn: its train split is absent from .* or damaged"):
        ready(sets.SVHN(path=str(root)))


def test_download_is_asked_for_every_split_and_failure_is_told(tmp_path, monkeypatch):
    asked = []

    def refuse(self, url, *args, **kwargs):
        asked.append(str(self))
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.svhn, "download_url", refuse)
    with pytest.raises(UserError, match=f"svhn: cannot download to {tmp_path}: no route to host"):
        sets.SVHN(path=str(tmp_path), download=True).prepare_data()
    assert asked == ["http://ufldl.stanford.edu/housenumbers/train_32x32.mat"]


def test_a_nested_proxy_set_is_downloaded_too(svhn, monkeypatch):
    root, _ = svhn
    opened = []
    monkeypatch.setattr(sets.SVHN, "open", lambda self, split, download: opened.append((split, download)))
    sets.SVHN(path=str(root), proxy=sets.SVHN(train_split="extra", path=str(root), download=True)).prepare_data()
    assert opened == [("extra", True), ("test", True)]
