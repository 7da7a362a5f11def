"""Whatever reads a data set, it is checked before anything is trained on it."""

import numpy as np
import pytest
import torch

from fdl.datamodules.base import FederatedDataModule
from fdl.datamodules.digits import Digits
from fdl.datamodules.images import ImageDataModule
from fdl.datamodules.samples import TensorSamples
from fdl.datamodules.source import Source
from fdl.errors import UserError

X = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 2


class Own(FederatedDataModule):
    """A user's data module, which checks nothing itself."""

    name = "own"

    def __init__(self, x=X, y=Y, classes=("a", "b"), **more):
        super().__init__(test=None if "x_test" in more else 10)
        self._x, self._y, self._classes = x, y, classes
        self._test = (more["x_test"], more["y_test"]) if "x_test" in more else None

    def load(self):
        test = None if self._test is None else TensorSamples(*self._test)
        return Source(TensorSamples(self._x, self._y), list(self._classes), test=test)


class OwnImages(Own, ImageDataModule):
    """The same as images."""


@pytest.mark.parametrize("kind", [Own, OwnImages])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": Y * 0}, "own: train labels: all 40 samples are of one class, 'a'"),
        ({"classes": ["a", "a"]}, "own: classes: classes 0 and 1 are both called 'a'"),
        ({"y": Y * 2}, "own: train labels: labels from 0 to 2 for 2 classes"),
        ({"y": Y - 1}, "own: train labels: labels from -1 to 0 for 2 classes"),
        (
            {"y": Y * 900, "classes": list(map(str, range(901)))},
            "2 different classes, but numbers up to 900; number them from 0",
        ),
        ({"x": X[:0], "y": Y[:0]}, "own: train samples: there are none"),
        ({"x": X / 0}, r"own: train samples: 640 values are not finite"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "own: test samples: there are none; leave the split out, and set test"),
        ({"x_test": X[:4, :, :2], "y_test": Y[:4]}, r"own: test samples: images of shape \(1, 2, 4\), .* \(1, 4, 4\)"),
        ({"x_test": X[:4], "y_test": Y[:4] + 1}, "own: test labels: labels from 1 to 2 for 2 classes"),
    ],
)
def test_a_module_of_a_users_own(kind, changes, message):
    with pytest.raises(UserError, match=message):
        kind(**changes).setup()


def test_scales_of_a_users_images(caplog):
    with caplog.at_level("INFO"):
        data = OwnImages(x=X * 255)
        data.setup()
    assert "own: train samples: values from" in caplog.text and "are divided by 255" in caplog.text
    pixels = torch.cat([data.train.batch(torch.arange(30))[0], data.test.batch(torch.arange(10))[0]])
    np.testing.assert_allclose(pixels.flatten().sort().values, X.flatten().sort().values, rtol=1e-6)
    with pytest.raises(UserError, match="bring both to one scale"):
        OwnImages(x=X * 255, x_test=X[:4], y_test=Y[:4]).setup()
    plain = Own(x=X * 255)  # may be anything: only images have a scale
    plain.setup()
    assert plain.train.batch(torch.arange(30))[0].max() > 200


def test_digits_pass_without_a_word(caplog):
    with caplog.at_level("INFO"):
        Digits().setup()
    assert not caplog.text
