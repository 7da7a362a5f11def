"""What clients say of tokens, and what they say together, against sums written out by hand."""

import dataclasses
import itertools
import math

import pytest
import torch

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.shares import Cap
from fdl.knowledge.aggregation.tokens import TokenMixture, normalized_probabilities, pad_ids
from fdl.knowledge.confidence.tokens import BayesianMixture, Certainty, TokenEntropy, TokenMaxProbability
from fdl.knowledge.distillation.token_upload import TokenUploadBuilder, require_language_model
from fdl.messages import Responses
from fdl.messages.sparse_responses import FLOOR, TokenLogWeights
from fdl.methods.token_distillation import TokenDistillation
from tests.toy import Linear
from tests.toy_language import DOWN, LENGTH, SHORT, UP, VOCAB, Bigram, federation, table, windows

TEXTS = [UP, DOWN, SHORT]


@pytest.fixture
def client(tmp_path):
    return federation(TokenDistillation(), tmp_path).clients[1]


def answered(client, weights, rows=None, **settings):
    defaults = {"k": VOCAB, "mass": 1.0, "draws": None, "temperature": 1.0, "confidence": None}
    return TokenUploadBuilder(**(defaults | settings)).upload(client, Bigram(weights), rows)


def dense(message):
    """Probabilities [n, T, V] that a message gives, 0 for ids that it does not name."""
    ids, p = pad_ids(message.ids, normalized_probabilities(message), message.sizes.flatten())
    wide = torch.zeros(len(ids), VOCAB + 1, dtype=p.dtype).scatter_(1, ids.long().clamp_max(VOCAB), p)
    return wide[:, :VOCAB].view(*message.sizes.shape, VOCAB)


def mixture(*messages, rows=None, capacity=99, most=VOCAB, weighted=False, **options):
    rows = torch.arange(len(TEXTS)) if rows is None else rows
    result = TokenMixture(rows, LENGTH, VOCAB, most, capacity, weighted, **options)
    for i, message in enumerate(messages):
        result.add(message, i)
    return result


def spread(knowledge):
    """Probabilities [m, T, V] of a mixture."""
    ids = knowledge.ids.long().where(knowledge.ids >= 0, VOCAB)
    return torch.zeros(*ids.shape[:2], VOCAB + 1).scatter_add_(2, ids, knowledge.probabilities)[..., :VOCAB]


# --- one client


def test_all_ids_are_the_softmax_of_the_logits(client):
    weights = table(0)
    message = answered(client, weights)
    expected = torch.softmax(weights, dim=1)
    for row, text in enumerate(TEXTS):
        for t, token in enumerate(text):
            torch.testing.assert_close(dense(message)[row, t].float(), expected[token])
    # padding is not answered
    assert message.sizes.tolist() == [[VOCAB] * 4, [VOCAB] * 4, [VOCAB, VOCAB, 0, 0]]
    assert (message.samples, message.vocab, message.rows) == (0, VOCAB, None)
    assert torch.allclose(message.tail[0].exp(), torch.tensor(FLOOR))
    message.validate()


def test_the_likeliest_ids_and_their_tail(client):
    weights = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log().expand(VOCAB, VOCAB)
    two = answered(client, weights, k=2)
    assert two.ids.tolist() == [0, 1] * 10 and two.form == "top"
    torch.testing.assert_close(two.tail[0].exp(), torch.full((4,), 0.25))
    # the fewest that hold 0.85: 0.5 + 0.25 + 0.15; of 0.75 two are enough
    assert answered(client, weights, mass=0.85).sizes[0].tolist() == [3] * 4
    assert answered(client, weights, mass=0.74).sizes[0].tolist() == [2] * 4
    assert answered(client, weights, mass=0.01).ids.tolist() == [0] * 10


def test_ids_without_probability_are_not_sent(client):
    weights = torch.zeros(VOCAB, VOCAB)
    weights[:, 3] = -20.0
    message = answered(client, weights)
    assert message.sizes[0].tolist() == [4] * 4 and 3 not in message.ids.tolist()


@pytest.mark.parametrize("confidence", [None, BayesianMixture(), TokenEntropy()])
@pytest.mark.parametrize("draws", [None, 9])
def test_a_model_that_has_diverged_is_refused(client, confidence, draws):
    with pytest.raises(RejectedMessageError):
        answered(client, torch.full((VOCAB, VOCAB), math.nan), confidence=confidence, draws=draws).validate()


