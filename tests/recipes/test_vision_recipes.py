"""The recipes of full size: every model is built as the recipe says, on the meta device, which allocates nothing."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision

from fdl.recipe import instantiate, load
from fdl.state.weights import count_parameters, module_state

ROOT = Path(__file__).parents[2]
CIFAR100 = {"num_classes": 100, "input_shape": (3, 32, 32)}
FOLDER = {"num_classes": 7, "input_shape": (3, 224, 224)}
EXPECTED = {
    "cifar100/vit_base": (CIFAR100, [("lora", 304, 224), ("lora", 86, 224)]),
    "cifar100/light_clients": (CIFAR100, [("full", n, 96) for n in (2.4, 4.1, 11.2, 23.7)]),
    "image_folder/vit_base": (FOLDER, [("lora", 303, 224), ("lora", 86, 224)]),
}


@pytest.fixture
def without_weights(monkeypatch):
    """Both libraries build their models and leave the weights where they are."""

    def unloaded(create):
        return lambda model, pretrained=False, weights=None, **more: create(model, **more)

    monkeypatch.setattr(timm, "create_model", unloaded(timm.create_model))
    make = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda model, weights=None, **more: make(model, **more))


def built(component, model_kwargs):
    with torch.device("meta"):
        return instantiate(component, "module", "specialists.0", **model_kwargs)


@pytest.mark.parametrize("name", EXPECTED)
def test_specialists_are_what_the_recipe_says(name, without_weights):
    model_kwargs, expected = EXPECTED[name]
    recipe = load(ROOT / f"recipes/{name}.yaml")
    assert len(recipe.specialists) == len(expected)
    for component, (tuning, millions, side) in zip(recipe.specialists, expected):
        module = built(component, model_kwargs)
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert module.adapter.output_shape == (3, side, side)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if tuning == "lora":
            travels = sum(value.numel() for value in module_state(module).values())
            assert travels == trained < 0.03 * count_parameters(module)
            assert module.frozen
        else:
            assert trained == count_parameters(module) and not module.frozen
        assert (count_parameters(module) - (trained if tuning == "lora" else 0)) / 1e6 == pytest.approx(millions, 0.03)
        with torch.device("meta"):
            output = module(torch.empty(2, *model_kwargs["input_shape"]))
        assert output.logits.shape == (2, model_kwargs["num_classes"])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_student_is_a_vit_base_that_is_trained_as_a_whole(name, without_weights):
    model_kwargs, _ = EXPECTED[name]
    module = built(load(ROOT / f"recipes/{name}.yaml").student, model_kwargs)
    assert count_parameters(module) / 1e6 == pytest.approx(85.8, 0.002) and not module.frozen
    assert module.adapter.output_shape == (3, 224, 224) and module.embedding_dim == 768


@pytest.mark.parametrize("name", EXPECTED)
def test_the_encoder_is_frozen_and_public(name, without_weights):
    model_kwargs, _ = EXPECTED[name]
    with torch.device("meta"):
        encoder = instantiate(load(ROOT / f"recipes/{name}.yaml").encoder, "encoder", "encoder", **model_kwargs)
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    assert encoder.nbytes() > 8e6 and encoder.module.adapter is not None
