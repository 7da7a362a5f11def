"""What every classifier must do: answer, give features, train with a plain Trainer and with Fabric alike."""

import copy

import pytest
import torch
from lightning import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fdl.errors import UserError
from fdl.modules.classifier import ImageClassifier
from fdl.modules.small_classifiers import MLP, ViT
from fdl.registry.instantiate import instantiate
from tests.modules.makers import COLOUR, FAMILIES, GREY, Pair, images, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
SGD = {"target": "sgd", "args": {"lr": 0.05}}


def loader(module, rows: int = 24, batch: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*images(module, rows)), batch_size=batch, shuffle=False)


@pytest.fixture(params=sorted(FAMILIES))
def module(request):
    torch.manual_seed(0)
    return FAMILIES[request.param](optimizer=SGD)


# --- answers


def test_logits_are_the_last_layer_on_the_embedding(module):
    x, _ = images(module, 5)
    output = module.eval()(x)
    assert output.logits.shape == (5, 10)
    assert output.embedding.shape == (5, module.embedding_dim)
    assert output.features == {}
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    torch.testing.assert_close(last(output.embedding), output.logits)


def test_construction_leaves_the_network_in_training_mode_and_no_hook_behind(module):
    x, _ = images(module, 4)
    module(x)
    assert module.training
    assert module.backbone.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_copy_answers_from_its_own_weights(module):
    clone = copy.deepcopy(module).eval()
    x, _ = images(module, 4)
    before = module.eval()(x)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert (clone(x).embedding == 0).all()
    assert (before.embedding != 0).any()
    torch.testing.assert_close(module(x).embedding, before.embedding)


def test_answers_do_not_depend_on_the_rest_of_the_batch(module):
    x, _ = images(module, 6)
    module.eval()
    torch.testing.assert_close(module(x).logits[2:3], module(x[2:3]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "args", "size"),
    [
        ("mlp", {"hidden": [8], "activation": "gelu"}, GREY),
        ("cnn", {"channels": [4], "norm": "group", "optimizer": SGD}, GREY),
        ("vit", {"patch": 4, "dim": 8, "heads": 2, "depth": 1, "pool": "cls"}, GREY),
        ("timm", {"model": "test_vit", "kwargs": {"drop_rate": 0.1}}, COLOUR),
        ("torchvision", {"model": "squeezenet1_1"}, COLOUR),
        ("custom", {"backbone": "tests.modules.makers.Pair"}, GREY),
    ],
)
def test_a_recipe_builds_every_family_by_its_short_name(target, args, size):
    module = instantiate({"target": target, "args": args}, "module", "student", **size)
    assert isinstance(module, ImageClassifier)
    assert module.name == target
    assert module.eval()(images(module, 2)[0]).logits.shape == (2, 10)


# --- features


def test_features_come_by_name_and_by_glob():
    module = ViT(dim=16, depth=3, heads=2, **GREY)
    x, _ = images(module, 4)
    output = module(x, features=["blocks.?", "patch_embed"])
    assert list(output.features) == ["patch_embed", "blocks.0", "blocks.1", "blocks.2"]
    assert all(tensor.shape == (4, 16, 16) for tensor in output.features.values())
    torch.testing.assert_close(output.logits, module(x).logits)
    assert not any(m._forward_hooks for m in module.modules())


def test_a_feature_is_what_the_submodule_returned_and_carries_its_gradient():
    module = MLP([6, 4], **GREY)
    x, _ = images(module, 3)
    feature = module(x, features=["trunk.1"]).features["trunk.1"]
    torch.testing.assert_close(
        feature, x.flatten(1) @ module.backbone.trunk[1].weight.T + module.backbone.trunk[1].bias
    )
    feature.square().sum().backward()
    assert module.backbone.trunk[1].weight.grad.abs().sum() > 0
    assert module.backbone.head.weight.grad is None


def test_the_first_tensor_of_a_tuple_is_the_feature_and_uncalled_matches_of_a_glob_are_left_out():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.unused, self.head = nn.MultiheadAttention(8, 2), nn.Linear(1, 1), nn.Linear(8, 10)

        def forward(self, x):
            x = x.flatten(0, 1)
            return self.head(self.attention(x, x, x)[0][:, 0])

    module = ImageClassifier(Attends(), **GREY)
    x, _ = images(module, 2)
    assert list(module(x, features=["a*", "u*"]).features) == ["attention"]
    with pytest.raises(UserError, match="'unused' returned no tensor"):
        module(x, features=["unused"])


