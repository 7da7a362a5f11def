import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fdl.datamodules.arrays import Arrays
from fdl.datamodules.partition import ByGroup
from fdl.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
Y = np.arange(60) % 3
PLAIN = {"x_train": X, "y_train": Y, "x_test": X[:12], "y_test": Y[:12]}


@pytest.fixture
def save(tmp_path):
    def write(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return str(path)

    return write


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def everything(samples):
    return samples.batch(torch.arange(len(samples)))[0]


def test_npz_with_its_default_keys(save):
    data = ready(Arrays(save(**PLAIN, classes=["cat", "dog", "owl"])))
    assert data.classes == ["cat", "dog", "owl"]
    assert data.input_shape == (3, 8, 8)
    np.testing.assert_allclose(everything(data.train), X.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert data.train.labels.tolist() == Y.tolist()
    np.testing.assert_allclose(everything(data.test), X[:12].transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_a_folder_of_npy_files(tmp_path):
    for key, value in PLAIN.items():
        np.save(tmp_path / f"{key}.npy", value)
    data = ready(Arrays(str(tmp_path)))
    assert data.classes == ["0", "1", "2"]
    np.testing.assert_allclose(everything(data.train), X.transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_other_keys_and_held_out_test(save):
    path = save(images=X, target=Y, site=np.array(["a", "b"] * 30))
    data = ready(Arrays(path, x_train="images", y_train="target", groups="site", test=12))
    assert len(data.train) == 48
    parts = data.partition(ByGroup(), 2, 0)
    assert [set(data.groups[part]) for part in parts] == [{"a"}, {"b"}]


@pytest.mark.parametrize(
    ("shape", "layout", "channel_axis"),
    [
        ((60, 5, 7), "auto", None),
        ((60, 5, 7), "HW", None),
        ((60, 5, 7, 1), "auto", 3),
        ((60, 5, 7, 3), "auto", 3),
        ((60, 3, 5, 7), "auto", 1),
        ((60, 3, 5, 3), "CHW", 1),
        ((60, 3, 5, 3), "HWC", 3),
        ((60, 5, 7, 4), "HWC", 3),
    ],
)
def test_layouts(save, shape, layout, channel_axis):
    x = RNG.random(shape, dtype=np.float32)
    data = ready(Arrays(save(x_train=x, y_train=Y, x_test=x[:5], y_test=Y[:5]), layout=layout))
    expected = x[:, None] if channel_axis is None else np.moveaxis(x, channel_axis, 1)
    assert data.input_shape == expected.shape[1:]
    np.testing.assert_array_equal(everything(data.train), expected)


def test_precision_and_label_types(save):
    data = ready(Arrays(save(x_train=X / 255, y_train=Y.astype(np.uint8)[:, None]), test=10))
    assert everything(data.train).dtype == torch.float32
    assert data.train.labels.dtype == torch.int64


def test_resizing_and_greyscale(save):
    data = ready(Arrays(save(**PLAIN), size=4, channels=1, proxy=10))
    for samples in (data.train, data.proxy, data.test):
        assert samples.input_shape == (1, 4, 4)


def test_images_without_labels_as_a_proxy_set(save, tmp_path):
    np.savez(tmp_path / "public.npz", x_train=X[:9])
    public = Arrays(str(tmp_path / "public.npz"), y_train=None)
    data = ready(Arrays(save(**PLAIN), proxy=public))
    assert len(data.proxy) == 9
    assert data.proxy.labels is None


def broken(**changes):
    return {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (broken(x_train=None), {}, r"no array 'x_train' for x_train; there are y_train, x_test, y_test"),
        (broken(), {"x_train": "images"}, r"no array 'images' for x_train; there are x_train"),
        (broken(), {"x_test": "x_val"}, "no array 'x_val' for x_test"),
        (broken(), {"groups": "site"}, "no array 'site' for groups"),
        (broken(y_test=None), {}, "'x_test': test images without labels"),
        (broken(y_train=Y[:59]), {}, "'y_train': 59 labels for 60 images in 'x_train'"),
        (broken(y_train=Y / 2), {}, "'y_train': 0.5 is no class: labels must be whole numbers"),
        (broken(y_train=np.eye(3, dtype=int)[Y]), {}, r"'y_train': labels must be .* of shape \(60, 3\)"),
        (broken(y_train=Y - 1), {}, "'y_train': labels must be ≥ 0, got -1"),
        (broken(classes=["a", "b"]), {}, "'classes': 2 names, but labels go up to 2"),
        (broken(x_train=np.where(X > 250, np.nan, X)), {}, r"'x_train': \d+ values are not finite"),
        (broken(x_train=X * 1e40), {}, r"'x_train': \d+ values are not finite in single precision"),
        (broken(x_train=X.astype(np.uint16)), {}, "'x_train': images must be uint8 or floating point, got uint16"),
        (broken(x_train=X[:, :, :, :2]), {}, r"'x_train': shape \(60, 8, 8, 2\) is not .* set layout"),
        (broken(x_train=X[:, :3]), {}, r"'x_train': shape \(60, 3, 8, 3\) is either HWC or CHW; set layout"),
        (broken(x_train=X[:, 0, 0]), {}, r"'x_train': shape \(60, 3\) is not"),
        (broken(), {"layout": "HW"}, "'x_train': layout HW needs 3 dimensions"),
        (broken(x_test=X[:12, :4]), {}, r"'x_test': images of shape \(3, 4, 8\), but training has \(3, 8, 8\)"),
        (broken(site=np.arange(59)), {"groups": "site"}, r"'site': shape \(59,\), expected \(60,\)"),
        (broken(y_train=np.array([None] * 60)), {}, "'y_train': not a plain array"),
        (broken(x_train=X / 1.0, x_test=X[:12] / 255), {}, "'x_train': values from 0 to 255, but .*'x_test' there are"),
        (broken(x_train=X / 255, x_test=X[:12] / 1.0), {}, "'x_train': values from 0 to 1, but .*'x_test' there are"),
        (broken(x_train=X / 1.0), {}, "'x_train': values from 0 to 255, but in .*'x_test' there are bytes"),
        (broken(x_train=X / 127.5 - 1), {}, "'x_train': values from -1 to 1, but in .*'x_test' there are bytes"),
        (broken(x_train=X * 16.0), {}, r"'x_train': values from 0 to 4080, .* set value_range .* \[0, 4080\]"),
        (broken(x_train=X.astype(np.int64)), {}, "got int64; or set value_range"),
        (
            broken(y_train=Y * 100_000),
            {},
            "'y_test': class 1 is none of the classes of the training samples; list all classes in classes",
        ),
        (
            broken(y_train=Y.astype(np.uint64) + 2**63),
            {},
            r"'y_train': labels go up to 9\d+; number the classes from 0",
        ),
        (broken(y_train=Y * 0), {}, "'y_train': all 60 samples are of one class, '0'; a classifier needs"),
        (broken(x_test=X[:0], y_test=Y[:0]), {}, "'x_test': there are none; leave the split out, and set test"),
        (broken(x_train=X[:0], y_train=Y[:0]), {}, "'x_train': there are none"),
        (broken(classes=["a", "b", "a"]), {}, "'classes': classes 0 and 2 are both called 'a'"),
        (broken(classes=np.array([["a", "b", "c"]])), {}, r"'classes': expected one name a class, .* \(1, 3\)"),
        (broken(classes=np.array([b"\xff", b"b", b"c"])), {}, "'classes': its bytes are no text in UTF-8"),
    ],
)
def test_what_is_wrong_is_named(save, arrays, options, message):
    path = save(**arrays)
    with pytest.raises(UserError, match=message) as caught:
        ready(Arrays(path, **options))
    assert path in str(caught.value)


@pytest.mark.parametrize("scale", [1 / 255, 1.0], ids=["0 to 1", "0 to 255"])
def test_floating_point_images_end_on_one_scale(save, scale, caplog):
    with caplog.at_level("INFO"):
        data = ready(Arrays(save(**{**PLAIN, "x_train": X * scale, "x_test": X[:12] * scale})))
    np.testing.assert_allclose(everything(data.train), X.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    np.testing.assert_allclose(everything(data.test), X[:12].transpose(0, 3, 1, 2) / 255, atol=1e-6)
    assert ("'x_train': values from 0 to 255 are divided by 255" in caplog.text) == (scale == 1)


def test_standardised_images_are_as_they_are_and_this_is_said(save, caplog):
    x = ((X / 255 - 0.45) / 0.22).astype(np.float32)
    with caplog.at_level("INFO"):
        data = ready(Arrays(save(**{**PLAIN, "x_train": x, "x_test": x[:12]})))
    np.testing.assert_array_equal(everything(data.train), x.transpose(0, 3, 1, 2))
    assert "'x_train': values from -2.04545 to 2.5 are taken as they are" in caplog.text


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32])
def test_black_and_white_can_be_given(save, dtype):
    x = X.astype(dtype) * 16
    arrays = {**PLAIN, "x_train": x, "x_test": x[:12]}
    data = ready(Arrays(save(**arrays), value_range=[1600, 4000]))
    expected = (x.clip(1600, 4000).astype(float) - 1600) / 2400
    np.testing.assert_allclose(everything(data.train), expected.transpose(0, 3, 1, 2), atol=1e-6)
    with pytest.raises(UserError, match="value_range must be two numbers, black and white, the larger last"):
        Arrays(save(**arrays), value_range=[255, 0])


def test_names_that_are_stored_as_bytes(save):
    path = save(**PLAIN, classes=np.array(["Katze", "größer", "日本"]))
    assert ready(Arrays(path)).classes == ["Katze", "größer", "日本"]
    encoded = np.array([name.encode() for name in ("Katze", "größer", "日本")])
    path = save(**PLAIN, classes=encoded, site=np.array([b"a", b"b"] * 30))
    data = ready(Arrays(path, groups="site"))
    assert data.classes == ["Katze", "größer", "日本"]
    assert sorted(set(data.groups.tolist())) == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda y: y + 1, ["1", "2", "3"]),
        (lambda y: y * 100_000, ["0", "100000", "200000"]),
        (lambda y: y * 1.0, ["0", "1", "2"]),
        (lambda y: y > 0, ["0", "1"]),
    ],
)
def test_labels_are_counted_as_in_tables(save, caplog, change, names):
    """In the order of the numbers, and with a line where these are not 0, 1, …."""
    caplog.set_level("INFO", "fdl")
    data = ready(Arrays(save(**{**PLAIN, "y_train": change(Y), "y_test": change(Y[:12])})))
    assert data.classes == names
    np.testing.assert_array_equal(data.train.labels, np.unique(change(Y), return_inverse=True)[1])
    np.testing.assert_array_equal(data.test.labels, data.train.labels[:12])
    told = [line for line in caplog.messages if "are classes 0 … 2 in this order" in line]
    assert bool(told) is (names != [str(i) for i in range(len(names))])


