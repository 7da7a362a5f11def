"""Noise on answers: sensitivities by brute force, the noise itself, what is paid for it, and an audit of all that."""

import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from fdl.errors import RejectedMessageError, UserError
from fdl.federation.local_turns import run_local_update
from fdl.knowledge.aggregation.means import ResponseMean
from fdl.knowledge.confidence.base import Entropy, SampleCount
from fdl.knowledge.distillation.personalization import AdaptiveWeights, Similarity
from fdl.knowledge.distillation.upload_on_change import UploadOnChange
from fdl.knowledge.transfer.features import FeatureTransfer
from fdl.knowledge.transfer.prototypes import PrototypeTransfer
from fdl.messages import Responses
from fdl.methods.federated_distillation import FederatedDistillation
from fdl.privacy.accounting import Policy, epsilon, events_of
from fdl.privacy.noisy_responses import NoisyResponses, response_sensitivity
from fdl.privacy.noisy_votes import NoisyVotes
from fdl.privacy.release import clip_rows
from tests.privacy.clients import someone
from tests.test_loop import outcome
from tests.toy import federation, weight

N, C, K = 6, 4, 5


def logits(seed, scale=10.0, rows=N):
    return scale * torch.randn(rows, C, generator=torch.Generator().manual_seed(seed))


def sent(release, values, weights=None, client=None):
    return release.message(client or someone(), Responses(values, "logits"), weights)


def released(release, uploads, server=None, rows=None, count=N, space="logits"):
    server = server or someone(-1)
    mean = ResponseMean(count, C, space, weighted=False)
    box = release.collect(mean, server, rows)
    for client, upload in enumerate(uploads):
        box.add(upload, client)
    return box.result()


# ---------------------------------------------------------------- sensitivities


def distance(a, b, clip, bound):
    """L2 distance of two messages in units of S and B."""
    squares = ((a.values - b.values) / clip).square().sum()
    if a.confidence is not None:
        squares = squares + ((a.confidence.values() - b.confidence.values()) / bound).square().sum()
    return float(squares.sqrt())


@pytest.mark.parametrize("confident", [False, True])
def test_no_two_messages_lie_further_apart_than_the_formula_says(confident):
    release, clip, bound = NoisyResponses(0.0, clip=2.0, bound=0.5), 2.0, 0.5
    most = response_sensitivity(N, 2 if confident else 1)

    def message(values, weights):
        return sent(release, values, weights if confident else None)

    found = []
    for seed in range(200):
        weights = 3 * torch.randn(2, N, generator=torch.Generator().manual_seed(seed))
        pair = [message(logits(2 * seed + i, scale=10.0 ** (seed % 4 - 2)), weights[i]) for i in range(2)]
        found.append(distance(*pair, clip, bound))
    assert max(found) <= most + 1e-5
    opposite = [message(sign * torch.full((N, C), 9.0), torch.full((N,), sign * 9.0)) for sign in (1, -1)]
    assert distance(*opposite, clip, bound) == pytest.approx(most, rel=1e-6)


def test_no_replaced_client_moves_the_mean_further_than_the_formula_says():
    release, most = NoisyResponses(0.0, clip=2.0, by="server"), 2.0 * response_sensitivity(N) / K
    others = [Responses(logits(i), "logits") for i in range(K - 1)]
    some, far = torch.tensor([0, 2, 5]), torch.full((N, C), 9.0)
    candidates = [Responses(logits(100 + i, scale=10.0 ** (i % 4 - 2)), "logits") for i in range(40)]
    candidates += [Responses(logits(7)[some], "logits", some), Responses(far, "logits"), Responses(-far, "logits")]
    means = torch.stack([released(release, [*others, one]).values.flatten() for one in candidates])
    distances = torch.cdist(means, means)
    assert distances.max() <= most + 1e-5
    assert distances.max() == pytest.approx(most, rel=1e-5)  # the last two are as far as can be


