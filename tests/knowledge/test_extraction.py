"""One pass over samples: which layers, how they are pooled, and that nothing else is computed than asked."""

from types import SimpleNamespace

import pytest
import torch

from fdl.datamodules.samples import TensorSamples
from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.knowledge.transfer.extraction import EMBEDDING, Moments, block_names, extract, layer_names, pool
from fdl.modules.base import FederatedModule
from fdl.modules.small_classifiers import CNN, MLP, ViT

SHAPE = {"num_classes": 3, "input_shape": (1, 8, 8)}


def images(count=7):
    return TensorSamples(torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def participant():
    return SimpleNamespace(predict=Runtime(accelerator="cpu", batch_size=3).predict)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (lambda: MLP([16, 4], **SHAPE), ["trunk.1", "trunk.3"]),
        (lambda: CNN([8, 16], **SHAPE), ["trunk.0", "trunk.1", "trunk.3"]),
        (lambda: ViT(depth=3, dim=16, **SHAPE), ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_blocks_are_the_stages_of_a_network(module, expected):
    module = module()
    assert block_names(module.backbone, module.head) == expected
    assert layer_names(module, 1) == expected[-1:]
    assert layer_names(module, 100) == expected


def test_blocks_of_a_residual_network():
    timm = pytest.importorskip("timm")
    names = block_names(timm.create_model("resnet18", num_classes=3), "fc")
    assert names[-4:] == ["layer1", "layer2", "layer3", "layer4"]


def test_layers_by_name_glob_and_embedding():
    module = CNN([8, 16], **SHAPE)
    assert layer_names(module, ["trunk.[01]", EMBEDDING]) == ["trunk.0", "trunk.1", EMBEDDING]
    assert layer_names(module, 0) == [EMBEDDING]
    with pytest.raises(UserError, match="no submodule matches 'trank'"):
        layer_names(module, ["trank"])
    with pytest.raises(UserError, match="no backbone"):
        layer_names(FederatedModule(), ["a"])


def test_pooling():
    x = torch.arange(24.0)
    assert pool(x.view(4, 6)).shape == (4, 6)
    torch.testing.assert_close(pool(x.view(2, 3, 4)), x.view(2, 3, 4).mean(1))
    torch.testing.assert_close(pool(x.view(2, 3, 2, 2)), x.view(2, 3, 4).mean(2))
    with pytest.raises(UserError, match="no vector"):
        pool(x)


@pytest.mark.parametrize("make", [MLP, CNN, ViT])
def test_one_pass_gives_what_single_passes_give(participant, make):
    torch.manual_seed(0)
    module, samples = make(**SHAPE), images()
    names = layer_names(module, 2)
    got = extract(participant, module, samples, [*names, EMBEDDING])
    module.eval()
    with torch.no_grad():
        output = module(samples.batch(torch.arange(7))[0], features=names)
    torch.testing.assert_close(got.logits, output.logits)
    torch.testing.assert_close(got.embedding, output.embedding)
    torch.testing.assert_close(got.layers[EMBEDDING], output.embedding)
    for name in names:
        torch.testing.assert_close(got.layers[name], pool(output.features[name]))
    assert torch.equal(extract(participant, module, samples, None).logits, got.logits)


def test_standardised_features_have_mean_0_and_deviation_1():
    values = torch.randn(50, 4) * torch.tensor([1.0, 100.0, 1e-3, 1.0]) + 5
    values[:, 3] = 7.3
    moments = Moments.of(values)
    got = moments.standardize(values)
    torch.testing.assert_close(got.mean(0), torch.zeros(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(got[:, :3].std(0, correction=0), torch.ones(3), atol=1e-3, rtol=1e-3)
    assert torch.equal(got[:, 3], torch.zeros(50))
