"""Dual encoders in general, and our own small ones."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from fdl.errors import UserError
from fdl.losses.contrastive import info_nce, sigmoid_loss
from fdl.modules.dual_encoder import logit_scale_of
from fdl.modules.small_dual_encoder import BagOfWordsTower, SmallDualEncoder
from fdl.modules.tokenizers import ByteTokenizer
from tests.modules.makers import quiet_trainer
from tests.pairs import blobs, tiny

KINDS = {
    "mlp and bag": {"image": "mlp", "widths": [24, 12], "text": "bag"},
    "cnn and transformer": {"image": "cnn", "widths": [4, 8], "text": "transformer", "width": 8, "heads": 2},
}
TEXTS = torch.tensor([[97, 98, 99, -1, -1], [97, 98, 99, 100, 101], [-1, -1, -1, -1, -1]])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_unit_vectors_and_their_scaled_cosines(kind):
    module = tiny(dim=10, **KINDS[kind])().eval()
    images, tokens = blobs(6).batch(torch.arange(6))[0]
    output = module((images, tokens))
    pictures, texts = module.encode_image(images), module.encode_text(tokens)
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(output.embedding, torch.cat([pictures, texts], dim=1))
    torch.testing.assert_close(output.logits, pictures @ texts.T / 0.07)
    assert module.embedding_dim == 10 and output.features == {}
    seen = module((images, tokens), features=["image.trunk"]).features
    assert len(seen["image.trunk"]) == 6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_text(kind, training):
    module = tiny(**KINDS[kind])().train(training)
    with torch.inference_mode(not training):
        together = module.encode_text(TEXTS)
        alone = module.encode_text(TEXTS[:1, :3])
    torch.testing.assert_close(together[:1], alone, atol=1e-6, rtol=1e-5)
    assert together.isfinite().all()


def test_a_bag_is_the_mean_of_its_tokens():
    bag = BagOfWordsTower(128, 4)
    expected = bag.embedding.weight[97:100].mean(0)
    torch.testing.assert_close(bag(TEXTS)[0], expected)
    assert bag(TEXTS)[2].abs().max() == 0


def test_a_text_is_read_up_to_the_context():
    module = tiny(**KINDS["cnn and transformer"])().eval()
    long = torch.randint(0, 256, (2, 30))
    assert torch.equal(module.encode_text(long), module.encode_text(long[:, :12]))


@pytest.mark.parametrize(("loss", "function"), [("contrastive", info_nce), ("sigmoid", sigmoid_loss)])
def test_a_step_minimises_the_chosen_loss(loss, function):
    module = tiny(loss=loss)()
    inputs = blobs(8).batch(torch.arange(8))[0]
    found = module.training_step((inputs, None))["loss"]
    torch.testing.assert_close(found, function(module(inputs).logits))
    found.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert (module.logit_bias is not None) == (loss == "sigmoid")


def test_the_scale_is_kept_below_one_hundred():
    module = tiny()()
    with torch.no_grad():
        module.logit_scale.fill_(math.log(1000))
    assert logit_scale_of(module) == 100
    module.training_step((blobs(4).batch(torch.arange(4))[0], None))
    assert module.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_it_trains_with_a_plain_trainer():
    pairs = blobs(64, kinds=6)
    module = tiny(optimizer={"target": "adam", "args": {"lr": 0.01}})()
    batches = [pairs.batch(rows) for rows in torch.arange(64).split(16)]
    loader = DataLoader(batches * 8, batch_size=None)
    validation = DataLoader(batches, batch_size=None)
    trainer = quiet_trainer(max_epochs=1)
    before = trainer.validate(module, validation, verbose=False)[0]
    trainer.fit(module, loader)
    after = trainer.validate(module, validation, verbose=False)[0]
    assert after["validation/loss"] < before["validation/loss"] - 0.5
    assert not module.gather


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"text": "transformer", "width": 10, "heads": 3}, "width must be a multiple of heads"),
        ({"image": "rnn"}, "image must be one of cnn, mlp"),
        ({"text": "rnn"}, "text must be bag or transformer"),
        ({"loss": "triplet"}, "loss must be one of contrastive, sigmoid"),
        ({"image": "cnn", "widths": [4, 4, 4, 4]}, "need images of at least 16"),
    ],
)
def test_what_does_not_fit_is_said(settings, message):
    with pytest.raises(UserError, match=message):
        SmallDualEncoder(**settings, input_shape=(1, 8, 8), tokenizer=ByteTokenizer(), context=12)
