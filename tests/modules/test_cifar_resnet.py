"""The residual networks for CIFAR: their sizes in the paper, their shortcut, and published weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fdl.errors import UserError
from fdl.modules.cifar_resnet import CifarResNet, _Block
from fdl.state.weights import count_parameters
from tests.modules.makers import COLOUR

DATA = os.environ.get("FDL_DATA")


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_they_have_the_papers_numbers_of_weights(depth, millions):
    module = CifarResNet(depth, **COLOUR)
    assert count_parameters(module) / 1e6 == pytest.approx(millions, abs=0.03)
    assert module.embedding_dim == 64


def test_the_shortcut_takes_every_other_pixel_and_adds_empty_channels():
    block = _Block(4, 8, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # silences the convolutions
    x = torch.rand(1, 4, 6, 6)
    expected = torch.zeros(1, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[0, channel + 2, row, column] = x[0, channel, 2 * row, 2 * column]
    assert torch.equal(block(x), expected)


def test_embedding_and_head_give_the_logits():
    module = CifarResNet(8, **COLOUR).eval()
    output = module(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(output.logits, F.linear(output.embedding, *module.backbone.linear.parameters()))


def test_a_file_serves_other_classes_and_grey_images(tmp_path):
    source = CifarResNet(8, **COLOUR).eval()
    np.savez(tmp_path / "w.npz", **{f"module.{n}": v.numpy() for n, v in source.backbone.state_dict().items()})
    same = CifarResNet(8, str(tmp_path / "w.npz"), **COLOUR).eval()
    x = torch.rand(2, 1, 32, 32)
    assert torch.equal(same(x.expand(-1, 3, -1, -1)).logits, source(x.expand(-1, 3, -1, -1)).logits)
    other = CifarResNet(8, str(tmp_path / "w.npz"), num_classes=7, input_shape=(1, 32, 32)).eval()
    torch.testing.assert_close(other(x).embedding, source(x.expand(-1, 3, -1, -1)).embedding, rtol=1e-4, atol=1e-5)
    assert other(x).logits.shape == (2, 7)
    with pytest.raises(UserError, match=r"w.npz does not fit cifar_resnet of depth 14: 30 of 80 names missing"):
        CifarResNet(14, str(tmp_path / "w.npz"), **COLOUR)


def test_a_depth_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"depth must be 6n \+ 2 \(20, 32, 44, 56, 110\), got 18"):
        CifarResNet(18, **COLOUR)


@pytest.mark.skipif(DATA is None, reason="FDL_DATA is not set")
@pytest.mark.parametrize(
    ("depth", "accuracy"),
    [
        (20, 0.917),
        pytest.param(32, 0.932, marks=pytest.mark.slow),
        pytest.param(44, 0.938, marks=pytest.mark.slow),
        pytest.param(56, 0.934, marks=pytest.mark.slow),
    ],
)
def test_published_weights_have_their_accuracy_on_real_images(depth, accuracy):
    with np.load(Path(DATA) / "cifar10_lossless_7k.npz") as file:
        x, y = torch.from_numpy(file["x_test"]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(file["y_test"])
    weights = str(Path(DATA) / f"weights/cifar10_resnet{depth}_akamaster.npz")
    module = CifarResNet(depth, weights, adapt=True, **COLOUR).eval()
    with torch.inference_mode():
        found = (module(x).logits.argmax(1) == y).float().mean().item()
    assert found == pytest.approx(accuracy, abs=0.001)
