"""timm's models on small images, without downloads; each file is written from a model that timm itself made."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from fdl.errors import UserError
from fdl.modules.timm_model import Timm
from tests.modules.makers import COLOUR

pytestmark = pytest.mark.filterwarnings("ignore")


def sized(channels: int = 3, side: int = 32, classes: int = 10) -> dict:
    return {"num_classes": classes, "input_shape": (channels, side, side)}


@pytest.mark.parametrize(
    ("model", "head"),
    [
        ("test_vit", "head"),
        ("test_resnet", "fc"),
        ("test_efficientnet", "classifier"),
        ("test_convnext", "head.fc"),
        ("deit_tiny_distilled_patch16_224", "head"),
    ],
)
def test_logits_are_timms_and_the_embedding_is_what_timm_calls_pre_logits(model, head):
    module = Timm(model, **sized(1, 32, 7)).eval()
    x = torch.randn(2, 1, 32, 32)
    output = module(x)
    assert module.head == head
    torch.testing.assert_close(output.logits, module.backbone(x))
    if "distilled" not in model:
        pooled = module.backbone.forward_head(module.backbone.forward_features(x), pre_logits=True)
        torch.testing.assert_close(output.embedding, pooled)


def test_further_arguments_reach_timm():
    module = Timm("test_vit", kwargs={"patch_size": 8, "drop_rate": 0.3}, **COLOUR)
    assert module.backbone.patch_embed.grid_size == (4, 4)
    assert module.backbone.head_drop.p == 0.3


def stored(tmp_path, model: str, classes: int, suffix: str = ".safetensors", **settings):
    torch.manual_seed(5)
    source = timm.create_model(model, num_classes=classes, **settings).eval()
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": source.state_dict()}, path)
    return source, str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_a_file_of_the_same_number_of_classes_gives_the_same_answers(tmp_path, model, suffix):
    size = {"img_size": 32} if model == "test_vit" else {}
    source, path = stored(tmp_path, model, 10, suffix, **size)
    module = Timm(model, checkpoint=path, **COLOUR).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(module(x).logits, source(x))
    assert "state_dict" not in module.backbone.pretrained_cfg


@pytest.mark.parametrize("classes", [1000, 4, 0])
def test_a_file_of_another_number_of_classes_keeps_its_embedding(tmp_path, classes):
    source, path = stored(tmp_path, "test_resnet", classes)
    module = Timm("test_resnet", checkpoint=path, **COLOUR).eval()
    x = torch.randn(2, 3, 32, 32)
    pooled = source.forward_head(source.forward_features(x), pre_logits=True)
    assert torch.equal(module(x).embedding, pooled)
    assert module(x).logits.shape == (2, 10)


def test_a_colour_file_serves_grey_images_as_if_given_three_times(tmp_path):
    source, path = stored(tmp_path, "test_resnet", 10)
    module = Timm("test_resnet", checkpoint=path, **sized(1)).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(module(x).logits, source(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_a_grey_file_serves_grey_images(tmp_path):
    source, path = stored(tmp_path, "test_resnet", 10, in_chans=1)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(Timm("test_resnet", checkpoint=path, **sized(1)).eval()(x).logits, source(x))


def test_positions_of_a_file_are_resized_to_the_images(tmp_path):
    source, path = stored(tmp_path, "test_vit", 10, img_size=64)
    module = Timm("test_vit", checkpoint=path, **COLOUR)
    assert (source.pos_embed.shape[1], module.backbone.pos_embed.shape[1]) == (17, 5)
    torch.testing.assert_close(module.backbone.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def google_names(model) -> dict[str, np.ndarray]:
    """Name and lay out a ViT's weights as Google's .npz files do."""
    w = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    root = "Transformer"
    found = {
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "cls": w["cls_token"],
        f"{root}/posembed_input/pos_embedding": w["pos_embed"],
        f"{root}/encoder_norm/scale": w["norm.weight"],
        f"{root}/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    for i in range(len(model.blocks)):
        here, there = f"blocks.{i}", f"{root}/encoderblock_{i}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            found[f"{there}/{theirs}/scale"] = w[f"{here}.{ours}.weight"]
            found[f"{there}/{theirs}/bias"] = w[f"{here}.{ours}.bias"]
        attention = f"{there}/MultiHeadDotProductAttention_1"
        kernels, biases = np.split(w[f"{here}.attn.qkv.weight"], 3), np.split(w[f"{here}.attn.qkv.bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases):
            found[f"{attention}/{part}/kernel"] = kernel.T.reshape(width, heads, -1)
            found[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        found[f"{attention}/out/kernel"] = w[f"{here}.attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}/out/bias"] = w[f"{here}.attn.proj.bias"]
        for r in range(2):
            found[f"{there}/MlpBlock_3/Dense_{r}/kernel"] = w[f"{here}.mlp.fc{r + 1}.weight"].T
            found[f"{there}/MlpBlock_3/Dense_{r}/bias"] = w[f"{here}.mlp.fc{r + 1}.bias"]
    return found


def test_googles_npz_is_read(tmp_path):
    small = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    source = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, **small).eval()
    np.savez(tmp_path / "w.npz", **google_names(source))
    module = Timm("vit_tiny_patch16_224", checkpoint=str(tmp_path / "w.npz"), kwargs=small, **COLOUR).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(module(x).logits, source(x))


def test_a_file_of_another_architecture_is_refused_though_the_classes_differ(tmp_path):
    _, path = stored(tmp_path, "test_resnet", 1000)
    with pytest.raises(UserError, match=r"w.safetensors does not fit timm's test_efficientnet: .* names missing"):
        Timm("test_efficientnet", checkpoint=path, **COLOUR)


@pytest.mark.parametrize(
    ("args", "size", "message"),
    [
        ({"model": "resnt18"}, COLOUR, "timm has no model 'resnt18'; did you mean 'resnet18'"),
        ({"model": "test_vit.r160_in2k"}, COLOUR, "no weights 'test_vit.r160_in2k'; did you mean 'test_vit.r160_in1k'"),
        ({"model": "test_resnet", "kwargs": {"dropp": 1}}, COLOUR, "timm cannot build test_resnet: .*dropp"),
        ({"model": "test_vit"}, sized(3, 8), r"timm \(VisionTransformer\) cannot take images of 3×8×8"),
        ({"model": "test_vit", "pretrained": True, "checkpoint": "x"}, COLOUR, "pretrained or checkpoint, not both"),
        ({"model": "test_vit", "checkpoint": "gone.pth"}, COLOUR, "no such file: gone.pth"),
        ({"model": "test_vit", "checkpoint": "gone.npz"}, COLOUR, "no such file: gone.npz"),
    ],
)
def test_bad_arguments_are_named(args, size, message):
    with pytest.raises(UserError, match=message):
        Timm(**args, **size)


def test_a_model_without_published_weights_says_so():
    with pytest.raises(UserError, match="timm cannot build ghostnet_050: No pretrained weights exist"):
        Timm("ghostnet_050", pretrained=True, **COLOUR)


def test_an_npz_with_torchs_names_is_read(tmp_path):
    source, _ = stored(tmp_path, "test_resnet", 10)
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in source.state_dict().items()})
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(Timm("test_resnet", checkpoint=str(tmp_path / "w.npz"), **COLOUR).eval()(x).logits, source(x))


def test_an_npz_that_does_not_fit_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(UserError, match=r"w.npz does not fit timm's test_vit: .*no name fits"):
        Timm("test_vit", checkpoint=str(tmp_path / "w.npz"), **COLOUR)
    np.savez(tmp_path / "google.npz", **{"Transformer/a": np.zeros(3)})
    with pytest.raises(UserError, match=r"google.npz does not fit timm's test_vit"):
        Timm("test_vit", checkpoint=str(tmp_path / "google.npz"), **COLOUR)
    with pytest.raises(UserError, match=r"timm reads no .npz with Google's names for test_convnext"):
        Timm("test_convnext", checkpoint=str(tmp_path / "google.npz"), **COLOUR)
    whole = (tmp_path / "w.npz").read_bytes()
    for damaged in (b"not at all", whole[: len(whole) // 2]):
        (tmp_path / "broken.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"broken.npz cannot be read"):
            Timm("test_vit", checkpoint=str(tmp_path / "broken.npz"), **COLOUR)


@pytest.fixture
def repository(tmp_path):
    """A folder as a hub's repository: weights for 5 classes and images of 64 pixels, with their configuration."""
    source = timm.create_model("test_vit", num_classes=5, img_size=64).eval()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    published = {"input_size": [3, 64, 64], "fixed_input_size": True, "interpolation": "bicubic"}
    published |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "num_classes": 5}
    published |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": "test_vit", "num_classes": 5, "model_args": {"img_size": 64}, "pretrained_cfg": published}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return source, f"local-dir:{tmp_path}"


