import json

import pytest
import torch

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import ClipTokenizer
from fdl.modules.open_clip_model import OpenClip
from fdl.modules.zero_shot import zero_shot_classifier, zero_shot_selector
from fdl.modules.zero_shot_classifier import ZeroShotClassifier
from fdl.state.weights import module_state

CLASSES = ["airplane", "fire truck", "cat"]
DATA = {"num_classes": 3, "input_shape": (3, 8, 8)}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A tiny model of open_clip by name, and a file of random weights for it."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (folder / "fdl-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    network = open_clip.create_model("fdl-tiny")
    network.logit_scale.data.fill_(3.0)
    torch.save(network.state_dict(), folder / "weights.pt")
    return "fdl-tiny", str(folder / "weights.pt")


def test_it_answers_what_the_dual_encoder_answers_about_sentences(named):
    model, checkpoint = named
    classifier = ZeroShotClassifier(model, CLASSES, checkpoint=checkpoint, templates=["a {}.", "my {}"], **DATA).eval()
    tokenizer = ClipTokenizer(model)
    both = OpenClip(
        model, checkpoint=checkpoint, input_shape=DATA["input_shape"], tokenizer=tokenizer, context=77
    ).eval()
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        question = zero_shot_selector(zero_shot_classifier(both, tokenizer, CLASSES, ["a {}.", "my {}"]))
        output = classifier(images)
        torch.testing.assert_close(output.logits, question(both, images))
        torch.testing.assert_close(output.embedding, both.encode_image(images))
        # by hand, for one class: the scale times the cosine with the mean of its sentences
        texts = [both.encode_text(torch.tensor([tokenizer.encode(s)])) for s in ("a fire truck.", "my fire truck")]
        mean = torch.cat(texts).mean(0)
        expected = torch.tensor(3.0).exp() * both.encode_image(images) @ (mean / mean.norm())
    torch.testing.assert_close(output.logits[:, 1], expected)
    assert output.logits.std() > 0.01


def test_the_text_tower_is_left_behind_and_a_frozen_one_sends_nothing(named):
    model, checkpoint = named
    classifier = ZeroShotClassifier(model, CLASSES, checkpoint=checkpoint, tuning="frozen", **DATA)
    assert sum(p.numel() for p in classifier.parameters()) < 49408 * 8
    assert module_state(classifier) == {}
    assert not any(p.requires_grad for p in classifier.parameters())
    head = ZeroShotClassifier(model, CLASSES, checkpoint=checkpoint, tuning="head", **DATA)
    assert list(module_state(head)) == ["backbone.head.weight"]


def test_what_it_cannot_do_without(named):
    model, checkpoint = named
    with pytest.raises(UserError, match="pretrained or checkpoint"):
        ZeroShotClassifier(model, CLASSES, **DATA)
    with pytest.raises(UserError, match="2 names, but the data have 3"):
        ZeroShotClassifier(model, CLASSES[:2], checkpoint=checkpoint, **DATA)