def test_only_the_rows_that_are_asked(client):
    rows = torch.tensor([0, 2])
    message, whole = answered(client, table(0), rows), answered(client, table(0))
    assert torch.equal(message.rows, rows)
    torch.testing.assert_close(dense(message), dense(whole)[rows])


def test_large_vocabularies_are_done_in_parts(client, monkeypatch):
    whole = answered(client, table(0), k=2, confidence=BayesianMixture())
    monkeypatch.setattr("fdl.knowledge.distillation.token_upload._VALUES", 1)
    parts = answered(client, table(0), k=2, confidence=BayesianMixture())
    assert torch.equal(parts.ids, whole.ids)
    torch.testing.assert_close(parts.values, whole.values)
    assert torch.equal(parts.weights.values(), whole.weights.values())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased(client, temperature):
    weights, draws, times = table(1, 2.0), 7, 1500
    p = torch.softmax(weights / temperature, dim=1)[torch.tensor(UP)]
    client.proxy = windows(*[UP] * times)
    message = answered(client, weights, draws=draws, temperature=temperature)
    counts = draws * dense(message)
    assert torch.allclose(counts.sum(2), torch.tensor(float(draws), dtype=torch.float64))
    assert ((counts - draws * p).abs() < 1).all()
    bound = 4 * (p * (1 - p) / (draws * times)).sqrt() + 1e-6
    assert ((counts.mean(0) / draws - p).abs() <= bound).all()
    message.validate()
    assert message.form == "sampled" and message.tail is None


class Hesitant(Bigram):
    """Answers the first three positions of a window; knows nothing of id 4, and says nothing at all after a 1."""

    def next_log_probabilities(self, tokens, temperature=1.0):
        p = torch.tensor([0.3, 0.2, 0.1, 0.0, 0.0]).expand(3, VOCAB).clone()  # 0.4 is for no token of the data
        for b, window in enumerate(tokens.tolist()):
            places = [t for t in range(3) if window[t] >= 0]
            p[:] = torch.tensor([0.3, 0.2, 0.1, 0.0, 0.0])
            p[[t for t in places if window[t] == 1]] = 0.0
            yield LENGTH * b + torch.tensor(places), p[places].log()


def test_who_answers_in_part_says_so(client):
    question = TokenUploadBuilder(VOCAB, 1.0, None, 1.0, TokenMaxProbability())
    message = question.upload(client, Hesitant(), None)
    message.validate()
    assert message.sizes.tolist() == [[3, 0, 3, 0], [3, 3, 0, 0], [3, 3, 0, 0]]
    answered = message.sizes > 0
    torch.testing.assert_close(message.tail[answered].exp(), torch.full((6,), 0.4))
    assert message.ids.tolist() == [0, 1, 2] * 6
    largest = message.weights.values()
    torch.testing.assert_close(largest[answered], torch.full((6,), math.log(0.3)), atol=1 / 16, rtol=0)
    told = mixture(message, weighted=True).result()
    torch.testing.assert_close(spread(told)[0, 0], torch.tensor([0.3, 0.2, 0.1, 0.0, 0.0]))


def test_draws_of_no_token_of_the_data_are_lost(client):
    times, draws = 600, 10
    client.proxy = windows(*[DOWN] * times)
    message = TokenUploadBuilder(VOCAB, 1.0, draws, 1.0, None).upload(client, Hesitant(), None)
    message.validate()
    counts = torch.zeros(times, LENGTH, VOCAB, dtype=torch.int64)
    counts.view(-1, VOCAB).index_put_((message.positions, message.ids.long()), message.values.long())
    # draws lie at equal distances, so of ten of them there are three, two and one
    assert (counts[:, :2] == torch.tensor([3, 2, 1, 0, 0])).all()
    assert (counts[:, 2:] == 0).all()


def test_draws_depend_on_the_round_alone(client):
    client.start_round(3)
    one, two = answered(client, table(0), draws=9), answered(client, table(0), draws=9)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.values, two.values)
    client.start_round(4)
    assert not torch.equal(answered(client, table(0), draws=9).values, one.values)


def test_what_is_no_language_model_is_refused(client):
    require_language_model(client, Bigram(), "student")
    with pytest.raises(UserError, match="student: Linear is no language model"):
        require_language_model(client, Linear(), "student")
    client.model_kwargs = {"num_classes": 2}
    with pytest.raises(UserError, match="is for language data"):
        require_language_model(client, Bigram(), "student")


