import logging

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
    with pytest.raises(UserError, match="absent: no such file or folder"):
        ImageFolder(str(tmp_path / "absent"), size=8)
    with pytest.raises(UserError, match=r"no images in .*/class/ \(\.bmp"):
        ready(ImageFolder(str(tmp_path), size=8))
    fill(tmp_path / "train", "a", "b")
    with pytest.raises(UserError, match=r"no images in train/domain/class/"):
        ready(ImageFolder(str(tmp_path), size=8, domain_folders=True))
    fill(tmp_path / "test", "a", "z")
    with pytest.raises(UserError, match="class 'z' has no training images"):
        ready(ImageFolder(str(tmp_path), size=8))


def grey(folder, *classes, value=100, count=4, dtype=np.uint8, suffix="png"):
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((8, 8), value + i, dtype)).save(folder / name / f"{i}.{suffix}")


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("train", "test"), [8, 0, 4]),
        (("training", "testing"), [8, 0, 4]),
        (("Train", "Valid", "TEST"), [8, 4, 4]),
        (("train", "dev", "eval"), [8, 4, 4]),
        (("train", "validation"), [8, 0, 4]),
        (("train", "valid", "test"), [8, 4, 4]),
    ],
)
def test_usual_names_of_splits(tmp_path, names, sizes):
    for name in names:
        grey(tmp_path / name, "a", "b", count=4 if name.lower().startswith("train") else 2)
    data = ready(ImageFolder(str(tmp_path), size=4))
    assert [len(s) for s in (data.train, data.validation, data.test)] == sizes


def test_splits_that_may_mean_two_things(tmp_path, caplog):
    grey(tmp_path / "train", "a", "b")
    grey(tmp_path / "val", "a", "b")
    grey(tmp_path / "extra", "a")
    with caplog.at_level(logging.INFO):
        ready(ImageFolder(str(tmp_path), size=4))
    assert "val/ is the test split, as there is no other" in caplog.text
    assert "not read, being in no folder of a split: extra/" in caplog.text
    grey(tmp_path / "valid", "a", "b")
    with pytest.raises(UserError, match="val/ and valid/ are both names of the validation split; rename or remove"):
        ready(ImageFolder(str(tmp_path), size=4))


def test_splits_without_one_to_train_on(tmp_path):
    grey(tmp_path / "test", "a", "b")
    with pytest.raises(UserError, match=r"there is test/, but no folder to train on \(train/, training/, trn/\)"):
        ready(ImageFolder(str(tmp_path), size=4, test=2))


def test_splits_without_classes(tmp_path):
    grey(tmp_path, "train", "test")
    with pytest.raises(
        UserError, match="test/, train/: these hold images themselves; expected a folder for every class"
    ):
        ready(ImageFolder(str(tmp_path), size=4, test=2))


def test_a_class_called_train(tmp_path, caplog):
    grey(tmp_path, "train", "bus", "boat")
    with caplog.at_level(logging.INFO):
        data = ready(ImageFolder(str(tmp_path), size=4, test=3))
    assert data.classes == ["boat", "bus", "train"]
    assert "taken for classes, since they hold images themselves: train/" in caplog.text


def test_images_below_a_class_are_of_that_class(tmp_path, caplog):
    grey(tmp_path, "cat", "dog")
    grey(tmp_path / "owl", "images", "more/of them")
    data = ready(ImageFolder(str(tmp_path), size=4, test=2))
    assert data.classes == ["cat", "dog", "owl"]
    assert data.train.labels.bincount().sum() + len(data.test) == 16
    assert "taken for images of that class: owl/images/ (4), owl/more/of them/ (4)" in caplog.text


def test_every_class_with_one_folder_of_images(tmp_path):
    grey(tmp_path / "cat", "images")
    grey(tmp_path / "dog", "images")
    assert ready(ImageFolder(str(tmp_path), size=4, test=2)).classes == ["cat", "dog"]


def test_hospitals_above_classes_are_recognised(tmp_path):
    for split in ("train", "test"):
        for site in ("hospital_a", "hospital_b"):
            grey(tmp_path / split / site, "cat", "dog")
    message = r"one level deeper .* cat, dog below hospital_a, hospital_b; .* set domain_folders: true"
    with pytest.raises(UserError, match=message):
        ready(ImageFolder(str(tmp_path), size=4))
    data = ready(ImageFolder(str(tmp_path), size=4, domain_folders=True))
    assert data.classes == ["cat", "dog"]
    assert sorted(set(data.groups)) == ["hospital_a", "hospital_b"]
    with pytest.raises(UserError, match=r"cat, dog below hospital_a; .* set domain_folders: true"):
        (tmp_path / "one").mkdir()
        (tmp_path / "train" / "hospital_a").rename(tmp_path / "one" / "hospital_a")
        ready(ImageFolder(str(tmp_path / "one"), size=4, test=2))


