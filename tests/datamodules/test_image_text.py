import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from sklearn.datasets import load_digits

from fdl.datamodules import image_text_shards as shards_module
from fdl.datamodules.captioned_digits import WORDS, CaptionedDigits
from fdl.datamodules.digits import Digits
from fdl.datamodules.image_text import ImageText
from fdl.datamodules.image_text_arrays import ImageTextArrays
from fdl.datamodules.image_text_shards import ImageTextShards
from fdl.datamodules.pairs import PairSamples
from fdl.datamodules.partition import ByGroup, ClassSplit
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.text import TextSamples
from fdl.errors import UserError
from fdl.modules.small_dual_encoder import SmallDualEncoder

SPLITS = ("train", "proxy", "validation", "test")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def captions(data, samples):
    (_, tokens), labels = samples.batch(torch.arange(len(samples)))
    assert labels is None
    return [data.tokenizer.decode([t for t in row if t >= 0]) for row in tokens.tolist()]


def colours(samples):
    """Names of the colours of one-coloured images, by their largest channel."""
    (images, _), _ = samples.batch(torch.arange(len(samples)))
    return [list(COLOURS)[c] for c in images.mean((2, 3)).argmax(1).tolist()]


def painted(name, size=10):
    stream = io.BytesIO()
    Image.new("RGB", (size, size + 4), COLOURS[name]).save(stream, "png")
    return stream.getvalue()


def table(folder, count=12, **more):
    """Images of one colour each, with captions that name it."""
    rows = []
    for i in range(count):
        name = list(COLOURS)[i % 3]
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{i}.png").write_bytes(painted(name))
        rows.append({"file": f"images/{i}.png", "caption": f"it is {name}", "colour": name, "who": f"w{i % 2}", **more})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "captions.jsonl")


# -- samples -----------------------------------------------------------------------------------------------------


def pairs():
    images = TensorSamples(
        torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])
    )
    texts = TextSamples(np.array([5, 6, 7, 8, 9, 10], np.uint16), [1, 2, 1, 2])
    return PairSamples(images, texts, np.array(["a", "b", "a", "b"]))


def test_a_batch_has_images_and_captions_of_the_same_pairs():
    inner = pairs().subset([3, 2, 0]).subset([2, 0])
    (images, tokens), labels = inner.batch(torch.tensor([1, 0]))
    assert (images * 255).round().byte()[:, 0, 0, 0].tolist() == [36, 0]
    assert tokens.tolist() == [[9, 10], [5, -1]]
    assert labels is None
    assert inner.labels.tolist() == [0, 1]
    assert inner.groups.tolist() == ["a", "b"]
    assert inner.input_shape == (3, 2, 2)
    assert inner.lengths.tolist() == [1, 2]
    assert inner.nbytes == 2 * 12 + 2 * 3


def test_unlabelled_pairs_and_their_hash():
    public = pairs().unlabelled()
    assert public.labels is None
    assert public.groups is None
    assert public.images.labels is None
    assert public.content_hash() == pairs().content_hash()
    others = [pairs().subset([1, 0, 2, 3]), pairs().transformed([0.5] * 3, [1.0] * 3)]
    swapped = pairs()
    swapped.texts = swapped.texts.subset([2, 1, 0, 3])
    assert len({public.content_hash(), swapped.content_hash(), *(o.content_hash() for o in others)}) == 4
    with pytest.raises(ValueError, match="4 images with 3 captions"):
        PairSamples(pairs().images, pairs().texts.subset([0, 1, 2]))


# -- digits ------------------------------------------------------------------------------------------------------


def test_captioned_digits():
    data = ready(CaptionedDigits(context=40))
    assert [len(getattr(data, split)) for split in SPLITS] == [937, 400, 100, 360]
    assert set(data.model_kwargs) == {"input_shape", "tokenizer", "context"}
    assert data.model_kwargs["input_shape"] == (1, 8, 8)
    mean, std = ready(CaptionedDigits(context=40, normalize=True)).model_kwargs["normalization"]
    assert (len(mean), len(std)) == (1, 1)
    for split in ("train", "test"):
        samples = getattr(data, split)
        for caption, label in zip(captions(data, samples), samples.labels.tolist()):
            assert WORDS[label] in caption or str(label) in caption
    assert data.proxy.labels is None
    assert len(set(captions(data, data.proxy))) > 50  # of 10 digits in 8 sentences
    # images are those of scikit-learn
    digits = {image.astype(np.float32).tobytes(): target for image, target in zip(*load_digits(return_X_y=True))}
    (images, _), _ = data.test.batch(torch.arange(360))
    assert [digits[(image * 16).numpy().tobytes()] for image in images.flatten(1)] == data.test.labels.tolist()
    again, other = ready(CaptionedDigits(context=40)), ready(CaptionedDigits(context=40, seed=1))
    assert data.fingerprint() == again.fingerprint() != other.fingerprint()


