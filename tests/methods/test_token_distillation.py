"""Federated distillation over tokens: what it comes to in simple cases, resuming, and what is refused."""

import dataclasses
import json

import pytest
import torch

from fdl.build import build
from fdl.comm.stages.entropy import Deflate
from fdl.comm.stages.quantize import Quantize
from fdl.errors import RejectedMessageError, UserError
from fdl.federation.local_turns import run_local_update
from fdl.federation.traffic_estimate import estimate_bytes
from fdl.knowledge.aggregation.tokens import TokenKnowledge, TokenMixture
from fdl.knowledge.confidence.tokens import BayesianMixture, TokenEntropy
from fdl.knowledge.distillation import token_objective
from fdl.knowledge.distillation.token_upload import TokenUploadBuilder, _systematic_draws, sampled_message
from fdl.losses.tokens import next_token_loss, sparse_distillation, token_distillation
from fdl.messages.sparse_responses import SparseResponses
from fdl.methods.token_distillation import TokenDistillation
from fdl.modules.tokenizers import train_bpe
from fdl.recipe import load
from tests.toy import Linear
from tests.toy_language import DOWN, LENGTH, SHORT, UP, VOCAB, Bigram, Letters, federation, table, windows

OPTIONS = {
    "plain": lambda: {},
    "bayes": lambda: {"confidence": BayesianMixture()},
    "entropy": lambda: {"confidence": TokenEntropy(), "k": 2},
    "sampled": lambda: {"mode": "sampled", "draws": 9, "temperature": 2.0},
    "renormalised": lambda: {"mode": "renormalised", "k": 2, "mass": 0.7},
    "proxy_fraction": lambda: {"proxy_fraction": 0.7, "confidence": BayesianMixture(1.0, prior="samples")},
    "labels": lambda: {"ground_truth": 0.5, "feedback": "none"},
}


class Stranger(Bigram):
    """Its ids mean something else."""

    class tokenizer(Letters):
        fingerprint = "numbers"

    tokenizer = data_tokenizer = tokenizer()


def outcome(loop):
    """All that must not depend on whether a run was interrupted: metrics, bytes and weights."""
    rounds = [{k: v for k, v in record.items() if k != "seconds"} for record in loop.history]
    weights = [loop.server.student.table.tolist()]
    weights += [client.state["specialist"]["table"].tolist() for client in loop.clients]
    return json.dumps([rounds, weights, [list(row) for row in loop.ledger.rows()]])


def ran(folder, rounds=1, **settings):
    loop = federation(TokenDistillation(**settings.pop("method", {})), folder, rounds, **settings)
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    return loop


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_the_straight_one(tmp_path, name):
    straight = ran(tmp_path / "straight", 3, method=OPTIONS[name]())
    crashed = federation(TokenDistillation(**OPTIONS[name]()), tmp_path / "crashed", 3)
    crashed.rounds = 2
    crashed.run()
    resumed = federation(TokenDistillation(**OPTIONS[name]()), tmp_path / "crashed", 3)
    resumed.run(resume=True)
    assert resumed.resumed_from == 2
    assert outcome(resumed) == outcome(straight)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_works_through_a_lossy_link_and_can_be_estimated(tmp_path, name):
    chain = [Quantize(8), Deflate()]
    loop = federation(TokenDistillation(**OPTIONS[name]()), tmp_path, 2, upload=chain, download=chain)
    estimated = estimate_bytes(loop, 2)
    assert min(estimated["up"].values()) > 0
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    assert torch.isfinite(loop.server.student.table).all() and loop.server.student.table.abs().max() > 0


def dense_student(loop, tables):
    """The student after one step of gradient descent towards the mean of the tables' distributions."""
    student = Bigram()
    tokens = loop.server.proxy.batch(torch.arange(len(loop.server.proxy)))[0]
    teacher = Bigram(torch.stack([torch.softmax(t, 1) for t in tables]).mean(0).log())
    loss = token_distillation(
        student.hidden(tokens), student.head, teacher.hidden(tokens), teacher.head, (tokens >= 0).float()
    )
    loss.backward()
    return student.table.detach() - student.table.grad