def test_classes_without_training_samples_are_named(save, caplog):
    ready(Arrays(save(**{**PLAIN, "y_train": Y * 2, "y_test": Y[:12]}, classes=list("abcde"))))
    assert "'y_train': 2 of 5 classes have no training samples: b, d; 1 of these are in the test split" in caplog.text
    caplog.clear()
    ready(Arrays(save(**{**PLAIN, "x_train": X * 0, "x_test": X[:12] * 0})))
    assert "'x_train': all values of all images are the same" in caplog.text
    ready(Arrays(save(**PLAIN, classes=["Cat", "cat ", "owl"])))
    assert "'Cat' and 'cat ' are two classes, though they differ only in case or spaces" in caplog.text


def test_missing_file_is_found_in_the_constructor_and_nothing_is_read(tmp_path):
    with pytest.raises(UserError, match=r"absent\.npz: no such file or folder"):
        Arrays(str(tmp_path / "absent.npz"))
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    with pytest.raises(UserError, match=r"text\.npz: not an \.npz file"):
        Arrays(str(text))
    with pytest.raises(UserError, match=r"layout must be one of auto, HW, HWC, CHW, got 'WH'"):
        Arrays(str(tmp_path), layout="WH")
    Arrays(str(tmp_path))
    with pytest.raises(UserError, match="no array 'x_train' for x_train; there are none"):
        ready(Arrays(str(tmp_path)))