def test_classes_decide_a_partition():
    data = ready(CaptionedDigits(context=40))
    for part in data.partition(ClassSplit(classes_per_client=2), 5, 0):
        assert len(set(data.train.labels[part].tolist())) == 2


def test_captions_are_cut_to_the_context(caplog):
    data = ready(CaptionedDigits(context=7))
    assert max(len(caption) for caption in captions(data, data.train)) == 7
    assert data.truncated == 1797  # no sentence is as short
    assert (
        "captioned_digits: cut to 7 tokens, which are bytes (set tokenizer for others): 1797 of 1797 captions"
        in caplog.text
    )
    with pytest.raises(UserError, match="context must be at least 1 token"):
        CaptionedDigits(context=0)


def test_public_pairs_come_with_the_same_tokenizer(tmp_path):
    from fdl.modules.tokenizers import train_bpe

    data = ready(CaptionedDigits(proxy=CaptionedDigits(seed=7)))
    assert len(data.proxy) == 1797
    with pytest.raises(UserError, match="proxy: digits has no images with captions"):
        ready(CaptionedDigits(proxy=Digits()))
    train_bpe(["a", "b"], 257, tmp_path)
    with pytest.raises(UserError, match="have different tokenizers"):
        ready(CaptionedDigits(proxy=CaptionedDigits(tokenizer=str(tmp_path))))
    with pytest.raises(UserError, match="proxy: captioned_digits has inputs of shape 3×16×16"):
        ready(CaptionedDigits(proxy=CaptionedDigits(size=16, channels=3)))


# -- tables ------------------------------------------------------------------------------------------------------


def test_files_and_their_captions(tmp_path):
    data = ready(ImageText(table(tmp_path), size=6, label="colour", group="who", test=3, proxy=3, validation=3))
    assert data.classes == ["blue", "green", "red"]
    assert data.input_shape == (3, 6, 6)
    for split in SPLITS:
        samples = getattr(data, split)
        assert len(samples) == 3
        assert captions(data, samples) == [f"it is {name}" for name in colours(samples)]
    assert [data.classes[label] for label in data.test.labels] == colours(data.test)
    assert set(data.groups) <= {"w0", "w1"}


def test_names_from_another_folder_in_a_table_of_columns(tmp_path):
    table(tmp_path, count=3)
    (tmp_path / "lists").mkdir()
    for name, number in (("train", 0), ("test", 1)):
        (tmp_path / "lists" / f"{name}.csv").write_text(f'name,says\nimages/{number}.png,"red, or so"\n')
    data = ready(
        ImageText(str(tmp_path / "lists"), size=6, image_root=str(tmp_path), file="name", caption="says", channels=1)
    )
    assert captions(data, data.train) == captions(data, data.test) == ["red, or so"]
    assert data.input_shape == (1, 6, 6)
    assert data.classes == []
    assert data.train.labels is None


def test_images_that_are_missing_or_broken_are_named(tmp_path, caplog):
    path = table(tmp_path)
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 image\(s\) are missing or not readable") as caught:
        ready(ImageText(path, size=6, test=3))
    lines = str(caught.value).splitlines()
    assert lines[1].strip().startswith(f"{path}: line 4: ")
    assert lines[1].endswith("3.png: no such file")
    assert lines[2].endswith("5.png: no image format that is known")
    cut = (tmp_path / "images" / "7.png").read_bytes()
    (tmp_path / "images" / "7.png").write_bytes(cut[:-25])
    data = ready(ImageText(path, size=6, test=3, skip_unreadable=True))
    assert len(data.train) + len(data.test) == 9
    assert "left out 3 image(s) that are missing or not readable" in caplog.text
    assert captions(data, data.train) == [f"it is {name}" for name in colours(data.train)]