# --- confidence


def seen(weights, text):
    log_p = torch.log_softmax(weights, dim=1)
    likelihood = torch.tensor([[0.0] + [float(log_p[a, b]) for a, b in itertools.pairwise(text)]])
    answers = log_p[torch.tensor([text])]
    return Certainty(likelihood, torch.special.entr(answers.exp()).sum(2), answers.amax(2))


@pytest.mark.parametrize("prior", ["uniform", "samples"])
def test_bayesian_weights_give_the_posterior_predictive(tmp_path, prior):
    """p(x_{t+1} | x_≤t) = Σ_k π_k Π_{s≤t} p_k(x_s | x_<s) p_k(x_{t+1} | x_t) / Σ_k π_k Π_{s≤t} p_k(x_s | x_<s)."""
    clients = federation(TokenDistillation(), tmp_path).clients
    tables = [table(0, 2.0), table(1, 2.0)]
    confidence = BayesianMixture(power=1.0, prior=prior)
    logs = [confidence.log_weights(c, seen(w, UP)) for c, w in zip(clients, tables)]
    shares = torch.softmax(torch.stack(logs), dim=0)[:, 0]
    p = [torch.softmax(w, dim=1) for w in tables]
    for t in range(LENGTH):
        joint = [2.0, 6.0] if prior == "samples" else [1.0, 1.0]
        for s in range(1, t + 1):
            joint = [j * float(q[UP[s - 1], UP[s]]) for j, q in zip(joint, p)]
        predictive = sum(j * q[UP[t]] for j, q in zip(joint, p)) / sum(joint)
        torch.testing.assert_close(sum(s * q[UP[t]] for s, q in zip(shares[:, t], p)), predictive)


def test_the_mixture_is_the_posterior_predictive_up_to_8_bits(tmp_path):
    clients = federation(TokenDistillation(), tmp_path).clients
    tables = [table(0), table(1)]
    confidence = BayesianMixture(power=1.0)
    messages = [answered(c, w, confidence=confidence) for c, w in zip(clients, tables)]
    logs = torch.stack([torch.cat([seen(w, UP).log_likelihood.cumsum(1)]) for w in tables])
    torch.testing.assert_close(torch.stack([m.weights.values()[:1] for m in messages]), logs, atol=1 / 16, rtol=0)
    expected = (torch.softmax(logs, 0)[:, 0, :, None] * torch.stack([torch.softmax(w, 1)[UP] for w in tables])).sum(0)
    # log-weights are off by 1/16 each, so shares by a factor of e^(1/8) at most
    got = spread(mixture(*messages, weighted=True).result())[0]
    assert (got.log() - expected.log()).abs().max() < 1 / 8


def test_power_0_is_the_plain_mean(tmp_path):
    clients = federation(TokenDistillation(), tmp_path).clients
    messages = [answered(c, table(i), confidence=BayesianMixture(power=0.0)) for i, c in enumerate(clients)]
    expected = torch.stack([torch.softmax(table(i), 1)[UP] for i in range(2)]).mean(0)
    torch.testing.assert_close(spread(mixture(*messages, weighted=True).result())[0], expected)


@pytest.mark.parametrize("confidence", [BayesianMixture(1.0), TokenEntropy(), TokenMaxProbability()])
def test_a_weight_does_not_see_the_token_that_is_to_be_told(client, confidence):
    weights, row = table(0), torch.tensor([0])
    before = answered(client, weights, row, confidence=confidence).weights.values()
    changed = client.proxy._tokens.copy()
    changed[3] = 4  # the last token of the first window
    client.proxy = client.proxy._changed(_tokens=changed)
    after = answered(client, weights, row, confidence=confidence).weights.values()
    assert torch.equal(before[0, :3], after[0, :3]) and before[0, 3] != after[0, 3]


def test_entropy_and_largest_probability(client):
    certainty = seen(torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log().expand(VOCAB, VOCAB), UP)
    entropy = math.log(2) * (0.5 + 0.5 + 0.375 + 0.25 + 0.25)
    torch.testing.assert_close(TokenEntropy(0.5).log_weights(client, certainty), torch.full((1, 4), -2 * entropy))
    largest = TokenMaxProbability(3.0).log_weights(client, certainty)
    torch.testing.assert_close(largest, torch.full((1, 4), 3 * math.log(0.5)))


