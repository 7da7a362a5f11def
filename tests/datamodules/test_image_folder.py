import numpy as np
import pytest
import torch
from PIL import Image

from fdl.datamodules.image_folder import ImageFolder
from fdl.datamodules.partition import ByGroup
from fdl.errors import UserError


def fill(folder, *classes, count=5, value=0, suffix="png"):
    for code, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((10, 12, 3), (value + 40 * code, i, 0), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.{suffix}")


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def everything(samples):
    return samples.batch(torch.arange(len(samples)))[0]


def test_classes_with_held_out_test(tmp_path):
    fill(tmp_path, "dog", "cat", "owl")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    data = ready(ImageFolder(str(tmp_path), size=8, test=3, proxy=3, stratify_public=True))
    assert data.classes == ["cat", "dog", "owl"]
    assert data.input_shape == (3, 8, 8)
    assert [len(s) for s in (data.train, data.proxy, data.test)] == [9, 3, 3]
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    # red tells the class: dog was written first, then cat, then owl
    red = (everything(data.train)[:, 0, 0, 0] * 255).round().tolist()
    assert red == [40] * 3 + [0] * 3 + [80] * 3
    assert data.groups is None


def test_val_without_test_is_the_test_split_and_with_it_the_validation_split(tmp_path):
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "val", "a", "b", count=2)
    data = ready(ImageFolder(str(tmp_path), size=4))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 0, 4]
    fill(tmp_path / "test", "b", count=3)
    data = ready(ImageFolder(str(tmp_path), size=4))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 4, 3]
    assert data.test.labels.tolist() == [1, 1, 1]


def test_domains_are_groups(tmp_path):
    fill(tmp_path / "hospital_1", "ill", "well", value=0)
    fill(tmp_path / "hospital_2", "ill", "well", value=100, suffix="jpg")
    data = ready(ImageFolder(str(tmp_path), size=8, domain_folders=True, test=4))
    assert data.classes == ["ill", "well"]
    parts = data.partition(ByGroup(), 2, 0)
    assert [set(data.groups[part]) for part in parts] == [{"hospital_1"}, {"hospital_2"}]
    images = everything(data.train)
    assert images[parts[0], 0].max() < 0.3 < images[parts[1], 0].min()


def test_greyscale_and_normalisation_by_the_proxy_set(tmp_path):
    fill(tmp_path, "a", "b")
    data = ready(ImageFolder(str(tmp_path), size=8, channels=1, test=2, proxy=4, normalize=True))
    assert data.input_shape == (1, 8, 8)
    assert everything(data.proxy).mean().item() == pytest.approx(0, abs=1e-5)


def test_unreadable_files_are_named_or_skipped(tmp_path, caplog):
    fill(tmp_path, "a", "b")
    cut = tmp_path / "a" / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-1000])
    (tmp_path / "b" / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 file\(s\) are not readable .* skip_unreadable: true\n  .*empty\.jpg: "):
        ready(ImageFolder(str(tmp_path), size=8, test=2))
    (tmp_path / "b" / "empty.jpg").unlink()
    # headers are whole, so this one shows when it is decoded
    data = ready(ImageFolder(str(tmp_path), size=8, test=2))
    with pytest.raises(UserError, match=r"cut\.png: not a readable image"):
        everything(data.train), everything(data.test)
    (tmp_path / "b" / "empty.jpg").write_bytes(b"")
    data = ready(ImageFolder(str(tmp_path), size=8, test=2, skip_unreadable=True))
    assert len(everything(data.train)) + len(everything(data.test)) == 10
    assert "left out 2 file(s) that are not readable images" in caplog.text
    assert "cut.png: " in caplog.text and "empty.jpg: no image format that is known" in caplog.text


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        ImageFolder(str(tmp_path / "absent"), size=8)
    with pytest.raises(UserError, match=r"no images in .*/class/ \(\.bmp"):
        ready(ImageFolder(str(tmp_path), size=8))
    fill(tmp_path / "train", "a", "b")
    with pytest.raises(UserError, match=r"no images in train/domain/class/"):
        ready(ImageFolder(str(tmp_path), size=8, domain_folders=True))
    fill(tmp_path / "test", "a", "z")
    with pytest.raises(UserError, match="class 'z' has no training images"):
        ready(ImageFolder(str(tmp_path), size=8))
