"""torchvision's models on small images, without downloads."""

import pytest
import torch
import torchvision

from fdl.errors import UserError
from fdl.modules.torchvision_model import Torchvision
from tests.modules.makers import COLOUR

pytestmark = pytest.mark.filterwarnings("ignore")
GREY = {"num_classes": 10, "input_shape": (1, 32, 32)}
SMALL = "shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("model", "head"), [(SMALL, "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v3_small", "classifier.3")]
)
def test_logits_are_torchvisions_and_a_grey_image_counts_three_times(model, head):
    torch.manual_seed(3)
    module = Torchvision(model, **GREY).eval()
    torch.manual_seed(3)
    plain = torchvision.models.get_model(model, num_classes=10).eval()
    x = torch.randn(2, 1, 32, 32)
    output = module(x)
    assert module.head == head
    assert output.embedding.shape == (2, module.embedding_dim)
    torch.testing.assert_close(output.logits, plain(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_colour_images_go_through_the_model_as_torchvision_made_it():
    torch.manual_seed(3)
    module = Torchvision(SMALL, **COLOUR).eval()
    torch.manual_seed(3)
    plain = torchvision.models.get_model(SMALL, num_classes=10)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.backbone.state_dict().items())


@pytest.mark.parametrize("model", [SMALL, "squeezenet1_1"])
def test_a_file_keeps_everything_but_a_classification_layer_that_does_not_fit(tmp_path, model):
    source = torchvision.models.get_model(model, num_classes=1000).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    module = Torchvision(model, checkpoint=str(tmp_path / "w.pth"), **COLOUR).eval()
    ours, theirs = module.backbone.state_dict(), source.state_dict()
    different = {
        name for name in theirs if ours[name].shape != theirs[name].shape or (ours[name] != theirs[name]).any()
    }
    assert different == {f"{module.head}.weight", f"{module.head}.bias"}
    assert module(torch.randn(2, 3, 32, 32)).logits.shape == (2, 10)


def test_a_file_of_the_same_number_of_classes_gives_the_same_answers(tmp_path):
    source = Torchvision(SMALL, **GREY).eval()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.ckpt")
    x = torch.randn(2, 1, 32, 32)
    loaded = Torchvision(SMALL, checkpoint=str(tmp_path / "w.ckpt"), **GREY).eval()
    assert torch.equal(loaded(x).logits, source(x).logits)
    with pytest.raises(UserError, match="weights for 1 input channels cannot be used with 3"):
        Torchvision(SMALL, checkpoint=str(tmp_path / "w.ckpt"), **COLOUR)


def test_auxiliary_logits_of_training_are_left_out():
    small = {"num_classes": 10, "input_shape": (3, 64, 64)}
    module = Torchvision("googlenet", kwargs={"init_weights": False}, **small)
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    assert module.training
    assert module(x).logits.shape == (2, 10)
    assert torch.isfinite(module.training_step((x, y))["loss"])


def test_a_file_of_another_architecture_is_refused(tmp_path):
    torch.save(torchvision.models.get_model("squeezenet1_1").state_dict(), tmp_path / "squeeze.pth")
    with pytest.raises(UserError, match=r"squeeze.pth does not fit torchvision's .*: its first or last"):
        Torchvision(SMALL, checkpoint=str(tmp_path / "squeeze.pth"), **COLOUR)
    torch.save(torchvision.models.get_model("shufflenet_v2_x1_0").state_dict(), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"(?s)wide.pth does not fit torchvision's shufflenet_v2_x0_5: .*size mismatch"):
        Torchvision(SMALL, checkpoint=str(tmp_path / "wide.pth"), **COLOUR)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "resnet81"}, "torchvision has no image classifier 'resnet81'; did you mean 'resnet18'"),
        ({"model": SMALL, "weights": "IMAGENET1K"}, "no weights 'IMAGENET1K' for .*; did you mean 'IMAGENET1K_V1'"),
        ({"model": SMALL, "kwargs": {"nope": 1}}, "torchvision cannot build shufflenet_v2_x0_5: .*nope"),
        ({"model": SMALL, "weights": "DEFAULT", "checkpoint": "x"}, "weights or checkpoint, not both"),
        ({"model": "alexnet"}, r"torchvision \(AlexNet\) cannot take images of 3×32×32"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(UserError, match=message):
        Torchvision(**args, **COLOUR)


def test_images_are_brought_to_what_torchvision_publishes(tmp_path):
    source = torchvision.models.get_model(SMALL, num_classes=10).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    module = Torchvision(SMALL, checkpoint=str(tmp_path / "w.pth"), adapt=True, **GREY).eval()
    x = torch.rand(2, 1, 32, 32)
    expected = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms(resize_size=224)
    seen = expected(x.expand(-1, 3, -1, -1))
    assert module.adapter.output_shape == (3, 224, 224) == tuple(seen.shape[1:])
    torch.testing.assert_close(module(x).logits, source(seen), rtol=1e-3, atol=1e-4)
    small = Torchvision(SMALL, checkpoint=str(tmp_path / "w.pth"), adapt={"size": 48}, **COLOUR)
    assert small.adapter.output_shape == (3, 48, 48)