def test_an_unknown_feature_is_named_with_a_suggestion():
    module = MLP(**GREY)
    with pytest.raises(UserError, match=r"no submodule matches 'trnk'; did you mean 'trunk'\?"):
        module(images(module, 2)[0], features=["trnk"])


# --- training


def test_it_trains_with_a_plain_trainer(module):
    x, y = images(module)
    before = module.training_step((x, y))["loss"].item()
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, loader(module), loader(module))
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    expected = module.eval().validation_step((x, y))
    assert logged.keys() == {"train/loss", "validation/loss", "validation/accuracy"}
    assert logged["validation/loss"] == pytest.approx(expected["loss"].item(), rel=1e-4)
    assert logged["validation/accuracy"] == pytest.approx(expected["accuracy"].item())
    assert module.train().training_step((x, y))["loss"].item() < before


def test_a_plain_trainer_tests_and_predicts():
    module = FAMILIES["mlp"]()
    data = loader(module, rows=20)  # an uneven last batch: the means must be weighted
    trainer = quiet_trainer()
    (tested,) = trainer.test(module, data, verbose=False)
    x, y = images(module, 20)
    assert tested["test/accuracy"] == pytest.approx((module(x).logits.argmax(1) == y).float().mean().item())
    predictions = trainer.predict(module, data)
    torch.testing.assert_close(torch.cat([p.logits for p in predictions]), module(x).logits)
    torch.testing.assert_close(module.predict_step(x).embedding, module.predict_step((x, None)).embedding)


def test_trainer_and_a_fabric_loop_give_the_same_bits():
    def fresh():
        torch.manual_seed(7)
        return FAMILIES["mlp"](optimizer={"target": "sgd", "args": {"lr": 0.1, "momentum": 0.9}})

    fitted = fresh()
    quiet_trainer(max_epochs=3).fit(fitted, loader(fitted))

    fabric = Fabric(accelerator="cpu", devices=1)
    looped = fabric.to_device(fresh())
    optimizer = fabric.setup_optimizers(looped.configure_optimizers())
    looped.train()
    for _ in range(3):
        for batch in loader(looped):
            with fabric.autocast():
                loss = looped.training_step(batch)["loss"]
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    start = fresh().state_dict()
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, looped.state_dict()[name]), name
        assert not torch.equal(value, start[name]), name


def test_fabric_can_set_a_module_up_in_mixed_precision():
    module = FAMILIES["mlp"]()
    x, _ = images(module, 4)
    output = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(module)(x)
    assert output.logits.dtype is torch.float32
    torch.testing.assert_close(output.logits, module(x).logits, rtol=0.05, atol=0.05)
    assert not torch.equal(output.logits, module(x).logits)  # autocast was on


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_loss_is_float32_in_half_precision(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    convert = fabric.strategy.precision
    module = convert.convert_module(FAMILIES["cnn"]())
    batch = convert.convert_input(images(module, 8))
    with fabric.autocast():
        loss = module.training_step(batch)["loss"]
    fabric.backward(loss)
    assert loss.dtype is torch.float32
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_the_schedule_of_the_recipe_runs_under_a_trainer():
    schedule = {"target": "step_lr", "args": {"step_size": 1, "gamma": 0.5}, "interval": "step"}
    module = FAMILIES["mlp"](optimizer=SGD, scheduler=schedule)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(module))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 8)
    assert isinstance(MLP(**GREY).configure_optimizers(), torch.optim.Adam)


# --- what does not fit


def test_a_backbone_may_return_its_own_embedding():
    module = ImageClassifier(Pair(), **GREY)
    assert (module.head, module.embedding_dim) == (None, 5)


def test_a_backbone_of_another_number_of_classes_is_refused():
    with pytest.raises(
        UserError, match=r"Sequential returns logits of shape \[1, 7\] for one image, expected \[1, 10\]"
    ):
        ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), **GREY)


def test_a_backbone_for_other_images_is_refused():
    with pytest.raises(UserError, match="Pair cannot take images of 3×32×32"):
        ImageClassifier(Pair(), **COLOUR)


def test_a_backbone_whose_last_layer_cannot_be_told_is_refused():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.GLU())
    with pytest.raises(UserError, match="no layer of it has 10 outputs; name its head"):
        ImageClassifier(layers, **GREY)
    module = ImageClassifier(layers, head="2", **GREY)
    assert module.embedding_dim == 20
    with pytest.raises(UserError, match="the network has no submodule 'fc'"):
        ImageClassifier(layers, head="fc", **GREY)
