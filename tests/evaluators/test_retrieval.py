"""The retrieval evaluator on vectors whose ranks are known."""

import pytest
import torch

from fdl.errors import UserError
from fdl.evaluators.retrieval import Retrieval
from tests.evaluators.models import Towers
from tests.evaluators.pairs import Pairs
from tests.evaluators.worlds import server


def test_ranks_by_hand():
    """Texts 0 and 1 are swapped: their images rank the true text second, or third behind one that is as far away."""
    module = Towers(torch.eye(3), torch.eye(3)[[1, 0, 2]])
    world = server(Pairs([[0, 7], [1, 7], [2, 7]]), task="image_text", batch_size=2)
    got = Retrieval(k=[1, 2, 3]).evaluate(world, module)
    ways = ("image_to_text", "text_to_image")
    assert got == {
        **{
            f"{way}_recall_at_{k}": pytest.approx(value)
            for way in ways
            for k, value in ((1, 1 / 3), (2, 1 / 3), (3, 1))
        },
        **{f"{way}_mean_rank": pytest.approx(7 / 3) for way in ways},
        **{f"{way}_median_rank": 3.0 for way in ways},
    }


def test_pairs_with_the_same_caption():
    vectors = torch.eye(3)[[0, 0, 1]]
    world = server(Pairs([[0, 5], [0, 5], [2]]), task="image_text")
    assert Retrieval(k=[1]).evaluate(world, Towers(vectors, vectors))["image_to_text_recall_at_1"] == 1
    strict = Retrieval(k=[1], same_caption="no match").evaluate(world, Towers(vectors, vectors))
    assert strict["image_to_text_recall_at_1"] == pytest.approx(1 / 3)
    assert strict["text_to_image_mean_rank"] == pytest.approx(5 / 3)


def test_an_empty_test_set_and_a_cut_at_nothing():
    with pytest.raises(UserError, match="retrieval needs a test set"):
        Retrieval().evaluate(server(Pairs([])), None)
    with pytest.raises(UserError, match="k must be at least 1"):
        Retrieval(k=[0])


def test_a_small_dual_encoder_learns_to_find_its_pairs():
    from fdl.modules.small_dual_encoder import SmallDualEncoder
    from fdl.modules.tokenizers import ByteTokenizer
    from fdl.modules.zero_shot import pad_texts

    class Icons(Pairs):
        """Noise for images, so that they differ in more than brightness."""

        def batch(self, indices, generator=None):
            (_, tokens), labels = super().batch(indices)
            noise = torch.randn(len(self.captions), 1, 8, 8, generator=torch.Generator().manual_seed(0))
            return (noise[self.rows[indices]], tokens), labels

    tokenizer = ByteTokenizer()
    words = ["axe", "bow", "crown", "drum", "egg", "flute", "gem", "harp", "ivy", "jug"]
    captions = pad_texts([tokenizer.encode(f"an icon of {word}") for word in words]).tolist()
    torch.manual_seed(0)
    module = SmallDualEncoder(image="mlp", text="bag", input_shape=(1, 8, 8), tokenizer=tokenizer, context=20)
    world = server(Icons(captions), task="image_text", batch_size=4)
    before = Retrieval().evaluate(world, module)
    batch = world.test.batch(torch.arange(10))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        module.train().training_step(batch)["loss"].backward()
        optimizer.step()
    after = Retrieval().evaluate(world, module)
    assert before["image_to_text_recall_at_1"] < 0.5 and before["image_to_text_recall_at_10"] == 1
    assert after["image_to_text_recall_at_1"] == after["text_to_image_recall_at_1"] == 1
    assert after["text_to_image_mean_rank"] == 1
