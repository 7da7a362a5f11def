"""Image classifiers of which only a part is trained: what changes, what travels, and what stays in evaluation mode."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from fdl.errors import UserError
from fdl.modules.cifar_resnet import CifarResNet
from fdl.modules.timm_model import Timm
from fdl.modules.torchvision_model import Torchvision
from fdl.state.weights import load_into, module_state
from tests.modules.makers import COLOUR, images

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def make(tmp_path):
    """Builds a module of a family from a file of weights for 10 classes."""
    torch.manual_seed(7)
    save_file(timm.create_model("test_vit", num_classes=10, img_size=32).state_dict(), tmp_path / "vit.safetensors")
    torch.save(torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=10).state_dict(), tmp_path / "tv.pth")
    weights = CifarResNet(8, **COLOUR).backbone.state_dict()
    np.savez(tmp_path / "resnet.npz", **{name: value.numpy() for name, value in weights.items()})
    families = {
        "timm": lambda **more: Timm("test_vit", checkpoint=str(tmp_path / "vit.safetensors"), **more),
        "torchvision": lambda **more: Torchvision("shufflenet_v2_x0_5", checkpoint=str(tmp_path / "tv.pth"), **more),
        "cifar_resnet": lambda **more: CifarResNet(8, str(tmp_path / "resnet.npz"), **more),
    }
    return lambda family, **more: families[family](**{**COLOUR, **more})


def trained(module, steps=3):
    """Names in the state that three steps changed."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module.train()
    for _ in range(steps):
        module.training_step(images(module))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("family", ["timm", "torchvision", "cifar_resnet"])
def test_head_tuning_trains_the_classification_layer_and_nothing_else(make, family):
    module = make(family, tuning="head")
    head = {f"backbone.{module.head}.weight", f"backbone.{module.head}.bias"}
    assert trained(module) == head  # running statistics stay as well
    assert (
        module.frozen == module.state_dict().keys() - head == module.state_dict().keys() - module_state(module).keys()
    )


def test_lora_adds_what_is_trained(make):
    module, x = make("timm", tuning="lora", lora={"rank": 2}), images(make("timm"))[0]
    plain = make("timm")
    torch.testing.assert_close(module.eval()(x).logits, plain.eval()(x).logits)
    changed = trained(module)
    assert any("lora_A" in name for name in changed) and f"backbone.{module.head}.weight" in changed
    assert not changed & module.frozen
    assert len(module.frozen) == len(plain.state_dict()) - 2
    fewer = sum(value.numel() for value in module_state(module).values())
    assert fewer < 0.2 * sum(value.numel() for value in plain.state_dict().values())


def test_a_second_site_needs_only_what_was_trained(make):
    first, second = (make("timm", tuning="lora", lora={"rank": 2}) for _ in range(2))
    trained(first)
    load_into(second, {name: value.clone() for name, value in module_state(first).items()})
    x = images(first)[0]
    assert torch.equal(first.eval()(x).logits, second.eval()(x).logits)


@pytest.mark.parametrize("family", ["timm", "torchvision", "cifar_resnet"])
def test_a_frozen_module_never_changes_nor_leaves_evaluation_mode(make, family):
    module = make(family, tuning="frozen")
    module.train()
    assert not any(part.training for part in module.backbone.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module_state(module) == {} and len(module.frozen) == len(module.state_dict())
    x = images(module)[0]
    assert torch.equal(module(x).logits, make(family).eval()(x).logits)


def test_only_what_is_frozen_stays_in_evaluation_mode(make):
    module = make("cifar_resnet", tuning="head").train()
    assert module.training and module.backbone.linear.training and not module.backbone.bn1.training
    assert not module.eval().backbone.linear.training
    assert copy.deepcopy(module).train().backbone.bn1.training is False
    assert all(part.training for part in make("cifar_resnet").train().modules())


def test_gradients_reach_the_images_through_frozen_parts(make):
    module = make("timm", tuning="frozen", adapt={"size": 48})
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    module(x).logits.sum().backward()
    assert x.grad.abs().sum() > 0 and module.frozen == make("timm", tuning="frozen").frozen


@pytest.mark.parametrize("family", ["timm", "torchvision", "cifar_resnet"])
def test_freezing_needs_weights_that_everybody_has(make, family):
    build = {
        "timm": lambda **more: Timm("test_vit", **more),
        "torchvision": lambda **more: Torchvision("shufflenet_v2_x0_5", **more),
        "cifar_resnet": lambda **more: CifarResNet(8, **more),
    }[family]
    with pytest.raises(UserError, match="tuning: head needs pretrained weights"):
        build(tuning="head", **COLOUR)
    assert make(family, tuning="head", num_classes=7).frozen
    with pytest.raises(UserError, match=r"tuning: frozen .* none for 7 classes; take tuning: head"):
        make(family, tuning="frozen", num_classes=7)