def test_public_weights_of_a_fixed_size_see_images_of_that_size(repository):
    source, model = repository
    module = Timm(model, pretrained=True, **sized(3, 32, 5)).eval()
    x = torch.rand(2, 3, 32, 32)
    seen = transforms.Compose(
        [transforms.Resize(64, InterpolationMode.BICUBIC), transforms.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])]
    )(x)
    torch.testing.assert_close(module(x).logits, source(seen), rtol=1e-4, atol=1e-5)
    plain = Timm(model, pretrained=True, adapt=False, **sized(3, 64, 5)).eval()
    assert plain.adapter is None and torch.equal(plain(seen).logits, source(seen))
    assert Timm(model, pretrained=True, **sized(3, 64, 5)).adapter is None
    assert Timm(model, pretrained=True, kwargs={"img_size": 32}, **sized(3, 32, 5)).adapter is None
    assert Timm(model, **sized(3, 32, 5)).adapter is None


def test_a_repository_for_other_classes_gets_a_new_layer_and_grey_images_become_colour(repository):
    source, model = repository
    module = Timm(model, pretrained=True, adapt={"mean": [0, 0, 0], "std": [1, 1, 1]}, **sized(1, 64, 9)).eval()
    x = torch.rand(2, 1, 64, 64)
    pooled = source.forward_head(source.forward_features(x.expand(-1, 3, -1, -1)), pre_logits=True)
    torch.testing.assert_close(module(x).embedding, pooled, rtol=1e-4, atol=1e-5)
    assert module(x).logits.shape == (2, 9)


def test_unknown_sources_are_named(tmp_path):
    with pytest.raises(UserError, match=r"timm knows no source 'hub' of models.*hf-hub"):
        Timm("hub:a/b", **COLOUR)
    with pytest.raises(UserError, match=f"timm cannot find local-dir:{tmp_path}: Config file not found"):
        Timm(f"local-dir:{tmp_path}", **COLOUR)
    (tmp_path / "config.json").write_text('{"architecture": "test_vitt"}')
    with pytest.raises(UserError, match="timm has no model 'test_vitt'; did you mean 'test_vit'"):
        Timm(f"local-dir:{tmp_path}", **COLOUR)
