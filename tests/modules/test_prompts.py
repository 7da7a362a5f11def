"""Prompts around frozen towers, vision transformers and language models, all of them made here."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.open_clip_model import OpenClip
from fdl.modules.prompt_generator import PromptGenerator
from fdl.modules.prompted_dual_encoder import PromptedDualEncoder
from fdl.modules.prompts import placeholders_replaced, unused_token_id, with_placeholders
from fdl.modules.small_dual_encoder import SmallDualEncoder
from fdl.modules.soft_prompts import SoftPromptLM
from fdl.modules.timm_model import Timm
from fdl.modules.tokenizers import ByteTokenizer
from fdl.modules.visual_prompts import PromptedViT
from fdl.modules.zero_shot import zero_shot_classifier, zero_shot_selector
from fdl.state.weights import load_into, module_state
from tests.modules.test_language_model import make
from tests.modules.test_zero_shot_classifier import named  # noqa: F401
from tests.modules.text_models import BYTES, DECODERS, saved, windows

NAMES = ["one", "two", "eleven"]
DATA = {"num_classes": 3, "input_shape": (1, 8, 8)}
KINDS = [PromptedDualEncoder, PromptGenerator]


def step(module, batch, rate=0.1):
    """One step of gradient descent; returns the names in the state dict that it changed."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    module.training_step(batch)["loss"].backward()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_vectors_stand_where_the_placeholder_stands_and_get_the_gradient():
    embedding, vectors = nn.Embedding(5, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    tokens = torch.tensor([[3, 4, 4, 0], [4, 1, 4, 2]])
    with placeholders_replaced(embedding, 4, vectors):
        out = embedding(tokens)
    assert torch.equal(out[0, 1:3], vectors) and torch.equal(out[1, [0, 2]], vectors)
    assert torch.equal(out[0, [0, 3]], embedding.weight[[3, 0]])
    (out * torch.tensor([1.0, 10.0])[:, None, None]).sum().backward()
    assert torch.equal(vectors.grad, torch.full((2, 2), 11.0))
    assert torch.equal(embedding(tokens)[0, 1], embedding.weight[4])  # afterwards it is as before


def test_the_placeholder_is_no_token_of_a_text():
    assert unused_token_id([[1, 3], [2]], marks=[4]) == 5
    assert with_placeholders([[7], [8, 9]], 5, 2).tolist() == [[5, 5, 7, -1], [5, 5, 8, 9]]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    torch.manual_seed(0)
    module = SmallDualEncoder(dim=12, width=16, input_shape=(1, 8, 8), tokenizer=ByteTokenizer(), context=32).eval()
    path = tmp_path_factory.mktemp("towers") / "towers.safetensors"
    save_file(module_state(module), path)
    return module, str(path)


def prompted(towers, kind=PromptedDualEncoder, **settings):
    encoder = {"target": "tiny_dual_encoder", "args": {"dim": 12, "width": 16}}
    settings = {"words": "a sketch of", "context": 32, **DATA, **settings}
    return kind(NAMES, encoder=encoder, checkpoint=towers[1], **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_prompts_answer_as_the_words_they_start_from(towers, kind):
    module, images = prompted(towers, kind, new=["eleven"]).eval(), torch.rand(4, 1, 8, 8)
    classifier = zero_shot_classifier(towers[0], ByteTokenizer(), NAMES, ["a sketch of {}."])
    with torch.no_grad():
        output = module(images)
        torch.testing.assert_close(output.logits, zero_shot_selector(classifier)(towers[0], images))
        torch.testing.assert_close(output.embedding, towers[0].encode_image(images))


def test_prompts_alone_are_trained_and_sent(towers):
    module, batch = prompted(towers, personal=2), (torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert {k: tuple(v.shape) for k, v in module_state(module).items()} == {
        "backbone.prompt.shared": (12, 16),  # a vector for each byte of the words and the space behind them
        "backbone.prompt.personal": (2, 16),
    }
    assert step(module, batch) == set(module_state(module))
    assert not module.backbone.towers.training


def test_a_generator_moves_the_context_of_each_group_of_names(towers):
    module, batch = (
        prompted(towers, PromptGenerator, new=["eleven"]),
        (torch.rand(4, 1, 8, 8), torch.tensor([0, 1] * 2)),
    )
    assert step(module, batch) == {"backbone.prompt.out.weight", "backbone.prompt.out.bias"}  # the last layer was 0
    assert step(module, batch) == set(module_state(module))
    base, new = (module.backbone.prompt(getattr(module.backbone, f"group{i}")) for i in (0, 1))
    assert not torch.equal(base, new)
    assert not any("towers" in name or "names" in name or "start" in name for name in module_state(module))


@pytest.mark.parametrize("kind", KINDS)
def test_new_classes_are_answered_but_no_step_learns_their_names(towers, kind):
    """Logits of base classes, loss and gradient are those of a model that has never heard of the new class."""
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    torch.manual_seed(1)
    module = prompted(towers, kind, new=["eleven"]).train()
    text = lambda name: zero_shot_classifier(towers[0], ByteTokenizer(), [name], ["a sketch of {}."])  # noqa: E731
    weights = torch.cat([text("one"), text("two")])
    expected = F.cross_entropy(zero_shot_selector(weights)(towers[0], images), labels)
    torch.testing.assert_close(module.training_step((images, labels))["loss"], expected)
    before = module.eval()(images).logits.detach()
    step(module, (images, labels))
    after = module.eval()(images).logits.detach()
    assert not torch.equal(before[:, 2], after[:, 2])  # a shared context changes what it answers there all the same


def test_context_that_starts_from_no_words(towers):
    torch.manual_seed(0)
    module = prompted(towers, words="", length=5)
    assert module_state(module)["backbone.prompt.shared"].shape == (5, 16)
    assert 0.01 < float(module_state(module)["backbone.prompt.shared"].std()) < 0.03


def test_a_model_of_open_clip(named):  # noqa: F811
    model, checkpoint = named
    data = {"num_classes": 3, "input_shape": (3, 8, 8)}
    module = PromptedDualEncoder(NAMES, model=model, checkpoint=checkpoint, words="my big", **data).eval()
    tokenizer = ClipTokenizer(model)
    both = OpenClip(model, checkpoint=checkpoint, input_shape=(3, 8, 8), tokenizer=tokenizer, context=75).eval()
    images = torch.rand(2, 3, 8, 8)
    classifier = zero_shot_classifier(both, tokenizer, NAMES, ["my big {}."])
    with torch.no_grad():
        torch.testing.assert_close(module(images).logits, zero_shot_selector(classifier)(both, images))
    assert {k: tuple(v.shape) for k, v in module_state(module).items()} == {"backbone.prompt.shared": (2, 8)}
    assert step(module, (images, torch.tensor([0, 1]))) == {"backbone.prompt.shared"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 4}, "classes must name the data's 4 classes, each once; got 3 names"),
        ({"new": ["elven"]}, "new: 'elven' is none of the classes; did you mean 'eleven'"),
        ({"new": NAMES}, "there must be classes to train on"),
        ({"checkpoint": None}, "prompts are for known weights, which are not sent"),
        ({"model": "ViT-B-32"}, "one of the two"),
        ({"personal": -1}, "personal must be at least 0"),
        ({"words": "a very long beginning of a sentence"}, "36 vectors and a name of 7 tokens exceed the 32"),
        ({"context": 31}, "does not fit: 'backbone.text.0.position' has shape"),
    ],
)
def test_settings_that_do_not_fit_are_refused(towers, settings, message):
    encoder = {"target": "tiny_dual_encoder", "args": {"dim": 12, "width": 16}}
    known = {"encoder": encoder, "checkpoint": towers[1], "words": "a", "context": 32, **DATA}
    with pytest.raises(UserError, match=message):
        PromptedDualEncoder(NAMES, **(known | settings))


