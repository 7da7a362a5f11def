"""Noisy votes: how far a vote moves a count, what is elected how often, and what that costs."""

import itertools
import math

import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy.stats import norm

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.aggregation.means import ResponseMean
from fdl.knowledge.confidence.base import Entropy
from fdl.messages import Responses
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.privacy.accounting import epsilon, events_of
from fdl.privacy.noisy_votes import NoisyVotes
from tests.privacy.clients import someone
from tests.toy import federation

C = 3


def ballots(classes):
    """A client's votes, one class a row."""
    return Responses(torch.nn.functional.one_hot(torch.as_tensor(classes), C).float(), "probabilities")


def elected(release, uploads, server=None, rows=None, count=None):
    mean = ResponseMean(len(uploads[0].values) if count is None else count, C, "probabilities", weighted=False)
    box = release.collect(mean, server or someone(-1), rows)
    for client, upload in enumerate(uploads):
        box.add(upload, client)
    return box.result()


def test_one_client_moves_the_counts_by_the_root_of_2_and_the_largest_by_1():
    stream = torch.Generator().manual_seed(0)
    corners = torch.eye(C)
    points = torch.distributions.Dirichlet(torch.full((C,), 0.3))
    torch.manual_seed(0)
    cast = [*corners, torch.zeros(C), *points.sample((20,))]  # votes, none at all, and what a dishonest client may send
    far = near = 0.0
    for _ in range(10):
        others = torch.randint(0, 5, (C,), generator=stream).float()
        for a, b in itertools.product(cast, cast):
            far = max(far, float(torch.linalg.vector_norm((others + a) - (others + b))))
            near = max(near, abs(float((others + a).max() - (others + b).max())))
    assert far == pytest.approx(math.sqrt(2), rel=1e-6)
    assert near == pytest.approx(1, rel=1e-6)


def test_a_client_votes_for_its_likeliest_class():
    said = NoisyVotes(1.0).message(someone(), Responses(torch.tensor([[0.2, 0.5, 0.3]]), "probabilities"), None)
    assert said.values.tolist() == [[0, 1, 0]]
    assert (said.form, said.confidence, said.samples) == ("probabilities", None, 0)


def test_without_noise_the_plurality_is_elected():
    uploads = [ballots([0, 1, 2, 0]), ballots([0, 1, 1, 2]), ballots([1, 1, 2, 2])]
    knowledge = elected(NoisyVotes(0.0), uploads)
    exact = ResponseMean(4, C)
    for client, upload in enumerate(uploads):
        exact.add(upload, client)
    assert torch.equal(knowledge.values, torch.nn.functional.one_hot(exact.result().values.argmax(1), C).float())
    assert knowledge.coverage.tolist() == [3] * 4
    assert knowledge.agreement.tolist() == [1] * 4


def test_rows_without_enough_agreement_are_left_out():
    uploads = [ballots([0, 1, 2, 0]), ballots([0, 1, 1, 2]), ballots([0, 1, 0, 2])]
    server = someone(-1)
    knowledge = elected(NoisyVotes(0.0, threshold=3.0, threshold_noise=0.0), uploads, server)
    assert knowledge.coverage.tolist() == [3, 3, 0, 0]
    assert knowledge.values[2:].tolist() == [pytest.approx([1 / 3] * 3)] * 2  # nothing is said of them
    assert server.metrics["privacy/rows"] == 2
    assert elected(NoisyVotes(1.0, threshold=100.0, threshold_noise=1.0), uploads) is None


def test_the_noisy_winner_and_the_check_have_the_chances_of_the_formulas():
    rows, noise, check, threshold = 20_000, 2.0, 3.0, 4.0
    uploads = [ballots([0] * rows) for _ in range(3)] + [ballots([1] * rows)]
    # C = 3, but class 2 has no votes: the chance that class 0 beats both, by numerical integration
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    beats = torch.tensor(norm.cdf((3 - 1) / noise + grid.numpy()) * norm.cdf(3 / noise + grid.numpy()))
    chance = float(torch.trapezoid(torch.tensor(norm.pdf(grid.numpy())) * beats, grid))
    won = float(elected(NoisyVotes(noise), uploads).values[:, 0].mean())
    assert won == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / rows))
    server = someone(-1)
    elected(NoisyVotes(noise, threshold, check), uploads, server)
    chance = norm.cdf((3 - threshold) / check)
    assert server.metrics["privacy/rows"] / rows == pytest.approx(chance, abs=4 * math.sqrt(chance / rows))


def renyi(events, order):
    return sum(one["count"] * order / (2 * one["noise_multiplier"] ** 2) for one in events)


