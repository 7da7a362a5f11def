"""Zero-shot classification with towers whose vectors are known."""

import pytest
import torch

from fdl.datamodules.digits import Digits
from fdl.errors import UserError
from fdl.evaluators.zero_shot import ZeroShot
from tests.evaluators.models import Towers
from tests.evaluators.pairs import Pairs
from tests.evaluators.worlds import server

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


class Letters:
    """Token i for the i-th letter of the alphabet, so that a class's first token is its number."""

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text.split()[-1]]


def world(labels, classes=NAMES):
    labels = torch.tensor(labels)
    pairs = Pairs([[0]] * len(labels), labels)
    return server(pairs, task="image_text", model_kwargs={"tokenizer": Letters()}, classes=classes, batch_size=3)


def towers(images):
    """Images by number, as rows of six cosines to the classes."""
    return Towers(torch.as_tensor(images, dtype=torch.float32), torch.eye(6))


def test_every_image_goes_to_the_nearest_name():
    images = torch.eye(6)[[0, 1, 2, 3, 4, 4]] + 0.1 * torch.eye(6)[[5, 5, 5, 5, 0, 0]]
    images[5] += torch.tensor([0.05, 0.4, 0.3, 0.2, 0.0, 0.0])  # the last is a fox, and least like one
    got = ZeroShot(templates=["{}"]).evaluate(world([0, 1, 2, 3, 4, 5]), towers(images))
    assert got["accuracy"] == pytest.approx(5 / 6)
    assert got["top5"] == pytest.approx(5 / 6)
    assert got["macro_f1"] == pytest.approx((4 + 2 / 3 + 0) / 6)


def test_only_some_classes_may_be_asked_for():
    """Image 1 is a bee and looks like an ant first, like an eel second."""
    images = torch.eye(6)[[0, 0, 4]]
    images[1] += torch.tensor([0.0, 0.1, 0.0, 0.0, 0.5, 0.0])
    whole = ZeroShot(templates=["{}"]).evaluate(world([0, 1, 4]), towers(images))
    some = ZeroShot(templates=["{}"], classes=["eel", "bee"]).evaluate(world([0, 1, 4]), towers(images))
    assert whole["accuracy"] == pytest.approx(2 / 3)
    assert (some["accuracy"], "top5" in some) == (0.5, False)
    images[1, 1] = 0.9
    assert ZeroShot(classes=["eel", "bee"]).evaluate(world([0, 1, 4]), towers(images))["accuracy"] == 1


def test_every_sentence_is_read_for_every_class():
    seen = []

    class Spy(Letters):
        def encode(self, text):
            seen.append(text)
            return super().encode(text)

    asked = world([1, 2])
    asked.model_kwargs["tokenizer"] = Spy()
    ZeroShot(templates=["{}", "my {}"], classes=["bee", "cat"]).evaluate(asked, towers(torch.eye(6)[[1, 2]]))
    assert seen == ["bee", "my bee", "cat", "my cat"]


def test_further_labelled_images():
    class Tower(Towers):
        def encode_image(self, images):
            return torch.nn.functional.normalize(images.flatten(1)[:, :6] + 1e-3, dim=1)

    data = Digits()
    data.setup()
    asked = server(
        Pairs([[0]]), task="image_text", model_kwargs={"tokenizer": Letters(), "input_shape": (1, 8, 8)}, batch_size=50
    )
    asked.model_kwargs["tokenizer"].encode = lambda text: [int(text) % 6]
    module = Tower(torch.eye(6), torch.eye(6))
    got = ZeroShot(data=data, templates=["{}"]).evaluate(asked, module)
    pixels = data.test.batch(torch.arange(len(data.test)))[0].flatten(1)[:, :6] + 1e-3
    # classes 6 … 9 have the same vectors as 0 … 3, and the first of equals wins
    expected = (pixels.argmax(1) == data.test.labels).float().mean()
    assert got["accuracy"] == pytest.approx(float(expected))


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(UserError, match="zero_shot: the data have no labels; name labelled images in its data"):
        ZeroShot().prepare(server(Pairs([[0]]), model_kwargs={"tokenizer": Letters()}))
    with pytest.raises(UserError, match="zero_shot: the data have no class 'bea'; did you mean 'bee'"):
        ZeroShot(classes=["ant", "bea"]).prepare(world([0, 1]))
    with pytest.raises(UserError, match="the test set has no image of the classes asked for"):
        ZeroShot(classes=["dog", "eel"]).prepare(world([0, 1]))
    with pytest.raises(UserError, match="needs a tokenizer"):
        ZeroShot().prepare(server(Pairs([[0]], torch.tensor([0])), classes=NAMES))
    with pytest.raises(UserError, match="classes must name at least two"):
        ZeroShot(classes=["ant", "ant"])
    with pytest.raises(UserError, match="templates: 'a photo' must contain"):
        ZeroShot(templates=["a photo"])