@pytest.mark.parametrize("confidence", [None, BayesianMixture(1.0), BayesianMixture(0.0, "samples"), TokenEntropy()])
@pytest.mark.parametrize("clients", [1, 3])
def test_clients_that_agree_are_one_dense_teacher(tmp_path, confidence, clients):
    tables = [table(0, 2.0)] * clients
    loop = ran(
        tmp_path,
        method={"k": VOCAB, "confidence": confidence},
        local_training=0,
        server_distil=1,
        tables=tables,
        clients=clients,
    )
    torch.testing.assert_close(loop.server.student.table.detach(), dense_student(loop, tables[:1]))


def test_without_confidence_the_teacher_is_the_mean(tmp_path):
    tables = [table(0), table(1)]
    loop = ran(tmp_path, method={"k": VOCAB}, local_training=0, server_distil=1, tables=tables)
    torch.testing.assert_close(loop.server.student.table.detach(), dense_student(loop, tables))


def test_public_text_is_its_own_label(tmp_path):
    tables = [table(0)]
    settings = {"local_training": 0, "server_distil": 1, "tables": tables, "clients": 1}
    without = ran(tmp_path / "a", method={"k": VOCAB}, **settings)
    both = ran(tmp_path / "b", method={"k": VOCAB, "ground_truth": 0.5}, **settings)
    student = Bigram()
    tokens = both.server.proxy.batch(torch.arange(3))[0]
    next_token_loss(student.hidden(tokens), student.head, tokens).backward()
    expected = without.server.student.table - 0.5 * student.table.grad
    torch.testing.assert_close(both.server.student.table, expected)
    metrics = both.history[0]["metrics"]
    total = metrics["distil/response"] + 0.5 * metrics["distil/next_token"]
    assert metrics["distil/loss"] == pytest.approx(total)


def test_clients_learn_from_the_mixture(tmp_path):
    """With no training of its own, a client moves by the one step of `client_distil`, towards the mean of both."""
    tables = [table(0), table(1)]
    loop = ran(tmp_path, 2, method={"k": VOCAB}, local_training=0, server_distil=1, tables=tables)
    tokens = loop.server.proxy.batch(torch.arange(3))[0]
    mean = Bigram(torch.stack([torch.softmax(t, 1) for t in tables]).mean(0).log())
    for client, before in zip(loop.clients, tables):
        own = Bigram(before)
        token_distillation(
            own.hidden(tokens), own.head, mean.hidden(tokens), mean.head, (tokens >= 0).float()
        ).backward()
        torch.testing.assert_close(client.state["specialist"]["table"], (own.table - 0.5 * own.table.grad).detach())


def test_both_ways_are_counted(tmp_path):
    loop = ran(tmp_path, 2, method={"proxy_fraction": 0.7})
    assert loop.ledger.by_kind().keys() == {"up/sparse_responses", "down/sparse_responses", "setup/proxy"}
    silent = ran(tmp_path / "silent", 2, method={"feedback": "none"})
    assert silent.ledger.by_kind().keys() == {"up/sparse_responses", "setup/proxy"}
    assert silent.method.setup_bytes(silent.server) == {"proxy": 2 * 10}


def test_a_round_asks_all_clients_for_the_same_windows(tmp_path):
    loop = ran(tmp_path, 1, method={"proxy_fraction": 0.7})
    loop.start_round(2)
    answers = []
    for client in loop.clients:
        answers.append(run_local_update(loop.method, client, None).rows)
    assert torch.equal(*answers) and len(answers[0]) == 2
    assert loop.server.state["mixture"]["sizes"].shape == (2, LENGTH)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (lambda: Bigram(vocab_size=3), "specialist bigram: its vocabulary of 3 tokens is not the data's, of 5"),
        (Stranger, "specialist bigram: its vocabulary of 5 tokens is not the data's, of 5"),
        (Linear, "specialist bigram: Linear is no language model"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, factory, reason):
    loop = federation(TokenDistillation(), tmp_path)
    loop.runtime.factories["bigram"] = factory
    with pytest.raises(UserError, match=reason):
        loop.run()


