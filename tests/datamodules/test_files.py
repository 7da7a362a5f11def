import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fdl.datamodules import files
from fdl.datamodules.base import _as_it_is, _Batches
from fdl.datamodules.files import FileSamples, decode_image, survey
from fdl.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Six lossless images of different sizes."""
    rng = np.random.default_rng(0)
    paths = []
    for i, (height, width) in enumerate([(8, 8), (12, 8), (8, 20), (16, 16), (8, 8), (9, 9)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_pixels_are_those_in_the_file(photos):
    pixels = decode_image(photos[0], 8, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(Image.open(photos[0])))


def test_the_central_square_is_taken(photos):
    # 12 rows of 8 columns: two rows go above and two below
    np.testing.assert_array_equal(
        decode_image(photos[1], 8, 3).transpose(1, 2, 0), np.asarray(Image.open(photos[1]))[2:10]
    )


def test_downscaling_averages(tmp_path):
    path = tmp_path / "checks.png"
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(path)
    # without antialiasing, every second pixel of a fine chequerboard is black or white
    assert abs(decode_image(path, 8, 1).astype(int) - 127).max() <= 2


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path):
    path = tmp_path / "xray.png"
    Image.fromarray(np.array([[0, 256], [32768, 65535]], dtype=np.uint16)).save(path)
    np.testing.assert_array_equal(decode_image(path, 2, 1)[0], [[0, 1], [128, 255]])


@pytest.mark.parametrize("keep", [0, 1 << 30], ids=["decoded each time", "kept in memory"])
def test_batches_subsets_and_labels(photos, keep, monkeypatch):
    monkeypatch.setattr(files, "CACHE_BELOW", keep)
    samples = FileSamples(photos, torch.arange(6), size=8, mean=[0.5] * 3, std=[0.5] * 3)
    assert samples.input_shape == (3, 8, 8)
    for _ in range(2):  # read, then read again
        x, y = samples.batch(torch.tensor([5, 0, 3, 0, 1]))
        expected = np.stack([decode_image(photos[i], 8, 3) for i in (5, 0, 3, 0, 1)]).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
        assert y.tolist() == [5, 0, 3, 0, 1]
    inner = samples.subset([4, 2, 0]).unlabelled().subset([2])
    assert inner.paths == [photos[0]]
    assert inner.labels is None
    assert torch.equal(inner.batch(torch.tensor([0]))[0], samples.batch(torch.tensor([0]))[0])


@pytest.mark.parametrize(("keep", "reads"), [(0, 4), (1 << 30, 2)])
def test_an_image_is_decoded_once_for_all_subsets(photos, keep, reads, monkeypatch):
    monkeypatch.setattr(files, "CACHE_BELOW", keep)
    opened = []
    monkeypatch.setattr(files, "decode_image", lambda *a: opened.append(a[0]) or decode_image(*a))
    samples = FileSamples(photos, size=8)
    for part in (samples.subset([1, 2]), samples.subset([2, 1])):
        part.batch(torch.arange(2))
    assert len(opened) == reads


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path):
    samples = FileSamples([tmp_path / "absent.png"], torch.zeros(1), size=8)
    assert len(samples) == 1
    with pytest.raises(UserError, match=r"absent\.png: not a readable image"):
        samples.batch(torch.arange(1))


def damaged(photos, tmp_path):
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(photos[3].read_bytes()[:-200])
    return text, cut


def test_damaged_files_are_named(photos, tmp_path):
    text, cut = damaged(photos, tmp_path)
    for path in (text, cut):
        with pytest.raises(UserError, match=f"{path}: not a readable image"):
            FileSamples([*photos, path], size=8).batch(torch.arange(7))
    headers = survey([*photos, text, cut]).problems
    assert list(headers) == [text]
    assert list(survey([*photos, text, cut], whole=True).problems) == [text, cut]


def test_content_hash_is_of_the_files_and_how_they_are_read(photos):
    samples = FileSamples(photos, torch.arange(6), size=8)
    first = samples.content_hash()
    assert first == FileSamples(photos, size=8).content_hash()
    others = [FileSamples(photos, size=9), FileSamples(photos, size=8, channels=1), samples.subset([0, 1])]
    assert len({first, *(o.content_hash() for o in others)}) == 4
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photos[2])
    assert FileSamples(photos, size=8).content_hash() != first
    os.unlink(photos[2])
    with pytest.raises(UserError, match=r"2\.png: cannot be read"):
        FileSamples(photos, size=8).content_hash()


def test_augmentation_of_files(photos):
    samples = FileSamples(photos, size=8, augment="crop_flip")
    every = torch.arange(6)
    one, two = (samples.batch(every, torch.Generator().manual_seed(s))[0] for s in (0, 0))
    assert torch.equal(one, two)
    assert not torch.equal(one, samples.batch(every)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="loader workers are forked on POSIX only")
def test_threads_do_not_hang_in_forked_workers(photos, monkeypatch):
    monkeypatch.setattr(files, "CACHE_BELOW", 0)
    samples = FileSamples(photos, size=8)
    here = samples.batch(torch.arange(4))[0]  # starts the threads of this process
    loader = DataLoader(_Batches(samples), 4, num_workers=1, collate_fn=_as_it_is, multiprocessing_context="fork")
    assert torch.equal(next(iter(loader))[0], here)
