"""FedDF's choice among the models that a distillation passes through, against a loop written by hand.

After one local step W₀ = [[½, 0], [-½, 0]] and W₁ = [[0, -½], [0, ½]], whose average, by sample counts, is MEAN; the
ensemble's answer to either proxy row is σ(½) for its own class (see test_one_round).
"""

import math

import pytest
import torch

from fdl.errors import RejectedMessageError, UserError
from fdl.knowledge.confidence.base import Confidence, Uniform, Validation
from fdl.knowledge.distillation.validated import BestOnValidation
from fdl.messages import Bundle, Parameters, QuantizedLogWeights, Scores
from fdl.methods.feddf import FedDF
from tests.toy import E0, E1, federation, samples, weight

MEAN = torch.tensor([[0.125, -0.375], [-0.125, 0.375]])


def toy(method, folder, validation, **settings):
    loop = federation(method, folder, **settings)
    loop.server.validation = validation
    return loop


def run(method, folder, validation, **settings):
    loop = toy(method, folder, validation, **settings)
    loop.run()
    return loop


def trajectory(steps, start=MEAN):
    """Weights before and after every full-batch step of the distillation, by its closed-form gradient (q - p) / 2."""
    target = 1 / (1 + math.exp(-0.5))
    weights, teacher = [start.clone()], torch.tensor([[target, 1 - target], [1 - target, target]])
    for _ in range(steps):
        q = torch.softmax(weights[-1].T, 1)  # row i answers proxy row i
        weights.append(weights[-1] - ((q - teacher) / 2).T)
    return weights


def best(weights, rows, labels):
    """The first of the weights with the highest accuracy, and of these with the lowest likelihood loss."""

    def score(w):
        logits = torch.tensor(rows) @ w.T
        right = (logits.argmax(1) == torch.tensor(labels)).float().mean()
        return float(right), -float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)))

    return max(range(len(weights)), key=lambda i: (*score(weights[i]), -i))


# an input between both classes, nearer to the first or to the second; its label says whether the average or the teacher
# is the better model for it
@pytest.mark.parametrize("rows", [[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.6]], [[0.6, 1.0]], [[1.0, 0.5], [0.2, 1.0]]])
def test_the_best_model_on_validation_data_is_kept(tmp_path, rows):
    labels = [0] * len(rows)
    passed = trajectory(6)
    expected = best(passed, rows, labels)
    loop = run(FedDF(every=1), tmp_path, samples(rows, labels), server_distil=6)
    torch.testing.assert_close(weight(loop.server.student), passed[expected])
    assert loop.history[0]["metrics"]["best_step"] == expected and loop.history[0]["metrics"]["steps"] == 6


def test_the_average_itself_is_a_candidate(tmp_path):
    # the average calls (0, 1) the second class more firmly than any later model, so that it is best where that is right
    loop = run(FedDF(every=1), tmp_path, samples([E1], [1]), server_distil=4)
    assert loop.history[0]["metrics"]["best_step"] == 0
    torch.testing.assert_close(weight(loop.server.student), MEAN)
    last = run(FedDF(select="last"), tmp_path / "last", samples([E1], [1]), server_distil=4)
    torch.testing.assert_close(weight(last.server.student), trajectory(4)[-1])


def test_looking_every_other_step_passes_by_the_others_but_the_last(tmp_path):
    rows, labels, passed = [[1.0, 0.6]], [0], trajectory(5)
    seen = [0, 2, 4, 5]
    expected = seen[best([passed[i] for i in seen], rows, labels)]
    loop = run(FedDF(every=2), tmp_path, samples(rows, labels), server_distil=5)
    torch.testing.assert_close(weight(loop.server.student), passed[expected])


def test_a_distillation_without_gain_ends_early(tmp_path):
    loop = run(FedDF(every=1, patience=3), tmp_path, samples([E1], [1]), server_distil=50)
    assert loop.history[0]["metrics"]["steps"] == 3
    torch.testing.assert_close(weight(loop.server.student), MEAN)


def test_looking_does_not_change_the_fit(tmp_path):
    # at the last step the model is that of a fit that nobody watched: same batches, same optimiser
    watched = run(FedDF(every=1), tmp_path / "a", samples([E0], [0]), server_distil=7)
    alone = run(FedDF(select="last"), tmp_path / "b", samples([E0], [0]), server_distil=7)
    assert watched.history[0]["metrics"]["best_step"] == 7
    assert torch.equal(weight(watched.server.student), weight(alone.server.student))


def test_ties_in_accuracy_are_broken_by_likelihood(tmp_path):
    loop = toy(FedDF(), tmp_path, samples([E0], [0]))
    module = loop.server.student
    watch = BestOnValidation(loop.server, module, every=1, patience=None)
    for step, scale in enumerate([1.0, 3.0, 2.0], 1):  # all right, and the second the surest
        with torch.no_grad():
            module.linear.weight.copy_(scale * MEAN)
        assert not watch(step)
    watch.restore()
    assert watch.best_step == 2
    torch.testing.assert_close(weight(module), 3 * MEAN)


def test_who_does_not_beat_chance_does_not_teach(tmp_path):
    # client 1 learns that (0, 1) is of class 0, so that W₁ = [[0, ½], [0, -½]]: it answers neither validation sample
    # better than by a coin. Client 0 alone teaches: σ(1) on (1, 0), ½ on (0, 1)
    loop = toy(FedDF(select="last", drop_worst=True), tmp_path, samples([E0, [0.0, 1.0]], [0, 1]))
    loop.clients[1].train = samples([E1] * 3, [0] * 3)
    loop.clients[0].train = samples([E0, E1], [0, 1])
    loop.run()
    assert loop.history[0]["metrics"]["teachers"] == 1
    own = torch.tensor([[0.25, -0.25], [-0.25, 0.25]])  # of client 0, one full-batch step on both of its samples
    other = torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    average = 0.4 * own + 0.6 * other  # the average still has both
    p = torch.softmax(own.T, 1)
    expected = average - ((torch.softmax(average.T, 1) - p) / 2).T
    torch.testing.assert_close(weight(loop.server.student), expected)