def test_both_losses_in_one_pass_are_those_of_two():
    tokens, weights = windows(UP, DOWN, SHORT).batch(torch.arange(3))[0], table(0)
    ids = torch.tensor([[3, 1], [0, 2], [4, -1], [-1, -1]]).expand(3, 4, 2)
    p = torch.tensor([[0.5, 0.3], [0.9, 0.1], [0.2, 0.0], [0.0, 0.0]]).expand(3, 4, 2)
    for mode in ("tail", "sampled", "renormalised"):
        method = TokenDistillation(mode=mode, temperature=1.5, ground_truth=0.7)
        one, two = Bigram(weights), Bigram(weights)
        parts = method.objective(one, (tokens, ids.int(), p))
        response = sparse_distillation(two.hidden(tokens), two.head, ids, p, mode, ids[..., 0] >= 0, 1.5)
        following = next_token_loss(two.hidden(tokens), two.head, tokens)
        torch.testing.assert_close(parts["response"], response.detach())
        torch.testing.assert_close(parts["next_token"], following.detach())
        torch.testing.assert_close(parts["loss"].detach(), (response + 0.7 * following).detach())
        parts["loss"].backward()
        (response + 0.7 * following).backward()
        torch.testing.assert_close(one.table.grad, two.table.grad)


TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of a few dozen words and parts of words."""
    folder = tmp_path_factory.mktemp("words")
    train_bpe(VERSES, 320, folder)
    return folder


VERSES = [f"{a} {b} and {c}.\n" for a in ("the sun", "the moon") for b in ("rises", "sets") for c in ("falls", "stays")]


def speaking(words, folder, **changes):
    """Two institutions, one with a model of bytes, the other with a model of words; public text and student: bytes."""
    lines = [{"text": text * 6, "site": f"site{i % 3}"} for i, text in enumerate(VERSES * 6)]
    path = folder / "verses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = {"model": "gpt2", "config": TINY}
    own = {**model, "own_tokenizer": str(words), "own_context": 64}
    fit = {"steps": 20, "batch_size": 8, "optimizer": {"target": "adam", "args": {"lr": 0.01}}}
    content = {
        "name": "verses",
        "method": {"target": "token_distillation", "args": {"confidence": "bayesian_mixture"}},
        "data": {
            "target": "text_table",
            "args": {"path": str(path), "context": 64, "group": "site", "proxy_groups": ["site2"], "test": 6},
        },
        "partition": "by_group",
        "federation": {"clients": 2, "rounds": 1, "calibration_fraction": 0},
        "specialists": [
            {"target": "causal_lm", "args": model},
            {"target": "aligned_causal_lm", "args": own},
        ],
        "student": {"target": "causal_lm", "args": model},
        "local_training": fit,
        "server_distil": fit,
        "client_distil": {**fit, "steps": 2},
        "fabric": {"accelerator": "cpu", "threads": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return build(load(folder / "recipe.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()]), folder)


def test_a_specialist_with_another_tokenizer_takes_part(words, tmp_path):
    """Over two rounds, so that the mixture comes back: to the model of bytes alone."""
    loop = speaking(words, tmp_path, **{"federation.rounds": 2, "local_training.steps": 50})
    untrained = loop.runtime.predict(loop.server.student, loop.server.test, "logits").clone()
    loop.run()
    assert all(record["refused"] == {} for record in loop.history)
    bytes_only, of_words = loop.clients
    assert of_words.architecture != bytes_only.architecture
    assert {row.client for row in loop.ledger.rows() if row.direction == "down"} == {bytes_only.id}
    # what it answers: where a word ends, the next byte, as the text itself has it
    with of_words.turn():
        answers = loop.method.uploads.upload(of_words, of_words.specialist(), None)
    answers.validate()
    tokens = loop.server.proxy.batch(torch.arange(len(loop.server.proxy)))[0]
    answered = answers.sizes > 0
    share = float(answered[tokens >= 0].float().mean())
    assert 0.1 < share < 0.9
    mixture = loop.method._mixture(loop.server, None, weighted=True)
    mixture.add(answers, of_words.id)
    likeliest = mixture.result().ids[:, :-1, 0]
    known = answered[:, :-1] & (tokens[:, 1:] >= 0)
    assert float((likeliest == tokens[:, 1:])[known].float().mean()) > 0.5
    assert not torch.equal(loop.runtime.predict(loop.server.student, loop.server.test, "logits"), untrained)


def test_its_word_is_weighed_by_the_text_that_it_foretold(words, tmp_path):
    """Log-weights go up to each byte along the own tokens, also where it does not answer."""
    loop = speaking(words, tmp_path)
    loop.set_up()
    client = loop.clients[1]
    answering = TokenUploadBuilder(4, 1.0, None, 1.0, BayesianMixture(1.0))
    with client.turn():
        answers = answering.upload(client, client.specialist(), torch.arange(2))
        tokens = client.proxy.batch(torch.arange(2))[0]
        nll = client.predict(client.specialist(), client.proxy.subset(torch.arange(2)), lambda m, x: m.token_nll(x))
    torch.testing.assert_close(answers.weights.values()[:, 1:], -nll.cumsum(1), atol=answers.weights.step, rtol=0)
    assert len(tokens) == len(answers.sizes)


def test_a_student_with_a_tokenizer_of_its_own_is_refused(words, tmp_path):
    own = {"model": "gpt2", "config": TINY, "own_tokenizer": str(words)}
    loop = speaking(words, tmp_path, student={"target": "aligned_causal_lm", "args": own})
    with pytest.raises(
        UserError, match="student: aligned_causal_lm answers in the data's tokens, and cannot be taught"
    ):
        loop.run()


def test_answers_over_another_vocabulary_are_refused(tmp_path):
    loop = federation(TokenDistillation(), tmp_path)
    loop.set_up()
    loop.start_round(1)
    upload = dataclasses.replace(run_local_update(loop.method, loop.clients[0], None), vocab=7)
    with pytest.raises(RejectedMessageError, match="vocabulary of 7, expected 5"):
        loop.method.aggregate(loop.server).add(upload, 0)


def test_a_model_may_have_more_logits_than_there_are_tokens(tmp_path):
    wide = torch.full((7, 7), 3.0)
    wide[:VOCAB, :VOCAB] = table(0)
    loop = federation(TokenDistillation(k=VOCAB), tmp_path, tables=[wide], clients=1, local_training=0)
    loop.runtime.factories["bigram"] = lambda: Bigram(vocab_size=7)
    loop.run()
    torch.testing.assert_close(loop.server.student.table.detach(), dense_student(loop, [table(0)]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mass": 0.0}, "mass must be in"),
        ({"proxy_fraction": 1.5}, "proxy_fraction must be in"),
        ({"draws": 256}, "draws must be in 1 … 255"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"ground_truth": -1.0}, "ground_truth must be"),
    ],
)
def test_settings_out_of_range(settings, reason):
    with pytest.raises(UserError, match=reason):
        TokenDistillation(**settings)


def flat_mixture(vocab=40, clients=20, draws=12, capacity=None, seed=0):
    """The mixture of draws that several clients with one flat distribution make, and that distribution."""
    p = torch.softmax(torch.randn(vocab, generator=torch.Generator().manual_seed(seed)), 0)
    mixture = TokenMixture(torch.arange(1), 1, vocab, draws, capacity or vocab, False)
    for client in range(clients):
        ids = _systematic_draws(p[None], draws, torch.Generator().manual_seed(100 + client))[0].long()
        ids, counts = ids.unique(return_counts=True)
        sizes = torch.tensor([[len(ids)]], dtype=torch.int32)
        mixture.add(SparseResponses(ids.int(), counts.to(torch.uint8), sizes, vocab), client)
    return mixture.result(), p


def test_draws_from_the_mixture_are_the_mixture_in_the_mean():
    draws, repeats = 12, 1000
    knowledge, _ = flat_mixture(draws=draws)
    total, stream = torch.zeros(40, dtype=torch.float64), torch.Generator().manual_seed(5)
    for _ in range(repeats):
        message = sampled_message(knowledge, 40, draws, stream)
        message.validate()
        assert message.form == "sampled" and int(message.values.sum()) == draws
        total[message.ids.long()] += message.values.double() / draws
    expected = torch.zeros(40, dtype=torch.float64)
    expected[knowledge.ids[0, 0].long()] = knowledge.probabilities[0, 0].double()
    # a count is off by less than one from N p, so its frequency varies by no more than 1 / (2 N)
    assert (total / repeats - expected).abs().max() < 5 / (2 * draws) / repeats**0.5


def test_what_clients_are_sent_in_mode_sampled_teaches_them_the_mixture():
    """Gradient descent on the mean over messages of the digest's loss ends where the mixture is, and not on a list.

    The loss is linear in what was drawn, so that its mean over messages is that of the mean frequencies. Sent as the
    likeliest ids, the mixture would be taught without what is left for the others.
    """
    draws, repeats, logits = 12, 200, torch.zeros(1, 1, 40, requires_grad=True)
    knowledge, _ = flat_mixture(draws=draws)
    stream, total = torch.Generator().manual_seed(1), torch.zeros(40)
    for _ in range(repeats):
        message = sampled_message(knowledge, 40, draws, stream)
        again = TokenMixture(torch.arange(1), 1, 40, draws, 40, False)
        again.add(message, -1)
        heard = again.result()
        grad = torch.autograd.grad(
            sparse_distillation(logits, lambda x: x, heard.ids.long(), heard.probabilities, "sampled"), logits
        )[0]
        total += grad.flatten()
    mixture = torch.zeros(40)
    mixture[knowledge.ids[0, 0].long()] = knowledge.probabilities[0, 0]
    # the gradient of the full cross entropy at q uniform: q - p
    torch.testing.assert_close(total / repeats, 1 / 40 - mixture, atol=5 / (2 * draws) / repeats**0.5, rtol=0)
    top = knowledge.message(40, draws)
    missing = 1 - float(top.values.exp().sum())
    assert missing > 0.3  # which the loss for draws would have told clients to be nothing


def test_what_a_full_mixture_does_not_name_is_lost_and_not_given_to_other_ids():
    knowledge, _ = flat_mixture(capacity=5)
    message = sampled_message(knowledge, 40, 200, torch.Generator().manual_seed(0))
    named = float(knowledge.probabilities.sum())
    assert named < 0.6 and int(message.values.int().sum()) == pytest.approx(200 * named, abs=1)
    assert set(message.ids.tolist()) <= set(knowledge.ids.flatten().tolist())


def test_the_form_of_what_comes_back_is_that_of_the_mode_and_picks_the_loss(tmp_path, monkeypatch):
    modes = []
    real = token_objective.sparse_distillation

    def seen(hidden, head, ids, probabilities, mode, *rest):
        modes.append(mode)
        return real(hidden, head, ids, probabilities, mode, *rest)

    monkeypatch.setattr(token_objective, "sparse_distillation", seen)
    for mode, form in (("tail", "top"), ("sampled", "sampled"), ("renormalised", "top")):
        loop = ran(tmp_path / mode, 2, method={"mode": mode, "k": 2, "draws": 9})
        message = loop.method.download(loop.server, 0)
        assert message.form == form and set(modes) == {mode}
        modes.clear()
    # a list of the likeliest is never taken for draws, whoever sends it
    top = SparseResponses(**loop.server.state["mixture"])
    client, sampled = loop.clients[0], TokenDistillation(mode="sampled", draws=9)
    run_local_update(sampled, client, top)
    assert set(modes) == {"tail"}


def test_a_position_that_nobody_answered_is_drawn_as_such():
    knowledge = TokenKnowledge(
        torch.arange(1),
        torch.tensor([[[3, 1], [-1, -1]]], dtype=torch.int32),
        torch.tensor([[[0.75, 0.25], [0.0, 0.0]]]),
        torch.tensor([[1, 0]]),
        torch.zeros(1, 2),
    )
    message = sampled_message(knowledge, 5, 4, torch.Generator().manual_seed(0))
    assert message.ids.tolist() == [1, 3] and message.values.tolist() == [1, 3] and message.sizes.tolist() == [[2, 0]]
    back = SparseResponses.build(message.fields(), message.meta())
    assert torch.equal(back.ids, message.ids) and torch.equal(back.values, message.values)
