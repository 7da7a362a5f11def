"""Zero-shot classifiers: the formula, the sentences, and real CLIP text vectors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fdl.engine.runtime import Runtime
from fdl.errors import UserError
from fdl.metrics.zero_shot import zero_shot_accuracy
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.tokenizers import ByteTokenizer
from fdl.modules.zero_shot import PROMPT_TEMPLATES, pad_texts, templates_of, zero_shot_classifier
from tests.pairs import PairSamples, tiny

TOKENIZER = ByteTokenizer()


def test_sentences_are_normalised_averaged_and_normalised_again():
    module = tiny(dim=6)().train()
    rows = zero_shot_classifier(module, TOKENIZER, ["cat", "dog"], ["a {}", "{} here"])
    for row, sentences in zip(rows, (["a cat", "cat here"], ["a dog", "dog here"])):
        vectors = []
        for sentence in sentences:
            raw = module.text_vectors(torch.tensor([TOKENIZER.encode(sentence)]))[0].detach()
            vectors.append(raw / raw.pow(2).sum().sqrt())
        mean = sum(vectors) / 2
        torch.testing.assert_close(row, mean / mean.pow(2).sum().sqrt())
    assert module.training and rows.shape == (2, 6) and not rows.requires_grad


def test_sets_of_sentences_are_found_and_checked():
    assert templates_of("photo") == ("a photo of a {}.",)
    assert all(template.count("{}") == 1 for templates in PROMPT_TEMPLATES.values() for template in templates)
    for wrong, message in (
        ("fotos", "did you mean 'photos'"),
        (["a cat"], "where the class's name goes"),
        ([], "none"),
    ):
        with pytest.raises(UserError, match=message):
            templates_of(wrong)
    with pytest.raises(UserError, match="the data give none"):
        zero_shot_classifier(tiny()(), TOKENIZER, [])


def test_token_lists_are_padded_on_the_right():
    assert pad_texts([[1, 2], [], [3]]).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert pad_texts([[], []]).tolist() == [[-1], [-1]]


class Listed(DualEncoder):
    """Images are vectors already; a text's vector is looked up by its tokens, as bytes."""

    def __init__(self, known):
        super().__init__()
        self.known, self.backbone = known, torch.nn.Identity()

    def image_vectors(self, images):
        return images

    def text_vectors(self, tokens):
        return torch.stack([self.known[bytes(row[row >= 0].tolist()).decode()] for row in tokens])


def test_accuracy_is_the_share_of_images_nearest_to_their_own_class():
    known = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    module = Listed(known)
    classifier = zero_shot_classifier(module, TOKENIZER, ["a", "b"], "name")
    images = torch.tensor([[2.0, 0.1], [0.3, 0.2], [0.1, 9.0], [5.0, 4.0]])
    samples = PairSamples(images, torch.zeros(4, 1, dtype=torch.int64))
    labels = torch.tensor([0, 1, 1, 0])
    assert zero_shot_accuracy(Runtime(accelerator="cpu"), module, samples, labels, classifier) == 0.75


DATA = os.environ.get("FDL_DATA")


@pytest.mark.skipif(not DATA, reason="FDL_DATA names no folder of real data")
def test_real_clip_text_vectors_find_the_right_definitions_neighbours():
    """CLIP's own text tower as a frozen one: names classify themselves, and near names are near in meaning."""
    stored = np.load(Path(DATA) / "clip_vitb32_text_emb_lvis1203.npz")
    names = [str(name) for name in stored["names"]]
    vectors = torch.from_numpy(stored["emb"]).float()
    module = Listed(dict(zip((f"a {name}" for name in names), vectors)))
    classifier = zero_shot_classifier(module, TOKENIZER, names, ["a {}"])
    torch.testing.assert_close(classifier, F.normalize(vectors, dim=1), atol=1e-6, rtol=1e-4)
    samples = PairSamples(vectors, torch.zeros(len(names), 1, dtype=torch.int64))
    labels = torch.arange(len(names))
    assert zero_shot_accuracy(Runtime(accelerator="cpu"), module, samples, labels, classifier) > 0.99
    near = {}
    for name in ("cat", "airplane"):
        cosines = classifier @ classifier[names.index(name)]
        near[name] = {names[i] for i in cosines.topk(4).indices.tolist()} - {name}
    assert {"kitten", "dog"} <= near["cat"] and {"jet_plane", "helicopter"} & {
        n.replace(" ", "_") for n in near["airplane"]
    }
