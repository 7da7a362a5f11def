"""Our own small networks: their shapes, parameter counts and limits."""

import pytest
import torch
from torch import nn

from fdl.errors import UserError
from fdl.modules.small_classifiers import CNN, MLP, ViT
from fdl.state.weights import count_parameters
from tests.modules.makers import GREY, images

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_mlp_has_the_layers_asked_for():
    assert count_parameters(MLP([128, 64], **GREY)) == 64 * 128 + 128 + 128 * 64 + 64 + 64 * 10 + 10
    assert count_parameters(MLP([], **GREY)) == 64 * 10 + 10
    assert isinstance(MLP([4], "silu", **GREY).backbone.trunk[-1], nn.SiLU)


def test_the_cnn_has_the_layers_asked_for():
    blocks = 9 * 8 + 2 * 8 + 9 * 8 * 16 + 2 * 16
    dense = 16 * 2 * 2 * 32 + 32 + 32 * 10 + 10
    for norm, kind in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)):
        module = CNN([8, 16], norm=norm, embedding=32, **GREY)
        assert count_parameters(module) == blocks + dense
        assert sum(isinstance(m, kind) for m in module.modules()) == 2
    plain = CNN([8, 16], norm="none", embedding=32, **GREY)
    assert count_parameters(plain) == blocks + dense - 8 - 16  # biases in place of scale and shift


@pytest.mark.parametrize(("shape", "tokens"), [((1, 8, 8), 16), ((1, 28, 28), 16), ((3, 32, 64), 32)])
def test_the_vit_cuts_the_height_into_four_by_default(shape, tokens):
    module = ViT(num_classes=3, input_shape=shape)
    assert module.backbone.pos_embed.shape == (1, tokens, 64)
    assert module(torch.zeros(2, *shape)).logits.shape == (2, 3)


def test_the_vit_takes_a_class_token():
    module = ViT(pool="cls", **GREY)
    assert module.backbone.pos_embed.shape == (1, 17, 64)
    x, _ = images(module, 3)
    tokens = module(x, features=["norm"]).features["norm"]
    torch.testing.assert_close(module(x).embedding, tokens[:, 0])


@pytest.mark.parametrize(("make", "args"), [(MLP, {}), (CNN, {"channels": [8, 16]}), (ViT, {"patch": 4})])
def test_they_learn_digits_in_a_few_steps_of_plain_sgd(make, args):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels)
    torch.manual_seed(0)
    module = make(**args, **GREY)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for indices in torch.randperm(1400).repeat(4).split(32):
        optimizer.zero_grad()
        module.training_step((x[indices], y[indices]))["loss"].backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        assert (module(x[1400:]).logits.argmax(1) == y[1400:]).float().mean() > 0.8


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (MLP, {"hidden": [8, 0]}, "hidden must be ≥ 1, got 0"),
        (MLP, {"activation": "swish"}, "activation must be one of relu, gelu, silu, tanh, got 'swish'"),
        (CNN, {"channels": [4] * 4}, "4 blocks in channels need images of at least 16×16, got 8×8"),
        (CNN, {"channels": []}, "channels must name at least one block"),
        (CNN, {"norm": "layer"}, "norm must be one of none, batch, group, got 'layer'"),
        (CNN, {"embedding": 0}, "embedding must be ≥ 1, got 0"),
        (ViT, {"patch": 3}, "patch must divide the images' 8×8 pixels, got 3"),
        (ViT, {"patch": 0}, "patch must be ≥ 1, got 0"),
        (ViT, {"dim": 10, "heads": 4}, "dim must be a multiple of heads, got dim 10 and 4 heads"),
        (ViT, {"depth": 0}, "depth must be ≥ 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused(make, args, message):
    with pytest.raises(UserError, match=message):
        make(**args, **GREY)
