"""open_clip's models: by name, from files, of one's own sizes; what of them is trained; what is refused."""

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.open_clip_model import OpenClip, add_start_and_end
from fdl.modules.tokenizers import ByteTokenizer
from fdl.state.weights import module_state

CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
RESNET = {**CONFIG, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}}
DATA = {"input_shape": (3, 8, 8), "tokenizer": ByteTokenizer(), "context": 10}
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[97, 98, 99, -1], [97, -1, -1, -1], [1, 2, 3, 4], [5, 6, -1, -1]])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a trained model, by name of the format."""
    folder = tmp_path_factory.mktemp("weights")
    network = CLIP(12, {**CONFIG["vision_cfg"], "image_size": 8}, {**CONFIG["text_cfg"], **SIZES}, init_logit_scale=2.5)
    state = network.state_dict()
    save_file(state, folder / "model.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, folder / "model.pt")
    torch.save({"state_dict": state, "epoch": print}, folder / "code.pt")
    (folder / "damaged.safetensors").write_bytes(b"no such thing")
    return network.eval(), folder


SIZES = {"vocab_size": 259, "context_length": 12}


def test_texts_are_framed_once_and_cut_before_the_end_mark():
    tokens = torch.tensor([[1, 2, 3, -1], [99, 1, 100, -1], [-1, -1, -1, -1], [4, 5, 6, 7]])
    expected = [[99, 1, 2, 3, 100], [99, 1, 100, 0, 0], [99, 100, 0, 0, 0], [99, 4, 5, 6, 100]]
    assert add_start_and_end(tokens, 99, 100, 5).tolist() == expected
    longer = add_start_and_end(tokens, 99, 100, 7)
    assert longer[3].tolist() == [99, 4, 5, 6, 7, 100, 0]


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_local_file_gives_open_clips_own_vectors(weights, file):
    network, folder = weights
    module = OpenClip(config=CONFIG, checkpoint=str(folder / file), **DATA).eval()
    texts = add_start_and_end(TOKENS, 257, 258, 12)
    with torch.no_grad():
        torch.testing.assert_close(module.encode_image(IMAGES), network.encode_image(IMAGES, normalize=True))
        torch.testing.assert_close(module.encode_text(TOKENS), network.encode_text(texts, normalize=True))
        logits = network.get_logits(IMAGES, texts)[0]
        torch.testing.assert_close(module((IMAGES, TOKENS)).logits, logits)
    assert module.logit_scale.item() == 2.5


def test_padding_changes_no_text():
    module = OpenClip(config=CONFIG, **DATA).eval()
    with torch.no_grad():
        torch.testing.assert_close(module.encode_text(TOKENS)[1:2], module.encode_text(TOKENS[1:2, :1]))


@pytest.mark.parametrize("config", [CONFIG, RESNET], ids=["transformer", "resnet"])
def test_sizes_follow_the_data(config):
    shape = (1, 32, 32)
    module = OpenClip(config=config, **{**DATA, "input_shape": shape})
    loss = module.training_step(((torch.randn(4, *shape), TOKENS), None))["loss"]
    loss.backward()
    assert loss.isfinite() and module.embedding_dim == 12 and module.context == 12 and module.adapter is None
    assert all(p.grad is not None for p in module.parameters())


def test_images_are_brought_to_a_known_models_size():
    module = OpenClip(config=CONFIG, adapt={"size": 8}, **{**DATA, "input_shape": (3, 8, 8)})
    assert module.adapter.output_shape == (3, 8, 8)
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 16}}
    with pytest.raises(UserError, match="cannot take images of 3×8×8"):
        OpenClip(config=config, **DATA)
    assert OpenClip(config=config, adapt=True, **DATA).adapter.output_shape == (3, 16, 16)


def test_only_the_head_is_trained_sent_and_stored(weights):
    file = str(weights[1] / "model.safetensors")
    module = OpenClip(config=CONFIG, checkpoint=file, tuning="head", **DATA)
    assert set(module_state(module)) == {"logit_scale", "backbone.visual.proj", "backbone.text_projection"}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(module_state(module))
    frozen = OpenClip(config=CONFIG, checkpoint=file, tuning="frozen", **DATA)
    assert not module_state(frozen) and not any(p.requires_grad for p in frozen.parameters())


def test_lora_starts_as_the_model_and_is_what_is_sent(weights):
    pytest.importorskip("peft")
    network, folder = weights
    file = str(folder / "model.safetensors")
    module = OpenClip(config=CONFIG, checkpoint=file, tuning="lora", lora={"rank": 2}, **DATA)
    with torch.no_grad():
        torch.testing.assert_close(module.encode_image(IMAGES), network.encode_image(IMAGES, normalize=True))
    sent = set(module_state(module))
    assert {"logit_scale", "backbone.visual.proj", "backbone.text_projection"} < sent
    assert any("visual" in n and "lora_B" in n for n in sent) and any("lora_B" in n and "visual" not in n for n in sent)
    module.train().training_step(((IMAGES, TOKENS), None))["loss"].backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if n in sent)


def bad(**settings):
    return lambda folder: OpenClip(**{k: v.format(folder) if isinstance(v, str) else v for k, v in settings.items()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad(**DATA), "give model, a name of open_clip, or config"),
        (bad(model="ViT-B-32", config=CONFIG, **DATA), "one of the two"),
        (bad(model="ViT-B-32", **DATA), "set the data's tokenizer to open_clip:ViT-B-32"),
        (bad(model="ViT-B32", **DATA), "open_clip has no model 'ViT-B32'; did you mean 'ViT-B-32'"),
        (bad(config=CONFIG, pretrained="openai", **DATA), "pretrained is a tag of a named model's weights"),
        (bad(config=CONFIG, tuning="head", **DATA), "needs pretrained"),
        (bad(config={**CONFIG, "embed": 3}, **DATA), "config: unknown key 'embed'; did you mean 'embed_dim'"),
        (bad(config={"text_cfg": {"layer": 3}}, **DATA), "config.text_cfg: unknown key 'layer'; did you mean 'layers'"),
        (bad(config={"text_cfg": {"vocab_size": 9}}, **DATA), "vocab_size: at least 259"),
        (bad(config={"text_cfg": {"width": 10, "heads": 3}}, **DATA), "open_clip cannot build such a model"),
        (bad(config=CONFIG, checkpoint="{}/none.pt", **DATA), "checkpoint: no such file"),
        (bad(config=CONFIG, checkpoint="{}", **DATA), "checkpoint: no such file"),
        (bad(config=RESNET, checkpoint="{}/model.pt", **{**DATA, "input_shape": (3, 32, 32)}), "does not fit"),
        (bad(config=CONFIG, checkpoint="{}/code.pt", **DATA), "objects other than tensors"),
        (bad(config=CONFIG, checkpoint="{}/damaged.safetensors", **DATA), "does not fit|damaged"),
    ],
)
def test_what_does_not_fit_is_said(weights, make, message):
    with pytest.raises(UserError, match=message):
        make(weights[1])


def test_unknown_and_unreachable_weights_are_named(monkeypatch):
    clip = {**DATA, "tokenizer": ClipTokenizer()}
    with pytest.raises(UserError, match=r"no weights 'laion2b' for ViT-B-32.*laion2b_e16"):
        OpenClip("ViT-B-32", pretrained="laion2b", **clip)

    def offline(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(UserError, match=r"laion/CLIP-ViT-B-32-laion2B.*unreachable.*path as checkpoint"):
        OpenClip("ViT-B-32", pretrained="laion2b_s34b_b79k", **clip)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "millions"), [("ViT-B-32", 151.28), ("ViT-B-16", 149.62), ("RN50", 102.01), ("ViT-L-14", 427.62)]
)
def test_the_known_sizes(model, millions):
    module = OpenClip(model, **{**DATA, "input_shape": (1, 32, 32), "tokenizer": ClipTokenizer(model)}).eval()
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    reference = open_clip.create_model(model, force_quick_gelu=False).eval()
    reference.load_state_dict({**module.backbone.state_dict(), "logit_scale": module.logit_scale.detach()})
    with torch.no_grad():
        ours = module.encode_text(torch.tensor([[320, 1125, 2368, -1]]))
        torch.testing.assert_close(ours, reference.encode_text(open_clip.tokenize("a photo cat"), normalize=True))
        assert module.encode_image(torch.randn(1, 1, 32, 32)).isfinite().all()