def test_a_specialist_that_foretold_the_text_counts(tmp_path):
    """Client 0 knows the way up, client 1 the way down; after one step it is clear whose window it is."""
    clients = federation(TokenDistillation(), tmp_path).clients
    up, down = torch.zeros(VOCAB, VOCAB), torch.zeros(VOCAB, VOCAB)
    for a, b in itertools.pairwise(UP):
        up[a, b] = down[b, a] = 6.0
    messages = [answered(c, w, confidence=BayesianMixture(1.0)) for c, w in zip(clients, (up, down))]
    told = spread(mixture(*messages, weighted=True).result())
    assert told[0, 0, 1] < 0.7  # at first nobody knows
    assert told[0, 1, 2] > 0.8 and told[1, 1, 1] > 0.8
    assert told[0, 2, 3] > 0.95 and told[1, 2, 0] > 0.95


# --- the mixture


def weighted_messages(client, count=3, k=3):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        message = answered(client, table(i, 2.0), k=k)
        weights = TokenLogWeights.quantize(torch.randn(len(TEXTS), LENGTH, generator=generator))
        yield dataclasses.replace(message, weights=weights)


def test_the_mixture_is_the_weighted_mean_of_what_is_named(client):
    messages = list(weighted_messages(client))
    knowledge = mixture(*messages, weighted=True, cap=None).result()
    shares = torch.softmax(torch.stack([m.weights.values() for m in messages]), dim=0).double()
    expected = sum(s.unsqueeze(2) * dense(m) for s, m in zip(shares, messages))
    torch.testing.assert_close(spread(knowledge), expected.float())
    assert knowledge.coverage.tolist() == [[3] * 4, [3] * 4, [3, 3, 0, 0]]
    total = torch.logsumexp(torch.stack([m.weights.values() for m in messages]), dim=0)
    torch.testing.assert_close(knowledge.log_weight[:2], total[:2])
    assert (knowledge.ids[2, 2:] == -1).all() and (knowledge.probabilities[2, 2:] == 0).all()
    assert (knowledge.probabilities.diff(dim=2) <= 0).all()


def test_a_loud_client_has_two_equal_shares_of_a_token(client):
    # four clients, one of which leaves the third text unanswered; the loud one is of the three that answer it
    whole = [answered(client, table(i, 2.0)) for i in range(4)]
    loud, calm = (TokenLogWeights.quantize(torch.full((3, LENGTH), level)) for level in (32.0, -30.0))
    messages = [dataclasses.replace(m, weights=loud if i == 0 else calm) for i, m in enumerate(whole)]
    messages[3] = dataclasses.replace(
        answered(client, table(3, 2.0), torch.tensor([0, 1])),
        weights=TokenLogWeights.quantize(torch.full((2, LENGTH), -30.0)),
    )
    by_row = Cap(2.0, "row")
    held = mixture(*messages, weighted=True, cap=by_row)
    p = [dense(m) for m in whole]
    told = spread(held.result())
    torch.testing.assert_close(told[:2], (p[0] / 2 + (p[1] + p[2] + p[3]) / 6)[:2].float())
    torch.testing.assert_close(told[2, :2], (p[0] * 2 / 3 + (p[1] + p[2]) / 6)[2, :2].float())
    alone = mixture(*messages, weighted=True, cap=None).result()
    torch.testing.assert_close(spread(alone), p[0].float())
    # whoever comes first, to the bit
    other = TokenMixture(torch.arange(3), LENGTH, VOCAB, VOCAB, 99, True, by_row)
    for i in (2, 0, 3, 1):
        other.add(messages[i], i)
    assert torch.equal(spread(other.result()), told)


def test_the_order_of_clients_does_not_matter(client):
    messages = list(weighted_messages(client))
    one = mixture(*messages, weighted=True).result()
    two = mixture(*reversed(messages), weighted=True).result()
    torch.testing.assert_close(spread(one), spread(two))
    torch.testing.assert_close(one.log_weight, two.log_weight)


def test_clients_that_say_the_same_count_as_one(client):
    message = answered(client, table(0), k=3)
    one, four = mixture(message).result(), mixture(*[message] * 4).result()
    assert torch.equal(one.ids, four.ids)
    torch.testing.assert_close(one.probabilities, four.probabilities)