def test_no_domains_where_some_are_expected(tmp_path):
    grey(tmp_path, "cat", "dog")
    message = r"no images in .*/domain/class/ .*; cat, dog hold images themselves: .* leave out domain_folders"
    with pytest.raises(UserError, match=message):
        ready(ImageFolder(str(tmp_path), size=4, test=2, domain_folders=True))


def test_splits_below_classes_or_domains(tmp_path):
    grey(tmp_path / "classes" / "cat", "train", "test")
    grey(tmp_path / "classes" / "dog", "train", "test")
    with pytest.raises(UserError, match="folders of splits, such as cat/test/, have to lie above those of classes"):
        ready(ImageFolder(str(tmp_path / "classes"), size=4))
    grey(tmp_path / "sites" / "a" / "train", "cat", "dog")
    grey(tmp_path / "sites" / "a" / "test", "cat", "dog")
    with pytest.raises(UserError, match="test/, train/: folders of splits have to lie above those of domains"):
        ready(ImageFolder(str(tmp_path / "sites"), size=4, domain_folders=True))


def test_all_formats_are_read_and_the_rest_is_said(tmp_path, caplog):
    for suffix in ("gif", "webp", "tif", "bmp", "png", "jpg", "ppm", "jfif"):
        grey(tmp_path, "a", suffix=suffix, count=1)
    grey(tmp_path, "b")
    (tmp_path / "c" / "empty").mkdir(parents=True)
    for place in ("a/notes.txt", "b/scan.dcm", "b/scan2.DCM", "b/.DS_Store", "b/Thumbs.db", "labels.csv"):
        (tmp_path / place).write_text("no image")
    Image.new("L", (4, 4)).save(tmp_path / "stray.png")
    data = ready(ImageFolder(str(tmp_path), size=4, test=2))
    assert len(data.train) + len(data.test) == 12
    assert "not read: 4 files of other kinds (2 .dcm, 1 .csv, 1 .txt)" in caplog.text
    assert "left out, holding no images: c/" in caplog.text
    assert "not read, lying outside of a folder for their class: 1 images (stray.png)" in caplog.text


def test_nothing_that_can_be_read_names_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "scan.dcm").write_text("no image")
    with pytest.raises(UserError, match=r"no images in .*/class/ .*; there are 1 files of other kinds \(1 \.dcm\)"):
        ready(ImageFolder(str(tmp_path), size=8))


def test_classes_that_are_spelt_otherwise(tmp_path):
    grey(tmp_path / "train", "Cat", "Dog")
    grey(tmp_path / "test", "cat", "Dog")
    with pytest.raises(UserError, match="class 'cat' has no training images; the training images have 'Cat'"):
        ready(ImageFolder(str(tmp_path), size=8))


def test_one_class_is_refused_before_training(tmp_path):
    grey(tmp_path, "only")
    with pytest.raises(UserError, match="all 4 samples are of one class, 'only'; a classifier needs at least two"):
        ready(ImageFolder(str(tmp_path), size=8, test=1))


def test_depth_is_that_of_all_images_and_said(tmp_path, caplog):
    grey(tmp_path / "train", "dark", dtype=np.uint16, value=40)
    grey(tmp_path / "train", "bright", dtype=np.uint16, value=2000)
    grey(tmp_path / "test", "dark", "bright", dtype=np.uint16, value=4000)
    with caplog.at_level(logging.INFO):
        data = ready(ImageFolder(str(tmp_path), size=8, channels=1))
    assert "(16 of 16 images) has values from 40 to 4003: 0 is taken for black and 4095 for white" in caplog.text
    assert (everything(data.train).amax((1, 2, 3)) * 255).round().tolist() == [
        round((value + i) * 255 / 4095) for value in (2000, 40) for i in range(4)
    ]
    assert round(everything(data.test).max().item() * 255) == round(4003 * 255 / 4095)
    data = ready(ImageFolder(str(tmp_path), size=8, channels=1, value_range=[40, 43]))
    assert (everything(data.train)[4:, 0, 0, 0] * 3).round().tolist() == [0, 1, 2, 3]
    assert data.fingerprint() != ready(ImageFolder(str(tmp_path), size=8, channels=1)).fingerprint()


def test_the_background_can_be_chosen(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / name / f"{i}.png")
    for background, value in (("white", 255), ("black", 0), ("#010203", 2)):
        data = ready(ImageFolder(str(tmp_path), size=4, test=1, background=background))
        assert (everything(data.train)[0, 1] * 255).round().unique().tolist() == [value]


def test_files_of_several_images_are_said(tmp_path, caplog):
    grey(tmp_path, "a", "b")
    pages = [Image.new("L", (4, 4), shade) for shade in (10, 200)]
    pages[0].save(tmp_path / "a" / "stack.tif", save_all=True, append_images=pages[1:])
    ready(ImageFolder(str(tmp_path), size=4, test=2))
    assert "of 1 files with several images or pages the first is read" in caplog.text and "stack.tif" in caplog.text