def test_where_nobody_beats_chance_all_teach(tmp_path):
    # both say the wrong class of every validation sample
    kept = run(FedDF(select="last", drop_worst=True), tmp_path / "a", samples([E0, E1], [1, 0]))
    plain = run(FedDF(select="last"), tmp_path / "b", samples([E0, E1], [1, 0]))
    assert kept.history[0]["metrics"]["teachers"] == 2
    assert torch.equal(weight(kept.server.student), weight(plain.server.student))


@pytest.mark.parametrize("args", [{}, {"select": "last", "drop_worst": True}])
def test_without_validation_samples_there_is_a_sentence(tmp_path, args):
    with pytest.raises(UserError, match=r"validation samples, and there are none: set data\.args\.validation"):
        federation(FedDF(**args), tmp_path).run()


def test_every_architecture_keeps_its_own_best(tmp_path):
    # one group of clients, "linear", and the student, which starts at zero and which nobody trains
    loop = run(FedDF("specialists", every=1), tmp_path, samples([E1], [1]), server_distil=3)
    torch.testing.assert_close(loop.server.state["groups"]["linear"]["linear.weight"], MEAN)
    expected = trajectory(3, torch.zeros(2, 2))
    torch.testing.assert_close(weight(loop.server.student), expected[-1])


class Told(Confidence):
    """Literal log-weights by client size."""

    def __init__(self, by_size):
        self.by_size = by_size

    def score(self, client, logits):
        return torch.tensor(self.by_size[client.samples])


TOLD = {1: [0.0, math.log(3)], 3: [math.log(7), 0.0]}
"""Of client 0 and 1: it counts for an eighth of the first proxy row, and for three quarters of the second."""


def test_teachers_count_by_their_confidence_and_the_average_by_samples(tmp_path):
    loop = run(FedDF(select="last", confidence=Told(TOLD), max_client_share=None), tmp_path, samples([E0], [0]))
    models = torch.tensor([[[0.5, 0.0], [-0.5, 0.0]], [[0.0, -0.5], [0.0, 0.5]]])
    shares = torch.tensor([[1 / 8, 3 / 4], [7 / 8, 1 / 4]])
    logits = (shares.unsqueeze(2) * models.transpose(1, 2)).sum(0)  # row i answers proxy row i
    expected = MEAN - ((torch.softmax(MEAN.T, 1) - torch.softmax(logits, 1)) / 2).T
    torch.testing.assert_close(weight(loop.server.student), expected, atol=2e-3, rtol=0)  # log-weights have 8 bits
    kinds = {row.kind for row in loop.ledger.rows() if row.direction == "up"}
    assert kinds == {"parameters", "scores"}
    assert loop.ledger.totals()["setup_bytes"] == 2 * loop.server.proxy.nbytes


def test_equal_confidence_is_no_confidence(tmp_path):
    equal = run(FedDF(select="last", confidence=Uniform()), tmp_path / "a", samples([E0], [0]), server_distil=3)
    plain = run(FedDF(select="last"), tmp_path / "b", samples([E0], [0]), server_distil=3)
    torch.testing.assert_close(weight(equal.server.student), weight(plain.server.student))


def test_no_teacher_has_more_than_the_cap(tmp_path):
    # of two clients, whose equal share is a half, one with 1.0 such shares of the round has no more than the other
    claims = FedDF(select="last", confidence=Told({1: [30.0, 30.0], 3: [0.0, 0.0]}), max_client_share=1.0)
    capped = run(claims, tmp_path / "a", samples([E0], [0]))
    plain = run(FedDF(select="last"), tmp_path / "b", samples([E0], [0]))
    torch.testing.assert_close(weight(capped.server.student), weight(plain.server.student), atol=1e-4, rtol=0)


def test_an_upload_without_what_is_asked_is_refused_whole(tmp_path):
    loop = toy(FedDF(select="last", confidence=Uniform()), tmp_path, samples([E0], [0]))
    aggregate = loop.method.aggregate(loop.server)
    weights, sure = (
        Parameters({"linear.weight": torch.eye(2)}, 1),
        lambda n: Scores(QuantizedLogWeights.quantize(torch.ones(n))),
    )
    for upload, said in (
        (weights, "expected parameters and scores, got parameters"),
        (sure(2), "expected parameters and scores, got scores"),
        (Bundle((weights, sure(3))), "2 answers with 3 confidences"),
        (Bundle((weights, Scores(QuantizedLogWeights.quantize(torch.full((2,), 99.0))))), "outside of ±32"),
    ):
        with pytest.raises(RejectedMessageError, match=said):
            aggregate.add(upload, 0)
    assert aggregate.result() is None
    aggregate.add(Bundle((weights, sure(2))), 0)
    averages, logits, teachers = aggregate.result()
    assert torch.equal(averages["student"]["linear.weight"], torch.eye(2)) and teachers == 1
    torch.testing.assert_close(logits, torch.eye(2))
    with pytest.raises(RejectedMessageError, match="expected parameters, got parameters and scores"):
        FedDF(select="last").aggregate(loop.server).add(Bundle((weights, sure(2))), 0)


def test_a_confidence_of_a_specialist_is_refused():
    with pytest.raises(UserError, match="confidence validation asks a client's specialist"):
        FedDF(confidence=Validation())