def test_damaged_archive(save):
    path = Path(save(**PLAIN))
    data = bytearray(path.read_bytes())
    data[400:440] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"'x_train': damaged"):
        ready(Arrays(str(path)))


# -- real data ---------------------------------------------------------------------------------------------------

real = pytest.mark.skipif("FDL_DATA" not in os.environ, reason="needs the data sets that FDL_DATA points at")


@real
def test_cifar10_images():
    path = os.path.join(os.environ["FDL_DATA"], "cifar10_lossless_7k.npz")
    data = ready(Arrays(path, proxy=2000, validation=300, normalize=True, augment="crop_flip"))
    assert [len(s) for s in (data.train, data.proxy, data.validation, data.test)] == [4744, 2000, 300, 761]
    assert data.classes[0] == "airplane"
    # statistics of 2,000 public images, against the constants published for all 50,000
    assert data.train.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.02)
    assert data.train.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.02)
    with np.load(path) as archive:
        kept = {image.tobytes() for image in archive["x_train"]}
    plain = data.train.transformed(None, None)
    images = (everything(plain.subset(range(50))) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert all(np.ascontiguousarray(image).tobytes() in kept for image in images)


@real
def test_pacs_domains_are_the_clients():
    path = os.path.join(os.environ["FDL_DATA"], "pacs_48.npz")
    data = ready(Arrays(path, groups="domain_train", proxy=500, size=32))
    assert data.input_shape == (3, 32, 32)
    assert data.num_classes == 7
    parts = data.partition(ByGroup(), 4, 0)
    assert [set(data.groups[part].tolist()) for part in parts] == [{0}, {1}, {2}, {3}]
    eight = data.partition(ByGroup(), 8, 0)
    assert all(len(set(data.groups[part].tolist())) == 1 for part in eight)
    assert max(map(len, eight)) < 2 * min(map(len, eight))