def test_tables_with_oddities(tmp_path, caplog):
    """Semicolons, another encoding, and a caption that is missing."""
    table(tmp_path, 6)
    rows = [f"images/{i}.png;{'café' if i else ''}" for i in range(6)]
    (tmp_path / "a.csv").write_bytes("\n".join(["file;caption", *rows]).encode("latin-1"))
    data = ready(ImageText(str(tmp_path / "a.csv"), 6, test=1, encoding="latin-1", skip_empty=True))
    assert captions(data, data.train) == ["café"] * 4
    assert "left out 1 records with empty texts" in caplog.text
    with pytest.raises(UserError, match="line 2: 'caption' is an empty text; set skip_empty: true"):
        ready(ImageText(str(tmp_path / "a.csv"), 6, test=1, encoding="latin-1"))


def test_captions_that_are_none(tmp_path):
    path = table(tmp_path, caption=" ")
    with pytest.raises(UserError, match=r"line 1: 'caption' is an empty text; set skip_empty: true"):
        ready(ImageText(path, size=6, test=3))
    with pytest.raises(UserError, match="line 1: no key 'says'; there are 'file', 'caption'"):
        ready(ImageText(path, size=6, test=3, caption="says"))


# -- arrays ------------------------------------------------------------------------------------------------------


def arrays(path, **changes):
    x = np.zeros((12, 6, 6), np.uint8) + np.arange(12, dtype=np.uint8)[:, None, None]
    kept = {"x_train": x, "captions_train": np.array([f"grey {i}" for i in range(12)]), **changes}
    np.savez(path, **{key: value for key, value in kept.items() if value is not None})
    return str(path)


