"""Adapted images are those that torchvision's transforms make of the same picture."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from fdl.errors import UserError
from fdl.modules.input_adapter import InputAdapter, adapter_for

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DATA = {"data_mean": [0.4, 0.5, 0.6], "data_std": [0.3, 0.2, 0.25]}


def picture(channels=3, side=32):
    return torch.rand(4, channels, side, side, generator=torch.Generator().manual_seed(0))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("side", [48, 20])
def test_resizing_and_normalising(interpolation, antialias, side):
    x = picture()
    expected = transforms.Compose(
        [
            transforms.Resize((side, side + 2), InterpolationMode(interpolation), antialias=antialias),
            transforms.Normalize(MEAN, STD),
        ]
    )(x)
    adapter = InputAdapter(
        (3, 32, 32), (side, side + 2), 3, MEAN, STD, interpolation=interpolation, antialias=antialias
    )
    assert_same(adapter(x), expected)
    assert adapter.output_shape == (3, side, side + 2) == tuple(expected.shape[1:])


def test_what_the_data_did_is_undone():
    x = picture()
    normalised = transforms.Normalize(DATA["data_mean"], DATA["data_std"])(x)
    adapter = InputAdapter((3, 32, 32), (40, 40), 3, MEAN, STD, **DATA)
    assert_same(adapter(normalised), InputAdapter((3, 32, 32), (40, 40), 3, MEAN, STD)(x))
    assert_same(InputAdapter((3, 32, 32), **DATA)(normalised), x)


def test_grey_becomes_colour():
    x = picture(1)
    expected = transforms.Compose([transforms.Grayscale(3), transforms.Resize(40), transforms.Normalize(MEAN, STD)])
    adapter = InputAdapter((1, 32, 32), (40, 40), 3, MEAN, STD, [0.2], [0.5], interpolation="bilinear")
    assert_same(adapter((x - 0.2) / 0.5), expected(x))


def test_colour_becomes_grey():
    x = picture()
    expected = transforms.Compose([transforms.Grayscale(1), transforms.Normalize([0.3], [0.4])])(x)
    adapter = InputAdapter((3, 32, 32), None, 1, [0.3], [0.4], **DATA)
    assert_same(adapter(transforms.Normalize(DATA["data_mean"], DATA["data_std"])(x)), expected)


def test_half_precision_is_resampled_in_single():
    x = picture().bfloat16()
    adapter = InputAdapter((3, 32, 32), (48, 48), 3, MEAN, STD)
    assert adapter(x).dtype == torch.bfloat16
    assert torch.equal(adapter(x), adapter(x.float()).bfloat16())


def test_it_has_no_state_and_passes_gradients():
    adapter = InputAdapter((3, 32, 32), (40, 40), 3, MEAN, STD)
    assert adapter.state_dict() == {} and not list(adapter.parameters())
    x = picture().requires_grad_()
    adapter(x).sum().backward()
    assert x.grad.abs().sum() > 0


PUBLISHED = {"size": (64, 64), "channels": 3, "mean": MEAN, "std": STD, "interpolation": "bicubic"}


def test_the_recipe_changes_what_is_published():
    assert adapter_for(False, (3, 32, 32), None, PUBLISHED, wanted=True) is None
    assert adapter_for(None, (3, 32, 32), None, PUBLISHED) is None
    x, data = picture(1), ([0.2], [0.5])
    published = adapter_for(None, (1, 32, 32), data, PUBLISHED, wanted=True)
    assert_same(published(x), InputAdapter((1, 32, 32), (64, 64), 3, MEAN, STD, *data)(x))
    assert_same(adapter_for(True, (1, 32, 32), data, PUBLISHED)(x), published(x))
    changes = {"size": 48, "interpolation": "bilinear", "data_mean": [0], "data_std": [1]}
    changed = adapter_for(changes, (1, 32, 32), data, PUBLISHED)
    assert_same(changed(x), InputAdapter((1, 32, 32), (48, 48), 3, MEAN, STD, interpolation="bilinear")(x))


@pytest.mark.parametrize(
    ("adapt", "shape", "message"),
    [
        ({"sise": 3}, (3, 32, 32), "adapt: unknown key 'sise'; did you mean 'size'"),
        ({"size": 0}, (3, 32, 32), r"adapt.size must be height and width in pixels, got \[0, 0\]"),
        ({"mean": [0.5]}, (3, 32, 32), "mean and std need one value"),
        ({"std": [1, 1, 0]}, (3, 32, 32), "a positive std"),
        ({"mean": None}, (3, 32, 32), "mean and std go together"),
        ({"data_mean": [0.5]}, (1, 32, 32), "data_mean and data_std go together"),
        ({"interpolation": "cubic"}, (3, 32, 32), "must be bicubic or bilinear, got 'cubic'"),
        (True, (4, 32, 32), "images of 4 channels cannot be turned into 3"),
    ],
)
def test_bad_settings_are_named(adapt, shape, message):
    with pytest.raises(UserError, match=message):
        adapter_for(adapt, shape, None, PUBLISHED)