def test_an_answer_and_a_check_cost_what_the_paper_says():
    noise, check = 3.0, 5.0
    uploads = [ballots([0, 1, 2, 0, 1]) for _ in range(4)]
    server = someone(-1)
    elected(NoisyVotes(noise), uploads, server)
    for order in (2, 8, 64):
        assert renyi(events_of(server), order) == pytest.approx(5 * order / noise**2)
    server = someone(-1, round=2)
    knowledge = elected(NoisyVotes(noise, threshold=4.0, threshold_noise=check), uploads, server)
    passed = int((knowledge.coverage > 0).sum())
    assert 0 < passed < 5  # a check is paid for each of the 5, an answer for those that passed
    for order in (2, 8, 64):
        expected = 5 * order / (2 * check**2) + passed * order / noise**2
        assert renyi(events_of(server), order) == pytest.approx(expected)


def test_the_account_is_that_of_gaussian_mechanisms_with_sensitivity_root_2():
    noise, rows = 20.0, 50
    server = someone(-1)
    elected(NoisyVotes(noise), [ballots([0] * rows)], server)
    reference = RdpAccountant()
    reference.compose(SelfComposedDpEvent(GaussianDpEvent(noise / math.sqrt(2)), rows))
    assert epsilon(events_of(server), 1e-5, "rdp", "institution") == pytest.approx(reference.get_epsilon(1e-5))
    # one vector of all counts, which differs by √(2n), is the same mechanism
    whole = RdpAccountant()
    whole.compose(GaussianDpEvent(noise / math.sqrt(2 * rows)))
    assert reference.get_epsilon(1e-5) == pytest.approx(whole.get_epsilon(1e-5), rel=1e-6)


def test_no_attack_tells_who_voted_better_than_promised():
    noise, rows, releases, delta = 4.0, 3, 10_000, 1e-5
    count = rows * releases  # every row has noise of its own, so one call makes as many releases as one likes
    others = [ballots([0] * count), ballots([1] * count)]
    scores = []
    for vote in (0, 1):
        server = someone(-1, round=vote)
        first = elected(NoisyVotes(noise), [*others, ballots([vote] * count)], server).values[:, 0]
        scores.append(first.view(releases, rows).sum(1))
    eps = epsilon([{**events_of(server)[0], "count": rows}], delta, "pld", "institution")
    assert eps < 3  # a bound that binds: e^ε is not out of reach
    rates = [[float((score >= t).double().mean()) for score in scores] for t in (1, 2, 3)]
    slack = 4 * math.sqrt(0.25 / releases)
    for true, false in rates:
        assert true <= math.exp(eps) * false + delta + slack
        assert 1 - false <= math.exp(eps) * (1 - true) + delta + slack
    assert max(true - false for true, false in rates) > slack  # the attack does see something


def test_a_ballot_with_more_than_one_vote_is_refused():
    with pytest.raises(RejectedMessageError, match="outside of 0 … 1"):
        elected(NoisyVotes(1.0), [Responses(torch.full((2, C), 5.0), "probabilities")])
    with pytest.raises(RejectedMessageError, match="expected votes, got logits"):
        elected(NoisyVotes(1.0), [Responses(torch.full((2, C), 5.0), "logits")])


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match="threshold and threshold_noise go together"):
        NoisyVotes(1.0, threshold=3.0)
    with pytest.raises(UserError, match="noise must be a number ≥ 0"):
        NoisyVotes(-1.0)
    with pytest.raises(UserError, match="noisy_votes is for probabilities, and space is logits"):
        FederatedDistillation(space="logits", private_release=NoisyVotes(1.0))
    with pytest.raises(UserError, match="counts all clients alike, so confidence must be left out"):
        FederatedDistillation(Entropy(), private_release=NoisyVotes(1.0))


def test_a_student_learns_from_what_was_elected_alone(tmp_path):
    """Toy: client 0 knows class 0 alone, client 1 class 1 alone; on each row they disagree or tie, noise decides."""
    loop = federation(
        FederatedDistillation(private_release=NoisyVotes(1.0), feedback="aggregate"),
        tmp_path,
        rounds=3,
        local_training=2,
    )
    loop.run()
    answers = loop.server.state["answers"]
    assert torch.equal(answers, torch.nn.functional.one_hot(answers.argmax(1), 2).float())
    assert [(one["mechanism"], one["count"]) for one in events_of(loop.server)] == [("gnmax", 6)]
    assert all(events_of(client) == [] for client in loop.clients)  # towards the server nothing is private
