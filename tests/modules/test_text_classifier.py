"""Small text classifiers of every family that matters, against transformers' own forward pass."""

import pytest
import torch
from torch.utils.data import DataLoader

from fdl.errors import UserError
from fdl.modules.text_classifier import TextClassifier
from fdl.modules.tokenizers import train_bpe
from fdl.state.weights import module_state
from tests.modules.makers import quiet_trainer
from tests.modules.text_models import BYTES, DECODERS, ENCODERS, padded, saved, windows

CONTEXT = 12
FAMILIES = {**ENCODERS, **DECODERS}


def make(family: str = "bert", config: dict | None = None, classes: int = 3, **settings) -> TextClassifier:
    torch.manual_seed(0)
    sizes = {**FAMILIES[family], **(config or {})}
    settings = {"tokenizer": BYTES, "context": CONTEXT, **settings}
    return TextClassifier(family, config=sizes, num_classes=classes, **settings).eval()


def load(folder: str, classes: int = 3, **settings) -> TextClassifier:
    settings = {"tokenizer": BYTES, "context": CONTEXT, **settings}
    return TextClassifier(folder, pretrained=True, num_classes=classes, **settings).eval()


@pytest.mark.parametrize("family", ENCODERS)
def test_logits_are_transformers_own_and_the_embedding_is_what_its_last_layer_sees(family):
    module, tokens = make(family), windows()
    ids = tokens.masked_fill(tokens < 0, module.network.config.pad_token_id or 0)
    theirs = module.network(input_ids=ids, attention_mask=(tokens >= 0).long()).logits
    output = module(tokens)
    assert torch.equal(output.logits, theirs)
    torch.testing.assert_close(module.network.get_submodule(module.head)(output.embedding), theirs)
    assert output.embedding.shape == (3, module.embedding_dim)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_answer_at_the_last_real_token(family):
    module, tokens = make(family), windows()
    output = module(tokens)
    for row in tokens:
        text = row[row >= 0]
        theirs = module.network(input_ids=text[None]).logits
        torch.testing.assert_close(module(text[None]).logits, theirs)
    module.network.config.pad_token_id = 0  # which no text here has
    torch.testing.assert_close(output.logits, module.network(input_ids=tokens.clamp_min(0)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_answer(family):
    module = make(family)
    short, long = padded([[5, 6, 7]]), padded([[5, 6, 7], list(range(20, 32))])
    torch.testing.assert_close(module(long).logits[:1], module(short).logits)
    torch.testing.assert_close(module(long).embedding[:1], module(short).embedding)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2"])
def test_a_folder_gives_the_same_model_again_and_other_classes_a_new_head(family, tmp_path):
    module, tokens = make(family), windows()
    folder = saved(module, tmp_path)
    assert torch.equal(load(folder)(tokens).logits, module(tokens).logits)
    other = load(folder, classes=7, tuning="head")
    assert other(tokens).logits.shape == (3, 7)
    heads = {name.split(".")[1] for name in module_state(other)}
    assert heads <= {"classifier", "pre_classifier", "score"}
    body = {name: value for name, value in module.state_dict().items() if name.split(".")[1] not in heads}
    assert all(torch.equal(other.state_dict()[name], value) for name, value in body.items())
    assert body.keys() <= other.frozen
    with pytest.raises(UserError, match="frozen would keep a head of random weights"):
        load(folder, classes=7, tuning="frozen")
    assert not module_state(load(folder, tuning="frozen"))


def test_an_encoder_without_head_and_pooler_gets_both(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    encoder = BertForMaskedLM(BertConfig(vocab_size=257, max_position_embeddings=CONTEXT, **ENCODERS["bert"]))
    encoder.save_pretrained(tmp_path)
    BYTES.save(tmp_path)
    module = load(str(tmp_path), tuning="head")
    assert {name.split(".", 1)[1] for name in module_state(module)} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    pytest.importorskip("peft")
    adapted = load(str(tmp_path), tuning="lora")
    assert "network.bert.pooler.dense.weight" in module_state(adapted)
    assert not any("pooler.dense.lora" in name for name in adapted.state_dict())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_frozen_encoder_of_sentences_has_a_linear_head_on_its_mean(family, tmp_path):
    folder = saved(make(family), tmp_path)
    module, tokens = load(folder, pooling="mean", tuning="head"), windows()
    output = module(tokens)
    encoder = module.network.encoder
    for row, embedding in zip(tokens, output.embedding):
        text = row[row >= 0]
        torch.testing.assert_close(embedding, encoder(input_ids=text[None]).last_hidden_state[0].mean(0))
    assert module_state(module).keys() == {"network.head.weight", "network.head.bias"}
    module.train()
    assert not encoder.training
    assert torch.equal(module(tokens).embedding, output.embedding)


def test_features_are_captured():
    module = make()
    features = module(windows(), features=("bert.encoder.layer.1", "bert.embeddings")).features
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "bert.embeddings": (3, CONTEXT, 16),
        "bert.encoder.layer.1": (3, CONTEXT, 16),
    }
    with pytest.raises(UserError, match="no submodule matches"):
        module(windows(), features=("blocks",))


@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_a_plain_trainer_learns_what_a_text_begins_with(family):
    module = make(family, classes=2, optimizer={"target": "adam", "args": {"lr": 0.01}}).train()
    tokens = windows(rows=16).clamp_min(2)
    labels = torch.arange(16) % 2
    tokens[:, :6] = 40 + 9 * labels[:, None]
    loader = DataLoader(list(zip(tokens, labels)), batch_size=8)
    trainer = quiet_trainer(max_epochs=15)
    trainer.fit(module, loader, loader)
    assert float(trainer.callback_metrics["validation/accuracy"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"max_position_embeddings": 8}}, "reads 8 tokens at most, and the data's context is 12"),
        ({"family": "roberta", "config": {"max_position_embeddings": 13}}, "cannot read texts of 12 tokens"),
        ({"config": {"vocab_size": 100}}, "vocabulary of 100, and the data's tokenizer"),
        ({"config": {"hidden_sizes": 2}}, "bert has no setting 'hidden_sizes'"),
        ({"tuning": "head"}, "needs pretrained weights"),
    ],
)
def test_what_does_not_fit_is_said(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_weights_trained_with_another_tokenizer_are_refused(tmp_path):
    folder = saved(make(), tmp_path)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load(folder, tokenizer=train_bpe(["the cat sat"], 257))