def test_a_full_mixture_leaves_the_least_to_the_tail(client):
    messages = [answered(client, table(i, 2.0), k=2) for i in range(2)]
    whole, small = spread(mixture(*messages).result()), mixture(*messages, capacity=2).result()
    assert small.ids.shape[2] == 2
    torch.testing.assert_close(spread(small).sort(2).values[..., -2:], whole.sort(2).values[..., -2:])
    assert mixture(*messages, capacity=2)._mass.shape == (12, 2)


def test_it_goes_through_positions_in_parts(client, monkeypatch):
    messages = list(weighted_messages(client))
    whole = mixture(*messages, weighted=True).result()
    monkeypatch.setattr("fdl.knowledge.aggregation.tokens._POSITIONS", 3)
    parts = mixture(*messages, weighted=True).result()
    assert torch.equal(whole.ids, parts.ids) and torch.equal(whole.probabilities, parts.probabilities)


def test_some_windows_of_some_clients(client):
    rows = torch.tensor([0, 2])
    one, two = answered(client, table(0), torch.tensor([2])), answered(client, table(1), rows)
    knowledge = mixture(one, rows=rows).result()
    assert knowledge.rows.tolist() == [2]
    knowledge = mixture(one, two, rows=rows).result()
    assert knowledge.rows.tolist() == [0, 2]
    torch.testing.assert_close(spread(knowledge)[0], torch.softmax(table(1), 1)[UP])
    expected = (torch.softmax(table(0), 1) + torch.softmax(table(1), 1))[SHORT] / 2
    torch.testing.assert_close(spread(knowledge)[1, :2], expected)
    assert mixture(rows=rows).result() is None


def test_all_ids_are_named_where_nothing_is_left_for_a_tail(client):
    certain = torch.zeros(VOCAB, VOCAB)
    certain[0] = torch.tensor([30.0, 0, 0, 0, 0])
    knowledge = mixture(answered(client, certain)).result()
    assert knowledge.ids[0, 0].sort().values.tolist() == [0, 1, 2, 3, 4]
    assert knowledge.probabilities[0, 0].tolist() == pytest.approx([1, 0, 0, 0, 0], abs=1e-6)


def test_a_mixture_as_a_message(client):
    knowledge = mixture(*[answered(client, table(i), k=3) for i in range(2)]).result()
    message = knowledge.message(VOCAB, 2)
    message.validate()
    got = mixture(message, most=2).result()
    assert torch.equal(got.ids, knowledge.ids[..., :2])
    torch.testing.assert_close(got.probabilities, knowledge.probabilities[..., :2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: Responses(torch.zeros(3, 2), "logits"), "expected sparse responses, got responses"),
        (lambda m: dataclasses.replace(m, vocab=6), "over a vocabulary of 6, expected 5"),
        (lambda m: dataclasses.replace(m, sizes=m.sizes[:, :3]), "windows of 3 positions, expected 4"),
        (lambda m: m.select_rows(torch.tensor([0, 1])), None),
        (lambda m: dataclasses.replace(m.select_rows(torch.tensor([0, 1])), rows=None), "all 3 windows, got 2"),
        (lambda m: dataclasses.replace(m, rows=torch.tensor([0, 1, 3])), "that was not asked"),
        (lambda m: dataclasses.replace(m, rows=torch.tensor([0, 1, 1])), "answered twice"),
        (lambda m: dataclasses.replace(m, weights=None), "without weights"),
        (lambda m: dataclasses.replace(m, weights=TokenLogWeights.quantize(torch.full((3, 4), 33.0))), "above 32"),
        (lambda m: dataclasses.replace(m, weights=TokenLogWeights.quantize(torch.full((3, 4), -999.0))), None),
    ],
)
def test_what_does_not_fit_is_refused(client, change, reason):
    good = answered(client, table(0), k=3, confidence=BayesianMixture())
    together = mixture(good, most=3, weighted=True)
    before = together.result()
    if reason is None:
        together.add(change(good), 1)
        return
    with pytest.raises(RejectedMessageError, match=reason):
        together.add(change(good), 1)
    assert torch.equal(together.result().probabilities, before.probabilities) and together.clients == 1


def test_more_ids_than_agreed_are_refused(client):
    with pytest.raises(RejectedMessageError, match="3 ids at a position, expected 2 at most"):
        mixture(answered(client, table(0), k=3), most=2)
    with pytest.raises(RejectedMessageError, match="weights not asked for"):
        mixture(answered(client, table(0), confidence=BayesianMixture()))