def test_a_generator_has_nothing_personal(towers):
    with pytest.raises(UserError, match="generated prompts are shared by all sites"):
        prompted(towers, PromptGenerator, personal=1)
    with pytest.raises(UserError, match="width must be a multiple of heads, got width 6 and 4 heads"):
        prompted(towers, PromptGenerator, width=6)


# --- vision transformers

IMAGES = {"num_classes": 3, "input_shape": (3, 160, 160)}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    return str(path)


def by_hand(network, tokens, x):
    """A forward pass with tokens behind the class token: at each block anew, or those of the first all the way."""
    x = network.norm_pre(network._pos_embed(network.patch_embed(x)))
    count = tokens.shape[1]
    for i, block in enumerate(network.blocks):
        rest = x[:, 1:] if i == 0 else x[:, 1 + count :]
        own = tokens[i] if i < len(tokens) else None
        own = x[:, 1 : 1 + count] if own is None else own.expand(len(x), -1, -1)
        x = block(torch.cat([x[:, :1], own, rest], dim=1))
    return network.forward_head(network.norm(torch.cat([x[:, :1], x[:, 1 + count :]], dim=1)))


@pytest.mark.parametrize("deep", [False, True])
def test_visual_prompts_by_hand(vit, deep):
    module, x = (
        PromptedViT("test_vit", checkpoint=vit, prompts=2, deep=deep, **IMAGES).eval(),
        torch.rand(2, 3, 160, 160),
    )
    tokens = module.backbone.prompts.tokens
    plain = Timm("test_vit", checkpoint=vit, **IMAGES).eval()
    with torch.no_grad():
        expected = by_hand(plain.backbone, tokens, x)
        torch.testing.assert_close(module(x).logits, expected)
        assert not torch.allclose(plain(x).logits, expected, atol=1e-4)
    assert {k: tuple(v.shape) for k, v in module_state(module).items()} == {
        "backbone.head.weight": (3, 64),
        "backbone.head.bias": (3,),
        "backbone.prompts.tokens": (6 if deep else 1, 2, 64),
    }
    assert step(module, (x, torch.tensor([0, 1]))) == set(module_state(module))


