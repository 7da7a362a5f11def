"""Selective knowledge fusion on the toy federation; public samples are (1, 0) of class 0 and (0, 1) of class 1."""

import math

import pytest
import torch

from fdl.errors import RejectedMessageError, UserError
from fdl.messages import QuantizedLogWeights, Responses
from fdl.methods.fedgems import MIN_ENTROPY, CorrectClientMean, FedGEMS
from tests.test_loop import Crash, outcome
from tests.toy import E0, E1, federation, samples, weight


def toy(folder, epsilon=0.75, **settings):
    loop = federation(FedGEMS(epsilon), folder, **settings)
    for participant in (loop.server, *loop.clients):
        participant.public = samples([E0, E1], [0, 1])
    return loop


def sigma(z):
    return 1 / (1 + math.exp(-z))


def test_one_round_by_hand(tmp_path):
    # a client moves the margin of its own column to ½ on either side and answers (½, -½) for its public sample and
    # (0, 0) for the other, whose first class wins: so client 0 is right on row 0, client 1 on both rows (0 by the tie).
    loop = toy(tmp_path)
    loop.run()
    # the student, all zeros, is right on row 0 (by the tie) and learns CE there; on row 1 only client 1 is right, so
    # its answer (-½, ½) is the target: p = σ(1); both gradients are halved by the batch of two
    first, second = 0.25, (sigma(1.0) - 0.5) / 2
    torch.testing.assert_close(weight(loop.server.student), torch.tensor([[first, -second], [-first, second]]))
    metrics = loop.history[0]["metrics"]
    assert [metrics[f"public/{kind}"] for kind in ("right", "remembered", "helped")] == [0.5, 0.0, 0.5]
    assert loop.server.state["remembered"].tolist() == [True, False]


def test_what_was_right_once_is_remembered(tmp_path):
    loop = toy(tmp_path, epsilon=0.25)
    loop.run()
    server = loop.server
    with torch.no_grad():  # forget row 0: the student now says class 1 there
        server.student.linear.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    server.state["memory"][0], server.state["remembered"][0] = torch.tensor([2.0, 0.0]), True
    server.state["remembered"][1] = False
    nobody = loop.method.aggregate(server)
    nobody.add(Responses(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "logits"), 0)  # wrong everywhere
    log = loop.method.server_update(server, nobody.result())
    # row 0: ¼ CE + ¾ KL towards σ(2), from p = σ(-2); row 1: nobody is right, so CE from p = ½; half of each
    pull = 0.25 * (1 - sigma(-2.0)) + 0.75 * (sigma(2.0) - sigma(-2.0))
    expected = torch.tensor([[-1 + pull / 2, -0.25], [1 - pull / 2, 0.25]])
    torch.testing.assert_close(weight(server.student), expected)
    assert log["public/remembered"] == 0.5 and log["public/helped"] == 0.0


def test_weights_are_a_softmax_of_inverse_entropies_over_those_who_are_right():
    logits = [[[1.0, 0.0, 0.0]], [[3.0, 0.0, 1.0]], [[0.0, 5.0, 0.0]], [[40.0, 0.0, 0.0]]]
    mean = CorrectClientMean(torch.tensor([0]), 3)
    for client, values in enumerate(logits):
        mean.add(Responses(torch.tensor(values), "logits"), client)
    weights = {}
    for client in (0, 1, 3):  # client 2 is wrong
        exps = [math.exp(v) for v in logits[client][0]]
        entropy = -sum(e / sum(exps) * math.log(e / sum(exps)) for e in exps)
        weights[client] = math.exp(1 / max(entropy, MIN_ENTROPY))
    total = sum(weights.values())
    expected = [sum(w / total * logits[c][0][k] for c, w in weights.items()) for k in range(3)]
    torch.testing.assert_close(mean.result().values, torch.tensor([expected]))
    assert mean.result().coverage.tolist() == [3]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Responses(torch.full((2, 2), 0.5), "probabilities"), "expected logits"),
        (Responses(torch.zeros(1, 2), "logits", torch.tensor([0])), "expected logits of all"),
        (Responses(torch.zeros(3, 2), "logits"), "all 2 proxy rows"),
        (Responses(torch.zeros(2, 2), "logits", None, QuantizedLogWeights.quantize(torch.zeros(2))), "not asked for"),
    ],
)
def test_answers_that_do_not_fit_are_refused(message, reason):
    mean = CorrectClientMean(torch.tensor([0, 1]), 2)
    with pytest.raises(RejectedMessageError, match=reason):
        mean.add(message, 0)
    assert mean.result() is None


def test_from_labels_alone_clients_train_on_public_and_private_data(tmp_path):
    loop = toy(tmp_path, epsilon=1.0, rounds=2)
    loop.run()
    # round 1: margin ½ on its own column; round 2: first a step of CE on both public rows, then one on its own
    own = 0.5 + (1 - sigma(1.0)) / 2
    own, other = own + 1 - sigma(2 * own), 0.25
    torch.testing.assert_close(
        loop.clients[0].state["specialist"]["linear.weight"], torch.tensor([[own, -other], [-own, other]])
    )


def test_public_samples_are_sent_once_with_their_labels(tmp_path):
    loop = toy(tmp_path, rounds=2)
    loop.run()
    assert loop.ledger.by_kind()["setup/public"] == 2 * (2 * 2 * 4 + 2)


@pytest.mark.parametrize("crash_in", [2, 3])
def test_a_resumed_run_equals_the_straight_one(tmp_path, crash_in):
    settings = {"rounds": 4, "local_training": 2, "server_distil": 2, "client_fraction": 0.5}
    straight = toy(tmp_path / "straight", **settings)
    straight.run()
    crashed = toy(tmp_path / "crashed", callbacks=[Crash(crash_in)], **settings)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.run()
    resumed = toy(tmp_path / "crashed", **settings)
    resumed.run(resume=True)
    assert outcome(resumed) == outcome(straight)


def test_epsilon_is_a_share():
    with pytest.raises(UserError, match=r"epsilon must be in \[0, 1\]"):
        FedGEMS(1.5)