def test_rows_are_clipped_in_length_and_left_alone_within():
    values = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.equal(clip_rows(values, 5.0), values)
    torch.testing.assert_close(clip_rows(values, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_an_answer_that_is_not_finite_shows_no_more_than_a_row_of_zeros():
    said = sent(NoisyResponses(0.0), torch.tensor([[math.nan, 1.0], [math.inf, 0.0]]), torch.tensor([math.nan, 0.5]))
    assert torch.equal(said.values, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert torch.isfinite(said.confidence.values()).all()


# ---------------------------------------------------------------- noise


def test_the_clients_noise_has_the_deviation_of_the_formula():
    rows, z, clip = 20_000, 0.7, 3.0
    noise = sent(NoisyResponses(z, clip=clip), torch.zeros(rows, C)).values
    expected = z * 2 * clip * math.sqrt(rows)
    assert float(noise.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * noise.numel()))
    assert abs(float(noise.mean())) < 4 * expected / math.sqrt(noise.numel())


def test_confidences_share_the_noise_and_stay_within_their_bound():
    rows, z, clip, bound = 20_000, 1e-4, 3.0, 0.5
    said = sent(NoisyResponses(z, clip=clip, bound=bound), torch.zeros(rows, C), torch.zeros(rows))
    unit = z * 2 * math.sqrt(2 * rows)
    assert float(said.values.std()) == pytest.approx(clip * unit, rel=4 / math.sqrt(2 * rows * C))
    # rounding to 8 bits adds a thousandth
    assert float(said.confidence.values().std()) == pytest.approx(bound * unit, rel=4 / math.sqrt(2 * rows) + 1e-3)
    loud = sent(NoisyResponses(1.0, bound=bound), torch.zeros(rows, C), torch.zeros(rows)).confidence.values()
    assert loud.abs().max() <= bound + 1e-3
    assert loud.abs().min() < loud.abs().max()


def test_the_servers_noise_has_the_deviation_of_the_formula():
    rows, z, clip = 20_000, 0.7, 3.0
    exact = [Responses(torch.zeros(rows, C), "logits") for _ in range(K)]
    noise = released(NoisyResponses(z, clip=clip, by="server"), exact, count=rows).values
    expected = z * 2 * clip * math.sqrt(rows) / K
    assert float(noise.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * noise.numel()))


def test_noise_depends_on_seed_round_and_client_and_on_nothing_else():
    release, values = NoisyResponses(1.0), logits(0)
    first = sent(release, values, client=someone(3, round=2)).values
    torch.manual_seed(123)
    assert torch.equal(sent(release, values, client=someone(3, round=2)).values, first)
    for other in (someone(4, round=2), someone(3, round=3), someone(3, round=2, seed=1)):
        assert not torch.equal(sent(release, values, client=other).values, first)


def test_the_server_draws_the_same_noise_on_every_rank():
    release = NoisyResponses(1.0, by="server")
    uploads = [Responses(logits(i), "logits") for i in range(K)]
    first = released(release, uploads).values
    torch.manual_seed(123)
    assert torch.equal(released(release, uploads).values, first)
    assert not torch.equal(released(release, uploads, someone(-1, round=2)).values, first)


# ---------------------------------------------------------------- what the server takes in and lets out


def test_the_server_clips_what_a_client_did_not():
    release = NoisyResponses(0.0, clip=1.0, by="server")
    fair, hostile = Responses(torch.zeros(N, C), "logits"), Responses(torch.full((N, C), 1e6), "logits")
    moved = released(release, [fair, hostile]).values - released(release, [fair, fair]).values
    torch.testing.assert_close(torch.linalg.vector_norm(moved, dim=1), torch.full((N,), 0.5))
    with pytest.raises(RejectedMessageError, match="expected logits, got probabilities"):
        released(release, [Responses(torch.full((N, C), 1 / C), "probabilities")])


def test_a_release_has_all_rows_that_were_asked_for_and_no_others():
    rows, other = torch.tensor([1, 4]), torch.tensor([0, 1])
    uploads = [Responses(logits(0)[rows], "logits", rows), Responses(logits(1)[other], "logits", other)]
    knowledge = released(NoisyResponses(1.0, by="server"), uploads, rows=rows)
    assert knowledge.coverage.tolist() == [0, 2, 0, 0, 2, 0]  # who answered which is not told
    assert knowledge.values.abs().sum(1).nonzero().squeeze(1).tolist() == [1, 4]
    assert knowledge.log_weight[rows].unique().numel() == 1
    expected = 1 - torch.special.entr(knowledge.probabilities).sum(1) / math.log(C)
    torch.testing.assert_close(knowledge.agreement, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- accounts


def delta_at(eps, z):
    """The least δ of one Gaussian release at ε (Balle and Wang, 2018)."""
    return norm.cdf(1 / (2 * z) - eps * z) - math.exp(eps) * norm.cdf(-1 / (2 * z) - eps * z)


def spent(z, rounds):
    client = someone()
    for _ in range(rounds):
        sent(NoisyResponses(z), logits(0), client=client)
    return events_of(client)


def zcdp(z, rounds, delta):
    """ρ + 2√(ρ ln 1/δ) with ρ = T/(2z²) (Bun and Steinke, 2016)."""
    rho = rounds / (2 * z**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@pytest.mark.parametrize(("z", "expected"), [(10, 5.2985), (50, 0.9797)])
def test_a_hundred_rounds_cost_what_theory_says(z, expected):
    events = spent(float(z), 100)
    assert [(one["noise_multiplier"], one["count"], one["level"]) for one in events] == [(z, 100, "institution")]
    assert zcdp(z, 100, 1e-5) == pytest.approx(expected, abs=5e-5)
    renyi, exact = (epsilon(events, 1e-5, accountant, "institution") for accountant in ("rdp", "pld"))
    assert exact < renyi < expected
    # all rounds together are one Gaussian release with less noise, whose ε is known
    assert exact == pytest.approx(brentq(lambda eps: delta_at(eps, z / 10) - 1e-5, 0, 20), rel=0.01)


def test_the_classic_noise_for_epsilon_1_costs_less():
    z = math.sqrt(2 * math.log(1.25 / 1e-5))
    assert z == pytest.approx(4.84481, abs=5e-6)
    for level in ("institution", "example"):  # who hides an institution hides each of its samples
        assert epsilon(spent(z, 1), 1e-5, "pld", level) == pytest.approx(0.751, abs=1e-3)


def test_without_noise_nothing_is_private():
    assert epsilon(spent(0.0, 3), 1e-5, "rdp", "institution") == math.inf
    server = someone(-1)
    released(NoisyResponses(0.0, by="server"), [Responses(logits(0), "logits")], server)
    assert epsilon(events_of(server), 1e-5, "rdp", "institution") == math.inf


def test_the_servers_account_pays_once_a_round():
    server = someone(-1)
    for _ in range(3):
        released(NoisyResponses(2.0, by="server"), [Responses(logits(i), "logits") for i in range(K)], server)
    assert [(one["noise_multiplier"], one["count"]) for one in events_of(server)] == [(2.0, 3)]


# ---------------------------------------------------------------- audit


@pytest.mark.parametrize("by", ["client", "server"])
def test_no_attack_tells_neighbours_apart_better_than_promised_and_the_best_comes_close(by):
    z, releases, rows = 1.0, 3000 if by == "client" else 1000, 2
    release, far, scores = NoisyResponses(z, by=by), torch.full((rows, C), 9.0), []
    for sign in (1, -1):
        participant, of = someone(-1), []
        box = release.collect(ResponseMean(rows, C, "logits", weighted=False), participant, None)
        box.add(Responses(torch.zeros(rows, C), "logits"), 0)
        box.add(Responses(sign * far, "logits"), 1)
        for round in range(releases):
            participant.noise = someone(round=2 * round + (sign < 0)).noise
            out = box.result() if by == "server" else sent(release, sign * far, client=participant)
            of.append(float(out.values.sum()))  # the likelihood ratio's direction
        scores.append(torch.tensor(of))
    member, other = scores
    slack = 4 * math.sqrt(0.25 / releases)
    for eps in (0.25, 0.5, 1.0, 2.0):
        gains = [
            float((member > t).double().mean() - math.exp(eps) * (other > t).double().mean())
            for t in torch.quantile(member, torch.linspace(0.02, 0.98, 49))
        ]
        assert max(gains) <= delta_at(eps, z) + slack * (1 + math.exp(eps))
        assert max(gains) >= delta_at(eps, z) - slack  # less noise than promised, or more, would show


# ---------------------------------------------------------------- in a federation

RELEASES = {
    "client": lambda: {"private_release": NoisyResponses(0.5), "space": "logits"},
    "confidence": lambda: {"private_release": NoisyResponses(0.5), "space": "logits", "confidence": Entropy()},
    "personal": lambda: {"private_release": NoisyResponses(0.5), "space": "logits", "personalization": Similarity()},
    "server": lambda: {"private_release": NoisyResponses(0.5, by="server"), "space": "logits", "proxy_fraction": 0.5},
    "votes": lambda: {"private_release": NoisyVotes(0.5)},
    "checked votes": lambda: {"private_release": NoisyVotes(0.5, 1.0, 0.5), "soft_label_cache_rounds": 2},
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_resumed_run_equals_the_straight_one_and_pays_the_same(tmp_path, name):
    def toy(folder):
        return federation(FederatedDistillation(**RELEASES[name]()), tmp_path / folder, rounds=4, local_training=2)

    straight = toy("straight")
    straight.run()
    crashed = toy("crashed")
    crashed.rounds = 2
    crashed.run()
    resumed = toy("crashed")
    resumed.run(resume=True)
    assert outcome(resumed) == outcome(straight)
    accounts = [[events_of(one) for one in (loop.server, *loop.clients)] for loop in (resumed, straight)]
    assert accounts[0] == accounts[1]
    by_server = name not in ("client", "confidence", "personal")
    assert bool(accounts[0][0]) == by_server
    assert bool(accounts[0][1]) != by_server
    assert all(record["refused"] == {} for record in straight.history)


@pytest.mark.parametrize("by", ["client", "server"])
def test_without_noise_and_within_the_bounds_it_is_the_unprotected_method_to_the_bit(tmp_path, by):
    confidence = SampleCount() if by == "client" else None
    outcomes = []
    for release in (None, NoisyResponses(0.0, clip=1e6, bound=32.0, by=by)):
        method = FederatedDistillation(confidence, space="logits", private_release=release)
        loop = federation(method, tmp_path / str(release is None), rounds=3, local_training=2)
        loop.run()
        outcomes.append((weight(loop.server.student), [c.state["specialist"]["linear.weight"] for c in loop.clients]))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1]))


def test_a_client_that_is_private_does_not_say_how_many_samples_it_has(tmp_path):
    loop = federation(FederatedDistillation(private_release=NoisyResponses(1.0), space="logits"), tmp_path)
    loop.start_round(1)
    assert run_local_update(loop.method, loop.clients[1], None).samples == 0


REFUSED = {
    "features": ({"features": FeatureTransfer(layers=0)}, "client"),
    "prototypes": ({"prototypes": PrototypeTransfer()}, "client"),
    "upload_policy": ({"upload_policy": UploadOnChange()}, "client"),
    "adaptive_client_weights": ({"adaptive_client_weights": AdaptiveWeights()}, "server"),
    "personalization": ({"personalization": Similarity()}, "server"),
    "confidence": ({"confidence": Entropy()}, "server"),
    "space is probabilities": ({"space": "probabilities"}, "client"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_noise_would_not_cover_is_refused(name):
    options, by = REFUSED[name]
    with pytest.raises(UserError, match=f"private_release: noisy_responses .*{name}"):
        FederatedDistillation(**{"space": "logits", "private_release": NoisyResponses(1.0, by=by), **options})


def test_settings_that_make_no_sense_are_refused():
    for key, value in (("noise_multiplier", -1.0), ("clip", 0.0), ("bound", math.inf), ("by", "nobody")):
        with pytest.raises(UserError, match=key):
            NoisyResponses(**{"noise_multiplier": 1.0, key: value})


# ---------------------------------------------------------------- budgets


def test_a_client_whose_budget_is_spent_says_nothing_more(caplog):
    policy = Policy(1e-5, 5.0, "rdp", "institution")
    client, release = someone(privacy=policy), NoisyResponses(3.0)
    heard = 0
    with caplog.at_level("INFO", logger="fdl"):
        while sent(release, logits(0), client=client) is not None:
            heard += 1
    most = next(n for n in range(1, 100) if epsilon(spent(3.0, n + 1), 1e-5, "rdp", "institution") > 5)
    assert heard == most > 1
    assert [one["count"] for one in events_of(client)] == [heard]
    assert client.metrics["privacy/exhausted"] == 1
    assert client.metrics["privacy/epsilon"] == policy.spent(events_of(client)) <= 5
    assert "client 0: its privacy budget has no room for noisy_responses" in caplog.text


def test_a_server_whose_budget_is_spent_releases_nothing_more(caplog):
    server, release = someone(-1, privacy=Policy(1e-5, 4.0, "rdp", "institution")), NoisyResponses(1.5, by="server")
    uploads = [Responses(logits(i), "logits") for i in range(K)]
    assert released(release, uploads, server) is not None
    with caplog.at_level("INFO", logger="fdl"):
        assert released(release, uploads, server) is None
    assert server.metrics["privacy/exhausted"] == 1
    assert "the server: its privacy budget has no room" in caplog.text


def test_a_run_goes_on_in_silence_once_budgets_are_spent(tmp_path):
    method = FederatedDistillation(private_release=NoisyResponses(1.5), space="logits", feedback="none")
    loop = federation(method, tmp_path, rounds=3)
    for one in (loop.server, *loop.clients):
        one.privacy = Policy(1e-5, 4.0, "rdp", "institution")
    loop.run()
    assert {row.round for row in loop.ledger.rows() if row.direction == "up"} == {1}
    assert [events_of(client)[0]["count"] for client in loop.clients] == [1, 1]
    assert all(record["refused"] == {} for record in loop.history)
