"""Each attack against its formula, worked out by hand."""

import math
from statistics import NormalDist

import pytest
import torch

from fdl.adversaries.answers import ClassConfusion, FixedClass, HiddenReplay, LeastLikely, RandomClass
from fdl.adversaries.free_riders import FreeRider, Sybil
from fdl.adversaries.parameters import ALittleIsEnough, GaussianNoise, InnerProduct, SignFlip, largest_z
from fdl.errors import UserError
from fdl.messages import Bundle, Features, Parameters, Prototypes, Responses, UploadStatus, parts_of
from tests.adversaries.contexts import Player, answers, context, flat, weights

ONE = [[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]
TWO = [[0.4, 0.5, 0.1], [0.2, 0.2, 0.6]]  # mean with ONE: .3 .5 .2 | .4 .25 .35
EPS = torch.finfo(torch.float32).eps


def close(message, rows):
    torch.testing.assert_close(message.values, torch.tensor(rows), atol=1e-6, rtol=1e-5)


def test_sign_flip_of_weights_turns_the_displacement_round():
    own, start = weights(1.5, 2.0, -1.0), weights(1.0, 1.0, 1.0)
    sent = SignFlip(scale=2.0).attack(context(own, download=start))
    assert flat(sent) == [0.0, -1.0, 5.0]  # 1 - 2 · 0.5, 1 - 2 · 1, 1 + 2 · 2
    assert sent.tensors["steps"] == 7 and sent.samples == 5
    assert flat(SignFlip().attack(context(own))) == [-1.5, -2.0, 1.0]  # nothing came down: displaced from zero


def test_sign_flip_of_answers_negates_logits():
    close(SignFlip(2.0).attack(context(answers([[1.0, -2.0, 0.0]], "logits"))), [[-2.0, 4.0, 0.0]])
    # softmax(-log p) = (1/p) / Σ 1/p: of 1/2, 1/4, 1/4 that is 2, 4, 4 of 10
    close(SignFlip().attack(context(answers([[0.5, 0.25, 0.25]]))), [[0.2, 0.4, 0.4]])
    close(SignFlip().attack(context(answers([[1.0, -1.0]], "embeddings"))), [[-1.0, 1.0]])


def test_gaussian_noise_has_its_standard_deviation_and_leaves_counters():
    own = Parameters({"w": torch.ones(20000), "steps": torch.tensor(7)}, 5)
    sent = GaussianNoise(std=0.5).attack(context(own))
    noise = sent.tensors["w"] - 1
    assert noise.mean().abs() < 0.02 and (noise.std() - 0.5).abs() < 0.01
    assert sent.tensors["steps"] == 7
    rows = torch.zeros(4000, 3)
    sent = GaussianNoise(std=2.0).attack(context(Responses(rows, "logits")))
    assert (sent.values.std() - 2.0).abs() < 0.05
    sent = GaussianNoise(std=2.0).attack(context(Responses(torch.full((40, 3), 1 / 3), "probabilities")))
    torch.testing.assert_close(sent.values.sum(1), torch.ones(40))
    assert (sent.values > 0).all() and sent.values.std() > 0.1


def test_fixed_and_random_classes_are_certain():
    close(FixedClass(2).attack(context(answers(ONE))), [[0.0, 0.0, 1.0]] * 2)
    sent = FixedClass(1).attack(context(answers([[3.0, 2.0, 1.0]], "logits")))
    close(sent, [[math.log(EPS), 0.0, math.log(EPS)]])
    sent = RandomClass().attack(context(Responses(torch.zeros(3000, 3), "probabilities")))
    assert set(sent.values.sum(1).tolist()) == {1.0} and set(sent.values.unique().tolist()) == {0.0, 1.0}
    assert (sent.values.mean(0) - 1 / 3).abs().max() < 0.05
    with pytest.raises(UserError, match="no class 3"):
        FixedClass(3).prepare(Player())


def test_lma_names_the_class_that_the_honest_mean_likes_least():
    honest = [answers(ONE), answers(TWO)]
    close(LeastLikely().attack(context(answers(TWO), honest)), [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    # the mean of probabilities, about 1/2 0 1/2, not of logits, whose mean is 0 1 4/3
    logits = [answers([[9.0, 1.0, 0.0]], "logits"), answers([[-9.0, 1.0, 8.0]], "logits")]
    assert LeastLikely().attack(context(logits[0], logits)).values.argmax(1) == 1


def test_cpa_always_mistakes_a_class_for_the_one_least_like_it():
    # classes 0 and 1 come together, 2 apart: the least like 0 and 1 is 2; of 2, it is the one that varies most with it
    rows = [[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.4, 0.6, 0.0], [0.0, 0.1, 0.9]]
    mean = torch.tensor(rows, dtype=torch.float64)
    least = torch.cov(mean.T).argmin(1)
    assert least.tolist()[:2] == [2, 2]
    named = ClassConfusion().attack(context(answers(ONE * 2), [answers(rows)])).values.argmax(1)
    assert named.tolist() == [2, 2, 2, int(least[2])]


def test_hips_repeats_the_honest_answer_that_does_the_most_harm():
    honest = [answers([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1]]), answers([[0.2, 0.7, 0.1], [0.0, 0.9, 0.1]])]
    honest.append(answers([[0.8, 0.2, 0.0], [0.6, 0.3, 0.1]]))
    sent = HiddenReplay().attack(context(answers(ONE), honest, num_uploads=4, num_attackers=1))
    expected = []
    for row in range(2):
        told = [h.values[row].double() for h in honest]
        mean = sum(told) / 3
        harm = [-(mean * (0.75 * mean + 0.25 * p).clamp_min(1e-30).log()).sum() for p in told]
        expected.append(told[harm.index(max(harm))].tolist())
    close(sent, expected)
    assert expected == [pytest.approx([0.2, 0.7, 0.1]), pytest.approx([0.6, 0.3, 0.1])]


def test_alie_shifts_the_honest_mean_by_their_own_spread():
    honest = [weights(0.0, 1.0, 5.0), weights(2.0, 1.0, 1.0)]  # mean 1 1 3, std 1 0 2
    assert flat(ALittleIsEnough(z=1.5).attack(context(weights(9.0, 9.0, 9.0), honest))) == [-0.5, 1.0, 0.0]
    sent = ALittleIsEnough(z=2.0).attack(context(answers(ONE), [answers(ONE), answers(TWO)]))
    # mean .3 .5 .2 with std .1 0 .1 gives .1 .5 0, normalised; mean .4 .25 .35 with std .2 .05 .25 gives 0 .15 0
    close(sent, [[1 / 6, 5 / 6, 0.0], [0.0, 1.0, 0.0]])
    sent = ALittleIsEnough(z=1.0).attack(
        context(answers([[0.0]], "logits"), [answers([[4.0]], "logits"), answers([[2.0]], "logits")])
    )
    close(sent, [[2.0]])


def test_the_shift_of_alie_follows_from_how_many_there_are():
    # 50 clients, 24 attackers: s = 26 - 24 = 2 of 26 honest ones must lie further out
    assert largest_z(50, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26)) == pytest.approx(1.4260768722)
    assert math.isfinite(largest_z(4, 3)) and math.isfinite(largest_z(1, 1)) and math.isfinite(largest_z(9, 0))


def test_the_inner_product_with_the_honest_mean_is_negative():
    honest, start = [weights(2.0, 1.0, 1.0), weights(4.0, 1.0, -3.0)], weights(1.0, 1.0, 1.0)
    sent = InnerProduct(epsilon=0.5).attack(context(weights(9.0, 9.0, 9.0), honest, start))
    assert flat(sent) == [0.0, 1.0, 2.0]  # displacements 1 0 0 and 3 0 -4, mean 2 0 -2
    logits = [answers([[1.0, 3.0]], "logits"), answers([[3.0, -1.0]], "logits")]
    close(InnerProduct(2.0).attack(context(logits[0], logits)), [[-4.0, -2.0]])
    own = answers([[0.5, 0.5]])
    close(InnerProduct(1.0).attack(context(own, [answers([[0.8, 0.2]]), answers([[0.2, 0.8]])])), [[0.5, 0.5]])
    close(InnerProduct(1.0).attack(context(own, [answers([[0.8, 0.2]])])), [[0.2, 0.8]])


def test_an_adversary_that_sees_nobody_goes_by_its_own_answers():
    close(LeastLikely().attack(context(answers(ONE))), [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    other = answers(TWO, at=[0, 2])
    close(LeastLikely().attack(context(answers(ONE, at=[0, 1]), [other])), [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert flat(ALittleIsEnough(3.0).attack(context(weights(1.0, 2.0, 3.0)))) == [1.0, 2.0, 3.0]


def test_a_free_rider_returns_what_came_down():
    assert flat(FreeRider().attack(context(weights(9.0, 9.0, 9.0), download=weights(1.0, 2.0, 3.0)))) == [1.0, 2.0, 3.0]
    down = answers([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]], at=[4, 2])
    close(FreeRider().attack(context(answers(ONE, at=[2, 3]), download=down)), [[0.3, 0.3, 0.4], [1 / 3, 1 / 3, 1 / 3]])
    close(FreeRider().attack(context(answers(ONE))), [[1 / 3] * 3] * 2)
    noisy = FreeRider(noise=0.1).attack(context(weights(9.0, 9.0, 9.0), download=weights(1.0, 2.0, 3.0)))
    assert flat(noisy) != [1.0, 2.0, 3.0] and max(abs(a - b) for a, b in zip(flat(noisy), [1, 2, 3])) < 0.5


def test_sybils_send_what_the_first_of_them_sends():
    players = {i: Player(i) for i in (3, 5)}
    allies = {3: weights(1.0, 2.0, 3.0, samples=4), 5: weights(4.0, 5.0, 6.0, samples=9)}
    sent = [Sybil().attack(context(allies[i], client=players[i], allies=allies, clients=players)) for i in (3, 5)]
    assert [flat(message) for message in sent] == [[1.0, 2.0, 3.0]] * 2
    assert [message.samples for message in sent] == [4, 9]
    noisy = Sybil(GaussianNoise(1.0))
    sent = [noisy.attack(context(allies[i], client=players[i], allies=allies, clients=players)) for i in (3, 5)]
    assert flat(sent[0]) == flat(sent[1]) == flat(GaussianNoise(1.0).attack(context(allies[3], client=players[3])))
    assert (Sybil().sees, Sybil(LeastLikely()).sees) == ("allies", "all")
    assert Sybil(LeastLikely()).spaces == ("responses",)


def test_liars_claim_the_largest_confidence_unless_told_otherwise():
    own = answers(ONE, weights=[0.0, -3.0])
    claimed = LeastLikely().attack(context(own)).confidence
    assert claimed.values().tolist() == [32.0, 32.0]
    assert LeastLikely(confidence="own").attack(context(own)).confidence is own.confidence
    assert LeastLikely().attack(context(answers(ONE))).confidence is None
    with pytest.raises(UserError, match="confidence"):
        LeastLikely("most")


def test_other_parts_of_a_bundle_stay_and_what_cannot_be_attacked_is_refused():
    features = Features({"layer": torch.ones(2, 2)})
    sent = parts_of(FixedClass(0).attack(context(Bundle((answers(ONE), features)))))
    assert sent[Features] is features and sent[Responses].values[:, 0].tolist() == [1.0, 1.0]
    with pytest.raises(UserError, match="random_class attacks responses, and what would be sent is parameters"):
        RandomClass().attack(context(weights(1.0, 2.0, 3.0)))
    prototypes = Prototypes(torch.ones(1, 2), torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(UserError, match="prototypes"):
        SignFlip().attack(context(prototypes))
    standing = UploadStatus(2)
    assert SignFlip().attack(context(standing)) is standing


@pytest.mark.parametrize("make", [SignFlip, GaussianNoise, InnerProduct, ALittleIsEnough, HiddenReplay, LeastLikely])
@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_what_is_sent_can_be_decoded(make, form):
    hard = torch.eye(3) if form == "probabilities" else 1e4 * torch.eye(3)
    own = answers(hard.tolist(), form, weights=[0.0, 1.0, 2.0])
    sent = make().attack(context(own, [own, own]))
    sent.validate()
    assert sent.values.shape == (3, 3) and sent.form == form and sent.values.dtype == torch.float32
    if form == "probabilities":
        torch.testing.assert_close(sent.values.sum(1), torch.ones(3))