def test_a_copy_of_a_prompted_vit_has_prompts_of_its_own(vit):
    module, x = PromptedViT("test_vit", checkpoint=vit, prompts=2, **IMAGES).eval(), torch.rand(1, 3, 160, 160)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        before = module(x).logits
        twin.backbone.prompts.tokens.add_(1)
        assert torch.equal(module(x).logits, before) and not torch.equal(twin(x).logits, before)


def test_visual_prompts_are_for_known_weights_of_vision_transformers(vit, tmp_path):
    with pytest.raises(UserError, match="prompts are for known weights"):
        PromptedViT("test_vit", **IMAGES)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="plain vision transformers of timm, and test_resnet is none"):
        PromptedViT("test_resnet", checkpoint=str(tmp_path / "resnet.pth"), **IMAGES)


# --- language models


@pytest.mark.parametrize("family", DECODERS)
def test_soft_prompts_that_are_words_answer_as_the_words_do(family, tmp_path):
    plain = make(family, {"max_position_embeddings": 20}, context=16)
    module = SoftPromptLM(saved(plain, tmp_path), pretrained=True, words="abc", tokenizer=BYTES, context=12).eval()
    tokens = windows()
    words = torch.tensor([BYTES.encode("abc")]).expand(len(tokens), -1)
    whole = torch.cat([words, tokens], dim=1)
    real = tokens >= 0
    with torch.no_grad():
        torch.testing.assert_close(module(tokens).logits[real], plain(whole).logits[:, 3:][real])
        torch.testing.assert_close(module.token_nll(tokens), plain.token_nll(whole)[:, 3:])
    assert torch.equal(module.generate(tokens, 4), plain.generate(whole, 4))
    assert {k: tuple(v.shape) for k, v in module_state(module).items()} == {"prompt": (3, 16)}
    assert step(module, (tokens, None)) == {"prompt"}


def test_a_soft_prompt_starts_from_the_vocabulary_and_needs_room(tmp_path):
    folder = saved(make(config={"max_position_embeddings": 20}, context=16), tmp_path)
    module = SoftPromptLM(folder, pretrained=True, length=5, tokenizer=BYTES, context=12)
    table = module.network.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in module.prompt)
    assert module.positions == 15
    load_into(module, {"prompt": torch.zeros(5, 16)})
    with pytest.raises(UserError, match="context of 16 leaves no room for a prompt of 5"):
        SoftPromptLM(folder, pretrained=True, length=5, tokenizer=BYTES, context=16)
    with pytest.raises(UserError, match="prompts are for known weights"):
        SoftPromptLM("gpt2", tokenizer=BYTES, context=12)