def test_arrays_with_their_captions(tmp_path):
    path = arrays(tmp_path / "a.npz", kind=np.arange(12) % 2, who=np.array(["x", "y", "z"] * 4))
    data = ready(ImageTextArrays(path, y_train="kind", groups="who", test=4, proxy=2))
    for split in ("train", "proxy", "test"):
        samples = getattr(data, split)
        (images, _), _ = samples.batch(torch.arange(len(samples)))
        grey = (images[:, 0, 0, 0] * 255).round().int().tolist()
        assert captions(data, samples) == [f"grey {value}" for value in grey]
    assert data.train.labels.tolist() == [int(c.split()[1]) % 2 for c in captions(data, data.train)]
    assert data.groups.tolist() == ["xyz"[int(c.split()[1]) % 3] for c in captions(data, data.train)]
    own_test = arrays(tmp_path / "b.npz", x_test=np.zeros((2, 6, 6), np.uint8), captions_test=np.array(["a", "b"]))
    assert captions(data, ready(ImageTextArrays(own_test)).test) == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions_train": None}, "no array 'captions_train' for captions_train; there are x_train"),
        ({"captions_train": np.array(["a"] * 11)}, r"'captions_train': expected 12 strings, .* of shape \(11,\)"),
        ({"captions_train": np.arange(12)}, "'captions_train': expected 12 strings, one an image, got int64"),
        ({"captions_train": np.array(["a"] * 11 + [""])}, r"'captions_train'\[11\] is an empty text"),
        ({"x_test": np.zeros((2, 6, 6), np.uint8)}, "no array 'captions_test' for captions_test"),
    ],
)
def test_what_is_wrong_with_arrays(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ready(ImageTextArrays(arrays(tmp_path / "a.npz", **changes), test=2))


# -- shards ------------------------------------------------------------------------------------------------------


def shard(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards(tmp_path):
    described = json.dumps({"caption": "a blue one", "kind": "cold"}).encode()
    shard(
        tmp_path / "train-0.tar",
        {
            "000.png": painted("red"),
            "000.txt": b"a red one\n",
            "000.json": b'{"kind": "warm"}',
            "sub/000.json": described,
            "sub/000.PNG": painted("blue"),
        },
    )
    shard(
        tmp_path / "train-1.tar", {"7.txt": "grün".encode(), "7.json": b'{"kind": "cold"}', "7.png": painted("green")}
    )
    shard(tmp_path / "val.tar", {"7.txt": b"red", "7.json": b'{"kind": "warm"}', "7.png": painted("red")})
    data = ready(
        ImageTextShards(
            str(tmp_path / "train-*.tar"), 6, test_path=str(tmp_path / "val.tar"), label="kind", group="shard"
        )
    )
    assert captions(data, data.train) == ["a red one", "a blue one", "grün"]
    assert colours(data.train) == ["red", "blue", "green"]
    assert data.groups.tolist() == ["train-0", "train-0", "train-1"]
    assert data.classes == ["cold", "warm"]
    assert data.train.labels.tolist() == [1, 0, 0]
    assert colours(data.test) == ["red"]


def test_depth_of_grey_images_is_that_of_all_shards(tmp_path, caplog):
    def xray(value):
        stream = io.BytesIO()
        Image.fromarray(np.full((6, 6), value, np.uint16)).save(stream, "png")
        return stream.getvalue()

    shard(tmp_path / "train.tar", {f"{i}.{e}": c for i in range(4) for e, c in (("png", xray(100 * i)), ("txt", b"a"))})
    shard(tmp_path / "val.tar", {"0.png": xray(4000), "0.txt": b"a", "1.png": painted("red"), "1.txt": b"red"})

    def shades(samples):
        return (samples.images.batch(torch.arange(len(samples)))[0][:, 0, 0, 0] * 255).round().int().tolist()

    with caplog.at_level("INFO"):
        data = ready(ImageTextShards(str(tmp_path / "train.tar"), 6, test_path=str(tmp_path / "val.tar")))
    assert shades(data.train) == [round(value * 255 / 4095) for value in (0, 100, 200, 300)]
    assert shades(data.test) == [round(4000 * 255 / 4095), 255]
    assert "(5 of 6 images) has values from 0 to 4000: 0 is taken for black and 4095 for white" in caplog.text
    window = ready(ImageTextShards(str(tmp_path / "train.tar"), 6, test=1, seed=3, value_range=[100, 300]))
    assert sorted(shades(window.train) + shades(window.test)) == [0, 0, 128, 255]


def test_shards_by_pattern_and_folder(tmp_path):
    """In the order of their names, packed or not; numbers in braces are as wide as they are written."""
    for name, colour in (("train-008", "red"), ("train-009", "green"), ("train-010", "blue")):
        shard(tmp_path / f"{name}.tar.gz", {"1.png": painted(colour), "1.txt": b"\xef\xbb\xbf" + colour.encode()})
    for path in (tmp_path, tmp_path / "train-{008..010}.tar.gz", tmp_path / "train-{008,009,010}.tar.gz"):
        data = ImageTextShards(str(path), 6, group="shard").load().train
        assert colours(data) == ["red", "green", "blue"]
        assert data.groups.tolist() == ["train-008", "train-009", "train-010"]
    assert len(ImageTextShards(str(tmp_path / "train-0{09..10}.tar.gz"), 6).load().train) == 2
    with pytest.raises(UserError, match=r"train-011\.tar\.gz: no such tar file"):
        ImageTextShards(str(tmp_path / "train-{008..011}.tar.gz"), 6)
    with pytest.raises(UserError, match="its braces mean no file: the smaller number comes first"):
        ImageTextShards(str(tmp_path / "train-{010..008}.tar.gz"), 6)
    assert shards_module._expanded("a{0..10..2}-{8..10}{x}") == [f"a{{0..10..2}}-{i}{{x}}" for i in (8, 9, 10)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tar files in this folder"):
        ImageTextShards(str(tmp_path / "empty"), 6)


def test_images_without_captions_can_be_left_out(tmp_path, caplog):
    members = {f"{i}.png": painted("red") for i in range(5)} | {"0.txt": b"red", "1.txt": b" ", "4.txt": b"rose"}
    members["2.json"] = b'{"caption": null}'
    shard(tmp_path / "a.tar", dict(sorted(members.items())))
    data = ready(ImageTextShards(str(tmp_path / "a.tar"), 6, test=1, skip_empty=True))
    assert sorted(captions(data, data.train) + captions(data, data.test)) == ["red", "rose"]
    assert "left out 3 image(s) without a caption" in caplog.text


def test_what_is_wrong_with_a_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    good = {"1.png": painted("red"), "1.txt": b"red", "3.png": painted("red"), "3.txt": b"red"}
    shard(path, {**good, "2.png": b"no image", "2.txt": b"x"})
    with pytest.raises(UserError, match=r"a\.tar: 2: not a readable image .*; set skip_unreadable: true"):
        ready(ImageTextShards(str(path), 6, test=1))
    data = ready(ImageTextShards(str(path), 6, test=1, skip_unreadable=True))
    assert len(data.train) + len(data.test) == 2
    for members, message in (
        ({"1.png": painted("red")}, r"a\.tar: 1: no caption, neither .* set skip_empty: true"),
        ({"1.png": painted("red"), "1.txt": b" "}, r"a\.tar: 1: no caption, neither"),
        ({"1.png": painted("red"), "1.json": b'{"caption": null}'}, r"a\.tar: 1: no caption, neither"),
        ({"1.txt": b"red"}, r"a\.tar: 1: no image with this caption"),
        ({"1.png": painted("red"), "1.json": b"{"}, r"a\.tar: 1: its text is not valid"),
        ({"1.png": painted("red"), "1.json": b"[]"}, r"a\.tar: 1\.json: expected a JSON object"),
        ({"1.png": painted("red"), "1.txt": b"\xff"}, r"a\.tar: 1: its text is not valid"),
        ({"readme": b"x"}, "no images with captions in these shards"),
    ):
        shard(path, members)
        with pytest.raises(UserError, match=message):
            ready(ImageTextShards(str(path), 6, test=1))
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"a\.tar: cannot be read"):
        ready(ImageTextShards(str(path), 6, test=1))
    with pytest.raises(UserError, match=r"b-\*\.tar: no such tar file, nor a folder or pattern"):
        ImageTextShards(str(tmp_path / "b-*.tar"), 6)
    shard(path, good)
    monkeypatch.setattr(shards_module, "_MOST_BYTES", 2 * 3 * 36 - 1)
    with pytest.raises(UserError, match="unpack the shards"):
        ready(ImageTextShards(str(path), 6, test=1))


# -- training ----------------------------------------------------------------------------------------------------


def test_a_plain_trainer_learns_from_it():
    torch.manual_seed(0)
    data = ready(CaptionedDigits(context=32, validation=0, batch_size=64))
    model = SmallDualEncoder(dim=32, image="mlp", text="bag", width=32, **data.model_kwargs)
    run = Trainer(
        accelerator="cpu",
        max_epochs=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(model, datamodule=data)
    # zero-shot: the class whose name is nearest
    (images, _), _ = data.test.batch(torch.arange(len(data.test)))
    names = [data.tokenizer.encode(f"the digit {word}") for word in data.classes]
    width = max(map(len, names))
    texts = torch.tensor([ids + [-1] * (width - len(ids)) for ids in names])
    with torch.no_grad():
        nearest = (model.encode_image(images) @ model.encode_text(texts).T).argmax(1)
    assert (nearest == data.test.labels).float().mean() > 0.5
    assert sum(len(output.logits) for output in run.predict(model, datamodule=data)) == len(data.proxy)


# -- real data ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif("FDL_DATA" not in os.environ, reason="needs the data sets that FDL_DATA points at")
def test_game_icons_by_artist():
    path = os.path.join(os.environ["FDL_DATA"], "gameicons_imagetext_32.npz")
    data = ready(ImageTextArrays(path, groups="author_train", proxy=500, normalize=True, augment="crop_flip"))
    assert [len(s) for s in (data.train, data.proxy, data.test)] == [3095, 500, 634]
    with np.load(path) as archive:
        known = {
            (image.tobytes(), str(text), str(author))
            for image, text, author in zip(archive["x_train"], archive["captions_train"], archive["author_train"])
        }
        artists = len(set(archive["author_train"].tolist()))
    plain = data.train.transformed(None, None)
    (images, _), _ = plain.batch(torch.arange(200))
    pixels = (images[:, 0] * 255).round().byte().numpy()
    found = zip(pixels, captions(data, plain)[:200], data.groups[:200])
    assert all((np.ascontiguousarray(image).tobytes(), text, str(author)) in known for image, text, author in found)
    artists = len(set(data.groups.tolist()))
    assert artists == 33  # of 35; two have icons in the proxy set only
    parts = data.partition(ByGroup(), artists, 0)
    assert sorted(len(set(data.groups[part])) for part in parts) == [1] * artists
