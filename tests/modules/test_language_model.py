"""Small causal language models of every family that matters, against transformers' own forward pass."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from fdl.errors import UserError
from fdl.modules.language_model import LanguageModel
from fdl.modules.tokenizers import train_bpe
from fdl.state.weights import load_into, module_state
from tests.modules.makers import quiet_trainer
from tests.modules.text_models import BYTES, DECODERS, padded, saved, windows

CONTEXT = 12
TIED = {"gpt2", "opt", "qwen2"}


def make(family: str = "gpt2", config: dict | None = None, context: int = CONTEXT, **settings) -> LanguageModel:
    torch.manual_seed(0)
    config = {**DECODERS[family], **(config or {})} if family in DECODERS else config
    return LanguageModel(family, config=config, tokenizer=BYTES, context=context, **settings).eval()


@pytest.mark.parametrize("family", DECODERS)
def test_logits_and_losses_are_transformers_own(family):
    module, tokens = make(family, chunk=5), windows()
    real = tokens >= 0
    labels = tokens.masked_fill(~real, -100)
    theirs = module.network(input_ids=tokens.clamp_min(0), attention_mask=real.long(), labels=labels)
    output, hidden = module(tokens), module.hidden(tokens)
    torch.testing.assert_close(output.logits[real], theirs.logits[real])
    assert torch.equal(module.head(hidden), output.logits)
    torch.testing.assert_close(module.training_step((tokens, None))["loss"], theirs.loss)
    nll = module.token_nll(tokens)
    log_p = theirs.logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None].clamp_min(0))[..., 0]
    torch.testing.assert_close(nll, torch.where(real[:, 1:], -log_p, 0))
    for row in (0, 1):
        torch.testing.assert_close(output.embedding[row], hidden[row][real[row]].mean(0))
    assert (module.vocab_size, module.embedding_dim, module.positions) == (257, 16, CONTEXT)


@pytest.mark.parametrize("family", DECODERS)
def test_gradients_are_those_of_transformers_loss(family):
    module, tokens = make(family, chunk=4), windows()
    labels = tokens.masked_fill(tokens < 0, -100)
    theirs = module.network(input_ids=tokens.clamp_min(0), attention_mask=(tokens >= 0).long(), labels=labels).loss
    parameters = list(module.parameters())
    expected = torch.autograd.grad(theirs, parameters)
    for a, b in zip(torch.autograd.grad(module.training_step((tokens, None))["loss"], parameters), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_a_folder_gives_the_same_model_again(family, tmp_path):
    module, tokens = make(family), windows()
    folder = saved(module, tmp_path)
    loaded = LanguageModel(folder, pretrained=True, tokenizer=BYTES, context=8).eval()
    assert torch.equal(loaded(tokens).logits, module(tokens).logits)
    assert loaded.dtype == torch.float32
    # the same sizes, without the weights
    blank = LanguageModel(folder, tokenizer=BYTES, context=8)
    assert {n: v.shape for n, v in blank.state_dict().items() if "wpe" not in n and "positions" not in n} == {
        n: v.shape for n, v in module.state_dict().items() if "wpe" not in n and "positions" not in n
    }
    assert not torch.equal(blank.eval()(tokens[:, :8]).logits, module(tokens[:, :8]).logits)
    file = LanguageModel(
        family,
        checkpoint=f"{folder}/model.safetensors",
        config={**DECODERS[family], "vocab_size": 257, "max_position_embeddings": CONTEXT},
        tokenizer=BYTES,
        context=CONTEXT,
    ).eval()
    assert torch.equal(file(tokens).logits, module(tokens).logits)


def test_weights_of_sixteen_bits_are_loaded_in_thirty_two(tmp_path):
    module = make()
    module.network.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = LanguageModel(str(tmp_path), pretrained=True, tokenizer=BYTES, context=CONTEXT)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", DECODERS)
def test_a_tied_tensor_has_one_place_in_the_state(family):
    module = make(family)
    state = module_state(module)
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in module.parameters())
    assert (len(module.state_dict()) - len(state) == 1) == (family in TIED)
    other, tokens = make(family), windows()
    load_into(other, {name: value + 0.01 for name, value in state.items()})
    load_into(other, copy.deepcopy(state))
    assert torch.equal(other(tokens).logits, module(tokens).logits)
    assert (other.head.weight is other.network.get_input_embeddings().weight) == (family in TIED)


def test_padding_changes_no_answer():
    module, tokens = make("opt"), windows()
    short = module(tokens[1:2, : CONTEXT // 2])
    long = module(tokens[1:2])
    torch.testing.assert_close(long.logits[:, : CONTEXT // 2], short.logits)
    torch.testing.assert_close(long.embedding, short.embedding)


def test_features_are_captured():
    module, tokens = make(), windows()
    features = module(tokens, features=("transformer.h.*.mlp",)).features
    assert list(features) == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert features["transformer.h.1.mlp"].shape == (3, CONTEXT, 16)
    with pytest.raises(UserError, match="no submodule matches"):
        module(tokens, features=("blocks",))


def test_sparse_answers_are_the_likeliest_tokens_and_their_probabilities():
    module, tokens = make("llama", chunk=5), windows()
    ids, p, valid = module.top_predictions(tokens, 6)
    expected, order = module(tokens).logits.softmax(-1).topk(6, -1)
    assert torch.equal(ids[valid], order[valid])
    torch.testing.assert_close(p[valid], expected[valid])
    assert torch.equal(valid, tokens >= 0)
    assert module.top_predictions(tokens, 1000)[0].shape[-1] == 257


def test_ids_that_only_pad_a_vocabulary_are_not_answered():
    module, tokens = make(config={"vocab_size": 300}), windows()
    assert module(tokens).logits.shape[-1] == 300
    ids, _, _ = module.top_predictions(tokens, 280)
    assert ids.shape[-1] == 257
    assert int(ids.max()) == 256


def test_sampled_answers_have_the_models_probabilities_as_their_mean():
    module, tokens = make("gpt_neox"), windows()[:1, :2]
    draws = 20_000
    ids, p, valid = module.sampled_predictions(tokens, draws, torch.Generator().manual_seed(0), temperature=0.5)
    expected = (module(tokens).logits[0, 1] / 0.5).softmax(-1)
    seen = torch.zeros(257).scatter_add_(0, ids[0, 1].clamp_min(0), p[0, 1])
    assert bool(((seen - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all())
    assert bool(valid.all())


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_continuations_are_what_the_logits_say(family):
    module = make(family, context=24)
    prompts = padded([[84, 104, 101], [99, 97, 116, 115, 32]])
    result = module.generate(prompts, 4)
    for prompt, continuation in zip(prompts, result):
        text = prompt[prompt >= 0]
        for token in continuation:
            likeliest = int(module(text[None]).logits[0, -1].argmax())
            assert int(token) == (-1 if likeliest == BYTES.eos else likeliest)
            if int(token) < 0:
                break
            text = torch.cat([text, token[None]])


def test_a_continuation_stops_at_the_end_of_a_text_and_within_the_positions():
    module = make(context=8)
    with torch.no_grad():
        module.network.transformer.wte.weight[256] = 100 * module.hidden(padded([[1, 2]]))[0, -1]
    assert set(module.generate(padded([[1, 2]]), 3).flatten().tolist()) == {-1}
    long = windows(20)[:1]
    last = long[:, -5:]
    assert torch.equal(make(context=8).generate(long, 3), make(context=8).generate(last, 3))
    with pytest.raises(UserError, match="below the model's 8 positions"):
        module.generate(long, 8)


def test_drawn_continuations_follow_the_generator_and_leave_torchs_stream_alone():
    module, prompt = make(), padded([[84, 104]])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = module.generate(prompt, 6, 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, module.generate(prompt, 6, 1.0, torch.Generator().manual_seed(1)))
    others = [module.generate(prompt, 6, 1.0, torch.Generator().manual_seed(seed)) for seed in range(2, 6)]
    assert any(not torch.equal(first, other) for other in others)


def test_gradient_checkpointing_changes_no_gradient():
    plain, tokens = make().train(), windows()
    saving = make(gradient_checkpointing=True).train()
    for module in (plain, saving):
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        module.training_step((tokens, None))["loss"].backward()
    assert saving.network.is_activation_checkpointing
    for a, b in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("tuning", ["head", "frozen", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_frozen_is_no_state(family, tuning, tmp_path):
    if tuning == "lora":
        pytest.importorskip("peft")
    module, tokens = make(family), windows()
    folder = saved(module, tmp_path)
    tuned = LanguageModel(folder, pretrained=True, tuning=tuning, tokenizer=BYTES, context=CONTEXT)
    assert torch.equal(tuned.eval()(tokens).logits, module(tokens).logits)
    state, tied = module_state(tuned), {"network.lm_head.weight"} if family == "gpt2" else set()
    assert state.keys() == tuned.state_dict().keys() - tuned.frozen - tied
    assert {"head": "weight", "lora": "lora_", "frozen": ""}[tuning] in "".join(state)
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert (tuning == "frozen") == (not state)
    assert not any("lm_head" in name for name in state) or tuning == "head"
    with pytest.raises(UserError, match="needs pretrained weights"):
        make(family, tuning=tuning)


def test_a_plain_trainer_lowers_the_loss():
    module = make(optimizer={"target": "adam", "args": {"lr": 0.01}}).train()
    rows = torch.tensor([BYTES.encode("to be or not")] * 16)
    assert rows.shape[1] == CONTEXT
    loader = DataLoader([(row, 0) for row in rows], batch_size=4)
    before = float(module.validation_step((rows, None))["loss"].detach())
    trainer = quiet_trainer(max_epochs=10)
    trainer.fit(module, loader, loader)
    assert before == pytest.approx(math.log(257), rel=0.1)
    assert float(trainer.callback_metrics["validation/loss"]) < 0.6 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "gpt2", "config": {"n_positions": 8}}, "reads 8 tokens at most, and the data's context is 12"),
        (
            {"family": "gpt2", "config": {"vocab_size": 100}},
            "vocabulary of 100, and the data's tokenizer .bytes. one of 257",
        ),
        ({"family": "gpt2", "config": {"n_layers": 2}}, "gpt2 has no setting 'n_layers'; did you mean 'n_layer'"),
        ({"family": "llama", "config": {"hidden_size": 15}}, "llama refuses its settings: .*not a multiple"),
        ({"family": "distilbert"}, "transformers cannot build distilbert"),
        ({"family": "gpt2", "chunk": 0}, "chunk must be at least 1"),
        (
            {"family": "gpt2", "pretrained": True, "checkpoint": "x.safetensors"},
            "give pretrained or checkpoint, not both",
        ),
        ({"family": "gpt2", "checkpoint": "/no/x.safetensors"}, "no such file: /no/x.safetensors"),
        ({"family": "/no/folder"}, r"/no/folder is no folder with a config\.json"),
    ],
)
def test_what_does_not_fit_is_said(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_a_model_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'gtp2' is no local folder .*give the path of a folder .*did you mean 'gpt2'"):
        LanguageModel("gtp2", tokenizer=BYTES, context=8)


def test_weights_trained_with_another_tokenizer_are_refused(tmp_path):
    folder = saved(make(), tmp_path)
    other = train_bpe(["the cat sat"] * 3, 257)
    assert other.vocab_size == 257
    with pytest.raises(UserError, match=r"another tokenizer .*give the data tokenizer: .*aligned_causal_lm"):
        LanguageModel(folder, pretrained=True, tokenizer=other, context=CONTEXT)


def test_a_file_of_another_family_is_refused(tmp_path):
    folder = saved(make("llama"), tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors for gpt2 does not fit: no weights of the right shape for"):
        make("gpt2", checkpoint=f"{folder}/model.safetensors")


def test_a_family_that_changes_its_logits_afterwards_is_refused():
    config = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "final_logit_softcapping": 0.01,
    }
    with pytest.raises(UserError, match="changes its logits after the output layer"):
        make("gemma2", config)


def test_the_embedding_of_the_smallest_id_is_trained_in_new_models():
    module = make("opt")
    tokens = torch.ones(1, CONTEXT, dtype=torch.int64)
    F.cross_entropy(module(tokens).logits[0], tokens[0]).backward()
    assert bool((module.network.get_input_embeddings().weight.grad[1] != 0).any())
